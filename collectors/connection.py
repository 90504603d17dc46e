"""One WebSocket connection's life: open, messages in bulk, pause, close.

Handshake, TLS, proxies, ping and pong, close codes are the ``websockets`` library's; once open, text frames take our short cut
(:mod:`collectors.reader`), control frames still go through the library. Measured at 160-byte messages, CPU of one core: the library's
``recv()`` 0.25 M messages/s, this connection 3.0 M/s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, cast
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidHandshake, InvalidMessage, InvalidStatus, InvalidURI, WebSocketException
from websockets.frames import CloseCode
from websockets.protocol import State

from collectors.errors import BlockedError, CollectorError, ProtocolViolationError, WireError
from collectors.reader import FrameReader
from schemas.seam import Clock

logger = logging.getLogger(__name__)

OnMessages = Callable[[list[bytes]], None]
"""Called with every complete message of a chunk, in order, from the event loop; must not block."""
OnOversized = Callable[[bytes, int], None]
"""Called with (first bytes, size) of a message above the limit."""

_BLOCKED_STATUS: Final = (403, 451)
_MAX_ANSWER: Final = 64 * 1024
"""Bytes of an HTTP answer we look for its end in; the library refuses longer ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectionConfig:
    """Times and sizes of one connection."""

    open_timeout_s: float = 10.0
    """TCP, TLS and handshake together."""
    ping_interval_s: float = 20.0
    """We ping as well as the venue does: a half-open socket is found even when the venue's own pings are three minutes apart (USD-M)."""
    ping_timeout_s: float = 10.0
    """A ping without answer for this long ends the connection."""
    close_timeout_s: float = 2.0
    """A close without answer for this long is cut; drain on SIGTERM has 5 s for everything."""
    max_message_bytes: int = 1024 * 1024


