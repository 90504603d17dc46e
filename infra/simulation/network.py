"""The network of a simulated world: byte streams between processes, in memory, with what real networks do to them.

Comes in: ``create_connection`` and ``create_server`` of the loop, as asyncio's own callers use them, and faults. Goes out: transports that
keep TCP's promise (bytes arrive in order or the connection ends) and nothing beyond it: chunks are cut and joined at will, connections
overtake each other, stall, break, half-close, or fall silent with both ends believing in them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context, copy_context
from dataclasses import dataclass
from random import Random
from typing import Any, Final

from infra.simulation.loop import PROCESS, Process, VirtualLoop

HIGH_WATER: Final = 256 * 1024
"""Bytes on their way above which the sender is asked to pause, as a full socket buffer does."""


@dataclass(kw_only=True, slots=True)
class Weather:
    """What the network is like now; changed by the world's faults."""

    latency_us: int = 500
    """One way, shortest."""
    jitter_us: int = 500
    """Added, uniformly."""
    stall_share: float = 0.0
    """Of the deliveries that take ``stall_us`` longer, as after a lost packet."""
    stall_us: int = 200_000
    cut_share: float = 0.0
    """Of the deliveries that are cut in two somewhere."""


class FakeSocket:
    """What callers ask of a socket they do not use."""

    def __init__(self, name: tuple[str, int]) -> None:
        self._name = name
        self.family = 2

    def getsockname(self) -> tuple[str, int]:
        """(host, port)."""
        return self._name

    def getpeername(self) -> tuple[str, int]:
        """(host, port)."""
        return self._name

    def setsockopt(self, *_: Any) -> None:
        """Nothing to set."""

    def fileno(self) -> int:
        """There is none."""
        return -1


