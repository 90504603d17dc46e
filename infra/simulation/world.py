"""The simulated world: an exchange with a known truth, the real components, a network and stores that fail, all from one seed.

Comes in: a :class:`Scenario`. Goes out: a :class:`Result` with the trace hash, how fast it went, what was killed and which invariants do
not hold. The same scenario gives the same trace, in any process on any machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random as global_random
import secrets
from collections.abc import Callable, Coroutine, Iterator
from contextvars import copy_context
from random import Random
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from collectors import session
from collectors.dedupe import NUMBERING
from collectors.simulated.config import ServerConfig
from collectors.simulated.exchange import ExchangeConfig
from collectors.simulated.regimes import MarketConfig
from collectors.simulated.server import SimulatedExchange, serve
from infra.seam import SystemClock
from infra.simulation import checks
from infra.simulation.broker import SimBroker
from infra.simulation.client import Series, Subscriber
from infra.simulation.components import EXCHANGE, EXCHANGE_PLACE, Outside, Tuning, run_api, run_collector, run_sink, run_worker
from infra.simulation.disk import SimDisk
from infra.simulation.loop import Process, SimClock, VirtualLoop
from infra.simulation.misfortunes import Misfortunes
from infra.simulation.network import MemoryTransport, Network
from infra.simulation.progress import Frames, Progress, caught_up, collected, ledger_is_quiet
from infra.simulation.repairing import repair
from infra.simulation.scenario import COMPONENTS, Result, Scenario
from infra.simulation.store import SimStore
from infra.simulation.trace import Trace

START_US: Final = 1_767_225_600_000_000
"""2026-01-01 00:00 UTC, moved by up to a minute per seed."""
_MAINS: Final[dict[str, Callable[[Outside], Coroutine[Any, Any, None]]]] = {
    "collector": run_collector,
    "worker": run_worker,
    "sink": run_sink,
    "api": run_api,
}
_WARM_S: Final = 4.0
"""Trading without faults before them, so that every symbol has traded: a feed that never gave a trade has no past to compare with."""
_SETTLE_S: Final = 90.0
"""Each stage may take so long after the last trade: a connection that fell silent is noticed and its gap filled meanwhile."""


class World:
    """One run.

    Args:
        scenario: what happens.
        tell: gets a line for each event.
    """

    def __init__(self, scenario: Scenario, tell: Callable[[str], None] | None = None) -> None:
        self.scenario = scenario
        seed = scenario.seed
        self.random = Random(f"{seed}/world")
        self.loop = VirtualLoop(seed, START_US + self.random.randrange(60_000) * 1_000)
        self.trace = Trace(self.loop, tell)
        self.network = Network(self.loop, Random(f"{seed}/network"))
        self.network.on_data = self._on_data
        tuning = scenario.tuning
        self.broker = SimBroker(self.loop, Random(f"{seed}/broker"), self.trace, tuning.partitions)
        self.store = SimStore(Random(f"{seed}/store"), self.trace, tuning.partitions)
        self.outside = Outside(self.loop, self.broker, self.store, self.trace, tuning, seed, disk=SimDisk(Random(f"{seed}/disk")))
        self.clock = SimClock(self.loop, f"{seed}/clock")
        self.exchange: SimulatedExchange
        self.subscriber: Subscriber
        self.processes: dict[str, Process] = {}
        self.dead: list[Process] = []
        self.kills: dict[str, int] = {}
        self.recovery_s: dict[str, list[float]] = {}
        self.exits: list[str] = []
        self.misfortunes = Misfortunes(self, Random(f"{seed}/misfortunes"))
        self.malformed = False
        """Whether the exchange sent what is no message."""
        self.live_violations: list[str] = []
        """What was wrong before the repair."""
        self.unsettled: list[str] = []
        self.never_were: dict[str, list[int]] = {}
        """Exchange symbol -> published ids of no trade."""
        self.lost_before: dict[str, npt.NDArray[np.int64]] = {}
        """Symbol -> ids the exchange lost for good before it numbered anew."""
        self.over = False
        self.end_us = 2**62
        """Trades before it must all be there; the market goes on, so that watermarks do."""
        self.due: dict[tuple[str, int], int] = {}
        """Records that everybody must have got at the end, per (topic, partition)."""
        self.true_bars: dict[tuple[str, bytes], dict[str, dict[str, Any]]] = {}
        self.frames = Frames(self.broker)
        self.progress = Progress(self.broker, self.frames)
        self._context = copy_context()
        self._recovering: dict[str, tuple[float, Callable[[], bool]]] = {}

    # -- running

    def run(self) -> Result:
        """Run it to its end and check what is left."""
        clock = SystemClock()
        started_us = clock.monotonic_us()
        with _calm(self.scenario.seed), _paced(self.scenario.tuning):
            try:
                self.loop.run(self._live())
                violations = checks.violations(self)
                tables = checks.table_hashes(self)
            finally:
                self._close()
        wall_s = (clock.monotonic_us() - started_us) / 1e6
        return Result(
            seed=self.scenario.seed,
            digest=self.trace.digest(),
            violations=violations,
            virtual_s=self.loop.time(),
            wall_s=wall_s,
            steps=self.loop.steps,
            trades=self.store.row_count("trades"),
            kills=dict(self.kills),
            recovery_s={name: list(values) for name, values in self.recovery_s.items()},
            tables=tables,
        )

    async def _live(self) -> None:
        scenario = self.scenario
        await self._open_exchange()
        for name in _MAINS:
            self.start(name)
        self._open_client()
        await self._until(self._ready, 30.0)
        market = self.exchange
        market.set_rate(scenario.tuning.rate)
        await self.clock.sleep(_WARM_S)
        await self._until(lambda: all(self.progress.read().newest_id(symbol) >= 0 for symbol in self.symbols()), 60.0)
        faults = asyncio.ensure_future(self.misfortunes.run())
        await self.clock.sleep(scenario.duration_s)
        await faults
        self.misfortunes.end()
        await self._until(self._trades, 60.0)
        await self.clock.sleep(1.0)
        self.end_us = self.loop.now_us
        self.over = True
        self.misfortunes.spare()
        await self._settle("processes", "collector", "ledger", "worker", "sink")
        self.live_violations = checks.live_bars(self)
        repair(self)
        await self._settle("sink", "api")

    async def _settle(self, *stages: str) -> None:
        """Wait until nothing is under way any more; what does not get there is a violation of its own."""
        await self.clock.sleep(0.5)
        for name in stages:
            self.due = {place: log.synced for place, log in self.broker.logs.items()}
            first: dict[str, Callable[[World], Callable[[], bool]]]
            first = {"processes": lambda _: self._all_alive, "collector": collected, "ledger": ledger_is_quiet}
            done = first[name](self) if name in first else caught_up(self, name)
            if not await self._until(done, _SETTLE_S):
                self.unsettled.append(f"the {name} had not caught up {_SETTLE_S:g} s after the last trade")
            await self.clock.sleep(max(0.2, 2 * self.scenario.tuning.linger_ms / 1_000))  # what is done may still be on its way out

    def _close(self) -> None:
        for process in [*self.dead, *self.processes.values()]:
            process.alive = False
            self.loop.bury(process)
        self.loop.close()

    # -- processes

    async def _open_exchange(self) -> None:
        tuning = self.scenario.tuning
        host, port = EXCHANGE_PLACE
        spot = MarketConfig(symbols=tuning.symbols, rate=0.0, step_ms=tuning.step_ms, seed=self.scenario.seed % 2**31)
        config = ServerConfig(exchange=ExchangeConfig(spot=spot, history=50_000, kline_minutes=2, warmup_s=0.0), host=host, port=port)
        process = self.processes["exchange"] = Process("exchange")
        opened = self.loop.create_future()

        async def work() -> None:
            async with serve(config, SimClock(self.loop, f"{self.scenario.seed}/exchange")) as exchange:
                opened.set_result(exchange)
                await self.loop.create_future()

        self.loop.spawn(process, work())
        self.exchange = await opened

    def _open_client(self) -> None:
        symbols = self.symbols()
        timeframe = self.scenario.tuning.timeframes[0]
        wanted: list[Series] = [("trades", EXCHANGE, symbols[0], ""), ("bars", EXCHANGE, symbols[-1], timeframe)]
        process = self.processes["client"] = Process("client")
        self.subscriber = Subscriber(self.outside, wanted)
        self.loop.spawn(process, self.subscriber.run())

    def symbols(self) -> list[str]:
        """Canonical names of what is traded."""
        universe = self.exchange.exchange.venues["spot"].market.universe
        return [f"{base}-USDT" for base in universe.bases]

    @property
    def numbering(self) -> int:
        """What is added to the ids the exchange gives now."""
        return 0 if self.exchange.exchange.venues["spot"].earlier is None else NUMBERING

    def made(self, symbol: str) -> dict[str, Any]:
        """Every trade of a symbol the market made, until now, with ids as they are published."""
        name = symbol.replace("-", "")
        now = self.exchange.truth(name)
        if not self.numbering:
            return now
        before = self.exchange.truth(name, earlier=True)
        now = now | {"trade_id": now["trade_id"] + NUMBERING}
        return {column: np.concatenate([before[column], now[column]]) for column in now}

    def lost_ids(self, symbol: str) -> npt.NDArray[np.int64]:
        """Published ids of trades that nobody can have: the exchange neither sent them nor shows them."""
        venue = self.exchange.exchange.venues["spot"]
        code = venue.market.code(symbol.replace("-", ""))
        lost = np.array(venue.faults.lost.get(-1 if code is None else code, []), np.int64)
        if not self.numbering:
            return lost
        return np.concatenate([self.lost_before.get(symbol, np.empty(0, np.int64)), self.forgotten(symbol)["trade_id"], lost + NUMBERING])

    def forgotten(self, symbol: str) -> dict[str, Any]:
        """What was traded before the exchange numbered anew and was not published by then: nobody can be asked for it any more."""
        trades = self.made(symbol)
        published = self.progress.read().ids(symbol)
        kept = trades["trade_id"] < self.numbering
        kept &= ~np.isin(trades["trade_id"], np.append(published, self.lost_before.get(symbol, np.empty(0, np.int64))))
        return {name: column[kept] for name, column in trades.items()}

    def truth(self, symbol: str) -> dict[str, Any]:
        """What can be had of what the market traded of a symbol until the world was over; it trades on, so that watermarks do."""
        trades = self.available(symbol)
        before = trades["exchange_time_us"] < self.end_us
        return {name: column[before] for name, column in trades.items()}

    def available(self, symbol: str) -> dict[str, Any]:
        """The same until now."""
        trades = self.made(symbol)
        kept = ~np.isin(trades["trade_id"], self.lost_ids(symbol))
        return {name: column[kept] for name, column in trades.items()}

    def start(self, name: str) -> None:
        """Start (again) a component."""
        before = self.processes.get(name)
        process = Process(name, before.generation + 1 if before else 0)
        process.kill = self.kill
        process.skew_us = self.scenario.skew_us if name == "collector" else 0
        self.processes[name] = process
        self.trace.note("start", process)
        task = self.loop.spawn(process, _MAINS[name](self.outside))
        task.add_done_callback(lambda done: self._ended(process, done))

    def _ended(self, process: Process, task: asyncio.Task[None]) -> None:
        if not process.alive:
            return
        error = None if task.cancelled() else task.exception()
        self.exits.append(f"{process} ended by itself: {error!r}")
        self.trace.note("exit", process, repr(error))
        process.alive = False  # a process that ends by itself is a violation: it is not started again, so that its reason is told once
        self.dead.append(process)

    def kill(self, process: Process) -> None:
        """Kill -9, and a restart some time later, as the supervisor does it."""
        if not process.alive:
            return
        process.doomed_in = 0
        self.kills[process.name] = self.kills.get(process.name, 0) + 1
        self.trace.note("kill", process, self.loop.steps)
        self.loop.kill(process)
        self.dead.append(process)
        self.later(self.random.uniform(0.2, 2.0), self._restart, process.name)

    def _restart(self, name: str) -> None:
        self.start(name)
        self._watch(name)

    def crash_broker(self, away_s: float | None = None) -> None:
        """Kill the broker; it comes back some time later."""
        if self.broker.up:
            self.kills["broker"] = self.kills.get("broker", 0) + 1
            self.broker.crash()
            self.later(away_s or self.random.uniform(0.2, 2.0), self._restart_broker)

    def _restart_broker(self) -> None:
        self.broker.restart()
        self._watch("broker")
        if not self.over:
            self.misfortunes.strike_after()

    def later(self, delay_s: float, act: Callable[..., None], *arguments: object) -> None:
        """Call ``act`` after some time, in the world's own context: whoever asks may be the process that dies."""
        self.loop.call_later(delay_s, act, *arguments, context=self._context)

    # -- waiting

    async def _until(self, done: Callable[[], bool], most_s: float) -> bool:
        deadline = self.loop.time() + most_s
        while not done():
            if self.exits or self.loop.time() >= deadline:
                return False
            await self.clock.sleep(0.25)
        return True

    def _ready(self) -> bool:
        collector = self.outside.hooks.get("collector")
        shards = collector.shards if collector is not None else []
        return bool(shards) and all(shard.is_live for shard in shards) and len(self.subscriber.confirmed) == len(self.subscriber.received)

    def _trades(self) -> bool:
        """Whether the exchange is there, and every symbol has traded in its present numbering."""
        return not self.exchange.exchange.is_down and all(len(self.exchange.truth(s.replace("-", ""))["trade_id"]) for s in self.symbols())

    def _all_alive(self) -> bool:
        return self.broker.up and all(process.alive for process in self.processes.values())

    # -- recovery

    def _watch(self, name: str) -> None:
        """Measure how long a restarted component needs to catch up with what there is now."""
        self._recovering[name] = (self.loop.time(), caught_up(self, name))
        self.later(0.05, self._look, name)

    def _look(self, name: str) -> None:
        entry = self._recovering.get(name)
        if entry is None or self.over:
            return
        if name in self.processes and not self.processes[name].alive:
            return  # killed again meanwhile: its next life is measured
        since, done = entry
        if done():
            del self._recovering[name]
            self.recovery_s.setdefault(name, []).append(round(self.loop.time() - since, 3))
        else:
            self.later(0.05, self._look, name)

    def _on_data(self, transport: MemoryTransport, data: bytes) -> None:
        self.trace.note("data", transport.process, data=data)


