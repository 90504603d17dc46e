"""HTTP bodies, bounded: a request's bytes (by length or chunked, compressed or not) in; decoded chunks out; and the same way back."""

from __future__ import annotations

import importlib
import sys
import zlib
from collections.abc import Callable, Iterator
from email import policy
from email.message import Message
from email.parser import BytesParser
from typing import Any

READ_BYTES = 1024 * 1024
DRAIN_BYTES = 1024 * 1024
"""An unread rest up to this size is swallowed to keep the connection; a longer one costs the connection."""
ENCODINGS = ("lz4", "gzip", "deflate")
"""What we answer with, best first: lz4 costs 1 ms a MB, gzip at level 1 10 ms."""


class BodyError(Exception):
    """The body cannot be taken: ``status`` is 400 (broken), 411, 413 (too large) or 415 (unknown encoding)."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class BodyReader:
    """Reads one request's body.

    Args:
        stream: the connection.
        headers: the request's.
        limit: most bytes accepted, counted after decompression as well, so that a small bomb is refused like a large file.
        before: called once before the first byte is read (``Expect: 100-continue``).
    """

    def __init__(self, stream: Any, headers: Message, limit: int, before: Callable[[], None]) -> None:
        self._stream = stream
        self._limit = limit
        self._before = before
        self._encoding = headers.get("Content-Encoding", "").strip().lower()
        self._chunked = "chunked" in headers.get("Transfer-Encoding", "").lower()
        self._left = 0 if self._chunked else self._length(headers)
        self._done = not self._chunked and self._left == 0
        self._started = False

    def _length(self, headers: Message) -> int:
        text = headers.get("Content-Length", "0")
        return int(text) if text.isdigit() and len(text) < 16 else -1

    def chunks(self) -> Iterator[bytes]:
        """The decoded body.

        Raises:
            BodyError: too large, broken or in an unknown encoding.
        """
        raw = self._raw()
        if self._encoding in ("", "identity"):
            yield from raw
            return
        decoder = _decoder(self._encoding)
        size = 0
        try:
            for part in raw:
                for piece in decoder(part):
                    size += len(piece)
                    if size > self._limit:
                        raise self._too_large()
                    yield piece
        except BodyError:
            raise
        except Exception as exc:  # each codec has its own error type, some of them plain Exception or RuntimeError
            raise BodyError(400, f"the request body is not {self._encoding}: {exc}") from exc

    def form(self, content_type: str) -> dict[str, str]:
        """The text fields of a multipart form; parts with a file name are refused."""
        data = b"".join(self.chunks())
        message = BytesParser(policy=policy.HTTP).parsebytes(b"Content-Type: " + content_type.encode("latin-1") + b"\r\n\r\n" + data)
        fields: dict[str, str] = {}
        for part in message.iter_parts() if message.is_multipart() else ():
            if part.get_filename():
                raise BodyError(400, "external tables are not supported: put the data into a table")
            name = part.get_param("name", header="content-disposition")
            payload = part.get_payload(decode=True)
            fields[str(name)] = payload.decode(errors="replace") if isinstance(payload, bytes) else ""
        return fields

    def drain(self) -> bool:
        """Swallows a short unread rest; False when the connection cannot be used again."""
        if self._done:
            return True
        if self._chunked or not self._started or self._left > DRAIN_BYTES or self._left < 0:
            return False
        try:
            while self._left > 0:
                part = self._stream.read(min(self._left, READ_BYTES))
                if not part:
                    return False
                self._left -= len(part)
        except OSError:
            return False
        return True

    def _too_large(self) -> BodyError:
        return BodyError(413, f"the request body is larger than {self._limit} bytes; send it in several inserts")

    def _raw(self) -> Iterator[bytes]:
        if self._left < 0:
            raise BodyError(400, "the Content-Length header is not a number")
        if self._left > self._limit:
            raise self._too_large()
        if self._done:
            return
        self._before()
        self._started = True
        if self._chunked:
            yield from self._transfer_chunks()
            return
        while self._left > 0:
            part = self._stream.read(min(self._left, READ_BYTES))
            if not part:
                raise BodyError(400, f"the request body ended {self._left} bytes early")
            self._left -= len(part)
            self._done = self._left == 0
            yield part

    def _transfer_chunks(self) -> Iterator[bytes]:
        size = 0
        while True:
            line = self._stream.readline(1024)
            try:
                length = int(line.split(b";")[0].strip() or b"x", 16)
            except ValueError:
                raise BodyError(400, "the chunked request body is broken") from None
            if length < 0 or size + length > self._limit:
                raise self._too_large()
            size += length
            if length == 0:
                while self._stream.readline(65536).strip():
                    pass
                self._done = True
                return
            left = length
            while left > 0:
                part = self._stream.read(min(left, READ_BYTES))
                if not part:
                    raise BodyError(400, "the chunked request body ended early")
                left -= len(part)
                yield part
            self._stream.readline(16)


def _decoder(encoding: str) -> Callable[[bytes], Iterator[bytes]]:
    """A function from compressed to decompressed pieces of at most 1 MB each where the codec can bound them."""
    if encoding in ("gzip", "deflate", "x-gzip"):
        return _zlib_pieces(zlib.decompressobj(47 if encoding != "deflate" else 15))
    if encoding == "lz4":
        return _bounded_pieces(importlib.import_module("lz4.frame").LZ4FrameDecompressor())
    if encoding == "zstd":
        return _bounded_pieces(
            importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd").ZstdDecompressor()
        )
    raise BodyError(415, f"the content encoding {encoding[:40]!r} is not known; use gzip, deflate, zstd or lz4")


def _zlib_pieces(decoder: Any) -> Callable[[bytes], Iterator[bytes]]:
    def pieces(part: bytes) -> Iterator[bytes]:
        while part:
            piece = decoder.decompress(part, READ_BYTES)
            part = decoder.unconsumed_tail
            if piece:
                yield piece
            elif not part or decoder.eof:
                return

    return pieces


def _bounded_pieces(decoder: Any) -> Callable[[bytes], Iterator[bytes]]:
    def pieces(part: bytes) -> Iterator[bytes]:
        piece = decoder.decompress(part, READ_BYTES)
        while piece:
            yield piece
            if decoder.eof or decoder.needs_input:
                return
            piece = decoder.decompress(b"", READ_BYTES)

    return pieces


def choose_encoding(accepted: str) -> str:
    """The encoding to answer with, empty for none."""
    names = {part.split(";")[0].strip().lower() for part in accepted.split(",") if not part.replace(" ", "").endswith(";q=0")}
    return next((name for name in ENCODINGS if name in names), "")


def compress(encoding: str, body: bytes) -> bytes:
    """The whole body in ``encoding``."""
    return b"".join(compressed(encoding, iter((body,)))) if encoding else body


def compressed(encoding: str, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The chunks in ``encoding``; empty pieces are left out, since an empty HTTP chunk would end the transfer."""
    if not encoding:
        yield from (chunk for chunk in chunks if chunk)
        return
    if encoding == "lz4":
        coder: Any = importlib.import_module("lz4.frame").LZ4FrameCompressor()
        yield coder.begin()
    else:
        coder = zlib.compressobj(1, zlib.DEFLATED, 31 if encoding == "gzip" else 15)
    for chunk in chunks:
        piece = coder.compress(chunk)
        if piece:
            yield piece
    yield coder.flush()
