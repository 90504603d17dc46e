"""Dead letters on the real stack: listed, shown, tried again the normal way, dropped; whatever the kind, nothing is lost or doubled."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl
import pytest

from infra.cli.main import main
from infra.clickhouse.client import connect
from infra.kafka import FrameProducer, committed_offsets, end_offsets
from infra.progress import SINK_GROUP
from infra.provision import provision
from infra.registry_client import RegistryClient
from infra.replay import replay_file
from infra.settings import Settings
from infra.stack.kafka import free_ports
from processors.bars import build
from schemas.codec import FrameCodec, schema_text
from schemas.frames import GAP_FILLED, GAP_OPEN, Frame
from schemas.partitions import partition_of
from schemas.topics import subject
from streams.deadletters import dead_letter
from tests.integration.conftest import RunningStack

ROOT = Path(__file__).resolve().parents[2]
START_US = 1_723_161_600_000_000
KEY = "binance:BTC-USDT"
COLUMN = '{"name":"venue_flags","type":{"type":"bytes","logicalType":"int64-le"},"default":"","fill":0}'


@pytest.fixture(scope="module")
def settings(stack: RunningStack) -> Iterator[Settings]:
    """Worker, sink, repair and API on topics and a database of their own."""
    ports = dict(zip(("WORKER", "SINK", "API", "REPAIR"), free_ports(4), strict=True))
    found = stack.with_prefix(
        "letters.",
        MARKETSTREAM_CLICKHOUSE_DATABASE="letters",
        MARKETSTREAM_WORKER_SNAPSHOT_INTERVAL_S="0.2",
        MARKETSTREAM_WORKER_TIMEFRAMES="1s,1m",
        **{f"MARKETSTREAM_PORT_{name}": str(port) for name, port in ports.items()},
    )
    provision(found)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MARKETSTREAM_")} | found.as_environ()
    with ExitStack() as running:
        for name in ("worker", "sink", "repair", "api"):
            log = running.enter_context((found.data_dir / f"test-letters-{name}.log").open("wb"))
            child = subprocess.Popen([sys.executable, "-m", f"infra.{name}"], env=environ, cwd=ROOT, stdout=log, stderr=log)
            running.callback(child.wait, 20)
            running.callback(child.terminate)
        yield found


class Shell:
    """The command line against that stack, in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str) -> tuple[int, Any]:
        """(exit code, JSON printed); the error where it failed."""
        code = main(["deadletter", *arguments, "--json"])
        out = self._capsys.readouterr()
        return code, json.loads(out.out or out.err)


@pytest.fixture
def shell(settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    """`marketstream deadletter ... --json`."""
    for name, value in settings.as_environ().items():
        monkeypatch.setenv(name, value)
    return Shell(capsys)


def until(check: Callable[[], Any], seconds: float = 90) -> Any:
    """What ``check()`` gives once it is true."""
    end = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)
    return found


def send(settings: Settings, *records: tuple[str, int, bytes]) -> None:
    """Publish bytes."""

    async def run() -> None:
        with RegistryClient.from_settings(settings) as registry:
            producer = FrameProducer(settings.kafka, registry)
            for topic, partition, value in records:
                await producer.send_raw(topic, partition, None, value)
            await producer.flush()

    asyncio.run(run())


def write_letter(settings: Settings, **fields: Any) -> int:
    """Publish a letter as a component would; its id once it is stored."""

    async def run() -> int:
        with RegistryClient.from_settings(settings) as registry:
            producer = FrameProducer(settings.kafka, registry)
            await producer.send_row("deadletter", "", dead_letter(**fields))
            return (await producer.flush())["deadletter"][0]

    number = asyncio.run(run())
    wait_stored(settings, "deadletter")
    return number


def wait_stored(settings: Settings, *topics: str) -> None:
    """Until the sink holds everything those topics hold now."""
    ends = end_offsets(settings.kafka, topics)

    def done() -> bool:
        found = committed_offsets(settings.kafka, SINK_GROUP, topics)
        return all(found[name][place] >= end for name in topics for place, end in ends[name].items() if end)

    until(done)


def trades(key: str, ids: range, start_us: int, **more: Any) -> Frame:
    """A trade a second."""
    count = len(ids)
    times = start_us + np.arange(count, dtype=np.int64) * 1_000_000
    columns = {
        "symbol_code": np.zeros(count, np.int32),
        "trade_id": np.array(ids, np.int64),
        "price": 100.0 + np.arange(count) % 7,
        "size": np.ones(count),
        "side": np.ones(count, np.int8),
        "exchange_time_us": times,
        "receive_time_us": times + 500,
    }
    return Frame(**{"source": "binance/ws/0", "watermark_us": int(times[-1]), "symbols": (key,), "columns": columns} | more)


