"""What a processor hands to its shell: records to send, in order."""

from __future__ import annotations

from typing import NamedTuple


class OutRecord(NamedTuple):
    """One record to send. Equal inputs give equal records, byte for byte, whatever shell runs the processor."""

    topic: str
    """Topic name without prefix."""
    partition: int
    key: bytes | None
    value: bytes
