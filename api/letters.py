"""Dead letters as people ask for them: what to list in; rows from ClickHouse with the state that PostgreSQL gives each, out.

A letter's id is its offset in topic ``deadletter``. Its state is what was decided on it: ``open``, ``retried``, ``dropped``, or ``repaired``
once the bars it concerned are made anew. ``marketstream deadletter`` and ``GET /api/v1/deadletters`` both read through here.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import msgspec

from api.deps import HistoryStore

STATES: Final = ("open", "retried", "dropped", "repaired")
_PAGE_ROWS: Final = 500
"""Letters read at a time where only those of a state are wanted."""
_FIELDS: Final = (
    "reason, detail, component, exchange, symbol, topic, partition, offset, place, time_us, known_at_us, raw_size, origin,"
    # too_late letters hold their trade as JSON: its time says which repair covers it
    " if(startsWith(raw, '{'), JSONExtractInt(raw, 'exchange_time_us'), 0) AS trade_time_us"
)
_SETTINGS: Final = "SETTINGS output_format_json_quote_64bit_integers = 0"


@dataclass(frozen=True, kw_only=True, slots=True)
class LetterFilter:
    """Which letters; empty fields ask for nothing in particular."""

    reason: str = ""
    exchange: str = ""
    symbol: str = ""
    component: str = ""
    since_us: int = 0
    """Published at or after this, microseconds UTC."""
    state: str = ""
    """One of ``STATES``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LetterState:
    """What was decided on one letter."""

    state: str = "open"
    decided_by: str = ""
    decided_at: str = ""
    """ISO 8601."""
    outcome: str = ""
    new_letter: int | None = None
    """The letter that its retry made as it failed again."""
    repairs: tuple[int, ...] = field(default=())
    """Jobs of the repair that its retry asked for."""


class LetterStates(Protocol):
    """PostgreSQL's decisions. An unreachable server raises StoreUnavailableError."""

    async def states(self, letters: Sequence[Mapping[str, Any]]) -> dict[int, LetterState]:
        """State by id of those ``letters`` (rows of :class:`Letters`) that are not simply open."""
        ...


class Letters:
    """Reads letters, newest first."""

    def __init__(self, store: HistoryStore, states: LetterStates | None) -> None:
        self._store = store
        self._states = states

    async def page(self, wanted: LetterFilter, *, limit: int, before: int | None = None) -> tuple[list[dict[str, Any]], int | None]:
        """(letters without their bytes, id before which the next page goes on or None). Raises StoreUnavailableError."""
        found: list[dict[str, Any]] = []
        while True:
            size = limit + 1 - len(found) if not wanted.state else _PAGE_ROWS
            rows = await self._rows(wanted, before, size)
            found += [row for row in await self._with_states(rows) if wanted.state in ("", row["state"])]
            if len(found) > limit:
                found = found[:limit]
                return found, found[-1]["id"]
            if len(rows) < size:
                return found, None
            before = rows[-1]["id"]

    async def get(self, letter_id: int) -> dict[str, Any] | None:
        """One letter with its bytes in ``raw_base64``; None where there is none. Raises StoreUnavailableError."""
        sql = (
            f"SELECT toInt64(kafka_offset) AS id, {_FIELDS}, base64Encode(raw) AS raw_base64 FROM deadletter"
            f" WHERE kafka_offset = {{id:UInt64}} LIMIT 1 {_SETTINGS}"
        )
        rows = await self._fetch(sql, {"id": letter_id})
        return (await self._with_states(rows))[0] if rows else None

    async def with_bytes(self, ids: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Letters with their bytes by id; those that are not there are left out. Raises StoreUnavailableError."""
        sql = (
            f"SELECT toInt64(kafka_offset) AS id, {_FIELDS}, base64Encode(raw) AS raw_base64 FROM deadletter"
            f" WHERE kafka_offset IN {{ids:Array(UInt64)}} {_SETTINGS}"
        )
        return {row["id"]: row for row in await self._with_states(await self._fetch(sql, {"ids": list(ids)}))}

    async def _rows(self, wanted: LetterFilter, before: int | None, limit: int) -> list[dict[str, Any]]:
        where, parameters = _where(wanted, before)
        # ids first: the bytes of a letter, up to a MiB, are not read for letters that are not shown
        inner = f"SELECT kafka_offset FROM deadletter WHERE {where} ORDER BY kafka_offset DESC LIMIT {{limit:UInt64}}"
        sql = (
            f"SELECT toInt64(kafka_offset) AS id, {_FIELDS} FROM deadletter WHERE kafka_offset IN ({inner})"
            f" ORDER BY kafka_offset DESC {_SETTINGS}"
        )
        return await self._fetch(sql, parameters | {"limit": limit})

    async def _fetch(self, sql: str, parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
        body = await self._store.fetch(sql, parameters, "JSONEachRow")
        return [msgspec.json.decode(line) for line in body.splitlines()]

    async def _with_states(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        states = await self._states.states(rows) if rows and self._states is not None else {}
        plain = LetterState()
        for row in rows:
            known = states.get(row["id"], plain)
            row |= {
                "state": known.state,
                "decided_by": known.decided_by,
                "decided_at": known.decided_at,
                "outcome": known.outcome,
                "new_letter": known.new_letter,
            }
        return rows


def shown(letter: Mapping[str, Any]) -> dict[str, Any]:
    """A letter as JSON gives it: without what serves only to find its state, its bytes as text beside base64."""
    found = {name: value for name, value in letter.items() if name != "trade_time_us"}
    if "raw_base64" in found:
        found["raw_text"] = base64.b64decode(found["raw_base64"]).decode("utf-8", "replace")
    return found


def _where(wanted: LetterFilter, before: int | None) -> tuple[str, dict[str, Any]]:
    conditions, parameters = ["1"], dict[str, Any]()
    for name in ("reason", "exchange", "symbol", "component"):
        value = getattr(wanted, name)
        if value:
            conditions.append(f"{name} = {{{name}:String}}")
            parameters[name] = value
    if wanted.since_us:
        conditions.append("if(known_at_us > 0, known_at_us, time_us) >= {since:Int64}")
        parameters["since"] = wanted.since_us
    if before is not None:
        conditions.append("kafka_offset < {before:UInt64}")
        parameters["before"] = before
    return " AND ".join(conditions), parameters
