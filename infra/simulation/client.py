"""A subscriber of the API's live stream that reconnects with its cursors, and remembers every row it was given.

The WebSocket between the two is a pair of queues with a delay: what it may do is break at any message, on either side, with messages
under way lost. What the API does with it is the real :class:`api.stream.StreamApp`.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from api.stream import RAW_WRITER
from infra.simulation.components import Outside
from infra.simulation.loop import SimClock, VirtualLoop

Series = tuple[str, str, str, str]
"""(channel, exchange, symbol, timeframe or empty)."""


class Wire:
    """One WebSocket connection in memory: an ASGI ``receive`` and ``send`` on the server's side."""

    def __init__(self, loop: VirtualLoop, delay_s: float) -> None:
        self.broken = False
        self._loop = loop
        self._delay_s = delay_s
        self._to_server: deque[dict[str, Any]] = deque([{"type": "websocket.connect"}])
        self._to_client: deque[str | None] = deque()
        self._server_waits: asyncio.Future[None] | None = None
        self._client_waits: asyncio.Future[None] | None = None

    async def receive(self) -> dict[str, Any]:
        """The server's next event."""
        while not self._to_server:
            if self.broken:
                return {"type": "websocket.disconnect", "code": 1006}
            self._server_waits = self._loop.create_future()
            await self._server_waits
        return self._to_server.popleft()

    async def send(self, event: dict[str, Any]) -> None:
        """The server sends. Raises OSError once the connection is broken."""
        if self.broken:
            raise OSError("the peer is gone")
        if event["type"] == "websocket.send":
            self._loop.call_later(self._delay_s, self._arrive, event["text"])
        elif event["type"] == "websocket.close":
            self._loop.call_later(self._delay_s, self._arrive, None)

    # api.live.client.Writer, as the real server offers it: many messages in one go

    def ready(self) -> bool:
        """See Writer."""
        return True

    def on_ready(self, callback: Callable[[], None]) -> None:
        """See Writer; this peer always takes more."""

    def write(self, texts: Sequence[bytes]) -> None:
        """See Writer."""
        if not self.broken:
            self._loop.call_later(self._delay_s, self._arrive_all, list(texts))

    # the client's side

    def say(self, text: str) -> None:
        """The client sends."""
        if not self.broken:
            self._to_server.append({"type": "websocket.receive", "text": text})
            self._wake()

    async def next(self) -> str | None:
        """The client's next message; None when the connection ended."""
        while not self._to_client:
            if self.broken:
                return None
            self._client_waits = self._loop.create_future()
            await self._client_waits
        return self._to_client.popleft()

    def cut(self) -> None:
        """Break it; what is under way is lost."""
        self.broken = True
        self._to_client.clear()
        self._wake()

    def _arrive_all(self, texts: list[bytes]) -> None:
        if not self.broken:
            self._to_client += [text.decode() for text in texts]
            self._wake()

    def _arrive(self, text: str | None) -> None:
        if self.broken:
            return
        if text is None:
            self.cut()
            return
        self._to_client.append(text)
        self._wake()

    def _wake(self) -> None:
        for waiting in (self._server_waits, self._client_waits):
            if waiting is not None and not waiting.done():
                waiting.set_result(None)


@dataclass(slots=True)
class Received:
    """Everything one series gave, in order."""

    rows: list[tuple[int, int]] = field(default_factory=list)
    """(key, revision): trade ids, or open times of final bars."""
    cursor: str | None = None
    resets: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    snapshots: int = 0
    seq: int = 0
    """Number of the newest message on this connection."""


class Subscriber:
    """The client.

    Args:
        outside: the world.
        wanted: what to subscribe to.
    """

    def __init__(self, outside: Outside, wanted: list[Series]) -> None:
        self.received: dict[Series, Received] = {series: Received() for series in wanted}
        self.wire: Wire | None = None
        self.connects = 0
        self.confirmed: set[Series] = set()
        self._outside = outside
        self._clock: SimClock = outside.clock("client")

    async def run(self) -> None:
        """Connect, read, connect again; until killed."""
        while True:
            await self._session()
            self.confirmed.clear()
            await self._clock.sleep(0.05 + 0.2 * self._clock.random.random())

    async def _session(self) -> None:
        outside = self._outside
        process, stream = outside.hooks.get("stream", (None, None))
        if process is None or not process.alive:
            return
        self.connects += 1
        wire = self.wire = Wire(outside.loop, 0.001)
        process.on_death.append(wire.cut)
        outside.loop.spawn(process, stream({"type": "websocket", "extensions": {RAW_WRITER: wire}}, wire.receive, wire.send))
        for number, (series, state) in enumerate(self.received.items()):
            channel, exchange, symbol, timeframe = series
            state.seq = 0
            request: dict[str, Any] = {"op": "subscribe", "id": number, "channel": channel, "exchange": exchange, "symbol": symbol}
            request |= ({"timeframe": timeframe} if timeframe else {}) | ({"from": state.cursor} if state.cursor else {"limit": 0})
            wire.say(json.dumps(request))
        while (text := await wire.next()) is not None:
            self._take(json.loads(text))
        if process.alive:
            process.on_death.remove(wire.cut)

    def _take(self, message: dict[str, Any]) -> None:
        kind = message["type"]
        if kind == "ack":
            series = list(self.received)[message["id"]]
            if self.received[series].cursor:
                # a stream that goes on begins with the next row, which a quiet symbol may not have for seconds
                self.confirmed.add(series)
            return
        if kind == "error":
            self._refused(message)
            return
        series = (message["channel"], message["exchange"], message["symbol"], message.get("timeframe", ""))
        state = self.received[series]
        self.confirmed.add(series)
        if message["seq"] != state.seq + 1:
            state.errors.append(f"message {message['seq']} followed message {state.seq}")
        state.seq = message["seq"]
        state.cursor = message["cursor"]
        self._outside.trace.note("client", *series, kind, state.cursor)
        if kind == "reset":
            state.resets.append(str(message["data"]))
        elif kind == "snapshot":
            state.snapshots += 1
        elif kind in ("update", "corrected"):
            if series[0] == "trades":
                state.rows += [(row["trade_id"], 0) for row in message["data"]]
            else:
                state.rows += [(row["open_time_us"], row["revision"]) for row in message["data"] if row["is_final"]]

    def _refused(self, message: dict[str, Any]) -> None:
        """A subscription was not granted (a store away, the server restarting): connect again, with the same cursors."""
        body = message["data"]
        number = message.get("id")
        if number is not None:
            series = list(self.received)[number]
            if not body["code"].endswith("_unavailable") and body["code"] != "timeout":
                self.received[series].errors.append(f"{body['code']}: {body['detail']}")
        if self.wire is not None:
            self.wire.cut()
