"""`marketstream bench`: runs ``tests/performance/bench_<name>.py`` of the checkout and shows each figure beside those of other programs.

A benchmark is a module with ``run() -> dict``: ``figures`` (name -> number, or a dict with ``median``, ``spread`` and ``unit``) and ``ratios``
(name -> number). Answers with ``--json``: one object ``{"name", "figures", "ratios"}`` a benchmark, one a line.
"""

from __future__ import annotations

import importlib
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infra.cli.context import ROOT
from infra.cli.output import Output
from infra.errors import MarketstreamError, SettingsError
from infra.options import nearest

FOLDER = ROOT / "tests" / "performance"
PEER_PYTHON = ROOT / ".venv-bench" / "bin" / "python"
"""Python of the environment with the programs we measure beside us; there after `make bench` has set it up."""
_PREFIX = "bench_"


def available(folder: Path = FOLDER) -> list[str]:
    """Names of the benchmarks in the checkout, sorted."""
    return sorted(file.stem.removeprefix(_PREFIX) for file in folder.glob(f"{_PREFIX}*.py"))


def chosen(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """The benchmarks to run: all when none is named. Raises SettingsError."""
    if not known:
        raise MarketstreamError(f"there are no benchmarks in {FOLDER}: run `make bench` in a checkout of the project.")
    for name in names:
        if name not in known:
            raise SettingsError(f"unknown benchmark '{name}'{nearest(name, list(known)) or '; known are ' + ', '.join(known)}")
    return list(dict.fromkeys(names)) or list(known)


def bench(output: Output, *, names: Sequence[str]) -> None:
    """Run benchmarks one after the other and show each when it is done."""
    todo = chosen(names, available())
    sys.path.insert(0, str(ROOT))
    for name in todo:
        output.note(f"measuring {name} ...")
        result = as_result(name, importlib.import_module(f"tests.performance.{_PREFIX}{name}").run())
        if output.as_json:
            output.emit(result)
        else:
            _show(output, result)
    if not output.as_json:
        output.line(machine())


def as_result(name: str, answer: dict[str, Any]) -> dict[str, Any]:
    """What `--json` gives for one benchmark: ``name``, ``figures`` and ``ratios`` always, more where the benchmark has more."""
    return {**answer, "name": name, "figures": answer.get("figures", {}), "ratios": answer.get("ratios", {})}


def machine() -> str:
    """The machine the figures were taken on, in a line."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0] if lines else model
    return f"on {os.cpu_count()} cores of {model}, {platform.system()} {platform.release()}, Python {platform.python_version()}"


def rows(values: dict[str, Any]) -> list[tuple[str, Any, str, Any]]:
    """``(name, value, unit, spread)`` for every figure, nested dicts by dotted name."""
    found: list[tuple[str, Any, str, Any]] = []
    for name, value in values.items():
        if isinstance(value, dict) and "median" in value:
            found.append((name, value["median"], str(value.get("unit", "")), value.get("spread")))
        elif isinstance(value, dict):
            found.extend((f"{name}.{key}", *rest) for key, *rest in rows(value))
        else:
            found.append((name, value, "", None))
    return found


def _show(output: Output, result: dict[str, Any]) -> None:
    table = [(name, _number(value), unit, _spread(spread)) for name, value, unit, spread in rows(result["figures"])]
    output.table((result["name"], "median", "unit", "spread"), table)
    for name, value, _, _ in rows(result["ratios"]):
        output.line(f"  {name}: {_number(value)}x")
    for note in result.get("notes", ()):
        output.line(f"  {note}")
    output.line("")


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _spread(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " .. ".join(_number(part) for part in value)
    return "" if value is None else _number(value)
