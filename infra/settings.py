"""Every setting of the platform: environment and TOML file in, one frozen dataclass per component out.

Order, first found wins: command line, ``MARKETSTREAM_*`` variables, TOML file (``MARKETSTREAM_CONFIG`` or ``marketstream.toml`` in the
working directory), default. A field is one line below; its variable is ``MARKETSTREAM_<SECTION>_<FIELD>`` unless ``env=`` names another,
its TOML key ``<field>`` in table ``[<section>]``. Components get their own section, never the whole.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from infra.errors import SettingsError
from infra.options import PREFIX, Option, declared, option, resolve
from schemas.timeframes import TIMEFRAME_SECONDS, TIMEFRAMES

DEFAULT_FILE = "marketstream.toml"
MASK = "***"


def _name_check(value: str) -> str | None:
    plain = all(char.isalnum() or char in "._-" for char in value) and value.isascii() and len(value) <= 100
    return None if plain else "at most 100 of a-z A-Z 0-9 . _ -"


def _identifier_check(value: str) -> str | None:
    return None if value.isidentifier() and value.isascii() and len(value) <= 63 else "a plain name (letters, digits, _)"


def _timeframe_check(value: str) -> str | None:
    return None if value in TIMEFRAME_SECONDS else f"any of {', '.join(TIMEFRAMES)}"


def _url_check(value: str) -> str | None:
    return None if value == "" or value.startswith(("http://", "https://", "ws://", "wss://")) else "a URL with its scheme (http://...)"


def _dsn_check(value: str) -> str | None:
    return None if value.startswith(("postgresql://", "postgres://")) else "a DSN (postgresql://user:password@host:port/database)"


@dataclass(frozen=True, kw_only=True)
class PortSettings:
    """TCP ports on this machine; all move together with ``base``, so one variable separates two stacks."""

    base: int = option(19000, "first port of the range of 1000 the stack uses", low=1024, high=64500, env="MARKETSTREAM_PORT_BASE")
    kafka: int = option(0, "broker", port=True, env="MARKETSTREAM_PORT_KAFKA", derive=lambda v: v["ports.base"] + 92)
    controller: int = option(0, "KRaft controller", port=True, env="MARKETSTREAM_PORT_CONTROLLER", derive=lambda v: v["ports.base"] + 93)
    clickhouse: int = option(0, "ClickHouse HTTP", port=True, env="MARKETSTREAM_PORT_CLICKHOUSE", derive=lambda v: v["ports.base"] + 123)
    postgres: int = option(0, "PostgreSQL", port=True, env="MARKETSTREAM_PORT_POSTGRES", derive=lambda v: v["ports.base"] + 132)
    registry: int = option(0, "schema registry", port=True, env="MARKETSTREAM_PORT_REGISTRY", derive=lambda v: v["ports.base"] + 81)
    api: int = option(0, "REST and WebSocket", port=True, env="MARKETSTREAM_PORT_API", derive=lambda v: v["ports.base"] + 80)
    collector: int = option(0, "collector health", port=True, env="MARKETSTREAM_PORT_COLLECTOR", derive=lambda v: v["ports.base"] + 82)
    worker: int = option(
        0, "worker health (first worker)", port=True, env="MARKETSTREAM_PORT_WORKER", derive=lambda v: v["ports.base"] + 200
    )
    sink: int = option(0, "sink health", port=True, env="MARKETSTREAM_PORT_SINK", derive=lambda v: v["ports.base"] + 84)
    repair: int = option(0, "repair health", port=True, env="MARKETSTREAM_PORT_REPAIR", derive=lambda v: v["ports.base"] + 86)
    sim: int = option(0, "simulated exchange", port=True, env="MARKETSTREAM_PORT_SIM", derive=lambda v: v["ports.base"] + 85)


@dataclass(frozen=True, kw_only=True)
class KafkaSettings:
    """Where the broker is and how topics are made."""

    bootstrap: str = option("", "host:port[,host:port]; default: the local broker", derive=lambda v: f"127.0.0.1:{v['ports.kafka']}")
    topic_prefix: str = option(
        "", "put before every topic name; separates tenants and tests", env="MARKETSTREAM_TOPIC_PREFIX", check=_name_check
    )
    partitions: int = option(4, "partitions of every topic: the unit of scale; fixed once topics exist", low=1, high=1024)
    replication: int = option(1, "copies of each partition; 1 on a laptop, 3 on a cluster", low=1, high=15)
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = option("PLAINTEXT", "as the server asks")
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = option("PLAIN", "used with SASL_*")
    sasl_username: str = option("", "used with SASL_*")
    sasl_password: str = option("", "used with SASL_*", secret=True)
    ssl_ca_file: str = option("", "CA certificates (PEM); empty: the system's")
    heap_mb: int = option(384, "Java heap of the local broker, MB; 384 carries 16 MB messages at 1 M trades/s", low=192, high=65536)
    second_port: int = option(
        0, "port on which the local broker listens besides, for clients that reach it by another address; 0: none", low=0, high=65535
    )
    second_address: str = option(
        "", "host:port that clients of the second port are sent to, e.g. a proxy's or a container's way here; empty: the port itself"
    )
    retention_mb: int = option(1024, "kept per partition of the local broker, MB, unless a topic says otherwise", low=64)
    retention_hours: int = option(168, "kept per partition of the local broker, hours, unless a topic says otherwise", low=1)

    def client_config(self) -> dict[str, str]:
        """The connection part of a librdkafka (confluent-kafka) configuration."""
        config = {"bootstrap.servers": self.bootstrap}
        if self.security_protocol != "PLAINTEXT":
            config["security.protocol"] = self.security_protocol
            if self.ssl_ca_file:
                config["ssl.ca.location"] = self.ssl_ca_file
        if self.security_protocol.startswith("SASL"):
            config |= {
                "sasl.mechanism": self.sasl_mechanism,
                "sasl.username": self.sasl_username,
                "sasl.password": self.sasl_password,
            }
        return config


@dataclass(frozen=True, kw_only=True)
class ClickHouseSettings:
    """Where history is stored."""

    url: str = option("", "HTTP interface; default: the local one", derive=lambda v: _local(v, "clickhouse"), check=_url_check)
    user: str = option("default", "user name")
    password: str = option("", "password; empty on loopback", secret=True)
    database: str = option("marketstream", "database that holds our tables", check=_identifier_check)
    trades_ttl_days: int = option(0, "days trades are kept, by their time; 0: for ever, so that old recordings stay", low=0, high=36500)
    bars_ttl_days: int = option(0, "days bars are kept, by their time; 0: for ever", low=0, high=36500)
    memory_mb: int = option(1024, "memory one local engine may use for queries, MB; more is refused, not swapped", low=128)
    max_body_mb: int = option(
        64, "largest request body the local server takes, MB; above it 413; our largest insert is 20 MB", low=1, high=4096
    )
    threads: int = option(2, "threads one query uses on the local engine; two cores are the smallest machine", low=1, high=256)


@dataclass(frozen=True, kw_only=True)
class PostgresSettings:
    """Where what people edit is stored."""

    database: str = option("marketstream", "database of the local server", check=_identifier_check)
    password: str = option("marketstream", "password of the local server, which listens on loopback only", secret=True)
    dsn: str = option("", "how to connect; default: the local server", secret=True, check=_dsn_check, derive=lambda v: _local_dsn(v))


@dataclass(frozen=True, kw_only=True)
class RegistrySettings:
    """Where schemas are registered."""

    url: str = option("", "Confluent-compatible registry; default: the local one", derive=lambda v: _local(v, "registry"), check=_url_check)
    topic: str = option(
        "_schemas", "compacted topic the local registry keeps its schemas in (the prefix goes before it)", check=_name_check
    )
    compatibility: Literal["NONE", "BACKWARD", "BACKWARD_TRANSITIVE", "FORWARD", "FORWARD_TRANSITIVE", "FULL", "FULL_TRANSITIVE"] = option(
        "BACKWARD", "what a new version must keep; BACKWARD: new readers read old records"
    )


@dataclass(frozen=True, kw_only=True)
class ApiSettings:
    """The REST and WebSocket server."""

    host: str = option("127.0.0.1", "address to listen on; loopback unless you mean to publish it")
    port: int = option(0, "port to listen on", port=True, same_as="ports.api")


@dataclass(frozen=True, kw_only=True)
class CollectorSettings:
    """What is collected and how it is put into frames."""

    exchange: str = option("binance", "venue collected by `up`", check=_name_check)
    symbols: tuple[str, ...] = option((), "canonical symbols, comma separated; empty: the enabled ones in PostgreSQL")
    linger_ms: int = option(
        10, "longest a trade waits for its frame, ms; 5..20 keeps latency small and frames worth their cost", low=1, high=1000
    )
    max_frame_rows: int = option(4096, "rows of one frame at most; 4,096 trades are 230 kB", low=1, high=100_000)
    spool_max_mb: int = option(
        2048,
        "disk the spool may take while the broker is away, MB; an hour of 10,000 trades/s. Full: reading stops",
        low=1,
        high=1_000_000,
    )
    rest_url: str = option("", "REST address; empty: the venue's own", check=_url_check)
    ws_url: str = option("", "WebSocket address; empty: the venue's own", check=_url_check)
    health_port: int = option(0, "port of /livez, /readyz, /metrics", port=True, same_as="ports.collector")


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """The Faust worker that makes bars."""

    count: int = option(1, "worker processes; partitions are shared between them", low=1, high=64)
    snapshot_interval_s: float = option(1.0, "seconds between state snapshots; bounds what is replayed after a crash", low=0.05, high=60)
    timeframes: tuple[str, ...] = option(TIMEFRAMES, "timeframes of the bars it makes, comma separated", check=_timeframe_check)
    live_update_ms: int = option(250, "milliseconds between updates of an open bar", low=10, high=60_000)
    session_timeout_s: float = option(10.0, "seconds after which the broker gives a dead worker's partitions away", low=6, high=300)
    health_port: int = option(
        0, "port of /livez, /readyz, /metrics; worker i listens on health_port + i", port=True, same_as="ports.worker"
    )


@dataclass(frozen=True, kw_only=True)
class SinkSettings:
    """The writer from topics into ClickHouse."""

    flush_interval_ms: int = option(200, "longest a row waits before it is written, ms", low=1, high=60_000)
    max_rows: int = option(200_000, "rows of one insert at most; bounds memory", low=1, high=5_000_000)
    health_port: int = option(0, "port of /livez, /readyz, /metrics", port=True, same_as="ports.sink")


@dataclass(frozen=True, kw_only=True)
class WatchdogSettings:
    """When a process that runs is started anew."""

    stuck_s: float = option(60.0, "seconds without progress while work waits and nobody else is in the way; a compile takes 30", low=1)
    silent_s: float = option(
        10.0, "seconds without any answer of a process of ours; one that ends after SIGTERM may be silent for 5", low=6
    )
    server_silent_s: float = option(60.0, "seconds without any answer of a local server: broker, stores, registry", low=1)


@dataclass(frozen=True, kw_only=True)
class RepairSettings:
    """The process that makes bars of the past anew."""

    page_rows: int = option(200_000, "trades it reads at once, about; 200,000 are 10 MB", low=1_000, high=10_000_000)
    health_port: int = option(0, "port of /livez, /readyz, /metrics", port=True, same_as="ports.repair")


@dataclass(frozen=True, kw_only=True)
class SimSettings:
    """The simulated exchange."""

    seed: int = option(1, "same seed, same market", low=0)
    symbols: int = option(200, "how many symbols trade", low=1, high=10_000)
    trades_per_s: int = option(1000, "mean rate over all symbols", low=0, high=1_000_000)
    port: int = option(0, "port of its REST and WebSocket server", port=True, same_as="ports.sim")


def _local(values: Mapping[str, Any], name: str) -> str:
    return f"http://127.0.0.1:{values['ports.' + name]}"


def _local_dsn(values: Mapping[str, Any]) -> str:
    return f"postgresql://postgres:{values['postgres.password']}@127.0.0.1:{values['ports.postgres']}/{values['postgres.database']}"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of one stack. Build it with :func:`load_settings`."""

    data_dir: Path = option(None, "folder of everything that is kept and of logs", derive=lambda _: Path(".data").absolute())
    source: Literal["auto", "live", "sim", "none"] = option("auto", "where trades come from; auto: the venue where it answers, else sim")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = option("INFO", "least severity that is logged")
    log_json: bool = option(False, "log one JSON object a line instead of text")
    ports: PortSettings
    kafka: KafkaSettings
    clickhouse: ClickHouseSettings
    postgres: PostgresSettings
    registry: RegistrySettings
    api: ApiSettings
    collector: CollectorSettings
    worker: WorkerSettings
    sink: SinkSettings
    repair: RepairSettings
    watchdog: WatchdogSettings
    sim: SimSettings
    origin: Mapping[str, str] = field(repr=False, default_factory=dict)
    """Dotted key -> ``default | file:NAME | env:NAME | command line``."""

    def values(self) -> dict[str, Any]:
        """Every value by dotted key, secrets in clear."""
        return {item.key: self._get(item.key) for item in options()}

    def shown(self) -> list[tuple[str, str, str]]:
        """``(dotted key, value as text with secrets masked, where it came from)`` for every setting, in declaration order."""
        rows = []
        for item in options():
            value = self._get(item.key)
            rows.append((item.key, _masked(_text(value)) if item.secret else _text(value), self.origin.get(item.key, "default")))
        return rows

    def as_environ(self) -> dict[str, str]:
        """Variables that give a child process exactly these settings, whatever folder or file it starts in."""
        environ = {item.env: _text(self._get(item.key)) for item in options() if item.same_as is None}
        return environ | {PREFIX + "CONFIG": ""}

    def _get(self, key: str) -> Any:
        target: Any = self
        for part in key.split("."):
            target = getattr(target, part)
        return target


