"""The compiled part of time bars: columns of trades in, rows of bars out, state changed in place. No allocation, no Python objects.

All compiled functions stand in this one file: numba looks at the time stamp of a function's own file only when it decides whether its
cached machine code is still good. :func:`step` is the only one that Python calls; it has one specialisation.

**How a trade travels.** Only the open bar of the smallest timeframe (*level* 0) is touched by a trade in order: its row in ``hot``,
three cache lines. When a trade of a later interval comes, or the watermark passes, that bar is *sealed*: copied into a small
ring and merged into the open bar of level 1, which is merged into level 2 when it is sealed in turn. A trade that is not in order takes the
slow path (:func:`_slow_row`): it is merged into the ring entry of each level until one is reached whose open bar contains it.

**Sums do not depend on the order.** Volumes are kept as an unevaluated pair ``high + low`` (error-free transformation of Knuth 1969 and
Dekker 1971) and rounded once, when a row is written. As long as the sum over the smallest addend stays below 2**50 nothing is lost, so a
row holds the correctly rounded exact sum: the same bits in any order, any batch sizes, with any choice of timeframes.

**Rows are written by whole steps.** Each step knows an upper bound of the rows it can write; if they do not fit, ``step`` returns
``NEED_OUT`` before it changes anything and Python calls again with larger buffers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from processors._prefetch import prefetch

# Nothing here allocates, so arrays need no reference counts; with them each call of a helper costs two atomic operations an array.
_inner = njit(_nrt=False)
# A call passes every array of its arguments by value, some 200 words: small functions are inlined.
_inline = njit(_nrt=False, forceinline=True)


MAX64 = np.int64(2**62)
"""Stands for "never" and "without end": far from any time or id, and adding a day to it does not overflow."""
MAX_VALUE = 1e18
"""Prices and sizes at or above this are refused: their product would leave the range in which sums are exact."""

# A bar is a row of 8-byte words, seen through two views of the same memory, one of integers and one of floats.
# Integers: open time, first and last trade by (time, id), trades, newest receive time, revision and flags, trades when last published.
OPEN, FIRST_T, FIRST_ID, LAST_T, LAST_ID, COUNT, RECV, META, PUB = range(9)
BAR_INTS = 9
# Floats: prices, then the pairs of the three sums.
F_OPEN, F_HIGH, F_LOW, F_CLOSE, F_VH, F_VL, F_QH, F_QL, F_BH, F_BL = range(10, 20)
BAR_WORDS = 20
# Rows of ``hot`` go on; 24 words are three cache lines. Time of the last live row; end, limit and newest time of the id interval that
# grows; live state.
LIVE_AT, EXT_HI, EXT_LIMIT, EXT_T, LIVE_STATE = 9, 20, 21, 22, 23
HOT_WORDS = 24
CLEAN, TOUCHED, WAITING, NEVER, DROPPED = range(5)
"""LIVE_STATE: nothing new, traded in this frame, waits in the wheel, a lane, waited in the wheel when its source ended."""

# META: the low 32 bits count publications, i.e. are the revision of the next one; above them flags.
REVISION_MASK = np.int64(0xFFFFFFFF)
DIRTY = np.int64(1 << 32)
"""Changed since published: waits for the flush at the end of the rows of this frame."""
CLOSE_CHANGED = np.int64(1 << 33)
"""... and its close may have changed, so flat bars that follow change too."""
BROKEN = np.int64(1 << 34)
"""First bar after flat bars were left out: not complete."""
ENDED = np.int64(1 << 35)
"""Last published unfinished, because its source had ended."""

# ``slot_i``: what is known about a slot. A slot is a symbol, or an older stretch of it that is being filled in (a *lane*).
(
    KIND,
    OWNER,
    ID_COUNT,
    EXT_AT,
    FORGOTTEN,
    COVERED_FROM,
    GAP_FROM,
    GAP_TO,
    REV_FROM,
    LANE_LO,
    LANE_HI,
    REFS,
    STARTED,
    WHEEL_NEXT,
    REV_LISTED,
) = range(15)
SLOT_INTS = 16  # then, per level: NEXT (open time of the next bar to publish), flat bars in a row, open time of the first one published
FREE, MAIN, LANE = 0, 1, 2

# ``ids``: disjoint intervals of ids seen, ascending, with the times they span.
ID_LO, ID_HI, ID_LO_T, ID_HI_T = range(4)

# ``par``
P_BASE, P_WINDOW, P_MAX_FLAT, P_LIVE, P_ROWS, P_LEVELS, P_IDS, P_FUTURE, P_MIN_T, P_MAX_T, P_REVISABLE = range(11)
PARAMS = 12

# ``ctl``: where the step stands, what the frame says, what was counted.
(
    C_STAGE,
    C_POS,
    C_NEED,
    C_WATERMARK,
    C_MAX_T,
    C_OUT,
    C_CODES,
    C_REJECTED,
    C_DUPLICATES,
    C_LATE,
    C_ACCEPTED,
    C_FLAT_BUDGET,
    C_TOUCHED,
    C_REVISED,
    C_CLOCK,
    C_WHEEL_AT,
    C_LANE_LO,
    C_LANE_HI,
    C_REV_AT,
    C_ENDING,
    C_FLATS_LEFT_OUT,
) = range(21)
CONTROLS = 24

DONE, NEED_OUT, NEED_SLOT, NEED_LANE = 0, 1, 2, 3
R_BAD_SYMBOL, R_NOT_FINITE, R_PRICE, R_SIZE, R_TIME, R_ID, R_TOO_LATE, R_FULL = 1, 2, 3, 4, 5, 6, 7, 8

UNMAPPED, REFUSED = -1, -2
NEWCOMER = 1 << 30
"""Bit in ``code_map``: this source has not yet added a trade to the symbol; only then an older stretch opens a lane."""
SLOT_MASK = NEWCOMER - 1

AHEAD = 12
"""Rows whose slot is prefetched: takes a trade among 10,000 symbols from 28.8 to 24.2 ns, costs none among 10."""

WHEEL = 32
"""Buckets of the wheel of due live updates; one spans a sixteenth of the interval, so half of them are in use."""

# Columns of the output matrices, by dtype.
O_OPEN_T, O_CLOSE_T, O_COUNT, O_FIRST_ID, O_LAST_ID, O_RECV = range(6)
O_CODE, O_TIMEFRAME, O_REVISION = range(3)
O_FINAL, O_COMPLETE = range(2)
O_OPEN, O_HIGH, O_LOW, O_CLOSE, O_VOLUME, O_QUOTE, O_BUY, O_VWAP = range(8)

_ACTION_HOT, _ACTION_DONE, _ACTION_DUPLICATE, _ACTION_LATE, _ACTION_NEED_OUT, _ACTION_NEED_LANE = range(6)


class State(NamedTuple):
    """Arrays of one partition; capacity ``n`` slots, ``K`` levels, ``P`` bars a slot outside ``hot``."""

    hot_i: Any  # int64 (n, HOT_WORDS): open bar of level 0, and what each trade needs
    hot_f: Any  # float64, the same memory
    bar_i: Any  # int64 (n * P, BAR_WORDS): a scratch bar, open bars of levels 1.., then the rings
    bar_f: Any  # float64, the same memory
    slot_i: Any  # int64 (n, SLOT_INTS + 3 K)
    slot_f: Any  # float64 (n, K): close before the next bar of each level
    ids: Any  # int64 (n, intervals, 4)
    wheel: Any  # int64 (WHEEL,): first slot of each bucket or -1
    timeframe: Any  # int64 (K,), microseconds
    ring: Any  # int64 (K,): entries of each ring
    ring_at: Any  # int64 (K,): where it begins among a slot's bars
    par: Any  # int64 (PARAMS,)


class Out(NamedTuple):
    """Buffers of one call."""

    i8: Any  # int64 (6, rows)
    i4: Any  # int32 (3, rows)
    i1: Any  # int8 (2, rows)
    f8: Any  # float64 (8, rows)
    code_of: Any  # int32 (n,): code of a slot in this output, -1 for none
    code_list: Any  # int32 (n,): slot of a code
    rejected_row: Any  # int64 (rows of the frame,)
    rejected_reason: Any  # int8
    touched: Any  # int32 (n,)
    revised: Any  # int32 (n,)
    floors: Any  # int64 (K,)


class Rows(NamedTuple):
    """Input columns, all read-only, contiguous and aligned, so that there is one specialisation."""

    code: Any
    trade_id: Any
    price: Any
    size: Any
    side: Any
    time: Any
    receive: Any


# --- bars -----------------------------------------------------------------------------------------------------------------------------


@_inner
def _add_trade(bi, bf, r, t, tid, price, size, quote, buy, receive):  # type: ignore[no-untyped-def]
    """Add one trade to bar ``r``."""
    if bi[r, COUNT] == 0:
        bi[r, FIRST_T] = t
        bi[r, FIRST_ID] = tid
        bi[r, LAST_T] = t
        bi[r, LAST_ID] = tid
        bi[r, COUNT] = 1
        bi[r, RECV] = receive
        bf[r, F_OPEN] = price
        bf[r, F_HIGH] = price
        bf[r, F_LOW] = price
        bf[r, F_CLOSE] = price
        bf[r, F_VH] = size
        bf[r, F_VL] = 0.0
        bf[r, F_QH] = quote
        bf[r, F_QL] = 0.0
        bf[r, F_BH] = buy
        bf[r, F_BL] = 0.0
        return
    bi[r, COUNT] += 1
    last = bi[r, LAST_T]
    if t > last or (t == last and tid > bi[r, LAST_ID]):
        bi[r, LAST_T] = t
        bi[r, LAST_ID] = tid
        bf[r, F_CLOSE] = price
    first = bi[r, FIRST_T]
    if t < first or (t == first and tid < bi[r, FIRST_ID]):
        bi[r, FIRST_T] = t
        bi[r, FIRST_ID] = tid
        bf[r, F_OPEN] = price
    bi[r, RECV] = max(bi[r, RECV], receive)
    bf[r, F_HIGH] = max(bf[r, F_HIGH], price)
    bf[r, F_LOW] = min(bf[r, F_LOW], price)
    # Error-free addition: high' + error == high + x exactly.
    h = bf[r, F_VH]
    s = h + size
    v = s - h
    bf[r, F_VL] += (h - (s - v)) + (size - v)
    bf[r, F_VH] = s
    h = bf[r, F_QH]
    s = h + quote
    v = s - h
    bf[r, F_QL] += (h - (s - v)) + (quote - v)
    bf[r, F_QH] = s
    h = bf[r, F_BH]
    s = h + buy
    v = s - h
    bf[r, F_BL] += (h - (s - v)) + (buy - v)
    bf[r, F_BH] = s


@_inline
def _add_pair(df, d, sf, s, at):  # type: ignore[no-untyped-def]
    """Add the pair at ``at`` of bar ``s`` to that of bar ``d`` and renormalise it, so that the low part keeps its room."""
    a = df[d, at]
    b = sf[s, at]
    total = a + b
    v = total - a
    low = (a - (total - v)) + (b - v) + (df[d, at + 1] + sf[s, at + 1])
    high = total + low
    df[d, at + 1] = low - (high - total)
    df[d, at] = high


@_inner
def _merge(di, df, d, si, sf, s):  # type: ignore[no-untyped-def]
    """Add the trades of bar ``s`` to bar ``d``. Leaves ``d``'s open time, revision and flags. True if the close is another trade now."""
    if si[s, COUNT] == 0:
        return False
    if di[d, COUNT] == 0:
        for c in range(FIRST_T, META):
            di[d, c] = si[s, c]
        for c in range(F_OPEN, F_BL + 1):
            df[d, c] = sf[s, c]
        return True
    changed = False
    if si[s, LAST_T] > di[d, LAST_T] or (si[s, LAST_T] == di[d, LAST_T] and si[s, LAST_ID] > di[d, LAST_ID]):
        di[d, LAST_T] = si[s, LAST_T]
        di[d, LAST_ID] = si[s, LAST_ID]
        df[d, F_CLOSE] = sf[s, F_CLOSE]
        changed = True
    if si[s, FIRST_T] < di[d, FIRST_T] or (si[s, FIRST_T] == di[d, FIRST_T] and si[s, FIRST_ID] < di[d, FIRST_ID]):
        di[d, FIRST_T] = si[s, FIRST_T]
        di[d, FIRST_ID] = si[s, FIRST_ID]
        df[d, F_OPEN] = sf[s, F_OPEN]
    di[d, COUNT] += si[s, COUNT]
    di[d, RECV] = max(di[d, RECV], si[s, RECV])
    df[d, F_HIGH] = max(df[d, F_HIGH], sf[s, F_HIGH])
    df[d, F_LOW] = min(df[d, F_LOW], sf[s, F_LOW])
    _add_pair(df, d, sf, s, F_VH)
    _add_pair(df, d, sf, s, F_QH)
    _add_pair(df, d, sf, s, F_BH)
    return changed


