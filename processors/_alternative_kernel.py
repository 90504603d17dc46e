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
NO_THRESHOLD = 9
"""Reason of refusal that only these bars have."""

DONE, NEED_SLOT = range(2)
UNMAPPED, NO_ROOM, WITHOUT_THRESHOLD = -1, -2, -3
"""Instead of the slot of a code: none yet, and none to be had."""

TICK, VOLUME, DOLLAR, TICK_IMBALANCE, VOLUME_IMBALANCE, DOLLAR_IMBALANCE = range(6)

# State, integers: largest id taken, id from which on it is known what was taken, bars closed, times, first id and trades of the open bar,
# sign of the last price change, newest receive time, source of the newest trade, whether that source has ended, whether the open bar goes
# across such an end with ids missing, stretches of ids not taken (how many, then first and last id of each, oldest first).
LAST_SEEN, KNOWN_FROM, NUMBER, OPEN_T, CLOSE_T, FIRST_ID, COUNT, SIGN, RECV, SOURCE, ENDED, GAP, HOLES, HOLE = range(14)
MAX_HOLES = 8
"""Stretches of ids not taken that are remembered: an id in one came too late, any other up to the largest is a duplicate. A recorded day has
none; eight cover a bad connection, and cost 128 bytes a symbol."""
STATE_INTS = HOLE + 2 * MAX_HOLES
# State, floats: prices, pairs of sums, among them the signed flow, and the pair that is compared with the threshold; for imbalance bars:
# expected trades a bar, expected signed and absolute flow a trade, absolute flow of the open bar.
OPEN, HIGH, LOW, CLOSE, VH, VL, QH, QL, BH, BL, IH, IL, AH, AL, E_TICKS, E_FLOW, E_ABS, ABS, THRESHOLD = range(19)
STATE_FLOATS = 19

# Parameters: kind, whether the overshoot is carried over, whether the sign is the taker's side, smoothing, bounds of expected trades, the
# smallest share of the absolute flow that counts as expected imbalance, range of times.
P_KIND, P_CARRY, P_SIDE, P_ALPHA, P_MIN_TICKS, P_MAX_TICKS, P_FLOOR, P_MIN_T, P_MAX_T = range(9)
PARAMS = 9

O_CODE, O_NUMBER, O_OPEN_T, O_CLOSE_T, O_FIRST_ID, O_LAST_ID, O_COUNT, O_RECV, O_COMPLETE = range(9)
O_OPEN, O_HIGH, O_LOW, O_CLOSE, O_VOLUME, O_QUOTE, O_BUY, O_VWAP, O_IMBALANCE, O_PROGRESS, O_THRESHOLD = range(11)

N_ROWS, N_REJECTED, N_DUPLICATES, N_ACCEPTED, N_POS, N_SOURCE = range(6)
COUNTS = 6


@_inline
def _add(f, s, at, x):  # type: ignore[no-untyped-def]
    """Add ``x`` to a pair without error."""
    h = f[s, at]
    total = h + x
    v = total - h
    f[s, at + 1] += (h - (total - v)) + (x - v)
    f[s, at] = total


@_inline
def _update(i, f, s, price, size, quote, buy, flow, t, tid, receive):  # type: ignore[no-untyped-def]
    """Add a trade to the open bar."""
    if i[s, COUNT] == 0:
        i[s, OPEN_T], i[s, FIRST_ID] = t, tid
        f[s, OPEN] = f[s, HIGH] = f[s, LOW] = price
        for c in range(VH, IL + 1):
            f[s, c] = 0.0
        i[s, RECV] = receive
    i[s, COUNT] += 1
    i[s, CLOSE_T] = t
    i[s, RECV] = max(i[s, RECV], receive)
    f[s, CLOSE] = price
    f[s, HIGH] = max(f[s, HIGH], price)
    f[s, LOW] = min(f[s, LOW], price)
    _add(f, s, VH, size)
    _add(f, s, QH, quote)
    _add(f, s, BH, buy)
    _add(f, s, IH, flow)


@_inline
def _sign(par, i, f, s, price, side):  # type: ignore[no-untyped-def]
    """Sign of a trade: the taker's side where it is wanted and known, otherwise that of the last price change."""
    if price > f[s, CLOSE]:
        i[s, SIGN] = 1
    elif price < f[s, CLOSE]:
        i[s, SIGN] = -1
    if par[P_SIDE] > 0.0 and side != 0:
        return 1 if side > 0 else -1
    return i[s, SIGN]


