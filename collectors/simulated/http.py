"""HTTP/1.1 requests and replies, as far as a simulated exchange needs them: pure, bytes in, bytes out.

No chunked bodies, no continuation lines, no pipelining limits beyond the buffer; sizes are bounded.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import parse_qsl, unquote

from collectors.simulated.errors import HttpSyntaxError

MAX_LINE: Final = 8_192
"""Longest request line. Binance refuses URLs beyond about 8,000 characters, so 1,024 streams must be asked for by SUBSCRIBE."""

MAX_HEAD: Final = 32_768
MAX_BODY: Final = 65_536

_REASONS: Final = {
    101: "Switching Protocols", 200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 405: "Method Not Allowed",
    413: "Content Too Large", 414: "URI Too Long", 418: "I'm a teapot", 426: "Upgrade Required", 429: "Too Many Requests",
    431: "Request Header Fields Too Large", 500: "Internal Server Error", 503: "Service Unavailable",
}  # fmt: skip

_WEBSOCKET_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One request. ``params``: decoded query; ``headers``: names in lower case; ``query``: the query as sent."""

    method: str
    path: str
    query: str = ""
    params: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def upgrades(self) -> bool:
        """True if a WebSocket is asked for."""
        return self.headers.get("upgrade", "").lower() == "websocket"

    @property
    def keep_alive(self) -> bool:
        """False if the client wants the connection closed after the reply."""
        return self.headers.get("connection", "").lower() != "close"


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """One reply; ``body`` is JSON unless ``content_type`` says otherwise; ``delay_s``: how much later it is sent."""

    status: int = 200
    body: str = "{}"
    headers: Mapping[str, str] = field(default_factory=dict)
    content_type: str = "application/json;charset=UTF-8"
    delay_s: float = 0.0

    def encode(self, *, keep_alive: bool) -> bytes:
        """The bytes to send."""
        body = self.body.encode()
        lines = [
            f"HTTP/1.1 {self.status} {_REASONS.get(self.status, 'Unknown')}",
            f"Content-Type: {self.content_type}",
            f"Content-Length: {len(body)}",
            f"Connection: {'keep-alive' if keep_alive else 'close'}",
            *(f"{name}: {value}" for name, value in self.headers.items()),
        ]
        return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def as_json(value: Any, *, status: int = 200) -> Response:
    """A reply of compact JSON."""
    return Response(status=status, body=json.dumps(value, separators=(",", ":")))


def take_request(buffer: bytearray) -> Request | None:
    """The first whole request of ``buffer``, removed from it; None while it is incomplete.

    Raises:
        HttpSyntaxError: what is there can never become a request; the connection is to be closed.
    """
    end = buffer.find(b"\r\n\r\n")
    line_end = buffer.find(b"\r\n")
    if (line_end if line_end >= 0 else len(buffer)) > MAX_LINE:
        raise HttpSyntaxError(f"the request line is longer than {MAX_LINE} bytes", status=414)
    if end < 0:
        if len(buffer) > MAX_HEAD:
            raise HttpSyntaxError(f"the headers are longer than {MAX_HEAD} bytes", status=431)
        return None
    lines = bytes(buffer[:end]).decode("latin-1").split("\r\n")
    parts = lines[0].split(" ")
    if len(parts) != 3 or not parts[2].startswith("HTTP/1."):
        raise HttpSyntaxError("this is no HTTP/1.1 request line")
    headers = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon:
            raise HttpSyntaxError("a header line has no colon")
        headers[name.strip().lower()] = value.strip()
    length = headers.get("content-length", "0")
    if not length.isdecimal() or "transfer-encoding" in headers:
        raise HttpSyntaxError("send the body with a Content-Length")
    if int(length) > MAX_BODY:
        raise HttpSyntaxError(f"the body is longer than {MAX_BODY} bytes", status=413)
    total = end + 4 + int(length)
    if len(buffer) < total:
        return None
    body = bytes(buffer[end + 4 : total])
    del buffer[:total]
    path, _, query = parts[1].partition("?")
    params = dict(parse_qsl(query, keep_blank_values=True))
    return Request(method=parts[0], path=unquote(path), query=query, params=params, headers=headers, body=body)


def websocket_reply(request: Request) -> Response | bytes:
    """The bytes that open a WebSocket, or the refusal."""
    key = request.headers.get("sec-websocket-key", "")
    if request.method != "GET" or len(key) != 24 or request.headers.get("sec-websocket-version") != "13":
        return as_json({"code": -1000, "msg": "not a WebSocket handshake of version 13"}, status=400)
    digest = hashlib.sha1(key.encode("latin-1", "replace") + _WEBSOCKET_GUID, usedforsecurity=False).digest()
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + base64.b64encode(digest) + b"\r\n\r\n"
    )
