"""The same processing without Faust: a confluent-kafka loop that hands records to the runner.

Kept to stay honest: a test runs both over the same topic and compares bytes, and ``make bench`` shows what Faust costs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from streams.runner import BarRunner


class Record(Protocol):
    """One consumed record."""

    def partition(self) -> int:
        """Its partition."""
        ...

    def offset(self) -> int:
        """Its offset."""
        ...

    def value(self) -> bytes:
        """Its bytes."""
        ...


async def run(runner: BarRunner, records: Iterable[Record]) -> None:
    """Process ``records`` in order, then snapshot. The caller polls, seeks to ``applied_offset + 1`` and commits."""
    for record in records:
        await runner.handle(record.partition(), record.offset(), record.value())
    await runner.snapshot(force=True)
