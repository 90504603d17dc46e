"""The servers and processes a benchmark runs against, on free ports and a folder of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from infra.provision import provision
from infra.settings import Settings, load_settings
from infra.stack.supervisor import ProcessSpec, Stack
from tests.integration.conftest import process_environ

ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def servers(**variables: str) -> Iterator[Settings]:
    """Kafka, ClickHouse, PostgreSQL and registry, provisioned; stopped at the end."""
    with tempfile.TemporaryDirectory(prefix="marketstream-bench-", ignore_cleanup_errors=True) as folder:
        settings = load_settings({**process_environ(Path(folder) / "data"), **variables})
        stack = Stack(settings)
        stack.up()
        try:
            provision(settings)
            yield settings
        finally:
            stack.down()


def with_variables(settings: Settings, **variables: str) -> Settings:
    """The same servers with other ``MARKETSTREAM_`` variables."""
    return load_settings({**settings.as_environ(), **variables})


def child_environ(settings: Settings) -> dict[str, str]:
    """Environment of a process of ours on these settings; ``MARKETSTREAM_BENCH_*`` are no settings and would be refused."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MARKETSTREAM_")}
    return {**inherited, **settings.as_environ(), "PYTHONPATH": str(ROOT)}


@contextlib.contextmanager
def process(
    settings: Settings, argv: Sequence[str], *, core: int | None = None, log: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """``python ARGV`` on these settings, pinned to ``core`` when given; ended by its pid at the end."""
    out = log.open("wb") if log is not None else subprocess.DEVNULL
    child = subprocess.Popen(
        _pinned([sys.executable, *argv], core), env=child_environ(settings), cwd=ROOT, stdout=out, stderr=subprocess.STDOUT
    )
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(15)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def answer_of(
    settings: Settings, argv: Sequence[str], *, core: int | None = None, timeout_s: float = 120, python: str = sys.executable
) -> str:
    """Standard output of ``python ARGV``. Raises CalledProcessError with its errors in the message."""
    done = subprocess.run(
        _pinned([python, *argv], core),
        env=child_environ(settings),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def _pinned(argv: list[str], core: int | None) -> list[str]:
    return argv if core is None else ["taskset", "-c", str(core), *argv]


__all__ = ["ProcessSpec", "answer_of", "child_environ", "process", "servers", "with_variables"]
