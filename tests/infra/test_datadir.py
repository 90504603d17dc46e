"""The data folder and its ports: each thing that can be wrong is one sentence with its own exit code."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from infra import errors
from infra.stack import datadir


def test_a_new_folder_is_laid_out_and_an_old_one_taken_again(tmp_path: Path) -> None:
    """Claiming twice in turn works; the version stays."""
    for _ in range(2):
        datadir.claim(tmp_path / "data").close()
    assert (tmp_path / "data" / "VERSION").read_text() == "marketstream data layout 1\n"


def test_a_stale_lock_is_no_obstacle(tmp_path: Path) -> None:
    """A lock file with a pid of nobody or of someone else does not hold anything: the kernel's lock does."""
    datadir.claim(tmp_path).close()
    (tmp_path / "run" / "lock").write_text(str(os.getpid()))
    datadir.claim(tmp_path).close()


def test_a_folder_in_use_names_the_process(tmp_path: Path) -> None:
    """Exit code 4."""
    lock = datadir.claim(tmp_path)
    with pytest.raises(errors.DataDirOwnedError, match=f"in use by a running stack .pid {os.getpid()}.*marketstream down") as caught:
        datadir.claim(tmp_path)
    lock.close()
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        ("marketstream data layout 99\n", errors.DataDirVersionError, "layout 99"),
        ("\x00\x00garbage", errors.DataDirBrokenError, "damaged"),
        ("", errors.DataDirBrokenError, "damaged"),
    ],
)
def test_another_version_or_a_damaged_one_is_refused(tmp_path: Path, content: str, kind: type[errors.DataDirError], words: str) -> None:
    """Nothing is touched."""
    (tmp_path / "VERSION").write_text(content)
    with pytest.raises(kind, match=words) as caught:
        datadir.claim(tmp_path)
    assert caught.value.exit_code == 4 and [path.name for path in tmp_path.iterdir()] == ["VERSION"]


def test_a_folder_of_something_else_is_not_taken(tmp_path: Path) -> None:
    """Someone's documents stay what they are."""
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(errors.DataDirBrokenError, match="not a data folder of ours.*thesis.tex"):
        datadir.claim(tmp_path)


def test_a_file_in_place_of_the_folder_is_a_sentence(tmp_path: Path) -> None:
    """Whatever the system says is translated."""
    (tmp_path / "data").write_text("x")
    with pytest.raises(errors.DataDirBrokenError, match="cannot use the data folder"):
        datadir.claim(tmp_path / "data")


def test_too_little_space_is_refused_before_anything_starts(tmp_path: Path) -> None:
    """Exit code 5, and the lock is free again."""
    with pytest.raises(errors.DiskFullError, match="only 12 MB are free.*536 MB are needed") as caught:
        datadir.claim(tmp_path, free=lambda _path: 12_000_000)
    assert caught.value.exit_code == 5
    datadir.claim(tmp_path).close()


def test_a_full_disk_while_writing_is_the_same_error(tmp_path: Path) -> None:
    """ENOSPC from the system."""
    assert isinstance(datadir.translate(OSError(28, "No space left on device"), tmp_path), errors.DiskFullError)


def test_a_used_port_names_port_setting_variable_and_program() -> None:
    """Exit code 3."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(errors.PortInUseError, match=f"port {port} .ports.kafka. is in use by .*MARKETSTREAM_PORT_KAFKA") as caught:
            datadir.check_ports({"ports.kafka": port})
    assert (caught.value.exit_code, caught.value.port) == (3, port)
    datadir.check_ports({"ports.kafka": port})