@_inline
def _clear(bi, r, open_us):  # type: ignore[no-untyped-def]
    """Make bar ``r`` an empty, never published one that opens at ``open_us``."""
    bi[r, OPEN] = open_us
    bi[r, COUNT] = 0
    bi[r, META] = 0
    bi[r, PUB] = -1


@_inline
def _copy(di, df, d, si, sf, s):  # type: ignore[no-untyped-def]
    for c in range(BAR_INTS):
        di[d, c] = si[s, c]
    for c in range(F_OPEN, F_BL + 1):
        df[d, c] = sf[s, c]


# --- output ---------------------------------------------------------------------------------------------------------------------------


@_inline
def _code(st, out, ctl, s):  # type: ignore[no-untyped-def]
    """Code of the slot's symbol in this output."""
    m = st.slot_i[s, OWNER]
    code = out.code_of[m]
    if code < 0:
        code = ctl[C_CODES]
        out.code_of[m] = code
        out.code_list[code] = m
        ctl[C_CODES] += 1
    return code


@_inline
def _complete(st, s, k, open_us):  # type: ignore[no-untyped-def]
    """Whether the whole interval was covered: from its start on, and by no gap between two sources."""
    si = st.slot_i
    end = open_us + st.timeframe[k]
    return open_us >= si[s, COVERED_FROM] and not (end > si[s, GAP_FROM] and open_us < si[s, GAP_TO])


