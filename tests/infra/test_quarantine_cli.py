"""What `marketstream quarantine` and `quality` refuse before they ask a server, and how they show what they found."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from api.quality import Quality, SuspectFilter
from infra.cli import quality as quality_command
from infra.cli import quarantine as command
from infra.cli.output import Output
from infra.errors import SettingsError
from infra.quarantine import MOST_AT_ONCE, Desk
from infra.settings import Settings, load_settings

ROW: dict[str, Any] = {
    "exchange": "binance", "symbol": "BTC-USDT", "trade_id": 7, "price": 70.0, "size": 1.0, "side": -1, "exchange_time_us": 1_700_000_000_000_000,
    "receive_time_us": 1_700_000_000_000_000, "reason": 1, "band_low": 99.0, "band_high": 101.0, "state": 1, "source": "binance/ws",
    "known_at_us": 1_700_000_000_000_000,
}  # fmt: skip


class _Quality(Quality):
    """Answers from lists."""

    def __init__(self, suspects: Sequence[dict[str, Any]], feeds: Sequence[dict[str, Any]] = ()) -> None:
        self.rows, self.scores = list(suspects), list(feeds)

    async def suspects(self, wanted: SuspectFilter, *, limit: int) -> list[dict[str, Any]]:
        """Those of the ids, or all."""
        return [row for row in self.rows if not wanted.trade_ids or row["trade_id"] in wanted.trade_ids][:limit]

    async def feeds(self, symbol: str = "", **_: Any) -> list[dict[str, Any]]:
        """All."""
        return self.scores

    async def held_now(self, symbol: str, exchange: str = "") -> dict[str, int]:
        """One."""
        return {"binance": len(self.rows)}


class _Desk(Desk):
    """Decides and notes it instead of telling the broker."""

    decided: list[tuple[int, int]]

    async def decide(self, suspects: Sequence[dict[str, Any]], state: int) -> list[Any]:
        """What was decided on."""
        self.decided = [(row["trade_id"], state) for row in suspects]
        return []


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> _Quality:
    """A stack whose suspects are in a list."""
    quality = _Quality([ROW])

    @asynccontextmanager
    async def desk(settings: Settings) -> AsyncIterator[Desk]:
        yield _Desk(settings, quality)

    for module in (command, quality_command):
        monkeypatch.setattr(module, "desk", desk)
        monkeypatch.setattr(module, "settings_of", lambda _: load_settings({}))
    return quality


def say(run: Any, *arguments: Any, as_json: bool = False, **how: Any) -> str:
    """What a command prints."""
    out = io.StringIO()
    run(Output(as_json=as_json, out=out, err=out), *arguments, data_dir=None, **how)
    return out.getvalue()


LIST: dict[str, Any] = dict.fromkeys(("exchange", "symbol", "reason", "state", "since")) | {"limit": 50}
DECIDE: dict[str, Any] = dict.fromkeys(("exchange", "symbol", "reason"))


def test_suspects_are_listed_in_words(stack: _Quality) -> None:
    """As a table and as JSON; nothing found is a sentence."""
    assert all(
        word in say(command.list_suspects, **LIST) for word in ("binance:BTC-USDT", "held", "price", "sell", "99 .. 101", "2023-11-14")
    )
    (row,) = json.loads(say(command.list_suspects, as_json=True, **LIST))["suspects"]
    assert (row["state"], row["reason"], row["side"], row["trade_id"]) == ("held", "price", "sell", 7)
    assert "band_high        101.0" in say(command.show, trade_id=7, exchange=None, symbol=None)
    stack.rows.clear()
    assert say(command.list_suspects, **LIST) == "No suspect trades of that kind.\n"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"state": "heldd"}, "did you mean held"),
        ({"reason": "x"}, "it is one of price, time"),
        ({"since": "yesterday"}, "write a time"),
    ],
)
def test_words_that_are_none_are_refused(stack: _Quality, wrong: dict[str, str], said: str) -> None:
    """With the nearest one or all there are."""
    with pytest.raises(SettingsError, match=said):
        say(command.list_suspects, **LIST | wrong)


@pytest.mark.parametrize("run", [command.release, command.discard])
def test_a_decision_never_reaches_further_than_meant(stack: _Quality, run: Any) -> None:
    """It wants to know which trades; an id that was never held, and one that two markets have, are refused; so are too many."""
    with pytest.raises(SettingsError, match="wants trade ids"):
        say(run, trade_ids=[], **DECIDE)
    with pytest.raises(SettingsError, match="Trade 8 was never held"):
        say(run, trade_ids=[7, 8], **DECIDE)
    assert say(run, trade_ids=[7], **DECIDE) == "No trade of that kind is held.\n"  # the desk of this test answers nothing
    stack.rows.append(ROW | {"exchange": "kraken"})
    with pytest.raises(SettingsError, match="a suspect of binance:BTC-USDT and of kraken:BTC-USDT"):
        say(run, trade_ids=[7], **DECIDE)
    stack.rows *= MOST_AT_ONCE
    with pytest.raises(SettingsError, match="more than 10,000"):
        say(run, trade_ids=[], **DECIDE | {"exchange": "binance"})


def test_feeds_are_shown_worst_first(stack: _Quality, tmp_path: Path) -> None:
    """With a hint at what is held."""
    feed = {
        "exchange": "binance", "symbol": "BTC-USDT", "source": "binance/ws", "score": 1.0, "time_us": 1_700_000_000_000_000, "band_low": None,
        "band_high": None, "checks_passed": 5, "checks_failed": 0, "history": [],
        "anomalies": {"bad_values": 0, "bad_times": 0, "held": 1, "confirmed": 0, "volume_spikes": 0},
    }  # fmt: skip
    stack.scores = [feed, feed | {"source": "replay", "score": 0.5, "band_low": 9.0, "band_high": 11.0}]
    text = say(quality_command.quality, symbol="BTC-USDT", exchange=None, limit=60)
    assert text.index("replay") < text.index("binance/ws")
    assert "1 trade(s) of binance:BTC-USDT held back" in text
    assert "9 .. 11" in text
    stack.scores = []
    assert "No scores yet" in say(quality_command.quality, symbol=None, exchange=None, limit=60)
