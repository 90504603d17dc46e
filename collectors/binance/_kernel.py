"""Compiled reading of trade messages in the exact form Binance sends them; everything else is left to the general parser.

Comes in: messages joined into one array of bytes. Goes out: one entry a message in each output array, and a verdict: read, of no market,
or "not by me". What it reads it reads as the general parser does (a property test holds them against each other): ids and times of up to
18 digits; prices and sizes as plain decimals whose digits fit 2**53, divided once by a power of ten up to 22, so that the result is the
nearest double (both operands are exact: Clinger, "How to Read Floating Point Numbers Accurately", 1990).
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import njit

NOT_BY_ME: Final = 0
READ: Final = 1
OFF_MARKET: Final = 2

_MIN_MS: Final = 1_230_768_000_000  # schemas.timeframes.MIN_TIME_US, as ms
_MAX_MS: Final = 4_102_444_800_000
_MAX_ID: Final = 2**62
_EXACT: Final = 2**53
_POWERS: Final = np.array([10.0**n for n in range(23)])
_HEAD: Final = np.frombuffer(b'{"stream":"', np.uint8)
_DATA: Final = np.frombuffer(b'","data":{"e":"', np.uint8)
_MARKET: Final = np.frombuffer(b"MARKET", np.uint8)
_TRUE: Final = np.frombuffer(b"true", np.uint8)
_FALSE: Final = np.frombuffer(b"false", np.uint8)
_NULL: Final = np.frombuffer(b"null", np.uint8)

# Nothing here allocates, so arrays need no reference counts; with them each call of a helper costs two atomic operations an array.
_inline = njit(_nrt=False, forceinline=True)


@_inline
def _starts(data, at, stop, text):  # type: ignore[no-untyped-def]
    if at + len(text) > stop:
        return False
    for offset in range(len(text)):  # noqa: SIM110 - compiled: a generator would be another thing
        if data[at + offset] != text[offset]:
            return False
    return True


@_inline
def _whole(data, at, stop):  # type: ignore[no-untyped-def]
    """A non-negative JSON integer of at most 18 digits: (value, where it ends); (-1, at) when it is none."""
    begin = at
    value = 0
    while at < stop and 48 <= data[at] <= 57:
        value = value * 10 + (int(data[at]) - 48)
        at += 1
        if at - begin > 18:
            return -1, begin
    if at == begin or (data[begin] == 48 and at - begin > 1):
        return -1, begin
    return value, at


@_inline
def _decimal(data, at, stop):  # type: ignore[no-untyped-def]
    """A quoted plain decimal: (value, behind the closing quote); (-1, at) when it is none or not exactly readable here."""
    begin = at
    if at >= stop or data[at] != 34:
        return -1.0, begin
    at += 1
    first = at
    mantissa = 0
    digits = 0
    fraction = -1
    while at < stop and data[at] != 34:
        byte = data[at]
        if 48 <= byte <= 57:
            mantissa = mantissa * 10 + (int(byte) - 48)
            digits += 1
            if fraction >= 0:
                fraction += 1
            if digits > 18:
                return -1.0, begin
        elif byte == 46 and fraction < 0 and digits > 0:
            fraction = 0
        else:
            return -1.0, begin
        at += 1
    if at >= stop or digits == 0 or fraction == 0:
        return -1.0, begin
    if data[first] == 48 and at - first > 1 and data[first + 1] != 46:
        return -1.0, begin
    while fraction > 0 and mantissa % 10 == 0:
        mantissa //= 10
        fraction -= 1
    if mantissa > _EXACT:
        return -1.0, begin
    return (mantissa / _POWERS[fraction] if fraction > 0 else float(mantissa)), at + 1


@_inline
def _skip(data, at, stop):  # type: ignore[no-untyped-def]
    """Where a plain value ends: an integer, ASCII text without escapes, true, false, null; -1 for anything else."""
    if at >= stop:
        return -1
    byte = data[at]
    if byte == 34:
        at += 1
        while at < stop and data[at] != 34:
            if data[at] < 32 or data[at] > 126 or data[at] == 92:
                return -1
            at += 1
        return at + 1 if at < stop else -1
    if byte == 116:
        return at + 4 if _starts(data, at, stop, _TRUE) else -1
    if byte == 102:
        return at + 5 if _starts(data, at, stop, _FALSE) else -1
    if byte == 110:
        return at + 4 if _starts(data, at, stop, _NULL) else -1
    _, end = _whole(data, at, stop)
    return end if end > at else -1


@njit(cache=True, _nrt=False, forceinline=True)
def stream_hash(data, start, stop):  # type: ignore[no-untyped-def]
    """FNV-1a of a stream's name, as a non-negative int64."""
    value = np.uint64(14695981039346656037)
    for at in range(start, stop):
        value = (value ^ np.uint64(data[at])) * np.uint64(1099511628211)
    return np.int64(value >> np.uint64(1))


