"""Servers in containers for the integration tests: what the environment asks for in, variables that point at the servers out."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

KAFKA_IMAGE = "apache/kafka:4.1.0"
CLICKHOUSE_IMAGE = "clickhouse/clickhouse-server:25.8"
POSTGRES_IMAGE = "postgres:18"


def docker_problem() -> str | None:
    """Why containers cannot be used here, None when they can."""
    try:
        client = importlib.import_module("docker").from_env(timeout=5)
        client.ping()
        client.close()
    except Exception as exc:  # the client raises types of its own, of requests and of urllib3 for one and the same missing daemon
        return f"{type(exc).__name__}: {str(exc)[:120]}"
    return None


@contextmanager
def container_settings(environ: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Variables for the servers that run in containers while the context lasts; empty when processes are to be used."""
    if environ.get("MARKETSTREAM_TEST_STACK", "processes") != "containers":
        yield {}
        return
    problem = docker_problem()
    if problem is not None:
        print(f"containers were asked for, but processes are used: {problem}", file=sys.stderr)
        yield {}
        return
    with ExitStack() as stack:
        try:
            urls = _start(stack)
        except Exception as exc:  # an image that cannot be had is as good a reason as a missing daemon
            stack.close()
            print(f"containers were asked for, but processes are used: {type(exc).__name__}: {str(exc)[:200]}", file=sys.stderr)
            urls = {}
        yield urls


def _start(stack: ExitStack) -> dict[str, str]:
    core: Any = importlib.import_module("testcontainers.core.container").DockerContainer
    kafka: Any = stack.enter_context(importlib.import_module("testcontainers.kafka").KafkaContainer(KAFKA_IMAGE).with_kraft())
    clickhouse = stack.enter_context(core(CLICKHOUSE_IMAGE).with_env("CLICKHOUSE_SKIP_USER_SETUP", "1").with_exposed_ports(8123))
    postgres: Any = stack.enter_context(
        importlib.import_module("testcontainers.postgres").PostgresContainer(
            POSTGRES_IMAGE, username="postgres", password="marketstream", dbname="marketstream", driver=None
        )
    )
    _wait_for_http(f"http://{clickhouse.get_container_host_ip()}:{clickhouse.get_exposed_port(8123)}/ping")
    return {
        "MARKETSTREAM_KAFKA_BOOTSTRAP": kafka.get_bootstrap_server(),
        "MARKETSTREAM_CLICKHOUSE_URL": f"http://{clickhouse.get_container_host_ip()}:{clickhouse.get_exposed_port(8123)}",
        "MARKETSTREAM_POSTGRES_DSN": postgres.get_connection_url(),
    }


def _wait_for_http(url: str) -> None:
    import time
    import urllib.request

    until = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)
