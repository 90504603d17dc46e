"""Which stack a command means, and what happens when two stacks want the same ports."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from infra.cli import context, ports
from infra.cli.context import NOTE, read_note, settings_of, write_note
from infra.errors import PortInUseError
from infra.settings import load_settings

NONE: dict[str, str] = {}


@pytest.fixture(autouse=True)
def own_pointer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pointer to the last started stack lies in the test's folder, and the working directory has no data."""
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(context, "POINTER", tmp_path / "cache" / "current-stack")
    monkeypatch.chdir(tmp_path)
    for name in list(context.os.environ):
        if name.startswith("MARKETSTREAM_"):
            monkeypatch.delenv(name)


def started(folder: Path, **settings: str) -> None:
    """A stack started on ``folder`` with these settings."""
    write_note(load_settings(NONE, overrides={"data_dir": str(folder), **{key.replace("__", "."): text for key, text in settings.items()}}))


def test_later_commands_speak_to_the_stack_as_it_was_started(tmp_path: Path) -> None:
    """Ports and prefix given to `up` need not be repeated; their origin says where they come from."""
    started(tmp_path / "a", ports__base="31000", kafka__topic_prefix="mine.")
    settings = settings_of(tmp_path / "a", environ=NONE)
    assert (settings.ports.kafka, settings.kafka.topic_prefix) == (31092, "mine.")
    assert settings.origin["ports.base"] == "file:" + NOTE


def test_environment_wins_over_what_up_was_given(tmp_path: Path) -> None:
    """The note only fills in what nobody says now."""
    started(tmp_path / "a", ports__base="31000")
    assert settings_of(tmp_path / "a", environ={"MARKETSTREAM_PORT_BASE": "32000"}).ports.kafka == 32092


def test_without_data_dir_the_stack_last_started_is_meant(tmp_path: Path) -> None:
    """`up --data-dir DIR` and then plain `status`, `replay`, `export` belong together."""
    started(tmp_path / "a", ports__base="31000")
    assert settings_of(None, environ=NONE).data_dir == tmp_path / "a"
    assert settings_of(None, environ=NONE).ports.base == 31000


def test_default_folder_is_meant_when_it_was_used(tmp_path: Path) -> None:
    """A stack on the default folder is found even when another was started later."""
    started(tmp_path / ".data")
    started(tmp_path / "b")
    assert settings_of(None, environ=NONE).data_dir == tmp_path / ".data"


def test_note_holds_no_secret(tmp_path: Path) -> None:
    """Passwords and addresses with passwords are not written to the folder."""
    started(tmp_path / "a", clickhouse__password="hunter2", postgres__dsn="postgresql://u:hunter2@h:1/d")
    assert "hunter2" not in (tmp_path / "a" / NOTE).read_text()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"settings": 3}', '{"settings": {"no.such": "1"}}', "\x00"])
def test_damaged_note_is_ignored(tmp_path: Path, text: str) -> None:
    """A note is a convenience: a broken one changes nothing."""
    (tmp_path / "a" / "run").mkdir(parents=True)
    (tmp_path / "a" / NOTE).write_text(text)
    assert read_note(tmp_path / "a") == {}
    assert settings_of(tmp_path / "a", environ=NONE).ports.base == 19000


def test_second_stack_moves_aside_when_the_first_has_the_ports(tmp_path: Path) -> None:
    """Two data folders are enough to run two stacks; the second says which ports it takes."""
    overrides = {"data_dir": str(tmp_path / "b")}

    def holders(asked: Iterable[int]) -> dict[int, Path | None]:
        return {port: tmp_path / "a" for port in asked if port < 20000}

    aside, told = ports.free_ports(load_settings(NONE, overrides=overrides), overrides, holders)
    assert aside == {"ports.base": "20000"}
    assert told is not None
    assert "MARKETSTREAM_PORT_BASE=20000" in told


def test_port_of_another_program_stays_an_error_of_the_start(tmp_path: Path) -> None:
    """Ports are not moved away from a program that is none of ours: somebody has to decide."""
    overrides = {"data_dir": str(tmp_path / "b")}
    assert ports.free_ports(load_settings(NONE, overrides=overrides), overrides, lambda asked: {19092: None}) == ({}, None)


@pytest.mark.parametrize("given", [{}, {"ports.base": "33000"}, {"ports.kafka": "33001"}])
def test_ports_that_were_set_or_belong_to_the_default_stack_are_not_moved(tmp_path: Path, given: dict[str, str]) -> None:
    """Whoever names a port gets it or an error."""
    overrides = given | ({"data_dir": str(tmp_path / "b")} if given else {})
    settings = load_settings(NONE, overrides=overrides)
    assert ports.free_ports(settings, overrides, lambda asked: dict.fromkeys(asked, tmp_path / "a")) == ({}, None)


def test_moved_stack_keeps_its_ports(tmp_path: Path) -> None:
    """A second `up` on the folder takes the ports of the first when they are free."""
    started(tmp_path / "b", ports__base="41000")
    overrides = {"data_dir": str(tmp_path / "b")}
    assert ports.free_ports(load_settings(NONE, overrides=overrides), overrides, lambda asked: {}) == ({"ports.base": "41000"}, None)


def test_no_free_range_is_one_sentence(tmp_path: Path) -> None:
    """When every range is taken the start is refused."""
    overrides = {"data_dir": str(tmp_path / "b")}
    with pytest.raises(PortInUseError):
        ports.free_ports(load_settings(NONE, overrides=overrides), overrides, lambda asked: dict.fromkeys(asked, tmp_path / "a"))


def test_listening_sees_this_process(tmp_path: Path) -> None:
    """A port that is listened on is reported, a free one is not."""
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        assert ports.listening([port]) == {port: None}
    assert ports.listening([port]) == {}


def test_note_is_json_for_other_programs(tmp_path: Path) -> None:
    """The note is one JSON object of settings."""
    started(tmp_path / "a", ports__base="31000")
    assert json.loads((tmp_path / "a" / NOTE).read_text())["settings"]["ports.base"] == "31000"
