"""Ports for a second stack: settings in, the port range to use out, moved aside where another stack of ours has the usual one.

Only a stack with a data folder of its own and no port setting is moved; a port held by any other program stays an error, because then
somebody has to decide which of the two moves.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

from infra.cli.context import read_note
from infra.errors import PortInUseError
from infra.settings import Settings, load_settings

STEP: Final = 1000
"""Ports a stack may use from its base on."""
LAST_BASE: Final = 60_000
Holders = Callable[[Iterable[int]], dict[int, Path | None]]
"""For ports that are listened on: the data folder of the stack that does, None for any other program. Free ports are left out."""


def free_ports(settings: Settings, overrides: Mapping[str, str], holders: Holders | None = None) -> tuple[dict[str, str], str | None]:
    """What to set besides ``overrides`` so that the ports are free ({} for nothing) and, where they are moved now, a sentence about it.

    Raises:
        PortInUseError: no range is free.
    """
    if settings.origin.get("data_dir") == "default" or any(_is_set(settings, key) for key in _port_keys(settings)):
        return {}, None
    ask = holders or listening
    noted = read_note(settings.data_dir).get("ports.base")
    if noted is not None:
        earlier = load_settings(overrides={**overrides, "ports.base": noted})
        if not ask(_ports(earlier)):
            return {"ports.base": noted}, None
    others = {folder for folder in ask(_ports(settings)).values() if folder is not None and folder != settings.data_dir}
    if not others:
        return {}, None
    for base in range(settings.ports.base + STEP, LAST_BASE, STEP):
        moved = load_settings(overrides={**overrides, "ports.base": str(base)})
        if not ask(_ports(moved)):
            other = sorted(map(str, others))[0]
            return {
                "ports.base": str(base)
            }, f"the stack of {other} has the usual ports; this one uses {base} and up (MARKETSTREAM_PORT_BASE={base})"
    raise PortInUseError("other stacks have every range of ports; stop one with `marketstream down --data-dir DIR`")


def listening(ports: Iterable[int]) -> dict[int, Path | None]:
    """Who listens on ``ports`` of this machine, as far as we may see it."""
    import psutil

    wanted = set(ports)
    found: dict[int, Path | None] = {port: None for port in wanted if _is_taken(port)}
    if not found:
        return {}
    try:
        links = psutil.net_connections("tcp")
    except psutil.Error:
        return found
    for link in links:
        if link.status == psutil.CONN_LISTEN and link.laddr and link.laddr.port in found and link.pid:
            folder = _data_dir_of(link.pid)
            if folder is not None:
                found[link.laddr.port] = folder
    return found


def _is_taken(port: int) -> bool:
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ports in TIME_WAIT are free
        try:
            trial.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def _data_dir_of(pid: int) -> Path | None:
    """The data folder a process of ours was started with: the supervisor gives every process all settings."""
    import psutil

    try:
        folder = psutil.Process(pid).environ().get("MARKETSTREAM_DATA_DIR")
    except psutil.Error:
        return None
    return Path(folder) if folder else None


def _port_keys(settings: Settings) -> list[str]:
    return [key for key in settings.values() if key.startswith("ports.")]


def _ports(settings: Settings) -> list[int]:
    values = settings.values()
    return [int(values[key]) for key in _port_keys(settings) if key != "ports.base"]


def _is_set(settings: Settings, key: str) -> bool:
    return settings.origin.get(key) != "default"