def query(settings: Settings, sql: str) -> list[tuple[Any, ...]]:
    """Rows of ClickHouse."""
    client = connect(settings.clickhouse)
    try:
        return [tuple(row) for row in client.query(sql).result_rows]
    finally:
        client.close()


def assert_bars_become_those_of_the_trades(settings: Settings, symbol: str) -> None:
    """Soon bars stored == build(trades stored), for every minute with trades; the last one may still be open."""
    names = ("exchange", "symbol", "trade_id", "price", "size", "side", "exchange_time_us", "receive_time_us")
    rows = query(settings, f"SELECT {', '.join(names)} FROM trades WHERE symbol = '{symbol}' ORDER BY exchange_time_us, trade_id")
    made = build(pl.DataFrame(rows, schema=list(names), orient="row"), ["1m"]).filter(pl.col("trade_count") > 0)
    wanted = sorted((int(row["open_time"].timestamp() * 1e6), row["trade_count"], row["close"]) for row in made.iter_rows(named=True))
    sql = (
        "SELECT open_time_us, argMax(trade_count, revision) AS trades, argMax(close, revision) FROM bars"
        f" WHERE symbol = '{symbol}' AND timeframe_s = 60 GROUP BY open_time_us HAVING trades > 0 ORDER BY open_time_us"
    )
    until(lambda: query(settings, sql) in (wanted, wanted[:-1]))


def letter_of(shell: Shell, number: int) -> dict[str, Any]:
    """`deadletter show`."""
    code, found = shell("show", str(number))
    assert code == 0
    return dict(found)


# A record that could not be decoded.


def test_a_record_whose_schema_came_late_is_read_after_all(settings: Settings, shell: Shell) -> None:
    """Its trades are stored as those of the past and their bars made anew; a second retry changes nothing."""
    key = "binance:LATE-USDT"
    place = partition_of(key, settings.kafka.partitions)
    with RegistryClient.from_settings(settings) as registry:
        codec = registry.frame_codec("trades")
        text = schema_text("trades")[:-2] + "," + COLUMN + "]}"
        coming = _next_id(registry)
        newer = FrameCodec("trades", coming, text)
        send(
            settings,
            ("trades", place, codec.encode(trades(key, range(100), START_US))),
            ("trades", place, newer.encode(trades(key, range(100, 160), START_US + 100_000_000))),
            ("trades", place, codec.encode(trades(key, range(160, 400), START_US + 160_000_000))),
        )
        found = until(lambda: shell("list", "--reason", "undecodable_frame", "--state", "open")[1]["letters"])
        (letter,) = [row for row in found if row["topic"] == "trades"]
        assert (letter["partition"], letter["component"], letter["state"]) == (place, "worker", "open")
        answer = registry._request("POST", f"/subjects/{subject('trades', 'letters.')}/versions", {"schema": text})
        assert answer["id"] == coming
    code, done = shell("retry", str(letter["id"]))
    assert (code, done["retried"]) == (0, 1)
    assert "60 trades published" in done["results"][0]["detail"]
    until(lambda: query(settings, "SELECT count() FROM trades WHERE symbol = 'LATE-USDT'") == [(400,)])
    until(lambda: letter_of(shell, letter["id"])["state"] == "repaired")
    assert_bars_become_those_of_the_trades(settings, "LATE-USDT")
    before = end_offsets(settings.kafka, ["trades"])
    code, again = shell("retry", str(letter["id"]))
    assert (code, again["results"][0]["result"]) == (0, "unchanged")
    assert end_offsets(settings.kafka, ["trades"]) == before
    assert shell("list", "--symbol", "LATE-USDT")[1]["letters"] == [], "no trade of the past came too late for the worker"


def _next_id(registry: RegistryClient) -> int:
    """The id the registry gives next: they are counted up."""
    number = max(registry.register_all().values())
    while True:
        try:
            registry.schema(number + 1)
        except KeyError:
            return number + 1
        number += 1


