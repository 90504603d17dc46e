"""What servers must hold before a process starts: topics, schemas, tables. Idempotent; the same for local and remote servers."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from infra.clickhouse.client import apply_schema
from infra.database import connected
from infra.kafka import ensure_topics
from infra.registry_client import RegistryClient
from infra.settings import PostgresSettings, Settings


def provision(settings: Settings) -> None:
    """Create topics, register schemas, create tables. Raises UnreachableError, TopicLayoutError, SchemaIncompatibleError."""
    ensure_topics(settings.kafka)
    with RegistryClient.from_settings(settings) as registry:
        registry.register_all()
    apply_schema(settings.clickhouse)
    with ThreadPoolExecutor(1) as thread:  # a loop of its own, for callers that are inside one
        thread.submit(asyncio.run, _migrate(settings.postgres)).result()


async def _migrate(settings: PostgresSettings) -> None:
    async with connected(settings):
        pass  # connecting applies the migrations