@contextlib.contextmanager
def _calm(seed: int) -> Iterator[None]:
    """The process as a world needs it: seeded global randomness, no log lines, no memory collection at odd moments."""
    state, tokens, urandom_level = global_random.getstate(), secrets.token_bytes, logging.root.manager.disable
    source = Random(f"{seed}/tokens")
    global_random.seed(seed)
    secrets.token_bytes = lambda size=32: source.randbytes(size or 32)  # type: ignore[assignment]
    logging.disable(logging.CRITICAL)
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        secrets.token_bytes = tokens
        global_random.setstate(state)
        logging.disable(urandom_level)
        if collecting:
            gc.enable()


@contextlib.contextmanager
def _paced(tuning: Tuning) -> Iterator[None]:
    """Waits that are constants of the product, as the world's rates want them."""
    wanted = {"CHECK_S": tuning.check_s, "LEDGER_S": tuning.check_s, "PROBE_SILENCE_US": int(tuning.probe_silence_s * 1e6)}
    before = {name: getattr(session, name) for name in wanted}
    for name, value in wanted.items():
        setattr(session, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(session, name, value)


__all__ = ["COMPONENTS", "Result", "Scenario", "World", "simulate"]


def simulate(scenario: Scenario, tell: Callable[[str], None] | None = None) -> Result:
    """Run one scenario."""
    return World(scenario, tell).run()
