"""Scripts of faults, and the faults that only a script makes worth having: outages, restarts, lost trades, sick REST."""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from simulated_support import START_MS, ManualClock, small_config
from test_simulated_server import received, settle, trades_of
from websockets.asyncio.client import connect

from collectors.simulated.errors import SimulationConfigError, UnknownFaultError
from collectors.simulated.scripts import RANDOM_KINDS, parse_script, read_script
from collectors.simulated.server import SimulatedExchange, serve

SECOND = 1_000


@pytest.fixture
async def rest(exchange: SimulatedExchange) -> AsyncIterator[httpx.AsyncClient]:
    """A REST client of the exchange."""
    async with httpx.AsyncClient(base_url=exchange.rest_url) as client:
        yield client


async def ids_of(rest: httpx.AsyncClient, first_id: int) -> list[int]:
    """Ids REST has from ``first_id`` on, one page."""
    page = await rest.get("/api/v3/historicalTrades", params={"symbol": "BTCUSDT", "fromId": first_id, "limit": 1_000})
    return [row["id"] for row in page.json()]


# Scripts.


async def test_a_script_begins_each_fault_at_its_time_and_status_names_the_ids(
    exchange: SimulatedExchange, rest: httpx.AsyncClient
) -> None:
    """Two drops a second apart: what is missing on the wire is what status says was touched, at the times the script says."""
    script = [{"at_s": 1.2, "fault": "drop", "symbol": "BTCUSDT", "count": 3}, {"at_s": 0.2, "fault": "drop", "symbol": "BTCUSDT"}]
    async with connect(f"{exchange.ws_url}/ws/btcusdt@trade") as socket:
        known, begun_ms = len(exchange.truth("BTCUSDT")["trade_id"]), exchange.exchange.time_ms
        answer = (await rest.post("/sim/script", json=script)).json()
        assert answer == {"faults": 2, "begun": 0, "begun_ms": -1, "next_at_s": 0.2}
        exchange.advance(3 * SECOND)
        sent = trades_of(await received(socket), "BTCUSDT")
    made = exchange.truth("BTCUSDT")["trade_id"][known:].tolist()
    status = (await rest.get("/sim/status")).json()
    touched = [trade_id for fault in status["faults"] for trade_id in fault["touched"]]
    assert sorted(set(made) - set(sent)) == touched
    assert len(touched) == 4
    assert [fault["begun_ms"] - begun_ms for fault in status["faults"]] == [200, 1_200]
    assert status["script"] == {"faults": 2, "begun": 2, "begun_ms": begun_ms, "next_at_s": None}


async def test_the_same_seed_gives_the_same_script_and_touches_the_same_ids(clock: ManualClock) -> None:
    """Two exchanges of one seed under one random script: the same faults at the same times on the same ids."""
    seen = []
    for _ in range(2):
        async with serve(small_config(), clock) as running:
            running.play_json(
                {"seed": 7, "seconds": 5, "faults": 12, "symbols": ["BTCUSDT", "ETHUSDT"], "kinds": ["drop", "hole", "duplicate"]}
            )
            running.advance(8 * SECOND)
            seen.append([fault | {"market": ""} for fault in running.status()["faults"]])
    assert seen[0] == seen[1]
    assert len(seen[0]) == 12
    assert any(fault["touched"] for fault in seen[0])


def test_a_random_script_may_draw_every_kind() -> None:
    """Each kind gives a fault that parses, within the time asked for."""
    for seed, kind in enumerate(RANDOM_KINDS):
        script = parse_script({"seed": seed, "seconds": 10, "faults": 5, "kinds": [kind]})
        assert [request.fault for _, request in script.entries] == [kind] * 5
        assert all(0 <= at_ms <= 10_000 for at_ms, _ in script.entries)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "a script is a list such as"),
        ([], "a script is a list such as"),
        ([1], r"script\[0\]=1 must be an object"),
        ([{"fault": "close"}], r"script\[0\]: at_s=None must be a number of seconds"),
        ([{"at_s": 1, "fault": "close"}, {"at_s": -1, "fault": "close"}], r"script\[1\]: at_s=-1 must be"),
        ([{"at_s": 1, "fault": "explode"}], r"script\[0\]: fault='explode' is not known"),
        ([{"at_s": 1, "fault": "restart", "reset_ids": 3}], r"script\[0\]: restart: reset_ids=3 must be true or false"),
        ([{"at_s": 1, "fault": "rest_error", "status": 404}], r"script\[0\]: rest_error: status=404 must be a number within 500..599"),
        ({"seed": -1}, "random script: seed=-1"),
        ({"seed": 1, "seconds": 0}, "random script: seconds=0"),
        ({"seed": 1, "kinds": "drop"}, "random script: kinds='drop' must be a list"),
        ({"seed": 1, "fault": "drop"}, "random script: argument 'fault' is not known"),
    ],
)
def test_a_bad_script_is_refused_in_one_sentence(body: Any, says: str) -> None:
    """The sentence names the entry and what is wrong with it."""
    with pytest.raises(UnknownFaultError, match=says) as caught:
        parse_script(body)
    assert "\n" not in str(caught.value)


