"""Large JSON files piece by piece: the members of the top-level object, arrays by their elements.

An annotation file of half a gigabyte would take several gigabytes as Python objects. Here only a
window of the text and one element exist at a time. NaN and Infinity, which JSON does not know but
many programs write, are read as such, so that what holds them can be named.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from services.preprocess.domain import InvalidData, Reason

MAX_ELEMENTS = 10_000_000
MAX_ELEMENT_CHARS = 32 << 20
_WINDOW_BYTES = 1 << 20
_SPACE = re.compile(r"[ \t\n\r]*")
_SHOWN_CHARS = 40


def members(path: str, data: bytes) -> Iterator[tuple[str, int | None, Any]]:
    """Yields what the top-level object of a JSON file holds, in the order of the file.

    Args:
        path: Path of the file, for messages.
        data: Its content.

    Yields:
        Key, index and value of every element of an array; key, None and value of anything else,
        and of an array itself, before its elements, with the value [].

    Raises:
        InvalidData: CORRUPT_LABEL: it is not UTF-8, no JSON object, nested too deeply, or has an
            element larger than 32 million characters; ARCHIVE_LIMIT: an array has more than ten
            million elements. The place is the key and the index.
    """
    text = _Text(path, data)
    if text.peek() != "{":
        raise text.refusal("the top level is no object; export it as COCO")
    text.skip()
    if text.peek() == "}":
        text.skip()
    else:
        while True:
            text.where = ""
            key = text.value()
            if not isinstance(key, str):
                raise text.refusal(f"a key is {str(key)[:_SHOWN_CHARS]!r}, not a text")
            text.where = key if key.isidentifier() else ""
            text.expect(":")
            if text.peek() == "[":
                yield key, None, []
                yield from _elements(text, key)
            else:
                yield key, None, text.value()
            if text.expect(",}") == "}":
                break
    if text.peek():
        raise text.refusal("something follows the end of the object")


def _elements(text: _Text, key: str) -> Iterator[tuple[str, int, Any]]:
    text.skip()
    if text.peek() == "]":
        text.skip()
        return
    index = 0
    place = text.where
    while True:
        text.where = f"{place}[{index}]"
        if index == MAX_ELEMENTS:
            raise InvalidData(
                f"{text.path} {text.where}",
                Reason.ARCHIVE_LIMIT,
                f"lists of more than {MAX_ELEMENTS} are not read; divide it into several files",
            )
        yield key, index, text.value()
        index += 1
        if text.expect(",]") == "]":
            text.where = place
            return


class _Text:
    """A window on the text of a file, and the place in it up to which it is read."""

    def __init__(self, path: str, data: bytes) -> None:
        self.where = ""
        self.path = path
        self._data = memoryview(data)
        self._num_bytes = 0
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._scan = json.JSONDecoder().raw_decode
        self._window = ""
        self._at = 0

    def refusal(self, description: str) -> InvalidData:
        """Makes the error that names the current place."""
        where = f"{self.path} {self.where}".rstrip()
        return InvalidData(where, Reason.CORRUPT_LABEL, f"{description}; export it again")

    def peek(self) -> str:
        """Returns the next character after white space; empty at the end."""
        while True:
            found = _SPACE.match(self._window, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._window):
                return self._window[self._at]
            if not self._more():
                return ""

    def skip(self) -> None:
        """Goes past the character that was peeked at."""
        self._at += 1

    def expect(self, characters: str) -> str:
        """Goes past one of some characters and returns it.

        Raises:
            InvalidData: There is another one.
        """
        found = self.peek()
        if not found or found not in characters:
            wanted = " or ".join(repr(c) for c in characters)
            raise self.refusal(
                f"not valid JSON: {wanted} should follow, not"
                f" {self._window[self._at : self._at + _SHOWN_CHARS]!r}"
            )
        self._at += 1
        return found

    def value(self) -> Any:
        """Reads one whole value.

        Raises:
            InvalidData: There is none, or it is too large or too deep.
        """
        self.peek()
        while True:
            try:
                value, end = self._scan(self._window, self._at)
            except RecursionError:
                raise self.refusal("nested too deeply") from None
            except json.JSONDecodeError as error:
                if len(self._window) - self._at > MAX_ELEMENT_CHARS:
                    raise self.refusal(
                        f"not valid JSON ({error.msg}), or larger than {MAX_ELEMENT_CHARS}"
                        " characters"
                    ) from error
                if self._more():
                    continue
                shown = self._window[error.pos : error.pos + _SHOWN_CHARS]
                raise self.refusal(f"not valid JSON ({error.msg}: {shown!r})") from error
            except ValueError as error:  # a whole number of thousands of digits
                raise self.refusal(f"not readable ({error})") from error
            if end == len(self._window) and self._more():
                continue  # a number may go on behind the window
            self._at = end
            return value

    def _more(self) -> bool:
        """Moves the window on; False at the end of the file."""
        if self._num_bytes == len(self._data):
            return False
        kept = self._window[self._at :]
        # As much again as is kept, so that a long value is not scanned over and over.
        size = max(_WINDOW_BYTES, len(kept))
        chunk = self._data[self._num_bytes : self._num_bytes + size]
        self._num_bytes += len(chunk)
        try:
            text = self._decode(chunk, self._num_bytes == len(self._data))
        except UnicodeDecodeError as error:
            raise self.refusal("not a UTF-8 text file") from error
        self._window = kept + text
        self._at = 0
        return True
