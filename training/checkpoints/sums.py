"""Finds damage in a checkpoint before anything of it is loaded: every byte that was written has a checksum.

A file of torch.save is a ZIP archive, and carries the CRC-32 of each of its members. A folder gets the CRC-32 of each
of its files in sums-rank<r>.json. Ranks share the work: file i is read by rank i modulo their number.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from pathlib import Path

from composer.utils import dist
from torch.distributed import ProcessGroup

from models.data_only import is_archive

_SUMS = "sums-rank{rank}.json"
_MOST_CHARACTERS = 200  # of a file's name within the folder
_BLOCK_BYTES = 1 << 20


def write_sums(folder: Path, *, group: ProcessGroup | None = None) -> None:
    """Add the checksums of a folder's files to it. Every rank must call this, once all files are written.

    group: through which the ranks wait for each other; a thread needs one of its own.
    """
    dist.barrier(group)
    sums = {name: _crc32(folder / name) for name in _share(_files(folder))}
    with open(folder / _SUMS.format(rank=dist.get_global_rank()), "w") as file:
        json.dump(sums, file)
        file.flush()
        os.fsync(file.fileno())
    dist.barrier(group)


def find_damage(checkpoint: Path, *, shared: bool = False) -> str | None:
    """What is wrong with a checkpoint's files; None if nothing is, or they have no checksums.

    shared: look at this rank's share of a folder's files; the other ranks look at theirs.
    """
    if checkpoint.is_file():
        return _damage_of_archive(checkpoint)
    try:
        sums = {name: crc for path in checkpoint.glob(_SUMS.format(rank="*")) for name, crc in _read(path).items()}
    except ValueError as error:
        return str(error)
    for name in _share(sorted(sums)) if shared else sums:
        path = checkpoint / name
        if not path.resolve().is_relative_to(checkpoint.resolve()):
            return f"a checksum is of {name}, which is outside of it"
        if not path.is_file():
            return f"{name} is missing"
        if _crc32(path) != sums[name]:
            return f"the checksum of {name} is wrong"
    return None


def _damage_of_archive(file: Path) -> str | None:
    if not file.stat().st_size:
        return "it is empty"
    if not is_archive(file):
        return None  # cut off, or of another format, which whoever reads it will find
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                return "it is compressed, as torch.save does not do, and may be a bomb"
            if sum(member.file_size for member in members) > file.stat().st_size:
                return "its members declare more bytes than it has"
            bad = archive.testzip()
    except Exception as error:  # what a damaged directory of an archive leads to is not documented
        return f"it is no whole archive: {' '.join(str(error).split()) or type(error).__name__}"
    return f"the checksum of {bad} in it is wrong" if bad else None


def _files(folder: Path) -> list[str]:
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if not name.startswith("sums-rank"))


def _share(names: list[str]) -> list[str]:
    return names[dist.get_global_rank() :: dist.get_world_size()]


def _read(path: Path) -> dict[str, int]:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise ValueError(f"{path.name} is damaged") from None
    if not isinstance(found, dict) or any("\0" in name or len(name) > _MOST_CHARACTERS for name in found):
        raise ValueError(f"{path.name} is damaged")
    return found


def _crc32(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            crc = zlib.crc32(block, crc)
    return crc
