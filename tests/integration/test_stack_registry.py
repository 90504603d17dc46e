"""The schema registry over HTTP, kept in a topic of the real broker."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import time
import uuid
from collections.abc import Iterator

import httpx
import pytest

from infra.settings import Settings
from infra.stack.registry import build
from tests.integration.conftest import RunningStack

SCHEMA = json.dumps({"type": "record", "name": "r", "fields": [{"name": "a", "type": "long"}]})
WIDER = json.dumps({"type": "record", "name": "r", "fields": [{"name": "a", "type": "long"}, {"name": "b", "type": "int", "default": 0}]})
OTHER = json.dumps({"type": "record", "name": "r", "fields": [{"name": "a", "type": "string"}]})


@pytest.fixture
def http(stack: RunningStack) -> Iterator[httpx.Client]:
    """A plain client of the running registry."""
    with httpx.Client(base_url=stack.settings.registry.url, trust_env=False, timeout=20) as client:
        yield client


@pytest.fixture
def subject() -> str:
    """A subject of the test's own, with characters that must be escaped in a path."""
    return f"t/{uuid.uuid4().hex[:8]} value"


def _path(subject: str) -> str:
    return "/subjects/" + subject.replace("/", "%2F").replace(" ", "%20")


def test_the_protocol_from_registration_to_deletion(http: httpx.Client, subject: str) -> None:
    """What a serializer, a deserializer and a command line tool do."""
    path = _path(subject)
    first = http.post(path + "/versions", json={"schema": SCHEMA}).json()["id"]
    assert http.post(path + "/versions", json={"schema": SCHEMA, "schemaType": "AVRO"}).json()["id"] == first
    assert http.post(path, json={"schema": SCHEMA}).json() == {
        "subject": subject,
        "version": 1,
        "id": first,
        "schema": SCHEMA.replace(" ", ""),
    }
    assert json.loads(http.get(f"/schemas/ids/{first}").json()["schema"]) == json.loads(SCHEMA)
    assert http.post(path + "/versions", json={"schema": OTHER}).status_code == 409
    test = "/compatibility" + path + "/versions/latest"
    assert http.post(test, json={"schema": WIDER}).json() == {"is_compatible": True}
    refused = http.post(test + "?verbose=true", json={"schema": OTHER}).json()
    assert refused["is_compatible"] is False and refused["messages"]
    second = http.post(path + "/versions", json={"schema": WIDER}).json()["id"]
    assert second != first and http.get(path + "/versions").json() == [1, 2] and subject in http.get("/subjects").json()
    assert http.get(path + "/versions/latest").json()["id"] == second and http.get(path + "/versions/1/schema").json() == json.loads(SCHEMA)
    assert http.get(f"/schemas/ids/{first}/versions").json() == [{"subject": subject, "version": 1}]
    assert http.put("/config" + path[9:], json={"compatibility": "NONE"}).json() == {"compatibility": "NONE"}
    assert http.get("/config" + path[9:]).json() == {"compatibilityLevel": "NONE"} and http.get("/config").json() == {
        "compatibilityLevel": "BACKWARD"
    }
    assert http.post(path + "/versions", json={"schema": OTHER}).status_code == 200
    assert http.get("/mode").json() == {"mode": "READWRITE"} and http.get("/schemas/types").json() == ["AVRO"]
    assert http.delete(path).json() == [1, 2, 3] and http.get(path + "/versions").json()["error_code"] == 40401
    assert http.delete(path + "?permanent=true").json() == [1, 2, 3]


def test_everything_is_there_after_kill_9_of_the_registry(http: httpx.Client, stack: RunningStack, subject: str) -> None:
    """An id once answered is an id for ever."""
    number = http.post(_path(subject) + "/versions", json={"schema": SCHEMA}).json()["id"]
    (status,) = [status for status in stack.supervisor.status() if status.name == "registry"]
    os.kill(status.pid, signal.SIGKILL)
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            assert http.post(_path(subject) + "/versions", json={"schema": SCHEMA}).json()["id"] == number
            break
        except httpx.TransportError:
            time.sleep(0.05)
    assert json.loads(http.get(f"/schemas/ids/{number}").json()["schema"]) == json.loads(SCHEMA)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/subjects/x/versions", b"{", 400, 400),
        ("POST", "/subjects/x/versions", b"[1]", 422, 422),
        ("POST", "/subjects/x/versions", b"{}", 422, 42201),
        ("POST", "/subjects/x/versions", b'{"schema": "{"}', 422, 42201),
        ("POST", "/subjects/x/versions", b'{"schema": "syntax = 3", "schemaType": "PROTOBUF"}', 422, 42201),
        ("POST", "/subjects/x/versions", b" " * 2_000_000, 413, 413),
        ("GET", "/subjects/never-there/versions", b"", 404, 40401),
        ("GET", "/schemas/ids/999999", b"", 404, 40403),
        ("GET", "/nowhere", b"", 404, 404),
        ("PUT", "/subjects", b"{}", 405, 405),
        ("PUT", "/config", b'{"compatibility": "maybe"}', 422, 42203),
    ],
)
def test_wrong_requests_are_answered_with_confluents_codes(
    http: httpx.Client, method: str, path: str, body: bytes, status: int, code: int
) -> None:
    """Status, code and a sentence."""
    answer = http.request(method, path, content=body)
    assert (answer.status_code, answer.json()["error_code"]) == (status, code) and answer.json()["message"]


def test_a_registry_with_a_prefix_keeps_a_topic_of_its_own(stack: RunningStack, topic_prefix: str) -> None:
    """Tenants on one broker do not see each other's schemas; a second registry on the topic reads what the first wrote."""
    settings: Settings = stack.with_prefix(topic_prefix)
    first = build(settings, 0)
    version = first.registry.change(lambda store: store.register("s", SCHEMA))
    first.server_close()
    second = build(settings, 0)
    assert second.registry.read(lambda store: store.version("s", "1")) == version
    second.server_close()


@pytest.mark.skipif(
    importlib.util.find_spec("authlib") is None, reason="confluent-kafka's registry client needs authlib, which is not installed"
)
def test_confluents_own_client_works(stack: RunningStack, subject: str) -> None:
    """The client that comes with confluent-kafka."""
    from confluent_kafka.schema_registry import Schema, SchemaRegistryClient

    client = SchemaRegistryClient({"url": stack.settings.registry.url})
    number = client.register_schema(subject, Schema(SCHEMA, "AVRO"))
    assert json.loads(client.get_schema(number).schema_str or "") == json.loads(SCHEMA)
    assert client.get_latest_version(subject).version == 1 and client.lookup_schema(subject, Schema(SCHEMA, "AVRO")).schema_id == number
