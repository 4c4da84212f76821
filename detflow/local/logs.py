"""Log files of the stack's processes, rotated by size."""

from collections.abc import Callable
from pathlib import Path

_MAX_BYTES = 10 * 1024 * 1024
_NUM_OLD = 3


class Log:
    """Appends what a process prints to `path`; full files are kept as `path`.1 (newest) to .3.

    Args:
        path: The file written to.
        on_line: Called with each complete line, to show it elsewhere too.
        max_bytes: Size at which a new file is begun.
    """

    def __init__(
        self,
        path: Path,
        on_line: Callable[[str], None] | None = None,
        *,
        max_bytes: int = _MAX_BYTES,
    ) -> None:
        self.path = path
        self._on_line = on_line
        self._max_bytes = max_bytes
        self._rest = b""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)

    def write(self, data: bytes) -> None:
        """Writes bytes as they came; a line is never split by the rotation alone."""
        if self._file.tell() > self._max_bytes:
            self._rotate()
        self._file.write(data)
        if self._on_line is not None:
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                self._on_line(line.decode(errors="replace"))

    def tail(self, num_lines: int = 10) -> str:
        """Returns the last lines of the file."""
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            file.seek(max(0, size - 16384))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-num_lines:])

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _rotate(self) -> None:
        self._file.close()
        for number in range(_NUM_OLD, 0, -1):
            older = self.path.with_name(f"{self.path.name}.{number}")
            newer = self.path.with_name(f"{self.path.name}.{number - 1}")
            newer = newer if number > 1 else self.path
            if newer.exists():
                newer.replace(older)
        self._file = self.path.open("ab", buffering=0)
