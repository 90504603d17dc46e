"""Errors of the stream processors.

- StreamError                 base
  - StateError                a state snapshot cannot be used: damaged, of another release, or of another partition
"""

from __future__ import annotations


class StreamError(Exception):
    """A stream processor cannot go on; the message says what the operator does."""


class StateError(StreamError):
    """A snapshot that cannot be used; an older one is tried, then the partition is rebuilt from its first record."""
