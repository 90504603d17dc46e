"""Bytes of a WebSocket server to messages. Pure: chunks in, messages out, no socket.

It understands exactly what a server may send without extensions (RFC 6455): unmasked frames, text or binary, fragmented or not. Control
frames are handed on as bytes to whoever speaks the rest of the protocol. It exists for speed: one pass over a chunk of hundreds of
frames costs 0.3 us a frame; a general library's parser and queue cost 4 us (both measured, 160-byte messages).
"""

from __future__ import annotations

from typing import Final

from collectors.errors import ProtocolViolationError

MAX_MESSAGE_BYTES: Final = 1024 * 1024
"""Larger messages are skipped and reported: no venue sends a trade of a MiB."""

_FIN: Final = 0x80
_RESERVED: Final = 0x70
_MASKED: Final = 0x80
_CONTINUATION: Final = 0x0
_TEXT: Final = 0x1
_BINARY: Final = 0x2
_CONTROL: Final = 0x8
_LENGTH_16: Final = 126
_LENGTH_64: Final = 127
_MAX_CONTROL: Final = 125


class FrameReader:
    """One connection's incoming bytes.

    After each :meth:`feed`, ``messages``, ``control`` and ``oversized`` hold what is new until :meth:`clear`.
    """

    def __init__(self, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._limit = max_message_bytes
        self._rest = b""
        self._fragments: list[bytes] = []
        self._fragment_bytes = 0
        self._in_message = False  # between the first and the last fragment
        self._skip = 0  # bytes of a too large frame that are still to come
        self._skipping_message = False  # later fragments of a too large message are skipped as well
        self.messages: list[bytes] = []
        """Complete messages in order."""
        self.control: list[bytes] = []
        """Whole control frames (ping, pong, close) as received."""
        self.oversized: list[tuple[bytes, int]] = []
        """(first bytes, size as far as it is known) of messages above the limit."""

    def clear(self) -> None:
        """Forget what was taken."""
        self.messages = []
        self.control = []
        self.oversized = []

    @property
    def buffered_bytes(self) -> int:
        """Bytes held for a message that is not complete; at most the limit, a frame header and one chunk."""
        return len(self._rest) + self._fragment_bytes

    def feed(self, chunk: bytes) -> None:
        """Take what the socket gave. Raises ProtocolViolationError; the connection is of no use then."""
        if self._skip:
            taken = min(self._skip, len(chunk))
            self._skip -= taken
            chunk = chunk[taken:]
        data = self._rest + chunk if self._rest else chunk
        end = len(data)
        position = 0
        append = self.messages.append
        while end - position >= 2:
            first, length = data[position], data[position + 1]
            if length < _LENGTH_16:
                start = position + 2
            elif length == _LENGTH_16:
                start = position + 4
                if start > end:
                    break
                length = data[position + 2] << 8 | data[position + 3]
            else:
                if length != _LENGTH_64:
                    raise ProtocolViolationError("The server sent a masked frame, which only clients may.")
                start = position + 10
                if start > end:
                    break
                length = int.from_bytes(data[position + 2 : start], "big")
            stop = start + length
            if first == _FIN | _TEXT and stop <= end and length <= self._limit and not self._in_message:
                append(data[start:stop])
            else:
                self._check(first, data[position + 1], length)
                if not first & _CONTROL and self._fragment_bytes + length > self._limit:
                    self._begin_skip(first, data[start : min(stop, end)], length)
                    self._skip = max(0, stop - end)
                    position = min(stop, end)
                    continue
                if stop > end:
                    break
                self._other(first, data[position:stop], start - position)
            position = stop
        self._rest = data[position:]

    def _check(self, first: int, second: int, length: int) -> None:
        opcode = first & 0x0F
        if first & _RESERVED:
            raise ProtocolViolationError("The server sent a frame with reserved bits although no extension was agreed.")
        if second & _MASKED:
            raise ProtocolViolationError("The server sent a masked frame, which only clients may.")
        if opcode >= _CONTROL:
            if opcode > 0xA:
                raise ProtocolViolationError(f"The server sent a frame of unknown kind {opcode:#x}.")
            if length > _MAX_CONTROL or not first & _FIN:
                raise ProtocolViolationError("The server sent a control frame that is fragmented or longer than 125 bytes.")
        elif opcode > _BINARY:
            raise ProtocolViolationError(f"The server sent a frame of unknown kind {opcode:#x}.")
        elif (opcode == _CONTINUATION) != self._in_message:
            raise ProtocolViolationError("The server sent a fragment out of turn.")

    def _other(self, first: int, frame: bytes, header: int) -> None:
        """A control frame, a binary message or a fragment, complete."""
        if first & _CONTROL:
            self.control.append(frame)
            return
        payload = frame[header:]
        if first & _FIN and not self._in_message:
            self.messages.append(payload)
            return
        self._in_message = not first & _FIN
        if self._skipping_message:
            self._skipping_message = self._in_message
            return
        self._fragments.append(payload)
        self._fragment_bytes += len(payload)
        if not self._in_message:
            self.messages.append(b"".join(self._fragments))
            self._forget_fragments()

    def _begin_skip(self, first: int, head: bytes, length: int) -> None:
        """The message is above the limit: report what of it is here, drop the rest as it comes."""
        if not self._skipping_message:
            known = b"".join([*self._fragments, head])[: self._limit]
            self.oversized.append((known, self._fragment_bytes + length))
        self._forget_fragments()
        self._in_message = not first & _FIN
        self._skipping_message = self._in_message

    def _forget_fragments(self) -> None:
        self._fragments = []
        self._fragment_bytes = 0
