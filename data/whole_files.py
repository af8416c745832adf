"""Files that are whole or absent: written beside their place, and moved there when the last byte is on the disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

try:
    import fcntl
except ModuleNotFoundError:  # Windows: what a killed process left behind stays
    fcntl = None


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A new file to write; it takes the place of `path` when the block ends, and is gone when the block raises.

    A process that is killed leaves a `<path>.<random>.partial`. The next one to write `path` removes it: as long as a
    writer lives it holds a lock on its file, which the operating system releases however it ends.

    Raises:
        OSError: the folder is not there or not writable, the disk is full.
    """
    remove_abandoned(path)
    file = _locked(path)
    beside = Path(file.name)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # Windows moves no file that is open
            # Elsewhere still under the lock: nobody may take it for abandoned in between.
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def replace_file(path: str | os.PathLike[str], write: Callable[[BinaryIO], Any]) -> None:
    """Let `write` fill the file that takes the place of `path`; makes the folders that it lies in. See `whole_file`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        write(file)


def partial_files(path: Path) -> list[Path]:
    """What is being written at this moment to take the place of `path`, or was left behind."""
    return sorted(path.parent.glob(f"{_glob_literal(path.name)}.*.partial"))


def remove_abandoned(path: Path) -> list[Path]:
    """Remove the partial files of `path` that nobody is writing any more; returns them."""
    removed = []
    for partial in partial_files(path) if fcntl else ():
        try:
            with partial.open("rb") as file:
                if _lock(file) is True:
                    partial.unlink()
                    removed.append(partial)
        except OSError:  # moved or removed by its owner in this moment, or another user's
            continue
    return removed


def _locked(path: Path) -> BinaryIO:
    while True:
        beside = path.with_name(f"{path.name}.{uuid4().hex[:8]}.partial")
        file = beside.open("x+b")
        # Between opening and locking, another process may have found it unlocked and removed it.
        if _lock(file) is not False and beside.exists():
            return file
        file.close()
        beside.unlink(missing_ok=True)


def _lock(file: BinaryIO) -> bool | None:
    # Whether the lock is now ours; None where there are no locks, so that nothing is ever taken for abandoned there.
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _glob_literal(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
