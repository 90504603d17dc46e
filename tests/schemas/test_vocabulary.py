"""Words, times and partitions mean the same everywhere, and a wrong one is named with the nearest known one."""

from __future__ import annotations

import pytest

from schemas.errors import SchemaError, VocabularyError
from schemas.partitions import murmur2, partition_of
from schemas.symbols import Instrument, check_exchange, check_symbol, parse_key
from schemas.timeframes import format_time_us, normalise_epoch_us, parse_duration_us, parse_time_us, timeframe_name, timeframe_seconds
from schemas.topics import TOPICS, subject, topic


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        # Kafka's own UtilsTest.testMurmur2 values
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
    ],
)
def test_murmur2_is_kafkas(data: bytes, expected: int) -> None:
    """The hash agrees with the values in Kafka's own tests."""
    assert murmur2(data) == expected & 0xFFFFFFFF


def test_partition_is_within_range_and_stable() -> None:
    """An instrument keeps its partition."""
    assert {partition_of(f"binance:S{i}-USDT", 4) for i in range(100)} == {0, 1, 2, 3}
    assert partition_of("binance:BTC-USDT", 4) == partition_of("binance:BTC-USDT", 4)


def test_misspelt_words_name_the_nearest_known_one() -> None:
    """Unknown exchange, timeframe and topic each propose what was probably meant."""
    with pytest.raises(VocabularyError, match="did you mean 'binance'"):
        check_exchange("binanse")
    with pytest.raises(VocabularyError, match="did you mean '15m'"):
        timeframe_seconds("15min")
    with pytest.raises(VocabularyError, match="did you mean 'trades'"):
        topic("trade")
    with pytest.raises(VocabularyError, match="known are"):
        check_exchange("zzzzzz")


def test_symbols_are_canonical() -> None:
    """A symbol in another spelling is refused with the canonical one."""
    assert check_symbol("BTC-USDT-PERP") == "BTC-USDT-PERP"
    with pytest.raises(SchemaError, match="BTC-USDT"):
        check_symbol("btc/usdt")
    assert parse_key("binance:BTC-USDT") == Instrument("binance", "BTC-USDT")
    with pytest.raises(SchemaError, match="exchange:symbol"):
        parse_key("BTC-USDT")


@pytest.mark.parametrize("value", [1_723_161_253, 1_723_161_253_000, 1_723_161_253_000_000, 1_723_161_253_000_000_000])
def test_epoch_numbers_of_any_unit_are_the_same_time(value: int) -> None:
    """Seconds, ms, us and ns are told apart by size."""
    assert normalise_epoch_us(value) == 1_723_161_253_000_000


@pytest.mark.parametrize("value", [0, -5, 10**21, 99_999])
def test_a_number_that_is_no_time_is_refused(value: int) -> None:
    """A number outside 2009 .. 2100 in every unit is an error, not 1970."""
    with pytest.raises(ValueError, match="no time between"):
        normalise_epoch_us(value)


def test_times_are_read_and_written_as_iso() -> None:
    """ISO text with and without a zone is UTC microseconds, and comes back as text."""
    assert parse_time_us("2024-08-08T23:54:13Z") == parse_time_us("2024-08-08 23:54:13") == 1_723_161_253_000_000
    assert parse_time_us("2024-08-09T01:54:13.000001+02:00") == 1_723_161_253_000_001
    assert format_time_us(1_723_161_253_000_001) == "2024-08-08T23:54:13.000001Z"
    with pytest.raises(ValueError, match="ISO 8601"):
        parse_time_us("yesterday")


def test_durations_add_their_parts() -> None:
    """1h30m is 90 minutes; anything else is refused."""
    assert parse_duration_us("1h30m") == 5_400_000_000
    assert parse_duration_us("250ms") == 250_000
    for bad in ("", "10", "m10", "5 minutes"):
        with pytest.raises(ValueError, match="not a duration"):
            parse_duration_us(bad)


def test_timeframes_know_their_length() -> None:
    """Names and seconds map both ways."""
    assert timeframe_seconds("4h") == 14_400
    assert timeframe_name(60) == "1m"


def test_catalogue_names_subjects_by_topic() -> None:
    """A prefix isolates topics and subjects alike."""
    assert TOPICS["bars"].full_name("t1.") == "t1.bars"
    assert subject("trades", "t1.") == "t1.trades-value"
    assert TOPICS["bars.rows"].config()["cleanup.policy"] == "compact"
