"""Peer: cryptofeed's Binance handler over recorded messages. ``python cryptofeed_binance.py FILE``: one message a line; prints seconds of CPU."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from cryptofeed.defines import BINANCE, TRADES
from cryptofeed.exchanges import Binance
from cryptofeed.symbols import Symbols


def main(source: str) -> None:
    """Handle every message; nothing but the handler is timed."""
    messages = Path(source).read_text("utf-8").split("\n")
    raw = sorted({json.loads(message)["data"]["s"] for message in messages})
    names = {f"{symbol.removesuffix('USDT')}-USDT": symbol for symbol in raw}
    Symbols.set(BINANCE, names, {"instrument_type": {}})
    seen = 0

    async def count(trade: Any, received: float) -> None:
        nonlocal seen
        seen += 1

    feed = Binance(symbols=list(names), channels=[TRADES], callbacks={TRADES: count})

    async def handle() -> float:
        begin = time.process_time()
        for message in messages:
            await feed.message_handler(message, None, 0.0)
        return time.process_time() - begin

    seconds = asyncio.run(handle())
    if seen != len(messages):
        raise SystemExit(f"cryptofeed handled {seen} of {len(messages)} messages")
    print(json.dumps({"seconds": seconds, "rows": seen}))


if __name__ == "__main__":
    main(sys.argv[1])
