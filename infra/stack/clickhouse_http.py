"""ClickHouse's HTTP interface over :mod:`infra.stack.clickhouse_engine`: one thread a connection, bounded in number, body and time.

In: ``GET``/``POST /`` with ``query``, ``param_*``, ``database``, ``default_format`` and settings in the URL, statement or data in the body
(plain, chunked, gzip, deflate, zstd, lz4). Out: the result with ClickHouse's headers; an error is a status, its code in
``X-ClickHouse-Exception-Code`` and ClickHouse's text. ``/ping`` and ``/replicas_status`` answer ``Ok.``.
"""

from __future__ import annotations

import base64
import hmac
import logging
import secrets
import socket
import socketserver
import threading
import time
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from itertools import chain
from urllib.parse import parse_qsl, urlsplit

from infra.stack import clickhouse_engine as ch
from infra.stack import http_body
from infra.stack.clickhouse_sql import HEAD_LIMIT, first_word, output_format, read_insert, reads_files

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 128
MAX_QUERIES = 16
"""Statements at once; more wait ``QUEUE_S`` and are then refused with TOO_MANY_SIMULTANEOUS_QUERIES."""
QUEUE_S = 30.0
IDLE_S = 600.0
"""A connection that sends nothing for this long is closed."""
MAX_SQL_BYTES = 4 * 1024 * 1024
SERVER_NAME = "marketstream"

# Parameters of the HTTP interface itself: not settings of the engine. The last group is what a server would do and one process need not.
_TRANSPORT = frozenset(
    {"query", "database", "default_format", "user", "password", "query_id", "session_id", "session_timeout", "session_check", "compress"}
    | {"decompress", "enable_http_compression", "http_zlib_compression_level", "wait_end_of_query", "buffer_size", "quota_key", "role"}
    | {"send_progress_in_http_headers", "http_headers_progress_interval_ms", "cancel_http_readonly_queries_on_client_close"}
    | {"client_protocol_version", "add_http_cors_header", "stacktrace", "close_session"}
)

# ClickHouse's own mapping of error codes to statuses (exceptionCodeToHTTPStatus); everything else is 500.
_STATUS = {
    **dict.fromkeys((6, 26, 27, 33, 36, 38, 41, 43, 44, 52, 53, 62, 69, 70, 72, 117, 131, 190, 386, 427, 456, 457), 400),
    **dict.fromkeys((42, 16, 10, 8, 20, 184, 179, 215, 179, 403, 153), 400),
    **dict.fromkeys((194,), 401),
    **dict.fromkeys((192, 193, 497, 516), 403),
    **dict.fromkeys((46, 47, 50, 56, 57, 60, 63, 73, 81, 82, 115, 202 + 10_000), 404),
    48: 501,
    164: 403,
    202: 503,
    209: 503,
    307: 413,
}