@_inline
def _write_head(st, out, ctl, s, k, open_us, revision, final, complete):  # type: ignore[no-untyped-def]
    """Write the identifying columns of the next row and return its index."""
    n = ctl[C_OUT]
    ctl[C_OUT] = n + 1
    tf = st.timeframe[k]
    out.i8[O_OPEN_T, n] = open_us
    out.i8[O_CLOSE_T, n] = open_us + tf
    out.i4[O_CODE, n] = _code(st, out, ctl, s)
    out.i4[O_TIMEFRAME, n] = tf // 1_000_000
    if st.slot_i[s, KIND] == LANE and st.slot_i[s, LANE_LO] > 0:
        revision += 1  # flat bars of this stretch may have been published as revision 0
    out.i4[O_REVISION, n] = revision
    out.i1[O_FINAL, n] = final
    out.i1[O_COMPLETE, n] = complete
    return n


@_inline
def _write_bar(st, out, ctl, s, k, bi, bf, r, final, complete):  # type: ignore[no-untyped-def]
    """Write a row of bar ``r`` with trades."""
    n = _write_head(st, out, ctl, s, k, bi[r, OPEN], bi[r, META] & REVISION_MASK, final, complete)
    out.i8[O_COUNT, n] = bi[r, COUNT]
    out.i8[O_FIRST_ID, n] = bi[r, FIRST_ID]
    out.i8[O_LAST_ID, n] = bi[r, LAST_ID]
    out.i8[O_RECV, n] = bi[r, RECV]
    volume = bf[r, F_VH] + bf[r, F_VL]
    quote = bf[r, F_QH] + bf[r, F_QL]
    out.f8[O_OPEN, n] = bf[r, F_OPEN]
    out.f8[O_HIGH, n] = bf[r, F_HIGH]
    out.f8[O_LOW, n] = bf[r, F_LOW]
    out.f8[O_CLOSE, n] = bf[r, F_CLOSE]
    out.f8[O_VOLUME, n] = volume
    out.f8[O_QUOTE, n] = quote
    out.f8[O_BUY, n] = bf[r, F_BH] + bf[r, F_BL]
    out.f8[O_VWAP, n] = quote / volume if volume > 0.0 else bf[r, F_CLOSE]


@_inline
def _write_flat(st, out, ctl, s, k, open_us, close, revision, complete):  # type: ignore[no-untyped-def]
    """Write a row of an interval without trades: the previous close, nothing traded, ids -1."""
    n = _write_head(st, out, ctl, s, k, open_us, revision, 1, complete)
    out.i8[O_COUNT, n] = 0
    out.i8[O_FIRST_ID, n] = -1
    out.i8[O_LAST_ID, n] = -1
    out.i8[O_RECV, n] = 0
    for c in (O_OPEN, O_HIGH, O_LOW, O_CLOSE, O_VWAP):
        out.f8[c, n] = close
    for c in (O_VOLUME, O_QUOTE, O_BUY):
        out.f8[c, n] = 0.0


# --- levels ---------------------------------------------------------------------------------------------------------------------------


@_inline
def _ring_row(st, s, k, open_us):  # type: ignore[no-untyped-def]
    # Dividing floats is several times faster than integers, and exact here: both are whole numbers below 2**53, the first division has no
    # remainder, and the second quotient is at least 1 / ring away from the next whole number.
    number = np.int64(open_us / st.timeframe[k])
    ring = st.ring[k]
    return s * st.par[P_ROWS] + st.ring_at[k] + number - np.int64(number / ring) * ring


@_inline
def _at_lane_edge(st, s, k, open_us):  # type: ignore[no-untyped-def]
    """Whether this bar of a lane reaches into intervals that the symbol's own slot has trades of."""
    return open_us <= st.slot_i[s, LANE_LO] or open_us + st.timeframe[k] > st.slot_i[s, LANE_HI]


@_inline
def _mark_revised(st, out, ctl, s, open_us):  # type: ignore[no-untyped-def]
    if st.slot_i[s, REV_LISTED] == 0:
        st.slot_i[s, REV_LISTED] = 1
        out.revised[ctl[C_REVISED]] = s
        ctl[C_REVISED] += 1
    st.slot_i[s, REV_FROM] = min(st.slot_i[s, REV_FROM], open_us)


@_inner
def _merge_upwards(st, out, ctl, s, k, xi, xf, x, t):  # type: ignore[no-untyped-def]
    """Add bar ``x``, whose trades lie around ``t``, to level ``k`` of slot ``s`` and to those above that do not get it by sealing."""
    levels = st.par[P_LEVELS]
    bi, bf, si = st.bar_i, st.bar_f, st.slot_i
    while k < levels:
        tf = st.timeframe[k]
        open_us = t - t % tf
        current = st.hot_i[s, OPEN] if k == 0 else bi[s * st.par[P_ROWS] + k, OPEN]
        if open_us == current:
            if k == 0:
                _merge(st.hot_i, st.hot_f, s, xi, xf, x)
            else:
                _merge(bi, bf, s * st.par[P_ROWS] + k, xi, xf, x)
            return
        if si[s, KIND] == LANE and _at_lane_edge(st, s, k, open_us):
            s = si[s, OWNER]
            continue
        if open_us < current and open_us > current - st.ring[k] * tf:
            next_at = SLOT_INTS + k
            published_at = SLOT_INTS + 2 * levels + k
            if open_us < si[s, next_at] and si[s, published_at] == MAX64:
                si[s, next_at] = open_us  # nothing published yet: it is only the order that is unusual
            r = _ring_row(st, s, k, open_us)
            closed = open_us < si[s, next_at]
            created = bi[r, OPEN] != open_us
            if created:
                _clear(bi, r, open_us)
                if closed and open_us >= si[s, published_at]:
                    bi[r, META] = 1  # was published as a flat bar
            changed = _merge(bi, bf, r, xi, xf, x)
            if closed:
                bi[r, META] |= DIRTY
                if changed:
                    bi[r, META] |= CLOSE_CHANGED
                _mark_revised(st, out, ctl, s, open_us)
        k += 1


