"""Files that are complete or absent: written under a temporary name, and renamed once they are on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

try:
    import fcntl
except ModuleNotFoundError:  # Windows: files of killed processes are not removed
    fcntl = None


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A new file to write; it replaces `path` when the block ends, and is removed if the block raises.

    A killed process leaves a `<path>.<random>.partial`. The next process to write `path` removes it: a live writer
    holds a lock on its file, which the operating system releases however the writer ends.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full.
    """
    remove_abandoned(path)
    file = _locked(path)
    beside = Path(file.name)
    try:
        with _named(path), file:  # closing what could not be flushed fails once more
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # Windows cannot move an open file
            # Elsewhere still under the lock, so that no process removes it as abandoned in between.
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


class BeingWrittenError(ValueError):
    """Another process, or another thread, is writing the file."""


@contextmanager
def kept_file(path: Path) -> Iterator[BinaryIO]:
    """As `whole_file`, but what is written outlives Ctrl-C and a kill: the next caller gets the file with its content.

    It is `kept_path(path)` until the block ends, and is removed if the block raises an Exception. Where locks are
    unsupported this is `whole_file`, and nothing is kept.

    Raises:
        BeingWrittenError: somebody else is in such a block for `path`.
        OSError: the folder is missing or not writable, or the disk is full.
    """
    beside = kept_path(path)
    file = _owned(beside, path)
    if file is None:
        with whole_file(path) as file:
            yield file
        return
    with _named(path), file:  # closing what could not be flushed fails once more
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(beside, path)
        except Exception:
            beside.unlink(missing_ok=True)  # still under the lock, so that it is not somebody else's by now
            raise


def is_being_written(path: Path) -> bool:
    """Whether somebody is in a block of `kept_file` for `path`."""
    try:
        with kept_path(path).open("rb") as file:
            return _lock(file) is False
    except OSError:
        return False


def kept_path(path: Path) -> Path:
    """Where the content of `path` is until it is complete; see `kept_file`."""
    return path.with_name(f"{path.name}.partial")


def is_at_path(file: BinaryIO, path: Path) -> bool:
    """Whether `path` is still the open file, which somebody may have renamed, removed or replaced."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """A full disk raises an error that says neither which file it was nor where."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def replace_file(path: str | os.PathLike[str], write: Callable[[BinaryIO], Any]) -> None:
    """Replace `path` with a new file that `write` fills, creating its folders if needed. See `whole_file`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        write(file)


def partial_files(path: Path) -> list[Path]:
    """Files that are being written to replace `path`, or were left behind; without the one of `kept_file`."""
    return sorted(path.parent.glob(f"{_glob_literal(path.name)}.*.partial"))


def remove_abandoned(path: Path) -> list[Path]:
    """Remove the partial files of `path` that no process is writing; returns them."""
    removed = []
    for partial in partial_files(path) if fcntl else ():
        try:
            with partial.open("rb") as file:
                if _lock(file) is True:
                    partial.unlink()
                    removed.append(partial)
        except OSError:  # just moved or removed by its owner, or another user's
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


def _owned(beside: Path, path: Path) -> BinaryIO | None:
    """`beside`, made if it is not there and locked; None where locks are unsupported."""
    while fcntl is not None:
        beside.touch()
        try:
            file = beside.open("r+b")
        except FileNotFoundError:  # its owner has just renamed it
            continue
        locked = _lock(file)
        # The owner before may have renamed or removed it since it was opened.
        if locked is True and is_at_path(file, beside):
            return file
        file.close()
        if locked is False:
            raise BeingWrittenError(f"{path} is being written by another process: wait for its end, or stop it")
        if locked is None:
            beside.unlink(missing_ok=True)
            break
    return None


def _lock(file: BinaryIO) -> bool | None:
    # Whether this process now has the lock; None where locks are unsupported, so that nothing counts as abandoned.
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
