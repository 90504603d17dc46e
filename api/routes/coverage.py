"""``GET /api/v1/coverage``: what of each feed was collected over a time, and what is missing.

``exchange`` and ``symbol`` narrow; ``channel`` is ``trades`` unless said otherwise. Without ``start`` and ``end`` it is the last 24 hours.
With ``session`` it is the ledger as the session knows it, up to its virtual now.
"""

from __future__ import annotations

from typing import Final

import msgspec

from api.catalogue import Catalogue
from api.coverage import CHANNELS, CoverageQuery, CoverageReader, TooMuchError
from api.errors import Problem
from api.http import Answer, Scope
from api.params import parse_query
from api.sessions import Sessions
from schemas.errors import VocabularyError, nearest
from schemas.symbols import check_exchange
from schemas.timeframes import format_time_us, parse_time_us

_PARAMETERS: Final = ("exchange", "symbol", "channel", "start", "end", "session")
_DEFAULT_RANGE_US: Final = 86_400_000_000


class CoverageRoute:
    """Answers the resource."""

    def __init__(self, reader: CoverageReader, catalogue: Catalogue, sessions: Sessions) -> None:
        self._reader = reader
        self._catalogue = catalogue
        self._sessions = sessions

    async def __call__(self, scope: Scope) -> Answer:
        """Coverage of the feeds asked for. Raises Problem, StoreUnavailableError."""
        given = parse_query(scope["query_string"], _PARAMETERS)
        channel = given.get("channel", "trades")
        if channel not in CHANNELS:
            guess = nearest(channel, CHANNELS)
            hint = f"did you mean '{guess}'?" if guess else f"known are: {', '.join(CHANNELS)}."
            raise Problem("unknown_channel", f"Unknown channel '{channel[:40]}': {hint}", nearest=guess)
        exchange, symbol = given.get("exchange", ""), given.get("symbol", "")
        await self._check(exchange, symbol)
        now_us, known_at_us = self._sessions.clock.now_us(), None
        if "session" in given:
            session = await self._sessions.find(given["session"])
            now_us = session.now_us(now_us)
            known_at_us = session.known_at_us(now_us)
        end_us = _time("end", given, now_us)
        if known_at_us is not None:
            end_us = min(end_us, now_us)
        start_us = _time("start", given, end_us - _DEFAULT_RANGE_US)
        if start_us >= end_us:
            raise Problem(
                "invalid_range",
                f"start {format_time_us(start_us)} is not before end {format_time_us(end_us)}: the range is [start, end), exchange the two.",
            )
        wanted = CoverageQuery(start_us=start_us, end_us=end_us, exchange=exchange, symbol=symbol, channel=channel, known_at_us=known_at_us)
        try:
            feeds = await self._reader.read(wanted)
        except TooMuchError as exc:
            raise Problem("invalid_range", str(exc)) from None
        body = {"channel": channel, "start_us": start_us, "end_us": end_us, "count": len(feeds), "feeds": feeds}
        return Answer(msgspec.json.encode(body))

    async def _check(self, exchange: str, symbol: str) -> None:
        if symbol and not exchange:
            raise Problem("missing_parameter", "symbol is given without exchange: add exchange=, the same symbol trades on several.")
        if symbol:
            await self._catalogue.check(exchange, symbol)
        elif exchange:
            try:
                check_exchange(exchange)
            except VocabularyError as exc:
                raise Problem("unknown_exchange", str(exc), nearest=exc.nearest) from None


def _time(name: str, given: dict[str, str], default: int) -> int:
    if name not in given:
        return default
    try:
        return parse_time_us(given[name][:64])
    except (ValueError, OverflowError) as exc:
        raise Problem("invalid_time", f"'{name}': {exc}") from None
