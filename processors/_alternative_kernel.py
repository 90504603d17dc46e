"""The compiled part of tick, volume, dollar and imbalance bars: columns of trades in, rows of closed bars out, state changed in place.

All compiled functions of these bars and the constants they use stand in this one file (see ``_bars_kernel`` for why). A trade closes at most
one bar, so a frame of n rows writes at most n rows and the buffers are allocated before the call.

:func:`step` stops at the first trade of a symbol that has no slot yet (``NEED_SLOT``) and is called again once it has one: slots follow the
order of first trades taken, whatever the batches and their dictionaries.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_inline = njit(_nrt=False, forceinline=True)

MAX64 = np.int64(2**62)
"""Ids from here on are refused; as in time bars."""
MAX_VALUE = 1e18
"""Prices and sizes from here on are refused; as in time bars."""
R_BAD_SYMBOL, R_NOT_FINITE, R_PRICE, R_SIZE, R_TIME, R_ID, R_TOO_LATE, R_FULL = 1, 2, 3, 4, 5, 6, 7, 8
"""Reasons of refusal; as in time bars."""

DONE, NEED_SLOT = range(2)
UNMAPPED, REFUSED = -1, -2
"""Slots of a code: none yet, and none to be had."""

TICK, VOLUME, DOLLAR, TICK_IMBALANCE, VOLUME_IMBALANCE, DOLLAR_IMBALANCE = range(6)

# State, integers: largest id taken, first id taken, bars closed, times, ids and trades of the open bar, sign of the last price change.
LAST_SEEN, FIRST_SEEN, NUMBER, OPEN_T, CLOSE_T, FIRST_ID, LAST_ID, COUNT, SIGN, RECV = range(10)
STATE_INTS = 10
# State, floats: prices, pairs of sums, the pair that is compared with the threshold, previous price; for imbalance bars: expected trades a
# bar, expected signed and absolute flow a trade, absolute flow of the open bar.
OPEN, HIGH, LOW, CLOSE, VH, VL, QH, QL, BH, BL, AH, AL, PREVIOUS, E_TICKS, E_FLOW, E_ABS, ABS, THRESHOLD = range(18)
STATE_FLOATS = 18

# Parameters: kind, whether the overshoot is carried over, whether the sign is the taker's side, smoothing, bounds of expected trades, the
# smallest share of the absolute flow that counts as expected imbalance, range of times.
P_KIND, P_CARRY, P_SIDE, P_ALPHA, P_MIN_TICKS, P_MAX_TICKS, P_FLOOR, P_MIN_T, P_MAX_T = range(9)
PARAMS = 9

O_CODE, O_NUMBER, O_OPEN_T, O_CLOSE_T, O_FIRST_ID, O_LAST_ID, O_COUNT, O_RECV = range(8)
O_OPEN, O_HIGH, O_LOW, O_CLOSE, O_VOLUME, O_QUOTE, O_BUY, O_VWAP, O_PROGRESS, O_THRESHOLD = range(10)

N_ROWS, N_REJECTED, N_DUPLICATES, N_ACCEPTED, N_POS = range(5)
COUNTS = 5


@_inline
def _add(f, s, at, x):  # type: ignore[no-untyped-def]
    """Add ``x`` to a pair without error."""
    h = f[s, at]
    total = h + x
    v = total - h
    f[s, at + 1] += (h - (total - v)) + (x - v)
    f[s, at] = total


@_inline
def _update(i, f, s, price, size, quote, buy, t, tid, receive):  # type: ignore[no-untyped-def]
    """Add a trade to the open bar."""
    if i[s, COUNT] == 0:
        i[s, OPEN_T], i[s, FIRST_ID] = t, tid
        f[s, OPEN] = f[s, HIGH] = f[s, LOW] = price
        for c in range(VH, BL + 1):
            f[s, c] = 0.0
        i[s, RECV] = receive
    i[s, COUNT] += 1
    i[s, CLOSE_T], i[s, LAST_ID] = t, tid
    i[s, RECV] = max(i[s, RECV], receive)
    f[s, CLOSE] = price
    f[s, HIGH] = max(f[s, HIGH], price)
    f[s, LOW] = min(f[s, LOW], price)
    _add(f, s, VH, size)
    _add(f, s, QH, quote)
    _add(f, s, BH, buy)


@_inline
def _sign(par, i, f, s, price, side):  # type: ignore[no-untyped-def]
    """Sign of a trade: the taker's side where it is wanted and known, otherwise that of the last price change."""
    if price > f[s, PREVIOUS]:
        i[s, SIGN] = 1
    elif price < f[s, PREVIOUS]:
        i[s, SIGN] = -1
    f[s, PREVIOUS] = price
    if par[P_SIDE] > 0.0 and side != 0:
        return 1 if side > 0 else -1
    return i[s, SIGN]


@_inline
def _write(i, f, s, oi, of, n, code, progress, threshold):  # type: ignore[no-untyped-def]
    """Write the open bar as row ``n``."""
    oi[O_CODE, n] = code
    oi[O_NUMBER, n] = i[s, NUMBER]
    oi[O_OPEN_T, n], oi[O_CLOSE_T, n] = i[s, OPEN_T], i[s, CLOSE_T]
    oi[O_FIRST_ID, n], oi[O_LAST_ID, n] = i[s, FIRST_ID], i[s, LAST_ID]
    oi[O_COUNT, n], oi[O_RECV, n] = i[s, COUNT], i[s, RECV]
    of[O_OPEN, n], of[O_HIGH, n], of[O_LOW, n], of[O_CLOSE, n] = f[s, OPEN], f[s, HIGH], f[s, LOW], f[s, CLOSE]
    volume, quote = f[s, VH] + f[s, VL], f[s, QH] + f[s, QL]
    of[O_VOLUME, n], of[O_QUOTE, n], of[O_BUY, n] = volume, quote, f[s, BH] + f[s, BL]
    of[O_VWAP, n] = quote / volume if volume > 0.0 else f[s, CLOSE]
    of[O_PROGRESS, n], of[O_THRESHOLD, n] = progress, threshold


