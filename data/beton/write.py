"""Any source -> a .beton file, its sidecar, and a report of what could not be stored; at one image size or several.

Threads read, resize and encode the images, which releases the GIL; a single thread writes them in the order of the
data. A conversion ends with the file or with an error, and the bytes do not depend on the number of threads.
"""

from __future__ import annotations

import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ..decoding.native_decode import NativeDecoder
from ..prefetch import PrefetchIterator
from ..sources import OF_FILES, Odd, Source, mean_and_std, odd_of, statistics_picks
from ..whole_files import kept_file, whole_file
from .encode import Encoded, EncodedImage, Encoding, LeftOut, encode_image
from .format import (
    ALLOCATION,
    FIELD,
    FIELD_METADATA,
    HEADER,
    IMAGE_FIELD,
    INT_FIELD,
    MAX_SIDE_PX,
    MODES,
    PAGE_BYTES,
    SIDECAR_VERSION,
    VERSION,
    Frame,
    check_sizes,
    pack_checksums,
    read_frame,
    report_path,
    sidecar_path,
    tier_path,
)
from .journal import Journal, Noted, conversion_told

WRITE_MODES = ("raw", "jpg", "proportion")


def write_beton(
    source: Source,
    path: str | Path,
    *,
    num_workers: int | None = None,
    write_mode: str = "raw",
    jpeg_share: float = 0.5,
    max_side_px: int | None = None,
    sizes: Sequence[int] | None = None,
    jpeg_quality: int = 90,
    restart_rows: bool = False,
    strict: bool = True,
    progress: bool = True,
    about: dict[str, Any] | None = None,
    resumable: bool = False,
    restart: bool = False,
    say: Callable[[str], Any] = lambda text: None,
) -> Path:
    """Write `source` to a .beton file and its sidecar: both completely, or neither.

    To be stored as JPEG, a JPEG file that is upright, has three channels and needs no resizing is copied byte for byte,
    after a test that it decodes completely. All others are decoded (see `data.sources.image_file`), downscaled if
    requested, and encoded.

    Args:
        num_workers: threads that read, resize and encode; 0 uses the calling thread, None one per core.
        write_mode: "raw" keeps pixels (largest, fastest to read), "jpg" compresses them, "proportion" compresses a
            share of the images, chosen by a hash of their index.
        jpeg_share: that share, 0..1.
        max_side_px: images with a longer side are downscaled, keeping the aspect ratio. None keeps every size.
        sizes: in place of `max_side_px`, several of it, in px: `path` holds the images at the largest, and
            `tier_path(path, size)` at each other size, for stages that need no more (see `data.beton.tiers`). Every
            file has the bytes that a conversion at that size alone would write, from images that are decoded once.
        jpeg_quality: 1..100, for the images that are encoded.
        restart_rows: JPEGs get a restart marker after each row of blocks, which lets the native decoder begin near a
            crop; pixels stay the same. Baseline JPEGs that would be copied are rewritten, without their metadata.
        strict: raise for an unusable image. Otherwise it is left out, at every size, and listed with the reason in
            `report_path(path)`.
        progress: show a progress bar on stderr.
        about: added to the sidecar under "source", e.g. the source's settings.
        resumable: keep what was written when a KeyboardInterrupt or a kill ends the conversion; the next one of the
            same source with the same settings goes on from there, to the same bytes. The source needs a
            `fingerprint()`, as those of `data.sources` have; any other begins anew.
        restart: with `resumable`, do not go on from what is there.
        say: is told, with `resumable`, whether the conversion goes on from an earlier one.

    Raises:
        BeingWrittenError: with `resumable`, another process is converting to `path` (a ValueError).
        ValueError: bad settings; an empty source; an unusable image, if `strict`; no usable image in the source or in
            a class.
        OSError: `path` cannot be written, or the disk is full.
        ModuleNotFoundError: `restart_rows` without the native decoder.
    """
    path = Path(path)
    num_workers = _num_cores() if num_workers is None else num_workers
    settings = {
        "write_mode": write_mode,
        "jpeg_share": {"raw": 0.0, "jpg": 1.0}.get(write_mode, jpeg_share),
    }
    _check(source, path, num_workers=num_workers, jpeg_quality=jpeg_quality, **settings)
    sides = _largest_first(max_side_px, sizes)
    odd = odd_of(source)
    if strict and odd:
        raise ValueError(
            f"{odd[0].where} cannot be stored: {odd[0].reason}. Repair or remove it, or convert without strict"
        )
    if restart_rows:
        NativeDecoder()  # raises before anything is written, with what to do, if it is not there
    path.parent.mkdir(parents=True, exist_ok=True)
    encoding = Encoding(
        settings["jpeg_share"],
        jpeg_quality,
        sides,
        sampled=frozenset(statistics_picks(len(source)).tolist()),
        restart_rows=restart_rows,
    )
    encode = partial(encode_image, source, encoding=encoding)
    paths = [path, *(tier_path(path, side) for side in sides[1:] if side is not None)]
    beside = kept_file if resumable else whole_file
    with ExitStack() as stack:
        journal = None
        if resumable:
            told = {"strict": strict, "sizes": list(sides), "jpeg_quality": jpeg_quality, "restart_rows": restart_rows}
            journal = stack.enter_context(Journal(path, conversion_told(source, told | settings), restart=restart))
        # The largest file is renamed last, so that a process that waits for it finds all of them.
        opened = [stack.enter_context(beside(one)) for one in paths]
        files = [_File(file, source) for file in opened]
        written = _Written()
        if journal is not None:
            journal.open(opened)
        begin = 0 if journal is None else _restore(journal, files, written, len(source), say)
        tasks = (partial(encode, index) for index in range(begin, len(source)))
        encoded = PrefetchIterator(tasks, num_workers=num_workers)
        stack.callback(encoded.close)
        _write(files, _with_progress(encoded, begin, len(source), progress), written, journal, strict=strict)
        _refuse_empty_classes(source, written.labels, written.left_out)
        tiers = {str(side): file.images_checksum for side, file in zip(sides[1:], files[1:], strict=True)}
        for one, file, side in reversed(list(zip(paths, files, sides, strict=True))):
            written_as = settings | {"max_side_px": side, "jpeg_quality": jpeg_quality}
            if restart_rows:
                written_as["restart_rows"] = True
            sidecar = _sidecar(source, file.end(), written, written_as, about or {})
            if file is files[0] and tiers:
                sidecar["tiers"] = tiers
            # Write these before the file itself, so that a process that waits for the file finds all three.
            _write_report(report_path(one), odd, written.left_out)
            with whole_file(sidecar_path(one)) as described:
                described.write(json.dumps(sidecar, indent=1).encode())
    return path


