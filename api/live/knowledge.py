"""What the live tail asks of history; ``api.history`` answers from ClickHouse, tests from memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from api.live.filters import Shown
from api.live.series import Seed, SeriesKey


class Knowledge(Protocol):
    """Answers about stored rows of one series. Each raises StoreUnavailableError when ClickHouse does not answer."""

    async def seed(self, key: SeriesKey, before: int | None, rows: int) -> Seed:
        """The newest ``rows`` rows of records before offset ``before`` (None: of all that is stored).

        The seed's ``offset`` is ``before``, or less where less is stored: then records from there on must be read to know the rest.
        """
        ...

    async def known(self, key: SeriesKey, keys: Sequence[int], before: int) -> dict[int, Shown]:
        """Those of ``keys`` (trade ids, open times) that records before ``before`` have put into the store, with the rows of the newest revision."""
        ...

    async def after(self, key: SeriesKey, floor_key: int, until_us: int, before: int, limit: int) -> list[tuple[int, str]]:
        """(key, JSON), by key, of at most ``limit`` rows of records before ``before``: key above ``floor_key``, time from ``until_us`` on.

        Of each bar the newest revision among them.
        """
        ...
