"""How settings are read: declared dataclass fields in, checked values with their provenance out.

A component's settings are a frozen dataclass whose fields are made with :func:`option`. :func:`resolve` walks the tree, takes each
value from overrides, environment, TOML file or default (in this order), converts and checks it, and remembers where it came from.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from infra.errors import SettingsError

PREFIX = "MARKETSTREAM_"
Values = Mapping[str, Any]
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


@dataclass(frozen=True, kw_only=True)
class Option:
    """What a settings field is: ``key`` is its dotted path, ``kind`` its Python type, the rest as given to :func:`option`."""

    key: str
    env: str
    kind: Any
    default: Any
    doc: str
    low: float | None
    high: float | None
    secret: bool
    port: bool
    derive: Callable[[Values], Any] | None
    same_as: str | None
    check: Callable[[str], str | None] | None


def option(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    secret: bool = False,
    port: bool = False,
    env: str | None = None,
    derive: Callable[[Values], Any] | None = None,
    same_as: str | None = None,
    check: Callable[[str], str | None] | None = None,
) -> Any:
    """A dataclass field that is a setting.

    Args:
        default: used when nothing sets it and ``derive`` is None.
        doc: one line: meaning, unit, why this default.
        low: smallest allowed number, inclusive.
        high: largest allowed number, inclusive.
        secret: masked wherever settings are shown.
        port: a TCP port of ours: 1..65535 and distinct from every other such field.
        env: variable name where it is not ``MARKETSTREAM_<SECTION>_<FIELD>``.
        derive: computes the default from the values resolved so far (declaration order), by dotted key.
        same_as: dotted key of an earlier field this one mirrors; setting either sets both.
        check: returns what is allowed when a text value is not, None when it is fine.
    """
    if port:
        low, high = 1, 65535
    names = ("doc", "low", "high", "secret", "port", "env", "derive", "same_as", "check")
    meta = dict(zip(names, (doc, low, high, secret, port, env, derive, same_as, check), strict=True))
    return field(default=default, metadata={"option": meta}, repr=not secret)


def declared(root: type) -> list[Option]:
    """All options of a settings dataclass tree, in declaration order."""
    found: list[Option] = []
    hints = get_type_hints(root)
    for item in fields(root):
        kind = hints[item.name]
        if is_dataclass(kind) and isinstance(kind, type):
            section_hints = get_type_hints(kind)
            found.extend(_option_of(f"{item.name}.{sub.name}", sub, section_hints[sub.name]) for sub in fields(kind) if _is_option(sub))
        elif _is_option(item):
            found.append(_option_of(item.name, item, kind))
    return found


def _is_option(item: Field[Any]) -> bool:
    return "option" in item.metadata


def _option_of(key: str, item: Field[Any], kind: Any) -> Option:
    meta = dict(item.metadata["option"])
    env = meta.pop("env") or PREFIX + key.replace(".", "_").upper()
    default = None if item.default is MISSING else item.default
    return Option(key=key, env=env, kind=kind, default=default, **meta)


def nearest(name: str, known: list[str]) -> str:
    """`` Did you mean X?`` where a known name is close, an empty string otherwise."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def resolve(
    options: list[Option], environ: Mapping[str, str], table: Mapping[str, Any], table_name: str, overrides: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Values and provenance by dotted key.

    Raises:
        SettingsError: an unknown variable or key, a value that is not allowed, two names of one setting that disagree, equal ports.
    """
    _refuse_unknown(options, environ, table, table_name, overrides)
    given: dict[str, tuple[Any, str]] = {}
    for item in options:
        found = _given(item, environ, table, table_name, overrides)
        if found is not None:
            given[item.key] = (_convert(item, *found), found[1])
    _mirror(options, given)
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for item in options:
        if item.key in given:
            values[item.key], origin[item.key] = given[item.key]
        else:
            values[item.key], origin[item.key] = _default(item, values), "default"
            _check_range(item, values[item.key], "default")
    _check_ports(options, values)
    return values, origin


def _refuse_unknown(
    options: list[Option], environ: Mapping[str, str], table: Mapping[str, Any], table_name: str, overrides: Mapping[str, str]
) -> None:
    variables = [item.env for item in options] + [PREFIX + "CONFIG", PREFIX + "TEST_STACK"]
    for name in environ:
        if name.startswith(PREFIX) and name not in variables:
            raise SettingsError(f"unknown setting {name} in the environment{nearest(name, variables)}")
    keys = [item.key for item in options]
    for name in table:
        if name not in keys:
            raise SettingsError(f"unknown setting {name} in {table_name}{nearest(name, keys)}")
    for name in overrides:
        if name not in keys:
            raise SettingsError(f"unknown setting {name}{nearest(name, keys)}")


def _given(
    item: Option, environ: Mapping[str, str], table: Mapping[str, Any], table_name: str, overrides: Mapping[str, str]
) -> tuple[Any, str] | None:
    if item.key in overrides:
        return overrides[item.key], "command line"
    if item.env in environ:
        return environ[item.env], f"env:{item.env}"
    if item.key in table:
        return table[item.key], f"file:{table_name}"
    return None


def _mirror(options: list[Option], given: dict[str, tuple[Any, str]]) -> None:
    for item in options:
        if item.same_as is None:
            continue
        mine, other = given.get(item.key), given.get(item.same_as)
        if mine is not None and other is not None and mine[0] != other[0]:
            raise SettingsError(f"{item.key} ({mine[1]}) and {item.same_as} ({other[1]}) are the same setting but differ; keep one")
        if mine is not None:
            given[item.same_as] = mine
        elif other is not None:
            given[item.key] = other


def _default(item: Option, values: Values) -> Any:
    if item.same_as is not None:
        return values[item.same_as]
    return item.derive(values) if item.derive is not None else item.default


def _refuse(item: Option, value: Any, where: str, allowed: str) -> SettingsError:
    shown = "***" if item.secret else repr(value)
    name = where[4:] if where.startswith("env:") else f"{item.key} ({where})"
    return SettingsError(f"{name} is {shown}, but must be {allowed}")


def _convert(item: Option, value: Any, where: str) -> Any:
    kind = item.kind
    if get_origin(kind) is UnionType:
        kind = next(part for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if value not in choices:
            raise _refuse(item, value, where, "one of " + ", ".join(choices) + nearest(str(value), list(choices)))
        return value
    if get_origin(kind) is tuple:
        parts = value if isinstance(value, list) else str(value).split(",")
        return tuple(_to_text(item, str(part).strip(), where) for part in parts if str(part).strip())
    if kind is bool:
        return _to_bool(item, value, where)
    if kind in (int, float):
        return _to_number(item, kind, value, where)
    if kind is Path:
        return _to_path(item, value, where)
    return _to_text(item, value, where)


def _to_text(item: Option, value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _refuse(item, value, where, "a text in quotes")
    allowed = item.check(value) if item.check is not None else None
    if allowed is not None:
        raise _refuse(item, value, where, allowed)
    return value


def _to_path(item: Option, value: Any, where: str) -> Path:
    text = str(value)
    try:
        if not text or "\0" in text:
            raise RuntimeError
        return Path(text).expanduser().absolute()
    except RuntimeError:  # what expanduser raises for a user there is not
        raise _refuse(item, value, where, "the path of a folder") from None


def _to_bool(item: Option, value: Any, where: str) -> bool:
    text = str(value).lower()
    if text not in _TRUE | _FALSE:
        raise _refuse(item, value, where, "true or false")
    return text in _TRUE


def _to_number(item: Option, kind: type, value: Any, where: str) -> int | float:
    noun = "a whole number" if kind is int else "a number"
    try:
        if isinstance(value, bool):
            raise ValueError
        number: int | float = int(str(value)) if kind is int else float(value)
    except ValueError:
        raise _refuse(item, value, where, noun + _range_text(item)) from None
    _check_range(item, number, where)
    return number


def _range_text(item: Option) -> str:
    if item.low is not None and item.high is not None:
        return f" from {item.low:g} to {item.high:.10g}"
    if item.low is not None:
        return f" of at least {item.low:g}"
    return f" of at most {item.high:g}" if item.high is not None else ""


def _check_range(item: Option, value: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    low = item.low if item.low is not None else value
    high = item.high if item.high is not None else value
    if not low <= value <= high:  # false for NaN too
        raise _refuse(item, value, where, ("a whole number" if item.kind is int else "a number") + _range_text(item))


def _check_ports(options: list[Option], values: Values) -> None:
    taken: dict[int, str] = {}
    for item in options:
        if not item.port or item.same_as is not None:
            continue
        port = values[item.key]
        if port in taken:
            raise SettingsError(f"{item.key} and {taken[port]} are both port {port}; give one of them another ({item.env})")
        taken[port] = item.key
