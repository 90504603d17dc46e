"""The ClickHouse client of every process: settings in, a connected ``clickhouse-connect`` client out; the same for embedded and server."""

from __future__ import annotations

import http.client
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


def connect(settings: ClickHouseSettings, *, database: str | None = "", timeout_s: int = 120, **options: Any) -> Any:
    """A connected blocking client. ``database=None`` connects before the database exists. Raises UnreachableError.

    ``timeout_s``: longest wait for a piece of an answer.
    """
    try:
        return clickhouse_connect.get_client(
            **address(settings),
            database=settings.database if database == "" else database,
            autogenerate_session_id=False,  # one session would serialise a process's queries
            connect_timeout=5,
            send_receive_timeout=timeout_s,
            **options,
        )
    except (ClickHouseError, OSError) as exc:
        raise unreachable(settings, exc) from exc


def answers(settings: ClickHouseSettings, timeout_s: float = 2.0) -> bool:
    """Whether it answers ``/ping`` now; on a connection of its own, so that a query that hangs is not in the way."""
    place = address(settings)
    kind = http.client.HTTPSConnection if place["secure"] else http.client.HTTPConnection
    link = kind(place["host"], place["port"], timeout=timeout_s)
    try:
        link.request("GET", "/ping")
        return link.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        link.close()


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
