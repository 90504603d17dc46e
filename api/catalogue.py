"""Which instruments there are: PostgreSQL's list joined with what ClickHouse holds; remembered for a moment, and the nearest known name."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from api import queries
from api.deps import SymbolStore
from api.errors import Problem, StoreUnavailableError
from api.history import History
from api.sessions import Session
from api.sessions_queries import traded_until
from schemas.errors import SchemaError, VocabularyError, nearest
from schemas.seam import Clock
from schemas.symbols import check_exchange, check_symbol

_US: Final = 1_000_000
_MISS_TTL_US: Final = 250_000
"""An unknown name may have begun to trade just now: look again, but at most four times a second whoever asks how often."""


class Catalogue:
    """Instruments by exchange and symbol.

    Args:
        symbols: PostgreSQL.
        history: ClickHouse.
        clock: for the age of what is remembered.
        ttl_s: how long an answer is remembered.
    """

    def __init__(self, symbols: SymbolStore, history: History, clock: Clock, ttl_s: float) -> None:
        self._symbols = symbols
        self._history = history
        self._clock = clock
        self._ttl_us = int(ttl_s * _US)
        self._lock = asyncio.Lock()
        self._known: dict[tuple[str, str], dict[str, Any]] = {}
        self._read_us: int | None = None
        self._whole = False
        """Both stores have answered."""

    async def listed(self) -> list[dict[str, Any]]:
        """Every instrument: exchange, symbol, what PostgreSQL says, first and last trade time (us) and trade count, null without trades.

        Raises StoreUnavailableError when either store does not answer: half a list would look like a whole one.
        """
        async with self._lock:
            if not (self._whole and self._fresh(self._ttl_us)):
                stored = await self._symbols.symbols()
                self._take(stored, await self._traded())
                self._whole = True
        return list(self._known.values())

    async def listed_in(self, session: Session, now_us: int) -> list[dict[str, Any]]:
        """The instruments a session sees trades of at a virtual now, with what it sees of them. Raises as :meth:`listed`."""
        known = {(row["exchange"], row["symbol"]): row for row in await self.listed()}
        answer = await self._history.fetch(traded_until(session, now_us), "JSONEachRow")
        rows = [msgspec.json.decode(line) for line in answer.splitlines()]
        return [known.get((row["exchange"], row["symbol"]), {"active": False}) | row for row in rows]

    async def check(self, exchange: str, symbol: str) -> None:
        """Raise Problem ``unknown_exchange`` or ``unknown_symbol``, with the nearest known one. Needs only one of the stores to answer."""
        try:
            check_exchange(exchange)
        except VocabularyError as exc:
            raise Problem("unknown_exchange", str(exc), nearest=exc.nearest) from None
        if (exchange, symbol) in self._known:
            return
        await self._refresh()
        if (exchange, symbol) in self._known:
            return
        known = [name for venue, name in self._known if venue == exchange]
        guess = nearest(symbol, known)
        try:
            check_symbol(symbol)
        except SchemaError as exc:
            raise Problem("unknown_symbol", str(exc), nearest=guess) from None
        hint = f"did you mean '{guess}'?" if guess else "GET /api/v1/symbols lists the known ones."
        raise Problem("unknown_symbol", f"Unknown symbol '{symbol}' of exchange '{exchange}': {hint}", nearest=guess)

    def _fresh(self, ttl_us: int) -> bool:
        return self._read_us is not None and self._clock.monotonic_us() - self._read_us < ttl_us

    async def _refresh(self) -> None:
        """Read both stores, with whatever one of them knows."""
        async with self._lock:
            if self._fresh(_MISS_TTL_US):
                return
            self._whole = True
            try:
                stored = await self._symbols.symbols()
            except StoreUnavailableError:
                stored, self._whole = [], False
            self._take(stored, await self._traded())

    async def _traded(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for query in (queries.with_bars(), queries.traded()):
            answer = await self._history.fetch(query, "JSONEachRow")
            found += [msgspec.json.decode(line) for line in answer.splitlines()]
        return found

    def _take(self, stored: Any, traded: list[dict[str, Any]]) -> None:
        empty = {"first_trade_time_us": None, "last_trade_time_us": None, "trade_count": 0}
        known: dict[tuple[str, str], dict[str, Any]] = {}
        for row in [*stored, *traded]:
            place = (str(row["exchange"]), str(row["symbol"]))
            known[place] = known.get(place, {"exchange": place[0], "symbol": place[1], "active": False} | empty) | _plain(row)
        self._known = dict(sorted(known.items()))
        self._read_us = self._clock.monotonic_us()


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return dict(row)
