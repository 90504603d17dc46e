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
import ssl
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from collectors.simulated import controls, rest
from collectors.simulated.blocks import TradeBlock
from collectors.simulated.config import ServerConfig
from collectors.simulated.errors import SimulationConfigError, UnknownFaultError
from collectors.simulated.exchange import Exchange, Venue
from collectors.simulated.fanout import Fanout
from collectors.simulated.faults import FaultRequest, parse_fault
from collectors.simulated.http import Request, Response, as_json
from collectors.simulated.injection import carry_out, target_of
from collectors.simulated.peer import Peer
from collectors.simulated.scripts import Script, parse_script
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
        self.script: Script | None = None
        self._silent: list[tuple[FaultRequest, Peer]] = []
        """Half-open and stalled connections, with the fault that made them so."""
        self._sent: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]] = []
        self._doors: Doors | None = None
        self._doors_shut_until_ms = 0
        self._drop_all = False
        self._later: set[asyncio.Task[None]] = set()
        self._fanouts = {kind: Fanout(venue) for kind, venue in self.exchange.venues.items()}
        self._codes = {kind: {name: code for code, name in enumerate(venue.wire.lower)} for kind, venue in self.exchange.venues.items()}

    # Addresses.

    @property
    def rest_url(self) -> str:
        """Base of ``/api/v3`` and ``/fapi/v1``."""
        return f"http{self._secure}://{self._authority}"

    @property
    def ws_url(self) -> str:
        """Base of the spot streams ``/ws`` and ``/stream``."""
        return f"ws{self._secure}://{self._authority}"

    @property
    def usdm_ws_url(self) -> str:
        """Base of the USD-M streams ``/ws`` and ``/stream``."""
        return f"ws{self._secure}://{self._authority}/usdm"

    @property
    def _secure(self) -> str:
        return "s" if self.config.certificate is not None else ""

    @property
    def _authority(self) -> str:
        return f"[{self.config.host}]:{self.port}" if ":" in self.config.host else f"{self.config.host}:{self.port}"

    # What tests and benchmarks ask.

    def truth(self, symbol: str, kind: MarketKind = "spot", *, earlier: bool = False) -> dict[str, npt.NDArray[Any]]:
        """The trades of a symbol the market made and still keeps, untouched by faults (see :meth:`Venue.truth`).

        ``earlier``: those made before the ids were last reset.

        Raises:
            KeyError: the symbol is not listed.
        """
        venue = self.exchange.venues[kind]
        code = venue.market.code(symbol)
        if code is None:
            raise KeyError(symbol)
        return venue.truth(code, earlier=earlier)

    def sent_ids(self, symbol: str) -> npt.NDArray[np.int64]:
        """Ids of a spot symbol written to at least one connection that reads, in the order sent; only with ``track_sent``."""
        code = self.exchange.venues["spot"].market.code(symbol)
        found = [ids[codes == code] for codes, ids in self._sent]
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)

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
        self._begin(request)
        return request

    def play(self, script: Script) -> None:
        """Begin a script now, in place of the one under way.

        Raises:
            UnknownFaultError: a symbol or market of it does not exist; nothing was begun.
        """
        for _, request in script.entries:
            target_of(request, self.exchange)
        self.script = script

    def play_json(self, body: Any) -> Script:
        """Begin the script that ``POST /sim/script`` brings (see :mod:`collectors.simulated.scripts`)."""
        script = parse_script(body)
        self.play(script)
        return script

    def _begin(self, request: FaultRequest) -> None:
        before = self.connections
        silent = {peer for _, peer in self._silent}
        carry_out(request, self.exchange, before, wall_ms=self._clock.now_us() // 1_000)
        if request.fault in ("half_open", "stall"):
            self._silent += [(request, peer) for peer in before if peer not in silent and self._is_silent(peer)]
        elif request.fault in ("restart", "refuse"):
            self._drop_all = self._drop_all or request.fault == "restart"
            self._doors_shut_until_ms = self.exchange.time_ms + int(request.seconds * 1_000)
            if self._doors is not None:
                self._doors.shut()
        elif request.fault == "clear":
            self._silent.clear()
            self._doors_shut_until_ms = 0
        self.exchange.remember(request)

    def _is_silent(self, peer: Peer) -> bool:
        return peer.half_open or peer.stalled_until_ms > self.exchange.time_ms

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
            if self._doors is not None and not self._doors.are_open and self.exchange.time_ms >= self._doors_shut_until_ms:
                await self._doors.open()
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
        if self._drop_all:  # here, not at once: the answer to the request that asked for it is out by now
            self._drop_all = False
            for peer in list(self._peers):
                peer.abort()
        if self.script is not None:
            for request in self.script.due(self.exchange.time_ms):
                self._begin(request)
        silent = {peer for _, peer in self._silent if self._is_silent(peer)}
        for venue, block in self.exchange.step():
            kind = venue.market.config.kind
            open_peers = [peer for peer in self._peers if peer.streaming and peer.kind == kind]
            listeners = [peer for peer in open_peers if peer not in silent] if silent else open_peers
            rows = venue.faults.apply(block)
            if silent:
                self._note_unsent(rows, kind, silent)
            if self.config.track_sent and kind == "spot":
                self._note_sent(rows, listeners)
            self._fanouts[kind].publish(rows, listeners, skew_ms=self.exchange.skew_ms)

    def _note_sent(self, block: TradeBlock, listeners: list[Peer]) -> None:
        wanted = np.zeros(len(self.exchange.venues["spot"].wire.universe), dtype=np.bool_)
        for peer in listeners:
            wanted |= peer.subscriptions.trades.mask
        chosen = wanted[block.code]
        if chosen.any():
            self._sent.append((block.code[chosen], block.trade_id[chosen]))

    def _note_unsent(self, block: TradeBlock, kind: MarketKind, silent: set[Peer]) -> None:
        """Note in the faults that silenced connections what these were not sent."""
        self._silent = [(request, peer) for request, peer in self._silent if peer.streaming and peer in silent]
        symbols = self.exchange.venues[kind].wire.universe.symbols
        for request, peer in self._silent:
            if peer.kind != kind:
                continue
            rows = np.flatnonzero(peer.subscriptions.trades.mask[block.code])
            for code in np.unique(block.code[rows]).tolist():
                request.touch(symbols[code], sorted(block.trade_id[rows][block.code[rows] == code].tolist()))

    def attach(self, doors: Doors) -> None:
        """The port that a restart shuts."""
        self._doors = doors

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

    def later(self, delay_s: float, call: Callable[[], None]) -> None:
        """Call ``call`` after ``delay_s`` of the clock."""

        async def wait() -> None:
            await self._clock.sleep(delay_s)
            call()

        task = asyncio.create_task(wait())
        self._later.add(task)
        task.add_done_callback(self._later.discard)

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
            "down": self.exchange.is_down,
            "script": self.script.describe() if self.script is not None else None,
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
                    "requests_refused": venue.limit.refused,
                    "requests_too_early": venue.limit.too_early,
                    "paused": [venue.wire.universe.symbols[code] for code in np.flatnonzero(venue.market.paused).tolist()],
                }
                for kind, venue in self.exchange.venues.items()
            },
            "faults": [fault.describe() for fault in self.exchange.faults],
        }

    async def shut_down(self) -> None:
        """Close every connection with 1001; those that do not take it within a second are dropped."""
        for task in list(self._later):
            task.cancel()
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
    async with contextlib.AsyncExitStack() as stack:
        if extra_port is not None:
            extra = Doors(exchange, config, extra_port)
            await extra.open()
            stack.push_async_callback(extra.close)
        doors = Doors(exchange, config, config.port)
        await doors.open()
        stack.push_async_callback(doors.close)
        exchange.port = doors.port
        exchange.attach(doors)
        running = asyncio.create_task(exchange.run(), name="simulated-exchange")
        try:
            yield exchange
        finally:
            running.cancel()
            await exchange.shut_down()
            with contextlib.suppress(asyncio.CancelledError):
                await running


