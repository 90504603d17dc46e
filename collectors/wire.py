"""What passes between the parts of a collector: parsed messages, frames on their way out, rejected bytes; and who takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np

from schemas.frames import Frame

Array = np.ndarray[Any, Any]

TRADE_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "symbol_code": np.dtype("<i4"),
    "trade_id": np.dtype("<i8"),
    "price": np.dtype("<f8"),
    "size": np.dtype("<f8"),
    "side": np.dtype("i1"),
    "exchange_time_us": np.dtype("<i8"),
    "receive_time_us": np.dtype("<i8"),
}
"""Columns of a frame of trades; a test holds them against ``schemas/avro/trades.avsc``."""

MAX_DEADLETTER_BYTES: Final = 1024 * 1024
"""A dead letter keeps the first MiB of what was rejected."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """One message that gave no row and should have."""

    index: int
    """Its place in the batch."""
    reason: str
    """Stable code: malformed_message, unknown_message, unknown_stream, impossible_value."""
    detail: str
    """One sentence."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The venue's answer to one of our requests."""

    request_id: int | str | None
    error: str = ""
    """Empty: accepted."""


@dataclass(slots=True)
class Parsed:
    """Everything a batch of messages held."""

    columns: dict[str, Array]
    """TRADE_DTYPES without ``receive_time_us``; all arrays of one length."""
    message_index: Array
    """int32, row -> place of its message in the batch."""
    replies: list[Reply] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    ignored: int = 0
    """Valid messages that are no trades of the market."""

    @property
    def row_count(self) -> int:
        """Number of trades."""
        return len(self.message_index)


class Mapper(Protocol):
    """Venue bytes to rows. Pure; never raises on what the venue sends."""

    def parse(self, messages: Sequence[bytes]) -> Parsed:
        """Everything in ``messages``, in order."""
        ...

    def bind(self, stream: str, code: int) -> None:
        """From now on messages of ``stream`` are rows of symbol ``code``."""
        ...


class FrameSink(Protocol):
    """Takes frames towards a topic."""

    async def send(self, topic_name: str, partition: int, frame: Frame) -> None:
        """Queue a frame; returns when it is queued, waits while the queue is full. Order per partition is kept."""
        ...

    async def wait_acknowledged(self) -> None:
        """Wait until everything queued before this call survives the end of this process, while others go on sending."""
        ...


class DeadLetters(Protocol):
    """Takes what could not be processed. Must not block; counts what it cannot take."""

    def put(self, *, reason: str, detail: str, exchange: str, symbol: str, place: str, time_us: int, raw: bytes, raw_size: int) -> None:
        """Keep one rejected message with its bytes (at most MAX_DEADLETTER_BYTES of them)."""
        ...
