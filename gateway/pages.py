"""The pages that are made here: the operations of the API, and signing in; all else is the console.

No script, no other host.
"""

from __future__ import annotations

from html import escape

from gateway import examples
from gateway.schemas import Json

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #1d2430; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #d5dbe5; }
code { font-family: ui-monospace, monospace; font-size: .92em; overflow-wrap: anywhere; }
details { border: 1px solid #d5dbe5; border-radius: 6px; margin: .5rem 0; padding: .4rem .8rem; }
summary { cursor: pointer; } summary b { display: inline-block; min-width: 4.5rem; color: #0b5cad; }
table { border-collapse: collapse; } td { padding: .15rem 1rem .15rem 0; vertical-align: top; }
pre { white-space: pre-wrap; background: #f2f5f9; border-radius: 4px; padding: .5rem .7rem; }
a { color: #0b5cad; } h1 { overflow-wrap: anywhere; }
button { font: inherit; padding: .5rem 1.2rem; border: 0; border-radius: 6px; background: #0b5cad;
  color: #fff; cursor: pointer; }
@media (prefers-color-scheme: dark) {
  body { background: #14181f; color: #dde3ec; } a, summary b { color: #7db7f5; }
  h2, details { border-color: #394150; } pre { background: #1e2430; }
}
"""


_TEXTS = {
    "en": {
        "sign_in": "Sign in to detflow",
        "explain": "This link signs this browser in as whoever asked for it. It counts once.",
        "button": "Sign in",
        "again": "Back to the console",
        "link": "This link does not count any more",
        "link_remedy": "It has been used, or its minute is over. Make a new one with"
        " <code>detflow open</code>, on the machine where detflow runs or where DETFLOW_TOKEN is"
        " set.",
        "refused": "You are not signed in",
        "refused_remedy": "The identity provider did not confirm who you are, it took too long, or"
        " this is another browser. Sign in again; if that does not help, ask an administrator, who"
        " finds the cause in the gateway's log.",
        "no_issuer": "There is no identity provider",
        "no_issuer_remedy": "None is set for this installation. Sign in by a link from"
        " <code>detflow open</code>, or ask an administrator to set DETFLOW_OIDC_ISSUER.",
        "away": "Signing in is not possible right now",
        "away_remedy": "The service or identity provider behind it does not answer. Wait a little"
        " and try again; an administrator finds the cause in the gateway's log.",
    },
    "ko": {
        "sign_in": "detflow 로그인",
        "explain": "이 링크를 요청한 사람의 계정으로 이 브라우저에 로그인합니다. 한 번만 사용할 수"
        " 있습니다.",
        "button": "로그인",
        "again": "콘솔로 돌아가기",
        "link": "더 이상 사용할 수 없는 링크입니다",
        "link_remedy": "이미 사용했거나 유효 시간 1분이 지났습니다. detflow가 실행 중이거나"
        " DETFLOW_TOKEN이 설정된 컴퓨터에서 <code>detflow open</code>으로 새 링크를 만드세요.",
        "refused": "로그인되지 않았습니다",
        "refused_remedy": "인증 서비스에서 사용자를 확인하지 못했거나, 시간이 초과되었거나, 다른"
        " 브라우저입니다. 다시 로그인하세요. 계속 실패하면 관리자에게 문의하세요. 원인은"
        " 게이트웨이 로그에 있습니다.",
        "no_issuer": "인증 서비스가 없습니다",
        "no_issuer_remedy": "이 설치에는 인증 서비스가 설정되어 있지 않습니다."
        " <code>detflow open</code>이 만든 링크로 로그인하거나, 관리자에게 DETFLOW_OIDC_ISSUER"
        " 설정을 요청하세요.",
        "away": "지금은 로그인할 수 없습니다",
        "away_remedy": "로그인을 처리하는 서비스가 응답하지 않습니다. 잠시 후 다시 시도하세요."
        " 원인은 게이트웨이 로그에 있습니다.",
    },
}
"""By language; the remedies are markup."""


def sign_in(ticket: str, language: str) -> str:
    """The page of a login link, with the button that redeems its ticket."""
    text = _TEXTS[language]
    return _page(
        text["sign_in"],
        f"<h1>{text['sign_in']}</h1><p>{text['explain']}</p>"
        '<form method="post" action="/login/session">'
        f'<input type="hidden" name="ticket" value="{escape(ticket)}">'
        f"<button autofocus>{text['button']}</button></form>",
        language,
    )


def problem(name: str, language: str) -> str:
    """The page that says why nobody was signed in, and what to do: link, refused, away, ..."""
    text = _TEXTS[language]
    return _page(
        text[name],
        f"<h1>{text[name]}</h1><p>{text[f'{name}_remedy']}</p>"
        f'<p><a href="/">{text["again"]}</a></p>',
        language,
    )


def _page(title: str, body: str, language: str = "en") -> str:
    return (
        f'<!doctype html><html lang="{language}"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>{body}</body></html>"
    )


def docs(document: Json) -> str:
    """All operations, by service."""
    sections: dict[str, list[str]] = {tag["name"]: [] for tag in document["tags"]}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            sections[operation["tags"][0]].append(_operation(method.upper(), path, operation))
    contents = " · ".join(
        f'<a href="#{escape(tag["name"])}">{escape(tag["name"])}</a>' for tag in document["tags"]
    )
    body = f"<p>{contents}</p>" + "".join(
        f'<h2 id="{escape(tag["name"])}">{escape(tag["name"])}</h2>'
        f"<p>{escape(tag['description'])}</p>"
        f"{''.join(sections[tag['name']])}"
        for tag in document["tags"]
    )
    return _page(
        "detflow HTTP API",
        '<h1>detflow HTTP API</h1><p>Made from <a href="/openapi.json">/openapi.json</a>.</p>'
        + body,
    )


def _operation(method: str, path: str, operation: Json) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(p['name'])}</code></td><td>{escape(p['in'])}"
        f"{', required' if p.get('required') else ''}</td>"
        f"<td>{escape(p.get('description', ''))}</td></tr>"
        for p in operation["parameters"]
    )
    errors = ", ".join(code for code in sorted(operation["responses"]) if code != "200")
    lines = []
    if "requestBody" in operation:
        lines.append(f"Body: {_content(operation['requestBody']['content'])}")
    lines.append(f"Answer: {_content(operation['responses']['200']['content'])}")
    return (
        f'<details id="{escape(operation["operationId"])}"><summary><b>{method}</b> '
        f"<code>{escape(path)}</code> {escape(operation['summary'])}</summary>"
        f"<p>{escape(operation['description'])}</p><table>{rows}</table>"
        f"<p>{'<br>'.join(lines)}<br>Other answers: {errors}</p>"
        f"<pre><code>{escape(examples.curl(method, path, operation))}</code></pre></details>"
    )


def _content(content: Json) -> str:
    kind, value = next(iter(content.items()))
    schema = value["schema"].get("$ref", "").rpartition("/")[2]
    return f"<code>{escape(kind)}</code> {escape(schema)}"