class Doors:
    """A listening port that can be shut for a while: connects are refused, open connections go on.

    Args:
        exchange: what answers.
        config: host and certificate.
        port: 0: one the system gives, kept when the doors are opened again.
    """

    def __init__(self, exchange: SimulatedExchange, config: ServerConfig, port: int) -> None:
        self.port = port
        self._exchange, self._config = exchange, config
        self._server: asyncio.Server | None = None
        self._tls = tls_context(config)

    @property
    def are_open(self) -> bool:
        """True while it listens."""
        return self._server is not None

    async def open(self) -> None:
        """Listen. Raises SimulationConfigError: the port is taken or cannot be opened."""
        loop, host = asyncio.get_running_loop(), self._config.host
        try:
            self._server = await loop.create_server(lambda: Peer(self._exchange), host, self.port, ssl=self._tls)
        except OSError as error:
            reason = error.strerror or str(error)
            raise SimulationConfigError(f"port {self.port} on {host} cannot be opened ({reason}); choose another with --port") from error
        self.port = self._server.sockets[0].getsockname()[1]

    def shut(self) -> None:
        """Listen no more; open connections stay."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def close(self) -> None:
        """Listen no more and wait until that is so."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
            await server.wait_closed()


def tls_context(config: ServerConfig) -> ssl.SSLContext | None:
    """The server's side of TLS; None without a certificate.

    Raises:
        SimulationConfigError: certificate or key cannot be used.
    """
    if config.certificate is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(config.certificate, config.key)
    except (OSError, ssl.SSLError) as error:
        raise SimulationConfigError(
            f"certificate {config.certificate} cannot be used: {error}; give a PEM file, and its key with --key"
        ) from error
    return context
