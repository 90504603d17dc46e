"""Dead letters of the stream processors: one plain row a rejected record or row, with the place it came from."""

from __future__ import annotations

from typing import Any, Final

RAW_LIMIT_BYTES: Final = 1024 * 1024
"""Bytes of the original a dead letter carries; the original stays in its topic at the offset the letter names."""


def dead_letter(
    *,
    reason: str,
    detail: str,
    component: str,
    raw: bytes,
    time_us: int,
    exchange: str = "",
    symbol: str = "",
    topic: str = "",
    partition: int = -1,
    offset: int = -1,
    place: str = "",
    origin: int = -1,
) -> dict[str, Any]:
    """A row of topic ``deadletter`` (``schemas/avro/deadletter.avsc``)."""
    return {
        "reason": reason,
        "detail": detail,
        "component": component,
        "exchange": exchange,
        "symbol": symbol,
        "topic": topic,
        "partition": partition,
        "offset": offset,
        "place": place,
        "time_us": time_us,
        "raw_size": len(raw),
        "raw": raw[:RAW_LIMIT_BYTES],
        "origin": origin,
    }
