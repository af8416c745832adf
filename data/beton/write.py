"""Any source -> a .beton file, its sidecar, and a report of what could not be stored.

Threads read, resize and encode the images, which releases the GIL; a single thread writes them in the order of the
data. A conversion ends with the file or with an error, and the bytes do not depend on the number of threads.
"""

from __future__ import annotations

import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from ..decoding.decode import Decoder, make_decoder, present_decoders
from ..draws import Operation, uniforms
from ..prefetch import PrefetchIterator
from ..sources import FileSource, Source, channel_sums, mean_and_std, statistics_picks
from ..sources.image_file import (
    UnusableImage,
    conversions,
    fitted_size,
    is_plain_jpeg,
    open_image,
    rgb_pixels,
    shrink,
)
from ..whole_files import whole_file
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
    pack_checksums,
    read_frame,
    report_path,
    sidecar_path,
)

if TYPE_CHECKING:
    from PIL.Image import Image

WRITE_MODES = ("raw", "jpg", "proportion")


def write_beton(
    source: Source,
    path: str | Path,
    *,
    num_workers: int | None = None,
    write_mode: str = "raw",
    jpeg_share: float = 0.5,
    max_side_px: int | None = None,
    jpeg_quality: int = 90,
    strict: bool = True,
    progress: bool = True,
    about: dict[str, Any] | None = None,
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
        jpeg_quality: 1..100, for the images that are encoded.
        strict: raise for an unusable image. Otherwise it is left out and listed, with the reason, in
            `report_path(path)`.
        progress: show a progress bar on stderr.
        about: added to the sidecar under "source", e.g. the source's settings.

    Raises:
        ValueError: bad settings; an empty source; an unusable image, if `strict`; no usable image in the source or in
            a class.
        OSError: `path` cannot be written, or the disk is full.
    """
    path = Path(path)
    num_workers = _num_cores() if num_workers is None else num_workers
    settings = {
        "write_mode": write_mode,
        "jpeg_share": {"raw": 0.0, "jpg": 1.0}.get(write_mode, jpeg_share),
        "max_side_px": max_side_px,
        "jpeg_quality": jpeg_quality,
    }
    _check(source, path, num_workers=num_workers, **settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    encode = partial(
        _encode,
        source,
        jpeg_share=settings["jpeg_share"],
        max_side_px=max_side_px,
        jpeg_quality=jpeg_quality,
        sampled=frozenset(statistics_picks(len(source)).tolist()),
    )
    with ExitStack() as stack:
        file = stack.enter_context(whole_file(path))
        encoded = PrefetchIterator((partial(encode, index) for index in range(len(source))), num_workers=num_workers)
        stack.callback(encoded.close)
        written = _write_file(file, _with_progress(encoded, len(source), progress), source, strict=strict)
        file.flush()
        frame = read_frame(Path(file.name))
        mean, std = mean_and_std(written.sums)
        sidecar = {
            "format_version": SIDECAR_VERSION,
            "source": {"name": source.name} | (about or {}),
            "num_samples": len(frame.labels),
            "class_names": list(source.class_names),
            "class_counts": np.bincount(frame.labels, minlength=len(source.class_names)).tolist(),
            "heights": _least_median_most(frame.images["height"]),
            "widths": _least_median_most(frame.images["width"]),
            "mean": mean,
            "std": std,
            "written_as": settings,
            "stored": dict(written.stored),
            "converted": dict(sorted(written.converted.items())),
            "left_out": len(written.left_out),
            "bytes": frame.num_bytes,
            "checksum": frame.checksum,
            "images_checksum": written.images_checksum,
            "image_checksums": pack_checksums(written.checksums),
        }
        # Write these before the file itself, so that a process that waits for the file finds all three.
        _write_report(report_path(path), written.left_out)
        with whole_file(sidecar_path(path)) as beside:
            beside.write(json.dumps(sidecar, indent=1).encode())
    return path


def default_write_settings(source: str) -> dict[str, Any]:
    """How `source` is stored by default: photographs as JPEGs of up to 500 px, small images as pixels."""
    if source == "folder":
        return {"write_mode": "jpg", "max_side_px": 500, "jpeg_quality": 90}
    return {"write_mode": "raw", "max_side_px": None}


class _Encoded(NamedTuple):
    stored: bytes
    how: str  # "as it was", "jpeg" or "raw"
    height: int
    width: int
    label: int
    converted: list[str]
    sums: np.ndarray | None  # see channel_sums; None unless the image is sampled


class _LeftOut(NamedTuple):
    what: str
    reason: str
    label: int


@dataclass
class _Written:
    stored: Counter[str] = field(default_factory=Counter)
    converted: Counter[str] = field(default_factory=Counter)
    left_out: list[_LeftOut] = field(default_factory=list)
    sums: list[np.ndarray] = field(default_factory=list)
    images_checksum: int = 0
    checksums: list[int] = field(default_factory=list)


def _check(
    source: Source,
    path: Path,
    *,
    num_workers: int,
    write_mode: str,
    jpeg_share: float,
    max_side_px: int | None,
    jpeg_quality: int,
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
    if max_side_px is not None and not 1 <= max_side_px <= MAX_SIDE_PX:
        raise ValueError(f"max_side_px {max_side_px}: give a number from 1 to {MAX_SIDE_PX}, or None")
    if not 1 <= jpeg_quality <= 100:
        raise ValueError(f"jpeg_quality {jpeg_quality}: give a number from 1 to 100")


def _encode(
    source: Source,
    index: int,
    *,
    jpeg_share: float,
    max_side_px: int | None,
    jpeg_quality: int,
    sampled: frozenset[int],
) -> _Encoded | _LeftOut:
    label = source.label(index)
    if not 0 <= label < len(source.class_names):
        raise ValueError(
            f"image {index} of {source.name} cannot be stored: its label is {label}, and there are "
            f"{len(source.class_names)} classes"
        )
    as_jpeg = uniforms(np.array([index]), seed=0, epoch=0, operation=Operation.STORAGE)[0, 0] < jpeg_share
    store = partial(_store, as_jpeg=as_jpeg, max_side_px=max_side_px, jpeg_quality=jpeg_quality, label=label)
    if isinstance(source, FileSource):
        try:
            return _encode_file(source.path(index), store, as_jpeg, max_side_px, sample=index in sampled)
        except UnusableImage as error:
            return _LeftOut(str(source.path(index)), str(error), label)
    try:
        image = source.image(index)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise ValueError(f"a uint8 array [height, width, 3] is needed, not {image.dtype} {list(image.shape)}")
        return store(image, [], channel_sums(image) if index in sampled else None)
    except UnusableImage as error:
        return _LeftOut(f"image {index} of {source.name}", str(error), label)
    except Exception as error:
        raise ValueError(f"image {index} of {source.name} cannot be stored: {error}") from error


def _encode_file(path: Path, store: Any, as_jpeg: bool, max_side_px: int | None, *, sample: bool) -> _Encoded:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnusableImage(f"it cannot be read: {error.strerror}") from error
    image = open_image(data)
    width, height = image.size
    needed = conversions(image)
    kept = as_jpeg and fitted_size(image.size, max_side_px) == image.size and len(data) <= PAGE_BYTES
    kept = kept and is_plain_jpeg(image, data) and _decodes_whole(image, data)
    if not kept:
        # Statistics are of the original images, not the stored ones.
        pixels = rgb_pixels(image, max_side_px=None if sample else max_side_px)
        return store(pixels, needed, channel_sums(pixels) if sample else None)
    sums = channel_sums(rgb_pixels(image)) if sample else None
    return _Encoded(data, "as it was", height, width, store.keywords["label"], needed, sums)


def _decodes_whole(image: Image, data: bytes) -> bool:
    # With the loader's decoder if it is installed: it may be stricter than Pillow.
    decoder = _decoder()
    if decoder is None:
        try:
            rgb_pixels(image)
        except UnusableImage:
            return False
        return True
    width, height = image.size
    out = np.empty((1, 32, 32, 3), dtype=np.uint8)  # small, so that little is done besides reading the file's data
    whole = np.array([[0, 0, height, width, 0]], dtype=np.int32)
    try:
        decoder.decode(_OneJpeg(data, height, width), np.zeros(1, dtype=int), whole, out, exact=False)
    except ValueError:
        return False
    return True


@cache
def _decoder() -> Decoder | None:
    return make_decoder() if present_decoders() else None


class _OneJpeg:
    # A single image in memory, as StoredImages.
    path = Path("image")

    def __init__(self, data: bytes, height: int, width: int) -> None:
        self._bytes = np.frombuffer(data, dtype=np.uint8)
        self.heights, self.widths = np.array([height]), np.array([width])

    def addresses(self, indices: np.ndarray) -> np.ndarray:
        return np.full(len(indices), self._bytes.ctypes.data, dtype=np.uint64)

    def num_bytes(self, indices: np.ndarray) -> np.ndarray:
        return np.full(len(indices), self._bytes.size, dtype=np.int64)

    def image_bytes(self, index: int) -> np.ndarray:
        return self._bytes

    def is_jpeg(self, index: int | np.ndarray) -> np.ndarray:
        return np.ones_like(index, dtype=bool)

    def checksums(self, indices: np.ndarray) -> None:
        return None


def _store(
    pixels: np.ndarray,
    converted: list[str],
    sums: np.ndarray | None,
    *,
    as_jpeg: bool,
    max_side_px: int | None,
    jpeg_quality: int,
    label: int,
) -> _Encoded:
    from PIL import Image as pillow

    image = pillow.fromarray(pixels)
    image = shrink(image, fitted_size(image.size, max_side_px))
    width, height = image.size
    if max(height, width) > MAX_SIDE_PX:
        raise UnusableImage(f"a side of {max(height, width)} px; the format holds {MAX_SIDE_PX}: give a max_side_px")
    if as_jpeg:
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=jpeg_quality)
        stored = buffer.getvalue()
    else:
        stored = image.tobytes()
    if len(stored) > PAGE_BYTES:
        raise UnusableImage(
            f"{height}x{width} px take {len(stored)} bytes, and a page of the file {PAGE_BYTES}: give a max_side_px, "
            "or write_mode 'jpg'"
        )
    return _Encoded(stored, "jpeg" if as_jpeg else "raw", height, width, label, converted, sums)


def _write_file(file: BinaryIO, encoded: Iterable[_Encoded | _LeftOut], source: Source, *, strict: bool) -> _Written:
    row = np.dtype([("", FIELD_METADATA[IMAGE_FIELD]), ("", FIELD_METADATA[INT_FIELD])], align=True)
    fields = np.zeros(2, dtype=FIELD)
    for descriptor, type_id, name in zip(fields, (IMAGE_FIELD, INT_FIELD), (b"image", b"label"), strict=True):
        descriptor["type_id"] = type_id
        descriptor["name"][: len(name)] = list(name)
    rows, table = np.zeros(len(source), dtype=row), np.zeros(len(source), dtype=ALLOCATION)
    position = _next_page(HEADER.itemsize + fields.nbytes + rows.nbytes)
    written, count = _Written(), 0
    for item in encoded:
        if isinstance(item, _LeftOut):
            if strict:
                raise ValueError(
                    f"{item.what} cannot be stored: {item.reason}. Repair or remove it, or convert without strict"
                )
            written.left_out.append(item)
            continue
        # No image spans two pages: FFCV reads page by page.
        if position + len(item.stored) > _next_page(position):
            position = _next_page(position)
        file.seek(position)
        file.write(item.stored)
        mode = MODES["raw" if item.how == "raw" else "jpg"]
        rows[count] = ((mode, item.width, item.height, position), item.label)
        table[count] = (count, position, len(item.stored))
        count += 1
        position += len(item.stored)
        written.stored[item.how] += 1
        written.converted.update(item.converted)
        written.images_checksum = zlib.crc32(item.stored, written.images_checksum)
        written.checksums.append(zlib.crc32(item.stored))
        if item.sums is not None:
            written.sums.append(item.sums)
    _refuse_empty_classes(source, rows[:count]["f1"], written.left_out)
    table_start = _next_page(position)
    file.seek(table_start)
    file.write(table[:count].tobytes())
    header = np.array([(VERSION, len(fields), PAGE_BYTES, count, table_start)], dtype=HEADER)
    file.seek(0)
    file.write(header.tobytes() + fields.tobytes() + rows[:count].tobytes())
    return written


def _refuse_empty_classes(source: Source, labels: np.ndarray, left_out: list[_LeftOut]) -> None:
    if not left_out:
        return
    lost = sorted({item.label for item in left_out} - set(labels.tolist()))
    if lost:
        names = ", ".join(source.class_names[label] for label in lost)
        first = next(item for item in left_out if item.label == lost[0])
        raise ValueError(
            f"no image of {names} in {source.name} can be used; the first is {first.what}: {first.reason}. Repair the "
            "images, or remove the class"
        )


def _write_report(path: Path, left_out: list[_LeftOut]) -> None:
    if not left_out:
        path.unlink(missing_ok=True)  # from an earlier conversion
        return
    with whole_file(path) as file:
        # File names may contain anything, even line breaks.
        for item in left_out:
            what = item.what.replace("\n", "\\n").replace("\t", "\\t")
            file.write(f"{what}\t{' '.join(item.reason.split())}\n".encode(errors="backslashreplace"))


def _num_cores() -> int:
    # Those that this process may use; a shared machine may have more.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _least_median_most(values: np.ndarray) -> list[int]:
    return [int(values.min()), int(np.median(values)), int(values.max())]


def _next_page(position: int) -> int:
    # The first page boundary at or after `position`.
    return -(-position // PAGE_BYTES) * PAGE_BYTES


def _with_progress(encoded: PrefetchIterator[_Encoded | _LeftOut], num_samples: int, progress: bool) -> Any:
    if not progress:
        return encoded
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:  # tqdm comes with the extras; without it there is no bar
        return encoded
    return tqdm(encoded, total=num_samples, unit="images", desc="converting", leave=False, disable=None)