@_inline
def _code_of(data, start, stop, slots, names, bounds):  # type: ignore[no-untyped-def]
    """Code of a stream; -1 when it is not known. ``slots``: open addressing, number of the name or -1."""
    mask = len(slots) - 1
    slot = stream_hash(data, start, stop) & mask
    while slots[slot] >= 0:
        number = slots[slot]
        begin = bounds[number]
        size = bounds[number + 1] - begin
        if size == stop - start:
            same = True
            for offset in range(size):
                if names[begin + offset] != data[start + offset]:
                    same = False
                    break
            if same:
                return number
        slot = (slot + 1) & mask
    return -1


@njit(cache=True, nogil=True, _nrt=False)
def read_trades(  # type: ignore[no-untyped-def]
    data,  # uint8, all messages one after the other
    stops,  # int64, where each message ends
    event,  # uint8, name of the event: trade, aggTrade
    id_key,  # byte of the key that holds the id: t, a
    slots,  # int32, hash table of streams
    names,  # uint8, stream names one after the other
    bounds,  # int64, where each name begins, and the end
    codes,  # int32, symbol code by number of the name
    out_code,  # int32
    out_id,  # int64
    out_price,  # float64
    out_size,  # float64
    out_side,  # int8
    out_time_us,  # int64
    verdict,  # int8
):
    """Read what can be read here; returns how many messages were (verdict READ)."""
    found = 0
    start = 0
    for row in range(len(stops)):
        stop = stops[row]
        verdict[row] = NOT_BY_ME
        at = start
        start = stop
        if not _starts(data, at, stop, _HEAD):
            continue
        name = at + len(_HEAD)
        at = name
        while at < stop and data[at] != 34:
            at += 1
        number = _code_of(data, name, at, slots, names, bounds)
        if number < 0 or not _starts(data, at, stop, _DATA):
            continue
        at += len(_DATA)
        if not _starts(data, at, stop, event):
            continue
        at += len(event)
        if at >= stop or data[at] != 34:
            continue
        at += 1
        seen = 0  # bits: 1 id, 2 price, 4 size, 8 time, 16 maker, 32 execution type
        good = True
        market = True
        trade_id = 0
        time_ms = 0
        price = 0.0
        size = 0.0
        maker = False
        while good and at + 4 < stop and data[at] == 44:
            if data[at + 1] != 34 or data[at + 3] != 34 or data[at + 4] != 58:
                good = False
                break
            key = data[at + 2]
            at += 5
            bit = 0
            if key == id_key:
                trade_id, end = _whole(data, at, stop)
                bit = 1
            elif key == 112:  # p
                price, end = _decimal(data, at, stop)
                bit = 2
            elif key == 113:  # q
                size, end = _decimal(data, at, stop)
                bit = 4
            elif key == 84:  # T
                time_ms, end = _whole(data, at, stop)
                bit = 8
            elif key == 109:  # m
                maker = _starts(data, at, stop, _TRUE)
                end = at + 4 if maker else (at + 5 if _starts(data, at, stop, _FALSE) else at)
                bit = 16
            elif key == 88:  # X
                end = _skip(data, at, stop)
                market = end - at == 8 and data[at] == 34 and _starts(data, at + 1, stop, _MARKET)
                good = end > at and data[at] == 34
                bit = 32
            elif key == 101 or key < 65 or key > 122 or (key > 90 and key < 97):  # a second event name, or no letter
                good = False
                break
            else:
                end = _skip(data, at, stop)
            if end <= at or seen & bit:
                good = False
                break
            seen |= bit
            at = end
        if not good or seen & 31 != 31 or at + 2 != stop or data[at] != 125 or data[at + 1] != 125:
            continue
        if not market:
            verdict[row] = OFF_MARKET
            continue
        if not (price > 0.0 and size > 0.0 and trade_id < _MAX_ID and _MIN_MS <= time_ms < _MAX_MS):
            continue
        verdict[row] = READ
        out_code[row] = codes[number]
        out_id[row] = trade_id
        out_price[row] = price
        out_size[row] = size
        out_side[row] = -1 if maker else 1
        out_time_us[row] = time_ms * 1000
        found += 1
    return found
