"""The OpenAPI document: made from the row types, the parameters and the codes, once, as bytes."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import msgspec

from api.coverage import CHANNELS
from api.deps import ApiLimits
from api.errors import CODES, PROBLEM_TYPE
from api.letters import STATES
from api.params import DEFAULT_TIMEFRAME, MEDIA_TYPES
from api.rows import BarRow, TradeRow
from schemas.timeframes import TIMEFRAMES


class BarsPage(msgspec.Struct):
    """Bars, oldest first, newest revision of each."""

    exchange: str
    symbol: str
    timeframe: str
    count: int
    next: str | None
    live: str | None
    bars: list[BarRow]
    known_at_us: int | msgspec.UnsetType = msgspec.UNSET
    session: str | msgspec.UnsetType = msgspec.UNSET
    now_us: int | msgspec.UnsetType = msgspec.UNSET


class TradesPage(msgspec.Struct):
    """Trades by id."""

    exchange: str
    symbol: str
    count: int
    next: str | None
    live: str | None
    trades: list[TradeRow]
    known_at_us: int | msgspec.UnsetType = msgspec.UNSET
    session: str | msgspec.UnsetType = msgspec.UNSET
    now_us: int | msgspec.UnsetType = msgspec.UNSET


class Symbol(msgspec.Struct):
    """One instrument; the times are null and the count 0 where nothing has traded yet."""

    exchange: str
    symbol: str
    active: bool
    first_trade_time_us: int | None
    last_trade_time_us: int | None
    trade_count: int


class SymbolsList(msgspec.Struct):
    """Every instrument."""

    count: int
    symbols: list[Symbol]


class DeadLetter(msgspec.Struct):
    """What could not be processed; the id is its offset in topic `deadletter`. A single letter comes with its bytes."""

    id: int
    reason: str
    detail: str
    component: str
    exchange: str
    symbol: str
    topic: str
    partition: int
    offset: int
    place: str
    time_us: int
    known_at_us: int
    raw_size: int
    origin: int
    state: str
    decided_by: str
    decided_at: str
    outcome: str
    new_letter: int | None
    raw_base64: str | msgspec.UnsetType = msgspec.UNSET
    raw_text: str | msgspec.UnsetType = msgspec.UNSET


class DeadLettersPage(msgspec.Struct):
    """Dead letters, newest first; `next` is the `before` of the next page."""

    count: int
    next: int | None
    letters: list[DeadLetter]


class ProblemDocument(msgspec.Struct):
    """RFC 9457; `code` is stable, `detail` names the culprit and the remedy."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str


_TIME: Final = "ISO 8601 (without a zone: UTC) or a number of seconds, milliseconds, microseconds or nanoseconds since 1970"


@cache
def document(version: str) -> bytes:
    """The OpenAPI 3.1 document."""
    schemas, components = msgspec.json.schema_components(
        [BarsPage, TradesPage, SymbolsList, DeadLettersPage, DeadLetter, ProblemDocument], ref_template="#/components/schemas/{name}"
    )
    bars, trades, symbols, letters, letter, problem = schemas
    timeframe = _query("timeframe", "Length of the bars.", {"type": "string", "enum": list(TIMEFRAMES), "default": DEFAULT_TIMEFRAME})
    paths = {
        "/api/v1/symbols": _get(
            "symbols",
            "Known instruments",
            [_query("exchange", "Only this exchange.", {"type": "string"}), _session()],
            {"200": _response("The list.", {"application/json": {"schema": symbols}})} | _errors(problem, ("unknown_parameter",)),
        ),
        "/api/v1/bars/{exchange}/{symbol}": _get(
            "bars", "Bars of one instrument", [*_series(), timeframe, *_range()], _page(bars, problem)
        ),
        "/api/v1/trades/{exchange}/{symbol}": _get("trades", "Trades of one instrument", [*_series(), *_range()], _page(trades, problem)),
        "/api/v1/quality/{symbol}": _get(
            "quality",
            "How good the feeds of a symbol are, and which of its trades are suspect",
            [
                _series()[1],
                _query("exchange", "Only this exchange.", {"type": "string"}),
                _query("source", "Only this source of its trades, e.g. binance/ws.", {"type": "string"}),
                *_range()[:2],
                _session(),
                _query(
                    "limit", "Scores of each feed, of ten seconds each.", {"type": "integer", "minimum": 1, "maximum": 8_640, "default": 60}
                ),
            ],
            {"200": _response("Feeds with scores, anomalies and bands; suspects.", {"application/json": {"schema": {"type": "object"}}})}
            | _errors(
                problem, ("unknown_exchange", "unknown_symbol", "unknown_parameter", "invalid_limit", "invalid_time", "invalid_range")
            ),
        ),
        "/api/v1/coverage": _get(
            "coverage",
            "What of each feed was collected over a time, and what is missing",
            [
                _query("exchange", "Only this exchange.", {"type": "string"}),
                _query("symbol", "Only this symbol of the exchange.", {"type": "string"}),
                _query("channel", "What was collected.", {"type": "string", "enum": list(CHANNELS), "default": "trades"}),
                _query("start", f"First time, inclusive: {_TIME}. By default 24 hours before the end.", {"type": "string"}),
                _query("end", "Last time, exclusive, written alike. By default now.", {"type": "string"}),
                _session(),
            ],
            {
                "200": _response(
                    "Per feed: intervals complete, filled, open, unfillable or unknown with their evidence, shares, and gaps.",
                    {"application/json": {"schema": {"type": "object"}}},
                )
            }
            | _errors(
                problem,
                (
                    "unknown_exchange",
                    "unknown_symbol",
                    "unknown_channel",
                    "unknown_parameter",
                    "missing_parameter",
                    "invalid_time",
                    "invalid_range",
                ),
            ),
        ),
        "/api/v1/deadletters": _get(
            "deadletters",
            "What could not be processed, and what became of it",
            [
                *(_query(name, f"Only of this {name}.", {"type": "string"}) for name in ("reason", "exchange", "symbol", "component")),
                _query("since", f"Published since: {_TIME}.", {"type": "string"}),
                _query("state", "Only of this state.", {"type": "string", "enum": list(STATES)}),
                _query("limit", "Letters of a page.", {"type": "integer", "minimum": 1, "maximum": 1_000, "default": 100}),
                _query("before", "`next` of the page before.", {"type": "integer", "minimum": 0}),
            ],
            {"200": _response("A page, newest first.", {"application/json": {"schema": letters}})}
            | _errors(problem, ("unknown_parameter", "repeated_parameter", "invalid_time", "invalid_limit", "invalid_cursor")),
        ),
        "/api/v1/deadletters/{id}": _get(
            "deadletter",
            "One dead letter with its bytes",
            [{"name": "id", "in": "path", "description": "Of a letter.", "required": True, "schema": {"type": "integer"}}],
            {"200": _response("The letter.", {"application/json": {"schema": letter}})} | _errors(problem, ("not_found",)),
        ),
        "/livez": _get(
            "livez",
            "The process lives and gets on",
            [],
            {
                code: _response(text, {"application/json": {"schema": {"type": "object"}}})
                for code, text in {"200": "It does.", "503": "It should be started anew; the reason says why."}.items()
            },
        ),
        "/progress": _get(
            "progress",
            "How far the live tail is",
            [],
            {"200": _response("Counters, what waits, and who is in the way.", {"application/json": {"schema": {"type": "object"}}})},
        ),
        "/readyz": _get(
            "readyz",
            "Every dependency answers",
            [],
            {code: _response(text, {"application/json": {"schema": {"type": "object"}}}) for code, text in _READY.items()},
        ),
    }
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": "Marketstream", "version": version, "description": _ABOUT},
            "paths": paths,
            "components": {"schemas": components},
        }
    )


