"""Settings: where values come from, what is refused and how it is said."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from infra.errors import SettingsError
from infra.settings import load_settings, options


def test_without_any_variable_everything_is_on_loopback_from_one_port_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The defaults of the documentation."""
    monkeypatch.chdir(tmp_path)
    settings = load_settings({})
    assert settings.data_dir == tmp_path / ".data"
    assert settings.kafka.bootstrap == "127.0.0.1:19092"
    assert settings.clickhouse.url == "http://127.0.0.1:19123"
    assert settings.postgres.dsn.endswith("@127.0.0.1:19132/marketstream")
    assert (settings.registry.url, settings.api.port) == ("http://127.0.0.1:19081", 19080)
    assert set(settings.origin.values()) == {"default"}


def test_port_base_moves_every_port_and_url() -> None:
    """One variable separates two stacks on one machine."""
    settings = load_settings({"MARKETSTREAM_PORT_BASE": "21000"})
    assert settings.kafka.bootstrap == "127.0.0.1:21092" and settings.api.port == 21080 and settings.worker.health_port == 21200


def test_environment_wins_over_file_wins_over_default(tmp_path: Path) -> None:
    """Each value says where it came from."""
    file = tmp_path / "marketstream.toml"
    file.write_text('source = "sim"\n[kafka]\npartitions = 8\ntopic_prefix = "a."\n[collector]\nsymbols = ["BTC-USDT", "ETH-USDT"]\n')
    settings = load_settings({"MARKETSTREAM_KAFKA_PARTITIONS": "2"}, file, {"source": "none"})
    assert (settings.source, settings.kafka.partitions, settings.kafka.topic_prefix) == ("none", 2, "a.")
    assert settings.collector.symbols == ("BTC-USDT", "ETH-USDT")
    assert settings.origin["kafka.partitions"] == "env:MARKETSTREAM_KAFKA_PARTITIONS"
    assert settings.origin["kafka.topic_prefix"] == "file:marketstream.toml"
    assert settings.origin["source"] == "command line" and settings.origin["log_level"] == "default"


def test_the_file_in_the_working_directory_is_read_unless_config_says_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``MARKETSTREAM_CONFIG`` names another file, or none when empty."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "marketstream.toml").write_text('source = "sim"\n')
    (tmp_path / "other.toml").write_text('source = "live"\n')
    assert load_settings({}).source == "sim"
    assert load_settings({"MARKETSTREAM_CONFIG": ""}).source == "auto"
    assert load_settings({"MARKETSTREAM_CONFIG": str(tmp_path / "other.toml")}).source == "live"


