"""Table ``symbols`` in a real PostgreSQL: migration, seeding, news of changes, states."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import asyncpg
import pytest

from infra.errors import UnreachableError
from infra.symbol_store import SymbolStore
from tests.integration.conftest import RunningStack


@pytest.fixture
async def store(stack: RunningStack) -> AsyncIterator[SymbolStore]:
    """A store on an empty table."""
    async with SymbolStore(stack.settings.postgres) as opened:
        await opened.run("execute", "DELETE FROM symbols")
        opened._changed.clear()
        yield opened


async def test_two_processes_migrate_once(stack: RunningStack) -> None:
    """Started together on an empty database: both come up."""
    base, _, name = stack.settings.postgres.dsn.rpartition("/")
    admin = await asyncpg.connect(stack.settings.postgres.dsn)
    await admin.execute("DROP DATABASE IF EXISTS migration_test")
    await admin.execute("CREATE DATABASE migration_test")
    settings = replace(stack.settings.postgres, dsn=f"{base}/migration_test")
    stores = [SymbolStore(settings) for _ in range(3)]
    await asyncio.gather(*(store.open() for store in stores))
    await asyncio.gather(*(store.close() for store in stores))
    async with SymbolStore(settings) as again:
        assert await again.active("binance") == set()
    await admin.execute("DROP DATABASE migration_test")
    await admin.close()
    assert name


async def test_an_exchange_is_seeded_once(store: SymbolStore) -> None:
    """What people switched off stays off; another exchange is its own matter."""
    assert await store.seed("binance", ["BTC-USDT", "ETH-USDT"])
    await store.put("binance", "BTC-USDT", active=False)
    assert not await store.seed("binance", ["BTC-USDT", "SOL-USDT"])
    assert await store.active("binance") == {"ETH-USDT"}
    assert await store.active("binance-usdm") == set()


async def test_an_edit_is_heard_at_once_and_a_state_is_not(store: SymbolStore, stack: RunningStack) -> None:
    """LISTEN/NOTIFY on what people change; what collectors write wakes nobody."""
    async with SymbolStore(stack.settings.postgres) as editor:
        begin = time.monotonic()
        waiting = asyncio.create_task(store.wait_for_change(5.0))
        await asyncio.sleep(0.05)
        await editor.put("binance", "BTC-USDT")
        assert await waiting
        assert time.monotonic() - begin < 2.0
        await editor.set_states("binance", {"BTC-USDT": "unknown: binance lists no market 'BTC-USDT'"})
        assert not await store.wait_for_change(0.5)
        assert await store.states("binance") == {"BTC-USDT": ("unknown", "binance lists no market 'BTC-USDT'")}


async def test_switching_off_makes_a_symbol_inactive(store: SymbolStore) -> None:
    """Its state follows at the next round."""
    await store.seed("binance", ["BTC-USDT", "ETH-USDT"])
    await store.set_states("binance", {"BTC-USDT": "collecting", "ETH-USDT": "collecting"})
    await store.put("binance", "ETH-USDT", active=False)
    await store.set_states("binance", {"BTC-USDT": "collecting"})
    assert await store.states("binance") == {"BTC-USDT": ("collecting", ""), "ETH-USDT": ("inactive", "")}


async def test_a_pair_of_exchange_and_symbol_is_there_once_and_in_our_spelling(store: SymbolStore) -> None:
    """The table itself refuses doubles and foreign spellings."""
    await store.put("binance", "BTC-USDT")
    await store.put("binance", "BTC-USDT")
    assert len(await store.states("binance")) == 1
    for exchange, symbol in (("Binance", "BTC-USDT"), ("binance", "btc-usdt"), ("binance", "")):
        with pytest.raises(UnreachableError, match="check constraint"):
            await store.put(exchange, symbol)


async def test_a_server_that_is_away_is_one_sentence(stack: RunningStack) -> None:
    """Where, what, and which setting; and a lost connection is noticed."""
    settings = replace(stack.settings.postgres, dsn="postgresql://u:secret@127.0.0.1:1/x")
    with pytest.raises(UnreachableError, match=r"PostgreSQL at 127.0.0.1:1/x does not answer .* MARKETSTREAM_POSTGRES_DSN") as caught:
        await SymbolStore(settings).open()
    assert "secret" not in str(caught.value)
    store = SymbolStore(stack.settings.postgres)
    await store.open()
    await store._connection.close()
    with pytest.raises(UnreachableError):
        await store.active("binance")
    await store.open()
    await store.close()
