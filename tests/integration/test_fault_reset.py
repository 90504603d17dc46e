"""A venue that restarts and numbers its trades anew: the new numbering is followed, and nothing of it is taken for a duplicate."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from collectors.dedupe import NUMBERING
from collectors.simulated.config import ServerConfig
from collectors.simulated.exchange import ExchangeConfig
from collectors.simulated.regimes import MarketConfig
from collectors.simulated.server import serve
from infra.provision import provision
from infra.seam import SystemClock
from tests.integration.conftest import RunningStack
from tests.integration.fault_chain import Chain, eventually, figure, isolated, table


@pytest.mark.timeout(120)
async def test_a_venue_that_numbers_anew_is_followed(stack: RunningStack, topic_prefix: str, tmp_path: Path) -> None:
    """Every trade of both lives that was made while we were connected is stored once; the change is in the ledger."""
    market = MarketConfig(symbols=3, rate=300.0, seed=3)
    config = ServerConfig(exchange=ExchangeConfig(spot=market, warmup_s=1.0), track_sent=True)
    async with serve(config, SystemClock()) as exchange:
        settings = isolated(
            stack,
            topic_prefix,
            MARKETSTREAM_COLLECTOR_REST_URL=exchange.rest_url,
            MARKETSTREAM_COLLECTOR_WS_URL=exchange.ws_url,
            MARKETSTREAM_COLLECTOR_SYMBOLS="BTC-USDT,ETH-USDT,SOL-USDT",
        )
        await asyncio.to_thread(provision, settings)
        with Chain(settings, tmp_path) as chain:
            chain.start("sink", "collector")
            await chain.ready("sink", "collector")
            await asyncio.sleep(3)
            exchange.inject({"fault": "restart", "seconds": 1.5})
            took = await eventually(lambda: not exchange.exchange.is_down and bool(exchange.connections), 30, "no new connection")
            await asyncio.sleep(4)
            chain.stop("collector")

            def new_ids(symbol: str) -> list[int]:
                query = f"SELECT trade_id FROM trades WHERE symbol = '{symbol}-USDT' AND trade_id >= {NUMBERING} ORDER BY trade_id"
                return table(settings, query)["trade_id"].to_list()

            await eventually(lambda: len(new_ids("BTC")) > 50, 20, "the new numbering is not stored")
            await asyncio.sleep(1)
            for symbol in ("BTC", "ETH", "SOL"):
                found = new_ids(symbol)
                assert found == list(range(found[0], found[-1] + 1)), f"{symbol}: ids of the new life are missing or doubled"
                truth = exchange.truth(f"{symbol}USDT")["trade_id"]
                assert found[0] - NUMBERING <= truth[0] + len(truth) // 2
                old = exchange.truth(f"{symbol}USDT", earlier=True)["trade_id"]
                kept = table(
                    settings, f"SELECT trade_id FROM trades WHERE symbol = '{symbol}-USDT' AND trade_id < {NUMBERING} ORDER BY trade_id"
                )
                ids = kept["trade_id"].to_numpy()
                assert np.array_equal(ids, old[(old >= ids[0]) & (old <= ids[-1])]), f"{symbol}: trades of the first life"
            figure("matrix", cell="exchange-reset", new_feed_s=took)
