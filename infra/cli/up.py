"""`marketstream up` and `marketstream down`: one command that starts and stops the whole stack as a tree of processes."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.cli.context import settings_of, write_note
from infra.cli.output import Output
from infra.cli.ports import free_ports
from infra.cli.processes import Choice, source_overrides, specs
from infra.cli.status import process_value, show_processes
from infra.errors import SettingsError, StartError, UnreachableError
from infra.runs import begin_run, end_run
from infra.seam import SystemClock
from infra.settings import Settings, load_settings
from infra.stack import servers
from infra.stack.supervisor import Stack, read_state

PROBE_TIMEOUT_S = 3.0
"""Seconds the live venue gets to answer before the simulated exchange is taken."""
_SOURCES = "SOURCES"
"""File of a data folder that says whose trades it holds."""
_NAMES = {"live": "the live venue", "sim": "the simulated exchange"}


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Where trades come from and why."""

    choice: Choice
    why: str


def up(output: Output, *, data_dir: Path | None, source: str | None, detach: bool) -> None:
    """Start everything; return when it is ready (``detach``) or when it was stopped by Ctrl-C.

    Raises MarketstreamError: the one thing that is wrong; nothing is left running then.
    """
    started = time.monotonic()
    settings, overrides = settings_to_start(data_dir, source)
    aside, moved = free_ports(settings, overrides)
    overrides |= aside
    if moved is not None:
        output.note(moved)
    decision = decide(settings, kept=kept_source(settings))
    settings = load_settings(overrides=overrides | source_overrides(settings, decision.choice))
    output.note(f"source: {decision.choice} ({decision.why})")
    stack = Stack(settings, processes=specs(settings, decision.choice))
    began_us = SystemClock().now_us()
    with _terminated_as_interrupt():
        # nothing is stopped when this fails: it has stopped what it started, and a stack that was there before is not ours to stop
        processes = stack.up(detach=detach, on_progress=lambda event: _tell(output, event))
        try:
            write_note(settings)
            keep_source(settings, decision.choice)
            _record_run(output, settings, decision.choice, began_us)
            _announce(output, settings, [process_value(item) for item in processes], time.monotonic() - started, detach)
            if not detach:
                _watch(output, settings, stack)
        except KeyboardInterrupt:
            output.note("stopping ...")
        finally:
            if not detach:
                _stop(settings, stack)
    if not detach:
        output.note(f"stopped; the data stays in {settings.data_dir}")


def settings_to_start(data_dir: Path | None, source: str | None) -> tuple[Settings, dict[str, str]]:
    """Settings for `up` and what the command line set of them: nothing that an earlier `up` was given. Raises SettingsError."""
    overrides = {} if data_dir is None else {"data_dir": str(data_dir.absolute())}
    if source is not None:
        overrides["source"] = source
    return load_settings(overrides=overrides), overrides


def decide(settings: Settings, probe: Callable[[Settings], str | None] | None = None, kept: str | None = None) -> Decision:
    """Which source to take.

    ``probe`` answers None when the live venue answers, else why not. ``kept``: the source whose trades this folder holds under the venue's
    name. The simulated exchange speaks and numbers like the venue, but its trades are none of the venue's. Raises SettingsError.
    """
    venue, folder = settings.collector.exchange, settings.data_dir
    if settings.source == "none":
        return Decision(choice="none", why="asked for: no collector, replay only")
    if settings.source in ("live", "sim"):
        if kept not in (None, settings.source):
            raise SettingsError(
                f"{folder} holds trades of {_NAMES[kept]} as '{venue}', and those of {_NAMES[settings.source]} would stand between them: "
                "choose another folder with --data-dir"
            )
        return Decision(choice="live" if settings.source == "live" else "sim", why="asked for")
    if kept == "sim":
        return Decision(choice="sim", why=f"{folder} holds its trades; take another --data-dir for {venue} itself")
    trouble = (probe or probe_live)(settings)
    if trouble is None:
        return Decision(choice="live", why=f"{venue} answers")
    if kept == "live":
        return Decision(
            choice="live", why=f"{venue} does not answer now ({trouble}), but {folder} holds its trades; the collector goes on trying"
        )
    return Decision(choice="sim", why=f"{venue} does not answer here ({trouble}); this is the simulated exchange, not a real market")