def default_write_settings(source: str) -> dict[str, Any]:
    """How `source` is stored by default: photographs as JPEGs of up to 500 px, small images as pixels."""
    if source in OF_FILES:
        return {"write_mode": "jpg", "max_side_px": 500, "jpeg_quality": 90}
    return {"write_mode": "raw", "max_side_px": None}


def with_sizes(settings: dict[str, Any], sizes: Sequence[int] | None) -> dict[str, Any]:
    """Write settings with `sizes` in place of their `max_side_px`; unchanged for None."""
    if sizes is None:
        return settings
    return {key: value for key, value in settings.items() if key != "max_side_px"} | {"sizes": sorted(sizes)}


class _Written:
    """What was found out while the images were written, whatever their size."""

    def __init__(self) -> None:
        self.converted: Counter[str] = Counter()
        self.left_out: list[LeftOut] = []
        self.sums: list[np.ndarray] = []
        self.labels: list[int] = []

    def take(self, label: int, converted: Iterable[str], sums: np.ndarray | None) -> None:
        """Note an image that was stored."""
        self.labels.append(label)
        self.converted.update(converted)
        if sums is not None:
            self.sums.append(sums)


def _check(
    source: Source, path: Path, *, num_workers: int, write_mode: str, jpeg_share: float, jpeg_quality: int
) -> None:
    if len(source) == 0:
        raise ValueError(f"{source.name} has no images: a .beton file holds at least one")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the name of the file to write, as {path}/train.beton")
    if num_workers < 0:
        raise ValueError(f"num_workers {num_workers}: give a whole number of at least 0")
    if write_mode not in WRITE_MODES:
        raise ValueError(f"write_mode {write_mode!r}: give one of {', '.join(WRITE_MODES)}")
    if not 0 <= jpeg_share <= 1:
        raise ValueError(f"jpeg_share {jpeg_share}: give a number from 0 to 1")
    if not 1 <= jpeg_quality <= 100:
        raise ValueError(f"jpeg_quality {jpeg_quality}: give a number from 1 to 100")


