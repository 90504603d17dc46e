"""The compiled part of the data quality checks: columns of trades in, suspects and confirmations out, state changed in place.

One pass over the rows of a frame. A trade that is in order, inside its band and of usual size costs one comparison of seven and one update of
three running values (:func:`check_rows`); everything else takes :func:`_judge`. State is one row of 8-byte words a symbol and source, seen
through two views of the same memory, one of integers and one of floats; the first cache line is all that a usual trade needs.

All compiled functions stand in this one file: numba looks only at this file's time when it decides whether its cached machine code is good.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from processors._prefetch import prefetch

_inner = njit(_nrt=False)
_inline = njit(_nrt=False, forceinline=True)

AHEAD = 12
"""Rows whose state is fetched ahead, as in the bar kernel: with thousands of symbols it is not in the first cache."""


# Line 0, what a usual trade needs: band (empty where each trade must be judged), last price, typical move, typical size, time and id of the
# last trade in order, trades passed since the last score.
F_LOW, F_HIGH, F_LAST, F_MOVE, F_SIZE = range(5)
TIME, ID, PASSED = 5, 6, 7
# Line 1: trades learned from (stops counting when warm), suspects that may still be confirmed (0 or 1), suspects in a row, trades inside the
# band since the last suspect; the newest suspect: its price, reason, how many agree with it and the time of the first of them.
SEEN, PENDING, RUN, SINCE = 8, 9, 10, 11
F_NEAR = 12
NEAR_REASON, NEAR_COUNT, NEAR_FROM = 13, 14, 15
# Line 2: time and id of the newest suspect, prices that the run of suspects spans, trades in a row that were not in order, the price before the
# last jump and its time, score.
SUSPECT_TIME, SUSPECT_ID = 16, 17
F_RUN_LOW, F_RUN_HIGH = 18, 19
LATE_RUN = 20
F_BEFORE = 21
JUMP_TIME = 22
F_SCORE = 23
# Line 3: counts since the last score.
BAD_VALUES, BAD_TIMES, HELD, CONFIRMED, SPIKES = range(24, 29)
# ... and the prices that the suspects which agree span.
F_NEAR_LOW, F_NEAR_HIGH = 29, 30
SLOT_WORDS = 32

# ``par``: settings as floats.
(
    P_SHARE,
    P_MOVES,
    P_MEMORY,
    P_CLIP,
    P_SPIKE,
    P_SIZE_MEMORY,
    P_STRETCH_US,
    P_WIDEST,
    P_FIRST_SHARE,
    P_WITNESSES,
    P_MOST_WITNESSES,
    P_RUN,
    P_FORGET,
    P_AHEAD_US,
    P_LATE_RUN,
    P_WARM,
) = range(16)
PARAMS = 16

# ``limits`` of a frame: the times that the bar engine takes, and beyond which time a trade is suspect.
L_MIN_T, L_MAX_T, L_EVER, L_FUTURE, L_SUSPECT_T = range(5)
LIMITS = 5

# Events: row and kind; floats: band.
HOLD, CONFIRM, FORGET = 1, 2, 3
REASON_ANY, REASON_PRICE, REASON_TIME = 0, 1, 2
E_ROW, E_KIND, E_REASON, E_SLOT = range(4)

MAX_VALUE = 1e18
"""As in the bar kernel: it refuses prices and sizes from here on."""
MAX_ID = np.int64(2**62)
LOWEST = 1e-3
STRAY_RUN, STRAY_US = 3, 1_000_000
"""After so many late trades in a row, newer than the last one in order, a suspect that is so far ahead of them is the stray one."""
"""The band never reaches below this share of the price, so that it is above 0."""
_EMPTY_LOW, _EMPTY_HIGH = np.inf, -np.inf
_PASS = 0


@_inline
def _learn(qf, qi, s, price, size, t, tid, moves, share, memory, clip, size_memory):  # type: ignore[no-untyped-def]
    """Take a trade in order into what is typical, and set the band around it."""
    # Written so that the next trade waits for few operations of this one: old + memory * (min(new, clip * old + least) - old).
    move = qf[s, F_MOVE]
    change = abs(price - qf[s, F_LAST])
    kept = 1.0 - memory
    # Clipped, so that one wild trade widens the band by a bounded factor; ``least`` keeps a market that stood still able to learn.
    least = memory * (share / moves) * price
    learned = min(kept * move + memory * change, (kept + memory * clip) * move + least)
    # Trades at the same price say nothing about the size of a move: without them the typical move never falls below a tick.
    move = learned if change > 0.0 else move
    half = moves * move + share * price
    usual = qf[s, F_SIZE]
    qf[s, F_MOVE] = move
    qf[s, F_LAST] = price
    qf[s, F_LOW] = max(price - half, LOWEST * price)
    qf[s, F_HIGH] = price + half
    qf[s, F_SIZE] = min((1.0 - size_memory) * usual + size_memory * size, (1.0 - size_memory + size_memory * clip) * usual)
    qi[s, TIME] = t
    qi[s, ID] = tid


@_inline
def _half(qf, qi, s, price, t, at, par):  # type: ignore[no-untyped-def]
    """Half the band around ``price``, as known at ``at``, for a trade at ``t``: the market may have moved on in a silence."""
    share = max(par[P_SHARE], par[P_FIRST_SHARE] / (qi[s, SEEN] + 1))
    stretch = np.sqrt(1.0 + abs(t - at) / par[P_STRETCH_US])
    # what was never seen to move is not trusted with more than its own widest share, however long it was silent
    return par[P_MOVES] * qf[s, F_MOVE] * stretch + min(share * stretch, par[P_WIDEST]) * price


@_inline
def _settle(qi, s):  # type: ignore[no-untyped-def]
    """No suspect is waiting any more."""
    for word in (PENDING, RUN, SINCE, NEAR_COUNT, LATE_RUN, SUSPECT_TIME, SUSPECT_ID):
        qi[s, word] = 0


@_inner
def _begin(qf, qi, s, price, size, t, tid):  # type: ignore[no-untyped-def]
    """First trade of a slot, or of a slot that starts anew."""
    qf[s, F_LOW], qf[s, F_HIGH] = _EMPTY_LOW, _EMPTY_HIGH
    qf[s, F_LAST] = price
    qf[s, F_MOVE] = 0.0
    qf[s, F_SIZE] = size
    qi[s, TIME], qi[s, ID] = t, tid
    qi[s, SEEN] = 1
    qi[s, JUMP_TIME] = 0
    _settle(qi, s)


@_inner
def _accept(qf, qi, s, price, size, t, tid, in_order, band, par):  # type: ignore[no-untyped-def]
    """A trade inside its band: FORGET when it is the last evidence against the suspects waiting, CONFIRM when it explains them."""
    if qi[s, SEEN] >= par[P_WARM] and size > par[P_SPIKE] * qf[s, F_SIZE] > 0.0:
        qi[s, SPIKES] += 1
    if in_order:
        qi[s, LATE_RUN] = 0
        seen = qi[s, SEEN]
        if seen < par[P_WARM]:
            # what is typical is a plain mean at first, then one that forgets
            memory = max(par[P_MEMORY], 1.0 / seen)
            size_memory = max(par[P_SIZE_MEMORY], 1.0 / (seen + 1))
            clip = np.inf if seen == 1 else par[P_CLIP]
            qi[s, SEEN] = seen + 1
        else:
            memory, size_memory, clip = par[P_MEMORY], par[P_SIZE_MEMORY], par[P_CLIP]
        if clip == np.inf:
            qf[s, F_MOVE] = abs(price - qf[s, F_LAST])
            clip = par[P_CLIP]
        _learn(qf, qi, s, price, size, t, tid, par[P_MOVES], par[P_SHARE], memory, clip, size_memory)
    else:
        qi[s, LATE_RUN] += 1
        if qi[s, LATE_RUN] >= par[P_LATE_RUN]:
            # the venue's clock or its ids went back for good: nothing would be learned any more
            _begin(qf, qi, s, price, size, t, tid)
            return FORGET
    answer = _PASS
    if qi[s, PENDING]:
        near = qf[s, F_NEAR]
        if in_order and qi[s, NEAR_REASON] == REASON_PRICE and abs(price - near) <= 0.5 * _half(qf, qi, s, near, t, t, par):
            # the market went most of the way there: the suspect was the first to, and only just outside
            band[0], band[1] = min(qf[s, F_NEAR_LOW], price), max(qf[s, F_NEAR_HIGH], price)
            _settle(qi, s)
            if qi[s, SEEN] < par[P_WARM]:
                qf[s, F_LOW], qf[s, F_HIGH] = _EMPTY_LOW, _EMPTY_HIGH
            return CONFIRM
        qi[s, RUN] = 0
        qi[s, SINCE] += 1
        if qi[s, SINCE] >= par[P_FORGET]:
            _settle(qi, s)
            answer = FORGET
    if qi[s, PENDING] or qi[s, SEEN] < par[P_WARM]:
        qf[s, F_LOW], qf[s, F_HIGH] = _EMPTY_LOW, _EMPTY_HIGH
    return answer


@_inner
def _suspect(qf, qi, s, price, size, t, tid, reason, band, par):  # type: ignore[no-untyped-def]
    """A trade that does not fit: HOLD, or CONFIRM when it shows that the market has moved. ``band``: low and high, in and out."""
    fresh = t > qi[s, SUSPECT_TIME] or (t == qi[s, SUSPECT_TIME] and tid > qi[s, SUSPECT_ID])
    confirmed = False
    if not fresh:
        qi[s, LATE_RUN] += 1
        if qi[s, LATE_RUN] >= par[P_LATE_RUN]:
            _begin(qf, qi, s, price, size, t, tid)
            return FORGET
        # One print ahead in time made everything behind it look late, and nothing could bear witness of a move. Two of them may be the
        # slower half of a feed whose other half has gone on; they leave its witnesses alone.
        if (
            qi[s, LATE_RUN] >= STRAY_RUN
            and qi[s, SUSPECT_TIME] - t > STRAY_US
            and (t > qi[s, TIME] or (t == qi[s, TIME] and tid > qi[s, ID]))
        ):
            qi[s, NEAR_COUNT] = qi[s, RUN] = 0
            fresh = True
    if fresh:
        last, near = qf[s, F_LAST], qf[s, F_NEAR]
        agrees = qi[s, NEAR_COUNT] > 0 and qi[s, NEAR_REASON] == reason
        if reason == REASON_PRICE:
            agrees = agrees and abs(price - near) <= _half(qf, qi, s, near, t, qi[s, SUSPECT_TIME], par)
        else:
            agrees = agrees and abs(t - qi[s, SUSPECT_TIME]) <= par[P_AHEAD_US]
        if agrees:
            qi[s, NEAR_COUNT] += 1
        else:
            qi[s, NEAR_COUNT] = 1
            qi[s, NEAR_FROM] = t
            qi[s, NEAR_REASON] = reason
            qf[s, F_NEAR_LOW] = qf[s, F_NEAR_HIGH] = price
        qf[s, F_NEAR_LOW] = min(qf[s, F_NEAR_LOW], price)
        qf[s, F_NEAR_HIGH] = max(qf[s, F_NEAR_HIGH], price)
        qi[s, RUN] += 1
        if qi[s, RUN] == 1:
            qf[s, F_RUN_LOW] = qf[s, F_RUN_HIGH] = price
        qf[s, F_RUN_LOW] = min(qf[s, F_RUN_LOW], price)
        qf[s, F_RUN_HIGH] = max(qf[s, F_RUN_HIGH], price)
        qi[s, SUSPECT_TIME], qi[s, SUSPECT_ID] = t, tid
        qf[s, F_NEAR] = price
        qi[s, SINCE] = 0
        # One order that eats through the book fills many times in one instant: only a later trade is a witness.
        count = qi[s, NEAR_COUNT]
        agreed = (count >= par[P_WITNESSES] and t > qi[s, NEAR_FROM]) or count >= par[P_MOST_WITNESSES]
        in_a_row = qi[s, RUN] >= par[P_RUN]
        confirmed = agreed or in_a_row
        if confirmed:
            if qi[s, SEEN] == 0:
                _begin(qf, qi, s, price, size, t, tid)
                band[0], band[1] = -np.inf, np.inf
                return CONFIRM
            half = _half(qf, qi, s, price, t, t, par)
            # what lies on the way from the old level to the new one is explained, and whatever the witnesses themselves traded at
            band[0] = min(min(price, last) - half, qf[s, F_NEAR_LOW])
            band[1] = max(max(price, last) + half, qf[s, F_NEAR_HIGH])
            if in_a_row:
                band[0], band[1] = min(band[0], qf[s, F_RUN_LOW]), max(band[1], qf[s, F_RUN_HIGH])
            qf[s, F_BEFORE] = last
            qi[s, JUMP_TIME] = qi[s, NEAR_FROM]
            # What has jumped moves more than before: the band is doubled or learns the whole jump, unclipped, and learns back.
            move = qf[s, F_MOVE]
            learned = move + max(par[P_MEMORY], 1.0 / qi[s, SEEN]) * (abs(price - last) - move)
            qf[s, F_MOVE] = max(max(2.0 * move, learned), par[P_SHARE] * price / par[P_MOVES])
            qf[s, F_LAST] = price
            half = _half(qf, qi, s, price, t, t, par)
            qf[s, F_LOW], qf[s, F_HIGH] = max(price - half, LOWEST * price), price + half
            qi[s, TIME], qi[s, ID] = t, tid
            _settle(qi, s)
            if qi[s, SEEN] < par[P_WARM]:
                qf[s, F_LOW], qf[s, F_HIGH] = _EMPTY_LOW, _EMPTY_HIGH
            return CONFIRM
    qi[s, PENDING] = 1
    qi[s, HELD] += 1
    qf[s, F_LOW], qf[s, F_HIGH] = _EMPTY_LOW, _EMPTY_HIGH
    return HOLD


@_inner
def _judge(qf, qi, s, price, size, t, tid, receive, limits, band, par):  # type: ignore[no-untyped-def]
    """Look closely at a trade: (what to do, reason). ``band`` gets what it was held against or the prices that are confirmed."""
    usable = (
        (price > 0.0)
        & (price < MAX_VALUE)
        & (size >= 0.0)
        & (size < MAX_VALUE)
        & (tid >= 0)
        & (tid < MAX_ID)
        & (t >= limits[L_MIN_T])
        & (t <= limits[L_MAX_T])
        & (receive >= 0)
        & (receive < limits[L_EVER])
        & ((receive == 0) | (t <= receive + limits[L_FUTURE]))
    )
    if not usable:
        return _PASS, REASON_ANY  # the bar engine refuses it, with its reason
    if qi[s, SEEN] == 0:
        if t <= limits[L_SUSPECT_T]:
            _begin(qf, qi, s, price, size, t, tid)
            return _PASS, REASON_ANY
        band[0], band[1] = -1.0, -1.0
        return _suspect(qf, qi, s, price, size, t, tid, REASON_TIME, band, par), REASON_TIME
    last, last_t = qf[s, F_LAST], qi[s, TIME]
    half = _half(qf, qi, s, last, t, last_t, par)
    reason = REASON_ANY
    if t > max(limits[L_SUSPECT_T], last_t + par[P_AHEAD_US]):
        reason = REASON_TIME
    elif abs(price - last) > half or price < LOWEST * last:
        before = qf[s, F_BEFORE]
        late = 0 < t < qi[s, JUMP_TIME]
        if not late or abs(price - before) > _half(qf, qi, s, before, t, qi[s, JUMP_TIME], par):
            reason = REASON_PRICE
    if reason == REASON_ANY:
        in_order = t > last_t or (t == last_t and tid > qi[s, ID])
        kind = _accept(qf, qi, s, price, size, t, tid, in_order, band, par)
        return kind, REASON_PRICE if kind == CONFIRM else reason
    band[0], band[1] = max(last - half, LOWEST * last), last + half
    return _suspect(qf, qi, s, price, size, t, tid, reason, band, par), reason


@njit(cache=True, nogil=True, _nrt=False)
def check_rows(qf, qi, rows, slots, limits, par, events, bands):  # type: ignore[no-untyped-def]
    """Check a frame's rows; number of events, or -1 when a symbol has no slot yet (nothing is changed then).

    Args:
        qf, qi: float64 and int64, shape (n, SLOT_WORDS), the same memory.
        rows: ``_bars_kernel.Rows`` of the frame.
        slots: int32, slot of each symbol code; -1 none yet, -2 not checked.
        limits: int64, see L_.
        par: float64, see P_.
        events: int64, shape (at least rows, 4): row, kind, reason, slot; in the order of the rows, at most one a row.
        bands: float64, shape (at least rows, 2): HOLD: the band the row was held against; CONFIRM: prices that are released.
    """
    symbols = slots.shape[0]
    for code in range(symbols):
        if slots[code] == -1:
            return -1
    share, moves, memory, clip = par[P_SHARE], par[P_MOVES], par[P_MEMORY], par[P_CLIP]
    size_memory, spike = par[P_SIZE_MEMORY], par[P_SPIKE]
    latest = min(limits[L_SUSPECT_T], limits[L_MAX_T])
    count = 0
    total = rows.code.shape[0]
    for i in range(total):
        if i + AHEAD < total:
            code = rows.code[i + AHEAD]
            if 0 <= code < symbols and slots[code] >= 0:
                prefetch(qi, slots[code] * SLOT_WORDS)
        code = rows.code[i]
        if code < 0 or code >= symbols or slots[code] < 0:
            continue
        s = slots[code]
        price, size, t, tid = rows.price[i], rows.size[i], rows.time[i], rows.trade_id[i]
        last_t = qi[s, TIME]
        qi[s, PASSED] += 1
        if (
            (price >= qf[s, F_LOW])
            & (price <= qf[s, F_HIGH])
            & (size >= 0.0)
            & (size <= spike * qf[s, F_SIZE])
            & (t <= latest)
            & ((t > last_t) | ((t == last_t) & (tid > qi[s, ID])))
        ):
            _learn(qf, qi, s, price, size, t, tid, moves, share, memory, clip, size_memory)
            continue
        kind, reason = _judge(qf, qi, s, price, size, t, tid, rows.receive[i], limits, bands[count], par)
        if kind != _PASS:
            if kind == HOLD:
                qi[s, PASSED] -= 1
            events[count, E_ROW], events[count, E_KIND], events[count, E_REASON], events[count, E_SLOT] = i, kind, reason, s
            count += 1
    return count


@njit(cache=True, nogil=True, _nrt=False)
def score_rows(qf, qi, members, memory, par, out_f, out_i):  # type: ignore[no-untyped-def]
    """Score the slots that have news since their last score and begin to count anew; number of rows written.

    Args:
        members: int32, slots to look at.
        memory: share that the newest interval has in the score.
        out_f: float64, shape (len(members), 3): score, band low, band high (-1: unknown).
        out_i: int64, shape (len(members), 8): slot, passed, failed, bad values, bad times, held, confirmed, volume spikes.
    """
    n = 0
    for s in members:
        passed, bad_values, bad_times = qi[s, PASSED], qi[s, BAD_VALUES], qi[s, BAD_TIMES]
        held, confirmed = qi[s, HELD], qi[s, CONFIRMED]
        failed = bad_values + bad_times + held
        if passed + failed + confirmed == 0:
            continue
        # suspects that the market confirmed were no faults
        wrong = bad_values + bad_times + max(held - confirmed, 0)
        score = qf[s, F_SCORE]
        if passed + wrong > 0:
            score += memory * (passed / (passed + wrong) - score)
        qf[s, F_SCORE] = score
        out_f[n, 0], out_f[n, 1], out_f[n, 2] = score, -1.0, -1.0
        if qi[s, SEEN] > 0:
            last = qf[s, F_LAST]
            half = _half(qf, qi, s, last, 0, 0, par)
            out_f[n, 1], out_f[n, 2] = max(last - half, LOWEST * last), last + half
        out_i[n, 0], out_i[n, 1], out_i[n, 2], out_i[n, 3] = s, passed, failed, bad_values
        out_i[n, 4], out_i[n, 5], out_i[n, 6], out_i[n, 7] = bad_times, held, confirmed, qi[s, SPIKES]
        for word in (PASSED, BAD_VALUES, BAD_TIMES, HELD, CONFIRMED, SPIKES):
            qi[s, word] = 0
        n += 1
    return n
