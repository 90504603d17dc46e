"""Errors of the API: raised where a request turns out to be wrong, sent as RFC 9457 ``application/problem+json``.

- Problem                 one HTTP status, one stable ``code``, one sentence that names the culprit and the remedy
    - CursorError         a cursor that is not ours, damaged, of another version or for another series
- StoreUnavailableError   a store (ClickHouse, Kafka, PostgreSQL) does not answer; becomes a 503 problem
- PositionLostError       the topic no longer holds the position a reader wants; the reader starts anew from a snapshot

Codes never change meaning; programs rely on them (``CODES``).
"""

from __future__ import annotations

from typing import Final

import msgspec

PROBLEM_TYPE: Final = "application/problem+json"

CODES: Final[dict[str, tuple[int, str]]] = {
    "unknown_exchange": (404, "Unknown exchange"),
    "unknown_symbol": (404, "Unknown symbol"),
    "unknown_timeframe": (422, "Unknown timeframe"),
    "unknown_channel": (422, "Unknown channel"),
    "unknown_format": (406, "Format not available"),
    "unknown_parameter": (422, "Unknown parameter"),
    "missing_parameter": (422, "Missing parameter"),
    "repeated_parameter": (422, "Repeated parameter"),
    "invalid_time": (422, "Not a time"),
    "invalid_range": (422, "Empty range"),
    "invalid_limit": (422, "Limit out of range"),
    "invalid_cursor": (422, "Broken cursor"),
    "cursor_mismatch": (422, "Cursor of another series"),
    "unknown_session": (404, "Unknown session"),
    "session_ended": (404, "Session ended"),
    "not_found": (404, "Not found"),
    "method_not_allowed": (405, "Method not allowed"),
    "request_too_large": (413, "Request too large"),
    "uri_too_long": (414, "URI too long"),
    "too_many_requests": (503, "Too many requests at once"),
    "clickhouse_unavailable": (503, "ClickHouse unavailable"),
    "kafka_unavailable": (503, "Kafka unavailable"),
    "postgres_unavailable": (503, "PostgreSQL unavailable"),
    "timeout": (504, "Timeout"),
    "internal": (500, "Internal error"),
}
"""Every code with its HTTP status and title."""


class Problem(Exception):
    """A request that cannot be answered; ``code`` is one of ``CODES``, ``detail`` one sentence, ``extra`` further members."""

    def __init__(self, code: str, detail: str, *, retry_after_s: int | None = None, **extra: object) -> None:
        self.code = code
        self.status, self.title = CODES[code]
        self.detail = detail
        self.retry_after_s = retry_after_s
        self.extra = extra
        super().__init__(detail)

    def body(self, instance: str) -> bytes:
        """The JSON document; ``instance`` is the path that was asked for."""
        document: dict[str, object] = {
            "type": f"urn:marketstream:problem:{self.code}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "instance": instance,
            "code": self.code,
        }
        return msgspec.json.encode(document | self.extra)


class CursorError(Problem):
    """A cursor that cannot be used."""


class StoreUnavailableError(Exception):
    """``store`` (``clickhouse``, ``kafka`` or ``postgres``) does not answer; ``reason`` is one sentence."""

    def __init__(self, store: str, reason: str) -> None:
        self.store = store
        self.reason = reason
        super().__init__(reason)

    def problem(self) -> Problem:
        """The 503 problem of it."""
        return Problem(f"{self.store}_unavailable", self.reason, retry_after_s=2)


class PositionLostError(Exception):
    """The topic does not hold ``offset`` of a partition any more (retention) or never did (another topic of that name)."""

    def __init__(self, topic: str, partition: int, offset: int) -> None:
        self.topic = topic
        self.partition = partition
        self.offset = offset
        super().__init__(f"Topic '{topic}' no longer holds offset {offset} of partition {partition}.")
