"""The small HTTP server of every process without a REST interface: ``/livez``, ``/readyz`` with reasons, ``/progress``, ``/metrics``."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest

from infra.errors import PortInUseError
from infra.watchdog import Monitor

Reasons = Callable[[], dict[str, str]]
"""Name of what is not ready -> one sentence; {} when ready. Called from the server's thread; must not block."""


class HealthServer:
    """Serves from a thread of its own, so a busy or stuck event loop is seen as such and not as a closed port.

    Args:
        port: loopback port; 0 picks a free one.
        reasons: asked on each ``/readyz``.
        monitor: started and stopped with the server; ``/livez`` is 503 when it finds the process stuck, and its reasons are among those
            of ``/readyz``. Without one ``/livez`` says that the process runs.
    """

    def __init__(
        self,
        port: int,
        reasons: Reasons,
        *,
        monitor: Monitor | None = None,
        registry: CollectorRegistry = REGISTRY,
        host: str = "127.0.0.1",
    ) -> None:
        self._reasons = reasons
        self._monitor = monitor
        self._registry = registry
        try:
            self._server = ThreadingHTTPServer((host, port), self._handler())
        except OSError as exc:
            raise PortInUseError(
                f"Port {port} for the health server cannot be opened ({exc.strerror}): choose another one.", port=port
            ) from exc
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 1.0}, name="health", daemon=True)

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._server.server_address[1])

    def start(self) -> Self:
        """Begin to serve."""
        self._thread.start()
        if self._monitor is not None:
            self._monitor.start()
        return self

    def stop(self) -> None:
        """Stop serving and close the port."""
        if self._monitor is not None:
            self._monitor.stop()
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        reasons, registry, monitor = self._reasons, self._registry, self._monitor

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # noqa: N802 - the name http.server calls
                if self.path == "/livez":
                    stuck = "" if monitor is None else monitor.stuck()
                    body = json.dumps({"status": "stuck", "reason": stuck} if stuck else {"status": "ok"}).encode()
                    self._answer(503 if stuck else 200, body)
                elif self.path == "/progress":
                    self._answer(200, json.dumps({} if monitor is None else monitor.document()).encode())
                elif self.path == "/readyz":
                    found = {**({} if monitor is None else monitor.reasons()), **reasons()}
                    body = json.dumps({"status": "not ready" if found else "ok", "reasons": found}).encode()
                    self._answer(503 if found else 200, body)
                elif self.path == "/metrics":
                    self._answer(200, generate_latest(registry), CONTENT_TYPE_LATEST)
                else:
                    self._answer(404, b'{"status":"not found"}')

            def _answer(self, status: int, body: bytes, kind: str = "application/json") -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Probes every second are not worth a log line."""

        return Handler