class HttpError(Exception):
    """A request the interface itself refuses: HTTP ``status``, ClickHouse ``code``, one sentence."""

    def __init__(self, status: int, code: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.code = code


class ClickHouseServer(socketserver.ThreadingTCPServer):
    """Listens on loopback until :meth:`shutdown`.

    Args:
        engine: the opened engine.
        address: host and port; port 0 takes a free one.
        user: the only user there is.
        password: empty means none is asked for.
        max_body_bytes: of one request, after decompression.
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 256

    def __init__(self, engine: ch.Engine, address: tuple[str, int], *, user: str, password: str, max_body_bytes: int) -> None:
        self.engine = engine
        self.user = user
        self.password = password
        self.max_body_bytes = max_body_bytes
        self.queries = threading.BoundedSemaphore(MAX_QUERIES)
        self._connections = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(address, Handler)

    def process_request(self, request: socket.socket | tuple[bytes, socket.socket], client_address: object) -> None:
        """Serves the connection in a thread of its own, or refuses it when there are too many."""
        if not self._connections.acquire(blocking=False):
            logger.warning("refused a connection: %s are open", MAX_CONNECTIONS)
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: socket.socket | tuple[bytes, socket.socket], client_address: object) -> None:
        """Runs in the connection's thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: object, client_address: object) -> None:
        """A broken connection is the client's business; one line, no traceback."""
        logger.info("connection ended: %s", client_address, exc_info=logger.isEnabledFor(logging.DEBUG))


class Handler(BaseHTTPRequestHandler):
    """One connection, one request after the other."""

    server: ClickHouseServer
    protocol_version = "HTTP/1.1"
    server_version = "ClickHouse"
    timeout = IDLE_S
    disable_nagle_algorithm = True
    wbufsize = 256 * 1024

    def do_GET(self) -> None:
        """Reads only: a link must not change anything."""
        self._serve(readonly=True)

    def do_POST(self) -> None:
        """Any statement."""
        self._serve(readonly=False)

    def do_HEAD(self) -> None:
        """As GET without the body; for health checks."""
        self._serve(readonly=True)

    def do_OPTIONS(self) -> None:
        """No cross-origin use: 204 without any permission."""
        self.send_response(204)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Requests are logged at debug level only: the sink alone makes five a second."""
        logger.debug(format, *args)

    def _serve(self, *, readonly: bool) -> None:
        self._begun = False
        self._query_id = ""
        self._body = http_body.BodyReader(self.rfile, self.headers, self.server.max_body_bytes, self._continue)
        try:
            self._route(readonly)
        except HttpError as exc:
            self._refuse(exc.status, exc.code, str(exc))
        except http_body.BodyError as exc:
            self.close_connection = True
            self._refuse(exc.status, 307 if exc.status == 413 else 27, f"Code: 27. DB::Exception: {exc} (INCORRECT_DATA)")
        except ch.EngineError as exc:
            self._refuse(_STATUS.get(exc.code, 500), exc.code, exc.text)
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        if not self._body.drain():
            self.close_connection = True

    def _continue(self) -> None:
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.wfile.flush()

    def handle_expect_100(self) -> bool:
        """Deferred until the body is wanted, so that a refused request need not send it."""
        return True

    def _route(self, readonly: bool) -> None:
        url = urlsplit(self.path)
        if url.path in ("/ping", "/replicas_status") or (url.path == "/" and not url.query and readonly):
            self._send_plain(200, b"Ok.\n")
            return
        if url.path not in ("/", "/query"):
            raise HttpError(404, 1, f"There is no handle {url.path[:200]}; use / for queries or /ping for health check")
        arguments = dict(parse_qsl(url.query, keep_blank_values=True, max_num_fields=1000))
        self._check_user(arguments)
        self._query_id = arguments.get("query_id") or self.headers.get("X-ClickHouse-Query-Id") or str(uuid.uuid4())
        if not self.server.queries.acquire(timeout=QUEUE_S):
            raise HttpError(503, ch.TOO_MANY_QUERIES, f"Code: 202. DB::Exception: Too many simultaneous queries. Maximum: {MAX_QUERIES}")
        try:
            self._execute(arguments, readonly)
        finally:
            self.server.queries.release()

    def _check_user(self, arguments: dict[str, str]) -> None:
        user = arguments.get("user", self.headers.get("X-ClickHouse-User"))
        password = arguments.get("password", self.headers.get("X-ClickHouse-Key"))
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "basic":
            try:
                user, _, password = base64.b64decode(token, validate=True).decode().partition(":")
            except ValueError:
                raise HttpError(401, 516, "Code: 516. DB::Exception: Invalid Authorization header. (AUTHENTICATION_FAILED)") from None
        right = hmac.compare_digest((password or "").encode(), self.server.password.encode())
        if (user or "default") not in (self.server.user, "default" if not self.server.password else self.server.user) or not right:
            name = (user or "default")[:100]
            raise HttpError(
                403, 516, f"Code: 516. DB::Exception: {name}: Authentication failed: password is incorrect, or there is no such user."
            )

    def _execute(self, arguments: dict[str, str], readonly: bool) -> None:
        query = arguments.get("query", "").encode()
        content_type = self.headers.get("Content-Type", "")
        if content_type.startswith("multipart/form-data"):
            fields = self._body.form(content_type)
            arguments |= {name: value for name, value in fields.items() if name.startswith("param_") or name == "query"}
            query = arguments.get("query", "").encode()
            chunks: Iterator[bytes] = iter(())
        else:
            chunks = self._body.chunks()
        head, chunks = _statement_head(query, chunks)
        insert = read_insert(head) if first_word(head) == "INSERT" else None
        if insert is not None and not readonly:
            data = chain((head[insert.data_start :],), chunks)
            self._insert(self._request(arguments, insert.sql, insert.format, readonly), (part for part in data if part))
            return
        sql = _gather(head, chunks)
        name = output_format(sql) or arguments.get("default_format") or self.headers.get("X-ClickHouse-Format") or "TabSeparated"
        touched = reads_files(sql)
        if touched is not None:
            raise HttpError(403, ch.NOT_ALLOWED, f"Code: 497. DB::Exception: {touched}: files and programs are off here. (ACCESS_DENIED)")
        try:
            text = sql.decode()
        except UnicodeDecodeError:
            raise HttpError(400, 62, "Code: 62. DB::Exception: the statement is not UTF-8 text. (SYNTAX_ERROR)") from None
        if not text.strip():
            raise HttpError(400, 62, "Code: 62. DB::Exception: Empty query. (SYNTAX_ERROR)")
        self._select(self._request(arguments, text, name, readonly))

    def _request(self, arguments: dict[str, str], sql: str, name: str, readonly: bool) -> ch.Request:
        settings = {key: value for key, value in arguments.items() if key not in _TRANSPORT and not key.startswith("param_")}
        for key in settings:
            if not key.isidentifier():
                raise HttpError(400, 36, f"Code: 36. DB::Exception: {key[:100]!r} is not a setting's name. (BAD_ARGUMENTS)")
        return ch.Request(
            sql=sql,
            format=name,
            database=arguments.get("database") or self.headers.get("X-ClickHouse-Database") or "",
            settings=settings,
            params={key[6:]: value for key, value in arguments.items() if key.startswith("param_")},
            readonly=readonly,
        )

    def _insert(self, request: ch.Request, chunks: Iterator[bytes]) -> None:
        summary = ch.Summary()
        self.server.engine.insert(request, chunks, summary)
        self._start(200, request, summary)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _select(self, request: ch.Request) -> None:
        summary = ch.Summary()
        began = time.perf_counter()
        chunks = self.server.engine.run(request, summary)
        first = next(chunks, b"")
        second = next(chunks, None)  # the status is only sent once the statement is known to work
        wanted = self._wanted_encoding()
        if second is None:
            body = http_body.compress(wanted, first)
            self._start(200, request, summary)
            if wanted:
                self.send_header("Content-Encoding", wanted)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
        else:
            self._send_chunked(request, summary, chain((first, second), chunks), wanted)
        logger.debug("query %s took %.1f ms", self._query_id, (time.perf_counter() - began) * 1e3)

    def _wanted_encoding(self) -> str:
        asked = dict(parse_qsl(urlsplit(self.path).query)).get("enable_http_compression", "0")
        return http_body.choose_encoding(self.headers.get("Accept-Encoding", "")) if asked in ("1", "true") else ""

    def _send_chunked(self, request: ch.Request, summary: ch.Summary, chunks: Iterator[bytes], encoding: str) -> None:
        tag = secrets.token_hex(8)
        failed: list[bool] = []
        self._start(200, request, summary)
        self.send_header("X-ClickHouse-Exception-Tag", tag)
        if encoding:
            self.send_header("Content-Encoding", encoding)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for part in http_body.compressed(encoding, _with_late_error(chunks, tag, failed)):
            self.wfile.write(b"%x\r\n" % len(part))
            self.wfile.write(part)
            self.wfile.write(b"\r\n")
        if failed:
            self.close_connection = True  # and no end marker: a reader that knows no tags must not take the rows for all there are
        else:
            self.wfile.write(b"0\r\n\r\n")

    def _start(self, status: int, request: ch.Request, summary: ch.Summary) -> None:
        self._begun = True
        self.send_response(status)
        self.send_header("Content-Type", _content_type(request.format))
        self.send_header("X-ClickHouse-Server-Display-Name", SERVER_NAME)
        self.send_header("X-ClickHouse-Query-Id", self._query_id)
        self.send_header("X-ClickHouse-Format", request.format)
        self.send_header("X-ClickHouse-Timezone", self.server.engine.timezone)
        self.send_header("X-ClickHouse-Summary", summary.header())

    def _refuse(self, status: int, code: int, text: str) -> None:
        if self._begun:
            self.close_connection = True
            return
        body = (text if text.endswith("\n") else text + "\n").encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=UTF-8")
        self.send_header("X-ClickHouse-Server-Display-Name", SERVER_NAME)
        self.send_header("X-ClickHouse-Exception-Code", str(code))
        if self._query_id:
            self.send_header("X-ClickHouse-Query-Id", self._query_id)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def _send_plain(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=UTF-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _with_late_error(chunks: Iterator[bytes], tag: str, failed: list[bool]) -> Iterator[bytes]:
    """The chunks; an error between them, when it is too late for a status, as ClickHouse's tagged block at the end of the body."""
    try:
        yield from chunks
    except ch.EngineError as exc:
        failed.append(True)
        text = exc.text.encode()
        yield b"__exception__\r\n%b\r\n%b\n%d %b\r\n__exception__\r\n" % (tag.encode(), text, len(text) + 1, tag.encode())


def _statement_head(query: bytes, chunks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """Enough of the statement to know what it is, and the rest of the body.

    A statement in the URL is completed by the body, as in ClickHouse: data of an INSERT, or more text.
    """
    head = query + b"\n" if query else b""
    if first_word(head) == "INSERT" and read_insert(head) is not None:
        return head, chunks
    for chunk in chunks:
        head += chunk
        if len(head) >= HEAD_LIMIT or (first_word(head) == "INSERT" and read_insert(head) is not None):
            break
    return head, chunks


def _gather(head: bytes, chunks: Iterator[bytes]) -> bytes:
    parts, size = [head], len(head)
    for chunk in chunks:
        parts.append(chunk)
        size += len(chunk)
        if size > MAX_SQL_BYTES:
            raise HttpError(413, 307, f"Code: 307. DB::Exception: the statement is longer than {MAX_SQL_BYTES} bytes. (TOO_MANY_BYTES)")
    return b"".join(parts)


def _content_type(name: str) -> str:
    lowered = name.lower()
    if lowered.startswith("json"):
        return "application/x-ndjson; charset=UTF-8" if "eachrow" in lowered else "application/json; charset=UTF-8"
    if lowered.startswith("csv"):
        return "text/csv; charset=UTF-8"
    if lowered.startswith(("tabseparated", "tsv")):
        return "text/tab-separated-values; charset=UTF-8"
    return "text/plain; charset=UTF-8" if lowered.startswith(("pretty", "vertical", "values")) else "application/octet-stream"
