"""Seeded trades for benchmarks, columnar: same arguments, same trades."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from schemas.frames import Frame
from schemas.partitions import partition_of

START_US = 1_723_161_600_000_000
"""2024-08-09T00:00:00Z."""


def symbol_keys(symbols: int) -> tuple[str, ...]:
    """Instrument keys ``binance:S0000-USDT`` ..."""
    return tuple(f"binance:S{number:04d}-USDT" for number in range(symbols))


def trades(count: int, symbols: int, *, per_second: int = 10_000, seed: int = 1) -> tuple[tuple[str, ...], dict[str, npt.NDArray[Any]]]:
    """``count`` trades of ``symbols`` symbols in time order, ids consecutive per symbol, activity falling with rank (exponent 0.6)."""
    rng = np.random.default_rng(seed)
    weight = (np.arange(symbols) + 1.0) ** -0.6
    code = rng.choice(symbols, count, p=weight / weight.sum()).astype(np.int32)
    time_us = START_US + np.cumsum(rng.exponential(1_000_000 / per_second, count)).astype(np.int64)
    order = np.argsort(code, kind="stable")
    sorted_code = code[order]
    first = np.searchsorted(sorted_code, np.arange(symbols))
    trade_id = np.empty(count, np.int64)
    trade_id[order] = np.arange(count) - first[sorted_code] + 1_000_000
    price = np.exp(np.log(100.0) + code % 7 + np.cumsum(rng.normal(0, 1e-4, count)))
    return symbol_keys(symbols), {
        "symbol_code": code,
        "trade_id": trade_id,
        "price": np.round(price, 4),
        "size": np.round(rng.lognormal(0, 1, count), 3) + 0.001,
        "side": rng.choice(np.array([-1, 1], np.int8), count),
        "exchange_time_us": time_us,
        "receive_time_us": time_us + 1_500,
    }


def frames(
    keys: tuple[str, ...], columns: dict[str, npt.NDArray[Any]], *, partitions: int, rows_per_frame: int, source: str = "bench"
) -> Iterator[tuple[int, Frame]]:
    """(partition, frame) in time order, ``rows_per_frame`` rows each, then one end-of-source frame a partition."""
    owner = np.array([partition_of(key, partitions) for key in keys], np.int32)
    local = np.zeros(len(keys), np.int32)
    names: list[tuple[str, ...]] = []
    for partition in range(partitions):
        mine = np.flatnonzero(owner == partition)
        local[mine] = np.arange(len(mine))
        names.append(tuple(keys[code] for code in mine))
    of_row = owner[columns["symbol_code"]]
    rows = [np.flatnonzero(of_row == partition) for partition in range(partitions)]
    cursor = 0
    while any(cursor < len(mine) for mine in rows):
        for partition, mine in enumerate(rows):
            part = mine[cursor : cursor + rows_per_frame]
            if not len(part):
                continue
            picked = {name: np.ascontiguousarray(column[part]) for name, column in columns.items()}
            picked["symbol_code"] = local[picked["symbol_code"]]
            yield (
                partition,
                Frame(source=source, watermark_us=int(picked["exchange_time_us"][-1]), symbols=names[partition], columns=picked),
            )
        cursor += rows_per_frame
    for partition in range(partitions):
        yield partition, Frame(source=source, watermark_us=int(columns["exchange_time_us"][-1]) + 1, flags=1)
