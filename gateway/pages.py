"""The page of the operations of the API. No script, no other host."""

from __future__ import annotations

from html import escape

from gateway import examples
from gateway.openapi import Json

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #1d2430; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #d5dbe5; }
code { font-family: ui-monospace, monospace; font-size: .92em; overflow-wrap: anywhere; }
details { border: 1px solid #d5dbe5; border-radius: 6px; margin: .5rem 0; padding: .4rem .8rem; }
summary { cursor: pointer; } summary b { display: inline-block; min-width: 4.5rem; color: #0b5cad; }
table { border-collapse: collapse; } td { padding: .15rem 1rem .15rem 0; vertical-align: top; }
pre { white-space: pre-wrap; background: #f2f5f9; border-radius: 4px; padding: .5rem .7rem; }
a { color: #0b5cad; }
@media (prefers-color-scheme: dark) {
  body { background: #14181f; color: #dde3ec; } a, summary b { color: #7db7f5; }
  h2, details { border-color: #394150; } pre { background: #1e2430; }
}
"""


def _page(title: str, body: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
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
