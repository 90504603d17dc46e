"""The commands of the README on a real stack: up, status, doctor, replay, tail, export, topics, down, and that nothing is left behind."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.conftest import process_environ

ROOT = Path(__file__).resolve().parents[2]
FIRST_ID, TRADES = 5000, 1200
START_MS = 1_723_161_240_000  # 2024-08-08T23:54:00Z, the start of a minute
STEP_MS = 250  # four trades a second: 1,200 trades are five minutes


@dataclass(kw_only=True)
class Shell:
    """A shell in which the variables of one stack are set."""

    data_dir: Path
    environ: dict[str, str]
    pids: dict[str, int] = field(default_factory=dict)

    def run(self, *arguments: str, timeout_s: float = 280) -> subprocess.CompletedProcess[str]:
        """One command to its end. The first `up` of a changed checkout compiles the kernels, which takes a minute of two idle cores."""
        command = [sys.executable, "-m", "infra.cli.main", *arguments]
        return subprocess.run(command, cwd=ROOT, env=self.environ, capture_output=True, text=True, timeout=timeout_s, check=False)

    def json(self, *arguments: str) -> Any:
        """The JSON a command that succeeds prints."""
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


def shell_for(data_dir: Path) -> Shell:
    """A shell for a stack on free ports."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MARKETSTREAM_")}
    variables = {name: value for name, value in process_environ(data_dir).items() if name != "MARKETSTREAM_DATA_DIR"}
    return Shell(data_dir=data_dir, environ={**clean, **variables, "PYTHONPATH": str(ROOT)})


def processes_of(data_dir: Path) -> list[psutil.Process]:
    """Every process that was started for that data folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MARKETSTREAM_DATA_DIR") == str(data_dir) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A stack that `up --detach --source none` started; down when the module is done."""
    made = shell_for(tmp_path_factory.mktemp("cli") / "data")
    done = made.run("up", "--detach", "--source", "none", "--data-dir", str(made.data_dir), "--json")
    try:
        assert done.returncode == 0, done.stderr
        event = json.loads(done.stdout)
        made.pids = {item["name"]: item["pid"] for item in event["processes"]}
        made.environ["MARKETSTREAM_DATA_DIR"] = str(made.data_dir)
        yield made
    finally:
        made.run("down", "--data-dir", str(made.data_dir))


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in the layout of Binance's public dumps."""
    path = tmp_path_factory.mktemp("dump") / "BTCUSDT-trades-2024-08-08.csv"
    with path.open("w", newline="") as stream:
        rows = csv.writer(stream)
        for index in range(TRADES):
            price, size = 60_000 + (index * 37 % 101) / 4, 0.001 * (1 + index % 7)
            quote = f"{price * size:.8f}"
            rows.writerow([FIRST_ID + index, price, f"{size:.3f}", quote, START_MS + index * STEP_MS, str(index % 2 == 0), "True"])
    return path


@pytest.fixture(scope="module")
def replayed(shell: Shell, dump: Path) -> dict[str, Any]:
    """What `replay --json` said of the dump."""
    answer: dict[str, Any] = shell.json("replay", str(dump), "--exchange", "binance", "--symbol", "BTC-USDT", "--speed", "max")
    return answer


def exported(shell: Shell, folder: Path, what: str, *more: str) -> list[dict[str, str]]:
    """The rows of an export as CSV."""
    file = folder / f"{what}.csv"
    shell.json("export", what, "--exchange", "binance", "--symbol", "BTC-USDT", "--format", "csv", "-o", str(file), *more)
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_detached_up_returns_when_ready(shell: Shell) -> None:
    """When `up --detach` has returned, /readyz answers ok."""
    url = shell.json("status")["urls"]["api"]
    with urllib.request.urlopen(url + "/readyz", timeout=5) as answer:
        assert answer.status == 200


