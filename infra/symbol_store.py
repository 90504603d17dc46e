"""Which symbols are collected: the table ``symbols`` in PostgreSQL, its migrations, and news of its changes.

People edit the table; a collector reads it, is told of changes by LISTEN/NOTIFY (and polls, should a notification be lost), and
writes back the state of each symbol.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Collection, Mapping
from importlib.resources import files
from types import TracebackType
from typing import Any, Final, Self

import asyncpg

from infra.errors import UnreachableError
from infra.settings import PostgresSettings

logger = logging.getLogger(__name__)

CHANNEL: Final = "marketstream_symbols"
POLL_S: Final = 4.0
"""A change whose notification was lost is seen after this; the promise is 5 s."""
_LOCK: Final = 7_203_881
"""Advisory lock: two processes that start together migrate once."""
_TIMEOUT_S: Final = 10.0
_FAULTS: Final = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError)


class SymbolStore:
    """One connection to PostgreSQL. Used by one task at a time; every method raises UnreachableError when the server is gone.

    After an UnreachableError call :meth:`open` again; it replaces the connection.
    """

    def __init__(self, settings: PostgresSettings) -> None:
        self._settings = settings
        self._connection: Any = None
        self._changed = asyncio.Event()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def open(self) -> None:
        """Connect, bring the schema up to date, and listen for changes."""
        await self.close()
        try:
            self._connection = await asyncpg.connect(self._settings.dsn, timeout=_TIMEOUT_S, command_timeout=_TIMEOUT_S)
            await migrate(self._connection)
            await self._connection.add_listener(CHANNEL, self._notified)
        except _FAULTS as exc:
            raise self._unreachable(exc) from exc

    async def close(self) -> None:
        """Disconnect; fine when not connected."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(*_FAULTS):
                await connection.close(timeout=2.0)

    async def active(self, exchange: str) -> set[str]:
        """Canonical symbols of an exchange that are to be collected."""
        rows = await self._run("fetch", "SELECT symbol FROM symbols WHERE exchange = $1 AND active", exchange)
        return {row["symbol"] for row in rows}

    async def seed(self, exchange: str, symbols: Collection[str], asset_type: str = "crypto") -> bool:
        """Insert ``symbols`` when the exchange has no row yet, active or not; whether it did."""
        sql = """
            INSERT INTO symbols (exchange, symbol, asset_type)
            SELECT $1, name, $3 FROM unnest($2::text[]) AS name WHERE NOT EXISTS (SELECT FROM symbols WHERE exchange = $1)
            ON CONFLICT DO NOTHING
        """
        return await self._run("execute", sql, exchange, sorted(symbols), asset_type) not in ("INSERT 0 0", None)

    async def put(self, exchange: str, symbol: str, *, active: bool = True, asset_type: str = "crypto") -> None:
        """Add a symbol, or switch it on or off."""
        sql = """
            INSERT INTO symbols (exchange, symbol, active, asset_type) VALUES ($1, $2, $3, $4)
            ON CONFLICT (exchange, symbol) DO UPDATE SET active = excluded.active
        """
        await self._run("execute", sql, exchange, symbol, active, asset_type)

    async def set_states(self, exchange: str, states: Mapping[str, str]) -> None:
        """Write what the collector makes of each symbol: ``word`` or ``word: sentence``; the others of the exchange become inactive."""
        words = [state.partition(":")[0].strip() for state in states.values()]
        details = [state.partition(":")[2].strip() for state in states.values()]
        sql = """
            UPDATE symbols AS s SET state = n.state, state_detail = n.detail, state_at = now()
            FROM unnest($2::text[], $3::text[], $4::text[]) AS n (symbol, state, detail)
            WHERE s.exchange = $1 AND s.symbol = n.symbol AND (s.state, s.state_detail) IS DISTINCT FROM (n.state, n.detail)
        """
        await self._run("execute", sql, exchange, list(states), words, details)
        sql = """
            UPDATE symbols SET state = 'inactive', state_detail = '', state_at = now()
            WHERE exchange = $1 AND NOT active AND state <> 'inactive'
        """
        await self._run("execute", sql, exchange)

    async def states(self, exchange: str) -> dict[str, tuple[str, str]]:
        """Symbol -> (state, detail) of every row of an exchange."""
        rows = await self._run("fetch", "SELECT symbol, state, state_detail FROM symbols WHERE exchange = $1", exchange)
        return {row["symbol"]: (row["state"], row["state_detail"]) for row in rows}

    async def wait_for_change(self, timeout_s: float = POLL_S) -> bool:
        """Until somebody edited the table (True) or the time is up (False: look yourself)."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return False
        finally:
            self._changed.clear()
        return True

    def _notified(self, *_: object) -> None:
        self._changed.set()

    async def _run(self, method: str, sql: str, *arguments: object) -> Any:
        if self._connection is None or self._connection.is_closed():
            raise self._unreachable(ConnectionError("not connected"))
        try:
            return await getattr(self._connection, method)(sql, *arguments)
        except _FAULTS as exc:
            raise self._unreachable(exc) from exc

    def _unreachable(self, exc: Exception) -> UnreachableError:
        where = self._settings.dsn.rpartition("@")[2]
        detail = (str(exc) or type(exc).__name__).splitlines()[0][:200]
        return UnreachableError(f"PostgreSQL at {where} does not answer ({detail}): start the stack or set MARKETSTREAM_POSTGRES_DSN.")


async def migrate(connection: Any) -> list[str]:
    """Apply the migrations that the database does not have yet, each in a transaction; their names."""
    applied: list[str] = []
    await connection.execute("SELECT pg_advisory_lock($1)", _LOCK)
    try:
        await connection.execute(
            "CREATE TABLE IF NOT EXISTS schema_migrations (name text PRIMARY KEY, applied_at timestamptz DEFAULT now())"
        )
        known = {row["name"] for row in await connection.fetch("SELECT name FROM schema_migrations")}
        folder = files("infra.postgres")
        for name in sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".sql")):
            if name in known:
                continue
            async with connection.transaction():
                await connection.execute(folder.joinpath(name).read_text("utf-8"))
                await connection.execute("INSERT INTO schema_migrations (name) VALUES ($1)", name)
            applied.append(name)
    finally:
        await connection.execute("SELECT pg_advisory_unlock($1)", _LOCK)
    if applied:
        logger.info("PostgreSQL schema brought up to date: %s", ", ".join(applied))
    return applied
