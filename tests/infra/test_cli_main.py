"""The command line as a script sees it: exit codes, error shape, what is on stdout and what on stderr, start-up time."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from infra import errors
from infra.cli import main as cli
from infra.cli.output import error_value, translate
from infra.errors import MarketstreamError, SettingsError
from schemas.errors import DecodeError, VocabularyError

ROOT = Path(__file__).resolve().parents[2]
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("MARKETSTREAM_")}


def marketstream(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a process of its own."""
    command = [sys.executable, "-m", "infra.cli.main", *arguments]
    return subprocess.run(command, cwd=ROOT, env=CLEAN | variables, capture_output=True, text=True, timeout=60, check=False)


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command in this process, which saves the imports of a new one."""

    def call(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        for name in os.environ:
            if name.startswith("MARKETSTREAM_"):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        capsys.readouterr()
        code = cli.main(arguments)
        shown = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, shown.out, shown.err)

    return call


def test_help_imports_nothing_heavy() -> None:
    """`marketstream --help` answers at once, on a slow machine too: nothing large is loaded for it."""
    code = "import sys, infra.cli.main; print([m for m in ('numpy', 'polars', 'confluent_kafka', 'rich', 'httpx') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version() -> None:
    """`--version` prints the version of the project."""
    done = marketstream("--version")
    assert (done.returncode, done.stdout) == (0, "marketstream 0.1.0\n")


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["upp"], 2, "Did you mean 'up'"),
        (["up", "--source", "moon"], 2, "'moon' is not one of"),
        (["tail"], 2, "Missing argument"),
        (["tail", "trade"], 2, "did you mean 'trades'"),
        (["tail", "trades", "--from", "soon"], 2, "--from is 'soon'"),
        (["tail", "trades", "--where", "prise>1"], 2, "did you mean price?"),
        (["tail", "trades", "--limit", "0"], 2, "--limit"),
        (["bench", "nothing-like-it"], (1, 2), "benchmark"),
        (["export", "bars", "--exchange", "binance", "--symbol", "BTC-USDT", "-o", "x", "--format", "xls"], 2, "xls"),
        (
            ["export", "trades", "--exchange", "binance", "--symbol", "BTC-USDT", "-o", "x", "--start", "noon"],
            2,
            "--start: 'noon' is not a time",
        ),
    ],
)
def test_wrong_arguments_are_one_sentence_and_exit_code_2(run: Run, arguments: list[str], code: int | tuple[int, ...], part: str) -> None:
    """Nothing is started and nothing is on stdout; stderr holds one line that names the culprit."""
    done = run(*arguments)
    assert done.returncode in (code if isinstance(code, tuple) else (code,)), done.stderr
    assert done.stdout == ""
    assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_misspelt_setting_is_named_with_the_nearest_one(run: Run) -> None:
    """An unknown MARKETSTREAM_ variable stops every command."""
    done = run("config", "show", MARKETSTREAM_KAFKA_BOOTSTRP="x:1")
    assert done.returncode == 2
    assert "MARKETSTREAM_KAFKA_BOOTSTRP" in done.stderr
    assert "did you mean MARKETSTREAM_KAFKA_BOOTSTRAP" in done.stderr


def test_errors_are_json_with_json(run: Run) -> None:
    """With --json an error is one JSON object on stderr with type, exit code and message."""
    done = run("tail", "trade", "--json")
    assert json.loads(done.stderr) == error_value("SettingsError", 2, "Unknown topic 'trade': did you mean 'trades'?")
    usage = run("up", "--json", "--source", "moon")
    assert json.loads(usage.stderr)["error"]["type"] == "UsageError"


def test_debug_shows_the_traceback() -> None:
    """Only --debug does."""
    assert "Traceback" in marketstream("tail", "trade", "--debug").stderr


def test_commands_without_a_stack_say_so(run: Run, tmp_path: Path) -> None:
    """`status` exits with 10 and still prints its JSON; `down` has nothing to do and is content."""
    folder = str(tmp_path / "none")
    status = run("status", "--json", "--data-dir", folder)
    assert status.returncode == errors.NotRunningError.exit_code
    assert json.loads(status.stdout) == {"processes": [], "lag": {}, "urls": {}}
    down = run("down", "--json", "--data-dir", folder)
    assert (down.returncode, json.loads(down.stdout)["stopped"]) == (0, False)


def test_unreachable_broker_is_exit_code_6(run: Run, tmp_path: Path) -> None:
    """A broker that is not there is one sentence that names it and the setting."""
    done = run("topics", "--data-dir", str(tmp_path), MARKETSTREAM_KAFKA_BOOTSTRAP="127.0.0.1:9")
    assert done.returncode == 6, done.stderr
    assert "127.0.0.1:9" in done.stderr
    assert "MARKETSTREAM_KAFKA_BOOTSTRAP" in done.stderr


def test_config_show_tells_where_values_come_from_and_masks_secrets(run: Run, tmp_path: Path) -> None:
    """Every setting with value and origin; no secret in clear."""
    (tmp_path / "some.toml").write_text("[worker]\ncount = 3\n")
    variables = {"MARKETSTREAM_CONFIG": str(tmp_path / "some.toml"), "MARKETSTREAM_CLICKHOUSE_PASSWORD": "hunter2-secret"}
    done = run("config", "show", "--json", "--data-dir", str(tmp_path / "data"), **variables)
    rows = {row["key"]: row for row in json.loads(done.stdout)["settings"]}
    assert rows["worker.count"] == {"key": "worker.count", "value": "3", "origin": "file:some.toml"}
    assert rows["data_dir"]["origin"] == "command line"
    assert rows["sink.max_rows"]["origin"] == "default"
    assert rows["clickhouse.password"]["value"] == "***"
    assert "hunter2-secret" not in done.stdout


def test_shell_completion_completes_commands() -> None:
    """Bash's completion protocol lists the commands."""
    done = marketstream(COMP_WORDS="marketstream sta", COMP_CWORD="1", _MARKETSTREAM_COMPLETE="complete_bash")
    assert done.stdout.split() == ["status"]