class Wire(ClientConnection):
    """The library's connection with our reader in front of its parser, from the first byte after the handshake."""

    def __init__(
        self, *args: Any, reader: FrameReader, on_messages: OnMessages, on_oversized: OnOversized, clock: Clock, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._reader = reader
        self._on_messages = on_messages
        self._on_oversized = on_oversized
        self._clock = clock
        self._handshake: bytes | None = b""  # what came of the answer so far; None once it is complete
        self.violation: ProtocolViolationError | None = None
        self.last_data_us = 0

    def data_received(self, data: bytes) -> None:
        """Bytes from the socket."""
        self.last_data_us = self._clock.monotonic_us()
        if self._handshake is not None:
            data = self._answer_received(data)
        if self.violation is not None or not data:
            return
        try:
            self._reader.feed(data)
        except ProtocolViolationError as exc:
            self.violation = exc
            self._deliver()
            self.protocol.fail(CloseCode.PROTOCOL_ERROR, str(exc)[:120])
            self.send_data()
            self.transport.close()
            return
        self._deliver()

    def _answer_received(self, data: bytes) -> bytes:
        """Give the library the HTTP answer only; returns what of ``data`` comes after it (frames may share its packet)."""
        assert self._handshake is not None
        seen = self._handshake + data
        end = seen.find(b"\r\n\r\n")
        if end < 0:
            self._handshake = seen[-_MAX_ANSWER:]
            super().data_received(data)
            return b""
        after = len(seen) - (end + 4)
        super().data_received(data[: len(data) - after])
        if self.protocol.state is State.OPEN:
            self._handshake = None
            return data[len(data) - after :] if after else b""
        super().data_received(data[len(data) - after :])  # a refusal: its body is the library's
        return b""

    def _deliver(self) -> None:
        reader = self._reader
        messages, control, oversized = reader.messages, reader.control, reader.oversized
        reader.clear()
        if messages:
            self._on_messages(messages)
        for head, size in oversized:
            self._on_oversized(head, size)
        for frame in control:
            super().data_received(frame)


class Connection:
    """An open connection. Make one with :func:`open_connection`.

    ``closed`` is done when it ended, with a sentence saying why; it is never cancelled or failed.
    """

    def __init__(self, wire: Wire, url: str, clock: Clock) -> None:
        self._wire = wire
        self._clock = clock
        self.url = url
        self.opened_us = clock.monotonic_us()
        self.closed: asyncio.Task[str] = asyncio.create_task(self._wait(), name=f"closed {url}")
        self._paused = False

    @property
    def last_data_us(self) -> int:
        """Monotonic time of the last byte received, pings included."""
        return self._wire.last_data_us

    async def send(self, text: str) -> None:
        """Send one text message. Raises WireError when the connection is gone."""
        try:
            await self._wire.send(text)
        except WebSocketException as exc:
            raise WireError(f"The connection to {self.url} is gone: {exc}") from exc

    async def probe(self) -> None:
        """Ping, and wait for the answer: everything the venue sent before it has been delivered then. Raises WireError."""
        try:
            await (await self._wire.ping())
        except WebSocketException as exc:
            raise WireError(f"The connection to {self.url} is gone: {exc}") from exc

    def pause(self) -> None:
        """Stop reading: the kernel's buffers fill and TCP slows the venue down."""
        if not self._paused and self._wire.state is State.OPEN:
            self._paused = True
            self._wire.transport.pause_reading()

    def resume(self) -> None:
        """Read again."""
        if self._paused:
            self._paused = False
            with contextlib.suppress(RuntimeError):  # the transport closed meanwhile
                self._wire.transport.resume_reading()

    async def close(self) -> None:
        """Close politely; cut when the peer does not answer. May be called twice."""
        self.resume()  # a paused socket never sees the peer's close frame
        await self._wire.close()
        await asyncio.wait([self.closed])

    def cut(self) -> None:
        """End the connection now, without a closing handshake: it is believed dead."""
        self._wire.transport.abort()

    async def _wait(self) -> str:
        await self._wire.wait_closed()
        if self._wire.violation is not None:
            return str(self._wire.violation)
        code, reason = self._wire.close_code, self._wire.close_reason
        sent = self._wire.protocol.close_sent
        if code == CloseCode.ABNORMAL_CLOSURE and sent is not None and sent.reason:
            return f"it was given up: {sent.reason}"  # the library's own reason, e.g. keepalive ping timeout
        if code == CloseCode.ABNORMAL_CLOSURE:
            return "the connection broke without a close frame"
        return f"closed with code {code} {reason or ''}".rstrip()


async def open_connection(
    url: str, *, clock: Clock, on_messages: OnMessages, on_oversized: OnOversized, config: ConnectionConfig | None = None
) -> Connection:
    """Open ``url`` (``ws://`` or ``wss://``) and deliver its messages.

    Raises WireError (try again) or BlockedError and ValueError (a retry gives the same answer), as :func:`is_retryable` says.
    """
    config = config or ConnectionConfig()
    proxy: Any = None if urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1") else True
    factory = partial(Wire, reader=FrameReader(config.max_message_bytes), on_messages=on_messages, on_oversized=on_oversized, clock=clock)
    try:
        wire = await connect(
            url,
            create_connection=cast(type[ClientConnection], factory),
            compression=None,  # inflating costs more than the network saves, and the reader takes plain frames only
            proxy=proxy,
            open_timeout=config.open_timeout_s,
            ping_interval=config.ping_interval_s,
            ping_timeout=config.ping_timeout_s,
            close_timeout=config.close_timeout_s,
            max_size=config.max_message_bytes,
            user_agent_header="marketstream",
        )
    except (OSError, TimeoutError, ssl.SSLError, WebSocketException) as exc:
        raise translate(url, exc) from exc
    return Connection(cast(Wire, wire), url, clock)


def translate(url: str, exc: Exception) -> CollectorError:
    """Our error for what the library or the system raised while connecting."""
    if isinstance(exc, InvalidStatus) and exc.response.status_code in _BLOCKED_STATUS:
        status = exc.response.status_code
        return BlockedError(
            f"{url} answers {status}: the venue does not serve this address or region. Use another network, or --source sim.", status=status
        )
    if isinstance(exc, InvalidURI):
        return BlockedError(f"'{url}' is not a WebSocket address: {exc}. Check MARKETSTREAM_COLLECTOR_WS_URL.")
    if isinstance(exc, InvalidStatus):
        return WireError(f"{url} answers HTTP {exc.response.status_code} instead of a WebSocket handshake.")
    if isinstance(exc, InvalidHandshake | InvalidMessage):
        return WireError(f"{url} does not speak WebSocket: {exc}")
    if isinstance(exc, TimeoutError):
        return WireError(f"{url} did not answer in time.")
    return WireError(f"{url} cannot be reached: {exc}")


def is_retryable(exc: BaseException) -> bool:
    """Whether trying again may help.

    Retried: every WireError (refused, reset, timed out, bad handshake, protocol violation, subscription not acknowledged) and
    OSError. Everything else is fatal for this feed and reported: a blocked region, a wrong address, a bug.
    """
    return isinstance(exc, WireError | OSError | TimeoutError)
