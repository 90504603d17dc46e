"""Which symbols are collected: the table ``symbols`` in PostgreSQL, and news of its changes.

People edit the table; a collector reads it, is told of changes by LISTEN/NOTIFY (and polls, should a notification be lost), and
writes back the state of each symbol.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from infra.database import Database

CHANNEL: Final = "marketstream_symbols"
POLL_S: Final = 4.0
"""A change whose notification was lost is seen after this; the promise is 5 s."""


class SymbolStore(Database):
    """The table over one connection; see Database."""

    async def open(self) -> None:
        """Connect, bring the schema up to date, and listen for changes."""
        await super().open()
        await self.listen_to(CHANNEL, lambda *_: self.wake())

    async def active(self, exchange: str) -> set[str]:
        """Canonical symbols of an exchange that are to be collected."""
        rows = await self.run("fetch", "SELECT symbol FROM symbols WHERE exchange = $1 AND active", exchange)
        return {row["symbol"] for row in rows}

    async def seed(self, exchange: str, symbols: Collection[str], asset_type: str = "crypto") -> bool:
        """Insert ``symbols`` when the exchange has no row yet, active or not; whether it did."""
        sql = """
            INSERT INTO symbols (exchange, symbol, asset_type)
            SELECT $1, name, $3 FROM unnest($2::text[]) AS name WHERE NOT EXISTS (SELECT FROM symbols WHERE exchange = $1)
            ON CONFLICT DO NOTHING
        """
        return await self.run("execute", sql, exchange, sorted(symbols), asset_type) not in ("INSERT 0 0", None)

    async def put(self, exchange: str, symbol: str, *, active: bool = True, asset_type: str = "crypto") -> None:
        """Add a symbol, or switch it on or off."""
        sql = """
            INSERT INTO symbols (exchange, symbol, active, asset_type) VALUES ($1, $2, $3, $4)
            ON CONFLICT (exchange, symbol) DO UPDATE SET active = excluded.active
        """
        await self.run("execute", sql, exchange, symbol, active, asset_type)

    async def set_states(self, exchange: str, states: Mapping[str, str]) -> None:
        """Write what the collector makes of each symbol: ``word`` or ``word: sentence``; the others of the exchange become inactive."""
        words = [state.partition(":")[0].strip() for state in states.values()]
        details = [state.partition(":")[2].strip() for state in states.values()]
        sql = """
            UPDATE symbols AS s SET state = n.state, state_detail = n.detail, state_at = now()
            FROM unnest($2::text[], $3::text[], $4::text[]) AS n (symbol, state, detail)
            WHERE s.exchange = $1 AND s.symbol = n.symbol AND (s.state, s.state_detail) IS DISTINCT FROM (n.state, n.detail)
        """
        await self.run("execute", sql, exchange, list(states), words, details)
        sql = """
            UPDATE symbols SET state = 'inactive', state_detail = '', state_at = now()
            WHERE exchange = $1 AND NOT active AND state <> 'inactive'
        """
        await self.run("execute", sql, exchange)

    async def states(self, exchange: str) -> dict[str, tuple[str, str]]:
        """Symbol -> (state, detail) of every row of an exchange."""
        rows = await self.run("fetch", "SELECT symbol, state, state_detail FROM symbols WHERE exchange = $1", exchange)
        return {row["symbol"]: (row["state"], row["state_detail"]) for row in rows}

    async def wait_for_change(self, timeout_s: float = POLL_S) -> bool:
        """Until somebody edited the table (True) or the time is up (False: look yourself)."""
        return await self.wait(timeout_s)
