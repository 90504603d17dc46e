"""What single cells of the fault matrix promise besides being whole: letters, group membership, schemas, bars, times. Each reads the running rig."""

from __future__ import annotations

import json
import urllib.request
from collections import Counter
from collections.abc import Callable

import polars as pl
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient

from infra.kafka import consumer_config
from schemas.topics import TOPICS
from tests.integration.fault_chain import newest_bars, stored_trades, table
from tests.integration.fault_rig import SYMBOLS, Rig, canonical, wait_for
from tests.integration.fault_tables import BAR_COLUMNS, BAR_KEY, batch_bars, difference

Place = tuple[str, int, int]
"""(topic, partition, offset)."""
Check = Callable[[], None]
"""Made by a fault, called once everything is whole again."""
_REPAIR_S = 400.0
"""The repair looks at a stretch 35 s after its end and waits for evidence that no trade of it is missing. A clock that was 5 minutes ahead leaves
bars of the future behind: of what lies before them the last was seen to be decided after 262 s, before the right time has come to them."""


def held_partitions(running: Rig) -> set[int]:
    """Partitions of trades that the broker has given to workers."""
    kafka = running.settings.kafka
    group = f"{kafka.topic_prefix}marketstream-bars"
    admin = AdminClient(kafka.client_config())  # kept by name: its answers come only while it is
    found = admin.describe_consumer_groups([group])[group].result(10)
    return {place.partition for member in found.members if member.assignment for place in member.assignment.topic_partitions}


def assert_letters(running: Rig, places: set[Place], component: str) -> None:
    """Assert that this component has written one letter about each of these records, and that its place stands in it."""

    def missing() -> list[Place]:
        rows = table(
            running.settings,
            f"SELECT topic, partition, offset FROM deadletter WHERE reason = 'undecodable_frame' AND component = '{component}'",
        ).rows()
        told = Counter(rows)
        assert all(told[place] <= 1 for place in places), f"{component} wrote more than one letter about a record"
        return sorted(place for place in places if not told[place])

    wait_for(lambda: not missing(), 20, f"not every record is dead-lettered with its place by {component}, e.g. {missing()[:3]}")


def registered(running: Rig) -> dict[str, tuple[int, int, str]]:
    """Subject -> id, version and text of its newest schema."""
    url = running.settings.registry.url

    def ask(path: str) -> object:
        with urllib.request.urlopen(url + path, timeout=5) as answer:
            return json.loads(answer.read())

    found = {}
    for subject in ask("/subjects"):  # type: ignore[attr-defined]
        newest = ask(f"/subjects/{subject}/versions/latest")
        found[subject] = (newest["id"], newest["version"], newest["schema"])  # type: ignore[index]
    return found


def assert_known_as_published(running: Rig) -> None:
    """Assert that the newest trades were stored with the moment at which the broker's record says that it was published."""
    kafka = running.settings.kafka
    consumer = Consumer(consumer_config(kafka, "known"))
    rows = table(
        running.settings,
        "SELECT kafka_partition AS p, max(kafka_offset) AS o, argMax(known_at_us, kafka_offset) AS k FROM trades GROUP BY p",
    ).rows()
    try:
        for partition, offset, known_at_us in rows:
            consumer.assign([TopicPartition(TOPICS["trades"].full_name(kafka.topic_prefix), partition, offset)])
            message = consumer.poll(10)
            assert message is not None and message.error() is None and message.offset() == offset
            assert known_at_us == message.timestamp()[1] * 1000, f"partition {partition}, offset {offset}"
    finally:
        consumer.close()
    assert rows


def marks(running: Rig) -> dict[str, int]:
    """The newest trade of each symbol."""
    return {symbol: running.truth(symbol)[-1] for symbol in SYMBOLS}


def assert_bars_in_the_end(running: Rig, since: dict[str, int], until: dict[str, int], skew_us: int = 0) -> None:
    """Assert that the one-second bars of all trades in ``(since, until]`` become those of a batch over the trades stored.

    These are what the market made, at the times the venue gave them; ``skew_us``: by a clock that was wrong by so much for some of them.
    """
    problem = [""]

    def equal() -> bool:
        problem[0] = next(
            (found for symbol in SYMBOLS if (found := _difference(running, symbol, since[symbol], until[symbol], {0, skew_us}))), ""
        )
        return not problem[0]

    try:
        wait_for(equal, _REPAIR_S, "bars differ")
    except AssertionError as exc:
        raise AssertionError(f"{exc}: {problem[0]}") from None


def _difference(running: Rig, symbol: str, since: int, until: int, skews_us: set[int]) -> str:
    name = canonical(symbol)
    made = running.sim(f"/sim/truth?symbol={symbol}&from={running.first[symbol]}")
    trades = stored_trades(running.settings, name)
    trades = trades.filter(pl.col("trade_id") <= made["id"][-1])
    count = len(trades)
    assert trades["trade_id"].to_list() == made["id"][:count] and trades["trade_id"][-1] >= until
    assert trades["price"].to_list() == [float(price) for price in made["price"][:count]], f"{name}: other prices are stored"
    assert trades["size"].to_list() == [float(size) for size in made["qty"][:count]], f"{name}: other sizes are stored"
    chosen = pl.col("trade_id").is_between(since + 1, until)
    skewed = trades.with_columns(by=pl.col("exchange_time_us") - pl.Series(made["time"][:count]) * 1_000).filter(chosen)["by"]
    assert set(skewed.to_list()) == skews_us, f"{name}: stored times are wrong by {sorted(set(skewed.to_list()))} us"
    touched = trades.filter(chosen)["exchange_time_us"] // 1_000_000 * 1_000_000
    # The newest second of all is not over, or nothing has come after it that would close it.
    seconds = touched.filter(touched < trades["exchange_time_us"].max() // 1_000_000 * 1_000_000).unique().to_list()
    bars = (pl.col("timeframe_s") == 1) & pl.col("open_time_us").is_in(seconds)
    wanted = batch_bars(trades, name).filter(bars).select(BAR_COLUMNS)
    found = newest_bars(running.settings, name).filter(bars).sort(BAR_KEY)
    assert len(wanted) == len(seconds) > 0
    problem = difference(found, wanted, BAR_KEY)
    return problem and f"{name}: {problem}"