def test_a_record_that_stays_garbage_becomes_a_letter_that_names_its_origin(settings: Settings, shell: Shell) -> None:
    """The old letter is settled, the new one is open; nothing is published to the topic again."""
    send(settings, ("trades", 1, b"garbage that stays"))
    wait_stored(settings, "trades")
    letter = until(lambda: [row for row in shell("list", "--reason", "undecodable_frame")[1]["letters"] if row["raw_size"] == 18])[0]
    before = end_offsets(settings.kafka, ["trades"])
    code, done = shell("retry", str(letter["id"]))
    assert (code, done["failed"]) == (1, 1)
    new = done["results"][0]["new_letter"]
    wait_stored(settings, "deadletter")
    made = letter_of(shell, new)
    assert (made["origin"], made["state"], made["topic"], made["offset"]) == (letter["id"], "open", "trades", letter["offset"])
    assert base64.b64decode(made["raw_base64"]) == b"garbage that stays"
    settled = letter_of(shell, letter["id"])
    assert (settled["state"], settled["new_letter"]) == ("retried", new)
    assert end_offsets(settings.kafka, ["trades"]) == before


def test_a_record_of_another_topic_is_published_again_without_what_is_over(settings: Settings, shell: Shell) -> None:
    """Of a gaps record the row whose gap is filled by now stays away; the other row is stored."""
    key = "binance:GAP-USDT"
    place = partition_of(key, settings.kafka.partitions)

    def gap(ids: list[int], state: int) -> Frame:
        one = np.ones(len(ids), np.int64)
        columns = {name: one * START_US for name in ("start_time_us", "end_time_us", "exchange_time_us", "receive_time_us")}
        columns |= {"first_missing_id": one, "last_missing_id": one, "gap_id": np.array(ids, np.int64), "recovered": one}
        small = {"evidence": one.astype(np.int8), "state": (one * state).astype(np.int8), "channel": one.astype(np.int8)}
        return Frame(source="s", watermark_us=1, symbols=(key,), columns={"symbol_code": np.zeros(len(ids), np.int32), **columns, **small})

    with RegistryClient.from_settings(settings) as registry:
        codec = registry.frame_codec("gaps")
        raw = codec.encode(gap([71, 72], GAP_OPEN))
        send(settings, ("gaps", place, b"where the record was"))
        offset = end_offsets(settings.kafka, ["gaps"])["gaps"][place] - 1
        send(settings, ("gaps", place, codec.encode(gap([71], GAP_FILLED))))
        wait_stored(settings, "gaps")
    fields = {"reason": "undecodable_frame", "detail": "d", "component": "sink", "topic": "gaps", "partition": place, "offset": offset}
    number = write_letter(settings, raw=raw, time_us=START_US, place="by hand", **fields)
    code, done = shell("retry", str(number))
    assert (code, done["retried"]) == (0, 1)
    assert done["results"][0]["detail"].startswith("1 of its 2 rows have been replaced by newer ones")
    wait_stored(settings, "gaps")
    sql = "SELECT gap_id, argMax(state, kafka_offset) FROM gaps WHERE gap_id IN (71, 72) GROUP BY gap_id ORDER BY gap_id"
    assert query(settings, sql) == [(71, GAP_FILLED), (72, GAP_OPEN)]


def test_a_long_record_is_read_from_its_topic(settings: Settings, shell: Shell) -> None:
    """A letter holds a MiB; the rest of the record is fetched, and when it is gone the letter says so and stays open."""
    with RegistryClient.from_settings(settings) as registry:
        codec = registry.frame_codec("quotes")
        columns = {name: np.full(30_000, 5, dtype) for name, dtype in codec.dtypes.items()} | {"symbol_code": np.zeros(30_000, np.int32)}
        columns["exchange_time_us"] = np.full(30_000, START_US)
        raw = codec.encode(Frame(source="s", watermark_us=1, symbols=(KEY,), columns=columns))
    assert len(raw) > 1_048_576
    send(settings, ("quotes", 2, raw))
    offset = end_offsets(settings.kafka, ["quotes"])["quotes"][2] - 1
    fields = {"reason": "undecodable_frame", "detail": "d", "component": "sink", "topic": "quotes", "partition": 2, "time_us": START_US}
    there = write_letter(settings, raw=raw, offset=offset, place="long", **fields)
    gone = write_letter(settings, raw=raw, offset=offset + 99, place="long", **fields)
    assert shell("retry", str(there))[1]["retried"] == 1
    assert end_offsets(settings.kafka, ["quotes"])["quotes"][2] == offset + 2
    code, done = shell("retry", str(gone))
    assert (code, done["results"][0]["result"]) == (1, "refused")
    assert f"quotes[2]@{offset + 99} is not there any more" in done["results"][0]["detail"]
    assert letter_of(shell, gone)["state"] == "open"


