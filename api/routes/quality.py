"""``GET /api/v1/quality/{symbol}``: how good the feeds of a symbol are, what they did wrong lately, and which of its trades are suspect.

A feed is a venue and a source of its trades (a WebSocket, a replay). ``exchange`` and ``source`` narrow; ``start``, ``end`` and ``limit`` say
which scores, of ten seconds each, newest first. With ``session`` it is what the session may see at its virtual now.
"""

from __future__ import annotations

from typing import Final

import msgspec

from api.catalogue import Catalogue
from api.errors import Problem
from api.http import Answer, Scope
from api.params import parse_query
from api.quality import Quality, SuspectFilter, shown
from api.sessions import Sessions
from schemas.errors import SchemaError, nearest
from schemas.symbols import check_symbol
from schemas.timeframes import parse_time_us

_PARAMETERS: Final = ("exchange", "source", "start", "end", "limit", "session")
_DEFAULT_LIMIT: Final = 60
_MAX_LIMIT: Final = 8_640
"""A day."""
_SUSPECTS: Final = 20
_MAX_DIGITS: Final = 9


class QualityRoute:
    """Answers the resource."""

    def __init__(self, quality: Quality, catalogue: Catalogue, sessions: Sessions) -> None:
        self._quality = quality
        self._sessions = sessions
        self._catalogue = catalogue

    async def __call__(self, scope: Scope) -> Answer:
        """The quality of one symbol. Raises Problem, StoreUnavailableError."""
        symbol = scope["path_params"]["symbol"]
        given = parse_query(scope["query_string"], _PARAMETERS)
        exchange, limit = given.get("exchange", ""), _limit(given.get("limit"))
        start_us, end_us = _time("start", given, 0), _time("end", given, 2**62)
        if start_us >= end_us:
            raise Problem("invalid_range", "start is not before end: the range is [start, end), exchange the two.")
        if exchange:
            await self._catalogue.check(exchange, symbol)
        else:
            await self._check(symbol)
        quality = self._quality
        if "session" in given:
            session = await self._sessions.find(given["session"])
            now_us = session.now_us(self._sessions.clock.now_us())
            quality = quality.as_of(session.known_at_us(now_us), now_us)
        feeds = await quality.feeds(
            symbol, exchange=exchange, source=given.get("source", ""), start_us=start_us, end_us=end_us, limit=limit
        )
        suspects = await quality.suspects(SuspectFilter(exchange=exchange, symbol=symbol), limit=_SUSPECTS)
        body = {
            "symbol": symbol,
            "count": len(feeds),
            "feeds": feeds,
            "held_now": await quality.held_now(symbol, exchange),
            "suspects": [shown(suspect) for suspect in suspects],
        }
        return Answer(msgspec.json.encode(body))

    async def _check(self, symbol: str) -> None:
        """Raise Problem ``unknown_symbol`` for one that no exchange has."""
        known = {row["symbol"] for row in await self._catalogue.listed()}
        if symbol in known:
            return
        guess = nearest(symbol, known)
        try:
            check_symbol(symbol)
        except SchemaError as exc:
            raise Problem("unknown_symbol", str(exc), nearest=guess) from None
        hint = f"did you mean '{guess}'?" if guess else "GET /api/v1/symbols lists the known ones."
        raise Problem("unknown_symbol", f"Unknown symbol '{symbol}': {hint}", nearest=guess)


def _limit(text: str | None) -> int:
    if text is None:
        return _DEFAULT_LIMIT
    if text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS and 1 <= int(text) <= _MAX_LIMIT:
        return int(text)
    raise Problem("invalid_limit", f"limit is '{text[:20]}', allowed is 1 to {_MAX_LIMIT:,}.")


def _time(name: str, given: dict[str, str], default: int) -> int:
    if name not in given:
        return default
    try:
        return parse_time_us(given[name][:64])
    except (ValueError, OverflowError) as exc:
        raise Problem("invalid_time", f"'{name}': {exc}") from None
