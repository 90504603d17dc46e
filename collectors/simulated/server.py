"""The simulated exchange as a server: one loopback port for REST, WebSocket streams and its own controls.

Comes in: a :class:`~collectors.simulated.config.ServerConfig` and a clock. Goes out: a running :class:`SimulatedExchange`::

    async with serve(ServerConfig(), SystemClock()) as exchange:
        exchange.rest_url, exchange.ws_url, exchange.usdm_ws_url, exchange.truth("BTCUSDT")

Paths: ``/api/v3`` spot and ``/fapi/v1`` USD-M REST; ``/ws`` and ``/stream`` spot streams, the same under ``/usdm`` (and under ``/market`` and
``/public``, as USD-M has them) for the perpetuals; ``/sim`` the controls (:mod:`collectors.simulated.controls`); ``/livez``, ``/readyz``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from collectors.simulated import controls, rest
from collectors.simulated.config import ServerConfig
from collectors.simulated.errors import SimulationConfigError, UnknownFaultError
from collectors.simulated.exchange import Exchange, Venue
from collectors.simulated.fanout import Fanout
from collectors.simulated.faults import FaultRequest, parse_fault
from collectors.simulated.http import Request, Response, as_json
from collectors.simulated.injection import carry_out
from collectors.simulated.peer import Peer
from collectors.simulated.universe import MarketKind
from schemas.seam import Clock

logger = logging.getLogger(__name__)

MAX_LAG_MS: Final = 5_000
"""Further behind than this (the machine slept, or cannot keep up) the missing time is skipped rather than traded in a flood."""

STEPS_A_TURN: Final = 10
"""Steps traded before the event loop gets a turn while catching up."""


class SimulatedExchange:
    """A running exchange; made by :func:`serve`.

    Args:
        config: markets and manners.
        clock: time and sleep.
    """

    def __init__(self, config: ServerConfig, clock: Clock) -> None:
        self.config = config
        # Both clocks are read before the past is traded, which takes a while: that while is caught up, not lagged behind for ever.
        start_ms, self._started_us = clock.now_us() // 1_000, clock.monotonic_us()
        self.exchange = Exchange(config.exchange, start_ms=start_ms)
        self.port = config.port
        self.skipped_ms = 0
        self.finished = asyncio.Event()
        self._emptied = asyncio.Event()
        self.failure: Exception | None = None
        self._clock = clock
        self._anchor_ms = start_ms
        self._anchor_us = self._started_us
        # In the order they came: faults that name a number of connections take the oldest.
        self._peers: dict[Peer, None] = {}
        self._fanouts = {kind: Fanout(venue) for kind, venue in self.exchange.venues.items()}
        self._codes = {kind: {name: code for code, name in enumerate(venue.wire.lower)} for kind, venue in self.exchange.venues.items()}

    # Addresses.

    @property
    def rest_url(self) -> str:
        """Base of ``/api/v3`` and ``/fapi/v1``."""
        return f"http://{self._authority}"

    @property
    def ws_url(self) -> str:
        """Base of the spot streams ``/ws`` and ``/stream``."""
        return f"ws://{self._authority}"

    @property
    def usdm_ws_url(self) -> str:
        """Base of the USD-M streams ``/ws`` and ``/stream``."""
        return f"ws://{self._authority}/usdm"

    @property
    def _authority(self) -> str:
        return f"[{self.config.host}]:{self.port}" if ":" in self.config.host else f"{self.config.host}:{self.port}"

    # What tests and benchmarks ask.

    def truth(self, symbol: str, kind: MarketKind = "spot") -> dict[str, npt.NDArray[Any]]:
        """The trades of a symbol the market made and still keeps, untouched by faults (see :meth:`Venue.truth`).

        Raises:
            KeyError: the symbol is not listed.
        """
        venue = self.exchange.venues[kind]
        code = venue.market.code(symbol)
        if code is None:
            raise KeyError(symbol)
        return venue.truth(code)

    @property
    def connections(self) -> list[Peer]:
        """Open WebSockets, oldest first."""
        return [peer for peer in self._peers if peer.streaming]

    def set_rate(self, rate: float, kind: MarketKind = "spot") -> None:
        """Trades a second from the next step on."""
        self.exchange.venues[kind].market.set_rate(rate)

    def advance(self, milliseconds: int) -> None:
        """Trade this much market time now and send it; for servers with ``pace=False``."""
        until_ms = self.exchange.time_ms + milliseconds
        while self.exchange.time_ms < until_ms:
            self._step()

    def inject(self, fault: dict[str, Any]) -> FaultRequest:
        """Begin a fault, as ``POST /sim/faults`` does.

        Raises:
            UnknownFaultError: it cannot be understood, or its symbol or market does not exist.
        """
        request = parse_fault(fault)
        carry_out(request, self.exchange, self.connections, wall_ms=self._clock.now_us() // 1_000)
        self.exchange.remember(request)
        return request

    # Time.

    async def run(self) -> None:
        """Trade in step with the clock until cancelled; housekeeping once a second. A failure is kept for ``/readyz`` and raised."""
        try:
            await self._run()
        except Exception as error:
            logger.exception("the market stopped")
            self.failure = error
            self.finished.set()
            raise

    async def _run(self) -> None:
        kept_us = self._clock.monotonic_us()
        step_ms = self.config.exchange.spot.step_ms
        while True:
            if self.config.pace and not self.finished.is_set():
                self._catch_up()
                if self.exchange.exhausted:
                    self.finished.set()
            now_us = self._clock.monotonic_us()
            if now_us - kept_us >= 1_000_000:
                kept_us = now_us
                for peer in list(self._peers):
                    peer.keep(now_us)
            behind = self.config.pace and not self.finished.is_set() and self._due_ms() >= self.exchange.time_ms + step_ms
            wait_ms = 0.0 if behind else max(0.0, self.exchange.time_ms + step_ms - self._due_ms())
            await self._clock.sleep(wait_ms / 1_000.0 if self.config.pace and not self.finished.is_set() else 0.1)

    def _due_ms(self) -> float:
        return self._anchor_ms + (self._clock.monotonic_us() - self._anchor_us) / 1_000.0

    def _catch_up(self) -> None:
        """Trade the steps that are due, a few at a time; skip what lies too far back."""
        wall_ms = self._clock.now_us() / 1_000.0
        if wall_ms - self._due_ms() > MAX_LAG_MS:
            # The monotonic clock stands still while a laptop sleeps; the exchange did not.
            self._anchor_ms, self._anchor_us = int(wall_ms), self._clock.monotonic_us()
        due_ms = self._due_ms()
        lag_ms = int(due_ms - self.exchange.time_ms)
        if lag_ms > MAX_LAG_MS:
            logger.warning("%d ms behind the clock: that time is skipped, no trades are made in it", lag_ms)
            self.skipped_ms += lag_ms
            self.exchange.jump_to(int(due_ms))
        step_ms = self.config.exchange.spot.step_ms
        for _ in range(STEPS_A_TURN):
            if self.exchange.time_ms + step_ms > due_ms:
                return
            self._step()

    def _step(self) -> None:
        for venue, block in self.exchange.step():
            kind = venue.market.config.kind
            listeners = [peer for peer in self._peers if peer.streaming and peer.kind == kind]
            rows = venue.faults.apply(block)
            self._fanouts[kind].publish(rows, listeners, skew_ms=self.exchange.skew_ms)

    # What peers need (collectors.simulated.peer.Host).

    def opened(self, peer: Peer) -> bool:
        """A socket was accepted."""
        self._peers[peer] = None
        return len(self._peers) <= self.config.max_connections

    def lost(self, peer: Peer) -> None:
        """A socket is gone."""
        self._peers.pop(peer, None)
        if not self._peers:
            self._emptied.set()

    def codes(self, kind: MarketKind) -> dict[str, int]:
        """Symbol code by lower-case symbol."""
        return self._codes[kind]

    def monotonic_us(self) -> int:
        """The clock's monotonic time."""
        return self._clock.monotonic_us()

    def venue_of(self, path: str) -> tuple[MarketKind, Venue, str] | None:
        """The market of a WebSocket path."""
        kind: MarketKind = "spot"
        for prefix in ("/usdm", "/market", "/public"):
            if path.startswith(prefix + "/"):
                kind, path = "usdm", path.removeprefix(prefix)
        venue = self.exchange.venues.get(kind)
        if venue is None or not (path in ("/ws", "/stream") or path.startswith("/ws/")):
            return None
        return kind, venue, path

    def answer(self, request: Request) -> Response:
        """Reply to an HTTP request; what fails unexpectedly is logged and answered 500."""
        now_ms = self._clock.now_us() // 1_000
        try:
            reply = rest.answer(self.exchange, request, now_ms) or controls.answer(self, request)
        except (UnknownFaultError, SimulationConfigError) as error:
            return as_json({"code": -1000, "msg": str(error)}, status=400)
        except Exception:
            logger.exception("request failed: %s %s", request.method, request.path)
            return as_json({"code": -1000, "msg": "An unknown error occurred while processing the request."}, status=500)
        return reply or as_json({"code": -5000, "msg": f"Path {request.path}, Method {request.method} is invalid"}, status=404)

    def status(self) -> dict[str, Any]:
        """For ``/sim/status``."""
        return {
            "time_ms": self.exchange.time_ms,
            "uptime_s": round((self._clock.monotonic_us() - self._started_us) / 1e6, 3),
            "finished": self.finished.is_set(),
            "skipped_ms": self.skipped_ms,
            "skew_ms": self.exchange.skew_ms,
            "connections": len(self.connections),
            "streams": sum(len(peer.subscriptions.names) for peer in self.connections),
            "markets": {
                kind: {
                    "symbols": len(venue.wire.universe),
                    "rate": venue.market.rate,
                    "regime": venue.market.regime.name,
                    "trades": venue.market.trades_made,
                    "kept": min(venue.ring.total, venue.ring.capacity),
                    "messages_sent": self._fanouts[kind].sent_messages,
                    "paused": [venue.wire.universe.symbols[code] for code in np.flatnonzero(venue.market.paused).tolist()],
                }
                for kind, venue in self.exchange.venues.items()
            },
            "faults": [fault.describe() for fault in self.exchange.faults],
        }

    async def shut_down(self) -> None:
        """Close every connection with 1001; those that do not take it within a second are dropped."""
        for peer in list(self._peers):
            if peer.streaming and not peer.half_open:
                peer.close(1001, "going away")
            else:
                peer.abort()
        if self._peers:
            self._emptied.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._emptied.wait(), 1.0)
        for peer in list(self._peers):
            peer.abort()


