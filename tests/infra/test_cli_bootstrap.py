"""The first set-up and the gates: what is said when something is missing, and that a second run costs nothing."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from infra import bootstrap
from infra.cli import gates

ROOT = Path(__file__).resolve().parents[2]


def checkout(tmp_path: Path) -> Path:
    """A checkout as far as set-up reads it."""
    for name in ("infra/bootstrap.py", "requirements/bootstrap.txt", "requirements/run.txt", "requirements/dev.txt", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def run(root: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the bootstrap of that checkout with a home that is empty."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_", "HOME"))}
    command = [sys.executable, "-I", "-S", str(root / "infra" / "bootstrap.py"), *arguments]
    return subprocess.run(command, env=clean | variables, capture_output=True, text=True, timeout=120, check=False)


def test_first_setup_without_network_is_one_sentence_and_exit_code_8(tmp_path: Path) -> None:
    """No package index answers: the sentence says what is downloaded and what to do."""
    done = run(checkout(tmp_path), "run", PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_CONFIG_FILE=os.devnull)
    assert done.returncode == 8, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("marketstream: the first set-up downloads its packages and the package index does not answer")
    assert "Traceback" not in done.stderr


AUDITED = """
import runpy, sys
costly = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.mkdir", "os.rename", "os.remove", "shutil.", "socket.")
def tell(event, arguments):
    if event.startswith(costly) or (event == "open" and isinstance(arguments[2], int) and arguments[2] & 3):
        sys.stderr.write(event + " " + repr(arguments) + chr(10))
