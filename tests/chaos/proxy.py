"""A network that fails: a proxy whose connections are delayed, cut, halved and black-holed."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import Iterator

_CHUNK_BYTES = 1 << 16


class Proxy:
    """Passes connections on to a server of this machine.

    Attributes:
        port: Where it listens, once it is open.
    """

    def __init__(self) -> None:
        self.port = 0
        self._target = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._flows = asyncio.Event()
        self._flows.set()
        self._delay_seconds = 0.0
        self._halves = False
        self._handlers: set[asyncio.Task[None]] = set()

    async def open(self, target: int) -> None:
        """Stands in front of 127.0.0.1:`target` from now on."""
        self._target = target
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
            self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Lets nobody in any more, and everybody go."""
        if self._server is not None:
            self._server.close()
            self._flows.set()
            self.cut()
            await self._server.wait_closed()
            if self._handlers:
                await asyncio.wait(self._handlers)

    def cut(self) -> int:
        """Resets every connection; returns how many there were."""
        writers, self._writers = self._writers, set()
        for writer in writers:
            _reset(writer)
        return len(writers) // 2

    def halve(self) -> None:
        """Passes half of the next message on and resets its connection."""
        self._halves = True

    @contextlib.contextmanager
    def black_hole(self) -> Iterator[None]:
        """Lets nothing through and closes nothing: what is sent arrives when this ends."""
        self._flows.clear()
        try:
            yield
        finally:
            self._flows.set()

    @contextlib.contextmanager
    def slow(self, seconds: float) -> Iterator[None]:
        """Delays every message."""
        self._delay_seconds = seconds
        try:
            yield
        finally:
            self._delay_seconds = 0.0

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        task.add_done_callback(self._handlers.discard)
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            _reset(writer)
            return
        self._writers |= {writer, back}
        try:
            await asyncio.gather(self._pump(reader, back), self._pump(there, writer))
        except OSError:
            pass
        finally:
            for one in (writer, back):
                self._writers.discard(one)
                _reset(one)
                with contextlib.suppress(OSError):
                    await one.wait_closed()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_CHUNK_BYTES):
            await self._flows.wait()
            if self._delay_seconds:
                await asyncio.sleep(self._delay_seconds)
            if self._halves:
                self._halves = False
                writer.write(data[: len(data) // 2])
                await writer.drain()
                raise ConnectionResetError
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Ends a connection by a reset, as a machine does that knows nothing of it."""
    sock = writer.get_extra_info("socket")
    if sock is not None and not writer.transport.is_closing():
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
