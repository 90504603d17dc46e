"""Kafka's jars: the committed lock in, verified files under the checkout's cache folder out.

The lock (``kafka-jars.lock``) names each jar by its Maven coordinate, size and SHA-256, and no server: ``jgo``'s pure-Python resolver
knows where Maven artifacts live. Nothing is used before its checksum is right, whatever served it.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import ssl
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from infra.errors import DataDirBrokenError, IntegrityError, NetworkError

logger = logging.getLogger(__name__)

LOCK_FILE = Path(__file__).with_name("kafka-jars.lock")
CACHE_DIR = Path(__file__).resolve().parents[2] / ".cache" / "kafka"
STAGING = ".staging"
DOWNLOADS_AT_ONCE = 8  # 44 jars, 45 MB: eight at a time take 2 s where one at a time takes 8
Progress = Callable[[str, int, int], None]
"""Called with (what, done, total)."""


@dataclass(frozen=True, kw_only=True)
class Jar:
    """One locked jar. ``size`` in bytes, ``sha256`` in hex."""

    group: str
    artifact: str
    version: str
    classifier: str
    size: int
    sha256: str

    @property
    def coordinate(self) -> str:
        """``group:artifact:version[:classifier]``."""
        return ":".join(part for part in (self.group, self.artifact, self.version, self.classifier) if part)

    def path(self, cache: Path) -> Path:
        """Where the jar lies in a Maven repository layout below ``cache``."""
        name = f"{self.artifact}-{self.version}{'-' + self.classifier if self.classifier else ''}.jar"
        return cache.joinpath(*self.group.split("."), self.artifact, self.version, name)

    def line(self) -> str:
        """The jar as a line of the lock."""
        return f"{self.coordinate} {self.size} {self.sha256}"


def read_lock(file: Path = LOCK_FILE) -> list[Jar]:
    """The locked jars in class path order.

    Raises:
        IntegrityError: the lock is missing or a line is not ``coordinate size sha256``.
    """
    try:
        lines = file.read_text().splitlines()
    except OSError as exc:
        raise IntegrityError(f"cannot read the jar lock {file}: {exc.strerror}; restore it from version control") from exc
    jars = []
    for line in lines:
        if not line or line.startswith("#"):
            continue
        try:
            coordinate, size, sha256 = line.split()
            group, artifact, version, *classifier = coordinate.split(":")
            jars.append(Jar(group=group, artifact=artifact, version=version, classifier="".join(classifier), size=int(size), sha256=sha256))
        except ValueError as exc:
            raise IntegrityError(f"the jar lock {file.name} has a broken line: {line[:80]!r}; restore it from version control") from exc
    return jars


def kafka_version(jars: list[Jar]) -> str:
    """The locked Kafka version."""
    return next(jar.version for jar in jars if jar.artifact.startswith("kafka_"))


def fingerprint(jars: list[Jar]) -> str:
    """Eight hex digits that stand for these jars in this order."""
    return hashlib.sha256("".join(jar.line() for jar in jars).encode()).hexdigest()[:8]


def class_path(jars: list[Jar], cache: Path = CACHE_DIR) -> str:
    """The Java class path of the locked jars."""
    return os.pathsep.join(str(jar.path(cache)) for jar in jars)


def missing(jars: list[Jar], cache: Path = CACHE_DIR) -> list[Jar]:
    """The jars that are absent or have the wrong size. Cheap (44 stats): the checksum was verified when the file was put there."""
    return [jar for jar in jars if not _has_size(jar.path(cache), jar.size)]


def fetch(jars: list[Jar], cache: Path = CACHE_DIR, progress: Progress | None = None) -> int:
    """Downloads and verifies what is missing; returns how many jars that were.

    Raises:
        NetworkError: a jar cannot be downloaded.
        IntegrityError: a jar's SHA-256 is not the locked one.
    """
    if not missing(jars, cache):
        return 0
    with exclusive(cache):
        wanted = missing(jars, cache)
        done = 0
        with ThreadPoolExecutor(DOWNLOADS_AT_ONCE) as pool:
            for jar in pool.map(lambda jar: _fetch_one(jar, cache), wanted):
                done += 1
                if progress is not None:
                    progress(jar.artifact, done, len(wanted))
        shutil.rmtree(cache / STAGING, ignore_errors=True)
        return len(wanted)


@contextmanager
def exclusive(cache: Path) -> Iterator[None]:
    """Holds the cache's lock, so that two set-ups at once do not write the same file; the system frees it if we die."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        stream = (cache / ".lock").open("w")
    except OSError as exc:
        raise DataDirBrokenError(f"cannot write the download cache {cache}: {exc.strerror}; make the folder writable") from exc
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def trust_system_certificates() -> None:
    """Lets downloads trust what the machine trusts (a company's proxy, say), not only the list that came with the package."""
    store = ssl.get_default_verify_paths().cafile
    if store and not os.environ.get("REQUESTS_CA_BUNDLE") and not os.environ.get("CURL_CA_BUNDLE"):
        os.environ["REQUESTS_CA_BUNDLE"] = store


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _fetch_one(jar: Jar, cache: Path) -> Jar:
    # Downloaded beside the cache and moved in only when verified: an interrupted download never looks like a jar.
    staging = cache / STAGING / jar.artifact
    source = jar.path(staging)
    shutil.rmtree(staging, ignore_errors=True)  # what an interrupted run left
    _download(jar, staging)
    actual = sha256_of(source)
    if actual != jar.sha256:
        source.unlink()
        raise IntegrityError(f"the downloaded {jar.coordinate} has SHA-256 {actual}, not the locked {jar.sha256}; it was thrown away")
    target = jar.path(cache)
    target.parent.mkdir(parents=True, exist_ok=True)
    source.replace(target)
    return jar


