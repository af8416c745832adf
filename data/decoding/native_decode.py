"""Stored bytes -> square crops of a batch, by data/decoding/native: decodes only what the crop covers."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from .stored import StoredImages, damaged_image

_VERSION = 3  # of the functions in data/decoding/native/decode.cpp
_MESSAGE_BYTES = 256
_EXTENSION = f"{__package__}._native_decode"
# As `struct Request` in data/decoding/native/decode.cpp.
_REQUEST = np.dtype(
    [
        ("bytes", np.uint64),
        ("size", np.uint64),
        ("is_jpeg", np.int32),
        ("height", np.int32),
        ("width", np.int32),
        ("crop", np.int32, 5),
        ("has_checksum", np.int32),
        ("checksum", np.uint32),
    ],
    align=True,
)


def find_native() -> Path | None:
    """Path of the compiled library, or None if it was not built. Imports nothing."""
    spec = find_spec(_EXTENSION)
    return Path(spec.origin) if spec and spec.origin else None


class NativeDecoder:
    """Decodes with this package's own library.

    Args:
        plain: True uses neither vector instructions nor this package's own entropy decoding, but libjpeg's; the pixels
            are the same.

    Raises:
        ModuleNotFoundError: it was not built or does not load; the message says what to do.
    """

    name = "native"

    def __init__(self, *, plain: bool = False) -> None:
        self._library = _library()
        self._plain = plain

    def decode(
        self, images: StoredImages, indices: np.ndarray, crops: np.ndarray, out: np.ndarray, *, exact: bool
    ) -> None:
        """See `data.decoding.decode.Decoder`. The crop's position is exact to a fraction of a pixel, reduced or not."""
        if out.dtype != np.uint8 or not out.flags.c_contiguous or out.shape[1:] != (out.shape[1], out.shape[1], 3):
            raise ValueError(f"crops go to contiguous uint8 [B, S, S, 3], not {out.dtype} {list(out.shape)}")
        requests = np.zeros(len(indices), dtype=_REQUEST)
        requests["bytes"], requests["size"] = images.addresses(indices), images.num_bytes(indices)
        requests["is_jpeg"] = images.is_jpeg(indices)
        requests["height"], requests["width"] = images.heights[indices], images.widths[indices]
        requests["crop"] = crops
        checksums = images.checksums(indices)
        if checksums is not None:
            requests["has_checksum"], requests["checksum"] = True, checksums
        message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        failed = self._library.brisk_decode_batch(
            *(requests.ctypes.data, len(requests), out.shape[1], exact, self._plain),
            *(out[: len(requests)].ctypes.data, message, _MESSAGE_BYTES),
        )
        if failed >= 0:
            raise damaged_image(images.path, int(indices[failed]), message.value.decode(errors="replace"))


def with_restart_rows(stored: bytes) -> bytes:
    """A JPEG with a restart marker after each row of its blocks, so that a decoder of crops begins near a crop.

    Its pixels are the same in any decoder; metadata is left out. One that is progressive, damaged, has such markers, or
    would be twice as large is returned as it is.

    Raises:
        ModuleNotFoundError: the native decoder was not built or does not load; the message says what to do.
    """
    out = ctypes.create_string_buffer(2 * len(stored))
    num_bytes = _library().brisk_restart_rows(stored, len(stored), out, len(out))
    return out.raw[:num_bytes] if num_bytes else stored


@cache
def _library() -> ctypes.CDLL:
    path = find_native()
    try:
        if path is None:
            raise OSError("it was not built")
        library = ctypes.CDLL(str(path))
        if library.brisk_decode_version() != _VERSION:
            raise OSError(f"{path} is of another version than this package")
    except (OSError, AttributeError) as error:
        raise ModuleNotFoundError(
            f"the native decoder does not load: {error}. Install a C++ compiler and libjpeg-turbo with its headers, "
            "and this package again (see docs/installation.md), or use the loader 'torch'",
            name=_EXTENSION,
        ) from error
    library.brisk_decode_batch.argtypes = (
        [ctypes.c_void_p, ctypes.c_int64] + [ctypes.c_int32] * 3 + [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64]
    )
    library.brisk_decode_batch.restype = ctypes.c_int64
    library.brisk_restart_rows.argtypes = [ctypes.c_char_p, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint64]
    library.brisk_restart_rows.restype = ctypes.c_int64
    return library
