"""The web console: static files, all read at the start, and one page for every path of its own.

Every file has an ETag and is asked for again each time, so an upgrade is seen at once and costs an
answer without a body otherwise. Nothing is inline, so the policy allows nothing inline.
"""

from __future__ import annotations

import gzip
import hashlib
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

FOLDER = Path(__file__).parent / "console"
PREFIX = "/console/"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; font-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
"""Content-Security-Policy of the page: only what this gateway serves, and no markup from text."""

_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
}
_PAGE = "index.html"
_OWN_PATHS = ("/projects", "/system")
_OWN_FOLDERS = ("/p/", "/projects/")
_MIN_GZIP_BYTES = 300
# What of our scripts stays here: comments - lines of their own, and JSDoc - and indentation, which
# is 1 kB packed of a page. The lines keep their numbers.
_COMMENT = re.compile(rb"^[ \t]*//[^\n]*|/\*\*.*?\*/ ?", re.MULTILINE | re.DOTALL)
_INDENT = re.compile(rb"^[ \t]+", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class File:
    """One file of the console, as it is and packed."""

    content: bytes
    packed: bytes
    media_type: str
    etag: str

    async def answer(self, request: Request) -> Response:
        """Answers with the file, packed if the client takes that, or with 304 if it has it."""
        headers = {
            "etag": self.etag,
            "cache-control": "no-cache",
            "vary": "accept-encoding",
            "content-security-policy": POLICY,
        }
        known = [one.strip() for one in request.headers.get("if-none-match", "").split(",")]
        if self.etag in known or f"W/{self.etag}" in known:
            return Response(status_code=304, headers=headers)
        if self.packed and "gzip" in request.headers.get("accept-encoding", ""):
            headers["content-encoding"] = "gzip"
            return Response(self.packed, media_type=self.media_type, headers=headers)
        return Response(self.content, media_type=self.media_type, headers=headers)


class Site:
    """The console's files by path below `PREFIX`; what the folder holds later is not seen."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self._files = {
            path.relative_to(folder).as_posix(): _read(path)
            for path in sorted(folder.rglob("*"))
            if path.suffix in _TYPES
        }

    def find(self, path: str) -> Callable[[Request], Awaitable[Response]] | None:
        """Returns what answers at a path of the gateway; None if that is not the console's."""
        if path == "/" or path in _OWN_PATHS or path.startswith(_OWN_FOLDERS):
            return self._files[_PAGE].answer
        file = self._files.get(path.removeprefix(PREFIX)) if path.startswith(PREFIX) else None
        return file.answer if file else None


def _read(path: Path) -> File:
    content = path.read_bytes()
    if path.suffix == ".js" and path.parent.name != "vendor":
        content = _COMMENT.sub(lambda match: b"\n" * match[0].count(b"\n"), content)
        content = _INDENT.sub(b"", content)
    return File(
        content=content,
        packed=gzip.compress(content, mtime=0) if len(content) >= _MIN_GZIP_BYTES else b"",
        media_type=_TYPES[path.suffix],
        etag=f'"{hashlib.sha256(content).hexdigest()[:32]}"',
    )
