"""WebSocket frames out of chunks."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectors.errors import ProtocolViolationError
from collectors.reader import FrameReader


def frame(payload: bytes, opcode: int = 1, *, fin: bool = True) -> bytes:
    """A server's frame."""
    size = len(payload)
    head = bytes([(0x80 if fin else 0) | opcode])
    if size < 126:
        head += bytes([size])
    elif size < 65_536:
        head += bytes([126]) + size.to_bytes(2, "big")
    else:
        head += bytes([127]) + size.to_bytes(8, "big")
    return head + payload


def read(data: bytes, sizes: list[int] | None = None, limit: int = 1024 * 1024) -> FrameReader:
    """A reader that was fed ``data`` in pieces."""
    reader = FrameReader(limit)
    position = turn = 0
    while position < len(data):
        size = sizes[turn % len(sizes)] if sizes else len(data)
        reader.feed(data[position : position + size])
        position += size
        turn += 1
    return reader


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["text", "binary", "ping", "parts"]), st.binary(max_size=400)), max_size=25),
    st.lists(st.integers(1, 300), min_size=1, max_size=12),
)
def test_messages_come_out_whole_in_any_chunks(items: list[tuple[str, bytes]], sizes: list[int]) -> None:
    """Text, binary and fragmented messages in order; control frames may come between fragments."""
    data, messages, pings = b"", [], []
    for kind, payload in items:
        if kind == "text":
            data += frame(payload)
            messages.append(payload)
        elif kind == "binary":
            data += frame(payload, 2)
            messages.append(payload)
        elif kind == "ping":
            data += frame(payload[:125], 9)
            pings.append(frame(payload[:125], 9))
        else:
            third = len(payload) // 3
            data += frame(payload[:third], fin=False) + frame(b"p", 9) + frame(payload[third:], 0)
            messages.append(payload)
            pings.append(frame(b"p", 9))
    reader = read(data, sizes)
    assert reader.messages == messages
    assert reader.control == pings
    assert reader.oversized == []
    assert reader.buffered_bytes == 0


def test_lengths_at_the_borders_of_the_three_forms() -> None:
    """125, 126, 65,535, 65,536 bytes."""
    sizes = [0, 1, 125, 126, 127, 65_535, 65_536]
    reader = read(b"".join(frame(b"x" * size) for size in sizes), [1000])
    assert [len(message) for message in reader.messages] == sizes


def test_a_too_large_message_is_skipped_and_reported_with_its_first_bytes() -> None:
    """The next message is read as if nothing had been; memory holds the limit at most."""
    big = b"y" * 5_000
    data = frame(b"a") + frame(big) + frame(b"b")
    for sizes in ([len(data)], [7], [900]):
        reader = FrameReader(1_000)
        most = 0
        for start in range(0, len(data), sizes[0]):
            reader.feed(data[start : start + sizes[0]])
            most = max(most, reader.buffered_bytes)
        assert reader.messages == [b"a", b"b"]
        assert len(reader.oversized) == 1
        assert reader.oversized[0][1] == 5_000
        assert big.startswith(reader.oversized[0][0])
        assert most <= 1_000 + 14


def test_fragments_that_add_up_beyond_the_limit_are_skipped() -> None:
    """An endless fragmented message takes no endless memory."""
    data = frame(b"z" * 600, fin=False) + frame(b"z" * 600, 0, fin=False) + frame(b"z" * 600, 0, fin=False) + frame(b"", 0) + frame(b"b")
    reader = read(data, limit=1_000)
    assert reader.messages == [b"b"]
    assert [size for _, size in reader.oversized] == [1_200]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (bytes([0x81, 0x85]) + b"abcd12345", "masked"),
        (bytes([0xC1, 0x01]) + b"a", "reserved bits"),
        (bytes([0x83, 0x01]) + b"a", "unknown kind"),
        (bytes([0x8B, 0x00]), "unknown kind"),
        (frame(b"a", 0), "out of turn"),
        (frame(b"a", fin=False) + frame(b"b"), "out of turn"),
        (bytes([0x09, 0x00]), "fragmented or longer"),
        (frame(b"x" * 126, 9), "fragmented or longer"),
    ],
)
def test_what_no_server_may_send_ends_the_connection(data: bytes, says: str) -> None:
    """Each violation of RFC 6455 by name."""
    with pytest.raises(ProtocolViolationError, match=says):
        FrameReader().feed(data)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=600), st.integers(1, 100))
def test_any_bytes_are_read_or_refused(data: bytes, size: int) -> None:
    """Nothing but our own error comes out, and memory stays bounded."""
    reader = FrameReader(256)
    try:
        for start in range(0, len(data), size):
            reader.feed(data[start : start + size])
            assert reader.buffered_bytes <= 256 + 14 + size
    except ProtocolViolationError:
        pass
