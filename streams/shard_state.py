"""A shard's state as bytes: named sections behind one header, checked when read.

Comes in: sections (name, bytes) of a partition. Goes out: bytes, the same for the same sections, and back. Version 1 (release 0.1) held the
section ``engine`` alone, without a table; it is still read.
"""

from __future__ import annotations

import json
import struct
import zlib
from typing import Final, NamedTuple

from streams.errors import StateError

SECTIONS: Final = ("engine", "gaps", "quality", "held")
"""What a state may hold, in order; one that is missing was empty."""
_MAGIC: Final = b"MSBS"
_VERSION: Final = 2
_HEADER: Final = struct.Struct("<4sHHqII")
"""Magic, version, partition, applied offset, length and crc32 of what follows."""
_TABLE_SIZE: Final = struct.Struct("<I")


class ShardState(NamedTuple):
    """What a state says."""

    applied_offset: int
    sections: dict[str, bytes]


def pack_state(partition: int, applied_offset: int, sections: dict[str, bytes]) -> bytes:
    """The state as bytes; empty sections are left out."""
    used = {name: sections[name] for name in SECTIONS if sections.get(name)}
    table = json.dumps({name: len(data) for name, data in used.items()}).encode()
    body = b"".join([_TABLE_SIZE.pack(len(table)), table, *used.values()])
    return _HEADER.pack(_MAGIC, _VERSION, partition, applied_offset, len(body), zlib.crc32(body)) + body


def unpack_state(partition: int, data: bytes) -> ShardState:
    """What :func:`pack_state` was given. Raises StateError for bytes that are no state of this partition."""
    if len(data) < _HEADER.size:
        raise StateError(f"A bar state of {len(data)} bytes is cut off.")
    magic, version, of_partition, applied_offset, size, checksum = _HEADER.unpack_from(data)
    body = data[_HEADER.size :]
    if magic != _MAGIC or version not in (1, _VERSION):
        raise StateError(f"These bytes are no bar state of version 1 to {_VERSION}.")
    if of_partition != partition or len(body) != size or zlib.crc32(body) != checksum:
        raise StateError(f"The bar state of partition {of_partition} is damaged or not of partition {partition}.")
    return ShardState(applied_offset, {"engine": body} if version == 1 else _sections(partition, body))


def _sections(partition: int, body: bytes) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    try:
        (length,) = _TABLE_SIZE.unpack_from(body)
        at = _TABLE_SIZE.size + length
        table = json.loads(body[_TABLE_SIZE.size : at])
        for name, size in table.items():
            if name not in SECTIONS or type(size) is not int or size <= 0:
                raise ValueError(f"section {name!r}")
            found[name] = body[at : at + size]
            at += size
        if at != len(body):
            raise ValueError("sizes")
    except (struct.error, ValueError, AttributeError, TypeError) as exc:
        raise StateError(f"The table of the bar state of partition {partition} cannot be used: {exc}") from exc
    return found
