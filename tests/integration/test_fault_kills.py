"""kill -9 of processes that the supervisor runs, under live trades: nothing is lost or doubled, and the next output comes soon.

``PROVE_KILLS`` kills of each, 50 for the full proof, at seeded moments; by default one each of collector and API, which no other test kills.
The supervisor starts them again, nobody else does anything. Recovery is measured from the kill to the next output of that process. After the
kills of a process the tables are compared with an undisturbed run: every column of every trade with the exchange's own record, every closed bar
of all timeframes with the bars of that record, bit by bit.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from confluent_kafka import Consumer

from infra.cli.processes import specs
from infra.errors import MarketstreamError
from infra.kafka import committed_offsets, consumer_config, end_offsets
from infra.progress import SINK_GROUP, worker_offsets
from infra.provision import provision
from infra.settings import load_settings
from infra.stack.supervisor import Stack
from tests.integration.conftest import process_environ
from tests.integration.fault_chain import Chain, figure, recovery
from tests.integration.fault_rig import SYMBOLS, Rig, canonical, exchange

pytestmark = pytest.mark.chaos

KILLS = int(os.environ.get("PROVE_KILLS", "1"))
SEED = int(os.environ.get("PROVE_SEED", "20241121"))
RECOVERY_LIMIT_S = 3.0
# A process that ends sooner than this after its start is started again with a pause that grows.
SOUND_S = 5.5


@pytest.fixture(scope="module")
def running() -> Iterator[Rig]:
    """A stack whose processes are all run by its supervisor, fed by an exchange."""
    with ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="marketstream-kills-", ignore_cleanup_errors=True)))
        url = held.enter_context(exchange(log_dir=folder))
        settings = load_settings(
            {
                **process_environ(folder / "data"),
                "MARKETSTREAM_COLLECTOR_REST_URL": url,
                "MARKETSTREAM_COLLECTOR_WS_URL": url.replace("http", "ws"),
                "MARKETSTREAM_COLLECTOR_SYMBOLS": ",".join(map(canonical, SYMBOLS)),
            }
        )
        stack = Stack(settings, specs(settings, "live"))
        stack.up()
        held.callback(stack.down)
        provision(settings)
        made = Rig(settings, stack, Chain(settings, folder), url, None, None, None, log_dir=folder)  # type: ignore[arg-type]
        made.whole()
        made.first = {symbol: counts[2] for symbol, counts in made.counts().items()}
        yield made


_asking: list[Consumer] = []


def _trades_published(running: Rig) -> int:
    """One client for all: a new one for each question takes a tenth of a second to meet the broker, which is not the broker's."""
    if not _asking:
        _asking.append(Consumer(consumer_config(running.settings.kafka, "kills")))
    return sum(end_offsets(running.settings.kafka, ["trades"], _asking[0])["trades"].values())


def _bars_made(running: Rig) -> int:
    return sum(max(offset, 0) for offset, _ in worker_offsets(running.settings).values())


def _rows_stored(running: Rig) -> int:
    return sum(committed_offsets(running.settings.kafka, SINK_GROUP, ["trades"])["trades"].values())


_answers = {"count": 0}


def _answers_given(running: Rig) -> int:
    _answers["count"] += running.chain.ask("api", "/api/v1/bars/binance/BTC-USDT?timeframe=1s&limit=1")[0] == 200
    return _answers["count"]


COMPONENTS: dict[str, tuple[str, Callable[[Rig], int]]] = {
    "collector": ("collector", _trades_published),
    "worker": ("worker-0", _bars_made),
    "sink": ("sink", _rows_stored),
    "kafka": ("kafka", _trades_published),
    "api": ("api", _answers_given),
}
"""Name in the supervisor, and a number that grows with each output of it."""


def _kill(running: Rig, name: str) -> None:
    found = {status.name: status for status in running.stack.status(check=False)}
    os.kill(found[name].pid, signal.SIGKILL)


def _recovery_s(running: Rig, component: str) -> float:
    """Seconds from the kill to the next output."""
    name, progress = COMPONENTS[component]
    begun = time.monotonic()
    _kill(running, name)
    before = -1
    if component != "kafka":
        time.sleep(0.1)  # what was under way when it died still lands; only what comes after that counts
        before = progress(running)
    while time.monotonic() - begun < 60:
        try:
            now = progress(running)
        except MarketstreamError:  # the broker is away; to ask without a pause would take a core from its start
            time.sleep(0.05)
            continue
        if before < 0:
            before = now
        elif now > before:
            return time.monotonic() - begun
        time.sleep(0.01)
    raise AssertionError(f"{component} gave no output within 60 s of being killed; logs in {running.log_dir}")


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("component", ["collector", "worker", "sink", "kafka", "api"] if KILLS > 1 else ["collector", "api"])
def test_a_killed_process_loses_and_doubles_nothing(running: Rig, component: str) -> None:
    """The tables equal those of an undisturbed run; output goes on within three seconds of a kill, as the median says."""
    print(f"seed {SEED}, {KILLS} kills of {component}")
    rng = random.Random(f"{SEED}/{component}")
    took = []
    for _ in range(KILLS):
        time.sleep(SOUND_S + rng.uniform(0.0, 1.0))
        took.append(_recovery_s(running, component))
        running.whole()
    figure("kills", component=component, **running.equal())
    times = recovery(took)
    figure("kills", component=component, kills=KILLS, seed=SEED, **times)
    if KILLS >= 20:  # a figure, not a gate, for two kills on a busy machine
        assert times["recovery_median_s"] <= RECOVERY_LIMIT_S
