"""One socket: HTTP requests until it upgrades, then a WebSocket that is fed by the fan-out.

The handshake is our own (1,024 streams make a long URL); incoming frames go through the ``websockets`` package's protocol object, which also
answers pings and closes. Outgoing market frames are written past it: they are unmasked and never fragmented, so header and payload are all
there is (measured: 0.2 us a message against 9 us through ``websockets``' own send).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol, cast

from websockets.exceptions import ProtocolError
from websockets.frames import Frame, Opcode
from websockets.protocol import OPEN, SEND_EOF, Side
from websockets.protocol import Protocol as WebSocketProtocol

from collectors.simulated.config import ServerConfig
from collectors.simulated.errors import HttpSyntaxError
from collectors.simulated.exchange import Venue
from collectors.simulated.http import Request, Response, as_json, take_request, websocket_reply
from collectors.simulated.subscriptions import Subscriptions, TooManyStreamsError
from collectors.simulated.universe import MarketKind
from collectors.simulated.wire import frame

logger = logging.getLogger(__name__)

PING: Final = 0x89
MAX_INCOMING_BYTES: Final = 65_536
"""Largest control message; 1,024 stream names of 25 bytes fit twice."""

CLOSE_TIMEOUT_US: Final = 10_000_000
"""How long a closed connection may take to read what was sent to it."""


class Host(Protocol):
    """What a peer needs of its server."""

    config: ServerConfig

    def opened(self, peer: Peer) -> bool:
        """A socket was accepted; False if there are too many."""
        ...

    def lost(self, peer: Peer) -> None:
        """A socket is gone."""
        ...

    def answer(self, request: Request) -> Response:
        """Reply to an HTTP request."""
        ...

    def venue_of(self, path: str) -> tuple[MarketKind, Venue, str] | None:
        """The market a WebSocket path belongs to and the rest of the path; None if there is none."""
        ...

    def codes(self, kind: MarketKind) -> dict[str, int]:
        """Symbol code by lower-case symbol."""
        ...

    def monotonic_us(self) -> int:
        """Time that never goes back."""
        ...

    def later(self, delay_s: float, call: Callable[[], None]) -> None:
        """Call ``call`` after ``delay_s``."""
        ...


class Peer(asyncio.Protocol):
    """A connection; ``asyncio`` calls the methods of :class:`asyncio.Protocol`.

    Args:
        host: the server.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        self._socket: WebSocketProtocol | None = None
        self._incoming_us: deque[int] = deque(maxlen=host.config.max_messages_a_second)
        # When the unanswered ping went out (0: none), what it said, and when the last one was answered.
        self._ping_us = 0
        self._ping_text = b""
        self._pong_us = 0
        self._closed_us = 0
        self.opened_us = 0
        self.kind: MarketKind = "spot"
        self.combined = False
        self.half_open = False
        # Market time until which no market data is sent to it, though pings are answered.
        self.stalled_until_ms = 0
        self.ending = False
        # An answer that comes late is on its way; what else the client asks waits for it.
        self._answering = False

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client connected."""
        # uvloop's transports are no subclasses of asyncio.Transport.
        self._transport = cast(asyncio.Transport, transport)
        self.opened_us = self._host.monotonic_us()
        if not self._host.opened(self):
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self.ending = True
        self._host.lost(self)

    def data_received(self, data: bytes) -> None:
        """Bytes came in."""
        if self.half_open or self.ending:
            return
        if self._socket is not None:
            self._receive_frames(data)
            return
        self._buffer += data
        self._serve()

    def _serve(self) -> None:
        """Answer the requests that have arrived, in their order."""
        while self._socket is None and not self.ending and not self._answering:
            try:
                request = take_request(self._buffer)
            except HttpSyntaxError as error:
                self._reply(as_json({"code": -1000, "msg": str(error)}, status=error.status), keep_alive=False)
                return
            if request is None:
                return
            if request.upgrades:
                self._upgrade(request)
            else:
                self._answer(self._host.answer(request), request.keep_alive)

    def _answer(self, response: Response, keep_alive: bool) -> None:
        """Send a reply, now or when it is due."""
        if response.delay_s <= 0.0:
            self._reply(response, keep_alive=keep_alive)
            return
        self._answering = True
        self._host.later(response.delay_s, lambda: self._answer_late(response, keep_alive))

    def _answer_late(self, response: Response, keep_alive: bool) -> None:
        self._answering = False
        if not self.ending and not self.half_open:
            self._reply(response, keep_alive=keep_alive)
            self._serve()

    # HTTP

    def _reply(self, response: Response, *, keep_alive: bool) -> None:
        assert self._transport is not None
        self._transport.write(response.encode(keep_alive=keep_alive))
        if not keep_alive:
            self.ending = True
            self._transport.close()

    def _upgrade(self, request: Request) -> None:
        """Open a WebSocket at ``/ws``, ``/ws/<stream>`` or ``/stream?streams=...``."""
        assert self._transport is not None
        found = self._host.venue_of(request.path)
        reply = websocket_reply(request)
        if found is None or isinstance(reply, Response):
            refusal = reply if isinstance(reply, Response) else as_json({"code": -5000, "msg": f"no stream at {request.path}"}, status=404)
            self._reply(refusal, keep_alive=False)
            return
        kind, venue, path = found
        self.kind = kind
        if kind == "usdm":
            # USD-M takes ten messages a second where spot takes five.
            self._incoming_us = deque(maxlen=2 * self._host.config.max_messages_a_second)
        self.subscriptions = Subscriptions(venue.wire, self._host.codes(kind))
        self.combined = path == "/stream"
        self._transport.write(reply)
        self._socket = WebSocketProtocol(Side.SERVER, state=OPEN, max_size=MAX_INCOMING_BYTES)
        names = request.params.get("streams", "") if self.combined else path.removeprefix("/ws").lstrip("/")
        try:
            self.subscriptions.add([name for name in names.split("/") if name])
        except TooManyStreamsError:
            self.close(1008, "Too many streams: at most 1024 a connection")
        early = bytes(self._buffer)
        self._buffer.clear()
        if early and not self.ending:
            self._receive_frames(early)

    # WebSocket

    @property
    def streaming(self) -> bool:
        """True while this is an open WebSocket."""
        return self._socket is not None and not self.ending

    def write(self, data: bytes) -> None:
        """Send whole frames; a client that does not read is dropped once too much is waiting."""
        transport = self._transport
        if self.half_open or self.ending or transport is None:
            return
        transport.write(data)
        if transport.get_write_buffer_size() > self._host.config.max_buffer_bytes:
            logger.warning("slow client: %d bytes unsent, connection dropped", transport.get_write_buffer_size())
            self.abort()

    def send_text(self, text: str) -> None:
        """Send one text message."""
        self.write(frame(text.encode()))

    def abort(self) -> None:
        """Drop the connection without a close frame: the client sees 1006."""
        self.ending = True
        if self._transport is not None:
            self._transport.abort()

    def close(self, code: int, reason: str) -> None:
        """Send a close frame and end; the socket goes once the buffer is flushed and the client answered, or by housekeeping."""
        if self.half_open or self.ending or self._socket is None or self._transport is None:
            return
        self._socket.send_close(code, reason)
        self._flush()
        self.ending = True
        self._closed_us = self._host.monotonic_us()
        self._transport.close()

    def keep(self, now_us: int) -> None:
        """Housekeeping, about once a second: pings, missing pongs, the 24 hour mark."""
        config = self._host.config
        if self._closed_us and now_us - self._closed_us >= CLOSE_TIMEOUT_US:
            # A client that does not even read its close frame would keep the buffer for ever.
            self.abort()
        if not self.streaming or self.half_open:
            return
        if now_us - self.opened_us >= config.max_connection_s * 1e6:
            self.close(1001, "connection is valid for 24 hours")
        elif self._ping_us and now_us - self._ping_us >= config.pong_timeout_s * 1e6:
            self.close(1008, "Pong timeout")
        elif not self._ping_us and now_us - max(self.opened_us, self._pong_us) >= config.ping_interval_s * 1e6:
            self._ping_us, self._ping_text = now_us, str(now_us // 1000).encode()
            self.write(frame(self._ping_text, PING))

    def _receive_frames(self, data: bytes) -> None:
        socket = self._socket
        assert socket is not None
        try:
            socket.receive_data(data)
        except ProtocolError as error:
            # The protocol object has queued the close frame that names the violation.
            logger.info("client broke the WebSocket protocol: %s", error)
        for event in socket.events_received():
            if isinstance(event, Frame) and not self.ending:
                self._receive_frame(event)
        self._flush()

    def _receive_frame(self, event: Frame) -> None:
        if event.opcode is Opcode.CLOSE:
            return
        now_us = self._host.monotonic_us()
        waiting = self._incoming_us
        if len(waiting) == waiting.maxlen and now_us - waiting[0] < 1_000_000:
            self.close(1008, "Too many requests")
            return
        waiting.append(now_us)
        if event.opcode is Opcode.PONG:
            # Unsolicited pongs are allowed, but do not keep a connection alive.
            if self._ping_us and bytes(event.data) == self._ping_text:
                self._ping_us, self._pong_us = 0, now_us
        elif not event.fin or event.opcode is Opcode.CONT:
            self.close(1003, "control messages must not be fragmented")
        elif event.opcode is Opcode.TEXT:
            self._control(bytes(event.data))

    def _control(self, data: bytes) -> None:
        try:
            answer = self.subscriptions.control(data.decode("utf-8", "replace"))
        except TooManyStreamsError:
            self.close(1008, "Too many streams: at most 1024 a connection")
            return
        self.send_text(answer)

    def _flush(self) -> None:
        """Send what the protocol object wants sent (pongs, close frames)."""
        assert self._socket is not None and self._transport is not None
        for data in self._socket.data_to_send():
            if self.ending:
                return
            if data == SEND_EOF:
                self.ending = True
                self._transport.close()
            else:
                self._transport.write(data)
