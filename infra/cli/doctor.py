"""`marketstream doctor` and `marketstream provision`: everything the stack needs, checked one by one, each with its remedy."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from infra.cli.context import settings_of
from infra.cli.output import Output, translate
from infra.settings import Settings

OLDEST_PYTHON: Final = (3, 11)
NEWEST_PYTHON: Final = (3, 13)
MAX_LAG: Final = 2000
"""Records a stage may be behind: with a frame a second in each of four partitions that is eight minutes of a quiet market."""
MAX_CLOCK_STEP_MS: Final = 50.0
_CLOCK_WATCH_S: Final = 0.2


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the doctor's answer. ``remedy`` is empty when it is ok."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""


NEED_BROKER: Final = ("topics", "lag")
Probe = Callable[[Settings], Check]


def doctor(output: Output, *, data_dir: Path | None) -> int:
    """Run every check and print it as it is done; 0 when all are ok, 1 otherwise."""
    settings = settings_of(data_dir)
    done: list[Check] = []
    for check in checks(settings):
        done.append(check)
        if not output.as_json:
            output.line(f"{'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.detail}" + (f" -> {check.remedy}" if check.remedy else ""))
    failed = [check for check in done if not check.ok]
    if output.as_json:
        output.emit({"ok": not failed, "checks": [asdict(check) for check in done]})
    else:
        output.line("all is well" if not failed else f"{len(failed)} of {len(done)} checks failed")
    return 1 if failed else 0


def provision(output: Output, *, data_dir: Path | None) -> None:
    """Create what is missing on the servers. Raises UnreachableError and what else ``infra.provision`` raises."""
    from infra.provision import provision as run

    settings = settings_of(data_dir)
    run(settings)
    if output.as_json:
        output.emit({"provisioned": True, "kafka": settings.kafka.bootstrap, "clickhouse": settings.clickhouse.url})
    else:
        output.line(
            f"topics at {settings.kafka.bootstrap}, schemas at {settings.registry.url}, tables at {settings.clickhouse.url} are there"
        )


def checks(settings: Settings) -> Iterator[Check]:
    """Every check, cheap ones first. A check that breaks is a failed check, never an exception."""
    from infra.cli import doctor_servers as servers

    own: list[tuple[str, Probe]] = [
        ("python", python),
        ("disk", disk),
        ("jars", jars),
        ("data folder", data_folder),
        ("ports", ports),
        ("clock", clock),
        ("processes", processes),
        ("broker", servers.broker),
        ("topics", servers.topics),
        ("registry", servers.registry),
        ("clickhouse", servers.clickhouse),
        ("postgres", servers.postgres),
        ("lag", servers.lag),
    ]
    has_broker = True
    for name, probe in own:
        if not has_broker and name in NEED_BROKER:
            yield Check(name=name, ok=False, detail="not looked at, the broker does not answer", remedy="see broker")
            continue
        try:
            yield probe(settings)
        except Exception as exc:
            known = translate(exc)
            text = known.message if known is not None else f"{type(exc).__name__}: {exc}"
            detail, _, remedy = text.rpartition(": ") if known is not None and ": " in text else (text, "", "")
            has_broker = has_broker and name != "broker"
            yield Check(name=name, ok=False, detail=detail, remedy=remedy or "see the logs in " + str(settings.data_dir / "logs"))


def python(settings: Settings, version: tuple[int, int] = sys.version_info[:2]) -> Check:
    """Whether this Python is one we are tested on."""
    text = f"{version[0]}.{version[1]} ({sys.executable})"
    if OLDEST_PYTHON <= version <= NEWEST_PYTHON:
        return Check(name="python", ok=True, detail=text)
    return Check(name="python", ok=False, detail=text, remedy="install Python 3.11, 3.12 or 3.13 and run `make setup`")


def disk(settings: Settings) -> Check:
    """Whether there is room to start and to go on."""
    from infra.stack import datadir

    place = next(folder for folder in (settings.data_dir, *settings.data_dir.parents) if folder.exists())
    free = datadir.free_bytes(place)
    detail = f"{free / 1e9:.1f} GB free where {settings.data_dir} lies"
    if free >= 2 * datadir.MIN_FREE_BYTES:
        return Check(name="disk", ok=True, detail=detail)
    return Check(name="disk", ok=False, detail=detail, remedy="free some space, or choose another folder with --data-dir")


def jars(settings: Settings) -> Check:
    """Whether Kafka's jars are there with their locked sizes; a broker elsewhere needs none."""
    from infra.stack import servers
    from infra.stack.jars import CACHE_DIR, read_lock

    if "kafka" not in servers.local_servers(settings):
        return Check(name="jars", ok=True, detail=f"not needed, Kafka is at {settings.kafka.bootstrap}")
    locked = read_lock()
    wrong = [jar.artifact for jar in locked if not (file := jar.path(CACHE_DIR)).is_file() or file.stat().st_size != jar.size]
    if not wrong:
        return Check(name="jars", ok=True, detail=f"{len(locked)} jars as locked")
    detail = f"{len(wrong)} of {len(locked)} jars are missing or damaged, e.g. {wrong[0]}"
    return Check(name="jars", ok=False, detail=detail, remedy="run `make setup` with a network")


