"""Connections to PostgreSQL: settings in; a connection with its migrations applied, and one sentence when there is none, out.

:func:`connected` is for a command, :class:`Database` for a process that goes on when the server was gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from types import TracebackType
from typing import Any, Final, Self

import asyncpg

from infra.errors import UnreachableError
from infra.settings import PostgresSettings

logger = logging.getLogger(__name__)

TIMEOUT_S: Final = 10.0
FAULTS: Final = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError)
_LOCK: Final = 7_203_881
"""Advisory lock: two processes that start together migrate once."""


class Database:
    """One connection. Used by one task at a time; every method raises UnreachableError when the server is gone.

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
        """Connect and bring the schema up to date."""
        await self.close()
        try:
            self._connection = await asyncpg.connect(self._settings.dsn, timeout=TIMEOUT_S, command_timeout=TIMEOUT_S)
            await migrate(self._connection)
        except FAULTS as exc:
            raise unreachable(self._settings, exc) from exc

    async def close(self) -> None:
        """Disconnect; fine when not connected."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(*FAULTS):
                await connection.close(timeout=2.0)

    async def run(self, method: str, sql: str, *arguments: object) -> Any:
        """``fetch``, ``fetchrow``, ``execute`` ... of the connection."""
        connection = self._opened()
        try:
            return await getattr(connection, method)(sql, *arguments)
        except FAULTS as exc:
            raise unreachable(self._settings, exc) from exc

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        """Everything inside happens, or nothing of it."""
        connection = self._opened()
        try:
            async with connection.transaction():
                yield
        except UnreachableError:
            raise
        except FAULTS as exc:
            raise unreachable(self._settings, exc) from exc

    async def listen_to(self, channel: str, heard: Callable[..., None]) -> None:
        """Call ``heard(connection, pid, channel, payload)`` on each notification; ends with the connection."""
        try:
            await self._connection.add_listener(channel, heard)
        except FAULTS as exc:
            raise unreachable(self._settings, exc) from exc

    def wake(self) -> None:
        """End a :meth:`wait`."""
        self._changed.set()

    async def wait(self, timeout_s: float) -> bool:
        """Until :meth:`wake` (True) or the time is up (False)."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return False
        finally:
            self._changed.clear()
        return True

    def _opened(self) -> Any:
        if self._connection is None or self._connection.is_closed():
            raise unreachable(self._settings, ConnectionError("not connected"))
        return self._connection


@asynccontextmanager
async def connected(settings: PostgresSettings, *, timeout_s: float = TIMEOUT_S) -> AsyncIterator[Any]:
    """An asyncpg connection; closed at the end. What the server refuses or leaves unanswered, inside too, becomes UnreachableError."""
    connection: Any = None
    try:
        connection = await asyncpg.connect(settings.dsn, timeout=timeout_s, command_timeout=timeout_s)
        await migrate(connection)
        yield connection
    except FAULTS as exc:
        raise unreachable(settings, exc) from exc
    finally:
        if connection is not None:
            with contextlib.suppress(*FAULTS):
                await connection.close(timeout=2.0)


def unreachable(settings: PostgresSettings, exc: Exception) -> UnreachableError:
    """One sentence for a PostgreSQL that does not answer."""
    where = settings.dsn.rpartition("@")[2]
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
