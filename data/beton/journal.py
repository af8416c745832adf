"""What an unfinished conversion has written: a line for each image, beside the partial files that hold its bytes.

A killed process leaves both. The next conversion takes the images whose line is whole and whose bytes have its
checksum, in order, up to the first of which that is not so; so it does not matter what of either reached the disk.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ..decoding.decode import present_decoders
from ..sources import Fingerprinted, Source
from ..whole_files import is_at_path, kept_path
from .encode import EncodedImage, LeftOut

_VERSION = 1  # increase when a conversion's bytes or these lines change
_FLUSH_SECONDS = 1.0


class Noted(NamedTuple):
    """What is noted of an image at one size: as `Encoded`, with the length and the CRC-32 of its bytes."""

    how: str
    height: int
    width: int
    num_bytes: int
    checksum: int


class NotedImage(NamedTuple):
    """What is noted of an image; as `EncodedImage`."""

    sizes: list[Noted]
    label: int
    converted: list[str]
    sums: np.ndarray | None


class Journal:
    """The journal of a conversion to `path`; kept if the conversion is interrupted, as the partial files are.

    Entered before the partial files are, and so left after they have their names or are gone; `open` comes in between.

    Args:
        told: what the bytes depend on, under names for people; None for a source of which that is not known.
        restart: begin with an empty one.

    Attributes:
        differs: which of `told` differ from what the journal that was found says; "" if it is to be continued, or if
            there was none.
        taken: how many of its images this conversion takes over; see `took`.
    """

    def __init__(self, path: Path, told: dict[str, str] | None, *, restart: bool = False) -> None:
        self.differs = ""
        self.taken = 0
        self._path = journal_path(path)
        self._told = told
        self._restart = restart
        self._files: Sequence[BinaryIO] = ()
        self._since = time.monotonic()

    def open(self, files: Sequence[BinaryIO]) -> None:
        """Look for an earlier one. files: the partial files, which this process has locked."""
        self._files = files
        self._file = self._path.open("r+b" if self._path.exists() else "w+b")
        first = _read_line(self._file)
        found = isinstance(first, dict) and "told" in first and not self._restart
        self.differs = _differences(first["told"] or {}, self._told) if found else ""
        self._continues = found and not self.differs
        self._end = self._file.tell() if self._continues else 0

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if not self._files:
            return
        with self._file:
            ended = kind is None or issubclass(kind, Exception)
            if ended and is_at_path(self._file, self._path):  # and not that of the next conversion
                self._path.unlink()

    @contextmanager
    def reading(self) -> Iterator[Iterator[NotedImage | LeftOut]]:
        """The whole lines of an earlier conversion, in order. What `took` did not take is forgotten afterwards."""
        yield self._entries() if self._continues else iter(())
        self._file.seek(self._end)
        self._file.truncate()
        if not self._end:
            self._write_line({"told": self._told})
        self._write_line({"writer": _this_process()})
        self._flush()

    def took(self) -> None:
        """The entry that was read last belongs to this conversion too."""
        self.taken += 1
        self._end = self._file.tell()

    def add(self, item: EncodedImage | LeftOut) -> None:
        """Note an image that has been written to the files."""
        self._write_line(list(item) if isinstance(item, LeftOut) else _noted(item))
        if time.monotonic() - self._since > _FLUSH_SECONDS:
            self._flush()

    def _flush(self) -> None:
        for file in self._files:
            file.flush()
        self._file.flush()
        self._since = time.monotonic()

    def _entries(self) -> Iterator[NotedImage | LeftOut]:
        while (line := _read_line(self._file)) is not None:
            if isinstance(line, list):
                what, reason, label = line
                yield LeftOut(what, reason, label)
            elif "sizes" in line:
                sums = line["sums"]
                sums = None if sums is None else np.frombuffer(base64.b64decode(sums), dtype="<f8").reshape(2, 3)
                yield NotedImage([Noted(*one) for one in line["sizes"]], line["label"], line["converted"], sums)

    def _write_line(self, content: Any) -> None:
        line = json.dumps(content, separators=(",", ":")).encode()
        self._file.write(b"%08x %s\n" % (zlib.crc32(line), line))


def journal_path(path: Path) -> Path:
    """Path of the journal of an unfinished conversion to `path`."""
    return path.with_name(f"{kept_path(path).name}.journal")


def writer_of(path: Path) -> str:
    """Which process is writing, or was the last to write, the unfinished file `path`; "" if that is not known."""
    found = ""
    try:
        with journal_path(path).open("rb") as file:
            while (line := _read_line(file)) is not None:
                found = line.get("writer", found) if isinstance(line, dict) else found
    except OSError:
        return ""
    return found


def conversion_told(source: Source, settings: dict[str, Any]) -> dict[str, str] | None:
    """What the bytes of a conversion depend on, each as text; None if the source cannot tell whether it changed."""
    if not isinstance(source, Fingerprinted):
        return None
    try:
        pillow = version("pillow")
    except PackageNotFoundError:
        pillow = ""
    return {
        "another source": source.fingerprint(),
        "other settings": json.dumps(settings, sort_keys=True),
        "other versions of the programs": json.dumps([_VERSION, pillow, np.__version__, present_decoders()]),
    }


def _differences(found: dict[str, Any], told: dict[str, str] | None) -> str:
    if told is None:
        return "a source that cannot tell whether it has changed"
    return " and ".join(key for key, value in told.items() if found.get(key) != value)


def _noted(image: EncodedImage) -> dict[str, Any]:
    sums = None if image.sums is None else base64.b64encode(image.sums.astype("<f8").tobytes()).decode("ascii")
    sizes = [(one.how, one.height, one.width, len(one.stored), zlib.crc32(one.stored)) for one in image.sizes]
    return {"sizes": sizes, "label": image.label, "converted": image.converted, "sums": sums}


def _read_line(file: BinaryIO) -> Any:
    """The content of the next line; None if it is not whole, or there is none."""
    line = file.readline()
    checksum, space, content = line[:8], line[8:9], line[9:-1]
    if not line.endswith(b"\n") or space != b" " or checksum != b"%08x" % zlib.crc32(content):
        return None
    return json.loads(content)


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
