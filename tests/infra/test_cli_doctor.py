"""The doctor without a stack: each check that fails says what is wrong and what to do, and never breaks."""

import io
import json
import shutil
from pathlib import Path

import pytest

from infra.cli import doctor
from infra.cli.output import Output
from infra.settings import Settings, load_settings
from infra.stack.kafka import free_ports


@pytest.fixture
def nowhere(tmp_path: Path) -> Settings:
    """Settings of a stack that was never started, on ports where nobody listens."""
    names = ("kafka", "controller", "clickhouse", "postgres", "registry", "api", "collector", "worker", "sink", "sim")
    ports = {f"ports.{name}": str(port) for name, port in zip(names, free_ports(len(names)), strict=True)}
    return load_settings({}, overrides={"data_dir": str(tmp_path / "data"), **ports})


def test_every_check_of_a_stack_that_does_not_run_has_a_remedy(nowhere: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that do not answer are failed checks, each with what to do; the machine's own checks are ok."""
    monkeypatch.setattr("infra.cli.doctor_servers._TIMEOUT_S", 0.5)
    monkeypatch.setattr("infra.progress.end_offsets", lambda *_, **__: pytest.fail("the lag is not asked for without a broker"))
    found = {check.name: check for check in doctor.checks(nowhere)}
    assert [name for name in ("python", "disk", "data folder", "ports", "clock") if not found[name].ok] == []
    for name in ("processes", "broker", "topics", "registry", "clickhouse", "postgres", "lag"):
        assert not found[name].ok, found[name]
        assert found[name].remedy, found[name]
    assert "MARKETSTREAM_POSTGRES_DSN" in found["postgres"].remedy
    assert "postgres:marketstream@" not in found["postgres"].detail, "no password is shown"


def test_exit_code_is_0_only_when_all_is_well(nowhere: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts can rely on it; with --json the answer is one object."""
    good = doctor.Check(name="a", ok=True, detail="fine")
    bad = doctor.Check(name="b", ok=False, detail="broken", remedy="mend it")
    monkeypatch.setattr(doctor, "settings_of", lambda _: nowhere)
    monkeypatch.setattr(doctor, "checks", lambda _: iter([good]))
    assert doctor.doctor(Output(as_json=True, out=io.StringIO()), data_dir=None) == 0
    monkeypatch.setattr(doctor, "checks", lambda _: iter([good, bad]))
    out = io.StringIO()
    assert doctor.doctor(Output(as_json=True, out=out), data_dir=None) == 1
    value = json.loads(out.getvalue())
    assert not value["ok"]
    assert value["checks"][1] == {"name": "b", "ok": False, "detail": "broken", "remedy": "mend it"}
    out = io.StringIO()
    doctor.doctor(Output(as_json=False, out=out), data_dir=None)
    assert out.getvalue().splitlines() == ["ok    a: fine", "FAIL  b: broken -> mend it", "1 of 2 checks failed"]


@pytest.mark.parametrize(("version", "ok"), [((3, 10), False), ((3, 11), True), ((3, 13), True), ((3, 14), False)])
def test_python_must_be_one_we_test(nowhere: Settings, version: tuple[int, int], ok: bool) -> None:
    """Neither older nor newer."""
    assert doctor.python(nowhere, version).ok is ok


def test_nearly_full_disk_is_found(nowhere: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the stores stop."""
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=600_000_000))
    found = doctor.disk(nowhere)
    assert not found.ok
    assert "0.6 GB free" in found.detail


def test_clock_that_jumps_is_found(nowhere: Settings) -> None:
    """Wall clock and steady clock must go on by the same."""
    steady = iter([0, 200_000])
    jumped = iter([1_000_000, 1_200_000 + 3_600_000_000, 0, 0])
    found = doctor.clock(nowhere, lambda: next(jumped), lambda: next(steady))
    assert not found.ok
    assert "jumped by +3600000 ms" in found.detail


def test_clock_that_was_set_back_is_found(nowhere: Settings) -> None:
    """What the stack wrote last lies in the future then."""
    (nowhere.data_dir / "run").mkdir(parents=True)
    (nowhere.data_dir / "run" / "state.json").write_text("{}")
    steady, wall = iter([0, 200_000]), iter([1_000_000, 1_200_000, 1_200_000])
    found = doctor.clock(nowhere, lambda: next(wall), lambda: next(steady))
    assert not found.ok
    assert "behind what this stack wrote last" in found.detail


def test_folder_that_is_not_ours_is_found(nowhere: Settings) -> None:
    """A folder with other things in it, or of another layout."""
    nowhere.data_dir.mkdir()
    (nowhere.data_dir / "letters.txt").write_text("dear")
    assert not doctor.data_folder(nowhere).ok
    (nowhere.data_dir / "VERSION").write_text("marketstream data layout 99\n")
    assert "layout 99" in doctor.data_folder(nowhere).detail


def test_a_check_that_breaks_is_a_failed_check(nowhere: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug in one check does not hide the others."""

    def broken(_: Settings) -> doctor.Check:
        raise KeyError("x")

    monkeypatch.setattr(doctor, "jars", broken)
    monkeypatch.setattr("infra.cli.doctor_servers._TIMEOUT_S", 0.5)
    found = {}
    for check in doctor.checks(nowhere):
        found[check.name] = check
        if check.name == "clock":
            break
    assert not found["jars"].ok
    assert "KeyError" in found["jars"].detail
    assert found["ports"].ok
