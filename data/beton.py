"""FFCV's .beton file, written and read with numpy alone.

Layout: header, one descriptor a field, one metadata row an image, pages of 8 MiB with the images' bytes, and a table
of allocations at the end. Beside it lies `<file>.json` with what the format has no place for.

FFCV's own writer waits for ever once a worker process dies, and importing it takes seconds. This one encodes in
threads and writes in one place, in the order of the data: it ends with the file or with an error, and the bytes do not
depend on the number of workers. FFCV's reader reads these files, and this one reads FFCV's.
"""

from __future__ import annotations

import io
import json
import os
import zlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

import numpy as np

from data.prefetch import PrefetchIterator
from data.sources import Source, channel_statistics

if TYPE_CHECKING:
    from PIL.Image import Image

# Little-endian and packed as FFCV 1.0 has them (its types.py, fields/basics.py and fields/rgb_image.py).
_HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("table_start", "<u8"),
    ],
    align=True,
)
_FIELD = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
_ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
_FIELD_METADATA = {
    0: np.dtype("<f8"),  # FloatField
    1: np.dtype("<i8"),  # IntField
    2: np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")]),  # RGBImageField
}
_INT_FIELD, _IMAGE_FIELD = 1, 2
_VERSION = 2
_PAGE_BYTES = 8 << 20
_MAX_SIDE_PX = 65_535
_MODES = {"jpg": 0, "raw": 1}
_SIDECAR_VERSION = 1
_IMAGENET_MEAN = (123.675, 116.28, 103.53)
_IMAGENET_STD = (58.395, 57.12, 57.375)