def kept_source(settings: Settings) -> str | None:
    """Whose trades the folder holds under the venue's name: ``live``, ``sim``, or None for nobody's yet."""
    found = _sources(settings).get(_place(settings))
    return found if found in _NAMES else None


def keep_source(settings: Settings, choice: Choice) -> None:
    """Note whose trades the folder holds from now on."""
    if choice != "none" and kept_source(settings) is None:
        text = json.dumps({**_sources(settings), _place(settings): choice})
        (settings.data_dir / _SOURCES).write_text(text + "\n", encoding="utf-8")


def _sources(settings: Settings) -> dict[str, str]:
    with suppress(OSError, ValueError):
        found = json.loads((settings.data_dir / _SOURCES).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _place(settings: Settings) -> str:
    return f"{settings.kafka.topic_prefix}{settings.collector.exchange}"


def probe_live(settings: Settings) -> str | None:
    """Ask the venue's REST interface for a sign of life; None when it gave one, else one phrase."""
    from collectors.binance.feed import venue_of
    from schemas.errors import VocabularyError

    try:
        venue = venue_of(settings.collector.exchange, rest_url=settings.collector.rest_url)
    except VocabularyError:
        return "it has no live collector"
    url = f"{venue.rest_url}{venue.rest_path}/ping"
    import httpx

    try:
        answer = httpx.get(url, timeout=PROBE_TIMEOUT_S)
    except (httpx.HTTPError, OSError) as exc:
        return "timed out" if isinstance(exc, httpx.TimeoutException) else "no connection"
    return None if answer.is_success else f"HTTP {answer.status_code}"


def down(output: Output, *, data_dir: Path | None) -> None:
    """Stop the stack. It is no error when none runs."""
    settings = settings_of(data_dir)
    began = time.monotonic()
    _end_run(settings)
    stopped = Stack(settings).down()
    if output.as_json:
        output.emit({"stopped": stopped, "data_dir": str(settings.data_dir)})
    elif stopped:
        output.line(f"stopped after {time.monotonic() - began:.1f} s; the data stays in {settings.data_dir}")
    else:
        output.line(f"nothing runs on {settings.data_dir}")


def _tell(output: Output, event: Mapping[str, Any]) -> None:
    if event["event"] == "ready":
        output.note(f"{event['name']} is ready after {event['seconds']:.1f} s")
    elif event["event"] == "restarting":
        output.note(f"{event['name']} {event.get('detail', 'ended')}; it is started again")


def _announce(output: Output, settings: Settings, processes: list[dict[str, Any]], seconds: float, detach: bool) -> None:
    urls = servers.urls(settings)
    if output.as_json:
        output.emit({"event": "up", "seconds": round(seconds, 2), "source": settings.source, "processes": processes, "urls": urls})
        return
    show_processes(output, processes, urls)
    output.line(f"everything is up after {seconds:.1f} s: {urls['api']}  (data and logs: {settings.data_dir})")
    if detach:
        output.line("`marketstream status` shows it, `marketstream down` stops it")


def _watch(output: Output, settings: Settings, stack: Stack) -> None:
    from infra.cli.watch import watch

    def ended(seconds: float) -> bool:
        return stack.wait(seconds) is not None

    watch(output, settings, lambda: stack.status(check=False), ended)
    code = stack.wait(0)
    if code:
        raise StartError(f"the stack ended by itself with code {code}; see {settings.data_dir / 'logs' / 'supervisor.log'}")


def _record_run(output: Output, settings: Settings, source: str, began_us: int) -> None:
    """Record the run for `marketstream runs` and `parity`; a stack whose PostgreSQL is away runs all the same."""
    try:
        name = asyncio.run(begin_run(settings, source, began_us))
    except UnreachableError as exc:
        output.note(f"this run is not recorded: {exc.message}")
        return
    output.note(f"run: {name}")


def _end_run(settings: Settings) -> None:
    """Note the end of the run while PostgreSQL still answers; where it does not, the end is found in the topics."""
    if read_state(settings.data_dir) is not None:
        with suppress(UnreachableError):
            asyncio.run(end_run(settings))


def _stop(settings: Settings, stack: Stack) -> None:
    """Stop the tree whatever happens meanwhile: a second Ctrl-C must not leave half of it running."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _end_run(settings)
        stack.down()
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _terminated_as_interrupt() -> Iterator[None]:
    """While active, SIGTERM and SIGHUP end the command as Ctrl-C does: with everything stopped."""
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
