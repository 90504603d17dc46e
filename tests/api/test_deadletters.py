"""Dead letters over REST, in process: pages by state, one letter, refusals; and what the store is asked."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from api.app import create_app
from api.deps import ApiLimits, Deps
from api.errors import CODES, StoreUnavailableError
from api.letters import LetterFilter, Letters, LetterState
from infra.seam import SystemClock
from tests.api.support import MemoryKafka, MemorySymbols

PATH = "/api/v1/deadletters"


class LetterTable:
    """`api.deps.HistoryStore` that answers what `api.letters` asks from a list of letters."""

    def __init__(self, count: int) -> None:
        self.rows = [
            {
                "id": number,
                "reason": ("too_late", "bad")[number % 2],
                "exchange": "binance",
                "symbol": "BTC-USDT",
                "known_at_us": 1_700_000_000_000_000,
            }
            for number in range(count)
        ]
        self.asked: list[tuple[str, Mapping[str, Any]]] = []
        self.reachable = True

    async def fetch(self, sql: str, parameters: Mapping[str, Any], fmt: str) -> bytes:
        """Rows as JSON lines, newest first."""
        if not self.reachable:
            raise StoreUnavailableError("clickhouse", "ClickHouse does not answer.")
        self.asked.append((sql, parameters))
        rows = [row for row in reversed(self.rows) if parameters.get("reason", row["reason"]) == row["reason"]]
        if "id" in parameters:
            rows = [{**row, "raw_base64": base64.b64encode(b"\xffraw").decode()} for row in rows if row["id"] == parameters["id"]]
        rows = [row for row in rows if row["id"] < parameters.get("before", 2**62)][: parameters.get("limit", 1)]
        return b"".join(json.dumps({**row, "trade_time_us": 5}).encode() + b"\n" for row in rows)

    def stream(self, sql: str, parameters: Mapping[str, Any], fmt: str) -> Any:
        """Not asked for here."""
        raise NotImplementedError

    async def ping(self) -> None:
        """It answers."""


class Decided:
    """`api.letters.LetterStates`: every third letter is dropped."""

    async def states(self, letters: Sequence[Mapping[str, Any]]) -> dict[int, LetterState]:
        """States."""
        return {
            letter["id"]: LetterState(state="dropped", decided_by="me@here", outcome="o") for letter in letters if letter["id"] % 3 == 0
        }


@asynccontextmanager
async def serving(table: LetterTable) -> AsyncIterator[httpx.AsyncClient]:
    """The app over that table."""
    deps = Deps(
        history=table,
        symbols=MemorySymbols("binance:BTC-USDT"),
        frames=MemoryKafka(),
        letters=Decided(),
        clock=SystemClock(),
        partitions=4,
        limits=ApiLimits(cache_ttl_s=0),
    )
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=create_app(deps)), base_url="http://api") as http:  # type: ignore[arg-type]
        yield http


async def pages(http: httpx.AsyncClient, **parameters: Any) -> list[list[dict[str, Any]]]:
    """Every page of a listing."""
    found: list[list[dict[str, Any]]] = []
    following: dict[str, Any] = {}
    while True:
        answer = (await http.get(PATH, params={**parameters, **following})).json()
        assert answer["count"] == len(answer["letters"])
        found.append(answer["letters"])
        if answer["next"] is None:
            return found
        following = {"before": answer["next"]}


async def test_pages_run_from_new_to_old_and_meet() -> None:
    """Each letter is on one page; the last page names no next."""
    async with serving(LetterTable(25)) as http:
        found = await pages(http, limit=10)
    assert [len(page) for page in found] == [10, 10, 5]
    assert [row["id"] for page in found for row in page] == list(range(24, -1, -1))
    assert found[0][0] == {
        "id": 24, "reason": "too_late", "exchange": "binance", "symbol": "BTC-USDT", "known_at_us": 1_700_000_000_000_000,
        "state": "dropped", "decided_by": "me@here", "decided_at": "", "outcome": "o", "new_letter": None,
    }  # fmt: skip


@pytest.mark.parametrize("limit", [1, 3, 7, 400])
async def test_letters_of_a_state_are_found_wherever_they_lie(limit: int) -> None:
    """States stand in another store: pages are filled from as many letters as it takes, none twice, none left out."""
    async with serving(LetterTable(1_300)) as http:
        found = await pages(http, state="dropped", limit=limit)
    assert [row["id"] for page in found for row in page] == list(range(1_299, -1, -3))
    assert all(len(page) == limit for page in found[:-1])


async def test_one_letter_comes_with_its_bytes() -> None:
    """As base64 and as text, whatever they are."""
    async with serving(LetterTable(3)) as http:
        found = (await http.get(f"{PATH}/2")).json()
    assert (found["id"], found["state"]) == (2, "open")
    assert base64.b64decode(found["raw_base64"]) == b"\xffraw"
    assert found["raw_text"] == "\ufffdraw"


@pytest.mark.parametrize(
    ("path", "code"),
    [
        (f"{PATH}/99", "not_found"),
        (f"{PATH}/x", "not_found"),
        (f"{PATH}/-1", "not_found"),
        (f"{PATH}/{'9' * 30}", "not_found"),
        (f"{PATH}?state=opne", "unknown_parameter"),
        (f"{PATH}?colour=red", "unknown_parameter"),
        (f"{PATH}?reason=a&reason=b", "repeated_parameter"),
        (f"{PATH}?since=yesterday", "invalid_time"),
        (f"{PATH}?limit=0", "invalid_limit"),
        (f"{PATH}?limit=1001", "invalid_limit"),
        (f"{PATH}?before=x", "invalid_cursor"),
    ],
)  # fmt: skip
async def test_a_wrong_request_is_one_problem(path: str, code: str) -> None:
    """Its code is stable and its sentence names the culprit."""
    async with serving(LetterTable(3)) as http:
        answer = await http.get(path)
    assert (answer.status_code, answer.json()["code"]) == (CODES[code][0], code)


async def test_a_store_that_is_away_is_a_503() -> None:
    """With the store's name."""
    table = LetterTable(3)
    table.reachable = False
    async with serving(table) as http:
        answer = await http.get(PATH)
    assert (answer.status_code, answer.json()["code"]) == (503, "clickhouse_unavailable")


async def test_values_travel_as_parameters_and_the_bytes_of_letters_stay_where_they_are() -> None:
    """No text of a request stands in the SQL; a list asks for ids before it asks for rows, and for no bytes."""
    table = LetterTable(0)
    wanted = LetterFilter(reason="a'; DROP", exchange="b", symbol="c", component="d", since_us=7)
    assert await Letters(table, None).page(wanted, limit=5, before=9) == ([], None)
    ((sql, parameters),) = table.asked
    assert "DROP" not in sql
    assert "raw_base64" not in sql
    assert parameters == {"reason": "a'; DROP", "exchange": "b", "symbol": "c", "component": "d", "since": 7, "before": 9, "limit": 6}
