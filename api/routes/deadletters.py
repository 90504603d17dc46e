"""``GET /api/v1/deadletters`` and ``/api/v1/deadletters/{id}``: what could not be processed, why, and what became of it. Read-only.

Newest first; ``next`` is the ``before`` of the next page.
"""

from __future__ import annotations

from typing import Final

import msgspec

from api.errors import Problem
from api.http import Answer, Scope
from api.letters import STATES, LetterFilter, Letters, shown
from api.params import parse_query
from schemas.errors import nearest
from schemas.timeframes import parse_time_us

_PARAMETERS: Final = ("reason", "exchange", "symbol", "component", "since", "state", "limit", "before")
_DEFAULT_LIMIT: Final = 100
_MAX_LIMIT: Final = 1_000
_MAX_DIGITS: Final = 18


class DeadLetterRoutes:
    """Answers both resources."""

    def __init__(self, letters: Letters) -> None:
        self._letters = letters

    async def listed(self, scope: Scope) -> Answer:
        """A page of letters. Raises Problem, StoreUnavailableError."""
        given = parse_query(scope["query_string"], _PARAMETERS)
        wanted = LetterFilter(
            reason=given.get("reason", ""),
            exchange=given.get("exchange", ""),
            symbol=given.get("symbol", ""),
            component=given.get("component", ""),
            since_us=_since(given.get("since")),
            state=_state(given.get("state", "")),
        )
        limit = _number("invalid_limit", "limit", given.get("limit", str(_DEFAULT_LIMIT)), 1, _MAX_LIMIT)
        before = _number("invalid_cursor", "before", given["before"], 0, 2**62) if "before" in given else None
        rows, following = await self._letters.page(wanted, limit=limit, before=before)
        return Answer(msgspec.json.encode({"count": len(rows), "next": following, "letters": [shown(row) for row in rows]}))

    async def one(self, scope: Scope) -> Answer:
        """One letter with its bytes. Raises Problem ``not_found``, StoreUnavailableError."""
        text = scope["path_params"]["id"]
        found = await self._letters.get(int(text)) if text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS else None
        if found is None:
            raise Problem("not_found", f"There is no dead letter '{text[:20]}': GET /api/v1/deadletters lists them.")
        return Answer(msgspec.json.encode(shown(found)))


def _since(text: str | None) -> int:
    if text is None:
        return 0
    try:
        return parse_time_us(text[:64])
    except (ValueError, OverflowError) as exc:
        raise Problem("invalid_time", f"'since': {exc}") from None


def _state(text: str) -> str:
    if text and text not in STATES:
        guess = nearest(text, STATES)
        hint = f"did you mean '{guess}'?" if guess else f"known are: {', '.join(STATES)}."
        raise Problem("unknown_parameter", f"Unknown state '{text[:40]}': {hint}", nearest=guess)
    return text


def _number(code: str, name: str, text: str, low: int, high: int) -> int:
    if text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS and low <= int(text) <= high:
        return int(text)
    raise Problem(code, f"{name} is '{text[:20]}', allowed is {low:,} to {high:,}.")