sys.argv[:] = sys.argv[1:]
sys.addaudithook(tell)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script and tells whenever it starts a process, opens a connection or writes a file."""


def test_second_run_returns_at_once(tmp_path: Path) -> None:
    """A stamp over the locks is all a second run looks at: it starts no process, writes no file and asks nobody."""
    root = checkout(tmp_path)
    command = [sys.executable, "-I", "-S", "-B", "-c", AUDITED, str(root / "infra" / "bootstrap.py"), "run"]
    offline = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_CONFIG_FILE": os.devnull, "PATH": os.environ["PATH"]}
    first = subprocess.run(command, env=offline, capture_output=True, text=True, timeout=120, check=False)
    assert "subprocess.Popen" in first.stderr  # what the hook tells of a first run
    (root / ".venv").mkdir(exist_ok=True)
    (root / ".venv" / "ready.dev").write_text(bootstrap.fingerprint(str(root), "dev"))
    second = subprocess.run(command, env=offline, capture_output=True, text=True, timeout=120, check=False)
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")


@pytest.mark.parametrize("changed", ["requirements/dev.txt", "pyproject.toml", "requirements/bootstrap.txt"])
def test_changed_lock_sets_up_again(tmp_path: Path, changed: str) -> None:
    """After any lock changed the stamp is no longer good."""
    root = checkout(tmp_path)
    (root / ".venv").mkdir()
    (root / ".venv" / "ready.dev").write_text(bootstrap.fingerprint(str(root), "dev"))
    assert bootstrap.is_ready(str(root), "dev")
    with (root / changed).open("a") as stream:
        stream.write("# changed\n")
    assert not bootstrap.is_ready(str(root), "dev")


def test_dev_includes_run_but_not_the_other_way(tmp_path: Path) -> None:
    """`make up` after `make test` installs nothing; `make test` after `make up` does."""
    root = checkout(tmp_path)
    (root / ".venv").mkdir()
    (root / ".venv" / "ready.run").write_text(bootstrap.fingerprint(str(root), "run"))
    assert bootstrap.is_ready(str(root), "run")
    assert not bootstrap.is_ready(str(root), "dev")


def test_python_too_old_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On an old Python with no other installed: what is needed, what is there, what to do."""
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 8, 10, "final", 0))
    monkeypatch.setattr(bootstrap.shutil, "which", lambda name: None)
    assert bootstrap.main(["run"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "needs Python 3.11 to 3.13" in said
    assert "is 3.8" in said


def test_python_too_old_hands_over_to_a_newer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where python3.12 is installed beside an old python3, it is used."""
    called: list[list[str]] = []
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 8, 10, "final", 0))
    monkeypatch.setattr(bootstrap.shutil, "which", lambda name: "/usr/bin/" + name if name == "python3.12" else None)
    monkeypatch.setattr(bootstrap.subprocess, "call", lambda command, **_: called.append(command) or 0)
    assert bootstrap.main(["dev"]) == 0
    assert called[-1][0] == "/usr/bin/python3.12"
    assert called[-1][-1] == "dev"


def test_bootstrap_can_be_read_by_python_3_6() -> None:
    """Its syntax is that of the oldest Python 3 anybody still has, or its sentence about versions would never be printed."""
    ast.parse((ROOT / "infra" / "bootstrap.py").read_text("utf-8"), feature_version=(3, 6))


def test_command_is_installed_without_build_tools(tmp_path: Path) -> None:
    """The checkout becomes importable and gets its command; the command is guarded for processes that multiprocessing spawns."""
    (tmp_path / "with space").mkdir()
    root = checkout(tmp_path / "with space")
    (root / "infra" / "cli").mkdir()
    (root / "infra" / "__init__.py").touch()
    (root / "infra" / "cli" / "__init__.py").touch()
    (root / "infra" / "cli" / "main.py").write_text("def main():\n    print('called')\n    return 3\n")
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    bootstrap.link_project(str(root), str(venv / "bin" / "python"))
    done = subprocess.run([str(venv / "bin" / "marketstream")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "called\n"), done.stderr
    code = "from importlib.metadata import version; print(version('marketstream')); import runpy; runpy.run_path(__import__('sys').argv[1])"
    imported = subprocess.run(
        [str(venv / "bin" / "python"), "-I", "-c", code, str(venv / "bin" / "marketstream")], capture_output=True, text=True, check=False
    )
    assert (imported.returncode, imported.stdout) == (0, "0.1.0\n"), imported.stderr


def test_unknown_set_is_refused() -> None:
    """A misspelt set names the known ones."""
    done = run(ROOT, "prod")
    assert done.returncode == 2
    assert "run, dev, bench" in done.stderr


def test_full_disk_is_refused_before_anything_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Set-up says how much it needs and where."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(bootstrap.shutil, "disk_usage", lambda path: usage._replace(free=10_000_000))
    with pytest.raises(bootstrap.SetupError) as caught:
        bootstrap.set_up(str(checkout(tmp_path)), "run")
    assert caught.value.exit_code == 5
    assert "0.0 GB are" in str(caught.value)


# Locks


def locked(name: str) -> dict[str, list[str]]:
    """Versions by package of a lock."""
    found: dict[str, list[str]] = {}
    for package, version in re.findall(
        r"^([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?==([^\s;\\]+)", (ROOT / "requirements" / f"{name}.txt").read_text(), re.MULTILINE
    ):
        found.setdefault(canonicalize_name(package), []).append(version)
    return found


def wanted(name: str) -> list[Requirement]:
    """What pyproject.toml asks for in that set."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    direct = [] if name == "bench" else project["project"]["dependencies"]
    return [Requirement(text) for text in [*direct, *project["dependency-groups"].get(name, [])]]


@pytest.mark.parametrize("name", ["run", "dev", "bench"])
def test_lock_satisfies_pyproject(name: str) -> None:
    """Every dependency is locked at a version that pyproject.toml allows; `make lock` after changing either."""
    versions = locked(name)
    wrong = [
        str(item)
        for item in wanted(name)
        if not any(item.specifier.contains(version) for version in versions.get(canonicalize_name(item.name), []))
    ]
    assert not wrong


@pytest.mark.parametrize("name", ["run", "dev", "bench", "bootstrap"])
def test_lock_has_hashes_and_names_no_index(name: str) -> None:
    """Every locked package has a hash, and no lock says where packages come from: that is the machine's own business."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    assert "://" not in text
    assert "--index" not in text
    assert "--find-links" not in text
    for block in re.split(r"\n(?=\S)", text.strip()):
        assert "--hash=sha256:" in block, block.splitlines()[0]


def test_dev_lock_holds_everything_of_the_run_lock() -> None:
    """The same versions run and are tested."""
    run_lock, dev_lock = locked("run"), locked("dev")
    assert {name: versions for name, versions in dev_lock.items() if name in run_lock} == run_lock


# Gates


def test_gates_run_cheap_ones_first_and_stop_at_the_first_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A format mistake is told in seconds, not after the integration tests."""
    ran: list[str] = []

    def fake(gate: gates.Gate) -> gates.Outcome:
        ran.append(gate.name)
        return gates.Outcome(name=gate.name, status=1 if gate.name == "ruff format" else 0, seconds=0.1)

    monkeypatch.setattr(gates, "run", fake)
    assert gates.main(["test"]) == 1
    assert ran == ["ruff check", "ruff format"]
    said = capsys.readouterr().out
    assert "ruff format        FAILED" in said
    assert "4 more not run: fix ruff format first" in said


def test_summary_closes_with_the_counts(tmp_path: Path) -> None:
    """The last line is `N passed, N failed, N skipped`, from pytest's own report."""
    report = tmp_path / "tests.xml"
    report.write_text('<testsuites><testsuite tests="7" failures="1" errors="1" skipped="2"/></testsuites>')
    assert gates.counts(report) == (3, 2, 2)
    outcomes = [gates.Outcome(name="tests", status=1, seconds=3.0)]
    assert gates.summary(outcomes, 1, gates.counts(report)).splitlines()[-1] == "3 passed, 2 failed, 2 skipped"


def test_missing_report_counts_nothing(tmp_path: Path) -> None:
    """Pytest that broke before its first test left no report."""
    assert gates.counts(tmp_path / "none.xml") == (0, 0, 0)


def test_makefile_has_its_targets_and_ci_calls_make_test() -> None:
    """The doors people and machines use."""
    text = (ROOT / "Makefile").read_text()
    for target in ("setup", "up", "down", "test", "bench", "lint", "clean", "lock"):
        assert re.search(rf"^{target}:", text, re.MULTILINE), target
    ci = ROOT / ".ci" / "run"
    assert "make test" in ci.read_text()
    assert os.access(ci, os.X_OK)
