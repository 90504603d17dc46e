"""Timeframes and times: the only place that knows how long a timeframe is and how a time is read from text."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final

from schemas.errors import VocabularyError

US_PER_SECOND: Final = 1_000_000
"""Microseconds in a second; all times are int64 microseconds since the epoch, UTC."""

TIMEFRAME_SECONDS: Final[dict[str, int]] = {
    "1s": 1,
    "1m": 60,
    "5m": 300,
    "15m": 900,
    "30m": 1800,
    "1h": 3600,
    "4h": 14_400,
    "1d": 86_400,
}
"""Every timeframe and its length in seconds; each divides the next larger ones or is divided by a common part (1 s, 60 s)."""

TIMEFRAMES: Final = tuple(TIMEFRAME_SECONDS)
NAME_BY_SECONDS: Final[dict[int, str]] = {seconds: name for name, seconds in TIMEFRAME_SECONDS.items()}

MIN_TIME_US: Final = 1_230_768_000_000_000
"""2009-01-01: before the first Bitcoin block no exchange trade exists; an earlier time is a unit mistake."""
MAX_TIME_US: Final = 4_102_444_800_000_000
"""2100-01-01: a later time is a unit mistake (nanoseconds read as microseconds)."""

_DURATION: Final = re.compile(r"(\d+)(ms|s|m|h|d|w)")
_DURATION_US: Final = {
    "ms": 1_000,
    "s": US_PER_SECOND,
    "m": 60 * US_PER_SECOND,
    "h": 3600 * US_PER_SECOND,
    "d": 86_400 * US_PER_SECOND,
    "w": 604_800 * US_PER_SECOND,
}


def timeframe_seconds(name: str) -> int:
    """Length of a timeframe in seconds. Raises VocabularyError naming the nearest known one."""
    try:
        return TIMEFRAME_SECONDS[name]
    except KeyError:
        raise VocabularyError("timeframe", name, TIMEFRAMES) from None


def timeframe_name(seconds: int) -> str:
    """Name of the timeframe of that length, e.g. 60 -> ``1m``. Raises VocabularyError."""
    try:
        return NAME_BY_SECONDS[seconds]
    except KeyError:
        raise VocabularyError("timeframe of seconds", str(seconds), map(str, NAME_BY_SECONDS)) from None


def parse_duration_us(text: str) -> int:
    """Microseconds of a duration such as ``10m``, ``250ms``, ``1h30m``. Raises ValueError on anything else."""
    text = text.strip()
    total, position = 0, 0
    for match in _DURATION.finditer(text):
        if match.start() != position:
            break
        total += int(match[1]) * _DURATION_US[match[2]]
        position = match.end()
    if not text or position != len(text):
        raise ValueError(f"'{text}' is not a duration: write a number and a unit, as in 250ms, 10s, 5m, 1h30m, 7d.")
    return total


def parse_time_us(text: str) -> int:
    """Microseconds UTC of ISO 8601 text or of a whole number in s, ms, us or ns, told apart by size.

    A time without a zone is UTC. Raises ValueError for anything unreadable or outside 2009 .. 2100.
    """
    text = text.strip()
    if re.fullmatch(r"-?\d+", text):
        return normalise_epoch_us(int(text))
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"'{text}' is not a time: write ISO 8601 (2024-08-08T23:54:13Z) or a number of ms or us since 1970.") from None
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    delta = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (delta.days * 86_400 + delta.seconds) * US_PER_SECOND + delta.microseconds


def normalise_epoch_us(value: int) -> int:
    """Microseconds of an epoch number in s, ms, us or ns; the four ranges for 2009 .. 2100 do not overlap.

    Raises ValueError when the value is no time in that range in any unit.
    """
    for numerator, denominator in ((US_PER_SECOND, 1), (1_000, 1), (1, 1), (1, 1_000)):
        time_us = value * numerator // denominator
        if MIN_TIME_US <= time_us < MAX_TIME_US:
            return time_us
    raise ValueError(f"{value} is no time between 2009 and 2100 in seconds, milliseconds, microseconds or nanoseconds.")


def format_time_us(time_us: int) -> str:
    """ISO 8601 with microseconds and ``Z``, e.g. ``2024-08-08T23:54:13.000000Z``."""
    seconds, micros = divmod(time_us, US_PER_SECOND)
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S") + f".{micros:06d}Z"
