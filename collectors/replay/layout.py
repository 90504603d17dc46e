"""The columns of CSV formats: the first lines of a file in, where id, price, size, time and side stand out.

Binance publishes four CSV layouts (spot and futures, trades and aggTrades), older files without a header line. Without one the layout
is told by which columns hold True or False: ``trades`` have the first at position 5, ``aggTrades`` at position 6.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from collectors.replay.errors import FormatError
from collectors.replay.rows import MICROS, MILLIS, TimeUnit, unit_of

TRADES: Final = "binance-trades"
AGG_TRADES: Final = "binance-aggtrades"
MARKETSTREAM: Final = "marketstream"

EXPORT_COLUMNS: Final = ("exchange", "symbol", "trade_id", "price", "size", "side", "exchange_time_us", "receive_time_us")
"""The columns of ``marketstream export trades``, in its order."""

_ROLE_OF: Final[dict[str, str]] = {
    # Binance spells its headers three ways: the documentation's, the futures files' and the API's camel case
    **dict.fromkeys(("id", "tradeid", "aggtradeid", "a", "t"), "id"),
    **dict.fromkeys(("price", "p"), "price"),
    **dict.fromkeys(("qty", "quantity", "size", "q"), "size"),
    **dict.fromkeys(("baseqty",), "base_size"),
    **dict.fromkeys(("time", "transacttime", "timestamp", "T"), "time"),
    **dict.fromkeys(("isbuyermaker", "wasbuyermaker", "buyermaker", "m"), "maker"),
    **dict.fromkeys(("exchange",), "exchange"),
    **dict.fromkeys(("symbol",), "symbol"),
    **dict.fromkeys(("side",), "side"),
    **dict.fromkeys(("exchangetimeus",), "time"),
    **dict.fromkeys(("receivetimeus",), "receive"),
}
_AGG_NAMES: Final = frozenset({"aggtradeid", "a"})
_NUMBER: Final = re.compile(rb"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*|\s*[+-]?(nan|inf)\s*", re.IGNORECASE)
_BOOLEANS: Final = frozenset({b"true", b"false"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where each field of a row stands."""

    format: str
    field_count: int
    roles: Mapping[str, int]
    """Position by role: id, price, size, time, and maker or side; exchange, symbol and receive where the file has them."""
    has_header: bool
    unit: TimeUnit


def find_layout(path: Path, head: bytes, *, base_sizes: bool) -> Layout:
    """The layout of a CSV file that begins with ``head``.

    Args:
        path: for messages.
        head: the file's first bytes, whole lines.
        base_sizes: the venue counts contracts in ``qty``; the size in base units is the column after it.

    Raises:
        FormatError: the columns are none of a known layout, or the times are in no unit such a file has.
    """
    lines = [(number, line.strip().split(b",")) for number, line in enumerate(head.splitlines(), 1) if line.strip()]
    number, first = lines[0]
    if _is_header(first):
        kind, roles = _from_header(path, number, [field.decode("utf-8", "replace").strip() for field in first])
        fields, rows = len(first), lines[1:]
    else:
        kind, roles, fields = _from_rows(path, lines)
        rows = lines
    if base_sizes:
        roles = _base_size(path, kind, dict(roles))
    unit = _time_unit(path, kind, [row[roles["time"]] for _, row in rows if len(row) == fields], first_line=number)
    keep = {role: position for role, position in roles.items() if role != "base_size"}
    return Layout(format=kind, field_count=fields, roles=keep, has_header=rows is not lines, unit=unit)


def layout_of_names(path: Path, names: Sequence[str], unit: TimeUnit, *, base_sizes: bool) -> Layout:
    """The layout of a columnar file with these columns. Raises FormatError when one is missing."""
    kind, roles = _from_header(path, 0, names)
    roles = _base_size(path, kind, roles) if base_sizes else roles
    keep = {role: position for role, position in roles.items() if role != "base_size"}
    return Layout(format=kind, field_count=len(names), roles=keep, has_header=True, unit=unit)


