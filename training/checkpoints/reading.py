"""Checkpoints are read as data. One that names anything else could run code, and is refused before a run begins.

Composer and DeepSpeed read their files with Python's unrestricted unpickler; within `reading` they cannot.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from models.data_only import data_only, is_archive, named_by, reason_of
from training.checkpoints.sharded import DataOnlyReader, is_sharded
from training.checkpoints.sums import find_damage
from training.checkpoints.zero import classes_in_zero, is_zero
from training.recipe import RecipeError


class DamagedCheckpoint(RecipeError):
    """A checkpoint whose files are not as they were written."""


def check_checkpoint(checkpoint: str | os.PathLike[str], *, shared: bool = False) -> None:
    """Raise RecipeError unless every file of `checkpoint` is whole, and holds data only; DamagedCheckpoint for damage.

    Every byte is read once for its checksum, at about 1 GB/s.

    shared: of a folder's files, read only this rank's share; every rank calls this.
    """
    path = Path(checkpoint)
    check_whole(path, shared=shared)
    for file in _pickles(path):
        try:
            with reading(path), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns about other protocols of pickle, and then refuses them
                if file.name == ".metadata":
                    DataOnlyReader(path).read_metadata()
                else:
                    torch.load(file, map_location="cpu", weights_only=True, mmap=is_archive(file))
        except pickle.UnpicklingError as error:
            if not _is_whole(file):
                raise _unreadable(file, error) from None
            name = named_by(error, file)
            what = f"names {name}, which could run code" if name else f"cannot be read as data ({reason_of(error)})"
            raise RecipeError(
                "load",
                f"is {path}, and {file.name} {what}; nothing was run. Give a checkpoint of a run of this project. "
                "trust_checkpoint=true reads this one all the same, and runs whatever it says",
            ) from None
        except Exception as error:  # torch raises many kinds of errors for truncated files
            raise _unreadable(file, error) from None


def check_whole(checkpoint: Path, *, shared: bool = False) -> None:
    """Raise DamagedCheckpoint if a checksum is wrong; see check_checkpoint."""
    damage = find_damage(checkpoint, shared=shared)
    if damage is not None:
        raise _damaged(checkpoint, damage)


@contextmanager
def reading(checkpoint: str | os.PathLike[str], *, trust: bool = False) -> Iterator[None]:
    """Within this context, what anybody reads with torch.load is data, or raises pickle.UnpicklingError.

    trust: read with the unrestricted unpickler, which runs what the files say.
    """
    if trust:
        yield
        return
    with data_only(*(classes_in_zero() if is_zero(checkpoint) else ())):
        yield


def _pickles(path: Path) -> list[Path]:
    """The files of a checkpoint that hold pickles; DCP's .distcp are read as data by torch itself."""
    if path.is_file():
        return [path]
    metadata = [path / ".metadata"] if is_sharded(path) else []
    return [*metadata, *sorted(file for file in path.rglob("*.pt") if file.is_file())]


def _is_whole(file: Path) -> bool:
    """Whether this may be a file of torch.save: a pickle that ends as one, or an archive."""
    if is_archive(file):
        return True
    content = file.read_bytes()
    return content[:1] in (b"\x80", b"(", b"c", b"}", b"]") and content.endswith(b".")


def _unreadable(file: Path, error: Exception) -> DamagedCheckpoint:
    return _damaged(file, " ".join(str(error).split()).partition(". ")[0][:200] or type(error).__name__)


def _damaged(file: Path, reason: str) -> DamagedCheckpoint:
    others = sorted(other.name for other in file.parent.glob("*.pt") if other != file)
    there = f"; beside it: {', '.join(others)}" if others else ""
    return DamagedCheckpoint("load", f"is {file}, which is no whole checkpoint ({reason}); give another{there}")
