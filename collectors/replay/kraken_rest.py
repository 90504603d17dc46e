"""A recorded reply of Kraken's REST ``Trades`` call in, one block of checked trades out.

``{"error": [], "result": {"XBTUSDT": [[price, size, time s, "b"|"s", "m"|"l", misc, trade id], ...], "last": ...}}``
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from collectors.replay.errors import FormatError, TruncatedError
from collectors.replay.rows import MALFORMED, Array, Block, Rejected, check_rows, empty_columns
from schemas.symbols import SIDE_BUY, SIDE_SELL, Instrument

MAX_BYTES: Final = 256 << 20
"""A reply holds at most 1,000 trades (150 KiB); a file of many replies in one must be cut."""
_OWN_NAMES: Final = {"XBT": "BTC", "XXBT": "BTC", "XETH": "ETH", "XDG": "DOGE", "ZUSD": "USD", "ZEUR": "EUR", "ZGBP": "GBP", "ZJPY": "JPY"}

_Row = tuple[str, str, Decimal, str, str, str, int]


class _Reply(msgspec.Struct):
    result: dict[str, msgspec.Raw]
    error: list[str] = []


def parse_kraken(path: Path, data: bytes, instrument: Instrument, on_symbol: Callable[[str], None]) -> Block:
    """The block of the reply. ``line`` of a rejected row is its number in the list.

    Raises FormatError when it is no such reply; TruncatedError when the JSON breaks off (a reply that is not whole is not used).
    """
    try:
        reply = msgspec.json.decode(data, type=_Reply)
    except msgspec.ValidationError as exc:
        raise FormatError(path, f"is JSON but no reply of Kraken's Trades call ({exc}).") from exc
    except msgspec.DecodeError as exc:
        if "truncated" in str(exc):
            raise TruncatedError(path, "the JSON ends early") from exc
        raise FormatError(path, f"is not valid JSON ({exc}); record the reply again.") from exc
    except UnicodeDecodeError as exc:
        raise FormatError(path, f"is not UTF-8 ({exc.reason} at byte {exc.start}); record the reply again.") from exc
    if reply.error:
        raise FormatError(path, f"is a reply with an error ({'; '.join(reply.error)[:200]}), it holds no trades.")
    block = Block(columns=empty_columns())
    for name, raw in reply.result.items():
        if name == "last":
            continue
        if instrument.symbol not in canonical_names(name):
            on_symbol(name)
            continue
        block = _block(path, raw)
    return block


def canonical_names(name: str) -> frozenset[str]:
    """Every canonical symbol a Kraken pair name may stand for: XBTUSDT and XXBTZUSD carry no separator, so each cut is tried."""
    found = set()
    for cut in range(2, len(name) - 1):
        base, quote = name[:cut], name[cut:].lstrip("/")
        found.add(f"{_OWN_NAMES.get(base, base)}-{_OWN_NAMES.get(quote, quote)}")
    return frozenset(found)


def _block(path: Path, raw: msgspec.Raw) -> Block:
    try:
        items = msgspec.json.decode(raw, type=list[msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise FormatError(path, f"the trades are no list ({exc}).") from exc
    rows: list[_Row] = []
    places: list[int] = []
    bad: list[Rejected] = []
    decoder = msgspec.json.Decoder(_Row)
    for number, item in enumerate(items, 1):
        try:
            row = decoder.decode(item)
            if row[3] not in ("b", "s"):
                raise ValueError(f"side {row[3]!r} is neither b nor s")
            float(row[0]), float(row[1])
        except (msgspec.DecodeError, ValueError) as exc:
            bad.append(Rejected(reason=MALFORMED, detail=f"The trade cannot be read: {exc}.", line=number, raw=bytes(item)))
            continue
        rows.append(row)
        places.append(number)
    good = check_rows(_columns(rows), None, lambda row: (places[row], bytes(items[places[row] - 1])))
    return Block(columns=good.columns, rejected=tuple(sorted([*good.rejected, *bad], key=lambda item: item.line)))


def _columns(rows: list[_Row]) -> dict[str, Array]:
    # Decimal, because seconds as float64 are exact to 0.24 us only
    times = np.array([_micros(row[2]) for row in rows], np.int64)
    return {
        "trade_id": np.array([row[6] if abs(row[6]) < 2**63 else -1 for row in rows], np.int64),
        "price": np.array([float(row[0]) for row in rows], np.float64),
        "size": np.array([float(row[1]) for row in rows], np.float64),
        "side": np.array([SIDE_BUY if row[3] == "b" else SIDE_SELL for row in rows], np.int8),
        "exchange_time_us": times,
        "receive_time_us": times,
    }


def _micros(seconds: Decimal) -> int:
    """Whole microseconds, 0 (a time that is refused) for anything that is no time."""
    return int(seconds * 1_000_000) if 0 <= seconds < 10**11 else 0