# A message of a venue.

MESSAGE = {
    "stream": "btcusdt@trade",
    "data": {
        "e": "trade",
        "E": 1,
        "s": "BTCUSDT",
        "t": 900,
        "p": "61000.5",
        "q": "0.5",
        "T": START_US // 1000 + 900_000,
        "m": True,
        "M": True,
    },
}


def test_a_message_goes_through_the_mapper_again(settings: Settings, shell: Shell) -> None:
    """A stream that nobody had bound then is known now: its trade is stored once, and has its bar."""
    send_known(settings)
    fields = {"reason": "unknown_stream", "detail": "d", "component": "collector", "exchange": "binance", "place": "binance/ws/0"}
    number = write_letter(settings, raw=json.dumps(MESSAGE).encode(), time_us=START_US + 901_000_000, **fields)
    code, done = shell("retry", "--reason", "unknown_stream")
    assert (code, done["retried"], [item["id"] for item in done["results"]]) == (0, 1, [number])
    sql = "SELECT price, size, side, exchange_time_us, receive_time_us FROM trades WHERE symbol = 'BTC-USDT' AND trade_id = 900"
    assert until(lambda: query(settings, sql)) == [(61000.5, 0.5, -1, START_US + 900_000_000, START_US + 901_000_000)]
    assert len(done["results"][0]["repairs"]) == 1
    assert shell("retry", "--reason", "unknown_stream")[1] == {"results": []}


def send_known(settings: Settings) -> None:
    """Trades that make BTC-USDT a known market."""
    with RegistryClient.from_settings(settings) as registry:
        codec = registry.frame_codec("trades")
    place = partition_of(KEY, settings.kafka.partitions)
    send(settings, ("trades", place, codec.encode(trades(KEY, range(5000, 5060), START_US + 2_000_000_000))))
    wait_stored(settings, "trades")


@pytest.mark.parametrize(
    ("fields", "result", "words"),
    [
        ({"component": "collector", "exchange": "binance", "raw": b"{half a mess"}, "failed", "no JSON object"),
        ({"component": "collector", "exchange": "kraken", "raw": b"{}"}, "refused", "no mapper of 'kraken'"),
        ({"component": "worker", "reason": "bad_price", "raw": b"{}", "topic": "trades"}, "refused", "No other try"),
        ({"component": "worker", "reason": "too_late", "raw": b"{}", "topic": "trades", "exchange": "binance", "symbol": "X-Y"}, "refused", "its trade as JSON"),
        ({"component": "replay", "exchange": "binance", "symbol": "BTC-USDT", "raw": b"1,2", "place": "gone.csv:7"}, "refused", "gone.csv"),
        ({"component": "sink", "reason": "odd", "topic": "bars", "raw": b""}, "refused", "cannot be tried again"),
        ({"component": "worker", "reason": "undecodable_frame", "topic": "bars.state", "raw": b"", "partition": 0, "offset": 1}, "refused", "bars.state"),
    ],
)  # fmt: skip
def test_what_cannot_be_tried_again_says_why(settings: Settings, shell: Shell, fields: dict[str, Any], result: str, words: str) -> None:
    """One sentence each; refused letters stay open, a failed try makes a letter."""
    number = write_letter(settings, **{"reason": "malformed_message", "detail": "It was bad.", "time_us": START_US} | fields)
    code, done = shell("retry", str(number))
    assert (code, done["results"][0]["result"]) == (1, result)
    assert words in done["results"][0]["detail"]
    assert letter_of(shell, number)["state"] == ("open" if result == "refused" else "retried")


# A trade that came too late.


def test_a_trade_too_late_for_its_bar_is_repaired_by_itself_or_by_a_retry(settings: Settings, shell: Shell) -> None:
    """The worker's letter ends as repaired: its bar holds the trade. A retry then changes nothing."""
    key = "binance:SLOW-USDT"
    place = partition_of(key, settings.kafka.partitions)
    with RegistryClient.from_settings(settings) as registry:
        codec = registry.frame_codec("trades")
    send(
        settings,
        ("trades", place, codec.encode(trades(key, range(10, 1000), START_US))),
        ("trades", place, codec.encode(trades(key, range(1, 2), START_US + 500_000, watermark_us=START_US + 900_000_000))),
    )
    letter = until(lambda: shell("list", "--reason", "too_late", "--symbol", "SLOW-USDT")[1]["letters"])[0]
    until(lambda: letter_of(shell, letter["id"])["state"] == "repaired")
    assert_bars_become_those_of_the_trades(settings, "SLOW-USDT")
    assert shell("retry", str(letter["id"]))[1]["results"][0]["result"] == "unchanged"


