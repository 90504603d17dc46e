"""Data quality as people ask for it: a symbol or a filter in; scores of its feeds, or suspect trades with their state, out.

``GET /api/v1/quality/{symbol}``, ``marketstream quality`` and ``marketstream quarantine`` read through here. The weightiest row of a trade in
``quarantine`` is valid (``BY_WEIGHT``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from api.deps import HistoryStore

STATES: Final[dict[int, str]] = {1: "held", 2: "confirmed", 3: "released", 4: "discarded"}
"""What became of a suspect, as in ``quarantine.avsc``: the market confirms, people release and discard."""
REASONS: Final[dict[int, str]] = {1: "price", 2: "time"}
"""Why a trade is held: its price is outside the band, its time far ahead."""
BY_WEIGHT: Final = "state = 1, state = 2, kafka_offset DESC"
"""Order in which the rows of one trade count: what a person decided before what the market confirmed, that before held; of equals the newer
one (rows of a symbol are in one partition). A range that is fetched again is checked again, and its trades are told of as held again."""
ANOMALIES: Final = ("bad_values", "bad_times", "held", "confirmed", "volume_spikes")
_SCORE_COLUMNS: Final = ("score", "checks_passed", "checks_failed", *ANOMALIES, "band_low", "band_high")
_TRADE_COLUMNS: Final = (
    "price",
    "size",
    "side",
    "exchange_time_us",
    "receive_time_us",
    "reason",
    "band_low",
    "band_high",
    "state",
    "source",
)
_SETTINGS: Final = "SETTINGS output_format_json_quote_64bit_integers = 0, output_format_json_quote_denormals = 0"


@dataclass(frozen=True, kw_only=True, slots=True)
class SuspectFilter:
    """Which suspects; empty fields ask for nothing in particular."""

    exchange: str = ""
    symbol: str = ""
    trade_ids: tuple[int, ...] = ()
    reason: str = ""
    """One of ``REASONS``."""
    state: str = ""
    """One of ``STATES``; the trade's valid one."""
    since_us: int = 0
    """Traded at or after this, microseconds UTC."""