def _largest_first(max_side_px: int | None, sizes: Sequence[int] | None) -> tuple[int | None, ...]:
    if max_side_px is not None and not 1 <= max_side_px <= MAX_SIDE_PX:
        raise ValueError(f"max_side_px {max_side_px}: give a number from 1 to {MAX_SIDE_PX}, or None")
    if sizes is None:
        return (max_side_px,)
    if max_side_px is not None:
        raise ValueError(f"max_side_px {max_side_px} beside sizes: give one of them; the largest size is the limit")
    check_sizes(sizes)
    return tuple(sorted(sizes, reverse=True))


def _restore(
    journal: Journal, files: Sequence[_File], written: _Written, num_samples: int, say: Callable[[str], Any]
) -> int:
    """Take what an earlier conversion wrote, as far as its bytes are there and right; returns the number of images."""
    if journal.differs:
        say(f"what an earlier conversion has left is of {journal.differs}: beginning anew")
    with journal.reading() as entries:
        for entry in entries:
            if isinstance(entry, LeftOut):
                written.left_out.append(entry)
                journal.took()
                continue
            stored = [file.read_back(one) for file, one in zip(files, entry.sizes, strict=True)]
            if any(content is None for content in stored):
                break
            for file, one, content in zip(files, entry.sizes, stored, strict=True):
                file.note(Encoded(content or b"", one.how, one.height, one.width), entry.label)
            written.take(entry.label, entry.converted, entry.sums)
            journal.took()
    for file in files:
        file.forget_the_rest()
    if journal.taken:
        say(f"going on after {journal.taken} of {num_samples} images, which an earlier conversion has written")
    return journal.taken


def _write(files: Sequence[_File], encoded: Any, written: _Written, journal: Journal | None, *, strict: bool) -> None:
    for item in encoded:
        if isinstance(item, LeftOut):
            if strict:
                raise ValueError(
                    f"{item.what} cannot be stored: {item.reason}. Repair or remove it, or convert without strict"
                )
            written.left_out.append(item)
        else:
            for file, one in zip(files, item.sizes, strict=True):
                file.add(one, item.label)
            written.take(item.label, item.converted, item.sums)
        if journal is not None:
            journal.add(item)


class _File:
    """The images of a .beton file at one size, as they are written.

    Attributes:
        images_checksum: CRC-32 of all stored bytes so far.
    """

    def __init__(self, file: BinaryIO, source: Source) -> None:
        row = np.dtype([("", FIELD_METADATA[IMAGE_FIELD]), ("", FIELD_METADATA[INT_FIELD])], align=True)
        self.images_checksum = 0
        self._file = file
        self._fields = np.zeros(2, dtype=FIELD)
        for descriptor, type_id, name in zip(self._fields, (IMAGE_FIELD, INT_FIELD), (b"image", b"label"), strict=True):
            descriptor["type_id"] = type_id
            descriptor["name"][: len(name)] = list(name)
        self._rows, self._table = np.zeros(len(source), dtype=row), np.zeros(len(source), dtype=ALLOCATION)
        self._position = _next_page(HEADER.itemsize + self._fields.nbytes + self._rows.nbytes)
        self._stored: Counter[str] = Counter()
        self._checksums: list[int] = []

    def add(self, image: Encoded, label: int) -> None:
        """Write the next image."""
        self._file.seek(self._place(len(image.stored)))
        self._file.write(image.stored)
        self.note(image, label)

    def note(self, image: Encoded, label: int) -> None:
        """Take the next image, whose bytes are in the file."""
        mode, count = MODES["raw" if image.how == "raw" else "jpg"], len(self._checksums)
        start = self._place(len(image.stored))
        self._rows[count] = ((mode, image.width, image.height, start), label)
        self._table[count] = (count, start, len(image.stored))
        self._position = start + len(image.stored)
        self._stored[image.how] += 1
        self.images_checksum = zlib.crc32(image.stored, self.images_checksum)
        self._checksums.append(zlib.crc32(image.stored))

    def read_back(self, noted: Noted) -> bytes | None:
        """The bytes of the next image, as an earlier conversion wrote it; None if they are not there."""
        self._file.seek(self._place(noted.num_bytes))
        content = self._file.read(noted.num_bytes)
        return content if zlib.crc32(content) == noted.checksum and len(content) == noted.num_bytes else None

    def forget_the_rest(self) -> None:
        """Remove what follows the images so far, so that gaps between pages hold zeros as in a new file."""
        self._file.truncate(self._position if self._checksums else 0)

    def _place(self, num_bytes: int) -> int:
        # No image spans two pages: FFCV reads page by page.
        end = _next_page(self._position)
        return end if self._position + num_bytes > end else self._position

    def end(self) -> _Contents:
        """Write what comes before and after the images."""
        count, table_start = len(self._checksums), _next_page(self._position)
        self._file.seek(table_start)
        self._file.write(self._table[:count].tobytes())
        header = np.array([(VERSION, len(self._fields), PAGE_BYTES, count, table_start)], dtype=HEADER)
        self._file.seek(0)
        self._file.write(header.tobytes() + self._fields.tobytes() + self._rows[:count].tobytes())
        self._file.flush()
        frame = read_frame(Path(self._file.name))
        return _Contents(frame, dict(self._stored), self.images_checksum, self._checksums)


