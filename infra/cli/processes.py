"""Our own processes as the supervisor runs them: settings and the chosen source in, process specs out."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from infra.settings import Settings
from infra.stack.spec import ProcessSpec

Choice = Literal["live", "sim", "none"]
"""Where trades come from, once ``auto`` is decided."""
USDM = "binance-usdm"
WORKER_READY_TIMEOUT_S = 300.0
"""A worker of a changed checkout compiles its kernels first: a minute on two idle cores."""
SERVERS = ("kafka", "clickhouse", "postgres", "registry")


def source_overrides(settings: Settings, choice: Choice) -> dict[str, str]:
    """Settings that point the collector at the simulated exchange; {} for any other source."""
    if choice != "sim":
        return {"source": choice}
    here = f"127.0.0.1:{settings.ports.sim}"
    path = "/usdm" if settings.collector.exchange == USDM else ""
    return {"source": "sim", "collector.rest_url": f"http://{here}", "collector.ws_url": f"ws://{here}{path}"}


def specs(settings: Settings, choice: Choice) -> list[ProcessSpec]:
    """Simulated exchange and collector (as the source asks), workers, sink, repair and API, each ready when its ``/readyz`` says so."""
    found = [_worker(settings, index) for index in range(settings.worker.count)]
    found.append(_ours("sink", "infra.sink", settings.sink.health_port, {"sink.health_port": settings.sink.health_port}))
    found.append(_ours("repair", "infra.repair", settings.repair.health_port, {"repair.health_port": settings.repair.health_port}))
    found.append(_ours("api", "infra.api", settings.api.port, {"ports.api": settings.api.port}, host=settings.api.host))
    if choice != "none":
        after = (*SERVERS, "sim") if choice == "sim" else SERVERS
        ports = {"ports.collector": settings.collector.health_port}
        found.append(_ours("collector", "infra.collector", settings.collector.health_port, ports, after=after))
    if choice == "sim":
        found.append(_sim(settings))
    return found


def _worker(settings: Settings, index: int) -> ProcessSpec:
    port = settings.worker.health_port + index
    arguments = ("--index", str(index))
    made = _ours(f"worker-{index}", "infra.worker", port, {"ports.worker": port}, arguments=arguments)
    return replace(made, ready_timeout_s=WORKER_READY_TIMEOUT_S)


def _sim(settings: Settings) -> ProcessSpec:
    sim = settings.sim
    arguments = ["--port", sim.port, "--symbols", sim.symbols, "--seed", sim.seed]
    if settings.collector.exchange == USDM:  # the market nobody collects costs nothing
        arguments += ["--rate", 0, "--usdm-symbols", sim.symbols, "--usdm-rate", sim.trades_per_s]
    else:
        arguments += ["--rate", sim.trades_per_s, "--usdm-symbols", 0]
    return ProcessSpec(
        name="sim",
        argv=(sys.executable, "-m", "infra.simulated_exchange", *map(str, arguments)),
        ready=f"tcp://127.0.0.1:{sim.port}",
        live=f"http://127.0.0.1:{sim.port}/livez",
        ports={"ports.sim": sim.port},
    )


def _ours(
    name: str,
    module: str,
    port: int,
    ports: Mapping[str, int],
    *,
    arguments: tuple[str, ...] = (),
    after: tuple[str, ...] = SERVERS,
    host: str = "127.0.0.1",
) -> ProcessSpec:
    probed = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host
    return ProcessSpec(
        name=name,
        argv=(sys.executable, "-m", "infra.provisioned", module, *arguments),
        ready=f"http://{probed}:{port}/readyz",
        live=f"http://{probed}:{port}/livez",
        ports=dict(ports),
        after=after,
    )
