"""How an exchange misbehaves, on request: a plan of faults that changes what is sent, never what was traded.

Comes in: requests (``{"fault": "drop", "symbol": "BTCUSDT", "count": 3}``) and the blocks of trades about to be sent. Goes out: the blocks
as a client shall see them, and for each fault the ids it touched. Pure: what concerns sockets, REST, the market's numbering and the clock
is returned as a :class:`FaultRequest` for the server to carry out.

================  ================================  =============================================================================
fault             arguments (default)               effect
================  ================================  =============================================================================
``drop``          symbol, count (1)                 the next trades of the symbol are not sent; REST has them
``hole``          symbol, count (1)                 ids that never existed: neither sent nor in REST
``duplicate``     symbol, count (1)                 the next trades are sent twice
``reorder``       symbol, count (2)                 the next trades are held, then sent newest first
``late``          symbol, count (1), seconds (1)    the next trades are sent this much later, after newer ones
``malformed``     count (1), text (a cut message)   every connection gets text that is no JSON
``half_open``     connections (all)                 they stay open, but nothing is sent or answered any more
``close``         connections (all)                 dropped without a close frame: the client sees 1006
``cut_24h``       connections (all)                 closed as at the 24 hour mark
``rate_limit``    seconds (10), status (429)        every REST request is refused; 418 for a ban
``skew``          milliseconds                      the exchange's clock is wrong by this much, +-300,000 at most; 0 ends it
``pause``         symbol, seconds (0: until clear)  the symbol does not trade
``lose``          symbol, count (1)                 the next trades are not sent and REST never has them: a gap nobody can fill
``stall``         connections, seconds              they stay open and answer pings, but carry no market data
``restart``       seconds (3), reset_ids (true)     nothing trades, connections drop, new ones are refused; then ids start again at 1
``refuse``        seconds (3)                       new TCP connections are refused; the open ones go on
``slow_rest``     seconds (10), delay_s (1)         every REST answer comes this much later
``rest_error``    seconds (10), status (503)        every REST request is answered with this 5xx
``short_pages``   seconds (10), count (1)           pages of trades hold at most ``count`` rows
``cut_pages``     count (1)                         the next pages of trades end in the middle of a row
``clear``                                           ends every fault
================  ================================  =============================================================================

``market`` (``spot``) names the market where a symbol is asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from collectors.simulated.blocks import TradeBlock, concatenate
from collectors.simulated.errors import UnknownFaultError

KEPT_IDS: Final = 10_000
"""Touched ids remembered per fault."""

KEPT_FAULTS: Final = 1_000
"""Faults remembered for ``/sim/status``."""

MAX_COUNT: Final = 1_000_000
MAX_HELD: Final = 10_000
"""Trades a ``reorder`` may hold back: bounds memory."""
MAX_SKEW_MS: Final = 300_000

CUT_MESSAGE: Final = '{"stream":"btcusdt@trade","data":{"e":"trade","E":17231612'

FAULTS_ON_TRADES: Final = ("drop", "lose", "duplicate", "reorder", "late")
"""Faults that change the next messages of one symbol."""

_SECONDS: Final = {
    "late": 1.0,
    "rate_limit": 10.0,
    "restart": 3.0,
    "refuse": 3.0,
    "slow_rest": 10.0,
    "rest_error": 10.0,
    "short_pages": 10.0,
}
"""Defaults of ``seconds``; 0 elsewhere."""

_STATUS: Final = {"rate_limit": (429, 418, 429), "rest_error": (503, 500, 599)}
"""Default, lowest and highest ``status``."""

_FIELDS: Final[dict[str, tuple[str, ...]]] = {
    "drop": ("symbol", "count"),
    "hole": ("symbol", "count"),
    "duplicate": ("symbol", "count"),
    "reorder": ("symbol", "count"),
    "late": ("symbol", "count", "seconds"),
    "malformed": ("count", "text"),
    "half_open": ("connections",),
    "close": ("connections",),
    "cut_24h": ("connections",),
    "rate_limit": ("seconds", "status"),
    "skew": ("milliseconds",),
    "pause": ("symbol", "seconds"),
    "lose": ("symbol", "count"),
    "stall": ("connections", "seconds"),
    "restart": ("seconds", "reset_ids"),
    "refuse": ("seconds",),
    "slow_rest": ("seconds", "delay_s"),
    "rest_error": ("seconds", "status"),
    "short_pages": ("seconds", "count"),
    "cut_pages": ("count",),
    "clear": (),
}


@dataclass(kw_only=True, slots=True)
class FaultRequest:
    """One fault, checked.

    Attributes:
        fault: its name.
        market: ``spot`` or ``usdm``.
        symbol: exchange symbol; empty where the fault has none.
        count: how many trades or messages.
        connections: how many connections; 0: all.
        seconds: how long.
        status: HTTP status.
        milliseconds: clock error.
        text: what a malformed message says.
        delay_s: how much later an answer comes.
        reset_ids: a restarted exchange numbers its trades anew.
        begun_ms: market time at which it began; -1: not yet.
        remaining: trades still to be touched.
        touched: ids of the trades it touched, the last 10,000.
        ranges: where it touched several symbols: exchange symbol -> ``[first, last]`` ids, both touched, ascending.
    """

    fault: str
    market: str = "spot"
    symbol: str = ""
    count: int = 1
    connections: int = 0
    seconds: float = 0.0
    status: int = 429
    milliseconds: int = 0
    text: str = CUT_MESSAGE
    delay_s: float = 1.0
    reset_ids: bool = True
    begun_ms: int = -1
    remaining: int = 0
    touched: deque[int] = field(default_factory=lambda: deque(maxlen=KEPT_IDS))
    ranges: dict[str, list[list[int]]] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """For ``/sim/status``."""
        shown: dict[str, Any] = {"fault": self.fault, "market": self.market}
        shown |= {name: getattr(self, name) for name in _FIELDS[self.fault]}
        return shown | {"begun_ms": self.begun_ms, "remaining": self.remaining, "touched": list(self.touched), "ranges": self.ranges}

    def touch(self, symbol: str, ids: list[int]) -> None:
        """Note ids of a symbol, ascending, beside those noted before."""
        ranges = self.ranges.setdefault(symbol, [])
        for trade_id in ids:
            if ranges and ranges[-1][1] == trade_id - 1:
                ranges[-1][1] = trade_id
            elif not ranges or trade_id > ranges[-1][1]:
                ranges.append([trade_id, trade_id])


def parse_fault(body: Any) -> FaultRequest:
    """The fault a request asks for.

    Raises:
        UnknownFaultError: not an object, an unknown fault or argument, a value of the wrong kind or out of range.
    """
    if not isinstance(body, Mapping) or not isinstance(body.get("fault"), str):
        raise UnknownFaultError(f'send an object such as {{"fault": "drop", "symbol": "BTCUSDT"}}; faults: {", ".join(_FIELDS)}')
    name = body["fault"]
    if name not in _FIELDS:
        raise UnknownFaultError(f"fault={name!r} is not known; faults: {', '.join(_FIELDS)}")
    allowed = _FIELDS[name]
    for key in body:
        if key not in ("fault", "market", *allowed):
            raise UnknownFaultError(f"{name}: argument {key!r} is not known; arguments: {', '.join(('market', *allowed))}")
    request = FaultRequest(fault=name, market=str(body.get("market", "spot")), symbol=str(body.get("symbol", "")).upper())
    if request.market not in ("spot", "usdm"):
        raise UnknownFaultError(f"{name}: market={request.market!r} must be spot or usdm")
    if "symbol" in allowed and not request.symbol:
        raise UnknownFaultError(f"{name}: symbol is missing")
    most = MAX_HELD if name in ("reorder", "late") else MAX_COUNT
    request.count = int(_number(body, "count", 2 if name == "reorder" else 1, 1, most))
    request.connections = int(_number(body, "connections", 0, 0, MAX_COUNT))
    request.seconds = _number(body, "seconds", _SECONDS.get(name, 0.0), 0.0, 86_400.0)
    request.delay_s = _number(body, "delay_s", 1.0, 0.0, 3_600.0)
    request.milliseconds = int(_number(body, "milliseconds", 0, -MAX_SKEW_MS, MAX_SKEW_MS))
    request.text = str(body.get("text", CUT_MESSAGE))
    request.status = int(_number(body, "status", *_STATUS.get(name, (429, 418, 429))))
    if name == "rate_limit" and request.status not in (418, 429):
        raise UnknownFaultError(f"{name}: status={request.status} must be 418 or 429")
    reset_ids = body.get("reset_ids", True)
    if not isinstance(reset_ids, bool):
        raise UnknownFaultError(f"{name}: reset_ids={reset_ids!r} must be true or false")
    request.reset_ids = reset_ids
    return request


def _number(body: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = body.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UnknownFaultError(f"{body['fault']}: {name}={value!r} must be a number within {low:g}..{high:g}")
    return value


class FaultPlan:
    """The faults on one market's trade messages, applied block by block."""

    def __init__(self) -> None:
        self._active: list[tuple[FaultRequest, int]] = []
        # symbol code -> trades held back by a reorder, oldest first
        self._held: dict[int, list[TradeBlock]] = {}
        # (market time when due, trades) of a ``late``, in the order they were held back
        self._late: list[tuple[int, TradeBlock]] = []
        self.lost: dict[int, list[int]] = {}
        """Symbol code -> ids that REST must not have, ascending."""

    def add(self, request: FaultRequest, code: int) -> None:
        """Begin a ``drop``, ``lose``, ``duplicate`` or ``reorder`` on the symbol ``code``; faults of one symbol act one after the other."""
        request.remaining = request.count
        self._active.append((request, code))

    def clear(self) -> None:
        """End everything; trades that were held back are lost to the wire, as after a crash (REST has them)."""
        for request, _ in self._active:
            request.remaining = 0
        self._active.clear()
        self._held.clear()
        self._late.clear()

    def apply(self, block: TradeBlock) -> TradeBlock:
        """The rows to send in place of ``block``; the same object where no fault applies."""
        if not self._active and not self._late:
            return block
        blocks: list[TradeBlock] = [block]
        due = [held for due_ms, held in self._late if due_ms <= block.end_ms]
        self._late = [entry for entry in self._late if entry[0] > block.end_ms]
        busy: set[int] = set()
        for request, code in list(self._active):
            if code in busy:
                continue
            busy.add(code)
            self._apply_one(request, code, blocks)
        self._active = [entry for entry in self._active if entry[0].remaining]
        blocks += due
        return blocks[0] if len(blocks) == 1 else concatenate(blocks)

    def _apply_one(self, request: FaultRequest, code: int, blocks: list[TradeBlock]) -> None:
        """Change ``blocks[0]`` (the block's own rows) and append what is released."""
        block = blocks[0]
        rows = np.flatnonzero(block.code == code)[: request.remaining]
        if not len(rows):
            return
        request.remaining -= len(rows)
        request.touched.extend(block.trade_id[rows].tolist())
        if request.fault == "duplicate":
            blocks[0] = block.take(np.sort(np.concatenate((np.arange(len(block)), rows))))
            return
        block_rows = block.take(rows)
        blocks[0] = block.take(np.delete(np.arange(len(block)), rows))
        if request.fault == "late":
            self._late.append((block.end_ms + int(request.seconds * 1_000), block_rows))
        if request.fault == "lose":
            self.lost.setdefault(code, []).extend(block.trade_id[rows].tolist())
        if request.fault == "reorder":
            held = self._held.setdefault(code, [])
            held.append(block_rows)
            if not request.remaining:
                released = concatenate(self._held.pop(code))
                # The rest of the symbol's rows in this block came later and follow.
                later = np.flatnonzero(blocks[0].code == code)
                rest = blocks[0].take(later)
                blocks[0] = blocks[0].take(np.delete(np.arange(len(blocks[0])), later))
                blocks += [released.take(np.arange(len(released))[::-1]), rest]
