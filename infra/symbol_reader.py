"""Where the trades of one symbol lie and what the ledger says of them: ClickHouse in, times and rows out.

Blocking; every method may raise ClickHouseError. Apart from ``infra.repair_reader`` because a command needs just this, not the kernel.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from api.quality import BY_WEIGHT
from processors.coverage import LedgerRow, newest
from schemas.timeframes import MAX_TIME_US, US_PER_SECOND

_HOUR_US: Final = 3_600 * US_PER_SECOND
_LOOK_US: Final = (_HOUR_US, 24 * _HOUR_US, 30 * 24 * _HOUR_US)
"""How far a neighbouring trade is looked for first: the index over times leaves a few granules of an hour, and all of a symbol's of for ever."""
OUT_STATES: Final = (1, 4)
"""Of quarantine: held, discarded. Such trades are not in bars."""
_HELD_BACK: Final = (
    f"SELECT trade_id FROM (SELECT trade_id, state FROM quarantine WHERE {{of}} ORDER BY trade_id, {BY_WEIGHT} LIMIT 1 BY trade_id)"
    f" WHERE state IN {OUT_STATES}"
)
_IN_BARS: Final = f"trade_id NOT IN ({_HELD_BACK})"
_FROM: Final = "exchange_time_us >= {t:Int64} AND exchange_time_us < {far:Int64}"
_TRADES_CHANNEL: Final = 1


class Neighbour(NamedTuple):
    """The trade next to a stretch."""

    trade_id: int
    time_us: int


class SymbolReader:
    """Looks around in one symbol's rows.

    Args:
        client: blocking ``clickhouse-connect`` client in the stack's database.
        exchange, symbol: whose rows.
        known_at_us: only rows published until then, as if nothing had come later; None: all.
    """

    def __init__(self, client: Any, exchange: str, symbol: str, known_at_us: int | None = None) -> None:
        self._client = client
        self._parameters: dict[str, Any] = {"e": exchange, "s": symbol}
        self._of = "exchange = {e:String} AND symbol = {s:String}"
        if known_at_us is not None:
            self._parameters["known"] = known_at_us
            self._of += " AND known_at_us <= {known:Int64}"

    def extent(self) -> tuple[int, int] | None:
        """(first, last) trade time; None without trades. Answered from a projection."""
        rows = self._rows("SELECT min(exchange_time_us), max(exchange_time_us), count() FROM trades WHERE {of}")
        first, last, count = rows[0]
        return (int(first), int(last)) if count else None

    def largest_id(self) -> int:
        """The largest trade id, -1 without trades. Answered from the same projection."""
        largest, count = self._rows("SELECT max(trade_id), count() FROM trades WHERE {of}")[0]
        return int(largest) if count else -1

    def before(self, time_us: int) -> Neighbour | None:
        """The last trade before a time that is not held back."""
        return self._neighbour(f"exchange_time_us < {{t:Int64}} AND exchange_time_us >= {{far:Int64}} AND {_IN_BARS}", "DESC", time_us, -1)

    def after(self, time_us: int) -> Neighbour | None:
        """The first trade at or after a time, held back or not: its id bears witness that none before it is missing."""
        return self._neighbour(_FROM, "", time_us, 1)

    def after_in_bars(self, time_us: int) -> Neighbour | None:
        """The first trade at or after a time that is not held back: so far flat bars carry the price before it on."""
        return self._neighbour(f"{_FROM} AND {_IN_BARS}", "", time_us, 1)

    def ledger(self, start_us: int, end_us: int) -> list[LedgerRow]:
        """Valid rows of the coverage ledger that speak of ``[start_us, end_us)``."""
        columns = "gap_id, start_time_us, end_time_us, state, evidence, first_missing_id, last_missing_id, recovered, receive_time_us"
        rows = self._rows(
            f"SELECT {columns} FROM (SELECT {columns}, kafka_offset FROM gaps WHERE {{of}} AND channel = {_TRADES_CHANNEL}"
            " ORDER BY kafka_offset DESC LIMIT 1 BY gap_id, if(gap_id < 0, kafka_offset, 0))"
            " WHERE start_time_us < {b:Int64} AND (end_time_us >= {a:Int64} OR end_time_us < start_time_us) ORDER BY kafka_offset",
            a=start_us,
            b=end_us,
        )
        return newest(LedgerRow(*(int(value) for value in row)) for row in rows)

    def _neighbour(self, where: str, direction: str, time_us: int, sign: int) -> Neighbour | None:
        for far in (*_LOOK_US, MAX_TIME_US):
            rows = self._rows(
                f"SELECT trade_id, exchange_time_us FROM trades WHERE {{of}} AND {where}"
                f" ORDER BY exchange_time_us {direction}, trade_id {direction} LIMIT 1",
                t=time_us,
                far=time_us + sign * far,
            )
            if rows:
                return Neighbour(int(rows[0][0]), int(rows[0][1]))
        return None

    def _rows(self, sql: str, **parameters: Any) -> Any:
        return self._client.query(sql.replace("{of}", self._of), parameters={**self._parameters, **parameters}).result_rows