def _masked(text: str) -> str:
    """A secret for people's eyes: of a DSN the password is hidden and the address shown."""
    dsn = re.fullmatch(r"(\w+://[^:@/]*):[^@]*(@[^@]*)", text)
    if dsn is not None:
        return f"{dsn.group(1)}:{MASK}{dsn.group(2)}"
    return MASK if text else ""


def options() -> list[Option]:
    """Every setting there is, in declaration order."""
    return declared(Settings)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return ",".join(value) if isinstance(value, tuple) else str(value)


def load_settings(
    environ: Mapping[str, str] = os.environ, file: Path | None = None, overrides: Mapping[str, str] | None = None
) -> Settings:
    """The settings of this process.

    Args:
        environ: variables; those that do not begin with ``MARKETSTREAM_`` are ignored.
        file: TOML file; None: ``MARKETSTREAM_CONFIG`` (empty: no file), else ``marketstream.toml`` in the working directory if it is there.
        overrides: values from the command line by dotted key, as text; they win.

    Raises:
        SettingsError: an unknown name (with the nearest known one) or a value that is not allowed.
    """
    path = _file_of(environ, file)
    table = _read_table(path) if path is not None else {}
    values, origin = resolve(options(), environ, table, path.name if path is not None else "", overrides or {})
    top: dict[str, Any] = {key: value for key, value in values.items() if "." not in key}
    for name, kind in _sections().items():
        top[name] = kind(**{key.partition(".")[2]: value for key, value in values.items() if key.startswith(name + ".")})
    return Settings(**top, origin=origin)


def _sections() -> dict[str, type]:
    return {item.name: globals()[str(item.type)] for item in fields(Settings) if is_dataclass(globals().get(str(item.type)))}


def _file_of(environ: Mapping[str, str], file: Path | None) -> Path | None:
    if file is not None:
        return file
    named = environ.get(PREFIX + "CONFIG")
    if named is not None:
        return Path(named) if named else None
    default = Path(DEFAULT_FILE)
    return default if default.is_file() else None


def _read_table(path: Path) -> dict[str, Any]:
    """The file's values by dotted key."""
    try:
        with path.open("rb") as stream:
            parsed = tomllib.load(stream)
    except OSError as exc:
        raise SettingsError(f"cannot read the settings file {path}: {exc.strerror}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise SettingsError(f"the settings file {path} is not TOML: {exc}") from exc
    table: dict[str, Any] = {}
    for name, value in parsed.items():
        if isinstance(value, dict):
            table |= {f"{name}.{key}": entry for key, entry in value.items()}
        else:
            table[name] = value
    return table
