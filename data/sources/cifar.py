"""CIFAR-10 and CIFAR-100 from their published files, which hold Python pickles.

Files are checked against the published MD5 before they are read, and the unpickler creates only numbers, text, lists,
dictionaries and numpy arrays.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import shutil
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np

from ..whole_files import whole_file

_TIMEOUT_SECONDS = 30  # without receiving data


@dataclass(frozen=True)
class _Files:
    """MD5s by file name, the same as torchvision's."""

    title: str
    url: str
    archive_md5: str
    folder: str
    train: dict[str, str]
    test: dict[str, str]
    meta: dict[str, str]
    label_key: bytes
    names_key: bytes

    @property
    def archive(self) -> str:
        return self.url.rpartition("/")[2]


_CIFAR = {
    "cifar10": _Files(
        title="CIFAR-10",
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        archive_md5="c58f30108f718f92721af3b95e74349a",
        folder="cifar-10-batches-py",
        train={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        },
        test={"test_batch": "40351d587109b95175f43aff81a1287e"},
        meta={"batches.meta": "5ff9c542aee3614f3951f8cda6e48888"},
        label_key=b"labels",
        names_key=b"label_names",
    ),
    "cifar100": _Files(
        title="CIFAR-100",
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        archive_md5="eb9058c3a382ffc7106e4002c42a8d85",
        folder="cifar-100-python",
        train={"train": "16019d7e3df5f24257cddd939b257f8d"},
        test={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
        meta={"meta": "7973b15100ade9c7d40fb424638fde48"},
        label_key=b"fine_labels",
        names_key=b"fine_label_names",
    ),
}


def read_cifar(name: str, root: Path, *, train: bool, download: bool) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Images uint8 [N, 32, 32, 3], labels int64 [N] and class names of `cifar10` or `cifar100`.

    Raises:
        FileNotFoundError: the files are not in `root`, and `download` is False or fails.
        ValueError: they are not the published ones.
    """
    files = _CIFAR[name]
    folder = root / files.folder
    if not all((folder / name).is_file() for name in {**files.train, **files.test, **files.meta}):
        _unpack(files, _archive(files, root, download=download), folder)
    parts = [_load(folder / name, md5) for name, md5 in (files.train if train else files.test).items()]
    planes = np.concatenate([part[b"data"] for part in parts]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([np.asarray(part[files.label_key], dtype=np.int64) for part in parts])
    ((meta, md5),) = files.meta.items()
    class_names = tuple(text.decode() for text in _load(folder / meta, md5)[files.names_key])
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels, class_names


def load_pickle(data: bytes) -> Any:
    """The content of a pickle of numbers, text, lists, dictionaries and numpy arrays of numbers.

    Raises:
        ValueError: anything else, which is not created.
    """
    try:
        return _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"the pickle cannot be read: {error}") from error


_ARRAY = object()  # stands for numpy's class, which a pickle must name but must not call


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        name = f"{module_name}.{global_name}"
        # How numpy pickles arrays, in its old and its new module.
        if name in ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"):
            return _empty_array
        if name == "numpy.ndarray":
            return _ARRAY
        if name == "numpy.dtype":
            return np.dtype
        raise ValueError(f"it wants {name}, and only arrays of numbers are read")


def _empty_array(kind: Any, shape: Any, dtype: Any) -> np.ndarray:
    # numpy's own accepts any shape and type here; its arrays pass (0,) and b"b", and set the real ones afterwards.
    if kind is not _ARRAY or shape != (0,):
        raise ValueError(f"an array of shape {shape} is not how numpy writes one")
    return np.ndarray((0,), np.int8)


def _archive(files: _Files, root: Path, *, download: bool) -> Path:
    path = root / files.archive
    if path.is_file():
        return path
    repair = f"put {files.archive} into {root}, from {files.url} or where you have it"
    if not download:
        raise FileNotFoundError(f"no {files.title} in {root}, and download is off: {repair}")
    print(f"downloading {files.url} to {path}", file=sys.stderr, flush=True)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with urlopen(files.url, timeout=_TIMEOUT_SECONDS) as answer, whole_file(path) as file:
            shutil.copyfileobj(answer, file, 1 << 20)
    except OSError as error:
        raise FileNotFoundError(
            f"no {files.title} in {root}, and it cannot be downloaded ({error}): {repair}"
        ) from error
    return path


def _unpack(files: _Files, archive: Path, folder: Path) -> None:
    _check_md5(archive, archive.read_bytes(), files.archive_md5)
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        # One member at a time and by name, so that the archive cannot choose where a file is written.
        for name in {**files.train, **files.test, **files.meta}:
            member = tar.extractfile(f"{files.folder}/{name}")
            assert member is not None, "the archive is the published one"
            with whole_file(folder / name) as file:
                shutil.copyfileobj(member, file)


def _load(path: Path, md5: str) -> Any:
    data = path.read_bytes()
    _check_md5(path, data, md5)
    return load_pickle(data)


def _check_md5(path: Path, data: bytes, expected: str) -> None:
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if found != expected:
        raise ValueError(
            f"{path} is not the published file: its MD5 is {found} and should be {expected}. Remove it; it is then "
            "fetched or unpacked again"
        )
