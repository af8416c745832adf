"""Files that a stranger could send: small, of a valid form, and expensive to read."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image

# A Huffman table with one code, a single zero bit, for one symbol.
_ONE_CODE = bytes([1] + [0] * 15)


def many_scans(scans: int, *, side: int = 64) -> bytes:
    """A gray progressive JPEG of `side` px, at most 64: valid, with so many scans (at most 883), all values 128."""
    blocks = (side // 8) ** 2
    frame = struct.pack(">BHHBBBB", 8, side, side, 1, 1, 0x11, 0)
    parts = [
        b"\xff\xd8",
        _segment(0xDB, bytes([0]) + bytes([1] * 64)),
        _segment(0xC2, frame),
        _segment(0xC4, bytes([0x00]) + _ONE_CODE + b"\x00"),  # no difference to the block before
        _segment(0xC4, bytes([0x10]) + _ONE_CODE + b"\x60"),  # no coefficients in the next 64 to 127 blocks
        _scan(0, 0, 0, 0) + bytes(-(-blocks // 8)),
    ]
    refinements = [(k, 0 if bit == 13 else bit + 1, bit) for k in range(1, 64) for bit in range(13, -1, -1)]
    assert scans - 1 <= len(refinements)
    parts += [_scan(k, k, high, low) + b"\x01" for k, high, low in refinements[: scans - 1]]
    return b"".join([*parts, b"\xff\xd9"])


def huge_jpeg(side: int, *, progressive: bool = False) -> bytes:
    """A JPEG that declares `side` x `side` px, of a few hundred bytes; its data end early."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (9, 99, 199)).save(buffer, format="JPEG", progressive=progressive)
    whole = bytearray(buffer.getvalue())
    start = whole.index(b"\xff\xc2" if progressive else b"\xff\xc0") + 5
    whole[start : start + 4] = struct.pack(">HH", side, side)
    return bytes(whole)


def huge_png(side: int) -> bytes:
    """A PNG of `side` x `side` px of one bit, all there, about a thousandth of its pixels in bytes."""
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    row = bytes(1 + -(-side // 8))
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _segment(kind: int, content: bytes) -> bytes:
    return bytes([0xFF, kind]) + struct.pack(">H", len(content) + 2) + content


def _scan(first: int, last: int, high: int, low: int) -> bytes:
    return _segment(0xDA, bytes([1, 1, 0x00, first, last, high << 4 | low]))


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