class Quality:
    """Reads tables ``quality`` and ``quarantine``. Every method raises StoreUnavailableError when the store does not answer."""

    def __init__(self, store: HistoryStore) -> None:
        self._store = store
        self._as_of: dict[str, int] = {}

    def as_of(self, known_at_us: int, now_us: int) -> Quality:
        """The same without rows that were published after ``known_at_us`` or are about a time after ``now_us``."""
        found = Quality(self._store)
        found._as_of = {"known_at": known_at_us, "now": now_us}
        return found

    async def feeds(
        self, symbol: str = "", *, exchange: str = "", source: str = "", start_us: int = 0, end_us: int = 2**62, limit: int = 60
    ) -> list[dict[str, Any]]:
        """Feeds (exchange, symbol, source) with their newest score and the ``limit`` scores before it, newest first, by name.

        Anomalies are summed over those scores; a band that is not known yet is null.
        """
        where, parameters = self._where({"symbol": symbol, "exchange": exchange, "source": source})
        sql = (
            f"SELECT exchange, symbol, source, exchange_time_us AS time_us, {', '.join(_SCORE_COLUMNS)} FROM quality WHERE {where}"
            " AND exchange_time_us >= {start:Int64} AND exchange_time_us < {end:Int64}"
            " ORDER BY exchange, symbol, source, exchange_time_us DESC, kafka_offset DESC LIMIT {limit:UInt64} BY exchange, symbol, source"
            f" {_SETTINGS}"
        )
        rows = await self._fetch(sql, parameters | {"start": start_us, "end": end_us, "limit": limit})
        feeds: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
        for row in rows:
            key = (row.pop("exchange"), row.pop("symbol"), row.pop("source"))
            for name in ("band_low", "band_high"):
                row[name] = row[name] if row[name] > 0 else None
            feeds.setdefault(key, []).append(row)
        return [_feed(key, history) for key, history in feeds.items()]

    async def suspects(self, wanted: SuspectFilter, *, limit: int) -> list[dict[str, Any]]:
        """Trades that were ever held, each with its valid state, newest trade first."""
        where, parameters = self._where({"exchange": wanted.exchange, "symbol": wanted.symbol})
        if wanted.trade_ids:
            where += " AND trade_id IN {ids:Array(Int64)}"
            parameters["ids"] = list(wanted.trade_ids)
        outer, more = ["1"], dict[str, Any]()
        if wanted.reason:
            outer.append("reason = {reason:Int8}")
            more["reason"] = _code(REASONS, wanted.reason)
        if wanted.state:
            outer.append("state = {state:Int8}")
            more["state"] = _code(STATES, wanted.state)
        if wanted.since_us:
            outer.append("exchange_time_us >= {since:Int64}")
            more["since"] = wanted.since_us
        trade = "exchange, symbol, trade_id"
        valid = f"SELECT * FROM quarantine WHERE {where} ORDER BY {trade}, {BY_WEIGHT} LIMIT 1 BY {trade}"
        sql = (
            f"SELECT exchange, symbol, trade_id, {', '.join(_TRADE_COLUMNS)}, known_at_us FROM ({valid}) WHERE {' AND '.join(outer)}"
            f" ORDER BY exchange_time_us DESC, exchange, symbol, trade_id DESC LIMIT {{limit:UInt64}} {_SETTINGS}"
        )
        return await self._fetch(sql, parameters | more | {"limit": limit})

    async def held_now(self, symbol: str, exchange: str = "") -> dict[str, int]:
        """Trades of a symbol that are held back now, by exchange."""
        where, parameters = self._where({"symbol": symbol, "exchange": exchange})
        sql = (
            f"SELECT exchange, countIf(state = 1) AS held FROM (SELECT exchange, state FROM quarantine WHERE {where}"
            f" ORDER BY exchange, trade_id, {BY_WEIGHT} LIMIT 1 BY exchange, trade_id) GROUP BY exchange {_SETTINGS}"
        )
        return {row["exchange"]: row["held"] for row in await self._fetch(sql, parameters)}

    def _where(self, wanted: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
        where, parameters = _where(wanted)
        if self._as_of:
            where += " AND known_at_us <= {known_at:Int64} AND exchange_time_us <= {now:Int64}"
        return where, parameters | self._as_of

    async def _fetch(self, sql: str, parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
        body = await self._store.fetch(sql, parameters, "JSONEachRow")
        return [msgspec.json.decode(line) for line in body.splitlines()]


def shown(suspect: Mapping[str, Any]) -> dict[str, Any]:
    """A suspect as people see it: words for codes, null for what is not known."""
    found = dict(suspect)
    found["side"] = "buy" if found["side"] > 0 else "sell"
    found["reason"], found["state"] = REASONS.get(found["reason"], str(found["reason"])), STATES.get(found["state"], str(found["state"]))
    for name in ("band_low", "band_high"):
        found[name] = found[name] if found[name] > 0 else None
    return found


def _feed(key: tuple[str, str, str], history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    exchange, symbol, source = key
    newest = history[0]
    return {
        "exchange": exchange,
        "symbol": symbol,
        "source": source,
        "score": newest["score"],
        "time_us": newest["time_us"],
        "band_low": newest["band_low"],
        "band_high": newest["band_high"],
        "checks_passed": sum(row["checks_passed"] for row in history),
        "checks_failed": sum(row["checks_failed"] for row in history),
        "anomalies": {name: sum(row[name] for row in history) for name in ANOMALIES},
        "history": list(history),
    }


def _where(named: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """Conditions for the columns that are asked for, with their parameters."""
    given = {name: value for name, value in named.items() if value}
    return " AND ".join(["1", *(f"{name} = {{{name}:String}}" for name in given)]), dict(given)


def _code(names: Mapping[int, str], name: str) -> int:
    return next(code for code, word in names.items() if word == name)