@contextlib.asynccontextmanager
async def serve(config: ServerConfig, clock: Clock, *, extra_port: int | None = None) -> AsyncIterator[SimulatedExchange]:
    """Run the exchange; on leaving, connections are closed with 1001 and nothing is left behind.

    Args:
        config: markets and manners.
        clock: time and sleep; the real one trades live.
        extra_port: a second port with the same routes (a health address apart from the exchange's).

    Raises:
        SimulationConfigError: the port is taken or cannot be opened.
    """
    exchange = SimulatedExchange(config, clock)
    loop = asyncio.get_running_loop()
    async with contextlib.AsyncExitStack() as stack:
        servers = []
        for port in (config.port, extra_port):
            if port is None:
                continue
            try:
                server = await loop.create_server(lambda: Peer(exchange), config.host, port)
            except OSError as error:
                reason = error.strerror or str(error)
                raise SimulationConfigError(
                    f"port {port} on {config.host} cannot be opened ({reason}); choose another with --port"
                ) from error
            stack.push_async_callback(_stop, server)
            servers.append(server)
        exchange.port = servers[0].sockets[0].getsockname()[1]
        running = asyncio.create_task(exchange.run(), name="simulated-exchange")
        try:
            yield exchange
        finally:
            running.cancel()
            await exchange.shut_down()
            with contextlib.suppress(asyncio.CancelledError):
                await running


async def _stop(server: asyncio.Server) -> None:
    server.close()
    await server.wait_closed()
