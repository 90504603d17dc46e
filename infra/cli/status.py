"""`marketstream status`: what the supervisor knows about its processes, what Kafka knows about the lag."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from infra.cli.context import settings_of
from infra.cli.output import Output
from infra.errors import MarketstreamError, NotRunningError
from infra.settings import Settings
from infra.stack.state import ProcessStatus


def status(output: Output, *, data_dir: Path | None) -> None:
    """Print processes, lag and addresses. Raises NotRunningError after it when nothing runs."""
    from infra.stack.supervisor import Stack

    settings = settings_of(data_dir)
    processes = Stack(settings).status()
    value = status_value(settings, processes)
    if output.as_json:
        output.emit(value)
    else:
        _show(output, value)
    if not processes:
        raise not_running(settings)


def not_running(settings: Settings) -> NotRunningError:
    """One sentence for a stack that does not run."""
    return NotRunningError(f"no stack runs on the data folder {settings.data_dir}; start one with `marketstream up`.")


def status_value(settings: Settings, processes: list[ProcessStatus]) -> dict[str, Any]:
    """What `status --json` prints: ``processes`` (name, pid, state and more), ``lag`` (records by stage), ``urls``."""
    value: dict[str, Any] = {"processes": [process_value(item) for item in processes], "lag": {}, "urls": {}}
    if not processes:
        return value
    from infra.progress import lag
    from infra.stack import servers

    value["urls"] = servers.urls(settings)
    value["data_dir"] = str(settings.data_dir)
    value["source"] = settings.source
    try:
        value["lag"] = lag(settings)
    except MarketstreamError as exc:
        value["trouble"] = exc.message
    return value


def process_value(item: ProcessStatus) -> dict[str, Any]:
    """One process of `status --json`."""
    return {
        "name": item.name,
        "pid": item.pid,
        "state": item.state,
        "ports": dict(item.ports),
        "restarts": item.restarts,
        "reason": item.reason,
        "restarted_at": item.restarted_at,
        "ready_s": item.ready_s,
        "log": item.log,
        "detail": item.detail,
    }


def _show(output: Output, value: dict[str, Any]) -> None:
    if not value["processes"]:
        return
    show_processes(output, value["processes"], value["urls"])
    output.line("lag: " + (", ".join(f"{stage} {count:,} records" for stage, count in value["lag"].items()) or value.get("trouble", "-")))


def show_processes(output: Output, processes: list[dict[str, Any]], urls: dict[str, str]) -> None:
    """The table of what runs where."""
    rows = []
    for item in processes:
        where = urls.get(item["name"]) or ", ".join(f"127.0.0.1:{port}" for port in item["ports"].values())
        times = item["restarts"]
        again = f"started again {times} time{'s' if times != 1 else ''}, last because it {item['reason']}" if times else ""
        rows.append((item["name"], str(item["pid"]), item["state"], where, item["log"], item["detail"] or again))
    columns = ("process", "pid", "state", "address", "log", "")
    output.table(columns, rows)
