"""The servers of the local stack as process specs: settings in; what to prepare, and what to run, out.

A server is left out when the settings point elsewhere: with ``MARKETSTREAM_KAFKA_BOOTSTRAP=broker:9092`` no local broker is started.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from infra.settings import Settings
from infra.stack import fetch, kafka, postgres
from infra.stack.spec import ProcessSpec

ROOT = Path(__file__).resolve().parents[2]
Prepare = Callable[[], ProcessSpec]


def local_servers(settings: Settings) -> list[str]:
    """Names of the servers this stack runs itself."""
    here = "127.0.0.1:{}".format
    wanted = {
        "kafka": settings.kafka.bootstrap == here(settings.ports.kafka),
        "clickhouse": settings.clickhouse.url.rstrip("/") == "http://" + here(settings.ports.clickhouse),
        "postgres": "@" + here(settings.ports.postgres) + "/" in settings.postgres.dsn,
        "registry": settings.registry.url.rstrip("/") == "http://" + here(settings.ports.registry),
    }
    return [name for name, local in wanted.items() if local]


def plan(settings: Settings) -> dict[str, Prepare]:
    """What makes each local server startable. The functions may take seconds the first time and may run at the same time."""
    makers: dict[str, Callable[[Settings], ProcessSpec]] = {
        "kafka": _kafka,
        "clickhouse": _clickhouse,
        "postgres": _postgres,
        "registry": _registry,
    }
    return {name: partial(makers[name], settings) for name in local_servers(settings)}


def urls(settings: Settings) -> dict[str, str]:
    """Where everything answers; no secrets."""
    return {
        "api": f"http://{settings.api.host}:{settings.api.port}",
        "kafka": settings.kafka.bootstrap,
        "clickhouse": settings.clickhouse.url,
        "postgres": settings.postgres.dsn.rpartition("@")[2],
        "registry": settings.registry.url,
    }


def ports(settings: Settings) -> dict[str, dict[str, int]]:
    """Ports each local server listens on, by setting."""
    every = {
        "kafka": {"ports.kafka": settings.ports.kafka, "ports.controller": settings.ports.controller},
        "clickhouse": {"ports.clickhouse": settings.ports.clickhouse},
        "postgres": {"ports.postgres": settings.ports.postgres},
        "registry": {"ports.registry": settings.ports.registry},
    }
    return {name: every[name] for name in local_servers(settings)}


def _kafka(settings: Settings) -> ProcessSpec:
    fetch.ensure()
    listen = settings.ports
    argv = kafka.prepare(settings.data_dir / "kafka", settings.kafka, port=listen.kafka, controller_port=listen.controller)
    return ProcessSpec(
        name="kafka",
        argv=tuple(argv),
        env=kafka.environment(),
        ready=f"kafka://127.0.0.1:{listen.kafka}",
        live=f"kafka://127.0.0.1:{listen.kafka}",
        ports=ports(settings)["kafka"],
        stop_timeout_s=20,
    )


def _clickhouse(settings: Settings) -> ProcessSpec:
    return ProcessSpec(
        name="clickhouse",
        argv=(sys.executable, "-m", "infra.stack.clickhouse_server"),
        ready=f"http://127.0.0.1:{settings.ports.clickhouse}/ping",
        live=f"http://127.0.0.1:{settings.ports.clickhouse}/ping",
        ports=ports(settings)["clickhouse"],
    )


def _postgres(settings: Settings) -> ProcessSpec:
    argv = postgres.prepare(settings.data_dir / "postgres", settings.postgres, port=settings.ports.postgres)
    return ProcessSpec(
        name="postgres",
        argv=tuple(argv),
        ready=f"postgres://127.0.0.1:{settings.ports.postgres}",
        live=f"postgres://127.0.0.1:{settings.ports.postgres}",
        ports=ports(settings)["postgres"],
        stop_signal="SIGINT",  # fast shutdown; SIGTERM would wait for every client to leave
        unprivileged=True,
    )


def _registry(settings: Settings) -> ProcessSpec:
    return ProcessSpec(
        name="registry",
        argv=(sys.executable, "-m", "infra.stack.registry"),
        ready=f"http://127.0.0.1:{settings.ports.registry}/subjects",
        live=f"http://127.0.0.1:{settings.ports.registry}/livez",  # its 404 needs no lock that waits for the broker
        ports=ports(settings)["registry"],
        after=("kafka",) if "kafka" in local_servers(settings) else (),
    )
