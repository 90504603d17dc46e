"""ClickHouse and PostgreSQL for the API: queries in, bytes or rows out, and one kind of error when a server does not answer.

Both connect at the first question and again after a failure, so the API starts, and says what is missing, before its stores do.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from decimal import Decimal
from typing import Any, Final

from api.errors import StoreUnavailableError
from api.letters import LetterState
from infra.clickhouse.client import address
from infra.deadletter_decisions import states
from infra.settings import ClickHouseSettings, PostgresSettings

logger = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S: Final = 3.0
_CONNECTIONS: Final = 16
_MISSING_TABLE: Final = "42P01"


class ClickHouseHistory:
    """`api.deps.HistoryStore` over clickhouse-connect."""

    def __init__(self, settings: ClickHouseSettings) -> None:
        self._settings = settings
        self._client: Any = None
        self._lock = asyncio.Lock()

    async def fetch(self, sql: str, parameters: Mapping[str, Any], fmt: str) -> bytes:
        """See HistoryStore.fetch."""
        client = await self._connected()
        try:
            answer = await client.raw_query(sql, parameters=dict(parameters), fmt=fmt)
        except Exception as exc:
            raise await self._failed(exc) from exc
        return bytes(answer)

    @asynccontextmanager
    async def stream(self, sql: str, parameters: Mapping[str, Any], fmt: str) -> AsyncIterator[AsyncIterator[bytes]]:
        """See HistoryStore.stream."""
        client = await self._connected()
        try:
            context = await client.raw_stream(sql, parameters=dict(parameters), fmt=fmt)
        except Exception as exc:
            raise await self._failed(exc) from exc
        async with context as pieces:
            yield pieces

    async def ping(self) -> None:
        """See HistoryStore.ping; the database must be there as well."""
        await self.fetch("SELECT 1 FROM bars LIMIT 0", {}, "TSV")

    async def close(self) -> None:
        """Close the connections."""
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    async def _connected(self) -> Any:
        async with self._lock:
            if self._client is None:
                import clickhouse_connect  # not at the top: 0.2 s that the first answer of /livez need not wait for

                try:
                    self._client = await clickhouse_connect.get_async_client(
                        **address(self._settings),
                        database=self._settings.database,
                        autogenerate_session_id=False,  # one session would serialise a process's queries
                        connect_timeout=_CONNECT_TIMEOUT_S,
                        send_receive_timeout=60,
                        connector_limit=_CONNECTIONS,
                        connector_limit_per_host=_CONNECTIONS,
                        compress=False,
                    )
                except Exception as exc:
                    raise self._unavailable(exc) from exc
            return self._client

    async def _failed(self, exc: Exception) -> StoreUnavailableError:
        """What to raise; a client whose server is gone is given up, the next question makes a new one."""
        from clickhouse_connect.driver.exceptions import DatabaseError

        if not isinstance(exc, DatabaseError):
            await self.close()
        return self._unavailable(exc)

    def _unavailable(self, exc: Exception) -> StoreUnavailableError:
        detail = (str(exc) or type(exc).__name__).splitlines()[0][:200]
        logger.warning("ClickHouse at %s: %s", self._settings.url, detail)
        return StoreUnavailableError("clickhouse", f"ClickHouse does not answer as it should ({detail}).")


class PostgresSymbols:
    """`api.deps.SymbolStore` over asyncpg: the table ``symbols``."""

    def __init__(self, settings: PostgresSettings) -> None:
        self._settings = settings
        self._pool: Any = None
        self._lock = asyncio.Lock()

    async def symbols(self) -> Sequence[Mapping[str, Any]]:
        """See SymbolStore.symbols. A table that is not there yet holds nothing."""
        return [{name: _plain(value) for name, value in row.items()} for row in await self.fetch("SELECT * FROM symbols")]

    async def ping(self) -> None:
        """See SymbolStore.ping."""
        await self.fetch("SELECT 1")

    async def close(self) -> None:
        """Close the connections."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.terminate()

    async def fetch(self, sql: str, *arguments: object) -> list[Any]:
        """Rows of a query; [] of a table that is not there yet. Raises StoreUnavailableError."""
        import asyncpg

        try:
            pool = await self._connected()
            return list(await pool.fetch(sql, *arguments, timeout=_CONNECT_TIMEOUT_S))
        except asyncpg.PostgresError as exc:
            if exc.sqlstate == _MISSING_TABLE:
                return []
            raise self._unavailable(exc) from exc
        except (OSError, TimeoutError, asyncpg.InterfaceError) as exc:
            await self.close()
            raise self._unavailable(exc) from exc

    async def _connected(self) -> Any:
        async with self._lock:
            if self._pool is None:
                import asyncpg

                self._pool = await asyncpg.create_pool(
                    self._settings.dsn, min_size=0, max_size=2, timeout=_CONNECT_TIMEOUT_S, command_timeout=_CONNECT_TIMEOUT_S
                )
            return self._pool

    def _unavailable(self, exc: Exception) -> StoreUnavailableError:
        detail = (str(exc) or type(exc).__name__).splitlines()[0][:200]
        logger.warning("PostgreSQL: %s", detail)
        return StoreUnavailableError("postgres", f"PostgreSQL does not answer as it should ({detail}).")


class PostgresLetters:
    """`api.letters.LetterStates` over the connections of the symbol store."""

    def __init__(self, postgres: PostgresSymbols, topic_prefix: str) -> None:
        self._postgres = postgres
        self._prefix = topic_prefix

    async def states(self, letters: Sequence[Mapping[str, Any]]) -> dict[int, LetterState]:
        """See LetterStates.states."""
        return await states(self._postgres.fetch, self._prefix, letters)


def _plain(value: Any) -> Any:
    """A column's value as JSON knows it."""
    if isinstance(value, datetime):
        return value.isoformat()
    return float(value) if isinstance(value, Decimal) else value
