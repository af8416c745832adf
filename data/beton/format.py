"""FFCV's .beton file: its layout, and a reader that needs only numpy.

A file has a header, one descriptor per field, one metadata row per image, 8 MiB pages of image bytes, and an
allocation table at the end. `<file>.json`, the sidecar, stores what the format has no field for.
`data.beton.write` writes both; FFCV reads these files, and this module reads FFCV's.
"""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..sources.image_file import MOST_PIXELS

# Little-endian and packed as in FFCV 1.0 (its types.py, fields/basics.py and fields/rgb_image.py).
HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("table_start", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
FIELD_METADATA = {
    0: np.dtype("<f8"),  # FloatField
    1: np.dtype("<i8"),  # IntField
    2: np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")]),  # RGBImageField
}
INT_FIELD, IMAGE_FIELD = 1, 2
VERSION = 2
PAGE_BYTES = 8 << 20
MAX_SIDE_PX = 65_535
MODES = {"jpg": 0, "raw": 1}
SIDECAR_VERSION = 1
_MOST_CLASSES = 1_000_000  # of a file without a sidecar, where a damaged label would ask for as many names
_CONVERT = f"{__name__.partition('.beton.')[0]}.convert"  # the command that writes one
_IMAGENET_MEAN = (123.675, 116.28, 103.53)
_IMAGENET_STD = (58.395, 57.12, 57.375)


class Beton:
    """A .beton file with one image field and one integer field, opened for reading.

    Opening checks the whole frame. A file that is truncated, foreign or not the one its sidecar describes is refused,
    because it would give black images with plausible labels.

    Attributes:
        labels, heights, widths: int64 [N]; heights and widths in px.
        class_names: from the sidecar, else the labels' numbers.
        mean, std: per channel on the 0..255 scale; from the sidecar, else ImageNet's.
        sidecar: the sidecar's contents; empty if there is none.
        described: whether there is a sidecar. Files written by FFCV have none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a valid .beton file, or not the one that the sidecar describes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(
                f"no file {self.path}: correct the path, or write it with: python -m {_CONVERT} SOURCE {self.path}"
            )
        frame = read_frame(self.path)
        self.labels = frame.labels
        self.heights = frame.images["height"].astype(np.int64)
        self.widths = frame.images["width"].astype(np.int64)
        self._modes = frame.images["mode"].copy()
        self._starts = frame.images["data_ptr"].astype(np.int64)
        self._sizes = frame.sizes
        self._file = self.path.open("rb")  # whose size can be asked for, whatever has this name by then
        self._num_bytes = frame.num_bytes
        # A plain view: slicing np.memmap itself costs microseconds, once per image.
        self._bytes = np.memmap(self._file, dtype=np.uint8, mode="r").view(np.ndarray)
        sidecar = _checked_sidecar(self.path, frame)
        self.described = sidecar is not None
        self.sidecar: dict[str, Any] = sidecar or {}
        self._checksums = _unpack_checksums(self.sidecar.get("image_checksums"))
        names = self.sidecar.get("class_names") or [str(i) for i in range(int(self.labels.max()) + 1)]
        self.class_names: tuple[str, ...] = tuple(names)
        self.mean: tuple[float, float, float] = tuple(self.sidecar.get("mean", _IMAGENET_MEAN))
        self.std: tuple[float, float, float] = tuple(self.sidecar.get("std", _IMAGENET_STD))

    def __len__(self) -> int:
        return len(self.labels)

    def check_size(self) -> None:
        """Raises OSError if the file was cut short since it was opened.

        Reading mapped bytes that are gone would end the process with SIGBUS and no message.
        """
        num_bytes = os.fstat(self._file.fileno()).st_size
        if num_bytes < self._num_bytes:
            raise OSError(
                f"{self.path} was cut short while it was read: it had {self._num_bytes} bytes and has {num_bytes}. "
                "Write a new version under another name and move it there; this run can resume from its last checkpoint"
            )

    def addresses(self, indices: np.ndarray) -> np.ndarray:
        """uint64 [B]: memory addresses of the images' stored bytes, valid while this object exists."""
        return (self._bytes.ctypes.data + self._starts[indices]).astype(np.uint64)

    def num_bytes(self, indices: np.ndarray) -> np.ndarray:
        """int64 [B]: number of stored bytes of each image."""
        return self._sizes[indices]

    def image_bytes(self, index: int) -> np.ndarray:
        """uint8 [size]: the stored bytes of an image, a view into the file."""
        start = self._starts[index]
        return self._bytes[start : start + self._sizes[index]]

    def is_jpeg(self, index: int | np.ndarray) -> np.ndarray:
        """Whether the stored bytes are a JPEG file; otherwise they are pixels, [height, width, 3] RGB."""
        return self._modes[index] == MODES["jpg"]

    def checksums(self, indices: np.ndarray) -> np.ndarray | None:
        """uint32 [B]: CRC-32 of each image's bytes as they were written; None if the sidecar does not have them."""
        return None if self._checksums is None else self._checksums[indices]


def sidecar_path(path: str | Path) -> Path:
    """Path of a .beton file's sidecar."""
    return Path(f"{path}.json")


def tier_path(path: str | Path, size: int) -> Path:
    """Path of the copy of a .beton file whose images have `size` px on their longer side at most."""
    path = Path(path)
    return path.with_name(f"{path.stem}.{size}{path.suffix}")


def check_sizes(sizes: Sequence[int]) -> None:
    """Raise ValueError unless `sizes` are different whole numbers of px that the format holds, one at least."""
    if not sizes or not all(1 <= size <= MAX_SIDE_PX for size in sizes) or len(set(sizes)) < len(sizes):
        raise ValueError(
            f"sizes {', '.join(map(str, sizes)) or '(none)'}: give different longest sides in px, from 1 to "
            f"{MAX_SIDE_PX}, as 256,500"
        )


def convert_command(path: str | Path) -> str:
    """The command that writes a .beton file, for messages."""
    return f"python -m {_CONVERT} SOURCE {path}"


def report_path(path: str | Path) -> Path:
    """Path of the list of images that the conversion left out; exists only if there are any."""
    return Path(f"{path}.report.txt")


def pack_checksums(checksums: Sequence[int]) -> str:
    """CRC-32 of each image's bytes, as the sidecar holds them."""
    return base64.b64encode(np.array(checksums, dtype="<u4").tobytes()).decode("ascii")


class Frame(NamedTuple):
    """A file without the images' bytes."""

    images: np.ndarray  # metadata of the image field [N]
    labels: np.ndarray  # int64 [N]
    sizes: np.ndarray  # stored bytes of each image, int64 [N]
    num_bytes: int
    checksum: int  # of everything but the pages


def read_frame(path: Path) -> Frame:
    """Read and check header, descriptors, metadata and allocations. Raises ValueError if one is invalid."""
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEADER.itemsize)
        if len(head) < HEADER.itemsize:
            raise _broken(path, f"it has {num_bytes} bytes, fewer than a header")
        header = np.frombuffer(head, dtype=HEADER)[0]
        num_samples, num_fields, table_start = (int(header[k]) for k in ("num_samples", "num_fields", "table_start"))
        if header["version"] != VERSION or not 0 < num_fields < 64 or num_samples == 0:
            raise _broken(path, "it does not begin with the header of a .beton file of version 2 that holds images")
        raw_fields = file.read(num_fields * FIELD.itemsize)
        if len(raw_fields) < num_fields * FIELD.itemsize:
            raise _broken(path, "it is cut short inside its field descriptors")
        row, image_name, label_name = _metadata_row(path, np.frombuffer(raw_fields, dtype=FIELD))
        pages_start = file.tell() + num_samples * row.itemsize
        if not pages_start <= table_start <= num_bytes:
            raise _broken(path, f"it is cut short: {num_bytes} bytes, and its allocation table begins at {table_start}")
        raw_rows = file.read(num_samples * row.itemsize)
        file.seek(table_start)
        raw_table = file.read()
    if len(raw_table) != num_samples * ALLOCATION.itemsize:
        raise _broken(
            path,
            f"its allocation table has {len(raw_table)} bytes, and {num_samples} images make "
            f"{num_samples * ALLOCATION.itemsize}",
        )
    rows, table = np.frombuffer(raw_rows, dtype=row), np.frombuffer(raw_table, dtype=ALLOCATION)
    sizes = _image_sizes(path, rows[image_name], table, pages_start, table_start)
    checksum = 0
    for part in (head, raw_fields, raw_rows, raw_table):
        checksum = zlib.crc32(part, checksum)
    return Frame(rows[image_name], rows[label_name].astype(np.int64), sizes, num_bytes, checksum)