class Beton:
    """A .beton file with one image field and one integer field, opened for reading.

    Opening checks the whole frame: a file that is cut short, foreign or not the one its sidecar describes is refused
    here, because read as it is it would give black images with plausible labels.

    Attributes:
        labels, heights, widths: int64 [N]; heights and widths in px.
        class_names: from the sidecar, else the labels' numbers.
        mean, std: per channel on the 0..255 scale; from the sidecar, else ImageNet's.
        described: whether there is a sidecar. Files that FFCV itself wrote have none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole .beton file, or not the one that the sidecar describes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(
                f"no file {self.path}: correct the path, or write it with: python -m data.convert SOURCE {self.path}"
            )
        frame = _read_frame(self.path)
        self.labels = frame.labels
        self.heights = frame.images["height"].astype(np.int64)
        self.widths = frame.images["width"].astype(np.int64)
        self._modes = frame.images["mode"].copy()
        self._starts = frame.images["data_ptr"].astype(np.int64)
        self._sizes = frame.sizes
        # A plain view: slicing np.memmap itself costs microseconds, and there is one slice an image.
        self._bytes = np.memmap(self.path, dtype=np.uint8, mode="r").view(np.ndarray)
        sidecar = _read_sidecar(self.path, frame)
        self.described = sidecar is not None
        sidecar = sidecar or {}
        names = sidecar.get("class_names") or [str(i) for i in range(int(self.labels.max()) + 1)]
        self.class_names: tuple[str, ...] = tuple(names)
        self.mean: tuple[float, float, float] = tuple(sidecar.get("mean", _IMAGENET_MEAN))
        self.std: tuple[float, float, float] = tuple(sidecar.get("std", _IMAGENET_STD))

    def __len__(self) -> int:
        return len(self.labels)

    def image_bytes(self, index: int) -> np.ndarray:
        """uint8 [size]: the stored bytes of an image, a view into the file."""
        start = self._starts[index]
        return self._bytes[start : start + self._sizes[index]]

    def is_jpeg(self, index: int) -> bool:
        """Whether the stored bytes are a JPEG file; otherwise they are pixels, [height, width, 3] RGB."""
        return bool(self._modes[index] == _MODES["jpg"])


def write_beton(
    source: Source,
    path: str | Path,
    *,
    num_workers: int = 2,
    write_mode: str = "raw",
    max_side_px: int | None = None,
    jpeg_quality: int = 90,
    progress: bool = True,
    about: dict[str, Any] | None = None,
) -> Path:
    """Write `source` to a .beton file and its sidecar; either both are there whole, or nothing is.

    Args:
        num_workers: threads that decode, resize and encode.
        write_mode: "raw" keeps pixels (largest, fastest to read), "jpg" compresses them.
        max_side_px: images with a longer side are made smaller, keeping their shape. None keeps every size.
        jpeg_quality: 1..100, for "jpg".
        progress: show a progress bar on stderr.
        about: put into the sidecar under "source", e.g. the settings that the source was made with.

    Raises:
        ValueError: an image that cannot be read or stored, with its index; bad settings; an empty source.
    """
    path = Path(path)
    _check_write_settings(source, num_workers, write_mode, max_side_px, jpeg_quality)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{uuid4().hex[:8]}.partial")
    settings = {"write_mode": write_mode, "max_side_px": max_side_px, "jpeg_quality": jpeg_quality}
    tasks = (partial(_encode, source, index, **settings) for index in range(len(source)))
    try:
        encoded = PrefetchIterator(tasks, num_workers=num_workers)
        try:
            _write_file(beside, encoded, len(source), progress=progress)
        finally:
            encoded.close()
        mean, std = channel_statistics(source)
        frame = _read_frame(beside)
        sidecar = {
            "format_version": _SIDECAR_VERSION,
            "source": {"name": source.name} | (about or {}),
            "num_samples": len(source),
            "class_names": list(source.class_names),
            "mean": mean,
            "std": std,
            "written_as": settings,
            "bytes": frame.num_bytes,
            "checksum": frame.checksum,
        }
        _replace_sidecar(path, sidecar)
        # The sidecar first: whoever waits for the .beton may then count on both.
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def sidecar_path(path: str | Path) -> Path:
    """Where the description of a .beton file lies."""
    return Path(f"{path}.json")


class _Frame(NamedTuple):
    images: np.ndarray  # metadata of the image field [N]
    labels: np.ndarray  # int64 [N]
    sizes: np.ndarray  # stored bytes of each image, int64 [N]
    num_bytes: int
    checksum: int  # of everything but the pages


class _Encoded(NamedTuple):
    stored: bytes
    height: int
    width: int
    label: int
    mode: int


def _read_frame(path: Path) -> _Frame:
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEADER.itemsize)
        if len(head) < _HEADER.itemsize:
            raise _broken(path, f"it has {num_bytes} bytes, fewer than a header")
        header = np.frombuffer(head, dtype=_HEADER)[0]
        num_samples, num_fields, table_start = (int(header[k]) for k in ("num_samples", "num_fields", "table_start"))
        if header["version"] != _VERSION or not 0 < num_fields < 64 or num_samples == 0:
            raise _broken(path, "it does not begin with the header of a .beton file of version 2 that holds images")
        raw_fields = file.read(num_fields * _FIELD.itemsize)
        if len(raw_fields) < num_fields * _FIELD.itemsize:
            raise _broken(path, "it is cut short inside its field descriptors")
        row, image_name, label_name = _metadata_row(path, np.frombuffer(raw_fields, dtype=_FIELD))
        pages_start = file.tell() + num_samples * row.itemsize
        if not pages_start <= table_start <= num_bytes:
            raise _broken(path, f"it is cut short: {num_bytes} bytes, and its allocation table begins at {table_start}")
        raw_rows = file.read(num_samples * row.itemsize)
        file.seek(table_start)
        raw_table = file.read()
    if len(raw_table) != num_samples * _ALLOCATION.itemsize:
        raise _broken(
            path,
            f"its allocation table has {len(raw_table)} bytes, and {num_samples} images make "
            f"{num_samples * _ALLOCATION.itemsize}",
        )
    rows, table = np.frombuffer(raw_rows, dtype=row), np.frombuffer(raw_table, dtype=_ALLOCATION)
    sizes = _image_sizes(path, rows[image_name], table, pages_start, table_start)
    checksum = 0
    for part in (head, raw_fields, raw_rows, raw_table):
        checksum = zlib.crc32(part, checksum)
    return _Frame(rows[image_name], rows[label_name].astype(np.int64), sizes, num_bytes, checksum)


def _metadata_row(path: Path, fields: np.ndarray) -> tuple[np.dtype, str, str]:
    types = [int(t) for t in fields["type_id"]]
    if types.count(_IMAGE_FIELD) != 1 or types.count(_INT_FIELD) < 1 or not set(types) <= set(_FIELD_METADATA):
        raise _broken(path, f"its fields are of types {types}; one RGBImageField (2) and an IntField (1) are needed")
    row = np.dtype([("", _FIELD_METADATA[t]) for t in types], align=True)
    return row, f"f{types.index(_IMAGE_FIELD)}", f"f{types.index(_INT_FIELD)}"


def _image_sizes(path: Path, images: np.ndarray, table: np.ndarray, pages_start: int, table_start: int) -> np.ndarray:
    # FFCV's table is in the order in which its workers finished, so images are found by their address.
    table = table[np.argsort(table["ptr"], kind="stable")]
    found = np.searchsorted(table["ptr"], images["data_ptr"]).clip(max=len(table) - 1)
    sizes = table["size"][found].astype(np.int64)
    starts = images["data_ptr"].astype(np.int64)
    pixels = images["height"].astype(np.int64) * images["width"].astype(np.int64) * 3
    bad = (table["ptr"][found] != images["data_ptr"]) | (starts < pages_start) | (starts + sizes > table_start)
    bad |= (sizes <= 0) | (pixels == 0) | ((images["mode"] == _MODES["raw"]) & (sizes != pixels))
    bad |= ~np.isin(images["mode"], list(_MODES.values()))
    if bad.any():
        index = int(bad.argmax())
        raise _broken(path, f"the entry of image {index} does not lead to its bytes")
    return sizes


def _read_sidecar(path: Path, frame: _Frame) -> dict[str, Any] | None:
    beside = sidecar_path(path)
    try:
        sidecar = json.loads(beside.read_text(encoding="utf-8"))
        expected = {"bytes": frame.num_bytes, "checksum": frame.checksum, "num_samples": len(frame.labels)}
        wrong = [k for k, v in expected.items() if sidecar[k] != v]
        highest = len(sidecar["class_names"]) - 1
        if sidecar["format_version"] != _SIDECAR_VERSION:
            wrong.append("format_version")
        if frame.labels.min() < 0 or frame.labels.max() > highest:
            wrong.append("class_names")
    except FileNotFoundError:
        if frame.labels.min() < 0:
            raise _broken(path, f"it has negative labels, down to {frame.labels.min()}") from None
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise _broken(path, f"its description {beside} cannot be read ({error!r})") from error
    if wrong:
        raise _broken(path, f"it is not the file that {beside} describes; they differ in: {', '.join(wrong)}")
    return sidecar


def _broken(path: Path, what: str) -> ValueError:
    return ValueError(
        f"{path} cannot be used: {what}. Remove it and convert the images again: python -m data.convert SOURCE {path}"
    )


def _check_write_settings(
    source: Source, num_workers: int, write_mode: str, max_side_px: int | None, jpeg_quality: int
) -> None:
    if len(source) == 0:
        raise ValueError(f"{source.name} has no images: a .beton file holds at least one")
    if num_workers < 0:
        raise ValueError(f"num_workers {num_workers}: give a whole number of at least 0")
    if write_mode not in _MODES:
        raise ValueError(f"write_mode {write_mode!r}: give 'raw' or 'jpg'")
    if max_side_px is not None and not 1 <= max_side_px <= _MAX_SIDE_PX:
        raise ValueError(f"max_side_px {max_side_px}: give a number from 1 to {_MAX_SIDE_PX}, or None")
    if not 1 <= jpeg_quality <= 100:
        raise ValueError(f"jpeg_quality {jpeg_quality}: give a number from 1 to 100")


def _encode(source: Source, index: int, *, write_mode: str, max_side_px: int | None, jpeg_quality: int) -> _Encoded:
    try:
        image, label = source.image(index), source.label(index)
        stored, height, width = _stored(image, write_mode, max_side_px, jpeg_quality)
        if not 0 <= label < len(source.class_names):
            raise ValueError(f"its label is {label}, and there are {len(source.class_names)} classes")
    except Exception as error:
        raise ValueError(f"image {index} of {source.name} cannot be stored: {error}") from error
    return _Encoded(stored, height, width, label, _MODES[write_mode])


def _stored(image: np.ndarray, write_mode: str, max_side_px: int | None, jpeg_quality: int) -> tuple[bytes, int, int]:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"a uint8 array [height, width, 3] is needed, not {image.dtype} {list(image.shape)}")
    height, width = image.shape[:2]
    longest = max(height, width)
    if longest > (max_side_px or longest):
        assert max_side_px is not None
        height, width = (max(1, side * max_side_px // longest) for side in (height, width))
        image = np.asarray(_pillow(image).resize((width, height), _area_filter()))
    if max(height, width) > _MAX_SIDE_PX:
        raise ValueError(f"a side of {max(height, width)} px; the format holds {_MAX_SIDE_PX}: set max_side_px")
    if write_mode == "jpg":
        buffer = io.BytesIO()
        _pillow(image).save(buffer, format="JPEG", quality=jpeg_quality)
        stored = buffer.getvalue()
    else:
        stored = image.tobytes()
    if len(stored) > _PAGE_BYTES:
        raise ValueError(
            f"{height}x{width} px take {len(stored)} bytes, and a page of the file {_PAGE_BYTES}: set max_side_px, "
            "or write_mode='jpg'"
        )
    return stored, height, width


def _pillow(image: np.ndarray) -> Image:
    from PIL import Image

    return Image.fromarray(image)


def _area_filter() -> Any:
    from PIL import Image

    return Image.Resampling.BOX


def _write_file(path: Path, encoded: PrefetchIterator[_Encoded], num_samples: int, *, progress: bool) -> None:
    row = np.dtype([("", _FIELD_METADATA[_IMAGE_FIELD]), ("", _FIELD_METADATA[_INT_FIELD])], align=True)
    fields = np.zeros(2, dtype=_FIELD)
    for field, type_id, name in zip(fields, (_IMAGE_FIELD, _INT_FIELD), (b"image", b"label"), strict=True):
        field["type_id"] = type_id
        field["name"][: len(name)] = list(name)
    rows, table = np.zeros(num_samples, dtype=row), np.zeros(num_samples, dtype=_ALLOCATION)
    pages_start = _next_page(_HEADER.itemsize + fields.nbytes + rows.nbytes)
    position = pages_start
    with path.open("wb") as file:
        for index, item in enumerate(_with_progress(encoded, num_samples, progress)):
            # No image lies across two pages: FFCV reads page by page.
            if position + len(item.stored) > _next_page(position):
                position = _next_page(position)
            file.seek(position)
            file.write(item.stored)
            rows[index] = ((item.mode, item.width, item.height, position), item.label)
            table[index] = (index, position, len(item.stored))
            position += len(item.stored)
        table_start = _next_page(position)
        file.seek(table_start)
        file.write(table.tobytes())
        header = np.array([(_VERSION, len(fields), _PAGE_BYTES, num_samples, table_start)], dtype=_HEADER)
        file.seek(0)
        file.write(header.tobytes() + fields.tobytes() + rows.tobytes())
        file.flush()
        os.fsync(file.fileno())


def _next_page(position: int) -> int:
    # The first page boundary at or after `position`.
    return -(-position // _PAGE_BYTES) * _PAGE_BYTES


def _with_progress(encoded: PrefetchIterator[_Encoded], num_samples: int, progress: bool) -> Any:
    if not progress:
        return encoded
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:  # it comes with the extras; a bare installation does without the bar
        return encoded
    return tqdm(encoded, total=num_samples, unit="images", desc="converting", leave=False, disable=None)


def _replace_sidecar(path: Path, sidecar: dict[str, Any]) -> None:
    beside = sidecar_path(path)
    temporary = beside.with_name(f"{beside.name}.{uuid4().hex[:8]}.partial")
    try:
        temporary.write_text(json.dumps(sidecar, indent=1), encoding="utf-8")
        os.replace(temporary, beside)
    finally:
        temporary.unlink(missing_ok=True)
