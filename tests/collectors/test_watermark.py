"""Watermarks: what moves them, what holds them, what must not disturb them."""

from hypothesis import given, settings
from hypothesis import strategies as st

from collectors.watermark import Watermark, WatermarkConfig
from tests.collectors.fakes import capture

T = 1_700_000_000_000_000
S = 1_000_000


def test_it_follows_the_newest_exchange_time_less_the_lateness() -> None:
    """The wall clock does not enter, so skew between us and the venue cannot."""
    mark = Watermark()
    assert mark.read(0) is None
    mark.observe(T, 0)
    assert mark.read(0) == T - 500_000
    mark.observe(T + S, S)
    assert mark.read(S) == T + S - 500_000


def test_a_quiet_feed_that_answers_pings_moves_it() -> None:
    """Bars of a quiet feed close without another trade."""
    mark = Watermark()
    mark.observe(T, 0)
    mark.heard(3 * S)
    assert mark.read(3 * S) == T + 3 * S - 500_000


def test_it_never_goes_back() -> None:
    """An older row, a slower clock or a hold do not take a promise back."""
    mark = Watermark()
    mark.observe(T, 0)
    mark.heard(2 * S)
    before = mark.read(2 * S)
    mark.observe(T + 100_000, 2 * S)
    assert before == T + 1_500_000
    assert mark.read(2 * S) == before


def test_a_hold_stops_it_and_releasing_lets_it_catch_up() -> None:
    """Connection down, backfill pending: nothing is promised meanwhile."""
    mark = Watermark()
    mark.observe(T, 0)
    held = mark.read(0)
    mark.hold("down", 0)
    assert mark.read(5 * S) == held
    assert mark.holding(5 * S) == ["down"]
    mark.release("down")
    mark.observe(T + 5 * S, 5 * S)
    assert mark.read(5 * S) == T + 5 * S - 500_000


def test_a_hold_beyond_its_limit_no_longer_freezes_the_others() -> None:
    """One dead shard holds its partition's bars ten seconds, not for ever; repeating the reason does not prolong it."""
    mark = Watermark()
    mark.observe(T, 0)
    mark.read(0)
    mark.hold("down", 0)
    mark.hold("down", 9 * S)
    assert mark.read(10 * S) == T + 10 * S - 500_000
    assert mark.holding(10 * S) == []


def test_silence_without_proof_of_life_stops_it_before_it_passes_missing_rows() -> None:
    """Quiet or dead? Until that is known nothing newer than the newest row is promised, for the hold limit."""
    mark = Watermark()
    mark.observe(T, 0)
    assert mark.read(400_000) == T - 100_000
    assert mark.read(3 * S) == T
    assert mark.read(9 * S) == T
    assert mark.read(11 * S) == T + 11 * S - 500_000


def test_one_wild_time_moves_nothing_and_three_in_a_row_are_believed() -> None:
    """A single trade dated next year must not close every bar until then; a laptop that slept must be believed."""
    mark = Watermark()
    mark.observe(T, 0)
    year = 365 * 86_400 * S
    assert not mark.observe(T + year, S)
    assert mark.observe(T + S, S)
    assert mark.read(S) == T + S - 500_000
    assert not mark.observe(T + year, 2 * S)
    assert not mark.observe(T + year + 1, 2 * S)
    assert mark.observe(T + year + 2, 2 * S)
    assert mark.read(2 * S) == T + year + 2 - 500_000


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(-400_000, 2 * S), st.integers(0, 2 * S), st.sampled_from(["", "hold", "release"])), min_size=1, max_size=60
    )
)
def test_it_never_goes_back_whatever_happens(steps: list[tuple[int, int, str]]) -> None:
    """Any order of rows, silences and holds."""
    mark = Watermark(WatermarkConfig(hold_limit_us=3 * S))
    now, newest, last = 0, T, None
    for move, pause, act in steps:
        now += pause
        newest += move
        mark.observe(newest, now)
        if act == "hold":
            mark.hold("x", now)
        elif act == "release":
            mark.release("x")
        value = mark.read(now)
        assert value is not None
        assert last is None or value >= last
        last = value


def test_no_recorded_trade_is_older_than_the_watermark_before_it() -> None:
    """Ten minutes of BTCUSDT over midnight, batches of 10 ms, the recorder's clock 1.27 s behind the venue's."""
    import msgspec

    mark, late, rows = Watermark(), 0, 0
    promised = None
    round_us = None
    for day in ("20240808", "20240809"):
        for received_us, message in capture(f"spot_btcusdt_{day}"):
            if b"@trade" not in message:
                continue
            time_us = msgspec.json.decode(message)["data"]["T"] * 1000
            if round_us is None or received_us - round_us > 10_000:
                promised = mark.read(received_us)
                round_us = received_us
            rows += 1
            late += promised is not None and time_us < promised
            mark.observe(time_us, received_us)
    assert rows == 19_904
    assert late == 0


def test_resume_holds_at_the_least_of_what_partitions_were_promised() -> None:
    """What one partition was promised is no news for the others: their bars would close before what was missed is fetched."""
    watermark = Watermark()
    for promised_us in (11_070_000, 9_600_000, 10_000_000, 0):
        watermark.resume(promised_us)
    assert watermark.value == 9_600_000
