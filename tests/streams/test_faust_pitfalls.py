"""How the Faust application is set up rules out known pitfalls; docs/faust.md says which test or setting stands against each."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from schemas.topics import TOPICS
from streams.app import AppConfig, create_app

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [path.read_text("utf-8") for path in (ROOT / "streams").glob("*.py")]


@pytest.fixture(scope="module")
def app() -> Any:
    """The application as the worker makes it; it is never started."""
    config = AppConfig(
        bootstrap="127.0.0.1:9", topic_prefix="p.", instance_id="bars-0", session_timeout_s=10, snapshot_interval_s=1, folder="x"
    )
    return create_app(config, None)  # type: ignore[arg-type]


def test_no_batch_is_acknowledged_by_take() -> None:
    """Pitfall 1: ``stream.take()`` acknowledges what its agent failed on; the agent reads events unacknowledged."""
    assert not any(re.search(r"\.take\(", source) for source in SOURCES)
    assert any(".noack()" in source for source in SOURCES)


def test_the_agent_runs_alone(app: Any) -> None:
    """Pitfall 3: with concurrency above 1 Faust commits past records in flight."""
    assert [agent.concurrency for agent in app.agents.values()] == [1]


def test_input_has_no_gaps_by_compaction_or_transactions() -> None:
    """Pitfall 5: commits stop for ever behind a gap, so the input is neither compacted nor transactional."""
    assert not TOPICS["trades"].compacted
    assert not any("transactional" in source.replace("transactional input", "") for source in SOURCES)


def test_nothing_rests_on_exactly_once_or_on_the_confluent_transport(app: Any) -> None:
    """Pitfalls 6 and 7: the guarantee is at-least-once and the transport aiokafka."""
    assert app.conf.processing_guarantee.value == "at_least_once"
    assert {url.scheme for url in app.conf.broker} == {"kafka"}


def test_there_are_no_tables_windows_or_joins(app: Any) -> None:
    """Pitfalls 8 to 13 and 19: state is our own snapshot, time is the watermark."""
    assert not app.tables
    assert not any(re.search(r"\.(Table|GlobalTable|SetTable|tumbling|hopping|join)\(", source) for source in SOURCES if "faust" in source)


def test_topics_are_never_declared_by_the_worker(app: Any) -> None:
    """Pitfall 13: partition counts are ours; a worker that creates topics gets them wrong."""
    assert app.conf.topic_allow_declare is False
    assert app.conf.topic_disable_leader is True


def test_a_restarted_worker_is_the_same_member(app: Any) -> None:
    """Pitfall 14: static membership and a short session bring partitions back at once."""
    assert app.conf.consumer_group_instance_id == "bars-0"
    assert app.conf.broker_session_timeout == 10
    assert app.conf.broker_heartbeat_interval < app.conf.broker_session_timeout / 3
    assert app.conf.stream_wait_empty is False


def test_buffers_are_bounded(app: Any) -> None:
    """Pitfall 18: Faust's default of 4,096 buffered records would be 400 MB of frames."""
    assert app.conf.stream_buffer_maxsize <= 64
    assert app.conf.broker_max_poll_records <= 64


def test_no_web_server_is_opened(app: Any) -> None:
    """Pitfall 21: tables are served without authentication by default."""
    assert app.conf.web_enabled is False


def test_records_are_raw_bytes(app: Any) -> None:
    """Pitfall 25: no codec of Faust's touches a record, and never pickle."""
    (agent,) = app.agents.values()
    assert agent.channel.key_serializer == agent.channel.value_serializer == "raw"
    assert not any("pickle" in source for source in SOURCES)


def test_the_installed_faust_is_the_one_these_tests_are_about() -> None:
    """Pitfall 16 and the list's first line: pinned exactly."""
    import faust

    assert faust.__version__ == "0.15.3"
    assert "faust-streaming==0.15.3" in (ROOT / "pyproject.toml").read_text("utf-8")


async def test_a_recovery_outlives_a_broker_that_hangs(app: Any) -> None:
    """Pitfall 26: Faust takes 90 s without the committed offsets for the end of its service, and the worker never reads again."""
    done = []

    async def asks() -> None:
        await asyncio.sleep(0.2)
        done.append("committed offsets")

    await app.tables.recovery._wait(asks(), timeout=0.01)
    assert done