def data_folder(settings: Settings) -> Check:
    """Whether the data folder is ours, of this layout, and whose it is now."""
    from infra.errors import DataDirError
    from infra.stack import datadir
    from infra.stack.supervisor import read_state

    folder = settings.data_dir
    if not (folder / "VERSION").is_file() and not (folder.is_dir() and any(folder.iterdir())):
        return Check(name="data folder", ok=True, detail=f"{folder} is new")
    try:
        datadir.check_version(folder)
    except DataDirError as exc:
        return Check(name="data folder", ok=False, detail=exc.message, remedy="choose another folder with --data-dir")
    state = read_state(folder)
    owner = f"in use by the stack with pid {state.pid}" if state is not None else "not in use"
    return Check(name="data folder", ok=True, detail=f"{folder}, layout {datadir.LAYOUT}, {owner}")


def ports(settings: Settings) -> Check:
    """Whether the ports are ours: listened on by our processes, or free."""
    from infra.cli.ports import listening
    from infra.stack import servers
    from infra.stack.supervisor import read_state

    state = read_state(settings.data_dir)
    expected = {name: port for group in servers.ports(settings).values() for name, port in group.items()}
    expected["ports.api"] = settings.api.port
    taken = listening(expected.values())
    if state is not None:
        silent = [f"{port} ({name})" for name, port in expected.items() if port not in taken]
        if silent:
            return Check(name="ports", ok=False, detail="nobody listens on " + ", ".join(silent), remedy="see `marketstream status`")
        return Check(name="ports", ok=True, detail=f"{min(expected.values())} to {max(expected.values())}, listened on by this stack")
    if taken:
        detail = "in use by other programs: " + ", ".join(f"{port} ({name})" for name, port in expected.items() if port in taken)
        return Check(name="ports", ok=False, detail=detail, remedy="stop them, or move all ports with MARKETSTREAM_PORT_BASE")
    return Check(name="ports", ok=True, detail=f"{min(expected.values())} to {max(expected.values())} are free")


def clock(settings: Settings, wall_us: Callable[[], int] | None = None, steady_us: Callable[[], int] | None = None) -> Check:
    """Whether the system clock runs steadily and has not gone back behind what is stored."""
    import time

    from infra.seam import SystemClock

    system = SystemClock()
    wall_us, steady_us = wall_us or system.now_us, steady_us or system.monotonic_us
    wall, steady = wall_us(), steady_us()
    time.sleep(_CLOCK_WATCH_S)
    step_ms = ((wall_us() - wall) - (steady_us() - steady)) / 1000
    remedy = "let chrony or systemd-timesyncd slew the clock; rows received meanwhile carry wrong receive times, never wrong bars"
    if abs(step_ms) > MAX_CLOCK_STEP_MS:
        return Check(name="clock", ok=False, detail=f"it jumped by {step_ms:+.0f} ms within {_CLOCK_WATCH_S:.1f} s", remedy=remedy)
    newest = max((file.stat().st_mtime_ns // 1000 for file in settings.data_dir.glob("run/*") if file.is_file()), default=0)
    ahead_s = (newest - wall_us()) / 1e6
    if ahead_s > 1:
        return Check(name="clock", ok=False, detail=f"it is {ahead_s:.0f} s behind what this stack wrote last", remedy=remedy)
    return Check(name="clock", ok=True, detail=f"steady to {abs(step_ms):.1f} ms")


def processes(settings: Settings) -> Check:
    """Whether every process of a running stack is ready."""
    from infra.stack.supervisor import Stack

    found = Stack(settings).status()
    if not found:
        return Check(name="processes", ok=False, detail=f"no stack runs on {settings.data_dir}", remedy="start it with `marketstream up`")
    bad = [f"{item.name} is {item.state} ({item.detail})" for item in found if item.state != "ready"]
    if bad:
        return Check(name="processes", ok=False, detail="; ".join(bad), remedy=f"read the logs in {settings.data_dir / 'logs'}")
    restarts = sum(item.restarts for item in found)
    return Check(name="processes", ok=True, detail=f"{len(found)} ready, {restarts} restarts")