@_inline
def _write(i, f, s, oi, of, n, code, progress, complete):  # type: ignore[no-untyped-def]
    """Write the open bar as row ``n``."""
    oi[O_CODE, n] = code
    oi[O_NUMBER, n] = i[s, NUMBER]
    oi[O_OPEN_T, n], oi[O_CLOSE_T, n] = i[s, OPEN_T], i[s, CLOSE_T]
    oi[O_FIRST_ID, n], oi[O_LAST_ID, n] = i[s, FIRST_ID], i[s, LAST_SEEN]
    oi[O_COUNT, n], oi[O_RECV, n], oi[O_COMPLETE, n] = i[s, COUNT], i[s, RECV], complete
    of[O_OPEN, n], of[O_HIGH, n], of[O_LOW, n], of[O_CLOSE, n] = f[s, OPEN], f[s, HIGH], f[s, LOW], f[s, CLOSE]
    volume, quote = f[s, VH] + f[s, VL], f[s, QH] + f[s, QL]
    of[O_VOLUME, n], of[O_QUOTE, n], of[O_BUY, n] = volume, quote, f[s, BH] + f[s, BL]
    of[O_VWAP, n] = quote / volume if volume > 0.0 else f[s, CLOSE]
    of[O_IMBALANCE, n] = f[s, IH] + f[s, IL]
    of[O_PROGRESS, n], of[O_THRESHOLD, n] = progress, f[s, THRESHOLD]


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


@_inline
def _take_id(i, s, tid):  # type: ignore[no-untyped-def]
    """Take an id above all taken before, remembering the stretch that it leaves out and whether the end of a source lies in it."""
    last = i[s, LAST_SEEN]
    if last < 0:
        i[s, KNOWN_FROM] = tid
    elif tid > last + 1:
        at = i[s, HOLES]
        if at == MAX_HOLES:
            at -= 1
            i[s, KNOWN_FROM] = i[s, HOLE + 1] + 1
            for c in range(HOLE, HOLE + 2 * at):
                i[s, c] = i[s, c + 2]
        i[s, HOLE + 2 * at], i[s, HOLE + 2 * at + 1] = last + 1, tid - 1
        i[s, HOLES] = at + 1
        if i[s, ENDED] != 0:
            i[s, GAP] = 1
    i[s, ENDED] = 0
    i[s, LAST_SEEN] = tid


@_inline
def _left_out(i, s, tid):  # type: ignore[no-untyped-def]
    """Whether this id, not above the largest taken, was not taken for sure or may not have been."""
    if tid < i[s, KNOWN_FROM]:
        return True
    found = False
    for hole in range(i[s, HOLES]):
        found |= i[s, HOLE + 2 * hole] <= tid <= i[s, HOLE + 2 * hole + 1]
    return found


@njit(cache=True, nogil=True, _nrt=False)
def write_open(par, state_i, state_f, slots, codes, oi, of, first_row):  # type: ignore[no-untyped-def]
    """Write the open bars of ``slots`` (int64) with ``codes`` (int64) as incomplete rows from ``first_row`` on; they go on as they are."""
    for n in range(slots.shape[0]):
        s = slots[n]
        at = IH if par[P_KIND] >= TICK_IMBALANCE else AH
        _write(state_i, state_f, s, oi, of, first_row + n, codes[n], state_f[s, at] + state_f[s, at + 1], 0)
        state_i[s, ENDED] = 1


@njit(cache=True, nogil=True, _nrt=False)
def step(par, state_i, state_f, rows, slots, oi, of, rejected_row, rejected_reason, counts):  # type: ignore[no-untyped-def]
    """Process the rows of a frame from ``counts[N_POS]`` on. Returns DONE, or NEED_SLOT with the row in ``counts[N_POS]``.

    Args:
        par: float64 (PARAMS,).
        state_i: int64 (symbols, STATE_INTS), changed in place.
        state_f: float64 (symbols, STATE_FLOATS), changed in place.
        rows: Rows, as of time bars.
        slots: int32, slot of each code, or why it has none.
        oi: int64 (9, rows), closed bars.
        of: float64 (11, rows), closed bars.
        rejected_row: int64 (rows,).
        rejected_reason: int8 (rows,).
        counts: int64 (COUNTS,): rows written, rejected, duplicates, accepted, the row to begin with, the source.
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
            reason = NO_THRESHOLD if slots[code] == WITHOUT_THRESHOLD else R_FULL
        elif tid <= state_i[slots[code], LAST_SEEN] and _left_out(state_i, slots[code], tid):
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
        _take_id(state_i, s, tid)
        state_i[s, SOURCE] = counts[N_SOURCE]
        counts[N_ACCEPTED] += 1
        quote = price * size
        buy = size if rows.side[r] > 0 else 0.0
        measure = 1.0
        if kind in (VOLUME, VOLUME_IMBALANCE):
            measure = size
        elif kind in (DOLLAR, DOLLAR_IMBALANCE):
            measure = quote
        flow = measure * _sign(par, state_i, state_f, s, price, rows.side[r])
        _update(state_i, state_f, s, price, size, quote, buy, flow, t, tid, receive)
        if kind >= TICK_IMBALANCE:
            state_f[s, ABS] += measure
            progress = state_f[s, IH] + state_f[s, IL]
        else:
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
        _write(state_i, state_f, s, oi, of, n, code, progress, 1 - state_i[s, GAP])
        counts[N_ROWS] = n + 1
        if kind >= TICK_IMBALANCE:
            _learn(par, state_i, state_f, s, progress)
        else:
            # however much one trade overshoots, it closes one bar and leaves less than one threshold behind
            state_f[s, AH] = progress % threshold if par[P_CARRY] > 0.0 else 0.0
            state_f[s, AL] = 0.0
        state_i[s, NUMBER] += 1
        state_i[s, COUNT] = state_i[s, GAP] = 0
    return DONE
