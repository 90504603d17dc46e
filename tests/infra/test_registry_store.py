"""The registry's rules, without broker or socket."""

from __future__ import annotations

import json
from typing import Any

import pytest

from infra.stack.registry_store import RegistryError, Store, level_record, mode_record


def record(*fields: dict[str, Any]) -> str:
    """A record schema with these fields."""
    return json.dumps({"type": "record", "name": "r", "fields": list(fields)})


A = record({"name": "a", "type": "long"})
A_B = record({"name": "a", "type": "long"}, {"name": "b", "type": "string"})
A_B_DEFAULT = record({"name": "a", "type": "long"}, {"name": "b", "type": "string", "default": ""})
A_TEXT = record({"name": "a", "type": "string"})


def register(store: Store, subject: str, schema: str) -> int:
    """Registers and applies; the id."""
    version, records = store.register(subject, schema)
    for key, value in records:
        store.apply(key, value)
    return version.id


def code_of(call: Any) -> int:
    """The error code of a call that must fail."""
    with pytest.raises(RegistryError) as caught:
        call()
    return caught.value.code


def test_the_same_schema_keeps_its_id_in_every_subject_and_needs_no_record() -> None:
    """Registering is idempotent, whatever the white space."""
    store = Store("BACKWARD")
    assert register(store, "s", A) == register(store, "s", json.dumps(json.loads(A), indent=4)) == register(store, "t", A) == 1
    assert store.register("s", A)[1] == []
    assert (store.versions("s"), store.subjects()) == ([1], ["s", "t"])
    assert register(store, "s", A_B_DEFAULT) == 2


@pytest.mark.parametrize(
    ("level", "first", "second", "allowed"),
    [
        ("BACKWARD", A, A_B_DEFAULT, True),
        ("BACKWARD", A, A_B, False),
        ("BACKWARD", A_B, A, True),
        ("BACKWARD", A, A_TEXT, False),
        ("FORWARD", A, A_B, True),
        ("FORWARD", A_B, A, False),
        ("FORWARD", A_B_DEFAULT, A, True),
        ("FULL", A, A_B_DEFAULT, True),
        ("FULL", A, A_B, False),
        ("NONE", A, A_TEXT, True),
    ],
)
def test_each_level_lets_through_what_its_readers_can_read(level: str, first: str, second: str, allowed: bool) -> None:
    """A refused schema is 409 and says why."""
    store = Store(level)
    register(store, "s", first)
    assert (store.test("s", second, "latest") == []) is allowed
    if allowed:
        register(store, "s", second)
    else:
        assert code_of(lambda: store.register("s", second)) == 409


def test_transitive_levels_look_at_every_version() -> None:
    """Dropping a field and bringing it back as text passes the last version only."""
    other = record({"name": "c", "type": "long", "default": 0})
    back = record({"name": "c", "type": "long", "default": 0}, {"name": "a", "type": "string", "default": ""})
    for level, allowed in (("BACKWARD", True), ("BACKWARD_TRANSITIVE", False)):
        store = Store(level)
        register(store, "s", A)
        register(store, "s", other)
        assert (store.test("s", back, None) == []) is allowed


def test_soft_then_permanent_deletion_and_its_error_codes() -> None:
    """A soft-deleted schema is still found by id; permanent needs soft first."""
    store = Store("BACKWARD")
    register(store, "s", A)
    register(store, "s", A_B_DEFAULT)
    assert code_of(lambda: store.delete("s", permanent=True)) == 40405
    assert code_of(lambda: store.delete_version("s", "1", permanent=True)) == 40407
    number, records = store.delete_version("s", "1", permanent=False)
    for key, value in records:
        store.apply(key, value)
    assert number == 1 and store.versions("s") == [2] and code_of(lambda: store.delete_version("s", "1", permanent=False)) == 40406
    numbers, records = store.delete("s", permanent=False)
    for key, value in records:
        store.apply(key, value)
    assert numbers == [2] and store.subjects() == [] and store.subjects(deleted=True) == ["s"]
    assert code_of(lambda: store.delete("s", permanent=False)) == 40404 and code_of(lambda: store.versions("s")) == 40401
    assert json.loads(store.schema("1")) == json.loads(A)
    numbers, records = store.delete("s", permanent=True)
    for key, value in records:
        store.apply(key, value)
    assert numbers == [1, 2] and store.subjects(deleted=True) == []
    assert register(store, "s", A_TEXT) == 3  # ids are never given twice


def test_errors_have_confluents_codes() -> None:
    """What clients tell apart."""
    store = Store("BACKWARD")
    register(store, "s", A)
    assert code_of(lambda: store.versions("t")) == 40401
    assert code_of(lambda: store.version("s", "7")) == 40402
    assert code_of(lambda: store.schema("9")) == code_of(lambda: store.lookup("s", A_B)) == 40403
    assert code_of(lambda: store.version("s", "zero")) == code_of(lambda: store.version("s", "0")) == 42202
    assert code_of(lambda: level_record(None, "SIDEWAYS")) == 42203
    assert code_of(lambda: mode_record(None, "OFF")) == 42204
    for hostile in (
        "",
        "{",
        '{"type": "record"}',
        '{"type": "nope"}',
        "[" * 5000,
        "5",
        '{"type":"record","name":"r","fields":[{"name":"a"}]}',
    ):
        assert code_of(lambda text=hostile: store.register("s", text)) == 42201


def test_read_only_mode_refuses_and_levels_are_per_subject() -> None:
    """Mode and level are inherited from the global ones."""
    store = Store("BACKWARD")
    store.apply(*mode_record("s", "READONLY"))
    assert code_of(lambda: store.register("s", A)) == 42205 and register(store, "t", A) == 1
    store.apply(*level_record("t", "NONE"))
    assert (store.level("t"), store.level("s"), code_of(lambda: store.level("s", default=False))) == ("NONE", "BACKWARD", 40408)
    store.apply(*level_record("t", None))
    assert store.level("t") == "BACKWARD"


def test_a_log_of_other_writers_is_understood() -> None:
    """Confluent's own records, with fields and kinds we do not know."""
    store = Store("BACKWARD")
    store.apply({"keytype": "NOOP", "magic": 0}, {"x": 1})
    store.apply(
        {"keytype": "SCHEMA", "subject": "s", "version": 3, "magic": 1},
        {"subject": "s", "version": 3, "id": 42, "schema": A, "deleted": False, "guid": "x", "ts": 1},
    )
    assert store.version("s", "latest").id == 42
    assert register(store, "s", A_B_DEFAULT) == 43
