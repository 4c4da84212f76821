"""The console's files: complete, small, in both languages, and served as a browser wants them."""

import ast
import gzip
import hashlib
import re
from pathlib import Path

import pytest
from starlette.requests import Request
from starlette.responses import Response

from gateway.site import FOLDER, POLICY, Site

MAX_SCRIPT_BYTES = 60_000
_STATIC = r'^(?:import|export) (?:[^"]*from )?"([^"]+)";$'
_LATER = r'import\("([^"]+)"\)'
PARTS = ("frame", "help", "pages", "results", "settings")
_TEXT = re.compile(r'^  ("(?:[^"\\]|\\.)+"): ("(?:[^"\\]|\\.)*"),$', re.MULTILINE)


def scripts() -> list[Path]:
    return sorted(FOLDER.rglob("*.js"))


def own_scripts() -> list[Path]:
    return [path for path in scripts() if path.parent.name != "vendor"]


def texts_of(language: str, part: str) -> dict[str, str]:
    content = (FOLDER / "i18n" / f"{language}_{part}.js").read_text()
    found = {ast.literal_eval(key): ast.literal_eval(text) for key, text in _TEXT.findall(content)}
    assert len(found) == content.count("\n") - 3  # every line but the first two and the last
    return found


def texts(language: str) -> dict[str, str]:
    parts = [texts_of(language, part) for part in PARTS]
    return {key: text for part in parts for key, text in part.items()}


async def ask(path: str, **headers: str) -> Response:
    page = Site().find(path)
    assert page is not None, path
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return await page(Request({"type": "http", "method": "GET", "headers": raw}))


def test_both_languages_say_the_same_things_with_the_same_values() -> None:
    english, korean = texts("en"), texts("ko")
    assert english.keys() == korean.keys()
    for key, text in english.items():
        assert text.strip() and korean[key].strip(), key
        assert set(re.findall(r"\{\w+\}", text)) == set(re.findall(r"\{\w+\}", korean[key])), key


def test_every_text_that_is_named_is_there_and_every_text_is_named() -> None:
    known = texts("en").keys()
    code = "\n".join(path.read_text() for path in own_scripts() if path.parent.name != "i18n")
    code += (FOLDER / "i18n" / "format.js").read_text()
    named = set(re.findall(r'\bt\(\s*"([^"]+)"', code)) | set(re.findall(r'"(nav\.\w+)"', code))
    named |= {key for pair in re.findall(r'\? "([\w.]+)" : "([\w.]+)"', code) for key in pair}
    assert not {key for key in named if "." in key} - known
    made = [re.escape(one) for one in re.findall(r"`([\w.]+\.)\$\{", code)]
    unnamed = {key for key in known if not re.match("|".join(made), key)} - named
    helps = set(re.findall(r'(?:help|text)="([\w.]+)"', code))
    assert not helps - known and not unnamed - helps


def imports(path: Path, pattern: str) -> list[Path]:
    found = re.findall(pattern, path.read_text(), re.MULTILINE)
    return [(path.parent / name).resolve() for name in found]


def test_every_import_leads_to_a_file() -> None:
    for path in own_scripts():
        for target in imports(path, _STATIC) + imports(path, _LATER):
            assert target.is_file(), f"{path}: {target}"


def test_nothing_is_made_markup_or_left_inline() -> None:
    for path in own_scripts():
        text = path.read_text()
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert word not in text, f"{path}: {word}"
    page = (FOLDER / "index.html").read_text()
    assert "style=" not in page and "<style" not in page and "onload" not in page
    assert not re.findall(r"<script(?![^>]* src=)", page)
    assert "require-trusted-types-for 'script'" in POLICY and "unsafe" not in POLICY


def loaded_by(page: str) -> set[Path]:
    """What a page loads before it shows anything."""
    waiting = [FOLDER / "app.js", FOLDER / "pages" / f"{page}.js"]
    needed: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path not in needed:
            needed.add(path)
            waiting += imports(path, _STATIC) if path.parent.name != "vendor" else []
    return needed


@pytest.mark.parametrize("page", [path.stem for path in (FOLDER / "pages").iterdir()])
def test_every_page_loads_the_texts_it_shows(page: str) -> None:
    needed = loaded_by(page)
    loaded = {*texts_of("en", "frame")}
    for part in ("pages", "results", "settings"):
        if FOLDER / "i18n" / f"{part}.js" in needed:
            loaded |= {*texts_of("en", part)}
    for path in needed - {FOLDER / "ui" / "parts.js"}:  # which has parts that other pages use
        for key in re.findall(r'\bt\(\s*"([^"]+)"', path.read_text()):
            assert key in loaded or (path.name, key) == ("boxes.js", "boxes.shown"), (
                f"{path}: {key}"
            )


@pytest.mark.parametrize("page", [path.stem for path in (FOLDER / "pages").iterdir()])
async def test_scripts_on_the_wire_stay_small(page: str) -> None:
    needed = loaded_by(page) | {FOLDER / "i18n" / "ko_frame.js"}
    for user, used in (
        ("vision/chart.js", "vendor/uplot.js"),
        ("pages/train.js", "ui/metrics_card.js"),
        ("i18n/pages.js", "i18n/ko_pages.js"),
        ("i18n/results.js", "i18n/ko_results.js"),
        ("i18n/settings.js", "i18n/ko_settings.js"),
    ):
        if FOLDER / user in needed:
            needed.add(FOLDER / used)
    sent = 0
    for path in needed:
        name = f"/console/{path.relative_to(FOLDER).as_posix()}"
        sent += len((await ask(name, accept_encoding="gzip")).body)
    assert sent <= MAX_SCRIPT_BYTES


def test_vendored_files_are_those_that_were_built() -> None:
    folder = FOLDER / "vendor"
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    assert {name: digest for digest, name in map(str.split, lines)} == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != "SHA256SUMS"
    }


async def test_files_are_packed_and_not_sent_twice() -> None:
    plain = await ask("/console/app.js")
    assert plain.headers["content-type"].startswith("text/javascript")
    packed = await ask("/console/app.js", accept_encoding="gzip")
    assert packed.headers["content-encoding"] == "gzip"
    assert gzip.decompress(bytes(packed.body)) == plain.body
    again = await ask("/console/app.js", if_none_match=plain.headers["etag"])
    assert (again.status_code, again.body) == (304, b"")


async def test_comments_are_not_sent_and_all_else_is() -> None:
    for path in own_scripts():
        sent = bytes((await ask(f"/console/{path.relative_to(FOLDER).as_posix()}")).body).decode()
        assert "/**" not in sent and not re.search(r"^\s*//", sent, re.MULTILINE)
        assert sent.count("\n") == path.read_text().count("\n")
        code = re.sub(r"^ *(//|/\*\*| \*).*$", "", path.read_text(), flags=re.MULTILINE)
        code = re.sub(r"/\*\* @[^*]*\*/ ?", "", code)
        assert re.findall(r"\S+", code) == re.findall(r"\S+", sent), path


@pytest.mark.parametrize("path", ["/", "/projects", "/system", "/p/default/train/v1/metrics"])
async def test_every_page_is_the_same_file(path: str) -> None:
    answer = await ask(path)
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.headers["content-security-policy"] == POLICY


@pytest.mark.parametrize(
    "path", ["/console/", "/console/../app.py", "/console/nothing.js", "/console", "/projectsx"]
)
def test_what_is_not_there_is_not_found(path: str) -> None:
    assert Site().find(path) is None
