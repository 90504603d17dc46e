"""What the API asks the coverage ledger: which feeds, which time; and who answers. The algebra of intervals is the answerer's business."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Protocol

CHANNELS: Final = {"trades": 1, "quotes": 2, "funding": 3, "open_interest": 4}
"""Channels of the ledger and their codes in ``gaps.avsc``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CoverageQuery:
    """Which feeds over which time; an empty exchange or symbol asks for all."""

    start_us: int
    end_us: int
    exchange: str = ""
    symbol: str = ""
    channel: str = "trades"
    known_at_us: int | None = None
    """The ledger as it was known then; None: as it is known now."""


class CoverageReader(Protocol):
    """Answers."""

    async def read(self, wanted: CoverageQuery) -> list[dict[str, Any]]:
        """One entry a feed, by exchange and symbol.

        Each has exchange, symbol, channel, ``covered`` (share of the time that is complete or filled, 0..1), ``shares`` by state,
        ``intervals`` that fill the range (start_us, end_us, state, evidence) and ``gaps`` (open, filled, unfillable) by start.
        A feed that is asked for by name and has no ledger is ``unknown`` throughout.

        Raises StoreUnavailableError; TooMuchError when the range holds more than one answer may.
        """
        ...


class TooMuchError(Exception):
    """The range holds more intervals than one answer may; the message says the limit."""


class NoCoverage:
    """No ledger is kept: nobody watched."""

    async def read(self, wanted: CoverageQuery) -> list[dict[str, Any]]:
        """See CoverageReader.read."""
        return []
