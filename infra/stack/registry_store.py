"""The registry's contents: log records in, subjects, versions, ids and configuration out. Pure: no socket, no broker, no clock.

Records are Confluent's own (topic ``_schemas``), so that a Confluent registry could take the topic over: keys ``{"keytype": "SCHEMA",
"subject", "version", "magic": 1}``, ``CONFIG``, ``MODE``, ``DELETE_SUBJECT``; values JSON or None.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from infra.stack.registry_compat import LEVELS, check, parse_error

logger = logging.getLogger(__name__)

MODES = ("READWRITE", "READONLY", "IMPORT")
Record = tuple[dict[str, Any], dict[str, Any] | None]


class RegistryError(Exception):
    """An answer other than 200: Confluent's ``code`` (its first three digits are the HTTP status) and a sentence."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self.code if self.code < 1000 else self.code // 100


@dataclass(kw_only=True)
class Version:
    """One version of a subject."""

    subject: str
    version: int
    id: int
    schema: str
    deleted: bool = False

    def as_dict(self) -> dict[str, Any]:
        """As the interface answers it."""
        return {"subject": self.subject, "version": self.version, "id": self.id, "schema": self.schema}

    def record(self, *, deleted: bool = False) -> Record:
        """As the log holds it."""
        key = {"keytype": "SCHEMA", "subject": self.subject, "version": self.version, "magic": 1}
        return key, {**self.as_dict(), "deleted": deleted}


@dataclass(kw_only=True)
class Subject:
    """Versions by number, in order."""

    versions: dict[int, Version] = field(default_factory=dict)

    def live(self, *, deleted: bool = False) -> list[Version]:
        """Versions that count; with ``deleted`` the soft-deleted ones too."""
        return [version for version in self.versions.values() if deleted or not version.deleted]


def canonical(schema: str) -> str:
    """The same text for schemas that differ in white space only."""
    return json.dumps(json.loads(schema), separators=(",", ":"))


