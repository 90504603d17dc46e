"""The ClickHouse client of every process: settings in, a connected ``clickhouse-connect`` client out; the same for embedded and server."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

import clickhouse_connect
from clickhouse_connect.driver.exceptions import ClickHouseError

from infra.clickhouse.schema import statements
from infra.errors import SettingsError, UnreachableError
from infra.settings import ClickHouseSettings


def address(settings: ClickHouseSettings) -> dict[str, Any]:
    """``host``, ``port``, ``secure`` and credentials for clickhouse-connect. Raises SettingsError for a URL without a host."""
    parts = urlsplit(settings.url)
    if not parts.hostname:
        raise SettingsError(f"MARKETSTREAM_CLICKHOUSE_URL is '{settings.url}', which names no host: write http://host:8123.")
    secure = parts.scheme == "https"
    return {
        "host": parts.hostname,
        "port": parts.port or (8443 if secure else 8123),
        "interface": parts.scheme,
        "secure": secure,
        "username": parts.username or settings.user,
        "password": parts.password or settings.password,
    }


def connect(settings: ClickHouseSettings, *, database: str | None = "", **options: Any) -> Any:
    """A connected blocking client. ``database=None`` connects before the database exists. Raises UnreachableError."""
    try:
        return clickhouse_connect.get_client(
            **address(settings),
            database=settings.database if database == "" else database,
            autogenerate_session_id=False,  # one session would serialise a process's queries
            connect_timeout=5,
            send_receive_timeout=120,
            **options,
        )
    except (ClickHouseError, OSError) as exc:
        raise unreachable(settings, exc) from exc


def unreachable(settings: ClickHouseSettings, exc: Exception) -> UnreachableError:
    """One sentence for a ClickHouse that does not answer."""
    refused = re.search(r"\[Errno \d+\] ([\w ]+)", str(exc))  # out of the HTTP client's account of its retries
    detail = refused[1] if refused is not None else str(exc).splitlines()[0][:300]
    return UnreachableError(f"ClickHouse at {settings.url} does not answer ({detail}): start the stack or set MARKETSTREAM_CLICKHOUSE_URL.")


def apply_schema(settings: ClickHouseSettings) -> None:
    """Create the database and its tables where they are missing. Raises UnreachableError."""
    client = connect(settings, database=None)
    try:
        for statement in statements(settings.database, {"trades": settings.trades_ttl_days, "bars": settings.bars_ttl_days}):
            client.command(statement)
    except (ClickHouseError, OSError) as exc:
        raise unreachable(settings, exc) from exc
    finally:
        client.close()