class MemoryTransport(asyncio.Transport):
    """One end of a connection."""

    def __init__(self, network: Network, protocol: asyncio.BaseProtocol, context: Context, name: tuple[str, int]) -> None:
        super().__init__({"socket": FakeSocket(name), "sockname": name, "peername": name})
        self._network = network
        self._loop = network.loop
        self._protocol: Any = protocol
        self._context = context
        self.process: Process | None = context.get(PROCESS)
        self.peer: MemoryTransport | None = None
        self.silent = False
        """Nothing this end sends arrives any more, and nobody is told."""
        self._outgoing: list[bytes] = []
        self._flushing = False
        self._sent_until_us = 0
        self._in_flight = 0
        self._inbox: list[bytes | None] = []
        self._reading = True
        self._writing_paused = False
        self._closing = False
        self._lost = False

    # -- asyncio.Transport

    def get_protocol(self) -> asyncio.BaseProtocol:
        """The protocol."""
        return self._protocol  # type: ignore[no-any-return]

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Another protocol from now on."""
        self._protocol = protocol

    def is_closing(self) -> bool:
        """Whether it ends or ended."""
        return self._closing

    def is_reading(self) -> bool:
        """Whether data is handed over."""
        return self._reading and not self._closing

    def pause_reading(self) -> None:
        """Keep what arrives."""
        self._reading = False

    def resume_reading(self) -> None:
        """Hand over what was kept, and what comes."""
        if not self._reading:
            self._reading = True
            if self._inbox:
                self._loop.call_soon(self._hand_over, context=self._context)

    def write(self, data: Any) -> None:
        """Send."""
        if not data or self._closing:
            return
        self._outgoing.append(bytes(data))
        self._in_flight += len(data)
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush, context=self._network.context)
        if self._in_flight > HIGH_WATER and not self._writing_paused:
            self._writing_paused = True
            self._protocol.pause_writing()

    def get_write_buffer_size(self) -> int:
        """Bytes the peer has not taken."""
        return self._in_flight

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """One limit for all."""

    def can_write_eof(self) -> bool:
        """Half-closing is allowed."""
        return True

    def write_eof(self) -> None:
        """Nothing more will be sent; reading goes on."""
        self._send(None)

    def close(self) -> None:
        """Send what waits, then end."""
        if not self._closing:
            self._closing = True
            self._send(None)
            self._loop.call_soon(self._lose, None, context=self._context)

    def abort(self) -> None:
        """End now; what is on its way is lost."""
        self.reset()

    # -- the wire

    def reset(self, error: Exception | None = None) -> None:
        """This end is gone: the peer gets a reset, the protocol here ``connection_lost(error)``."""
        if self._lost:
            return
        self._closing = True
        self._outgoing.clear()
        peer = self.peer
        if peer is not None and not self.silent:
            when_us = self._network.arrival_us()
            self._loop.call_at_us(when_us, peer.broken, ConnectionResetError("Connection reset by peer"), context=peer._context)
        self._loop.call_soon(self._lose, error, context=self._context)

    def broken(self, error: Exception) -> None:
        """The connection is gone under this end."""
        if not self._lost:
            self._closing = True
            self._lose(error)

    def _flush(self) -> None:
        self._flushing = False
        if self._outgoing:
            data = b"".join(self._outgoing)
            self._outgoing.clear()
            self._send(data)

    def _send(self, data: bytes | None) -> None:
        """Put a chunk (None: the end) on the wire."""
        if data is None and self._outgoing:
            self._flush()
        peer = self.peer
        if peer is None or self.silent:
            return
        network = self._network
        parts: list[bytes | None] = [data]
        weather = network.weather
        if data is not None and len(data) > 1 and weather.cut_share and network.random.random() < weather.cut_share:
            cut = network.random.randrange(1, len(data))
            parts = [data[:cut], data[cut:]]
        for part in parts:
            self._sent_until_us = max(self._sent_until_us, network.arrival_us())
            self._loop.call_at_us(self._sent_until_us, peer._arrive, part, context=peer._context)

    def _arrive(self, data: bytes | None) -> None:
        if self._lost or self._closing:
            return
        network, peer = self._network, self.peer
        if network.is_split(self.process, peer.process if peer else None):
            network.held.append((self, data))
            return
        if network.on_data is not None and data is not None:
            network.on_data(self, data)
        self._inbox.append(data)
        if self._reading:
            self._hand_over()

    def _hand_over(self) -> None:
        while self._inbox and self._reading and not self._closing:
            data = self._inbox.pop(0)
            if data is None:
                if not self._protocol.eof_received() and not self._closing:
                    self.close()
                continue
            peer = self.peer
            if peer is not None:
                peer._taken(len(data))
            self._protocol.data_received(data)

    def _taken(self, size: int) -> None:
        self._in_flight -= size
        if self._writing_paused and self._in_flight <= HIGH_WATER // 4:
            self._writing_paused = False
            self._loop.call_soon(self._protocol.resume_writing, context=self._context)

    def _lose(self, error: Exception | None) -> None:
        if not self._lost:
            self._lost = True
            self._network.forget(self)
            self._protocol.connection_lost(error)


class MemoryServer:
    """A listening port."""

    def __init__(self, network: Network, place: tuple[str, int], factory: Callable[[], asyncio.BaseProtocol], context: Context) -> None:
        self.sockets = [FakeSocket(place)]
        self.factory = factory
        self.context = context
        self._network = network
        self._place = place

    def close(self) -> None:
        """Accept no more."""
        self._network.listeners.pop(self._place, None)

    async def wait_closed(self) -> None:
        """Connections are their protocols' business."""


