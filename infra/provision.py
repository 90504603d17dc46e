"""What servers must hold before a process starts: topics, schemas, tables. Idempotent; the same for local and remote servers."""

from __future__ import annotations

from infra.clickhouse.client import apply_schema
from infra.kafka import ensure_topics
from infra.registry_client import RegistryClient
from infra.settings import Settings


def provision(settings: Settings) -> None:
    """Create topics, register schemas, create tables. Raises UnreachableError, TopicLayoutError, SchemaIncompatibleError."""
    ensure_topics(settings.kafka)
    with RegistryClient.from_settings(settings) as registry:
        registry.register_all()
    apply_schema(settings.clickhouse)
