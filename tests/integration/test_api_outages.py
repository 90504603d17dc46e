"""The API process alone in the world: it says what is missing, never hangs, and ends when asked to."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from websockets.sync.client import connect

from infra.settings import Settings, load_settings
from tests.integration.conftest import process_environ


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[tuple[Settings, subprocess.Popen[bytes]]]:
    """The API with nothing behind any port."""
    settings = load_settings(process_environ(tmp_path))
    process = subprocess.Popen([sys.executable, "-m", "infra.api"], env=settings.as_environ() | {"PATH": "/usr/bin:/bin"})
    try:
        until = time.monotonic() + 20
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{settings.api.port}/livez", timeout=5).raise_for_status()
                break
            except httpx.TransportError:
                assert time.monotonic() < until
                time.sleep(0.05)
        yield settings, process
    finally:
        process.kill()
        process.wait(10)


def test_without_any_server_everything_is_a_503_that_names_who_is_away(alone: tuple[Settings, subprocess.Popen[bytes]]) -> None:
    """Liveness holds, readiness lists three reasons, reads and subscriptions are refused by name, each within seconds."""
    settings, process = alone
    with httpx.Client(base_url=f"http://127.0.0.1:{settings.api.port}", timeout=10) as http:
        begun = time.monotonic()
        ready = http.get("/readyz")
        checks = ready.json()["checks"]
        assert ready.status_code == 503
        assert {name: check["ok"] for name, check in checks.items()} == {"clickhouse": False, "kafka": False, "postgres": False}
        assert all(check["reason"] for check in checks.values())
        bars = http.get("/api/v1/bars/binance/BTC-USDT")
        assert (bars.status_code, bars.json()["code"]) == (503, "clickhouse_unavailable")
        symbols = http.get("/api/v1/symbols")
        assert (symbols.status_code, symbols.json()["code"]) == (503, "postgres_unavailable")
        with connect(f"ws://127.0.0.1:{settings.api.port}/api/v1/stream") as client:
            client.send(json.dumps({"op": "subscribe", "id": 1, "channel": "trades", "exchange": "binance", "symbol": "BTC-USDT"}))
            error = json.loads(client.recv(10))
            assert error["type"] == "error"
            assert error["data"]["code"] in ("clickhouse_unavailable", "kafka_unavailable")
        assert time.monotonic() - begun < 15
        assert http.get("/livez").status_code == 200
    process.terminate()
    assert process.wait(10) == 0


def test_a_port_in_use_is_one_sentence_and_exit_code_3(tmp_path: Path) -> None:
    """The sentence names the port and the variable that moves it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = load_settings(process_environ(tmp_path) | {"MARKETSTREAM_PORT_API": str(port)})
        done = subprocess.run(
            [sys.executable, "-m", "infra.api"],
            env=settings.as_environ() | {"PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert done.returncode == 3
    assert str(port) in done.stderr
    assert "MARKETSTREAM_PORT_API" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
