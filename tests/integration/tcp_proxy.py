"""A TCP proxy that can fall silent: connections stay open, nothing goes through, in neither direction; what a broken network does. Or be slow.

Runs in a thread of its own, so that blocking tests and event loops can use it alike::

    with TcpProxy(target_port) as proxy:
        proxy.port
        proxy.cut()      # bytes are held, new connections are accepted and get no answer
        proxy.mend()     # what was held goes on, in order
        proxy.slow(1.0)  # each piece of up to 64 kB takes a second, in either direction; 0.0: no more
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from typing import Self


class TcpProxy:
    """Forwards a port of its own to ``127.0.0.1:target``.

    Args:
        target: port that is forwarded to.
        tls: where given, the proxy ends TLS with this context and forwards plain bytes.
    """

    def __init__(self, target: int, *, tls: ssl.SSLContext | None = None) -> None:
        self.port = 0
        self.accepted = 0
        self._target, self._tls = target, tls
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._flows = asyncio.Event()
        self._piece_s = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def cut(self) -> None:
        """Let nothing through from now on."""
        self._loop.call_soon_threadsafe(self._flows.clear)

    def mend(self) -> None:
        """Let everything through again."""
        self._loop.call_soon_threadsafe(self._flows.set)

    def slow(self, piece_s: float) -> None:
        """Let each piece of bytes wait for so long from now on."""
        self._piece_s = piece_s

    async def _open(self) -> None:
        self._flows.set()
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0.05)  # aborted transports close on the loop's next turns

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            await self._link(reader, writer)
        finally:
            writer.transport.abort()

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry bytes both ways until either side ends; a target that refuses ends it at once."""
        try:
            their_reader, their_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            return
        both = [asyncio.create_task(self._pump(reader, their_writer)), asyncio.create_task(self._pump(their_reader, writer))]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in both:
                each.cancel()
            await asyncio.gather(*both, return_exceptions=True)
            their_writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                if self._piece_s:
                    await asyncio.sleep(self._piece_s)
                await self._flows.wait()
                writer.write(data)
                await writer.drain()