def _is_header(fields: Sequence[bytes]) -> bool:
    """A header holds no number; a row of trades holds at least three."""
    return len(fields) > 1 and not any(_NUMBER.fullmatch(field) for field in fields)


def _from_header(path: Path, number: int, names: Sequence[str]) -> tuple[str, dict[str, int]]:
    roles: dict[str, int] = {}
    kinds = set()
    for position, name in enumerate(names):
        plain = name if len(name) == 1 else re.sub("[^a-z]", "", name.lower())
        role = _ROLE_OF.get(plain)
        if role is not None and role not in roles:
            roles[role] = position
        if plain in _AGG_NAMES:
            kinds.add(AGG_TRADES)
    ours = {"exchange", "symbol", "side", "receive"} <= set(roles)
    needed = {"id", "price", "size", "time"} | ({"side"} if ours else {"maker"})
    if missing := sorted(needed - set(roles)):
        wanted = ", ".join({"id": "a trade id", "maker": "is_buyer_maker", "side": "side"}.get(role, role) for role in missing)
        shown = ", ".join(ascii(name[:40])[1:-1] for name in names[:12])
        raise FormatError(
            path,
            f"the columns are {shown}; {wanted} is missing: give a Binance dump of trades or aggTrades, or an export of "
            f"ours ({','.join(EXPORT_COLUMNS)}).",
            line=number,
        )
    return (MARKETSTREAM if ours else AGG_TRADES if kinds else TRADES), roles


def _from_rows(path: Path, lines: Sequence[tuple[int, Sequence[bytes]]]) -> tuple[str, dict[str, int], int]:
    """The layout most of the first rows have: one bad row must not decide."""
    votes: Counter[tuple[int, int]] = Counter()
    for _, fields in lines[:200]:
        flags = [position for position, field in enumerate(fields) if field.strip().lower() in _BOOLEANS]
        if flags:
            votes[(len(fields), flags[0])] += 1
    shape = votes.most_common(1)[0][0] if votes else (0, 0)
    if shape in ((6, 5), (7, 5)):
        return TRADES, {"id": 0, "price": 1, "size": 2, "base_size": 3, "time": 4, "maker": 5}, shape[0]
    if shape in ((7, 6), (8, 6)):
        return AGG_TRADES, {"id": 0, "price": 1, "size": 2, "time": 5, "maker": 6}, shape[0]
    number, fields = lines[0]
    text = ascii(b",".join(fields)[:100].decode("utf-8", "replace"))
    raise FormatError(
        path,
        f"{text} has {len(fields)} column(s) of no known trade file: give a Binance dump of trades (id,price,qty,quote_qty,time,"
        "is_buyer_maker[,is_best_match]) or aggTrades, a WebSocket capture, or an export of ours.",
        line=number,
    )


def _base_size(path: Path, kind: str, roles: dict[str, int]) -> dict[str, int]:
    if kind == TRADES and "base_size" in roles:
        return {**roles, "size": roles["base_size"]}
    if kind == AGG_TRADES:
        raise FormatError(path, "aggTrades of binance-coinm count contracts, not base units; replay the `trades` dump of the same day.")
    return roles


def _time_unit(path: Path, kind: str, texts: Sequence[bytes], *, first_line: int) -> TimeUnit:
    """The unit most of the first rows have."""
    values = [int(text) for text in texts if re.fullmatch(rb"\s*\d{1,19}\s*", text)]
    units = Counter(unit_of(value) for value in values)
    if not units:
        return MICROS
    unit = units.most_common(1)[0][0]
    allowed = (MICROS,) if kind == MARKETSTREAM else (MILLIS, MICROS)
    if unit in allowed and unit is not None:
        return unit
    expected = " or ".join(item.name for item in allowed)
    seen = f"in {unit.name}" if unit is not None else "no times between 2009 and 2100 in any unit"
    raise FormatError(path, f"the times are {seen} (the first is {values[0]}), this format has {expected}: convert them.", line=first_line)