def test_status_has_the_documented_shape(shell: Shell) -> None:
    """Processes with name, pid and state; lag by stage; urls with the API."""
    value = shell.json("status")
    servers = {"kafka", "clickhouse", "postgres", "registry"}
    assert {item["name"] for item in value["processes"]} == servers | {"worker-0", "sink", "repair", "api"}
    for item in value["processes"]:
        assert psutil.pid_exists(item["pid"])
        assert item["state"] == "ready"
    assert set(value["lag"]) == {"worker", "sink.trades", "sink.bars"}
    assert value["urls"]["api"].startswith("http://127.0.0.1:")


def test_doctor_finds_nothing(shell: Shell) -> None:
    """Every check is ok on a stack that was just started."""
    value = shell.json("doctor")
    assert value["ok"], [check for check in value["checks"] if not check["ok"]]
    names = [check["name"] for check in value["checks"]]
    assert names == [
        *("python", "disk", "jars", "data folder", "ports", "clock", "processes"),
        *("broker", "topics", "registry", "clickhouse", "postgres", "lag"),
    ]


def test_replay_accounts_for_every_row(replayed: dict[str, Any]) -> None:
    """Rows read are published, repeated or dead-lettered, and the command returned after they were stored."""
    assert (replayed["rows"], replayed["published"], replayed["deadlettered"]) == (TRADES, TRADES, 0)


def test_export_gives_back_what_was_replayed(shell: Shell, replayed: dict[str, Any], dump: Path, tmp_path: Path) -> None:
    """Trades in the documented columns, by id, equal to the file."""
    rows = exported(shell, tmp_path, "trades")
    assert list(rows[0]) == ["exchange", "symbol", "trade_id", "price", "size", "side", "exchange_time_us", "receive_time_us"]
    with dump.open(newline="") as stream:
        source = list(csv.reader(stream))
    assert [(int(row["trade_id"]), float(row["price"]), int(row["exchange_time_us"])) for row in rows] == [
        (int(trade[0]), float(trade[1]), int(trade[4]) * 1000) for trade in source
    ]


def test_exported_bars_are_those_of_the_trades(shell: Shell, replayed: dict[str, Any], tmp_path: Path) -> None:
    """Five minutes, each with its 240 trades; the last one is closed as incomplete because the replay cannot know what follows."""
    rows = exported(shell, tmp_path, "bars", "--timeframe", "1m")
    assert list(rows[0])[:6] == ["open_time_us", "close_time_us", "open", "high", "low", "close"]
    assert [int(row["trade_count"]) for row in rows] == [240] * 5
    assert [row["is_final"] for row in rows] == ["1"] * 5
    assert rows[-1]["complete"] == "0"


def test_second_replay_changes_nothing(shell: Shell, replayed: dict[str, Any], dump: Path, tmp_path: Path) -> None:
    """The same file again: the same trades and bars."""
    (tmp_path / "before").mkdir()
    (tmp_path / "after").mkdir()
    before = [exported(shell, tmp_path / "before", what) for what in ("trades", "bars")]
    shell.json("replay", str(dump), "--exchange", "binance", "--symbol", "BTC-USDT")
    after = [exported(shell, tmp_path / "after", what) for what in ("trades", "bars")]
    assert [row["trade_id"] for row in after[0]] == [row["trade_id"] for row in before[0]]
    assert [{**row, "revision": ""} for row in after[1]] == [{**row, "revision": ""} for row in before[1]]


def test_tail_shows_selected_rows(shell: Shell, replayed: dict[str, Any]) -> None:
    """`--where` and `--limit` apply to rows, whatever frames they came in."""
    where = f"symbol=BTC-USDT and trade_id < {FIRST_ID + 10} and side=buy"
    done = shell.run("tail", "trades", "--from", "earliest", "--no-follow", "--where", where, "--json")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["trade_id"] for row in rows} == {FIRST_ID + index for index in range(10) if index % 2 == 1}
    assert len(shell.run("tail", "bars", "--from", "earliest", "--limit", "3", "--json").stdout.splitlines()) == 3


@pytest.mark.parametrize("topic", ["bars.rows", "bars.state", "deadletter"])
def test_tail_reads_every_kind_of_topic(shell: Shell, replayed: dict[str, Any], topic: str) -> None:
    """Row topics and topics of raw bytes, too."""
    done = shell.run("tail", topic, "--from", "earliest", "--no-follow", "--json")
    assert done.returncode == 0, done.stderr
    assert "skipped" not in done.stderr