# A line of a file.


def test_a_line_of_a_replayed_file_is_parsed_by_the_layout_of_the_file(settings: Settings, shell: Shell, tmp_path: Path) -> None:
    """A bad line fails again; a good one is stored with its bar; without the file a sentence says so."""
    path = tmp_path / "trades.csv"
    lines = [f"{n},100.5,1,100.5,{START_US // 1000 + n * 1000},True,True" for n in range(1, 120)]
    lines[50] = lines[50].replace("100.5,1,", "nothing,1,", 1)
    path.write_text("\n".join(lines) + "\n")
    summary = asyncio.run(replay_file(settings, path, exchange="binance", symbol="FILE-USDT"))
    assert summary.deadlettered == 1
    wait_stored(settings, "deadletter")
    (bad,) = shell("list", "--component", "replay", "--symbol", "FILE-USDT")[1]["letters"]
    assert bad["place"] == f"{path}:51"
    assert shell("retry", str(bad["id"]))[1]["results"][0]["result"] == "failed"
    fields = {"reason": "malformed_row", "detail": "d", "component": "replay", "exchange": "binance", "symbol": "FILE-USDT"}
    good = write_letter(settings, raw=lines[50].replace("nothing", "101").encode(), time_us=START_US, place=bad["place"], **fields)
    assert shell("retry", str(good))[1]["retried"] == 1
    until(lambda: query(settings, "SELECT price FROM trades WHERE symbol = 'FILE-USDT' AND trade_id = 51") == [(101.0,)])
    until(lambda: letter_of(shell, good)["state"] == "repaired")
    assert_bars_become_those_of_the_trades(settings, "FILE-USDT")


# Dropping, listing, the API.


def test_dropped_letters_are_kept_and_can_be_tried_after_all(settings: Settings, shell: Shell) -> None:
    """Dropping twice changes nothing; who dropped it stands in the list."""
    numbers = [
        write_letter(
            settings, reason="drop_me", detail="d", component="collector", exchange="binance", raw=b"{", time_us=START_US, place=str(n)
        )
        for n in range(3)
    ]
    code, done = shell("drop", str(numbers[0]))
    assert (code, done["dropped"]) == (0, 1)
    code, done = shell("drop", "--reason", "drop_me")
    assert {item["id"] for item in done["results"]} == set(numbers[1:])
    assert shell("drop", str(numbers[0]))[1]["unchanged"] == 1
    listed = shell("list", "--reason", "drop_me", "--state", "dropped")[1]["letters"]
    assert [row["id"] for row in listed] == sorted(numbers, reverse=True)
    assert all("@" in row["decided_by"] and row["outcome"].startswith("Dropped by") for row in listed)
    assert shell("list", "--reason", "drop_me", "--state", "open")[1]["letters"] == []
    assert shell("retry", str(numbers[0]))[1]["failed"] == 1


def test_two_commands_at_once_retry_a_letter_once(settings: Settings, shell: Shell) -> None:
    """The letter is claimed: one of them publishes, the others say that it is being or was retried."""
    from infra.deadletters import office
    from infra.seam import SystemClock

    raw = json.dumps({**MESSAGE, "data": {**MESSAGE["data"], "t": 901}}).encode()  # type: ignore[dict-item]
    fields = {"reason": "unknown_stream", "detail": "d", "component": "collector", "exchange": "binance"}
    send_known(settings)
    number = write_letter(settings, raw=raw, time_us=START_US + 901_000_000, **fields)
    before = sum(end_offsets(settings.kafka, ["trades"])["trades"].values())

    async def one() -> str:
        async with office(settings, SystemClock()) as letters:
            return (await letters.retry([number]))[0].result

    async def all_at_once() -> list[str]:
        return list(await asyncio.gather(*(one() for _ in range(4))))

    assert sorted(asyncio.run(all_at_once())) == ["retried", "unchanged", "unchanged", "unchanged"]
    assert sum(end_offsets(settings.kafka, ["trades"])["trades"].values()) == before + 1


