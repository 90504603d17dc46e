"""What goes wrong in a world, and when: kill points and mishaps, drawn from the seed.

A kill strikes between two of the next callbacks of the loop, or inside one of the victim's next calls to the outside world. A mishap is
anything else: a connection, an answer, a disk, a record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from infra.simulation.world import World

MISHAP_EVERY_S: Final = 2.5
"""Of trading time, on average."""
_VENUE: Final[tuple[dict[str, object], ...]] = (
    {"fault": "late", "seconds": 2.0},
    {"fault": "short_pages", "seconds": 4.0, "count": 1},
    {"fault": "rest_error", "seconds": 2.0, "status": 503},
    {"fault": "slow_rest", "seconds": 3.0, "delay_s": 0.8},
    {"fault": "cut_pages", "count": 1},
    {"fault": "stall", "seconds": 3.0},
    {"fault": "refuse", "seconds": 1.0},
    {"fault": "cut_24h"},
    {"fault": "close"},
    {"fault": "malformed", "count": 2},
)
"""Faults of the simulated exchange that concern no symbol, or any."""


LOSING_SHARE: Final = 0.4
"""Of the worlds in which the exchange loses trades for good, or is away: what is whole in the end is then less to see."""


class Misfortunes:
    """Strikes a world.

    Args:
        world: everything it reaches.
        random: of what and when.
    """

    def __init__(self, world: World, random: Random) -> None:
        self._world = world
        self._random = random
        self.kills_left = 0
        """Kill points kept for the moment after another one."""
        self.mishaps: dict[str, Callable[[], None]] = {
            "cut": self._cut,
            "silence": self._silence,
            "stalls": self._stalls,
            "drop": lambda: self._on_symbol("drop"),
            "duplicate": lambda: self._on_symbol("duplicate"),
            "reorder": lambda: self._on_symbol("reorder"),
            "venue": self._venue,
            "client": self._client,
            "lost answers": self._lost_answers,
            "slow sync": self._slow_sync,
            "broker away": lambda: self._world.crash_broker(self._random.uniform(3.0, 7.0)),
            "store answers": self._store_answers,
            "store refuses": self._store_refuses,
            "store away": self._store_away,
            "record again": self._again,
            "newest again": self._newest_again,
            "poison": self._poison,
            "power cut": self._power_cut,
            "machine down": self._machine_down,
        }
        """Everything that is not a kill, by name."""
        self.losses: dict[str, Callable[[], None]] = {
            "lose": lambda: self._on_symbol("lose"),
            "hole": self._hole,
            "exchange away": lambda: self._restart(reset_ids=False),
            "ids anew": lambda: self._restart(reset_ids=True),
            "partition": self._partition,
        }
        """What costs trades, ids or the exchange."""

    async def run(self) -> None:
        """All of them, at moments drawn in advance."""
        world, random = self._world, self._random
        scenario = world.scenario
        plan: list[tuple[float, int, str]] = []
        alone = scenario.kills - (scenario.kills // 4 if "broker" in scenario.targets else 0)
        self.kills_left = scenario.kills - alone
        for number in range(alone):
            target = random.choice(scenario.targets)
            plan.append((random.uniform(0.0, scenario.duration_s), number, target))
        if scenario.faults:
            for number in range(max(1, int(scenario.duration_s / MISHAP_EVERY_S))):
                kind = random.choice(list(self.mishaps))
                plan.append((random.uniform(0.0, scenario.duration_s), 1_000 + number, kind))
            plan += self._losing_plan(scenario.duration_s)
        start = world.loop.time()
        for moment, _, what in sorted(plan):
            await world.clock.sleep(max(0.0, start + moment - world.loop.time()))
            act = self.mishaps.get(what) or self.losses.get(what)
            if act is not None:
                world.trace.note("mishap", what)
                act()
                if scenario.kills and random.random() < 0.4:  # misfortunes come in pairs
                    world.later(random.uniform(0.0, 1.5), self._strike_too, random.choice(scenario.targets))
            else:
                self.strike(what)

    def _losing_plan(self, duration_s: float) -> list[tuple[float, int, str]]:
        """When trades are lost for good; drawn by itself, so that the other worlds are what they were."""
        random = Random(f"{self._world.scenario.seed}/losses")
        if random.random() >= LOSING_SHARE:
            return []
        kinds = random.choices(list(self.losses), k=random.randint(1, 4))
        if kinds.count("ids anew") > 1:  # the exchange remembers what it traded in one numbering before the present one
            kinds = [kind for kind in kinds if kind != "ids anew"] + ["ids anew"]
        return [(random.uniform(0.0, duration_s), 2_000 + number, kind) for number, kind in enumerate(kinds)]

    def strike(self, target: str) -> None:
        """Kill a component somewhere in what it does next."""
        world, random = self._world, self._random
        if target == "broker":
            self._ambush(world.crash_broker)
            return
        process = world.processes[target]
        if target != "api" and random.random() < 0.5:
            process.doomed_in = random.randint(1, 12)
            world.later(2.0, self._ambush, lambda: world.kill(process))
        else:
            self._ambush(lambda: world.kill(world.processes[target]))

    def _strike_too(self, target: str) -> None:
        if not self._world.over:
            self.strike(target)

    def strike_after(self) -> None:
        """Misfortunes come in pairs: another component right after the broker came back."""
        world, random = self._world, self._random
        if self.kills_left <= 0 or random.random() > 0.3:
            return
        self.kills_left -= 1
        others = [name for name in world.scenario.targets if name != "broker"]
        world.later(random.uniform(0.0, 0.3), self.strike, random.choice(others or ["broker"]))

    def _ambush(self, act: Callable[[], None]) -> None:
        world = self._world
        if world.over:
            return
        if world.loop.ambush_step > world.loop.steps:  # one at a time: the other one strikes a little later
            world.later(0.3, self._ambush, act)
            return
        world.loop.ambush_step = world.loop.steps + self._random.randint(1, 80)
        world.loop.ambush = act

    def end(self) -> None:
        """Everything works again."""
        world = self._world
        self._fair_weather()
        world.network.heal()
        world.broker.sync_us = world.broker.fast_sync_us
        world.broker.lost_answers = world.store.lost_answers = world.store.refused = 0.0
        world.store.up = True
        world.exchange.inject({"fault": "clear"})

    def spare(self) -> None:
        """Nobody dies any more: what is missed when all is over is nobody's to judge."""
        for process in self._world.processes.values():
            process.doomed_in = 0
        self._world.loop.ambush_step = -1

    # -- the network

    def _cut(self) -> None:
        self._world.network.cut("collector", "exchange")

    def _silence(self) -> None:
        self._world.network.silence("collector", "exchange")

    def _stalls(self) -> None:
        network = self._world.network
        network.weather = replace(network.weather, stall_share=0.3, cut_share=0.5)
        self._world.later(5.0, self._fair_weather)

    def _fair_weather(self) -> None:
        network = self._world.network
        network.weather = replace(network.weather, stall_share=0.0, cut_share=0.0)

    def _partition(self) -> None:
        """The collector and the exchange do not reach each other; what was on its way arrives in the end."""
        network = self._world.network
        network.split.add(frozenset(("collector", "exchange")))
        self._world.later(self._random.uniform(0.5, 6.0), network.heal)

    def _client(self) -> None:
        wire = self._world.subscriber.wire
        if wire is not None:
            wire.cut()

    # -- the exchange

    def _on_symbol(self, fault: str) -> None:
        self._world.exchange.inject({"fault": fault, "symbol": self._symbol(), "count": self._random.randint(2, 5)})

    def _hole(self) -> None:
        """Ids that never existed."""
        world = self._world
        if not world.exchange.exchange.is_down:
            symbol = self._symbol()
            request = world.exchange.inject({"fault": "hole", "symbol": symbol, "count": self._random.randint(1, 4)})
            world.never_were.setdefault(symbol, []).extend(number + world.numbering for number in request.touched)

    def _restart(self, *, reset_ids: bool) -> None:
        world = self._world
        if world.exchange.exchange.is_down:
            return
        if reset_ids:  # it forgets what it lost
            world.lost_before = {symbol: world.lost_ids(symbol) for symbol in world.symbols()}
        world.exchange.inject({"fault": "restart", "seconds": self._random.uniform(1.0, 4.0), "reset_ids": reset_ids})

    def _venue(self) -> None:
        fault = dict(self._random.choice(_VENUE))
        if fault["fault"] == "late":
            fault |= {"symbol": self._symbol(), "count": self._random.randint(1, 3)}
        self._world.trace.note("venue", fault["fault"])
        self._world.malformed |= fault["fault"] in ("malformed", "cut_pages")
        self._world.exchange.inject(fault)

    def _symbol(self) -> str:
        return self._random.choice(self._world.exchange.exchange.venues["spot"].market.universe.symbols)

    # -- the broker

    def _lost_answers(self) -> None:
        broker = self._world.broker
        broker.lost_answers = 0.3
        self._world.later(3.0, lambda: setattr(broker, "lost_answers", 0.0))

    def _slow_sync(self) -> None:
        broker = self._world.broker
        broker.sync_us = 400_000
        self._world.later(4.0, lambda: setattr(broker, "sync_us", broker.fast_sync_us))
        if self._random.random() < 0.8:
            self._world.later(self._random.uniform(0.5, 3.5), self._machine_down)

    def _again(self) -> None:
        """A recent record of trades once more, as a second collector would send it."""
        place = self._place()
        values = self._telling_records(place)[-10:]
        if values:
            self._world.broker.inject(place, self._random.choice(values))

    def _newest_again(self) -> None:
        """The newest record that tells something once more, after it was stored."""
        place = self._place()
        values = self._telling_records(place)
        if values:
            self._world.later(self._random.uniform(0.0, 1.0), self._world.broker.inject, place, values[-1])

    def _telling_records(self, place: tuple[str, int]) -> list[bytes]:
        """Records with trades or notices of gaps, as a spool or a producer sends them again after a crash."""
        records = self._world.broker.logs[place].records
        frames = enumerate(self._world.frames.of(*place))
        return [records[offset].value for offset, frame in frames if frame is not None and (frame.row_count or frame.gaps)]

    def _poison(self) -> None:
        """A record of trades that nobody can read."""
        self._world.broker.inject(self._place(), b"\x00\x00\x00\x00\x01" + self._random.randbytes(20))

    def _place(self) -> tuple[str, int]:
        return "trades", self._random.randrange(self._world.broker.partitions)

    # -- the store and the disk

    def _store_answers(self) -> None:
        store = self._world.store
        store.lost_answers = 0.5
        self._world.later(3.0, lambda: setattr(store, "lost_answers", 0.0))

    def _store_refuses(self) -> None:
        store = self._world.store
        store.refused = 0.5
        self._world.later(3.0, lambda: setattr(store, "refused", 0.0))

    def _store_away(self) -> None:
        store = self._world.store
        store.up = False
        self._world.later(self._random.uniform(0.5, 4.0), lambda: setattr(store, "up", True))

    def _power_cut(self) -> None:
        self._world.kill(self._world.processes["collector"])
        self._world.outside.disk.power_cut()

    def _machine_down(self) -> None:
        """Everything on one machine, at the same moment."""
        world = self._world
        if world.over or not world.scenario.kills:
            return
        world.trace.note("machine down")
        for name in ("worker", "sink", "api"):
            world.kill(world.processes[name])
        self._power_cut()
        world.crash_broker()