class Store:
    """Everything registered. ``apply`` is the only thing that changes it; the other methods answer or say which records to write."""

    def __init__(self, default_level: str) -> None:
        self._default_level = default_level
        self._subjects: dict[str, Subject] = {}
        self._schemas: dict[int, str] = {}
        self._ids: dict[str, int] = {}
        self._levels: dict[str | None, str] = {}
        self._modes: dict[str | None, str] = {}
        self._last_id = 0

    def apply(self, key: Mapping[str, Any], value: Mapping[str, Any] | None) -> None:
        """Takes one record of the log; records of unknown kinds are skipped, as Confluent's registry does, and so are damaged ones."""
        try:
            self._apply(key, value)
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as exc:
            logger.warning("skipped the schema record %s: %r", str(key)[:200], exc)

    def _apply(self, key: Mapping[str, Any], value: Mapping[str, Any] | None) -> None:
        kind, subject = key.get("keytype"), key.get("subject")
        if kind == "SCHEMA" and isinstance(subject, str):
            self._apply_schema(subject, int(key["version"]), value)
        elif kind == "CONFIG":
            _set(self._levels, subject, (value or {}).get("compatibilityLevel"))
        elif kind == "MODE":
            _set(self._modes, subject, (value or {}).get("mode"))
        elif kind == "DELETE_SUBJECT" and value is not None and subject in self._subjects:
            for version in self._subjects[subject].versions.values():
                version.deleted |= version.version <= int(value["version"])

    def _apply_schema(self, subject: str, number: int, value: Mapping[str, Any] | None) -> None:
        if value is None:
            held = self._subjects.get(subject)
            if held is not None:
                held.versions.pop(number, None)
                if not held.versions:
                    del self._subjects[subject]
            return
        version = Version(
            subject=subject, version=number, id=int(value["id"]), schema=str(value["schema"]), deleted=bool(value.get("deleted"))
        )
        self._subjects.setdefault(subject, Subject()).versions[number] = version
        self._schemas[version.id] = version.schema
        self._ids[canonical(version.schema)] = version.id
        self._last_id = max(self._last_id, version.id)

    def subjects(self, prefix: str = "", *, deleted: bool = False) -> list[str]:
        """Names of subjects with at least one version."""
        return sorted(name for name, held in self._subjects.items() if name.startswith(prefix) and held.live(deleted=deleted))

    def versions(self, subject: str, *, deleted: bool = False) -> list[int]:
        """Version numbers of a subject."""
        return [version.version for version in self._held(subject, deleted=deleted)]

    def _held(self, subject: str, *, deleted: bool = False) -> list[Version]:
        found = self._subjects.get(subject, Subject()).live(deleted=deleted)
        if not found:
            raise RegistryError(40401, f"Subject '{subject}' not found.")
        return found

    def version(self, subject: str, name: str, *, deleted: bool = False) -> Version:
        """One version by number or ``latest`` (also -1)."""
        held = self._held(subject, deleted=deleted)
        if name in ("latest", "-1"):
            return held[-1]
        if not name.isdigit() or not 1 <= int(name) < 2**31:
            raise RegistryError(
                42202,
                f"The specified version '{name[:40]}' is not a valid version id. Allowed values are between [1, 2^31-1] and the string "
                '"latest"',
            )
        for version in held:
            if version.version == int(name):
                return version
        raise RegistryError(40402, f"Version {name} not found.")

    def schema(self, number: str) -> str:
        """The schema of an id, deleted or not: records that carry the id must stay readable."""
        if number.isdigit() and int(number) in self._schemas:
            return self._schemas[int(number)]
        raise RegistryError(40403, f"Schema {number[:40]} not found")

    def uses(self, number: str, *, deleted: bool = False) -> list[Version]:
        """Every version that has an id."""
        self.schema(number)
        return [version for held in self._subjects.values() for version in held.live(deleted=deleted) if version.id == int(number)]

    def everything(self, *, deleted: bool = False) -> Iterator[Version]:
        """All versions of all subjects."""
        for name in self.subjects(deleted=deleted):
            yield from self._subjects[name].live(deleted=deleted)

    def lookup(self, subject: str, schema: str, *, deleted: bool = False) -> Version:
        """The version of a subject that is this schema."""
        wanted = _checked(schema)
        for version in reversed(self._held(subject, deleted=deleted)):
            if canonical(version.schema) == wanted:
                return version
        raise RegistryError(40403, "Schema not found")

    def register(self, subject: str, schema: str) -> tuple[Version, list[Record]]:
        """The version this schema is or becomes, and the records that make it so (none when it is there already)."""
        wanted = _checked(schema)
        if self.mode(subject) == "READONLY":
            raise RegistryError(42205, f"Subject {subject} is in read-only mode")
        held = self._subjects.get(subject, Subject())
        for version in held.live():
            if canonical(version.schema) == wanted:
                return version, []
        problems = check(self.level(subject), wanted, [version.schema for version in held.live()])
        if problems:
            raise RegistryError(
                409,
                f"Schema being registered is incompatible with an earlier schema for subject '{subject}', details: [{'; '.join(problems)}]",
            )
        number = max(held.versions, default=0) + 1
        version = Version(subject=subject, version=number, id=self._ids.get(wanted, self._last_id + 1), schema=wanted)
        return version, [version.record()]

    def test(self, subject: str, schema: str, name: str | None) -> list[str]:
        """What speaks against registering a schema, against one version or (None) those the level names; empty when compatible."""
        wanted = _checked(schema)
        earlier = [self.version(subject, name)] if name is not None else self._subjects.get(subject, Subject()).live()
        return check(self.level(subject), wanted, [version.schema for version in earlier])

    def delete(self, subject: str, *, permanent: bool) -> tuple[list[int], list[Record]]:
        """Version numbers that go, and the records for it. ``permanent`` only after a soft delete, as Confluent has it."""
        if permanent:
            held = self._subjects.get(subject, Subject())
            if held.live():
                raise RegistryError(40405, f"Subject '{subject}' was not deleted first before being permanently deleted")
            if not held.versions:
                raise RegistryError(40401, f"Subject '{subject}' not found.")
            gone = list(held.versions.values())
            return [version.version for version in gone], [(version.record()[0], None) for version in gone]
        if subject in self._subjects and not self._subjects[subject].live():
            raise RegistryError(40404, f"Subject '{subject}' was soft deleted. Set permanent=true to delete permanently")
        numbers = self.versions(subject)
        key = {"keytype": "DELETE_SUBJECT", "subject": subject, "magic": 0}
        return numbers, [(key, {"subject": subject, "version": max(numbers)})]

    def delete_version(self, subject: str, name: str, *, permanent: bool) -> tuple[int, list[Record]]:
        """The version number that goes, and the record for it."""
        version = self.version(subject, name, deleted=True)
        if permanent and not version.deleted:
            raise RegistryError(
                40407, f"Subject '{subject}' Version {version.version} was not deleted first before being permanently deleted"
            )
        if not permanent and version.deleted:
            raise RegistryError(40406, f"Subject '{subject}' Version {version.version} was soft deleted. Set permanent=true to delete it")
        key, value = version.record(deleted=True)
        return version.version, [(key, None if permanent else value)]

    def level(self, subject: str | None, *, default: bool = True) -> str:
        """The compatibility level of a subject, or the global one for None."""
        if subject in self._levels:
            return self._levels[subject]
        if subject is not None and not default:
            raise RegistryError(40408, f"Subject '{subject}' does not have subject-level compatibility configured")
        return self._levels.get(None, self._default_level)

    def mode(self, subject: str | None) -> str:
        """READWRITE, READONLY or IMPORT."""
        return self._modes.get(subject, self._modes.get(None, "READWRITE"))


def level_record(subject: str | None, level: str | None) -> Record:
    """The record that sets (or, with None, unsets) a compatibility level."""
    if level is not None and level not in LEVELS:
        raise RegistryError(42203, f"Invalid compatibility level '{level}'. Valid values are {', '.join(LEVELS)}")
    return {"keytype": "CONFIG", "subject": subject, "magic": 0}, None if level is None else {"compatibilityLevel": level}


def mode_record(subject: str | None, mode: str) -> Record:
    """The record that sets a mode."""
    if mode not in MODES:
        raise RegistryError(42204, f"Invalid mode '{mode}'. Valid values are {', '.join(MODES)}")
    return {"keytype": "MODE", "subject": subject, "magic": 0}, {"mode": mode}


def _set(table: dict[str | None, str], name: str | None, value: str | None) -> None:
    if value is None:
        table.pop(name, None)
    else:
        table[name] = value


def _checked(schema: str) -> str:
    problem = parse_error(schema)
    if problem is not None:
        raise RegistryError(42201, f"Invalid schema: {problem}")
    return canonical(schema)
