"""The doctor's checks of servers, local or remote: each asks the server itself and changes nothing there."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from infra.cli.doctor import MAX_LAG, Check
from infra.settings import Settings

_TIMEOUT_S: Final = 5.0
_PROVISION: Final = "run `marketstream provision`, or `marketstream up` again"


def _metadata(settings: Settings) -> Any:
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient

    from infra.kafka import unreachable

    try:
        return AdminClient({**settings.kafka.client_config(), "log_level": 0}).list_topics(timeout=_TIMEOUT_S)
    except KafkaException as exc:
        raise unreachable(settings.kafka, exc) from exc


def broker(settings: Settings) -> Check:
    """Whether Kafka answers."""
    known = _metadata(settings)
    return Check(name="broker", ok=True, detail=f"{len(known.brokers)} at {settings.kafka.bootstrap}, cluster {known.cluster_id}")


def topics(settings: Settings) -> Check:
    """Whether the broker holds the catalogue: every topic with as many partitions as it should have."""
    from infra.kafka import partition_count
    from schemas.topics import TOPICS

    known = _metadata(settings).topics
    wrong = []
    for entry in TOPICS.values():
        name, wanted = entry.full_name(settings.kafka.topic_prefix), partition_count(settings.kafka, entry)
        found = len(known[name].partitions) if name in known else 0
        if found != wanted:
            wrong.append(f"{name} has {found} partitions instead of {wanted}" if found else f"{name} is missing")
    if not wrong:
        return Check(name="topics", ok=True, detail=f"{len(TOPICS)} as in the catalogue, {settings.kafka.partitions} partitions each")
    missing = all(text.endswith("missing") for text in wrong)
    remedy = _PROVISION if missing else "set MARKETSTREAM_KAFKA_PARTITIONS as it was, or use another MARKETSTREAM_TOPIC_PREFIX"
    return Check(name="topics", ok=False, detail="; ".join(wrong), remedy=remedy)


def registry(settings: Settings) -> Check:
    """Whether the registry holds our schemas as they are in this release."""
    import json

    import httpx

    from infra.errors import UnreachableError
    from schemas.codec import schema_text
    from schemas.topics import SCHEMA_NAMES, subject

    url, wrong = settings.registry.url, []
    names = list(dict.fromkeys(SCHEMA_NAMES))
    try:
        with httpx.Client(base_url=url, timeout=_TIMEOUT_S, trust_env=False) as client:
            for name in names:
                place = subject(name, settings.kafka.topic_prefix)
                answer = client.post(f"/subjects/{place}", content=json.dumps({"schema": schema_text(name)}))
                if answer.is_error:
                    wrong.append(place)
    except httpx.HTTPError as exc:
        raise UnreachableError(f"the registry at {url} does not answer ({exc}): start the stack or set MARKETSTREAM_REGISTRY_URL") from exc
    if wrong:
        return Check(name="registry", ok=False, detail="not registered as in this release: " + ", ".join(wrong), remedy=_PROVISION)
    return Check(name="registry", ok=True, detail=f"{len(names)} schemas at {url}")


def clickhouse(settings: Settings) -> Check:
    """Whether ClickHouse holds our tables with our columns."""
    from infra.clickhouse.client import connect
    from infra.clickhouse.schema import TABLES

    client = connect(settings.clickhouse, database=None)
    try:
        query = "SELECT table, name FROM system.columns WHERE database = {d:String}"
        found: dict[str, set[str]] = {}
        for table, column in client.query(query, parameters={"d": settings.clickhouse.database}).result_rows:
            found.setdefault(table, set()).add(column)
        version = client.server_version
    finally:
        client.close()
    wrong = []
    for table in TABLES.values():
        missing = {name for name, _ in table.columns} - found.get(table.name, set())
        if missing:
            wrong.append(f"{table.name} lacks {', '.join(sorted(missing))}" if table.name in found else f"{table.name} is missing")
    if wrong:
        return Check(name="clickhouse", ok=False, detail="; ".join(wrong), remedy=_PROVISION)
    return Check(name="clickhouse", ok=True, detail=f"{len(TABLES)} tables at {settings.clickhouse.url}, version {version}")


def postgres(settings: Settings) -> Check:
    """Whether PostgreSQL answers and has every migration of this release."""
    from importlib.resources import files

    place = settings.postgres.dsn.rpartition("@")[2]
    wanted = sorted(entry.name for entry in files("infra.postgres").iterdir() if entry.name.endswith(".sql"))
    version, applied = asyncio.run(_ask_postgres(settings.postgres.dsn))
    missing = [name for name in wanted if name not in applied]
    if missing:
        return Check(name="postgres", ok=False, detail=f"{place} lacks migrations: {', '.join(missing)}", remedy=_PROVISION)
    unknown = sorted(applied - set(wanted))
    if unknown:
        detail = f"{place} has migrations of a newer release: {', '.join(unknown)}"
        return Check(name="postgres", ok=False, detail=detail, remedy="use the release that made them, or another database")
    return Check(name="postgres", ok=True, detail=f"{version} at {place}, {len(wanted)} migrations applied")


async def _ask_postgres(dsn: str) -> tuple[str, set[str]]:
    """Server version and names of the applied migrations."""
    import asyncpg

    from infra.errors import UnreachableError

    place = dsn.rpartition("@")[2]
    try:
        link = await asyncpg.connect(dsn, timeout=_TIMEOUT_S)
    except (OSError, asyncpg.PostgresError, TimeoutError) as exc:
        detail = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
        raise UnreachableError(
            f"PostgreSQL at {place} does not answer ({detail}): start the stack or set MARKETSTREAM_POSTGRES_DSN"
        ) from exc
    try:
        version = ".".join(str(part) for part in link.get_server_version()[:2])
        if await link.fetchval("SELECT to_regclass('schema_migrations')") is None:
            return version, set()
        return version, {row["name"] for row in await link.fetch("SELECT name FROM schema_migrations")}
    finally:
        await link.close()


def lag(settings: Settings) -> Check:
    """Whether every stage keeps up."""
    from infra.progress import lag as measure

    found = measure(settings)
    detail = ", ".join(f"{stage} {count:,}" for stage, count in found.items()) + " records"
    if max(found.values(), default=0) <= MAX_LAG:
        return Check(name="lag", ok=True, detail=detail)
    return Check(name="lag", ok=False, detail=detail, remedy="give it time, or more workers with MARKETSTREAM_WORKER_COUNT")