async def test_a_script_with_an_unknown_symbol_begins_nothing(exchange: SimulatedExchange, rest: httpx.AsyncClient) -> None:
    """A 400 and one sentence; the faults before it are not begun either."""
    reply = await rest.post("/sim/script", json=[{"at_s": 0, "fault": "close"}, {"at_s": 1, "fault": "drop", "symbol": "NOPE"}])
    assert reply.status_code == 400
    assert "NOPE is not listed" in reply.json()["msg"]
    exchange.advance(SECOND)
    assert exchange.status()["faults"] == []


def test_a_script_of_a_file_and_what_is_wrong_with_it(tmp_path: Path) -> None:
    """The entry point plays a file; a missing or broken one ends it with one sentence and exit code 2."""
    path = tmp_path / "script.json"
    path.write_text(json.dumps([{"at_s": 0.5, "fault": "close"}]))
    assert len(read_script(path).entries) == 1
    with pytest.raises(SimulationConfigError, match=r"script .*none\.json cannot be read"):
        read_script(tmp_path / "none.json")
    path.write_text('[{"at_s": 0.5, "fault": "cloze"}]')
    command = [sys.executable, "-m", "infra.simulated_exchange", "--script", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "script[0]: fault='cloze' is not known" in result.stderr.strip().splitlines()[-1]


# Outages and restarts.


async def test_a_restart_drops_and_refuses_everybody_then_numbers_anew(clock: ManualClock) -> None:
    """Connections break with 1006, connects are refused, nothing trades; afterwards ids begin at 1 and REST knows only those."""
    async with serve(small_config(), clock) as running, httpx.AsyncClient(base_url=running.rest_url) as rest:
        async with connect(f"{running.ws_url}/ws/btcusdt@trade") as socket:
            before = running.truth("BTCUSDT")["trade_id"].tolist()
            assert (await rest.post("/sim/faults", json={"fault": "restart", "seconds": 2})).status_code == 200
            running.advance(SECOND)
            await socket.wait_closed()
            assert socket.close_code == 1006
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", running.port)
        assert running.status()["down"]
        assert running.truth("BTCUSDT")["trade_id"].tolist() == before
        running.advance(2 * SECOND)
        await clock.move(1)  # the doors open on the server's own turn
        assert running.truth("BTCUSDT")["trade_id"][0] == 1
        assert running.truth("BTCUSDT", earlier=True)["trade_id"].tolist() == before
        assert (await ids_of(rest, 0))[0] == 1
        async with connect(f"{running.ws_url}/ws/btcusdt@trade") as socket:
            await settle(running, 1)
            running.advance(SECOND)
            assert trades_of(await received(socket), "BTCUSDT")[0] > 1


async def test_a_restart_can_keep_the_ids(clock: ManualClock) -> None:
    """Ids go on where they were; what was traded before is still in REST."""
    async with serve(small_config(), clock) as running:
        last = int(running.truth("BTCUSDT")["trade_id"][-1])
        running.inject({"fault": "restart", "seconds": 0.5, "reset_ids": False})
        running.advance(2 * SECOND)
        made = running.truth("BTCUSDT")["trade_id"]
        assert made[0] < last < made[-1]


async def test_refused_connects_leave_the_open_ones_alone(clock: ManualClock) -> None:
    """For its seconds no new connection is taken; the open one delivers; then all is as before."""
    async with serve(small_config(), clock) as running, connect(f"{running.ws_url}/ws/btcusdt@trade", max_queue=None) as socket:
        await settle(running, 1)
        running.inject({"fault": "refuse", "seconds": 1})
        await asyncio.sleep(0.01)
        running.advance(SECOND // 2)
        with pytest.raises(OSError):
            await connect(f"{running.ws_url}/ws").__aenter__()
        assert trades_of(await received(socket), "BTCUSDT")
        running.advance(SECOND)
        await clock.move(1)
        async with connect(f"{running.ws_url}/ws"):
            await settle(running, 2)


async def test_a_stalled_connection_answers_but_carries_no_data(exchange: SimulatedExchange) -> None:
    """Pings are answered, requests too; what it was not sent is named by symbol; it goes on by itself."""
    async with connect(f"{exchange.ws_url}/stream?streams=btcusdt@trade/ethusdt@trade") as socket:
        await settle(exchange, 1)
        known = len(exchange.truth("BTCUSDT")["trade_id"])
        fault = exchange.inject({"fault": "stall", "seconds": 1})
        exchange.advance(SECOND)
        assert trades_of(await received(socket), "BTCUSDT") == []
        await asyncio.wait_for(await socket.ping(), 2)
        made = exchange.truth("BTCUSDT")["trade_id"][known:].tolist()
        assert fault.ranges["BTCUSDT"] == [[made[0], made[-1]]]
        assert set(fault.ranges) == {"BTCUSDT", "ETHUSDT"}
        exchange.advance(SECOND)
        assert trades_of(await received(socket), "BTCUSDT")[0] == made[-1] + 1


async def test_late_trades_come_after_newer_ones(exchange: SimulatedExchange) -> None:
    """Held for half a second of market time, then sent, each once, behind trades that were made later."""
    async with connect(f"{exchange.ws_url}/ws/btcusdt@trade") as socket:
        await settle(exchange, 1)
        known = len(exchange.truth("BTCUSDT")["trade_id"])
        fault = exchange.inject({"fault": "late", "symbol": "BTCUSDT", "count": 3, "seconds": 0.5})
        exchange.advance(SECOND)
        sent = trades_of(await received(socket), "BTCUSDT")
    assert sorted(sent) == exchange.truth("BTCUSDT")["trade_id"][known:].tolist()
    assert sent[0] == fault.touched[-1] + 1
    assert sent.index(fault.touched[0]) > 3


# REST that is ill.


async def test_lost_trades_are_nowhere(exchange: SimulatedExchange, rest: httpx.AsyncClient) -> None:
    """Neither sent nor in REST, though the market made them."""
    known = len(exchange.truth("BTCUSDT")["trade_id"])
    fault = exchange.inject({"fault": "lose", "symbol": "BTCUSDT", "count": 3})
    exchange.advance(SECOND)
    made = exchange.truth("BTCUSDT")["trade_id"][known:].tolist()
    assert list(fault.touched) == made[:3]
    assert await ids_of(rest, made[0]) == made[3:1_003]


async def test_sick_rest_is_slow_fails_and_answers_in_pieces(
    exchange: SimulatedExchange, rest: httpx.AsyncClient, clock: ManualClock
) -> None:
    """Late answers come in order, 5xx for its seconds, short pages, cut bodies; `clear` cures all."""
    exchange.inject({"fault": "slow_rest", "seconds": 60, "delay_s": 2})
    asked = asyncio.create_task(rest.get("/api/v3/time"))
    await asyncio.sleep(0.1)
    assert not asked.done()
    await clock.move(2)
    assert (await asked).json() == {"serverTime": START_MS}
    exchange.inject({"fault": "clear"})
    exchange.inject({"fault": "rest_error", "status": 502})
    assert (await rest.get("/api/v3/ping")).status_code == 502
    exchange.inject({"fault": "clear"})
    first = int(exchange.truth("BTCUSDT")["trade_id"][0])
    exchange.inject({"fault": "short_pages", "count": 7})
    assert await ids_of(rest, first) == list(range(first, first + 7))
    exchange.inject({"fault": "clear"})
    exchange.inject({"fault": "cut_pages"})
    page = await rest.get("/api/v3/historicalTrades", params={"symbol": "BTCUSDT"})
    with pytest.raises(ValueError, match="."):
        page.json()
    assert len(await ids_of(rest, first)) > 7


# TLS.


def certificate_of(folder: Path, *, host: str = "localhost", days: int = 1) -> tuple[Path, Path]:
    """A self-signed certificate and its key, by the openssl command."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", str(days)]
    names = ["-subj", f"/CN={host}", "-addext", f"subjectAltName=DNS:{host},IP:127.0.0.1"]
    subprocess.run([*command, *names, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    return certificate, key


async def test_the_exchange_speaks_tls_with_a_certificate(clock: ManualClock, tmp_path: Path) -> None:
    """Https and wss with the certificate given; a file that is none is refused in one sentence."""
    certificate, key = certificate_of(tmp_path)
    async with serve(small_config(certificate=certificate, key=key), clock) as running:
        assert running.rest_url.startswith("https://")
        assert running.ws_url.startswith("wss://")
        trust = ssl.create_default_context(cafile=str(certificate))
        async with httpx.AsyncClient(base_url=running.rest_url, verify=trust) as rest:
            assert (await rest.get("/api/v3/ping")).status_code == 200
        async with connect(f"{running.ws_url}/ws/btcusdt@trade", ssl=trust) as socket:
            running.advance(SECOND)
            assert trades_of(await received(socket), "BTCUSDT")
    with pytest.raises(SimulationConfigError, match="cannot be used"):
        async with serve(small_config(certificate=Path(__file__)), clock):
            pass
