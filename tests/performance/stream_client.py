"""A WebSocket client of the API: subscriptions in; what arrived, whether anything was missing or doubled, and how late bars were, out.

``python -m tests.performance.stream_client URL --symbols S0000-USDT,S0001-USDT --timeframes 1s,1m --trades``. Says ``{"event": "live"}`` when every
subscription has its snapshot; SIGTERM makes it say what it saw and end. SIGUSR1 begins a new window of latencies, SIGUSR2 says the last one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from collections import defaultdict
from typing import Any

import msgspec
import numpy as np
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

THROTTLE_US = 250_000
"""A symbol's open bar is published at most this often: an update that had to wait for that says nothing about the way it took."""
REQUESTS_PER_S = 40
MOST_RESUMES = 100


class Row(msgspec.Struct, gc=False):
    """The fields of a bar or trade that are looked at."""

    trade_id: int = -1
    open_time_us: int = 0
    is_final: bool = False
    last_receive_time_us: int = 0


class Message(msgspec.Struct, gc=False):
    """A message of the stream."""

    type: str
    channel: str = ""
    symbol: str = ""
    timeframe: str = ""
    cursor: str = ""
    data: msgspec.Raw = msgspec.Raw(b"[]")


_message = msgspec.json.Decoder(Message)
_rows = msgspec.json.Decoder(list[Row])


class Seen:
    """What one connection got."""

    def __init__(self) -> None:
        self.messages = self.trades = self.bar_updates = self.final_bars = self.resets = 0
        self.ids: dict[str, list[int]] = {}
        """Symbol -> [first id, last id, ids out of order]."""
        self.live: set[tuple[str, str, str]] = set()
        self.cursors: dict[tuple[str, str, str], str] = {}
        """Series -> where to resume after the API closed the connection because we read too slowly."""
        self.immediate_us: list[int] = []
        self.all_us: list[int] = []
        self._arrived: dict[tuple[str, str], int] = defaultdict(int)

    def take(self, text: str | bytes, now_us: int) -> None:
        """One message that arrived at ``now_us``."""
        message = _message.decode(text)
        self.messages += 1
        if message.cursor:
            self.cursors[(message.channel, message.symbol, message.timeframe)] = message.cursor
        if message.type == "snapshot":
            self.live.add((message.channel, message.symbol, message.timeframe))
            if message.channel == "trades":
                self._ids(message.symbol, _rows.decode(message.data))
        elif message.type in ("update", "corrected"):
            rows = _rows.decode(message.data)
            if message.channel == "trades":
                self.trades += len(rows)
                self._ids(message.symbol, rows)
            else:
                self._bars(message, rows, now_us)
        elif message.type == "reset":
            self.resets += 1
        elif message.type == "error":
            raise RuntimeError(f"the API says: {text!r}")

    def _ids(self, symbol: str, rows: list[Row]) -> None:
        state = self.ids.get(symbol)
        for row in rows:
            if state is None:
                state = self.ids[symbol] = [row.trade_id, row.trade_id, 0]
                continue
            state[2] += row.trade_id != state[1] + 1
            state[1] = row.trade_id

    def _bars(self, message: Message, rows: list[Row], now_us: int) -> None:
        place = (message.symbol, message.timeframe)
        for row in rows:
            if row.is_final:
                self.final_bars += 1
                continue
            self.bar_updates += 1
            if not row.last_receive_time_us:
                continue
            took_us = now_us - row.last_receive_time_us
            self.all_us.append(took_us)
            if row.last_receive_time_us >= self._arrived[place] + THROTTLE_US:
                self.immediate_us.append(took_us)
            self._arrived[place] = now_us

    def latencies(self) -> dict[str, Any]:
        """Milliseconds of the window."""
        return {"immediate": percentiles(self.immediate_us), "all": percentiles(self.all_us)}

    def new_window(self) -> None:
        """Forget latencies."""
        self.immediate_us.clear()
        self.all_us.clear()


def percentiles(values_us: list[int]) -> dict[str, float]:
    """Count, p50, p90, p99 and the greatest in milliseconds; zeros for none."""
    if not values_us:
        return {"count": 0, "p50": 0.0, "p90": 0.0, "p99": 0.0, "max": 0.0}
    values = np.array(values_us) / 1000
    p50, p90, p99 = np.percentile(values, [50, 90, 99]).tolist()
    return {"count": len(values_us), "p50": round(p50, 2), "p90": round(p90, 2), "p99": round(p99, 2), "max": round(float(values.max()), 2)}


def say(**line: Any) -> None:
    """One line of JSON."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


async def _connection(url: str, exchange: str, wanted: list[dict[str, str]], seen: Seen, stop: asyncio.Event) -> None:
    """One connection until ``stop``; it resumes every series that has a cursor. Raises ConnectionClosed."""
    async with connect(url, max_size=None, max_queue=None, compression=None) as socket:

        async def subscribe() -> None:
            for number, series in enumerate(wanted):
                cursor = seen.cursors.get((series["channel"], series["symbol"], series.get("timeframe", "")))
                place = {"limit": 0} if cursor is None else {"from": cursor}
                await socket.send(json.dumps({"op": "subscribe", "id": number, "exchange": exchange, **series, **place}))
                if number % REQUESTS_PER_S == REQUESTS_PER_S - 1:
                    await asyncio.sleep(1.0)

        async def read() -> None:
            told = bool(seen.cursors)
            async for text in socket:
                seen.take(text, time.time_ns() // 1000)
                if not told and len(seen.live) >= len(wanted):
                    told = True
                    say(event="live", series=len(wanted))

        reader, writer, stopping = (asyncio.ensure_future(work) for work in (read(), subscribe(), stop.wait()))
        await asyncio.wait({reader, stopping}, return_when=asyncio.FIRST_COMPLETED)
        for task in (writer, stopping):
            task.cancel()
        if reader.done():
            reader.result()
        reader.cancel()


async def watch(url: str, exchange: str, symbols: list[str], timeframes: list[str], trades: bool) -> None:
    """Subscribe and count until SIGTERM."""
    seen = Seen()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGUSR1, seen.new_window)
    loop.add_signal_handler(signal.SIGUSR2, lambda: say(event="latency", **seen.latencies()))
    wanted = [{"channel": "bars", "symbol": symbol, "timeframe": timeframe} for symbol in symbols for timeframe in timeframes]
    wanted += [{"channel": "trades", "symbol": symbol} for symbol in symbols] if trades else []
    closed: list[str] = []
    while not stop.is_set() and len(closed) <= MOST_RESUMES:
        try:
            await _connection(url, exchange, wanted, seen, stop)
        except ConnectionClosed as exc:
            closed.append(str(exc))
    say(
        event="done",
        messages=seen.messages,
        trades=seen.trades,
        bar_updates=seen.bar_updates,
        final_bars=seen.final_bars,
        resets=seen.resets,
        ids=seen.ids,
        closed=closed,
        resumes=len(closed),
        **seen.latencies(),
    )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("--exchange", default="binance")
    parser.add_argument("--symbols", required=True)
    parser.add_argument("--timeframes", default="1s,1m")
    parser.add_argument("--trades", action="store_true")
    arguments = parser.parse_args()
    import uvloop

    uvloop.run(watch(arguments.url, arguments.exchange, arguments.symbols.split(","), arguments.timeframes.split(","), arguments.trades))


if __name__ == "__main__":
    main()
