"""The real stack for integration tests: started once a session on free ports and a temporary folder, stopped with the session.

Processes of the local stack by default. ``MARKETSTREAM_TEST_STACK=containers`` takes the servers' own images where a Docker daemon runs
and they can be had; where not, the reason is printed and the processes are used.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from infra.settings import Settings, load_settings
from infra.stack.kafka import free_ports
from infra.stack.supervisor import Stack
from tests.integration.containers import container_settings

_PORTS = ("KAFKA", "CONTROLLER", "CLICKHOUSE", "POSTGRES", "REGISTRY", "API", "COLLECTOR", "WORKER", "SINK", "REPAIR", "SIM")
_serial = itertools.count(1)


@dataclass(frozen=True, kw_only=True)
class RunningStack:
    """``settings`` point every client at the running servers; ``supervisor`` runs those that are processes of ours."""

    settings: Settings
    supervisor: Stack

    def with_prefix(self, prefix: str, **variables: str) -> Settings:
        """The same servers with a topic prefix of its own, and further ``MARKETSTREAM_`` variables."""
        return load_settings({**self.settings.as_environ(), "MARKETSTREAM_TOPIC_PREFIX": prefix, **variables})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder is an integration test."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.integration)


def process_environ(data_dir: Path) -> dict[str, str]:
    """Variables of a stack of its own: free ports and a folder."""
    ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
    return {
        "MARKETSTREAM_CONFIG": "",
        "MARKETSTREAM_DATA_DIR": str(data_dir),
        **{f"MARKETSTREAM_PORT_{name}": str(port) for name, port in ports.items()},
    }


@pytest.fixture(scope="session")
def stack() -> Iterator[RunningStack]:
    """Kafka, ClickHouse, PostgreSQL and the registry, ready; no process of them is left when the session ends."""
    with tempfile.TemporaryDirectory(prefix="marketstream-stack-", ignore_cleanup_errors=True) as folder:
        environ = process_environ(Path(folder) / "data")
        with container_settings(os.environ) as urls:
            settings = load_settings({**environ, **urls})
            supervisor = Stack(settings)
            supervisor.up()
            try:
                yield RunningStack(settings=settings, supervisor=supervisor)
            finally:
                supervisor.down()


@pytest.fixture
def topic_prefix() -> str:
    """A topic prefix no other test has: topics, subjects and consumer groups of a test are its own."""
    return f"t{next(_serial)}-{uuid.uuid4().hex[:6]}."