def test_closed_pipe_ends_quietly() -> None:
    """`marketstream config show | head -1` prints no traceback."""
    command = f"{sys.executable} -m infra.cli.main config show --json | true"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=CLEAN, capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("exc", "kind", "code"),
    [
        (SettingsError("x"), "SettingsError", 2),
        (VocabularyError("topic", "x", ["y"]), "SettingsError", 2),
        (DecodeError("x"), "SettingsError", 2),
        (OSError(errno.ENOSPC, "No space left on device", "f"), "DiskFullError", 5),
        (PermissionError(errno.EACCES, "Permission denied", "f"), "SettingsError", 2),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), "UnreachableError", 6),
    ],
)
def test_foreign_exceptions_become_operator_errors(exc: Exception, kind: str, code: int) -> None:
    """What libraries and pure packages raise is translated once, at the edge."""
    known = translate(exc)
    assert known is not None
    assert (type(known).__name__, known.exit_code) == (kind, code)


def test_a_bug_is_not_dressed_up_as_an_operator_error() -> None:
    """A TypeError of ours stays an internal error."""
    assert translate(TypeError("x")) is None


def test_exit_codes_are_documented_in_the_help() -> None:
    """Every exit code of the error tree stands in `--help`."""
    epilog = str(cli.app.info.epilog)
    found, todo = set(), [MarketstreamError]
    while todo:
        kind = todo.pop()
        found.add(kind.exit_code)
        todo += kind.__subclasses__()
    missing = [code for code in sorted(found) if f" {code} " not in f" {epilog} "]
    assert not missing


@pytest.mark.parametrize(
    "command", [["up"], ["down"], ["status"], ["doctor"], ["tail"], ["replay"], ["topics"], ["config", "show"], ["bench"]]
)
def test_every_command_takes_json_and_debug(run: Run, command: list[str]) -> None:
    """`--json` and `--debug` are everywhere."""
    text = run(*command, "--help").stdout
    assert "--json" in text
    assert "--debug" in text
