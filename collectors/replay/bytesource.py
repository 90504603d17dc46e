"""A file, plain, gzip or zip, in; its decompressed bytes in chunks out. What a compressed file still holds before a break is given out.

Compression is told by the first bytes, never by the name; a name that promises gzip or zip for something else is an error, because
such a file is nearly always a saved error page.
"""

from __future__ import annotations

import errno
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

from collectors.replay.errors import FileAccessError, FormatError, TruncatedError

_READ_BYTES: Final = 1 << 20
_GZIP_STEP_BYTES: Final = 1 << 14
"""A step that breaks loses what it had decoded: small steps lose little. 16 KiB cost 2 % against 1 MiB."""
_GZIP_OUT_BYTES: Final = 1 << 22
"""One step of zeros would unpack to 16 MiB: it comes in pieces."""
_GZIP: Final = b"\x1f\x8b"
_ZIP: Final = b"PK\x03\x04"
_EMPTY_ZIP: Final = b"PK\x05\x06"
_ZSTD: Final = b"\x28\xb5\x2f\xfd"


class ByteSource:
    """One opened-on-demand file. ``position_bytes`` of ``size_bytes`` (both on disk) say how far reading is."""

    def __init__(self, path: Path) -> None:
        """Look at the first bytes of ``path``. Raises FileAccessError or FormatError (broken or misnamed archive)."""
        self.path = path
        self.position_bytes = 0
        self.compression = ""
        """``gzip``, ``zip`` or empty."""
        try:
            if path.is_dir():
                raise FileAccessError(path, "is a folder; name a file in it.")
            self.size_bytes = path.stat().st_size
            with path.open("rb") as file:
                self._magic = file.read(4)
        except OSError as exc:
            raise access_error(path, exc) from exc
        self._recognise()

    def _recognise(self) -> None:
        suffix = self.path.suffix.lower()
        if self._magic.startswith(_GZIP):
            self.compression = "gzip"
        elif self._magic == _ZIP:
            self.compression = "zip"
        elif self._magic == _EMPTY_ZIP:
            raise FormatError(self.path, "is a zip archive without a member; download it again.")
        elif self._magic == _ZSTD:
            raise FormatError(self.path, "is zstd-compressed, which is not read; decompress it (zstd -d) and replay the result.")
        elif suffix in (".gz", ".gzip", ".zip") and self.size_bytes:
            raise FormatError(
                self.path,
                f"is named {suffix} but does not begin like one (first bytes {self._magic.hex(' ')}); rename it if it is plain text, "
                "download it again otherwise.",
            )

    def head(self, size: int) -> bytes:
        """The first ``size`` decompressed bytes, or fewer when the file is shorter or breaks before."""
        found = b""
        try:
            for chunk in self.chunks():
                found += chunk
                if len(found) >= size:
                    break
        except TruncatedError:
            if not found:
                raise
        return found[:size]

    def chunks(self) -> Iterator[bytes]:
        """Decompressed bytes from the start, in pieces of about 1 to 4 MiB.

        Raises TruncatedError when the file ends or breaks early, after everything before that was given out; FileAccessError
        when the disk cannot be read.
        """
        self.position_bytes = 0
        try:
            if self.compression == "zip":
                yield from self._zip_chunks()
                return
            with self.path.open("rb") as file:
                yield from self._gzip_chunks(file) if self.compression == "gzip" else self._plain_chunks(file)
        except OSError as exc:
            raise access_error(self.path, exc) from exc

    def _plain_chunks(self, file: IO[bytes]) -> Iterator[bytes]:
        while data := file.read(_READ_BYTES):
            self.position_bytes += len(data)
            yield data

    def _gzip_chunks(self, file: IO[bytes]) -> Iterator[bytes]:
        # zlib and not the gzip module: that one throws away what it had decoded when the stream breaks
        decoder = zlib.decompressobj(wbits=31)
        while piece := file.read(_GZIP_STEP_BYTES):
            self.position_bytes += len(piece)
            while piece:
                if decoder.eof:  # another member, or zero padding, which gzip allows
                    piece = piece.lstrip(b"\0")
                    if not piece:
                        break
                    decoder = zlib.decompressobj(wbits=31)
                try:
                    out = decoder.decompress(piece, _GZIP_OUT_BYTES)
                except zlib.error as exc:
                    raise TruncatedError(self.path, f"the gzip stream is damaged ({exc})") from exc
                if out:
                    yield out
                piece = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
        if not decoder.eof and (rest := decoder.flush()):  # what the bounded output above held back
            yield rest
        if not decoder.eof:
            raise TruncatedError(self.path, "the gzip stream ends early")

    def _zip_chunks(self) -> Iterator[bytes]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                member = self._only_member(archive)
                with archive.open(member) as file:
                    done = 0
                    while data := file.read(_READ_BYTES):
                        done += len(data)
                        self.position_bytes = self.size_bytes * done // max(member.file_size, 1)
                        yield data
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as exc:
            if isinstance(exc, OSError) and exc.errno != errno.EINVAL:  # a damaged directory makes it seek before the start
                raise
            if self.position_bytes:
                raise TruncatedError(self.path, f"the zip member is damaged ({exc})") from exc
            raise FormatError(self.path, f"is a broken or incomplete zip archive ({exc}); download it again.") from exc
        except (NotImplementedError, RuntimeError) as exc:  # encrypted, or a compression this Python does not have
            raise FormatError(self.path, f"cannot be unpacked ({exc}); unpack it yourself and replay the result.") from exc

    def _only_member(self, archive: zipfile.ZipFile) -> zipfile.ZipInfo:
        members = [item for item in archive.infolist() if not item.is_dir()]
        if len(members) == 1:
            return members[0]
        names = ", ".join(item.filename for item in members[:5]) + (", ..." if len(members) > 5 else "")
        what = f"holds {len(members)} files ({names})" if members else "is a zip archive without a file"
        raise FormatError(self.path, f"{what}; unpack it and replay one file at a time.")


def access_error(path: Path, exc: OSError) -> FileAccessError:
    """The error for ``exc``, met while opening or reading ``path``."""
    if isinstance(exc, FileNotFoundError | NotADirectoryError):
        return FileAccessError(path, "does not exist; check the name.")
    if isinstance(exc, PermissionError):
        return FileAccessError(path, "may not be read by this user; change its permissions (chmod u+r).")
    return FileAccessError(path, f"cannot be read ({exc.strerror or exc}); check the disk.")
