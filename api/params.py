"""Query strings in, checked requests out. Written by hand: it costs 10 us, and every refusal is one sentence that names the culprit."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl

from api.cursors import MAX_CURSOR_CHARS, PageCursor, decode_page, series_code
from api.deps import ApiLimits
from api.errors import CursorError, Problem
from api.live.series import SeriesKey
from schemas.errors import VocabularyError, nearest
from schemas.timeframes import MAX_TIME_US, MIN_TIME_US, format_time_us, parse_time_us, timeframe_seconds

DEFAULT_TIMEFRAME: Final = "1m"
MEDIA_TYPES: Final = {
    "json": "application/json",
    "arrow": "application/vnd.apache.arrow.stream",
    "csv": "text/csv; charset=utf-8",
}
_ACCEPTED: Final = {
    "application/json": "json",
    "application/*": "json",
    "*/*": "json",
    "application/vnd.apache.arrow.stream": "arrow",
    "text/csv": "csv",
    "text/*": "csv",
}
_ALLOWED: Final = ("start", "end", "known_at", "session", "limit", "cursor", "format")
# the '+' of a time zone, not escaped in the URL, arrives as a space
_LOST_PLUS: Final = re.compile(r"(?<=:\d\d) (\d\d:?\d\d)$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """A checked request for history."""

    key: SeriesKey
    start_us: int
    end_us: int
    open_start: bool
    """No start was given: the newest rows are wanted."""
    open_end: bool
    """No end was given: the answer runs to the present."""
    limit: int
    format: str
    cursor: PageCursor | None
    known_at_us: int | None = None
    """The answer is what was known then; None: what is known now."""
    session: str | None = None
    """Id of a session of the time machine, whose virtual now bounds the answer."""


def parse_range(channel: str, exchange: str, symbol: str, query: bytes, accept: str, limits: ApiLimits) -> Range:
    """What a history request asks for. Raises Problem."""
    given = parse_query(query, ("timeframe", *_ALLOWED) if channel == "bars" else _ALLOWED)
    timeframe_s = _timeframe(given.get("timeframe", DEFAULT_TIMEFRAME)) if channel == "bars" else 0
    key = SeriesKey(channel, exchange, symbol, timeframe_s)
    wanted = negotiate(given.get("format"), accept)
    limit = _limit(given.get("limit"), limits, wanted)
    if "cursor" in given:
        return _continued(key, given, limit, wanted)
    if "session" in given and "known_at" in given:
        raise Problem("invalid_range", "'known_at' is given beside a session, which says itself what was known: leave one of them out.")
    start_us, end_us = _time("start", given.get("start")), _time("end", given.get("end"))
    if start_us is not None and end_us is not None and start_us >= end_us:
        raise Problem(
            "invalid_range",
            f"start {format_time_us(start_us)} is not before end {format_time_us(end_us)}: the range is [start, end), exchange the two.",
        )
    return Range(
        key=key,
        start_us=MIN_TIME_US if start_us is None else start_us,
        end_us=MAX_TIME_US if end_us is None else end_us,
        open_start=start_us is None,
        open_end=end_us is None,
        limit=limit,
        format=wanted,
        cursor=None,
        known_at_us=_time("known_at", given.get("known_at")),
        session=given.get("session"),
    )


def parse_query(query: bytes, allowed: Collection[str]) -> dict[str, str]:
    """Parameters by name. Raises Problem for one that is not ``allowed`` or given twice."""
    found: dict[str, str] = {}
    try:
        pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, max_num_fields=32, errors="strict")
    except ValueError:
        raise Problem("unknown_parameter", "The query string is not UTF-8 or has more than 32 parameters: write name=value&...") from None
    for name, value in pairs:
        if name not in allowed:
            guess = nearest(name, allowed)
            hint = f"did you mean '{guess}'?" if guess else f"known are: {', '.join(allowed)}."
            raise Problem("unknown_parameter", f"Unknown parameter '{name[:60]}': {hint}", nearest=guess)
        if name in found:
            raise Problem("repeated_parameter", f"Parameter '{name}' is given twice: give it once.")
        found[name] = value
    return found


def negotiate(chosen: str | None, accept: str) -> str:
    """``json``, ``arrow`` or ``csv``: ``format=`` wins over the Accept header. Raises Problem ``unknown_format``."""
    if chosen is not None:
        if chosen not in MEDIA_TYPES:
            guess = nearest(chosen, MEDIA_TYPES)
            hint = f"did you mean '{guess}'?" if guess else "use json, arrow or csv."
            raise Problem("unknown_format", f"Unknown format '{chosen[:40]}': {hint}", nearest=guess)
        return chosen
    if accept in ("", "*/*", "application/json"):
        return "json"
    best, best_quality = "", 0.0
    for part in accept.split(","):
        name, *options = part.strip().split(";")
        quality = _quality(options)
        found = _ACCEPTED.get(name.strip().lower())
        if found and quality > best_quality:
            best, best_quality = found, quality
    if not best:
        raise Problem("unknown_format", f"Nothing in 'Accept: {accept[:80]}' is available: ask for {', '.join(MEDIA_TYPES.values())}.")
    return best


def _quality(options: list[str]) -> float:
    for option in options:
        name, _, value = option.strip().partition("=")
        if name == "q":
            try:
                return min(max(float(value), 0.0), 1.0)
            except ValueError:
                return 0.0
    return 1.0


def _continued(key: SeriesKey, given: Mapping[str, str], limit: int, wanted: str) -> Range:
    """The next page a cursor names."""
    both = [name for name in ("start", "end", "known_at") if name in given]
    if both:
        raise Problem("invalid_cursor", f"'{both[0]}' is given beside a cursor, which holds it already: leave it out.")
    text = given["cursor"]
    if len(text) > MAX_CURSOR_CHARS or not text:
        raise CursorError("invalid_cursor", "The cursor is empty or too long: use one as it was given, or start without.")
    cursor = decode_page(text)
    if cursor.series != series_code(key.channel, key.exchange, key.symbol, key.timeframe_s):
        raise CursorError("cursor_mismatch", f"The cursor belongs to another series than {key.fields}: start without a cursor.")
    return Range(
        key=key,
        start_us=cursor.start_us,
        end_us=cursor.end_us,
        open_start=cursor.backward,
        open_end=cursor.open_end or cursor.end_us == MAX_TIME_US,
        limit=limit,
        format=wanted,
        cursor=cursor,
        known_at_us=cursor.known_at_us,
        session=given.get("session"),
    )


def _timeframe(name: str) -> int:
    try:
        return timeframe_seconds(name)
    except VocabularyError as exc:
        raise Problem("unknown_timeframe", str(exc), nearest=exc.nearest) from None


def _time(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    if len(text) > 64:
        raise Problem("invalid_time", f"'{name}' is no time: it has {len(text)} characters.")
    try:
        return parse_time_us(_LOST_PLUS.sub(r"+\1", text))
    except (ValueError, OverflowError) as exc:
        raise Problem("invalid_time", f"'{name}': {exc}") from None


def _limit(text: str | None, limits: ApiLimits, wanted: str) -> int:
    if text is None:
        return limits.default_limit
    most = limits.max_limit_json if wanted == "json" else limits.max_limit_bulk
    if text.isascii() and text.isdigit() and len(text) <= 9 and 1 <= int(text) <= most:
        return int(text)
    more = f"; arrow and csv go up to {limits.max_limit_bulk:,}" if wanted == "json" else ""
    raise Problem("invalid_limit", f"limit is '{text[:20]}', allowed is 1 to {most:,} for {wanted}{more}.")
