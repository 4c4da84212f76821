"""Many watchers of one training in a process of their own, as cheap as can be, for `watchers`.

Each is a bare socket that reads Server-Sent Events, looks for the log lines "NUMBER TIME" and
notes how old they are and whether each number comes exactly once and in order. One of ten breaks
off now and then and goes on behind its last event, as a browser does that lost its network.

Commands come by stdin: a number, answered with a line of JSON about all lines since the last
command, once every watcher has seen that number.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import time
from array import array
from typing import Any

import uvloop

from tests.benchmarks.rig import percentile

_LINE = re.compile(rb'"lines":\["(\d+) ([\d.]+)"\]')
_OPENING_AT_ONCE = 50
_STAY = 100  # events after which one of ten breaks off
_PATIENCE_SECONDS = 60.0


class Crowd:
    """All watchers of this process."""

    def __init__(self, port: int, path: str, token: str, num_watchers: int) -> None:
        self._port = port
        self._head = (
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAccept: text/event-stream\r\n"
            f"Authorization: Bearer {token}\r\n"
        )
        self._watchers = [_Watcher(self, number) for number in range(num_watchers)]
        self._moved = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.delays = array("d")
        self.counts = dict.fromkeys(("doubled", "lost", "left", "cut_off"), 0)

    async def open(self) -> None:
        """Connects all; they have the snapshot then."""
        for begin in range(0, len(self._watchers), _OPENING_AT_ONCE):
            some = self._watchers[begin : begin + _OPENING_AT_ONCE]
            await asyncio.gather(*(self.connect(one) for one in some))
            async with asyncio.timeout(_PATIENCE_SECONDS):
                await asyncio.gather(*(one.opened.wait() for one in some))

    async def connect(self, watcher: _Watcher) -> None:
        """Opens a watch, behind the last event that the watcher has seen."""
        resume = f"Last-Event-ID: {watcher.cursor}\r\n" if watcher.cursor else ""
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(lambda: watcher, "127.0.0.1", self._port)
        transport.write(f"{self._head}{resume}\r\n".encode())

    def connect_again(self, watcher: _Watcher) -> None:
        """Opens a watch that has ended."""
        task = asyncio.get_running_loop().create_task(self.connect(watcher))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def moved(self) -> None:
        """Tells that a watcher has seen a line."""
        self._moved.set()

    async def report(self, number: int) -> dict[str, Any]:
        """Waits until all have seen line `number`; what they saw since the last report."""
        async with asyncio.timeout(_PATIENCE_SECONDS):
            while any(one.number < number for one in self._watchers):
                self._moved.clear()
                await self._moved.wait()
        figures = {
            "p50_ms": round(percentile(self.delays, 50) * 1000, 1),
            "p99_ms": round(percentile(self.delays, 99) * 1000, 1),
            "worst_ms": round(max(self.delays) * 1000, 1),
            "received": len(self.delays),
            **self.counts,
        }
        self.delays = array("d")
        self.counts = dict.fromkeys(self.counts, 0)
        return figures


class _Watcher(asyncio.Protocol):
    """One watcher, over all its connections."""

    def __init__(self, crowd: Crowd, index: int) -> None:
        self._crowd = crowd
        self._leaves_at = index % _STAY if index % 10 == 0 else -1
        self._transport: Any = None
        self._rest = b""
        self._is_leaving = False
        self.number = 0
        self.cursor = ""
        self.opened = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, self._rest, self._is_leaving = transport, b"", False

    def data_received(self, data: bytes) -> None:
        if self._is_leaving:
            return
        now = time.monotonic()
        frames, end, self._rest = (self._rest + data).rpartition(b"\n\n")
        if not end:
            return
        at = frames.rfind(b"id: ")
        if at >= 0:
            self.cursor = frames[at + 4 : frames.index(b"\n", at)].decode()
            self.opened.set()
        for found, sent in _LINE.findall(frames):
            number = int(found)
            if number <= self.number:
                self._crowd.counts["doubled"] += 1
                continue
            self._crowd.counts["lost"] += number - self.number - 1
            self.number = number
            self._crowd.delays.append(now - float(sent))
            if number % _STAY == self._leaves_at:
                self._crowd.counts["left"] += 1
                self._is_leaving = True
        self._crowd.moved()
        if self._is_leaving:
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._crowd.counts["cut_off"] += not self._is_leaving
        self._crowd.connect_again(self)


async def main(port: str, path: str, num_watchers: str) -> None:
    """Opens the watchers, says so, and answers commands until stdin ends."""
    crowd = Crowd(int(port), path, os.environ["DETFLOW_TOKEN"], int(num_watchers))
    begin = time.monotonic()
    await crowd.open()
    print(json.dumps({"opened_seconds": round(time.monotonic() - begin, 2)}), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(await crowd.report(int(line))), flush=True)


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