@_inline
def _advance(st, out, ctl, s, open_us):  # type: ignore[no-untyped-def]
    """Make ``open_us`` (later than now) the open bar of level 0: seal it and every level whose interval ends."""
    levels = st.par[P_LEVELS]
    rows = s * st.par[P_ROWS]
    bi, bf = st.bar_i, st.bar_f
    lane = st.slot_i[s, KIND] == LANE
    for k in range(levels):
        tf = st.timeframe[k]
        xi, xf, x = bi, bf, rows + k
        if k == 0:
            xi, xf, x = st.hot_i, st.hot_f, s
        old_open = xi[x, OPEN]
        if open_us < old_open + tf:
            return
        if xi[x, COUNT] > 0:
            if lane and _at_lane_edge(st, s, k, old_open):
                _merge_upwards(st, out, ctl, st.slot_i[s, OWNER], k, xi, xf, x, xi[x, FIRST_T])
            else:
                _copy(bi, bf, _ring_row(st, s, k, old_open), xi, xf, x)
                if k + 1 < levels:
                    _merge(bi, bf, x + 1 if k > 0 else rows + 1, xi, xf, x)
        _clear(xi, x, open_us - open_us % tf)


@_inner
def _next_sealed(st, s, k, after, until):  # type: ignore[no-untyped-def]
    """Open time of the first sealed bar with trades after ``after``, at most ``until``: where flat bars are left out, the way is jumped."""
    first = s * st.par[P_ROWS] + st.ring_at[k]
    best = until
    for r in range(first, first + st.ring[k]):
        if after < st.bar_i[r, OPEN] < best and st.bar_i[r, COUNT] > 0:
            best = st.bar_i[r, OPEN]
    return best


@_inline
def _close_level(st, out, ctl, s, k, until):  # type: ignore[no-untyped-def]
    """Publish the bars of level ``k`` that open before ``until``; all of them are sealed."""
    levels = st.par[P_LEVELS]
    si, sf, bi, bf = st.slot_i, st.slot_f, st.bar_i, st.bar_f
    next_at, flat_at, published_at = SLOT_INTS + k, SLOT_INTS + levels + k, SLOT_INTS + 2 * levels + k
    tf = st.timeframe[k]
    if si[s, KIND] == LANE:
        until = min(until, si[s, LANE_HI] - si[s, LANE_HI] % tf)
    open_us = si[s, next_at]
    while open_us < until:
        r = _ring_row(st, s, k, open_us)
        if bi[r, OPEN] == open_us and bi[r, COUNT] > 0:
            if si[s, flat_at] > st.par[P_MAX_FLAT]:
                bi[r, META] |= BROKEN
            si[s, flat_at] = 0
            complete = _complete(st, s, k, open_us) and (bi[r, META] & BROKEN) == 0
            if complete or (bi[r, META] & ENDED) == 0 or bi[r, PUB] != bi[r, COUNT]:
                _write_bar(st, out, ctl, s, k, bi, bf, r, 1, complete)
                bi[r, META] = ((bi[r, META] & ~ENDED) + 1) & ~(DIRTY | CLOSE_CHANGED)
                bi[r, PUB] = bi[r, COUNT]
            sf[s, k] = bf[r, F_CLOSE]
            si[s, published_at] = min(si[s, published_at], open_us)
        elif si[s, published_at] != MAX64:
            if si[s, flat_at] < st.par[P_MAX_FLAT] and ctl[C_FLAT_BUDGET] > 0:
                _write_flat(st, out, ctl, s, k, open_us, sf[s, k], 0, _complete(st, s, k, open_us))
                si[s, flat_at] += 1
                ctl[C_FLAT_BUDGET] -= 1
            else:
                ctl[C_FLATS_LEFT_OUT] += 1
                si[s, flat_at] = st.par[P_MAX_FLAT] + 1
                if open_us + tf < until:
                    open_us = _next_sealed(st, s, k, open_us, until)
                    continue
        open_us += tf
    si[s, next_at] = max(si[s, next_at], open_us)


@_inline
def _most_rows(st, s, k):  # type: ignore[no-untyped-def]
    """Most rows that closing level ``k`` can write: sealed bars lie within one ring, flat bars before and after them."""
    left = st.par[P_MAX_FLAT] - st.slot_i[s, SLOT_INTS + st.par[P_LEVELS] + k]
    return st.ring[k] + 1 + max(left, 0) + st.par[P_MAX_FLAT]


@_inline
def _prefetch_to_close(st, members, at):  # type: ignore[no-untyped-def]
    """Fetch what closing the next slots will touch: what is known about a slot first, then the ring entry that its open bar goes to."""
    if at + 2 * AHEAD < members.shape[0]:
        s = members[at + 2 * AHEAD]
        width = st.slot_i.shape[1]
        for word in range(0, width, 8):
            prefetch(st.slot_i, s * width + word)
        for word in range(0, HOT_WORDS, 8):
            prefetch(st.hot_i, s * HOT_WORDS + word)
        prefetch(st.slot_f, s * st.slot_f.shape[1])
        above = (s * st.par[P_ROWS] + 1) * BAR_WORDS
        for word in range(0, BAR_WORDS, 8):
            prefetch(st.bar_i, above + word)
    if at + AHEAD < members.shape[0]:
        s = members[at + AHEAD]
        entry = _ring_row(st, s, 0, st.hot_i[s, OPEN]) * BAR_WORDS
        for word in range(0, BAR_WORDS, 8):
            prefetch(st.bar_i, entry + word)


@_inline
def _set_floors(st, out, t):  # type: ignore[no-untyped-def]
    """For each level, the end of the last interval that has ended at time ``t``."""
    for k in range(st.par[P_LEVELS]):
        out.floors[k] = t - t % st.timeframe[k]