def _download(jar: Jar, repository: Path) -> None:
    import requests  # here: only the first set-up downloads, and importing takes 60 ms
    from jgo.maven import MavenContext

    trust_system_certificates()
    component = MavenContext(repo_cache=repository, timeout=30).project(jar.group, jar.artifact).at_version(jar.version)
    artifact = component.artifact(jar.classifier) if jar.classifier else component.artifact()
    try:
        artifact.resolve()
    except (requests.RequestException, OSError, RuntimeError) as exc:
        logger.debug("download of %s failed", jar.coordinate, exc_info=exc)
        raise NetworkError(
            f"cannot download {jar.coordinate} ({type(exc).__name__}); the first set-up needs the network: "
            "connect this machine and repeat, or copy the folder .cache from a machine that has it"
        ) from exc


def relock(version: str, file: Path = LOCK_FILE, cache: Path = CACHE_DIR) -> list[Jar]:
    """Resolves a Kafka version anew and writes the lock. For maintainers; needs the network."""
    from jgo.maven import MavenContext

    trust_system_certificates()
    context = MavenContext(repo_cache=cache / ".resolve", timeout=30)
    inputs, transitive = context.resolver.resolve([context.create_dependency(f"org.apache.kafka:kafka_2.13:{version}")])
    jars, wanted = [], [*inputs, *transitive]
    for dependency in wanted:
        artifact = dependency.artifact
        if dependency.scope in ("test", "provided", "system"):
            continue
        try:
            path = artifact.resolve()
        except RuntimeError:
            logger.warning("%s has no jar; left out", artifact)  # kafka-tools-api 4.4.0 is named but not published; the broker needs none
            continue
        jars.append(
            Jar(
                group=artifact.groupId,
                artifact=artifact.artifactId,
                version=artifact.version,
                classifier=artifact.classifier or "",
                size=path.stat().st_size,
                sha256=sha256_of(path),
            )
        )
        if artifact.artifactId == "slf4j-api":  # without a binding the broker logs nothing: not a full disk, not a damaged segment
            wanted.append(context.create_dependency(f"org.slf4j:slf4j-simple:{artifact.version}"))
    head = "# Kafka's jars in class path order: coordinate, bytes, SHA-256. Written by `python -m infra.stack.fetch --relock VERSION`.\n"
    file.write_text(head + "".join(jar.line() + "\n" for jar in jars))
    return jars
