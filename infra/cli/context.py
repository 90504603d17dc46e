"""Which stack a command means: `--data-dir`, the environment or the stack last started from this checkout in, settings out.

`up` notes in the data folder how it was set, so that `status`, `replay` or `export` in another shell reach the same servers without
repeating its variables; what the environment or the command line of the later command says still wins. Secrets are never noted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from infra.settings import Settings, load_settings, options

ROOT: Final = Path(__file__).resolve().parents[2]
NOTE: Final = "run/started-with.json"
"""File in the data folder: ``{"settings": {dotted key: text}}`` of what was set and is no secret."""
POINTER: Final = ROOT / ".cache" / "current-stack"
"""File that names the data folder of the stack last started from this checkout."""


def settings_of(data_dir: Path | None, overrides: Mapping[str, str] | None = None, *, environ: Mapping[str, str] = os.environ) -> Settings:
    """Settings of the stack a command speaks to, as it was started. Raises SettingsError."""
    given = dict(overrides or {})
    if data_dir is not None:
        given["data_dir"] = str(data_dir.absolute())
    settings = load_settings(environ, overrides=given)
    if settings.origin.get("data_dir") == "default" and not (settings.data_dir / NOTE).is_file():
        other = _last_started()
        if other is not None:
            given["data_dir"] = str(other)
            settings = load_settings(environ, overrides=given)
    noted = read_note(settings.data_dir)
    fresh = {key: text for key, text in noted.items() if settings.origin.get(key) == "default"}
    if not fresh:
        return settings
    settings = load_settings(environ, overrides=fresh | given)
    return replace(settings, origin={**settings.origin, **dict.fromkeys(fresh, "file:" + NOTE)})


def read_note(data_dir: Path) -> dict[str, str]:
    """What `up` noted in that folder; {} where there is no readable note. Keys that are no settings any more are left out."""
    try:
        noted: Any = json.loads((data_dir / NOTE).read_text("utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    known = {item.key for item in options()}
    return {key: str(text) for key, text in noted.items() if key in known} if isinstance(noted, dict) else {}


def write_note(settings: Settings) -> None:
    """Note how this stack was set, and that it is the one last started."""
    secret = {item.key for item in options() if item.secret}
    # defaults are left out: ports follow ports.base, and a later release may have better ones
    shown = {key: text for key, text, origin in settings.shown() if origin != "default" and key not in secret and key != "data_dir"}
    (settings.data_dir / NOTE).parent.mkdir(parents=True, exist_ok=True)
    _replace(settings.data_dir / NOTE, json.dumps({"settings": shown}, indent=1))
    if os.access(POINTER.parent.parent, os.W_OK):  # a container's root is read-only
        POINTER.parent.mkdir(exist_ok=True)
        _replace(POINTER, str(settings.data_dir))


def _replace(path: Path, text: str) -> None:
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.write_text(text, "utf-8")
    fresh.replace(path)


def _last_started() -> Path | None:
    try:
        folder = Path(POINTER.read_text("utf-8").strip())
    except (OSError, ValueError):
        return None
    return folder if (folder / NOTE).is_file() else None