@_inline
def _learn(par, i, f, s, theta):  # type: ignore[no-untyped-def]
    """Expectations after an imbalance bar: exponentially weighted over bars, bounded, and the threshold that follows from them."""
    ticks = float(i[s, COUNT])
    alpha = 1.0 if i[s, NUMBER] == 0 else par[P_ALPHA]
    f[s, E_TICKS] += par[P_ALPHA] * (ticks - f[s, E_TICKS])
    f[s, E_TICKS] = min(max(f[s, E_TICKS], par[P_MIN_TICKS]), par[P_MAX_TICKS])
    f[s, E_FLOW] += alpha * (theta / ticks - f[s, E_FLOW])
    f[s, E_ABS] += alpha * (f[s, ABS] / ticks - f[s, E_ABS])
    f[s, THRESHOLD] = f[s, E_TICKS] * max(abs(f[s, E_FLOW]), par[P_FLOOR] * f[s, E_ABS])
    f[s, ABS] = 0.0


@njit(cache=True, nogil=True, _nrt=False)
def step(par, state_i, state_f, rows, slots, oi, of, rejected_row, rejected_reason, counts):  # type: ignore[no-untyped-def]
    """Process the rows of a frame from ``counts[N_POS]`` on. Returns DONE, or NEED_SLOT with the row in ``counts[N_POS]``.

    Args:
        par: float64 (PARAMS,).
        state_i: int64 (symbols, STATE_INTS), changed in place.
        state_f: float64 (symbols, STATE_FLOATS), changed in place.
        rows: Rows, as of time bars.
        slots: int32, slot of each code, or UNMAPPED, or REFUSED.
        oi: int64 (8, rows), closed bars.
        of: float64 (10, rows), closed bars.
        rejected_row: int64 (rows,).
        rejected_reason: int8 (rows,).
        counts: int64 (COUNTS,): rows written, rejected, duplicates, accepted, the row to begin with.
    """
    kind = int(par[P_KIND])
    for r in range(counts[N_POS], rows.code.shape[0]):
        price, size, t, tid, receive = rows.price[r], rows.size[r], rows.time[r], rows.trade_id[r], rows.receive[r]
        code = rows.code[r]
        reason = 0
        if not (np.isfinite(price) and np.isfinite(size)):
            reason = R_NOT_FINITE
        elif not (0.0 < price < MAX_VALUE):
            reason = R_PRICE
        elif not (0.0 <= size < MAX_VALUE):
            reason = R_SIZE
        elif not (0 <= tid < MAX64):
            reason = R_ID
        elif not (par[P_MIN_T] <= t < par[P_MAX_T]) or not (0 <= receive < par[P_MAX_T]):
            reason = R_TIME
        elif code < 0 or code >= slots.shape[0]:
            reason = R_BAD_SYMBOL
        elif slots[code] == UNMAPPED:
            counts[N_POS] = r
            return NEED_SLOT
        elif slots[code] < 0:
            reason = R_FULL
        elif tid < state_i[slots[code], FIRST_SEEN]:
            reason = R_TOO_LATE
        if reason > 0:
            rejected_row[counts[N_REJECTED]] = r
            rejected_reason[counts[N_REJECTED]] = reason
            counts[N_REJECTED] += 1
            continue
        s = slots[code]
        if tid <= state_i[s, LAST_SEEN]:
            counts[N_DUPLICATES] += 1
            continue
        if state_i[s, LAST_SEEN] < 0:
            state_i[s, FIRST_SEEN] = tid
        state_i[s, LAST_SEEN] = tid
        counts[N_ACCEPTED] += 1
        quote = price * size
        buy = size if rows.side[r] > 0 else 0.0
        _update(state_i, state_f, s, price, size, quote, buy, t, tid, receive)
        measure = 1.0
        if kind in (VOLUME, VOLUME_IMBALANCE):
            measure = size
        elif kind in (DOLLAR, DOLLAR_IMBALANCE):
            measure = quote
        if kind >= TICK_IMBALANCE:
            state_f[s, ABS] += measure
            measure *= _sign(par, state_i, state_f, s, price, rows.side[r])
        _add(state_f, s, AH, measure)
        progress = state_f[s, AH] + state_f[s, AL]
        threshold = state_f[s, THRESHOLD]
        if kind < TICK_IMBALANCE:
            closes = progress >= threshold
        elif state_i[s, NUMBER] == 0:
            closes = state_i[s, COUNT] >= state_f[s, E_TICKS]
        else:
            closes = abs(progress) >= threshold and state_i[s, COUNT] >= par[P_MIN_TICKS] or state_i[s, COUNT] >= par[P_MAX_TICKS]
        if not closes:
            continue
        n = counts[N_ROWS]
        _write(state_i, state_f, s, oi, of, n, code, progress, threshold)
        counts[N_ROWS] = n + 1
        if kind >= TICK_IMBALANCE:
            _learn(par, state_i, state_f, s, progress)
            state_f[s, AH] = 0.0
        else:
            # however much one trade overshoots, it closes one bar and leaves less than one threshold behind
            state_f[s, AH] = progress % threshold if par[P_CARRY] > 0.0 else 0.0
        state_f[s, AL] = 0.0
        state_i[s, NUMBER] += 1
        state_i[s, COUNT] = 0
    return DONE