@_inline
def _rows_to_close(st, out, s):  # type: ignore[no-untyped-def]
    """Upper bound of the rows that closing slot ``s`` up to ``out.floors`` writes."""
    need = 0
    lane_end = st.slot_i[s, LANE_HI]
    for k in range(st.par[P_LEVELS]):
        tf = st.timeframe[k]
        span = min(out.floors[k], lane_end) - st.slot_i[s, SLOT_INTS + k]
        if span == tf:
            need += 1
        elif span > 0:
            need += min(span // tf + 1, _most_rows(st, s, k))
    return need


@_inline
def _close_slot(st, out, ctl, s):  # type: ignore[no-untyped-def]
    """Publish every bar of slot ``s`` that ends at or before ``out.floors``."""
    if out.floors[0] > st.hot_i[s, OPEN]:
        _advance(st, out, ctl, s, out.floors[0])
    for k in range(st.par[P_LEVELS]):
        if out.floors[k] > st.slot_i[s, SLOT_INTS + k]:
            _close_level(st, out, ctl, s, k, out.floors[k])


@_inner
def _flush(st, out, ctl, s):  # type: ignore[no-untyped-def]
    """Publish again what late trades changed in slot ``s``: their bars and the flat bars after them."""
    si, sf, bi, bf = st.slot_i, st.slot_f, st.bar_i, st.bar_f
    levels = st.par[P_LEVELS]
    start = si[s, REV_FROM]
    si[s, REV_FROM] = MAX64
    if start == MAX64:
        return
    for k in range(levels):
        tf = st.timeframe[k]
        next_at, published_at = SLOT_INTS + k, SLOT_INTS + 2 * levels + k
        current = st.hot_i[s, OPEN] if k == 0 else bi[s * st.par[P_ROWS] + k, OPEN]
        open_us = max(start - start % tf, current - (st.ring[k] - 1) * tf)
        oldest_published = si[s, published_at]
        carried = False
        close = 0.0
        while open_us < si[s, next_at]:
            r = _ring_row(st, s, k, open_us)
            known = bi[r, OPEN] == open_us
            if known and bi[r, COUNT] > 0:
                if bi[r, META] & DIRTY:
                    carried = (bi[r, META] & CLOSE_CHANGED) != 0
                    bi[r, META] &= ~(DIRTY | CLOSE_CHANGED | ENDED)
                    _write_bar(st, out, ctl, s, k, bi, bf, r, 1, _complete(st, s, k, open_us) and (bi[r, META] & BROKEN) == 0)
                    bi[r, META] += 1
                    bi[r, PUB] = bi[r, COUNT]
                    si[s, published_at] = min(si[s, published_at], open_us)
                else:
                    carried = False
                close = bf[r, F_CLOSE]
            elif carried:
                if not known:
                    _clear(bi, r, open_us)
                    bi[r, META] = 1 if open_us >= oldest_published else 0
                _write_flat(st, out, ctl, s, k, open_us, close, bi[r, META] & REVISION_MASK, _complete(st, s, k, open_us))
                bi[r, META] += 1
            open_us += tf
        if carried:
            sf[s, k] = close


# --- ids ------------------------------------------------------------------------------------------------------------------------------


@_inline
def _sync_ids(st, m):  # type: ignore[no-untyped-def]
    """Write the growing interval back from the hot row."""
    at = st.slot_i[m, EXT_AT]
    if at >= 0:
        st.ids[m, at, ID_HI] = st.hot_i[m, EXT_HI]
        st.ids[m, at, ID_HI_T] = st.hot_i[m, EXT_T]


@_inline
def _find_id(st, m, tid):  # type: ignore[no-untyped-def]
    """Index of the last interval that begins at or below ``tid``, or -1."""
    lo, hi = 0, st.slot_i[m, ID_COUNT]
    while lo < hi:
        mid = (lo + hi) // 2
        if st.ids[m, mid, ID_LO] <= tid:
            lo = mid + 1
        else:
            hi = mid
    return lo - 1


@_inline
def _grow(st, m, at):  # type: ignore[no-untyped-def]
    """Let interval ``at`` be the one that grows in the hot row."""
    si, hot = st.slot_i, st.hot_i
    si[m, EXT_AT] = at
    hot[m, EXT_HI] = st.ids[m, at, ID_HI]
    hot[m, EXT_T] = st.ids[m, at, ID_HI_T]
    # the last id before the next interval goes the slow way, which joins the two
    hot[m, EXT_LIMIT] = st.ids[m, at + 1, ID_LO] - 1 if at + 1 < si[m, ID_COUNT] else MAX64


@_inner
def _forget_holes(st, m):  # type: ignore[no-untyped-def]
    """Join the lowest quarter of the intervals into one; ids up to FORGOTTEN can no longer be told apart from those in the holes."""
    ids, si = st.ids, st.slot_i
    quarter = max(st.par[P_IDS] // 4, 1)
    for i in range(1, quarter + 1):
        ids[m, 0, ID_LO_T] = min(ids[m, 0, ID_LO_T], ids[m, i, ID_LO_T])
        ids[m, 0, ID_HI_T] = max(ids[m, 0, ID_HI_T], ids[m, i, ID_HI_T])
    si[m, FORGOTTEN] = ids[m, quarter, ID_LO] - 1
    ids[m, 0, ID_HI] = ids[m, quarter, ID_HI]
    count = si[m, ID_COUNT] - quarter
    for i in range(1, count):
        for c in range(4):
            ids[m, i, c] = ids[m, i + quarter, c]
    si[m, ID_COUNT] = count


@_inline
def _add_id(st, m, tid, t):  # type: ignore[no-untyped-def]
    """Add an id that is in no interval."""
    ids, si = st.ids, st.slot_i
    at = _find_id(st, m, tid)
    count = si[m, ID_COUNT]
    joins_below = at >= 0 and ids[m, at, ID_HI] + 1 == tid
    joins_above = at + 1 < count and ids[m, at + 1, ID_LO] - 1 == tid
    if joins_below:
        ids[m, at, ID_HI] = tid
        ids[m, at, ID_HI_T] = max(ids[m, at, ID_HI_T], t)
        if joins_above:
            ids[m, at, ID_HI] = ids[m, at + 1, ID_HI]
            ids[m, at, ID_HI_T] = max(ids[m, at, ID_HI_T], ids[m, at + 1, ID_HI_T])
            for i in range(at + 1, count - 1):
                for c in range(4):
                    ids[m, i, c] = ids[m, i + 1, c]
            si[m, ID_COUNT] = count - 1
    elif joins_above:
        at += 1
        ids[m, at, ID_LO] = tid
        ids[m, at, ID_LO_T] = min(ids[m, at, ID_LO_T], t)
    else:
        if count == st.par[P_IDS]:
            _forget_holes(st, m)
            count = si[m, ID_COUNT]
            at = _find_id(st, m, tid)
            if at >= 0 and tid <= ids[m, at, ID_HI]:
                _grow(st, m, at)
                return
        at += 1
        for i in range(count, at, -1):
            for c in range(4):
                ids[m, i, c] = ids[m, i - 1, c]
        ids[m, at, ID_LO] = tid
        ids[m, at, ID_HI] = tid
        ids[m, at, ID_LO_T] = t
        ids[m, at, ID_HI_T] = t
        si[m, ID_COUNT] = count + 1
    _grow(st, m, at)


# --- rows -----------------------------------------------------------------------------------------------------------------------------


@_inline
def _start_slot(st, s, open_us, t):  # type: ignore[no-untyped-def]
    """First trade of a slot: its open bars begin here."""
    levels = st.par[P_LEVELS]
    si = st.slot_i
    si[s, STARTED] = 1
    if si[s, COVERED_FROM] == MAX64:
        si[s, COVERED_FROM] = t
    for k in range(levels):
        first = open_us - open_us % st.timeframe[k]
        si[s, SLOT_INTS + k] = first
        si[s, SLOT_INTS + levels + k] = 0
        si[s, SLOT_INTS + 2 * levels + k] = MAX64
        if k == 0:
            _clear(st.hot_i, s, first)
        else:
            _clear(st.bar_i, s * st.par[P_ROWS] + k, first)


@_inline
def _end_gap(st, m, tid, t):  # type: ignore[no-untyped-def]
    """The first new trade after all sources of a symbol had ended: consecutive ids prove that nothing is missing in between."""
    si = st.slot_i
    if si[m, GAP_FROM] == MAX64 or si[m, GAP_TO] != MAX64:
        return
    top = si[m, ID_COUNT] - 1
    if top >= 0 and st.ids[m, top, ID_HI] + 1 == tid:
        si[m, GAP_FROM] = MAX64
    elif t > si[m, GAP_FROM]:
        si[m, GAP_TO] = t


@_inline
def _see(st, s, m, tid, t):  # type: ignore[no-untyped-def]
    """Note an accepted trade of slot ``s`` in the ids of its symbol's slot ``m``."""
    if s == m:
        _end_gap(st, m, tid, t)
    _add_id(st, m, tid, t)
    if st.slot_i[m, GAP_FROM] != MAX64 and st.slot_i[m, GAP_TO] == MAX64:
        st.hot_i[m, EXT_LIMIT] = -1  # still open: look again at the next trade


@_inline
def _slow_row(st, out, ctl, s, newcomer, t, tid, price, size, buy, receive):  # type: ignore[no-untyped-def]
    """A trade that is not the next one of its symbol in the open bar. Returns (action, slot whose open bar takes it)."""
    si, hot = st.slot_i, st.hot_i
    base = st.par[P_BASE]
    m = si[s, OWNER]
    open_us = t - t % base
    # the next id of the interval that grows needs no look at the others, which are seldom in the cache
    next_id = s == m and tid == hot[m, EXT_HI] + 1 and tid < hot[m, EXT_LIMIT]
    if not next_id:
        _sync_ids(st, m)
        at = _find_id(st, m, tid)
        if at >= 0 and tid <= st.ids[m, at, ID_HI]:
            if tid <= si[m, FORGOTTEN]:
                return _ACTION_LATE, s  # seen or in a forgotten hole: cannot be told apart, so it is not dropped in silence
            return _ACTION_DUPLICATE, s
    if si[s, KIND] == LANE and _at_lane_edge(st, s, 0, open_us):
        s = m
    if si[s, STARTED] == 0:
        _start_slot(st, s, open_us, t)
    current = hot[s, OPEN]
    if open_us > current:
        need = 0
        for k in range(st.par[P_LEVELS]):
            limit = open_us - open_us % st.timeframe[k] - (st.ring[k] - 1) * st.timeframe[k]
            bars = (limit - si[s, SLOT_INTS + k]) // st.timeframe[k]
            if bars > 0:
                need += min(bars, _most_rows(st, s, k))
        # the rings are too small for all that waits for the watermark: the oldest bars close early
        displaced = need > 0
        revised = si[s, REV_FROM] < open_us - (st.ring[0] - 1) * base
        if displaced or revised:
            need += st.par[P_REVISABLE]
            if ctl[C_OUT] + need > out.i8.shape[1]:
                ctl[C_NEED] = need
                return _ACTION_NEED_OUT, s
            _flush(st, out, ctl, s)
        _advance(st, out, ctl, s, open_us)
        if displaced:
            for k in range(st.par[P_LEVELS]):
                limit = open_us - open_us % st.timeframe[k] - (st.ring[k] - 1) * st.timeframe[k]
                if limit > si[s, SLOT_INTS + k]:
                    _close_level(st, out, ctl, s, k, limit)
    elif open_us < current:
        closed = si[s, SLOT_INTS]
        published = si[s, SLOT_INTS + 2 * st.par[P_LEVELS]] != MAX64
        if open_us <= current - st.ring[0] * base or (published and open_us < closed and t < closed - st.par[P_WINDOW]):
            # A hole between two stretches of ids that ends before this symbol's newest stretch: an older stretch being filled in.
            _sync_ids(st, m)
            at = _find_id(st, m, tid)
            if newcomer and si[s, KIND] == MAIN and at + 1 < si[m, ID_COUNT]:
                lo = st.ids[m, at, ID_HI_T] if at >= 0 else np.int64(0)
                hi = st.ids[m, at + 1, ID_LO_T]
                # the next id may lie in the second that the stretch before it ended in: that stretch may go on
                if (open_us > lo or (at >= 0 and tid == st.ids[m, at, ID_HI] + 1)) and open_us + base <= hi:
                    ctl[C_LANE_LO] = lo
                    ctl[C_LANE_HI] = hi
                    return _ACTION_NEED_LANE, s
            return _ACTION_LATE, s
        _see(st, s, m, tid, t)
        x = s * st.par[P_ROWS]
        _clear(st.bar_i, x, open_us)
        _add_trade(st.bar_i, st.bar_f, x, t, tid, price, size, price * size, buy, receive)
        if published and open_us < closed:
            ctl[C_LATE] += 1
        _merge_upwards(st, out, ctl, s, 0, st.bar_i, st.bar_f, x, t)
        return _ACTION_DONE, s
    if next_id:
        hot[m, EXT_HI] = tid
        hot[m, EXT_T] = max(hot[m, EXT_T], t)
    else:
        _see(st, s, m, tid, t)
    return _ACTION_HOT, s


@_inner
def _why_refused(st, ctl, price, size, t, tid, receive):  # type: ignore[no-untyped-def]
    """Reason code of a row whose values cannot be used."""
    if not (np.isfinite(price) and np.isfinite(size)):
        return R_NOT_FINITE
    if not (0.0 < price < MAX_VALUE):
        return R_PRICE
    if not (0.0 <= size < MAX_VALUE):
        return R_SIZE
    if not (0 <= tid < MAX64):
        return R_ID
    return R_TIME


@_inner
def _reject(out, ctl, row, reason):  # type: ignore[no-untyped-def]
    n = ctl[C_REJECTED]
    out.rejected_row[n] = row
    out.rejected_reason[n] = reason
    ctl[C_REJECTED] = n + 1


@_inline
def _rows(st, out, rows, code_map, ctl):  # type: ignore[no-untyped-def]
    """Add the frame's rows from ``ctl[C_POS]`` on."""
    hot, hot_f = st.hot_i, st.hot_f
    base = st.par[P_BASE]
    live = st.par[P_LIVE] > 0
    max_t, min_t, ever, future = ctl[C_MAX_T], st.par[P_MIN_T], st.par[P_MAX_T], st.par[P_FUTURE]
    clock = ctl[C_CLOCK]
    accepted = 0
    status = DONE
    symbols = code_map.shape[0]
    n = rows.code.shape[0]
    i = ctl[C_POS]
    while i < n:
        if i + AHEAD < n:
            # With thousands of symbols the next rows are not in the first cache: fetch them while this one is worked on.
            c = rows.code[i + AHEAD]
            if 0 <= c < symbols and code_map[c] >= 0:
                word = (code_map[c] & SLOT_MASK) * HOT_WORDS
                prefetch(hot, word)
                prefetch(hot, word + 8)
                prefetch(hot, word + 16)
        c = rows.code[i]
        price, size, t, tid, receive = rows.price[i], rows.size[i], rows.time[i], rows.trade_id[i], rows.receive[i]
        if not (
            (price > 0.0)
            & (price < MAX_VALUE)
            & (size >= 0.0)
            & (size < MAX_VALUE)
            & (tid >= 0)
            & (tid < MAX64)
            & (t >= min_t)
            & (t <= max_t)
            & (receive >= 0)
            & (receive < ever)
            & ((receive == 0) | (t <= receive + future))
        ):
            _reject(out, ctl, i, _why_refused(st, ctl, price, size, t, tid, receive))
            i += 1
            continue
        if c < 0 or c >= symbols:
            _reject(out, ctl, i, R_BAD_SYMBOL)
            i += 1
            continue
        mapped = code_map[c]
        if mapped < 0:
            if mapped == UNMAPPED:
                status = NEED_SLOT
                break
            _reject(out, ctl, i, R_FULL)
            i += 1
            continue
        s = mapped & SLOT_MASK
        buy = size if rows.side[i] > 0 else 0.0
        open_us = hot[s, OPEN]
        if tid == hot[s, EXT_HI] + 1 and tid < hot[s, EXT_LIMIT] and t >= open_us and t < open_us + base:
            hot[s, EXT_HI] = tid
            hot[s, EXT_T] = max(hot[s, EXT_T], t)
            action = _ACTION_HOT
        else:
            action, s = _slow_row(st, out, ctl, s, mapped >= NEWCOMER, t, tid, price, size, buy, receive)
            if action == _ACTION_NEED_OUT:
                status = NEED_OUT
                break
            if action == _ACTION_NEED_LANE:
                status = NEED_LANE
                break
            if action == _ACTION_DUPLICATE:
                ctl[C_DUPLICATES] += 1
                i += 1
                continue
            if action == _ACTION_LATE:
                _reject(out, ctl, i, R_TOO_LATE)
                i += 1
                continue
            code_map[c] = mapped & SLOT_MASK
        if action == _ACTION_HOT:
            _add_trade(hot, hot_f, s, t, tid, price, size, price * size, buy, receive)
        if live and hot[s, LIVE_STATE] == CLEAN:
            hot[s, LIVE_STATE] = TOUCHED
            out.touched[ctl[C_TOUCHED]] = s
            ctl[C_TOUCHED] += 1
        clock = max(clock, receive)
        accepted += 1
        i += 1
    ctl[C_CLOCK] = clock
    ctl[C_ACCEPTED] += accepted
    ctl[C_POS] = i
    return status


# --- live rows and the end of a source ------------------------------------------------------------------------------------------------


@_inline
def _write_open(st, out, ctl, s, ending):  # type: ignore[no-untyped-def]
    """Write the open bars of every level: live rows, or the last ones of a source that has ended."""
    levels = st.par[P_LEVELS]
    x = s * st.par[P_ROWS]
    bi, bf = st.bar_i, st.bar_f
    bi[x, COUNT] = 0
    for k in range(levels):
        if k == 0:
            _merge(bi, bf, x, st.hot_i, st.hot_f, s)
            meta, published, open_us = st.hot_i[s, META], st.hot_i[s, PUB], st.hot_i[s, OPEN]
        else:
            _merge(bi, bf, x, bi, bf, x + k)
            meta, published, open_us = bi[x + k, META], bi[x + k, PUB], bi[x + k, OPEN]
        if bi[x, COUNT] == 0:
            continue
        if ending and (published == bi[x, COUNT] or (st.slot_i[s, KIND] == LANE and _at_lane_edge(st, s, k, open_us))):
            continue
        bi[x, OPEN] = open_us
        bi[x, META] = meta
        covered = not ending and _complete(st, s, k, open_us) and st.slot_i[s, SLOT_INTS + levels + k] <= st.par[P_MAX_FLAT]
        _write_bar(st, out, ctl, s, k, bi, bf, x, 1 if ending else 0, covered)
        if ending:
            if k == 0:
                st.hot_i[s, META] = (meta + 1) | ENDED
                st.hot_i[s, PUB] = bi[x, COUNT]
            else:
                bi[x + k, META] = (meta + 1) | ENDED
                bi[x + k, PUB] = bi[x, COUNT]


@_inner
def _live(st, out, ctl):  # type: ignore[no-untyped-def]
    """Write the live rows that are due: of symbols that waited in the wheel, then of those that traded in this frame."""
    hot, si = st.hot_i, st.slot_i
    interval = st.par[P_LIVE]
    grain = max(interval // 16, 1)
    clock = ctl[C_CLOCK]
    levels = st.par[P_LEVELS]
    now = clock // grain
    while ctl[C_WHEEL_AT] < now:
        at = max(ctl[C_WHEEL_AT] + 1, now - WHEEL + 1)
        bucket = at % WHEEL
        s = st.wheel[bucket]
        while s >= 0:
            if ctl[C_OUT] + levels > out.i8.shape[1]:
                ctl[C_NEED] = levels
                return NEED_OUT
            if hot[s, LIVE_STATE] == WAITING:
                hot[s, LIVE_AT] = clock
                _write_open(st, out, ctl, s, False)
            hot[s, LIVE_STATE] = CLEAN
            s = si[s, WHEEL_NEXT]
            st.wheel[bucket] = s
        ctl[C_WHEEL_AT] = at
    while ctl[C_POS] < ctl[C_TOUCHED]:
        s = out.touched[ctl[C_POS]]
        if ctl[C_OUT] + levels > out.i8.shape[1]:
            ctl[C_NEED] = levels
            return NEED_OUT
        if clock - hot[s, LIVE_AT] >= interval:
            hot[s, LIVE_STATE] = CLEAN
            hot[s, LIVE_AT] = clock
            _write_open(st, out, ctl, s, False)
        else:
            hot[s, LIVE_STATE] = WAITING
            bucket = ((hot[s, LIVE_AT] + interval) // grain + 1) % WHEEL
            si[s, WHEEL_NEXT] = st.wheel[bucket]
            st.wheel[bucket] = s
        ctl[C_POS] += 1
    return DONE


@_inner
def _flush_revised(st, out, ctl):  # type: ignore[no-untyped-def]
    """Publish again what this frame's late trades changed."""
    while ctl[C_REV_AT] < ctl[C_REVISED]:
        if ctl[C_OUT] + st.par[P_REVISABLE] > out.i8.shape[1]:
            ctl[C_NEED] = st.par[P_REVISABLE]
            return NEED_OUT
        s = out.revised[ctl[C_REV_AT]]
        st.slot_i[s, REV_LISTED] = 0
        _flush(st, out, ctl, s)
        ctl[C_REV_AT] += 1
    ctl[C_REVISED] = 0
    ctl[C_REV_AT] = 0
    return DONE


@_inner
def _end_slots(st, out, ctl, ended):  # type: ignore[no-untyped-def]
    """Close the slots that no source feeds any more: everything before the open bar is final, the open bar is published unfinished."""
    si, hot = st.slot_i, st.hot_i
    while ctl[C_POS] < ended.shape[0]:
        s = ended[ctl[C_POS]]
        if si[s, STARTED]:
            t = max(ctl[C_WATERMARK], hot[s, OPEN])
            _set_floors(st, out, t)
            need = _rows_to_close(st, out, s) + st.par[P_LEVELS] + 2 * st.par[P_REVISABLE]
            if ctl[C_OUT] + need > out.i8.shape[1]:
                ctl[C_NEED] = need
                return NEED_OUT
            _flush(st, out, ctl, s)
            _close_slot(st, out, ctl, s)
            _write_open(st, out, ctl, s, True)
            if hot[s, LIVE_STATE] == WAITING:
                hot[s, LIVE_STATE] = DROPPED
            if si[s, KIND] == LANE:
                # what lies in intervals that the symbol's own slot has trades of goes there; otherwise the open bars can go on
                top = st.timeframe[st.par[P_LEVELS] - 1]
                open_us = hot[s, OPEN] - hot[s, OPEN] % top
                if _at_lane_edge(st, s, st.par[P_LEVELS] - 1, open_us):
                    _advance(st, out, ctl, s, open_us + top)
            elif si[s, GAP_FROM] == MAX64 or si[s, GAP_TO] != MAX64:
                if si[s, GAP_TO] != MAX64:
                    si[s, COVERED_FROM] = max(si[s, COVERED_FROM], si[s, GAP_TO])
                si[s, GAP_FROM] = t
                si[s, GAP_TO] = MAX64
                _sync_ids(st, s)
                hot[s, EXT_LIMIT] = -1  # the next trade goes the slow way, which looks at the gap
        ctl[C_POS] += 1
    return DONE


@njit(cache=True, nogil=True, _nrt=False)
def step(st, out, rows, code_map, members, ended, ctl):  # type: ignore[no-untyped-def]
    """Process one frame from where ``ctl`` says; returns DONE or what it needs before it is called again.

    Args:
        st: State, changed in place.
        out: Out, appended to.
        rows: Rows of the frame.
        code_map: int32, slot of each symbol code, UNMAPPED or REFUSED; with bit NEWCOMER.
        members: int32, slots to close up to the watermark.
        ended: int32, slots that end with this frame, lanes first.
        ctl: int64, see the C_ constants.
    """
    if ctl[C_STAGE] == 0:
        status = _rows(st, out, rows, code_map, ctl)
        if status != DONE:
            return status
        ctl[C_STAGE], ctl[C_POS] = 1, 0
    return step_rest(st, out, members, ended, ctl)


@_inner
def step_rest(st, out, members, ended, ctl):  # type: ignore[no-untyped-def]
    """What follows the rows: revisions, closings, live rows, ends."""
    if ctl[C_STAGE] == 1:
        status = _flush_revised(st, out, ctl)
        if status != DONE:
            return status
        ctl[C_STAGE], ctl[C_POS] = 2, 0
    if ctl[C_STAGE] == 2:
        _set_floors(st, out, ctl[C_WATERMARK])
        while ctl[C_POS] < members.shape[0]:
            _prefetch_to_close(st, members, ctl[C_POS])
            s = members[ctl[C_POS]]
            if st.slot_i[s, STARTED] and out.floors[0] > st.slot_i[s, SLOT_INTS]:
                need = _rows_to_close(st, out, s)
                revised = st.slot_i[s, REV_FROM] != MAX64
                if revised:
                    need += st.par[P_REVISABLE]
                if ctl[C_OUT] + need > out.i8.shape[1]:
                    ctl[C_NEED] = need
                    return NEED_OUT
                if revised:
                    _flush(st, out, ctl, s)
                _close_slot(st, out, ctl, s)
            ctl[C_POS] += 1
        ctl[C_STAGE], ctl[C_POS] = 3, 0
    if ctl[C_STAGE] == 3:
        if st.par[P_LIVE] > 0:
            status = _live(st, out, ctl)
            if status != DONE:
                return status
        ctl[C_STAGE], ctl[C_POS] = 4, 0
    if ctl[C_STAGE] == 4:
        status = _end_slots(st, out, ctl, ended)
        if status != DONE:
            return status
        ctl[C_STAGE], ctl[C_POS] = 5, 0
    return _flush_revised(st, out, ctl)