def test_topics_lists_offsets(shell: Shell, replayed: dict[str, Any]) -> None:
    """The catalogue with what the broker holds."""
    rows = {row["name"]: row for row in shell.json("topics")["topics"]}
    assert rows["trades"]["records"] > 0
    assert rows["trades"]["bytes"] > 0
    assert len(rows["trades"]["offsets"]) == rows["trades"]["partitions"] == 4
    assert rows["deadletter"]["partitions"] == 1


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [("missing.csv", None, 7), ("broken.csv.gz", b"this is not gzip", 7), ("words.csv", b"hello\nworld\n", 7), ("empty.csv", b"", 7)],
)
def test_replay_of_a_bad_file_is_exit_code_7(shell: Shell, tmp_path: Path, name: str, content: bytes | None, code: int) -> None:
    """One sentence that names the file; nothing is published."""
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    done = shell.run("replay", str(file), "--exchange", "binance", "--symbol", "BTC-USDT")
    assert done.returncode == code, done.stderr
    assert name in done.stderr
    assert "Traceback" not in done.stderr


def test_second_up_on_a_used_folder_is_refused_and_harms_nobody(shell: Shell) -> None:
    """Exit code 4 and the owner's pid; the running stack goes on."""
    done = shell.run("up", "--source", "none", "--data-dir", str(shell.data_dir))
    assert done.returncode == 4, done.stderr
    assert "in use by a running stack" in done.stderr
    assert {item["name"]: item["pid"] for item in shell.json("status")["processes"]} == shell.pids


def test_port_in_use_is_exit_code_3(shell: Shell, tmp_path: Path) -> None:
    """A second stack on the same ports names port and setting, and leaves no process."""
    other = tmp_path / "other"
    done = shell.run("up", "--detach", "--source", "none", "--data-dir", str(other))
    assert done.returncode == 3, done.stderr
    assert "in use" in done.stderr
    assert processes_of(other) == []


def test_down_leaves_no_process_and_up_continues(shell: Shell, replayed: dict[str, Any], tmp_path: Path) -> None:
    """After `down` nothing of the stack runs; a second `up` has the data and new processes."""
    assert shell.json("down")["stopped"]
    assert processes_of(shell.data_dir) == []
    assert not any(psutil.pid_exists(pid) for pid in shell.pids.values())
    started = time.monotonic()
    assert shell.run("up", "--detach", "--source", "none", "--data-dir", str(shell.data_dir)).returncode == 0
    took = time.monotonic() - started
    assert len(exported(shell, tmp_path, "trades")) == TRADES
    assert took < 60, f"a later up took {took:.1f} s"  # 15 s is what it should take on an idle machine; this one may be busy


def test_interrupted_up_leaves_no_process(tmp_path: Path) -> None:
    """Ctrl-C in the foreground stops the whole tree and ends well; lines are JSON where there is no terminal."""
    mine = shell_for(tmp_path / "data")
    command = [sys.executable, "-m", "infra.cli.main", "up", "--source", "none", "--data-dir", str(mine.data_dir), "--json"]
    with subprocess.Popen(command, cwd=ROOT, env=mine.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        assert line, process.stderr.read()
        assert json.loads(line)["event"] == "up"
        assert processes_of(mine.data_dir)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, process.stderr.read()
    assert processes_of(mine.data_dir) == []


def test_killed_up_leaves_no_process(tmp_path: Path) -> None:
    """Kill -9 of the command itself takes the tree with it."""
    mine = shell_for(tmp_path / "data")
    command = [sys.executable, "-m", "infra.cli.main", "up", "--source", "none", "--data-dir", str(mine.data_dir), "--json"]
    with subprocess.Popen(command, cwd=ROOT, env=mine.environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.kill()
        process.wait()
    until = time.monotonic() + 60
    while processes_of(mine.data_dir) and time.monotonic() < until:
        time.sleep(0.1)
    assert processes_of(mine.data_dir) == []
