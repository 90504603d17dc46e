"""One connection to PostgreSQL for a command: settings in; a connection with its migrations applied, and one sentence when there is none, out."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import asyncpg

from infra.errors import UnreachableError
from infra.settings import PostgresSettings
from infra.symbol_store import migrate

TIMEOUT_S: Final = 10.0
FAULTS: Final = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError)


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
