"""Reads the coverage ledger: a question about feeds and a time in; intervals, shares and gaps from ClickHouse's table ``gaps`` out.

The API's ``GET /api/v1/coverage``, `marketstream coverage` and its report all read through here.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from api.coverage import CHANNELS, CoverageQuery, TooMuchError
from api.deps import HistoryStore
from processors.coverage import EVIDENCE_NAMES, STATE_NAMES, LedgerRow, gaps_within, shares, timeline

MAX_ROWS: Final = 200_000
"""Rows of one answer at most: 60 MB of JSON."""
_INTERVAL_US: Final = 2 * 86_400_000_000
"""Complete intervals begin anew every day: those that began two days before a range do not reach into it."""
_COLUMNS: Final = (
    "gap_id",
    "start_time_us",
    "end_time_us",
    "state",
    "evidence",
    "first_missing_id",
    "last_missing_id",
    "recovered",
    "receive_time_us",
)


class LedgerReader:
    """`api.coverage.CoverageReader` over a history store."""

    def __init__(self, store: HistoryStore) -> None:
        self._store = store

    async def read(self, wanted: CoverageQuery) -> list[dict[str, Any]]:
        """See CoverageReader.read."""
        found = await self.rows(wanted)
        if wanted.symbol and not found:
            found[wanted.exchange, wanted.symbol] = []
        return [feed(exchange, symbol, wanted, rows) for (exchange, symbol), rows in sorted(found.items())]

    async def rows(self, wanted: CoverageQuery) -> dict[tuple[str, str], list[LedgerRow]]:
        """The valid rows that touch the range, by (exchange, symbol). Raises StoreUnavailableError, TooMuchError."""
        sql, parameters = ledger_query(wanted)
        answer = await self._store.fetch(sql, parameters, "JSONCompactEachRow")
        found: dict[tuple[str, str], list[LedgerRow]] = {}
        lines = answer.splitlines()
        if len(lines) > MAX_ROWS:
            raise TooMuchError(f"The range holds more than {MAX_ROWS:,} intervals: narrow it by symbol, or ask for less time.")
        for line in lines:
            exchange, symbol, *values = msgspec.json.decode(line)
            found.setdefault((exchange, symbol), []).append(LedgerRow(*values))
        return found


def ledger_query(wanted: CoverageQuery) -> tuple[str, dict[str, Any]]:
    """SQL and parameters of the valid rows of feeds that touch a range; rows without an id each count."""
    where = ["channel = {channel:Int8}", "(evidence != 0 OR start_time_us >= {since:Int64})"]
    parameters: dict[str, Any] = {
        "channel": CHANNELS[wanted.channel],
        "start": wanted.start_us,
        "end": wanted.end_us,
        "since": wanted.start_us - _INTERVAL_US,
        "limit": MAX_ROWS + 1,
    }
    for name in ("exchange", "symbol"):
        value = getattr(wanted, name)
        if value:
            where.append(f"{name} = {{{name}:String}}")
            parameters[name] = value
    if wanted.known_at_us is not None:
        where.append("known_at_us <= {known_at:Int64}")
        parameters["known_at"] = wanted.known_at_us
    nameless = "if(gap_id < 0, (start_time_us, end_time_us, first_missing_id), (0, 0, 0))"
    newest = (
        f"SELECT * FROM gaps WHERE {' AND '.join(where)} ORDER BY exchange, symbol, kafka_offset DESC"
        f" LIMIT 1 BY exchange, symbol, gap_id, {nameless}"
    )
    sql = (
        f"SELECT exchange, symbol, {', '.join(_COLUMNS)} FROM ({newest})"
        # after the choice: what is left of a gap may begin behind the range, and then the row before it is no longer valid
        " WHERE start_time_us < {end:Int64} AND (end_time_us >= {start:Int64} OR (end_time_us < start_time_us AND state != 0))"
        " ORDER BY exchange, symbol, kafka_offset LIMIT {limit:UInt64}"
        " SETTINGS output_format_json_quote_64bit_integers = 0"
    )
    return sql, parameters


def feed(exchange: str, symbol: str, wanted: CoverageQuery, rows: list[LedgerRow]) -> dict[str, Any]:
    """What of one feed was collected, as JSON-able values."""
    intervals = timeline(rows, wanted.start_us, wanted.end_us)
    found = {name: round(share, 9) for name, share in shares(intervals).items()}
    return {
        "exchange": exchange,
        "symbol": symbol,
        "channel": wanted.channel,
        "covered": found.pop("covered"),
        "shares": found,
        "intervals": [
            {
                "start_us": interval.start_us,
                "end_us": interval.end_us,
                "state": interval.state_name,
                "evidence": [EVIDENCE_NAMES.get(code, str(code)) for code in interval.evidence],
            }
            for interval in intervals
        ],
        "gaps": [_gap(row) for row in gaps_within(rows, wanted.start_us, wanted.end_us)],
    }


def _gap(row: LedgerRow) -> dict[str, Any]:
    known = row.first_missing_id >= 0
    return {
        "gap_id": row.gap_id,
        "state": STATE_NAMES[row.state],
        "evidence": EVIDENCE_NAMES.get(row.evidence, str(row.evidence)),
        "start_us": row.start_time_us,
        "end_us": row.end_time_us if row.end_time_us >= row.start_time_us else None,
        "first_id": row.first_missing_id if known else None,
        "last_id": row.last_missing_id if known else None,
        "ids": row.last_missing_id - row.first_missing_id + 1 if known else None,
        "recovered": row.recovered,
        "written_us": row.receive_time_us,
    }
