"""Where the files in a tar archive are: a walk over its headers, which reads no other bytes and writes nothing.

Reads ustar, GNU's and POSIX's (pax) archives. Python's tarfile ends at a damaged header without a word, and an archive
that lost its second half would pass for a whole one, so the headers are read here: anything but an archive that is
whole to its end mark is an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BLOCK_BYTES = 512
_MOST_NAME_BYTES = 1 << 20  # of the records that hold long names
_MOST_PADDING_BYTES = 1 << 20  # after the end; tar pads to 10 KiB
_ZEROS = bytes(BLOCK_BYTES)
_FOLDER = b"5"
_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Member(NamedTuple):
    """A member of an archive. odd: why it is no file whose bytes are there, "" if it is one."""

    name: str
    start: int
    size: int
    odd: str


class DamagedTar(ValueError):
    """An archive that is not whole, or none."""


def members(path: Path) -> Iterator[Member]:
    """All members but folders, in their order.

    Raises:
        DamagedTar: cut short, damaged, compressed or no tar archive.
        OSError: it cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        yield from _Walk(path, file.fileno()).members()


class _Walk:
    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self._num_bytes = os.fstat(descriptor).st_size
        self._position = 0

    def members(self) -> Iterator[Member]:
        name, size, sparse = "", None, False  # what records before a header say of its member
        while (header := self._header()) is not None:
            kind, length = header[156:157], self._length(header)
            if kind in b"LKxg":
                content = self._record(length)
                if kind == b"L":
                    name = _text(content.split(b"\0", 1)[0])
                elif kind == b"x":
                    fields = self._fields(content)
                    name = _text(fields.get(b"path", name.encode(errors="surrogateescape")))
                    size = self._number(fields[b"size"], 10) if b"size" in fields else size
                    sparse = any(key.startswith(b"GNU.sparse") for key in fields)
                continue
            length = length if size is None else size
            start = self._skip(length if kind not in _KINDS else 0)
            if kind != _FOLDER and not (name or _name(header)).endswith("/"):
                yield Member(name or _name(header), start, length, "a sparse file" if sparse else _oddness(kind))
            name, size, sparse = "", None, False

    def _header(self) -> bytes | None:
        """The next header; None at the end of the archive."""
        header = os.pread(self._descriptor, BLOCK_BYTES, self._position)
        if self._position == 0:
            self._refuse_other_files(header)
        if len(header) < BLOCK_BYTES:
            raise self._damaged("it is cut short: its end mark is not there")
        if header == _ZEROS:
            self._check_end()
            return None
        expected = self._number(header[148:156], 8)
        if sum(header) - sum(header[148:156]) + 8 * 32 != expected:
            raise self._damaged("a header's checksum is wrong")
        self._position += BLOCK_BYTES
        return header

    def _refuse_other_files(self, header: bytes) -> None:
        for start, how in _COMPRESSED.items():
            if header.startswith(start):
                raise DamagedTar(
                    f"{self._path} is compressed with {how}, and images in it cannot be read one by one: unpack it to "
                    "a plain .tar (images do not get smaller by it)"
                )

    def _check_end(self) -> None:
        rest = os.pread(self._descriptor, _MOST_PADDING_BYTES + 1, self._position)
        if len(rest) > _MOST_PADDING_BYTES or rest.strip(b"\0"):
            raise self._damaged("more follows its end mark, as where archives were put one behind the other")

    def _length(self, header: bytes) -> int:
        field = header[124:136]
        if field[0] & 0x80:  # GNU's base 256
            return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        return self._number(field, 8)

    def _number(self, text: bytes, base: int) -> int:
        digits = text.strip(b"\0 ") or b"0"
        if not digits.isdigit() or len(digits) > 20:
            raise self._damaged("a number in a header is none")
        try:
            return int(digits, base)
        except ValueError:
            raise self._damaged("a number in a header is none") from None

    def _record(self, length: int) -> bytes:
        if length > _MOST_NAME_BYTES:
            raise self._damaged(f"a name or its like has {length} bytes, and {_MOST_NAME_BYTES} are the most")
        return os.pread(self._descriptor, length, self._skip(length))

    def _skip(self, length: int) -> int:
        """The position of `length` bytes of content, which are there."""
        start = self._position
        if length > self._num_bytes - start:
            raise self._damaged(f"a member of {length} bytes is announced, and {self._num_bytes - start} follow")
        self._position += -(-length // BLOCK_BYTES) * BLOCK_BYTES
        return start

    def _fields(self, content: bytes) -> dict[bytes, bytes]:
        """pax: lines of "LENGTH KEY=VALUE", the length being that of the whole line."""
        fields, position = {}, 0
        while position < len(content) and content[position : position + 1] != b"\0":
            length, space, _ = content[position : position + 21].partition(b" ")
            end = position + (self._number(length, 10) if space else 0)
            key, equals, value = content[position + len(length) + 1 : end - 1].partition(b"=")
            if end <= position or end > len(content) or not equals:
                raise self._damaged("a record of a name and its like is malformed")
            fields[key] = value
            position = end
        return fields

    def _damaged(self, what: str) -> DamagedTar:
        return DamagedTar(
            f"{self._path} is no whole tar archive: at byte {self._position}, {what}; copy or write it anew, or leave "
            "it out"
        )


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name)


def _text(name: bytes) -> str:
    return name.decode(errors="surrogateescape")


def _oddness(kind: bytes) -> str:
    if kind in _KINDS:
        return _KINDS[kind]
    return "" if kind in (b"0", b"\0", b"7") else f"of an unknown kind ({kind!r})"