def test_many_letters_of_a_reason_are_tried_in_one_go(settings: Settings, shell: Shell) -> None:
    """100 messages, each a letter twice: 100 trades are stored, and one command settles all 200; prints how many a second."""
    send_known(settings)

    async def write() -> None:
        with RegistryClient.from_settings(settings) as registry:
            producer = FrameProducer(settings.kafka, registry)
            for number in (*range(100), *range(100)):
                raw = json.dumps({**MESSAGE, "data": {**MESSAGE["data"], "t": 10_000 + number}}).encode()  # type: ignore[dict-item]
                fields = {"reason": "many", "detail": "d", "component": "collector", "exchange": "binance", "time_us": START_US}
                await producer.send_row("deadletter", "", dead_letter(raw=raw, **fields))
            await producer.flush()

    asyncio.run(write())
    wait_stored(settings, "deadletter")
    started = time.monotonic()
    code, done = shell("retry", "--reason", "many")
    print(f"{200 / (time.monotonic() - started):.0f} letters a second", file=sys.stderr)
    assert (code, done["retried"], len(done["results"])) == (0, 200, 200)
    sql = "SELECT count(), uniqExact(trade_id) FROM trades WHERE symbol = 'BTC-USDT' AND trade_id >= 10000"
    until(lambda: query(settings, sql) == [(100, 100)])
    assert shell("list", "--reason", "many", "--state", "open")[1]["letters"] == []


def test_the_api_lists_what_the_command_lists(settings: Settings, shell: Shell) -> None:
    """Same letters, same states, page by page; one letter with its bytes; refusals are problems."""
    base = f"http://127.0.0.1:{settings.api.port}/api/v1/deadletters"
    for n in range(3):
        write_letter(
            settings,
            reason="paged",
            detail="d",
            component="sink",
            exchange="binance",
            symbol="BTC-USDT",
            raw=b"\xff\0",
            time_us=START_US,
            place=str(n),
        )
    until(lambda: httpx.get(base.replace("/api/v1/deadletters", "/readyz"), timeout=5).status_code == 200)
    whole = shell("list", "--reason", "paged")[1]["letters"]
    shell("drop", str(whole[1]["id"]))
    whole = shell("list", "--reason", "paged")[1]["letters"]
    pages, before = [], None
    while True:
        answer = httpx.get(base, params={"reason": "paged", "limit": 2} | ({} if before is None else {"before": before})).json()
        pages += answer["letters"]
        before = answer["next"]
        if before is None:
            break
    assert pages == whole
    assert [row["state"] for row in pages] == ["open", "dropped", "open"]
    assert httpx.get(base, params={"reason": "paged", "state": "dropped"}).json()["count"] == 1
    one = httpx.get(f"{base}/{whole[0]['id']}").json()
    assert base64.b64decode(one["raw_base64"]) == b"\xff\0"
    for path, status in (
        ("/999999999", 404),
        ("/x", 404),
        ("?state=opne", 422),
        ("?limit=0", 422),
        ("?since=x", 422),
        ("?before=-1", 422),
        ("?a=1", 422),
    ):
        answer = httpx.get(base + path)
        assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("list", "--state", "opne"), "did you mean open?"),
        (("list", "--since", "yesterday"), "--since is 'yesterday'; write a time"),
        (("list", "--limit", "0"), "--limit"),
        (("show", "999999999"), "There is no dead letter 999999999"),
        (("show", "abc"), "letter"),
        (("retry",), "has neither"),
        (("retry", "1", "--reason", "x"), "has both"),
        (("drop",), "has neither"),
        (("retry", "999999999"), "There is no dead letter 999999999"),
        (("drop", "999999999"), "There is no dead letter 999999999"),
    ],
)  # fmt: skip
def test_a_bad_argument_is_one_sentence(shell: Shell, arguments: tuple[str, ...], words: str) -> None:
    """Exit code 2 and the culprit."""
    code, answer = shell(*arguments)
    assert (code, answer["error"]["exit_code"]) == (2, 2)
    assert words in answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]


def test_a_store_that_is_away_is_one_sentence(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """ClickHouse or PostgreSQL gone: exit code 6 and which."""
    port = free_ports(1)[0]
    monkeypatch.setenv("MARKETSTREAM_CLICKHOUSE_URL", f"http://127.0.0.1:{port}")
    code, answer = shell("list")
    assert (code, "ClickHouse" in answer["error"]["message"]) == (6, True)
    monkeypatch.setenv("MARKETSTREAM_POSTGRES_DSN", f"postgresql://postgres@127.0.0.1:{port}/postgres")
    code, answer = shell("list")
    assert (code, "PostgreSQL" in answer["error"]["message"]) == (6, True)