class _Contents(NamedTuple):
    """What a file holds, for its sidecar."""

    frame: Frame
    stored: dict[str, int]
    images_checksum: int
    checksums: list[int]


def _sidecar(
    source: Source, contents: _Contents, written: _Written, written_as: dict[str, Any], about: dict[str, Any]
) -> dict[str, Any]:
    frame = contents.frame
    mean, std = mean_and_std(written.sums)
    return {
        "format_version": SIDECAR_VERSION,
        "source": {"name": source.name} | about,
        "num_samples": len(frame.labels),
        "class_names": list(source.class_names),
        "class_counts": np.bincount(frame.labels, minlength=len(source.class_names)).tolist(),
        "heights": _least_median_most(frame.images["height"]),
        "widths": _least_median_most(frame.images["width"]),
        "mean": mean,
        "std": std,
        "written_as": written_as,
        "stored": contents.stored,
        "converted": dict(sorted(written.converted.items())),
        "left_out": len(odd_of(source)) + len(written.left_out),
        "bytes": frame.num_bytes,
        "checksum": frame.checksum,
        "images_checksum": contents.images_checksum,
        "image_checksums": pack_checksums(contents.checksums),
    }


def _refuse_empty_classes(source: Source, labels: list[int], left_out: list[LeftOut]) -> None:
    if not left_out:
        return
    lost = sorted({item.label for item in left_out} - set(labels))
    if lost:
        names = ", ".join(source.class_names[label] for label in lost)
        first = next(item for item in left_out if item.label == lost[0])
        raise ValueError(
            f"no image of {names} in {source.name} can be used; the first is {first.what}: {first.reason}. Repair the "
            "images, or remove the class"
        )


def _write_report(path: Path, odd: Sequence[Odd], left_out: Sequence[LeftOut]) -> None:
    found = [*odd, *((item.what, item.reason) for item in left_out)]
    if not found:
        path.unlink(missing_ok=True)  # from an earlier conversion
        return
    with whole_file(path) as file:
        # File names may contain anything, even line breaks.
        for what, reason in found:
            what = what.replace("\n", "\\n").replace("\t", "\\t")
            file.write(f"{what}\t{' '.join(reason.split())}\n".encode(errors="backslashreplace"))


def _num_cores() -> int:
    # Those that this process may use; a shared machine may have more.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _least_median_most(values: np.ndarray) -> list[int]:
    return [int(values.min()), int(np.median(values)), int(values.max())]


def _next_page(position: int) -> int:
    # The first page boundary at or after `position`.
    return -(-position // PAGE_BYTES) * PAGE_BYTES


def _with_progress(
    encoded: PrefetchIterator[EncodedImage | LeftOut], begin: int, num_samples: int, progress: bool
) -> Any:
    if not progress:
        return encoded
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:  # tqdm comes with the extras; without it there is no bar
        return encoded
    return tqdm(encoded, initial=begin, total=num_samples, unit="images", desc="converting", leave=False, disable=None)
