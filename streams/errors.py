"""Errors of the stream processors.

- StreamError                 base
  - StateError                a state snapshot cannot be used: damaged, of another release, or of another partition
  - OffsetGapError            the input no longer holds the record that must come next
"""

from __future__ import annotations


class StreamError(Exception):
    """A stream processor cannot go on; the message says what the operator does."""


class StateError(StreamError):
    """A snapshot that cannot be used; an older one is tried, then the partition is rebuilt from its first record."""


class OffsetGapError(StreamError):
    """Records between the state and the next input are gone from the topic."""

    def __init__(self, partition: int, expected: int, found: int) -> None:
        self.partition = partition
        self.expected = expected
        self.found = found
        super().__init__(
            f"Partition {partition} of trades: the state ends at offset {expected - 1}, the topic now begins at {found}:"
            f" {found - expected} records were deleted by retention before they were processed. Replay them from their source."
        )
