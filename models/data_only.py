"""Reads what torch.save wrote without running code that the file names.

A pickle can name any function and have it called. torch's restricted unpickler creates tensors, plain values and the
classes that it is told to allow, and refuses the rest before anything runs.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.torch_version import TorchVersion

_reconstruct = np.empty(0).__reduce__()[0]
# What Composer's checkpoints hold besides tensors and plain containers: random states, versions, times. These are the
# classes that Composer allows itself since pull request 3937, which is in no release. None of them runs code.
COMPOSERS: tuple[Any, ...] = (
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    _reconstruct,
    (_reconstruct, "numpy.core.multiarray._reconstruct"),  # its name in files that were written with NumPy 1
    TorchVersion,
    timedelta,
)
_FORCED, _FORBIDDEN = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextmanager
def data_only(*allowed: Any) -> Iterator[None]:
    """Within this context every torch.load reads data only, whoever calls it and whatever it asks for.

    allowed: further classes and functions that files may name, or pairs of one and its full name in files.

    What a file names beyond them raises pickle.UnpicklingError, before it runs; `named_by` tells what it was. The
    context holds for the whole process, in all threads: use it around reading only.
    """
    before = {name: os.environ.pop(name, None) for name in (_FORCED, _FORBIDDEN)}
    allowed_before = torch.serialization.get_safe_globals()
    os.environ[_FORCED] = "1"  # torch's own switch, which also reaches Composer and DeepSpeed
    try:
        with torch.serialization.safe_globals([*COMPOSERS, *allowed]):
            yield
    finally:
        torch.serialization.add_safe_globals(allowed_before)  # safe_globals forgets those that it was given again
        del os.environ[_FORCED]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def named_by(error: pickle.UnpicklingError, path: str | os.PathLike[str]) -> str | None:
    """What the file at `path` names that was refused with `error`, like posix.system; None if it names nothing."""
    told = re.search(r"GLOBAL (\S+)", str(error))
    return told[1] if told else _first_unknown_name(Path(path))


def reason_of(error: pickle.UnpicklingError) -> str:
    """Why torch refused what names nothing, like "Unsupported operand 149", without its advice."""
    told = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    return " ".join((told[1] if told else str(error)).split())[:200]


def is_archive(path: str | os.PathLike[str]) -> bool:
    """Whether the file is a ZIP archive, as torch.save writes; a damaged one is none."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # for one that says to be a part of several
        return False


def _first_unknown_name(path: Path) -> str | None:
    """For pickles of protocols that torch's unpickler does not read, and so does not name anything of."""
    try:
        if is_archive(path):
            with zipfile.ZipFile(path) as archive:
                entry = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                with archive.open(entry) as file:
                    return _NameFinder(file).find()
        with open(path, "rb") as file:
            return _NameFinder(file).find()
    except (OSError, StopIteration, zipfile.BadZipFile):
        return None


class _Found(Exception):
    pass


class _NameFinder(pickle._Unpickler):  # pyright: ignore[reportAttributeAccessIssue]
    """Creates nothing but `_Anything`, and stops at the first name that is no known class of data.

    It is Python's own unpickler: the one in C makes a list as long as the largest index of the memo that a file names.
    """

    def find(self) -> str | None:
        try:
            self.load()
        except _Found as found:
            return str(found)
        except Exception:  # a damaged pickle can raise anything
            return None
        return None

    def find_class(self, module_name: str, global_name: str, /) -> Callable[..., Any]:
        if module_name.partition(".")[0] not in ("torch", "numpy", "collections", "datetime"):
            raise _Found(f"{module_name}.{global_name}")
        return _Anything

    def persistent_load(self, pid: Any) -> Any:
        return _Anything()


class _Anything(dict[Any, Any]):
    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """Nothing is kept."""
