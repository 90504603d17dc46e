"""The API process: settings in, a server on ``settings.api.host:port`` out. ``python -m infra.api``.

Real clients behind the interfaces of ``api.deps``: ClickHouse and PostgreSQL in ``infra.api_stores``, Kafka in ``infra.api_frames``.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from api.app import Api, create_app
from api.deps import Deps
from api.stream import RAW_WRITER
from infra.api_frames import KafkaFrames
from infra.api_stores import ClickHouseHistory, PostgresLetters, PostgresSymbols
from infra.coverage import LedgerReader
from infra.ending import on_request_to_end_loop
from infra.errors import MarketstreamError, PortInUseError
from infra.logs import setup_logging
from infra.seam import SystemClock
from infra.sessions import PostgresSessions
from infra.settings import Settings, load_settings
from infra.watchdog import Monitor

logger = logging.getLogger(__name__)

_MAX_WS_BYTES = 64 * 1024
"""A larger message is refused by the protocol (1009) before it is put together."""
_ABORT_AFTER_S = 5.0
_TEXT_FRAME = 0x81
_SHORT, _MEDIUM = 126, 65_536


def text_frame(payload: bytes) -> bytes:
    """The WebSocket frame (RFC 6455, unmasked, unfragmented, uncompressed) of one text message."""
    size = len(payload)
    if size < _SHORT:
        return b"%c%c%s" % (_TEXT_FRAME, size, payload)
    if size < _MEDIUM:
        return b"%c\x7e%s%s" % (_TEXT_FRAME, size.to_bytes(2, "big"), payload)
    return b"%c\x7f%s%s" % (_TEXT_FRAME, size.to_bytes(8, "big"), payload)


class StreamProtocol(WebSocketsSansIOProtocol):
    """Uvicorn's WebSocket protocol with two additions.

    Many messages go out in one write (ten in one are worth 5-8 single ones), and a peer that does not read cannot hold its connection
    open after we have closed it.
    """

    def handle_connect(self, event: Any) -> None:
        """Offer ourselves as the app's writer."""
        self._callback: Callable[[], None] = lambda: None
        super().handle_connect(event)
        scope = getattr(self, "scope", None)
        if scope is not None:
            scope["extensions"][RAW_WRITER] = self

    def resume_writing(self) -> None:
        """The peer takes more."""
        super().resume_writing()
        self._callback()

    # -- api.live.client.Writer

    def ready(self) -> bool:
        """See Writer."""
        return self.writable.is_set()

    def on_ready(self, callback: Callable[[], None]) -> None:
        """See Writer."""
        self._callback = callback

    def write(self, texts: Sequence[bytes]) -> None:
        """See Writer."""
        if not (self.disconnected or self.close_sent or self.transport.is_closing()):
            self.transport.write(b"".join([text_frame(text) for text in texts]))

    async def run_asgi(self) -> None:
        """Serve the app, and do not wait for ever for a peer to take its last bytes."""
        try:
            await super().run_asgi()
        finally:
            self.loop.call_later(_ABORT_AFTER_S, self._abort)

    def _abort(self) -> None:
        if not self.disconnected:
            self.transport.abort()


class ApiServer(uvicorn.Server):
    """Uvicorn that gives stream clients their notice before it closes connections."""

    def __init__(self, config: uvicorn.Config, api: Api) -> None:
        super().__init__(config)
        self._api = api

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to :func:`serve`: uvicorn would raise them again at the end, and a clean stop would look like a crash."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Announce, then shut down."""
        for server in getattr(self, "servers", []):
            server.close()
        await self._api.stream.shutdown()
        await super().shutdown(sockets)


def server_config(api: Api, *, host: str = "127.0.0.1", port: int = 0) -> uvicorn.Config:
    """How the server runs: one process, uvloop, no access log (metrics count requests), no compression on the stream."""
    return uvicorn.Config(
        api,
        host=host,
        port=port,
        loop="uvloop",
        ws=StreamProtocol,
        ws_max_size=_MAX_WS_BYTES,
        ws_ping_interval=20.0,
        ws_ping_timeout=20.0,
        ws_per_message_deflate=False,
        access_log=False,
        log_config=None,
        log_level="warning",  # below it uvicorn writes a line for every connection
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=3,
        h11_max_incomplete_event_size=16 * 1024,
        lifespan="on",
    )


async def build(settings: Settings) -> Api:
    """The app with real clients; nothing is asked of any server yet but what starts by itself later."""
    clock = SystemClock()
    history, symbols = ClickHouseHistory(settings.clickhouse), PostgresSymbols(settings.postgres)
    frames = KafkaFrames(settings)
    monitor = Monitor(frames, settings.watchdog.stuck_s, clock).start()
    return create_app(
        Deps(
            history=history,
            symbols=symbols,
            frames=frames,
            sessions=PostgresSessions(symbols, settings.kafka.topic_prefix),
            coverage=LedgerReader(history),
            letters=PostgresLetters(symbols, settings.kafka.topic_prefix),
            clock=clock,
            partitions=settings.kafka.partitions,
            on_close=(history.close, symbols.close),
            stuck=monitor.stuck,
            progress=monitor.document,
        )
    )


async def serve(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM. Raises PortInUseError."""
    try:
        listener = socket.create_server((settings.api.host, settings.api.port), reuse_port=False, backlog=2048)
    except OSError as exc:
        raise PortInUseError(
            f"Port {settings.api.port} of {settings.api.host} for the API cannot be opened ({exc.strerror}): set MARKETSTREAM_PORT_API.",
            port=settings.api.port,
        ) from exc
    with listener:
        api = await build(settings)
        config = server_config(api, host=settings.api.host, port=settings.api.port)
        server = ApiServer(config, api)
        # What is loaded now stays; messages and rows are not cyclic. The default thresholds cost 35 % of the hub's time at 1,000 symbols.
        gc.collect()
        gc.freeze()
        gc.set_threshold(100_000, 20, 50)
        on_request_to_end_loop(asyncio.get_running_loop(), lambda: server.handle_exit(signal.SIGTERM, None))
        await server.serve(sockets=[listener])


def main() -> int:
    """Entry point; the exit code."""
    try:
        settings = load_settings()
        setup_logging(settings.log_level, as_json=settings.log_json)
        import uvloop  # not at the top: tests import this module for its protocol on any loop

        uvloop.run(serve(settings))
    except MarketstreamError as exc:
        sys.stderr.write(f"{exc.message}\n")
        return exc.exit_code
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
