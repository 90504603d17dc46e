"""The containers: every service is confined, watched and set by settings that exist."""

import re
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from infra.docker.probe import probe
from infra.settings import load_settings, options
from schemas.codec import MAX_RECORD_BYTES
from tests.infra.yaml_subset import load

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = load((ROOT / "docker-compose.yml").read_text("utf-8"))
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = ("registry", "provision", "collector", "worker", "sink", "repair", "api")


def test_every_part_of_the_platform_is_a_service() -> None:
    """Kafka, ClickHouse, PostgreSQL and each of our processes."""
    assert set(SERVICES) == {"kafka", "clickhouse", "postgres", *OURS}


@pytest.mark.parametrize("name", SERVICES)
def test_service_is_confined(name: str) -> None:
    """Non-root, read-only root with a bounded /tmp, no capabilities, bounded memory, a volume for what it keeps."""
    service = SERVICES[name]
    user = service["user"].split(":")[0]
    assert user.isdigit()
    assert int(user) > 0
    assert service["read_only"] == "true"
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert re.fullmatch(r"\d+[mg]", service["mem_limit"])
    assert all(":size=" in mount for mount in service["tmpfs"]), "every tmpfs says by what it is bounded"
    assert any(mount.startswith("/tmp:") for mount in service["tmpfs"])
    assert service["volumes"]
    for mount in service["volumes"]:
        assert mount.split(":")[0] in COMPOSE["volumes"]


@pytest.mark.parametrize("name", SERVICES)
def test_service_is_watched(name: str) -> None:
    """Each has a health check that is bounded in time."""
    check = SERVICES[name]["healthcheck"]
    assert check["test"][0] == "CMD"
    assert {"interval", "timeout", "retries"} <= set(check)


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_published_on_loopback_only(name: str) -> None:
    """Nothing is open to the network until somebody decides so."""
    for port in SERVICES[name].get("ports", []):
        assert port.startswith("127.0.0.1:")


@pytest.mark.parametrize("name", OURS)
def test_settings_in_the_file_exist(name: str) -> None:
    """Every MARKETSTREAM_ variable is a known setting: a misspelt one would stop the container."""
    known = {item.env for item in options()}
    given = {key for key in SERVICES[name]["environment"] if key.startswith("MARKETSTREAM_")}
    assert given <= known
    assert "MARKETSTREAM_KAFKA_BOOTSTRAP" in given


@pytest.mark.parametrize("name", OURS)
def test_command_is_a_module_of_ours(name: str) -> None:
    """The command names an entry point that is there."""
    module = SERVICES[name]["command"][0]
    assert (ROOT / Path(*module.split("."))).with_suffix(".py").is_file() or (ROOT / Path(*module.split(".")) / "__main__.py").is_file()


@pytest.mark.parametrize("name", OURS)
def test_dependencies_are_services(name: str) -> None:
    """What a service waits for exists, and a condition says what it waits for."""
    for other, rule in SERVICES[name]["depends_on"].items():
        assert other in SERVICES
        assert rule["condition"] in ("service_healthy", "service_completed_successfully")


@pytest.mark.parametrize("name", ["registry", "collector", "worker", "sink", "repair", "api"])
def test_health_check_asks_the_port_that_the_settings_choose(name: str) -> None:
    """The probe goes where the process listens with exactly these variables."""
    given = {key: value for key, value in SERVICES[name]["environment"].items() if "${" not in value}
    settings = load_settings(given)
    port = {
        "registry": settings.ports.registry,
        "collector": settings.collector.health_port,
        "worker": settings.worker.health_port,
        "sink": settings.sink.health_port,
        "repair": settings.repair.health_port,
        "api": settings.api.port,
    }[name]
    assert f"http://127.0.0.1:{port}/" in SERVICES[name]["healthcheck"]["test"][-1]


def test_broker_takes_our_largest_record() -> None:
    """The broker's limit is above the largest record we write."""
    assert int(SERVICES["kafka"]["environment"]["KAFKA_MESSAGE_MAX_BYTES"]) >= MAX_RECORD_BYTES + 64 * 1024


def test_image_runs_without_root_and_holds_only_what_it_needs() -> None:
    """The last USER is not root, packages are installed by hash, and the build context is an allow list."""
    text = (ROOT / "Dockerfile").read_text("utf-8")
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE)[-1] == "10001:10001"
    assert text.count("--require-hashes") == 2
    assert (ROOT / ".dockerignore").read_text().splitlines()[0] == "*"
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE)
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for source in " ".join(copied).split():
        assert any(source == entry or source.startswith(entry + "/") for entry in allowed), source
        assert (ROOT / source).exists(), source


def test_compose_config_is_accepted_by_docker() -> None:
    """`docker compose config` reads the file, where the client is installed."""
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine has no `docker compose`")
    done = subprocess.run([docker, "compose", "config", "--quiet"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Answer(BaseHTTPRequestHandler):
    """Says 200 at /good and 503 with a reason elsewhere."""

    def do_GET(self) -> None:
        """Answer one probe."""
        body = b"fine" if self.path == "/good" else b"kafka is away"
        self.send_response(200 if self.path == "/good" else 503)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def test_probe_tells_healthy_from_unhealthy() -> None:
    """2xx is healthy; any other status, and no answer at all, is not, and the reason is shown."""
    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        assert probe(base + "/good") == (True, "fine")
        assert probe(base + "/bad") == (False, "503 kafka is away")
        server.shutdown()
    good, reason = probe(base + "/good")
    assert not good
    assert "refused" in reason


@pytest.mark.parametrize(
    "text",
    ["a: |\n  b", "a:\n- b", "a: [1\n", "a: 'x", "a b c", " a: 1\nb: 2"],
)
def test_yaml_subset_refuses_what_it_does_not_know(text: str) -> None:
    """The reader of this test never guesses."""
    with pytest.raises(ValueError):
        load(text)
