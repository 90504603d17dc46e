"""The trades of one step as columns, and the few ways they are cut and joined."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(slots=True)
class TradeBlock:
    """The trades of one step, parallel arrays of shape ``(n,)`` in time order (per symbol: in id order).

    Attributes:
        end_ms: end of the step, milliseconds since the epoch; what the wire calls event time.
        code: symbol code, int64.
        trade_id: int64.
        price: count of ``10**-price_decimals`` of its symbol, int64.
        size: count of ``10**-size_decimals`` of its symbol, int64, >= 1.
        time_ms: trade time, milliseconds since the epoch, int64.
        buyer_is_maker: True where the taker sold.
        agg_id: id of the aggregate trade it belongs to, int64.
        by_symbol: stable argsort of ``code``; groups of one symbol in id order.
        group_start: where each group starts in ``by_symbol``, int64.
        group_code: symbol code of each group, ascending, int64.
    """

    end_ms: int
    code: IntArray
    trade_id: IntArray
    price: IntArray
    size: IntArray
    time_ms: IntArray
    buyer_is_maker: BoolArray
    agg_id: IntArray
    by_symbol: IntArray
    group_start: IntArray
    group_code: IntArray

    def __len__(self) -> int:
        return len(self.code)

    def take(self, rows: IntArray) -> TradeBlock:
        """These rows, in this order, for the wire: without the grouping by symbol."""
        return TradeBlock(
            self.end_ms,
            self.code[rows],
            self.trade_id[rows],
            self.price[rows],
            self.size[rows],
            self.time_ms[rows],
            self.buyer_is_maker[rows],
            self.agg_id[rows],
            *([np.zeros(0, dtype=np.int64)] * 3),
        )


def concatenate(blocks: list[TradeBlock]) -> TradeBlock:
    """Rows of several blocks one after the other, without the grouping by symbol."""
    none = np.zeros(0, dtype=np.int64)
    return TradeBlock(
        end_ms=max(block.end_ms for block in blocks),
        code=np.concatenate([block.code for block in blocks]),
        trade_id=np.concatenate([block.trade_id for block in blocks]),
        price=np.concatenate([block.price for block in blocks]),
        size=np.concatenate([block.size for block in blocks]),
        time_ms=np.concatenate([block.time_ms for block in blocks]),
        buyer_is_maker=np.concatenate([block.buyer_is_maker for block in blocks]),
        agg_id=np.concatenate([block.agg_id for block in blocks]),
        by_symbol=none,
        group_start=none,
        group_code=none,
    )
