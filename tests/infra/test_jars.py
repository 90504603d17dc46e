"""The locked jars: what is downloaded is what was locked, and nothing is asked for twice."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import requests

from infra.errors import IntegrityError, NetworkError
from infra.stack import fetch as setup
from infra.stack import jars


def test_the_committed_lock_is_complete_and_names_no_server() -> None:
    """Coordinates, sizes and checksums only."""
    locked = jars.read_lock()
    assert len(locked) > 30 and len({jar.coordinate for jar in locked}) == len(locked)
    assert all(len(jar.sha256) == 64 and jar.size > 0 for jar in locked)
    assert jars.kafka_version(locked).startswith("4.") and "://" not in jars.LOCK_FILE.read_text()


def _jar(content: bytes, sha256: str | None = None) -> jars.Jar:
    digest = sha256 or hashlib.sha256(content).hexdigest()
    return jars.Jar(group="a.b", artifact="c", version="1", classifier="", size=len(content), sha256=digest)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Downloads are served from memory; returns the list of what was asked for."""
    asked: list[str] = []

    def download(jar: jars.Jar, repository: Path) -> None:
        asked.append(jar.coordinate)
        jar.path(repository).parent.mkdir(parents=True)
        jar.path(repository).write_bytes(b"content")

    monkeypatch.setattr(jars, "_download", download)
    return asked


def test_a_jar_is_fetched_once_and_again_when_it_was_cut_short(tmp_path: Path, served: list[str]) -> None:
    """Set-up is idempotent."""
    jar = _jar(b"content")
    assert (jars.fetch([jar], tmp_path), jars.fetch([jar], tmp_path), served) == (1, 0, ["a.b:c:1"])
    jar.path(tmp_path).write_bytes(b"con")
    assert jars.fetch([jar], tmp_path) == 1 and jar.path(tmp_path).read_bytes() == b"content"


def test_a_jar_with_another_checksum_never_reaches_the_class_path(tmp_path: Path, served: list[str]) -> None:
    """Exit code 11, and nothing is kept."""
    jar = _jar(b"content", "0" * 64)
    with pytest.raises(IntegrityError, match="a.b:c:1 has SHA-256") as caught:
        jars.fetch([jar], tmp_path)
    assert caught.value.exit_code == 11 and not list(tmp_path.rglob("*.jar"))


def test_without_network_the_set_up_says_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence, exit code 8."""

    def refuse(*_: object, **__: object) -> None:
        raise requests.ConnectionError("no route to host")

    monkeypatch.setattr(requests, "request", refuse)
    assert setup.main(["--cache", str(tmp_path)]) == 8
    said = capsys.readouterr().err
    assert "the first set-up needs the network" in said and said.count("\n") == 1
    with pytest.raises(NetworkError):
        jars.fetch(jars.read_lock()[:1], tmp_path)


@pytest.mark.parametrize("line", ["a:b:1 10", "a:b 10 00", "a:b:1 ten 00"])
def test_a_broken_lock_is_a_sentence(tmp_path: Path, line: str) -> None:
    """The line is shown."""
    (tmp_path / "lock").write_text(line + "\n")
    with pytest.raises(IntegrityError, match="broken line"):
        jars.read_lock(tmp_path / "lock")
