"""Which Kafka partition an instrument lives in: the same in every topic, every client and every language.

``murmur2`` is the hash of Kafka's own default partitioner, so a Java producer that keys by ``exchange:symbol`` agrees.
"""

from __future__ import annotations

from functools import lru_cache


def murmur2(data: bytes) -> int:
    """Unsigned 32-bit MurmurHash2 with Kafka's seed 0x9747b28c.

    Source: Austin Appleby's MurmurHash2 (public domain), seeded as in Kafka's ``org.apache.kafka.common.utils.Utils``.
    """
    mask = 0xFFFFFFFF
    multiplier = 0x5BD1E995
    length = len(data)
    hash_ = (0x9747B28C ^ length) & mask
    whole = length & ~3
    for position in range(0, whole, 4):
        word = int.from_bytes(data[position : position + 4], "little")
        word = (word * multiplier) & mask
        word ^= word >> 24
        word = (word * multiplier) & mask
        hash_ = ((hash_ * multiplier) & mask) ^ word
    tail = data[whole:]
    if tail:
        hash_ ^= int.from_bytes(tail, "little")
        hash_ = (hash_ * multiplier) & mask
    hash_ ^= hash_ >> 13
    hash_ = (hash_ * multiplier) & mask
    return hash_ ^ (hash_ >> 15)


@lru_cache(maxsize=65_536)  # one entry a symbol; 65,536 symbols are more than all venues list together
def partition_of(key: str, partitions: int) -> int:
    """Partition of an instrument key among ``partitions``, as Kafka's default partitioner has it."""
    return (murmur2(key.encode()) & 0x7FFFFFFF) % partitions