def test_a_child_process_gets_exactly_the_same_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever folder or file it starts in."""
    monkeypatch.chdir(tmp_path)
    given_values = {"MARKETSTREAM_PORT_API": "20001", "MARKETSTREAM_COLLECTOR_SYMBOLS": "A-B, C-D", "MARKETSTREAM_LOG_JSON": "yes"}
    parent = load_settings({**given_values, "MARKETSTREAM_POSTGRES_PASSWORD": "geheim"})
    (tmp_path / "marketstream.toml").write_text('source = "sim"\n')
    assert load_settings(parent.as_environ()).values() == parent.values()


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"MARKETSTREAM_PORT_BAS": "1"}, ["MARKETSTREAM_PORT_BAS", "did you mean MARKETSTREAM_PORT_BASE?"]),
        ({"MARKETSTREAM_PORT_BASE": "many"}, ["MARKETSTREAM_PORT_BASE", "'many'", "1024 to 64500"]),
        ({"MARKETSTREAM_PORT_KAFKA": "70000"}, ["MARKETSTREAM_PORT_KAFKA", "70000", "1 to 65535"]),
        ({"MARKETSTREAM_PORT_API": "19092"}, ["ports.api", "ports.kafka", "19092"]),
        ({"MARKETSTREAM_SOURCE": "lvie"}, ["MARKETSTREAM_SOURCE", "auto, live, sim, none", "did you mean live?"]),
        ({"MARKETSTREAM_DATA_DIR": "~nobody-of-this-name/x"}, ["MARKETSTREAM_DATA_DIR", "path of a folder"]),
        ({"MARKETSTREAM_LOG_JSON": "maybe"}, ["MARKETSTREAM_LOG_JSON", "true or false"]),
        ({"MARKETSTREAM_TOPIC_PREFIX": "a b"}, ["MARKETSTREAM_TOPIC_PREFIX", "a-z"]),
        ({"MARKETSTREAM_CLICKHOUSE_URL": "localhost:1"}, ["MARKETSTREAM_CLICKHOUSE_URL", "http://"]),
        ({"MARKETSTREAM_CLICKHOUSE_DATABASE": "a;drop"}, ["MARKETSTREAM_CLICKHOUSE_DATABASE", "plain name"]),
        ({"MARKETSTREAM_API_PORT": "1", "MARKETSTREAM_PORT_API": "2"}, ["api.port", "ports.api", "differ"]),
        ({"MARKETSTREAM_WORKER_SNAPSHOT_INTERVAL_S": "nan"}, ["MARKETSTREAM_WORKER_SNAPSHOT_INTERVAL_S", "0.05 to 60"]),
        ({"MARKETSTREAM_WORKER_TIMEFRAMES": "1m,5x"}, ["MARKETSTREAM_WORKER_TIMEFRAMES", "5x", "15m"]),
        ({"MARKETSTREAM_CONFIG": "/does/not/exist.toml"}, ["/does/not/exist.toml", "No such file"]),
    ],
)
def test_a_wrong_setting_is_one_sentence_with_name_value_and_what_is_allowed(environ: dict[str, str], words: list[str]) -> None:
    """Exit code 2."""
    with pytest.raises(SettingsError) as caught:
        load_settings({"MARKETSTREAM_CONFIG": "", **environ})
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[kafka]\npartitons = 3\n", ["kafka.partitons", "settings.toml", "did you mean kafka.partitions?"]),
        ("[kafka]\npartitions = true\n", ["kafka.partitions", "file:settings.toml", "whole number"]),
        ("[kafka]\nbootstrap = 5\n", ["kafka.bootstrap", "text"]),
        ("kafka = [\n", ["settings.toml", "not TOML"]),
    ],
)
def test_a_wrong_file_is_one_sentence_with_the_key(tmp_path: Path, text: str, words: list[str]) -> None:
    """The file is named, and the nearest known key."""
    file = tmp_path / "settings.toml"
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_settings({}, file)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_secrets_are_masked_wherever_settings_are_shown() -> None:
    """``config show``, ``repr`` and error messages."""
    secret = "correct-horse"
    settings = load_settings({"MARKETSTREAM_CLICKHOUSE_PASSWORD": secret, "MARKETSTREAM_POSTGRES_PASSWORD": secret})
    assert secret not in repr(settings) and secret not in str(settings.shown())
    assert ("clickhouse.password", "***", "env:MARKETSTREAM_CLICKHOUSE_PASSWORD") in settings.shown()
    assert ("postgres.dsn", "postgresql://postgres:***@127.0.0.1:19132/marketstream", "default") in settings.shown()
    with pytest.raises(SettingsError) as caught:
        load_settings({"MARKETSTREAM_POSTGRES_DSN": secret})
    assert secret not in str(caught.value)


def test_every_setting_has_a_sentence_and_a_variable_of_its_own() -> None:
    """The catalogue behind ``config show`` is complete."""
    every = options()
    assert all(item.doc for item in every)
    assert len({item.env for item in every}) == len(every) and all(item.env.startswith("MARKETSTREAM_") for item in every)


def test_kafka_client_config_passes_security_through() -> None:
    """Pointing at a real cluster takes variables only."""
    environ = {
        "MARKETSTREAM_KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
        "MARKETSTREAM_KAFKA_SASL_USERNAME": "u",
        "MARKETSTREAM_KAFKA_SASL_PASSWORD": "p",
    }
    config = load_settings({**environ, "MARKETSTREAM_KAFKA_BOOTSTRAP": "b:1"}).kafka.client_config()
    assert config == {
        "bootstrap.servers": "b:1",
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": "PLAIN",
        "sasl.username": "u",
        "sasl.password": "p",
    }


@given(st.dictionaries(st.sampled_from([item.env for item in options()]), st.text(max_size=20), max_size=3))
@hypothesis_settings(max_examples=100, deadline=None)
def test_any_values_give_settings_or_a_settings_error(environ: dict[str, str]) -> None:
    """No value ends in a traceback."""
    try:
        settings = load_settings({"MARKETSTREAM_CONFIG": "", **environ})
    except SettingsError as exc:
        assert str(exc)
    else:
        assert load_settings(settings.as_environ()).values() == settings.values()