_READY: Final = {"200": "Ready.", "503": "Not ready; the body says what and why."}
_ABOUT: Final = (
    "Market data history and live stream. Times are microseconds since 1970 UTC, ranges are [start, end). "
    "Every history answer carries a `live` cursor: subscribing on the WebSocket `/api/v1/stream` with `from` that cursor continues "
    "after the last row, nothing missed or repeated. With `known_at` the answer is what was known then, and there is no `live` cursor. "
    "With `session` (made by `marketstream replay --as-of`) it is what the session may see at its virtual now, and `live` is a cursor of that session."
)


def _get(name: str, summary: str, parameters: list[dict[str, Any]], responses: dict[str, Any]) -> dict[str, Any]:
    return {"get": {"operationId": name, "summary": summary, "parameters": parameters, "responses": responses}}


def _response(text: str, content: dict[str, Any], headers: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"description": text, "content": content} | ({"headers": headers} if headers else {})


def _query(name: str, text: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "query", "description": text, "required": False, "schema": schema}


def _series() -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "path", "description": text, "required": True, "schema": {"type": "string"}}
        for name, text in (("exchange", "As in binance."), ("symbol", "Canonical, as in BTC-USDT."))
    ]


def _session() -> dict[str, Any]:
    return _query("session", "Id of a session of the time machine: answer as of its virtual now.", {"type": "string"})


def _range() -> list[dict[str, Any]]:
    limits = ApiLimits()
    limit = {"type": "integer", "minimum": 1, "maximum": limits.max_limit_bulk, "default": limits.default_limit}
    return [
        _query("start", f"First time, inclusive: {_TIME}. Without it the newest rows of the range are given.", {"type": "string"}),
        _query("end", "Last time, exclusive, written alike. Without it the range runs to the present.", {"type": "string"}),
        _query(
            "known_at",
            "Answer with what was known at this time, written alike: later trades and revisions are left out.",
            {"type": "string"},
        ),
        _session(),
        _query("limit", f"Rows of a page: up to {limits.max_limit_json} as JSON, {limits.max_limit_bulk} as Arrow or CSV.", limit),
        _query("cursor", "`next` of the page before; it holds the range.", {"type": "string"}),
        _query("format", "Wins over the Accept header.", {"type": "string", "enum": list(MEDIA_TYPES)}),
    ]


def _page(schema: Any, problem: Any) -> dict[str, Any]:
    content = {
        MEDIA_TYPES["json"]: {"schema": schema},
        MEDIA_TYPES["arrow"]: {"schema": {"type": "string", "contentMediaType": MEDIA_TYPES["arrow"]}},
        "text/csv": {"schema": {"type": "string"}},
    }
    headers = {
        "X-Live-Cursor": {"description": "Continues the page on the stream.", "schema": {"type": "string"}},
        "X-Next-Cursor": {"description": "The next page.", "schema": {"type": "string"}},
        "Link": {"description": 'The next page as a URL, rel="next".', "schema": {"type": "string"}},
    }
    return {"200": _response("A page, oldest row first.", content, headers)} | _errors(problem, tuple(CODES))


def _errors(problem: Any, codes: tuple[str, ...]) -> dict[str, Any]:
    by_status: dict[int, list[str]] = {}
    for code in codes:
        by_status.setdefault(CODES[code][0], []).append(code)
    return {
        str(status): _response(f"code: {', '.join(names)}", {PROBLEM_TYPE: {"schema": problem}})
        for status, names in sorted(by_status.items())
    }