def _metadata_row(path: Path, fields: np.ndarray) -> tuple[np.dtype, str, str]:
    types = [int(t) for t in fields["type_id"]]
    if types.count(IMAGE_FIELD) != 1 or types.count(INT_FIELD) < 1 or not set(types) <= set(FIELD_METADATA):
        raise _broken(path, f"its fields are of types {types}; one RGBImageField (2) and an IntField (1) are needed")
    row = np.dtype([("", FIELD_METADATA[t]) for t in types], align=True)
    return row, f"f{types.index(IMAGE_FIELD)}", f"f{types.index(INT_FIELD)}"


def _image_sizes(path: Path, images: np.ndarray, table: np.ndarray, pages_start: int, table_start: int) -> np.ndarray:
    # FFCV's table is in the order in which its workers finished, so look images up by address.
    table = table[np.argsort(table["ptr"], kind="stable")]
    found = np.searchsorted(table["ptr"], images["data_ptr"]).clip(max=len(table) - 1)
    sizes = table["size"][found].astype(np.int64)
    starts = images["data_ptr"].astype(np.int64)
    pixels = images["height"].astype(np.int64) * images["width"].astype(np.int64) * 3
    # No sums: a file can hold sizes and addresses whose sum wraps around.
    bad = (table["ptr"][found] != images["data_ptr"]) | (starts < pages_start) | (starts > table_start)
    bad |= (
        (sizes > table_start - starts)
        | (sizes <= 0)
        | (pixels == 0)
        | ((images["mode"] == MODES["raw"]) & (sizes != pixels))
    )
    bad |= ~np.isin(images["mode"], list(MODES.values()))
    if bad.any():
        index = int(bad.argmax())
        raise _broken(path, f"the entry of image {index} does not lead to its bytes")
    _refuse_huge(path, images, pixels // 3)
    return sizes


def _refuse_huge(path: Path, images: np.ndarray, pixels: np.ndarray) -> None:
    if (pixels > MOST_PIXELS).any():
        index = int((pixels > MOST_PIXELS).argmax())
        raise ValueError(
            f"{path} cannot be used: its image {index} is of {images['height'][index]}x{images['width'][index]} px, "
            f"and an image may have {MOST_PIXELS:,} pixels; convert the images again, without it or smaller: python -m "
            f"{_CONVERT} SOURCE {path} --max-side 500"
        )


def _checked_sidecar(path: Path, frame: Frame) -> dict[str, Any] | None:
    beside = sidecar_path(path)
    try:
        sidecar = json.loads(beside.read_text(encoding="utf-8"))
        expected = {"bytes": frame.num_bytes, "checksum": frame.checksum, "num_samples": len(frame.labels)}
        wrong = [k for k, v in expected.items() if sidecar[k] != v]
        if not all(isinstance(name, str) for name in sidecar["class_names"]):
            wrong.append("class_names")
        highest = len(sidecar["class_names"]) - 1
        if sidecar["format_version"] != SIDECAR_VERSION:
            wrong.append("format_version")
        if frame.labels.min() < 0 or frame.labels.max() > highest:
            wrong.append("class_names")
        checksums = _unpack_checksums(sidecar.get("image_checksums"))
        if checksums is not None and len(checksums) != len(frame.labels):
            wrong.append("image_checksums")
        if not _are_tiers(sidecar):
            wrong.append("tiers")
        wrong += [key for key in ("mean", "std") if not _is_color(sidecar[key], least=0 if key == "mean" else 1e-9)]
    except FileNotFoundError:
        return _refuse_labels(path, frame.labels)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = " ".join(repr(error).split())[:200]
        raise _broken(path, f"its description {beside} cannot be read ({reason})") from error
    if wrong:
        raise _broken(path, f"it is not the file that {beside} describes; they differ in: {', '.join(wrong)}")
    return sidecar


def _refuse_labels(path: Path, labels: np.ndarray) -> None:
    """Of a file without a sidecar."""
    if labels.min() < 0:
        raise _broken(path, f"it has negative labels, down to {labels.min()}") from None
    if labels.max() >= _MOST_CLASSES:
        raise _broken(path, f"it has the label {labels.max()}, and {_MOST_CLASSES:,} classes are the most") from None


def _unpack_checksums(packed: str | None) -> np.ndarray | None:
    """Sidecars from before 2026-11-29 have none."""
    return None if packed is None else np.frombuffer(base64.b64decode(packed, validate=True), dtype="<u4")


def _are_tiers(sidecar: dict[str, Any]) -> bool:
    """Whether the smaller copies that it names, if any, are sizes in px below its own with a checksum each."""
    tiers = sidecar.get("tiers", {})
    largest = sidecar["written_as"]["max_side_px"] if tiers else 0
    return all(key == str(int(key)) and 1 <= int(key) < largest and type(tiers[key]) is int for key in tiers)


def _is_color(values: Any, *, least: float) -> bool:
    return len(values) == 3 and all(least <= value <= 255 for value in values)


def _broken(path: Path, what: str) -> ValueError:
    out = path if path.suffix == ".beton" else "OUT.beton"  # never suggest overwriting another kind of file
    return ValueError(
        f"{path} cannot be used: {what}. Give the path of a .beton file; one that was damaged is made anew with: "
        f"python -m {_CONVERT} SOURCE {out}"
    )
