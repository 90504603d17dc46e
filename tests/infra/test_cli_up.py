"""What `up` decides before anything is started: the source, the processes, their order and what each is told."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from infra import provisioned
from infra.cli.processes import SERVERS, source_overrides, specs
from infra.cli.up import decide, keep_source, kept_source, probe_live
from infra.errors import SettingsError
from infra.settings import Settings, load_settings


def settings(**values: str) -> Settings:
    """Settings with these on the command line; ``__`` stands for a dot."""
    return load_settings({}, overrides={key.replace("__", "."): text for key, text in values.items()})


def test_auto_takes_the_live_venue_where_it_answers_and_says_so() -> None:
    """The reason names the venue."""
    found = decide(settings(source="auto"), lambda _: None)
    assert (found.choice, found.why) == ("live", "binance answers")


def test_auto_takes_the_simulated_exchange_otherwise_and_says_so() -> None:
    """Nobody must take simulated prices for real ones."""
    found = decide(settings(source="auto"), lambda _: "timed out")
    assert found.choice == "sim"
    assert "binance does not answer here (timed out)" in found.why
    assert "not a real market" in found.why


@pytest.mark.parametrize("source", ["live", "sim", "none"])
def test_a_source_that_was_asked_for_is_not_probed(source: str) -> None:
    """Only auto looks at the network."""
    assert decide(settings(source=source), lambda _: pytest.fail("probed")).choice == source


@pytest.mark.parametrize(("kept", "asked"), [("live", "sim"), ("sim", "live")])
def test_trades_of_a_simulated_exchange_never_stand_between_real_ones(kept: str, asked: str) -> None:
    """Both are called binance: a folder keeps to the one it began with, and says so."""
    with pytest.raises(SettingsError, match="would stand between them: choose another folder with --data-dir"):
        decide(settings(source=asked), lambda _: None, kept)
    assert decide(settings(source=kept), lambda _: None, kept).choice == kept


@pytest.mark.parametrize("trouble", [None, "timed out"])
@pytest.mark.parametrize("kept", ["live", "sim"])
def test_auto_goes_on_with_the_source_a_folder_began_with(kept: str, trouble: str | None) -> None:
    """Whether the venue answers today or not."""
    assert decide(settings(source="auto"), lambda _: trouble, kept).choice == kept


def test_a_folder_knows_whose_trades_it_holds(tmp_path: Path) -> None:
    """By topic prefix and venue; the first source that collected stays, and no collector changes nothing."""
    given = settings(data_dir=str(tmp_path))
    assert kept_source(given) is None
    keep_source(given, "none")
    assert kept_source(given) is None
    keep_source(given, "sim")
    assert kept_source(given) == "sim"
    other = settings(data_dir=str(tmp_path), kafka__topic_prefix="tenant1.")
    keep_source(other, "live")
    assert (kept_source(given), kept_source(other)) == ("sim", "live")
    (tmp_path / "SOURCES").write_text("damaged")
    assert kept_source(given) is None


def test_probe_says_why_a_venue_is_not_there() -> None:
    """No connection, an error status and a venue without a collector are told apart."""
    assert probe_live(settings(collector__rest_url="http://127.0.0.1:9")) == "no connection"
    assert probe_live(settings(collector__exchange="yahoo")) == "it has no live collector"


class Ping(BaseHTTPRequestHandler):
    """A venue that refuses this address, as Binance does with 451 in some countries."""

    def do_GET(self) -> None:
        """Answer the ping."""
        self.send_response(451)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def test_probe_of_a_venue_that_refuses_us() -> None:
    """An answer that is no success is no venue for us."""
    with HTTPServer(("127.0.0.1", 0), Ping) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        assert probe_live(settings(collector__rest_url=f"http://127.0.0.1:{server.server_port}")) == "HTTP 451"
        server.shutdown()


def test_no_source_starts_no_collector() -> None:
    """`--source none` is for replays."""
    assert [spec.name for spec in specs(settings(), "none")] == ["worker-0", "sink", "repair", "api"]


def test_simulated_source_starts_the_exchange_and_points_the_collector_at_it() -> None:
    """The collector runs unchanged: only its addresses differ."""
    given = settings(worker__count="2")
    found = {spec.name: spec for spec in specs(given, "sim")}
    assert list(found) == ["worker-0", "worker-1", "sink", "repair", "api", "collector", "sim"]
    assert "sim" in found["collector"].after
    pointed = source_overrides(given, "sim")
    assert pointed["collector.rest_url"] == f"http://127.0.0.1:{given.ports.sim}"
    assert load_settings({}, overrides=pointed).collector.ws_url == f"ws://127.0.0.1:{given.ports.sim}"


@pytest.mark.parametrize("choice", ["live", "sim", "none"])
def test_everything_waits_for_the_servers_and_is_ready_by_its_own_word(choice: str) -> None:
    """Each process of ours starts after the servers and counts as ready when its /readyz says so."""
    for spec in specs(settings(), choice):  # type: ignore[arg-type]
        if spec.name != "sim":
            assert set(SERVERS) <= set(spec.after)
            assert spec.ready.endswith("/readyz")
        assert spec.ports
        json.dumps(spec.as_json())


def test_ports_of_processes_do_not_collide() -> None:
    """Every port is listened on by one process."""
    ports = [port for spec in specs(settings(worker__count="4"), "sim") for port in spec.ports.values()]
    assert len(ports) == len(set(ports))


def test_published_api_is_probed_on_loopback() -> None:
    """0.0.0.0 is an address to listen on, not one to ask."""
    api = next(spec for spec in specs(settings(api__host="0.0.0.0"), "none") if spec.name == "api")
    assert api.ready.startswith("http://127.0.0.1:")


def test_servers_are_provisioned_once_a_supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that start together provision once; a new supervisor looks again; a failure is not remembered as done."""
    import infra.provision

    calls: list[str] = []
    given = settings(data_dir=str(tmp_path))
    monkeypatch.setattr(infra.provision, "provision", lambda _: calls.append("done"))
    threads = [threading.Thread(target=provisioned.ensure_provisioned, args=(given, (10, 20))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert provisioned.ensure_provisioned(given, (11, 21))
    assert len(calls) == 2

    def fail(_: Settings) -> None:
        raise RuntimeError

    monkeypatch.setattr(infra.provision, "provision", fail)
    with pytest.raises(RuntimeError):
        provisioned.ensure_provisioned(given, (12, 22))
    monkeypatch.setattr(infra.provision, "provision", lambda _: calls.append("again"))
    assert provisioned.ensure_provisioned(given, (12, 22))