class Network:
    """All connections of a world.

    Args:
        loop: gets ``create_connection`` and ``create_server`` from here.
        random: of delays and cuts.
    """

    def __init__(self, loop: VirtualLoop, random: Random) -> None:
        self.loop = loop
        self.random = random
        self.weather = Weather()
        self.listeners: dict[tuple[str, int], MemoryServer] = {}
        self.transports: dict[MemoryTransport, None] = {}
        self.held: list[tuple[MemoryTransport, bytes | None]] = []
        self.split: set[frozenset[str]] = set()
        """Pairs of process names that cannot reach each other."""
        self.on_data: Callable[[MemoryTransport, bytes], None] | None = None
        self.context = copy_context()
        self._next_port = 40_000
        loop.create_connection = self.connect  # type: ignore[method-assign,assignment]
        loop.create_server = self.listen  # type: ignore[method-assign,assignment]

    def arrival_us(self) -> int:
        """When something sent now arrives."""
        weather = self.weather
        delay_us = weather.latency_us + self.random.randrange(weather.jitter_us + 1)
        if weather.stall_share and self.random.random() < weather.stall_share:
            delay_us += self.random.randrange(weather.stall_us + 1)
        return self.loop.now_us + delay_us

    async def listen(self, factory: Callable[[], asyncio.BaseProtocol], host: str, port: int, **_: Any) -> MemoryServer:
        """`loop.create_server`."""
        if port == 0:
            self._next_port += 1
            port = self._next_port
        if (host, port) in self.listeners:
            raise OSError(98, "Address already in use")
        server = MemoryServer(self, (host, port), factory, copy_context())
        self.listeners[(host, port)] = server
        process = PROCESS.get()
        if process is not None:
            process.on_death.append(server.close)
        return server

    async def connect(self, factory: Callable[[], Any], host: str, port: int, **_: Any) -> tuple[MemoryTransport, Any]:
        """`loop.create_connection`. Raises OSError when nobody listens; waits for ever where the network is split."""
        process = PROCESS.get()
        turn = self.loop.create_future()
        self.loop.call_at_us(self.arrival_us(), _resolve, turn)
        await turn
        server = self.listeners.get((host, int(port)))
        if server is not None and self.is_split(process, server.context.get(PROCESS)):
            await self.loop.create_future()
        if server is None:
            raise ConnectionRefusedError(111, f"Connect call failed ('{host}', {port})")
        here = MemoryTransport(self, factory(), copy_context(), (host, int(port)))
        there = MemoryTransport(self, server.context.run(server.factory), server.context, (host, int(port)))
        here.peer, there.peer = there, here
        for end in (here, there):
            self.transports[end] = None
            if end.process is not None:
                end.process.on_death.append(end.reset)
        self.loop.call_soon(there.get_protocol().connection_made, there, context=server.context)
        here.get_protocol().connection_made(here)
        return here, here.get_protocol()

    def forget(self, transport: MemoryTransport) -> None:
        """The connection ended at this end."""
        self.transports.pop(transport, None)
        process = transport.process
        if process is not None and process.alive and transport.reset in process.on_death:
            process.on_death.remove(transport.reset)

    # -- faults

    def is_split(self, one: Process | None, other: Process | None) -> bool:
        """Whether two processes cannot reach each other."""
        return bool(self.split) and one is not None and other is not None and frozenset((one.name, other.name)) in self.split

    def heal(self) -> None:
        """Everybody reaches everybody; what was held back arrives."""
        self.split.clear()
        held, self.held = self.held, []
        for transport, data in held:
            self.loop.call_soon(transport._arrive, data, context=transport._context)  # noqa: SLF001

    def between(self, one: str, other: str) -> list[MemoryTransport]:
        """Open connections of two processes, by the end that belongs to ``one``, oldest first."""
        return [end for end in self.transports if end.process and end.process.name == one and end.peer and _name(end.peer) == other]

    def cut(self, one: str, other: str) -> int:
        """Break every connection between two processes; how many there were."""
        found = self.between(one, other)
        for end in found:
            end.reset(ConnectionResetError("Connection reset by peer"))
        return len(found)

    def silence(self, one: str, other: str) -> int:
        """Both ends of every connection go on believing in it, but nothing arrives any more."""
        found = self.between(one, other)
        for end in found:
            end.silent = True
            if end.peer is not None:
                end.peer.silent = True
        return len(found)


def _name(transport: MemoryTransport) -> str:
    return transport.process.name if transport.process is not None else ""


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
