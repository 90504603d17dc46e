"""Reads the part of YAML that docker-compose.yml is written in, and refuses the rest: no YAML library is among our dependencies.

Known: block mappings and lists of strings by indentation of two spaces, flow lists and mappings of scalars, quoted and plain scalars,
comments, one ``&anchor`` a mapping, ``*alias`` as a value and ``<<: *alias``. Every scalar is a string.
"""

from __future__ import annotations

import re
from typing import Any

_LINE = re.compile(r"^(?P<indent> *)(?P<key>[\w<.-]+):(?: +(?P<value>.*))?$")


def load(text: str) -> dict[str, Any]:
    """The document as nested dicts. Raises ValueError at the first line it does not know."""
    lines = [(len(line) - len(line.lstrip()), line.strip()) for line in map(_uncommented, text.splitlines()) if line.strip()]
    anchors: dict[str, Any] = {}
    value, rest = _mapping(lines, 0, anchors)
    if rest:
        raise ValueError(f"unexpected indentation: {rest[0][1]}")
    return value


def _uncommented(line: str) -> str:
    return re.sub(r"(^|\s)#.*$", "", line).rstrip()


def _mapping(lines: list[tuple[int, str]], indent: int, anchors: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[int, str]]]:
    found: dict[str, Any] = {}
    while lines and lines[0][0] == indent:
        match = _LINE.match(lines[0][1])
        if match is None:
            raise ValueError(f"not understood: {lines[0][1]}")
        key, text, lines = match["key"], match["value"] or "", lines[1:]
        anchor = re.fullmatch(r"&(\w+)", text)
        if text and anchor is None:
            value: Any = _flow(text, anchors)
        elif lines and lines[0][0] > indent:
            value, lines = _mapping(lines, lines[0][0], anchors)
        else:
            value = None
        if anchor is not None:
            anchors[anchor[1]] = value
        if key == "<<":
            found = {**value, **found}
        elif key in found:
            found[key] = value  # an own key wins over a merged one
        else:
            found[key] = value
    return found, lines


def _flow(text: str, anchors: dict[str, Any]) -> Any:
    if text.startswith("*"):
        return anchors[text[1:]]
    if text[0] in "[{" and text[-1] != {"[": "]", "{": "}"}[text[0]]:
        raise ValueError(f"open bracket: {text}")
    if text.startswith("["):
        return [_flow(part, anchors) for part in _parts(text[1:-1])]
    if text.startswith("{"):
        return {key.strip(): _flow(value.strip(), anchors) for key, _, value in (part.partition(":") for part in _parts(text[1:-1]))}
    if text[0] in "\"'":
        if len(text) < 2 or text[-1] != text[0]:
            raise ValueError(f"open quote: {text}")
        return text[1:-1]
    if text[0] in "|>!%@`&":
        raise ValueError(f"not in this subset: {text}")
    return text


def _parts(text: str) -> list[str]:
    return [part.strip() for part in re.findall(r'(?:"[^"]*"|\{[^}]*\}|[^,"]+)+', text) if part.strip()]
