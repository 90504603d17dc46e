"""Client of the schema registry: subjects and texts in, schema ids and ready codecs out.

Any Confluent-compatible registry will do; ours is ``infra.stack.registry``.
"""

from __future__ import annotations

import json
from types import TracebackType
from typing import Any, Self

import httpx

from infra.errors import MarketstreamError, UnreachableError
from infra.settings import Settings
from schemas.codec import FrameCodec, RowCodec, schema_text
from schemas.topics import SCHEMA_NAMES, subject, topic

_CONTENT_TYPE = "application/vnd.schemaregistry.v1+json"
_NOT_FOUND = 404
_CONFLICT = 409


class SchemaIncompatibleError(MarketstreamError):
    """The registry refuses a schema because old records could not be read with it."""


class RegistryClient:
    """Registers our schemas and looks up the schemas of other writers. Thread-safe; blocking, so not for an event loop.

    Args:
        url: base URL of the registry.
        prefix: topic prefix of this stack; it is part of every subject.
    """

    def __init__(self, url: str, *, prefix: str = "", timeout_s: float = 5.0) -> None:
        self._url = url
        self._prefix = prefix
        self._http = httpx.Client(base_url=url, timeout=timeout_s, headers={"Content-Type": _CONTENT_TYPE}, trust_env=False)
        self._ids: dict[str, int] = {}

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """The client for these settings."""
        return cls(settings.registry.url, prefix=settings.kafka.topic_prefix)

    def register(self, schema_name: str) -> int:
        """Id of our schema of that name, registering it when the registry does not have it.

        Raises UnreachableError, SchemaIncompatibleError.
        """
        if schema_name not in self._ids:
            path = f"/subjects/{subject(schema_name, self._prefix)}/versions"
            answer = self._request("POST", path, {"schema": schema_text(schema_name)})
            self._ids[schema_name] = int(answer["id"])
        return self._ids[schema_name]

    def register_all(self) -> dict[str, int]:
        """Ids of every schema in the catalogue, in the catalogue's order so that a new registry numbers them alike everywhere."""
        return {name: self.register(name) for name in dict.fromkeys(SCHEMA_NAMES)}

    def schema(self, schema_id: int) -> str:
        """Text of the schema with that id. Raises KeyError when there is none, UnreachableError."""
        answer = self._request("GET", f"/schemas/ids/{schema_id}")
        if "schema" not in answer:
            raise KeyError(schema_id)
        return str(answer["schema"])

    def frame_codec(self, topic_name: str) -> FrameCodec:
        """A codec for a frame topic with its registered id."""
        name = topic(topic_name).schema
        return FrameCodec(name, self.register(name))

    def row_codec(self, topic_name: str) -> RowCodec:
        """A codec for a row topic with its registered id."""
        name = topic(topic_name).schema
        return RowCodec(name, self.register(name))

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            response = self._http.request(method, path, content=None if body is None else json.dumps(body))
        except httpx.HTTPError as exc:
            raise UnreachableError(
                f"The schema registry at {self._url} does not answer ({exc}): start it or set MARKETSTREAM_REGISTRY_URL."
            ) from exc
        if response.status_code == _NOT_FOUND:
            return {}
        if response.status_code == _CONFLICT:
            raise SchemaIncompatibleError(
                f"The schema registry refuses {path}: {response.text}; give the new field a default or use a new topic."
            )
        if response.is_error:
            raise UnreachableError(
                f"The schema registry at {self._url} refuses {method} {path} with {response.status_code}: {response.text[:300]}"
            )
        answer: dict[str, Any] = response.json()
        return answer
