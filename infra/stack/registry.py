"""``python -m infra.stack.registry``: a schema registry with Confluent's HTTP interface, kept in a compacted topic on the broker.

Knows Avro only. Exit codes: 0 stopped, 2 settings, 3 port in use, 6 broker unreachable.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import re
import signal
import socketserver
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from infra.errors import MarketstreamError, PortInUseError, UnreachableError
from infra.settings import Settings, load_settings
from infra.stack.registry_log import SchemaLog
from infra.stack.registry_store import Record, RegistryError, Store, level_record, mode_record

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 1024 * 1024
IDLE_S = 120.0
CONTENT_TYPE = "application/vnd.schemaregistry.v1+json"


class Registry:
    """Store and log together: every change is in the log, acknowledged, before it is visible."""

    def __init__(self, log: SchemaLog, default_level: str) -> None:
        self._log = log
        self._default_level = default_level
        self._lock = threading.RLock()
        self._stale = True
        self._store = Store(default_level)

    def load(self) -> None:
        """Reads the log.

        Raises:
            UnreachableError: the broker does not answer.
        """
        store = Store(self._default_level)
        for key, value in self._log.read_all():
            store.apply(key, value)
        self._store, self._stale = store, False

    def read(self, question: Callable[[Store], Any]) -> Any:
        """An answer from memory."""
        with self._lock:
            return question(self._current())

    def change(self, question: Callable[[Store], tuple[Any, list[Record]]]) -> Any:
        """Asks for an answer and the records that make it true, writes those, applies them, returns the answer."""
        with self._lock:
            answer, records = question(self._current())
            if records:
                self._stale = True  # until the log has acknowledged, memory may be behind it
                self._log.write(records)
                for key, value in records:
                    self._store.apply(key, value)
                self._stale = False
            return answer

    def _current(self) -> Store:
        if self._stale:
            self.load()
        return self._store


Route = Callable[["Call"], Any]


class Call:
    """One request: path parts, query arguments and body."""

    def __init__(self, registry: Registry, parts: list[str], arguments: dict[str, list[str]], body: dict[str, Any]) -> None:
        self.registry = registry
        self.parts = parts
        self.body = body
        self._arguments = arguments

    def flag(self, name: str) -> bool:
        """A query argument that is true or false."""
        return self._arguments.get(name, ["false"])[-1].lower() == "true"

    def text(self, name: str) -> str:
        """A query argument as text, empty when absent."""
        return self._arguments.get(name, [""])[-1]

    def schema(self) -> str:
        """The body's schema.

        Raises:
            RegistryError: none there, of another type, or with references.
        """
        schema = self.body.get("schema")
        if not isinstance(schema, str) or not schema:
            raise RegistryError(42201, "Empty schema: the body needs a field 'schema' with the schema as a string")
        if self.body.get("schemaType", "AVRO") not in ("AVRO", None):
            raise RegistryError(42201, f"Invalid schema type {self.body['schemaType']}: this registry knows AVRO only")
        if self.body.get("references"):
            raise RegistryError(42201, "Schema references are not supported: put the named types into the schema")
        return schema


def _register(call: Call) -> Any:
    return call.registry.change(lambda store: store.register(call.parts[0], call.schema())).as_dict()


def _set_level(subject: str | None, call: Call) -> Any:
    level = str(call.body.get("compatibility", "")).upper()
    return call.registry.change(lambda _store: ({"compatibility": level}, [level_record(subject, level)]))


def _delete_level(call: Call) -> Any:
    subject = call.parts[0]
    return call.registry.change(lambda store: ({"compatibilityLevel": store.level(subject, default=False)}, [level_record(subject, None)]))


def _get_level(call: Call) -> Any:
    return {"compatibilityLevel": call.registry.read(lambda store: store.level(call.parts[0], default=call.flag("defaultToGlobal")))}


def _set_mode(subject: str | None, call: Call) -> Any:
    mode = str(call.body.get("mode", "")).upper()
    return call.registry.change(lambda _store: ({"mode": mode}, [mode_record(subject, mode)]))


def _test(call: Call, name: str | None) -> Any:
    problems = call.registry.read(lambda store: store.test(call.parts[0], call.schema(), name))
    return {"is_compatible": not problems, **({"messages": problems} if call.flag("verbose") else {})}


def _read(question: Callable[[Store, Call], Any]) -> Route:
    return lambda call: call.registry.read(lambda store: question(store, call))


ROUTES: list[tuple[str, str, Route]] = [
    ("GET", r"/", lambda _call: {}),
    ("GET", r"/subjects", _read(lambda s, c: s.subjects(c.text("subjectPrefix"), deleted=c.flag("deleted")))),
    ("GET", r"/subjects/([^/]+)/versions", _read(lambda s, c: s.versions(c.parts[0], deleted=c.flag("deleted")))),
    ("POST", r"/subjects/([^/]+)/versions", _register),
    ("POST", r"/subjects/([^/]+)", _read(lambda s, c: s.lookup(c.parts[0], c.schema(), deleted=c.flag("deleted")).as_dict())),
    ("DELETE", r"/subjects/([^/]+)", lambda c: c.registry.change(lambda s: s.delete(c.parts[0], permanent=c.flag("permanent")))),
    ("GET", r"/subjects/([^/]+)/versions/([^/]+)", _read(lambda s, c: s.version(*c.parts, deleted=c.flag("deleted")).as_dict())),
    ("GET", r"/subjects/([^/]+)/versions/([^/]+)/schema", _read(lambda s, c: json.loads(s.version(*c.parts).schema))),
    ("GET", r"/subjects/([^/]+)/versions/([^/]+)/referencedby", lambda _call: []),
    (
        "DELETE",
        r"/subjects/([^/]+)/versions/([^/]+)",
        lambda c: c.registry.change(lambda s: s.delete_version(*c.parts, permanent=c.flag("permanent"))),
    ),
    ("GET", r"/schemas", _read(lambda s, c: [version.as_dict() for version in s.everything(deleted=c.flag("deleted"))])),
    ("GET", r"/schemas/types", lambda _call: ["AVRO"]),
    ("GET", r"/schemas/ids/([^/]+)", _read(lambda s, c: {"schema": s.schema(c.parts[0])})),
    ("GET", r"/schemas/ids/([^/]+)/schema", _read(lambda s, c: json.loads(s.schema(c.parts[0])))),
    ("GET", r"/schemas/ids/([^/]+)/subjects", _read(lambda s, c: sorted({v.subject for v in s.uses(c.parts[0])}))),
    (
        "GET",
        r"/schemas/ids/([^/]+)/versions",
        _read(lambda s, c: [{"subject": v.subject, "version": v.version} for v in s.uses(c.parts[0])]),
    ),
    ("GET", r"/config", _read(lambda s, _c: {"compatibilityLevel": s.level(None)})),
    ("PUT", r"/config", lambda call: _set_level(None, call)),
    ("GET", r"/config/([^/]+)", _get_level),
    ("PUT", r"/config/([^/]+)", lambda call: _set_level(call.parts[0], call)),
    ("DELETE", r"/config/([^/]+)", _delete_level),
    ("GET", r"/mode", _read(lambda s, _c: {"mode": s.mode(None)})),
    ("PUT", r"/mode", lambda call: _set_mode(None, call)),
    ("GET", r"/mode/([^/]+)", _read(lambda s, c: {"mode": s.mode(c.parts[0])})),
    ("PUT", r"/mode/([^/]+)", lambda call: _set_mode(call.parts[0], call)),
    ("POST", r"/compatibility/subjects/([^/]+)/versions", lambda call: _test(call, None)),
    ("POST", r"/compatibility/subjects/([^/]+)/versions/([^/]+)", lambda call: _test(call, call.parts[1])),
]
_COMPILED = [(method, re.compile(pattern + r"/?"), route) for method, pattern, route in ROUTES]


class RegistryServer(socketserver.ThreadingTCPServer):
    """Serves a :class:`Registry` on loopback."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, registry: Registry, address: tuple[str, int]) -> None:
        self.registry = registry
        super().__init__(address, Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A broken connection is the client's business."""
        logger.info("connection ended: %s", client_address, exc_info=logger.isEnabledFor(logging.DEBUG))


class Handler(BaseHTTPRequestHandler):
    """One connection, one request after the other."""

    server: RegistryServer
    protocol_version = "HTTP/1.1"
    server_version = "marketstream-registry"
    timeout = IDLE_S
    disable_nagle_algorithm = True
    wbufsize = 65536

    def do_GET(self) -> None:
        """Questions."""
        self._serve()

    do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Requests are logged at debug level only."""
        logger.debug(format, *args)

    def _serve(self) -> None:
        try:
            answer, status = self._answer(), 200
        except RegistryError as exc:
            answer, status = {"error_code": exc.code, "message": exc.message}, exc.status
        except UnreachableError as exc:
            logger.warning("%s", exc)
            answer, status = {"error_code": 50001, "message": str(exc)}, 500
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def _answer(self) -> Any:
        url = urlsplit(self.path)
        body = self._read_body()
        known = False
        for method, pattern, route in _COMPILED:
            match = pattern.fullmatch(url.path)
            if match is None:
                continue
            known = True
            if method == self.command:
                parts = [unquote(part) for part in match.groups()]
                return route(Call(self.server.registry, parts, parse_qs(url.query), body))
        raise RegistryError(405, "HTTP 405 Method Not Allowed") if known else RegistryError(404, "HTTP 404 Not Found")

    def _read_body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "0")
        if "Transfer-Encoding" in self.headers or not length.isdigit():
            self.close_connection = True
            raise RegistryError(411, "the body must come with a Content-Length")
        if int(length) > MAX_BODY_BYTES:
            self.close_connection = True
            raise RegistryError(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
        if length == "0":
            return {}
        try:
            parsed = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as exc:
            raise RegistryError(400, f"the body is not JSON: {exc}") from exc
        if not isinstance(parsed, dict):
            raise RegistryError(422, "the body must be a JSON object")
        return parsed


def build(settings: Settings, port: int, host: str = "127.0.0.1") -> RegistryServer:
    """The listening server with the log read, not yet serving.

    Raises:
        PortInUseError: the port is taken.
        UnreachableError: the broker does not answer.
    """
    topic = settings.kafka.topic_prefix + settings.registry.topic
    log = SchemaLog(settings.kafka.client_config(), topic, settings.kafka.replication)
    registry = Registry(log, settings.registry.compatibility)
    try:
        server = RegistryServer(registry, (host, port))
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            raise PortInUseError(f"port {port} is in use; set MARKETSTREAM_PORT_REGISTRY to a free one", port=port) from exc
        raise
    try:
        log.ensure_topic()
        registry.load()
    except MarketstreamError:
        server.server_close()
        raise
    return server


def main(argv: list[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m infra.stack.registry", description=__doc__)
    parser.add_argument("--port", type=int, help="port (default: from the settings)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: loopback; a container listens on 0.0.0.0)")
    options = parser.parse_args(argv)
    try:
        settings = load_settings()
        logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
        server = build(settings, options.port or settings.ports.registry, options.host)
    except MarketstreamError as exc:
        print(exc, file=sys.stderr)
        return exc.exit_code
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: threading.Thread(target=server.shutdown, daemon=True).start())
    logger.info("schema registry serves on port %s", server.server_address[1])
    server.serve_forever(poll_interval=0.25)
    server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
