"""Several complete Arrow IPC streams of one schema in, one stream out: the engine gives each chunk of a result as a stream of its own."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"


def splice(first: bytes, rest: Iterable[bytes]) -> Iterator[bytes]:
    """Chunks that together are one stream: the first chunk's schema, every chunk's batches, one end marker."""
    yield first.removesuffix(_END)
    for chunk in rest:
        yield chunk[schema_length(chunk) :].removesuffix(_END)
    yield _END


def schema_length(stream: bytes) -> int:
    """Bytes of the schema message a stream begins with.

    Source: Arrow columnar format, "Encapsulated message format": 0xFFFFFFFF, int32 metadata length (padded), metadata, no body.
    """
    marker, length = struct.unpack_from("<Ii", stream)
    if marker == 0xFFFFFFFF:
        return 8 + int(length)
    return 4 + int(marker)  # streams before Arrow 0.15 have no continuation marker
