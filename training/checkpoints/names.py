"""The files of a run's checkpoints folder: their names, and that each is whole whenever it is there."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from composer.utils import dist

LATEST, BEST = "latest.pt", "best.pt"
MOST_KEPT = 100
_BESIDE_PREFIX, _BESIDE_SUFFIX = ".checkpoint-", ".tmp"
_SHARDS_PREFIX = "shards-"


def newest_first(folder: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints in `folder`, in the order in which a run should try to resume from them."""
    folder = Path(folder)
    numbered = [folder / LATEST, *(folder / previous_name(n) for n in range(1, MOST_KEPT))]
    others = [path for path in folder.glob("*.pt") if path not in numbered and path.exists()]
    return [path for path in numbered if path.exists()] + sorted(others, key=_written, reverse=True)


def keep_previous(folder: Path, keep: int) -> None:
    """Give what is latest.pt now its next name, of `keep` in all. A kill between two renames loses none."""
    for number in range(keep - 2, 0, -1):
        if (folder / previous_name(number)).exists():
            os.replace(folder / previous_name(number), folder / previous_name(number + 1))
    latest = folder / LATEST
    if keep > 1 and latest.exists():
        give_name(latest.resolve() if latest.is_dir() else latest, folder / previous_name(1))


def previous_name(number: int) -> str:
    """The name of the checkpoint that is `number` saves older than latest.pt."""
    return f"previous{'' if number == 1 else f'-{number}'}.pt"


def _written(path: Path) -> tuple[int, str]:
    return path.stat().st_mtime_ns, path.name


def beside_of(path: Path) -> Path:
    """Where the file that shall be `path` is written."""
    # Without the name's .pt: Composer parses what follows ".pt." as a compression format.
    return path.with_name(f"{_BESIDE_PREFIX}{path.stem}{_BESIDE_SUFFIX}")


def give_name(source: Path, path: Path, *, only: bool = False) -> None:
    """Make `path` a name of `source` atomically, never missing or partial; `only`: the only name."""
    if only:
        os.replace(source, path)
        return
    beside = beside_of(path)
    beside.unlink(missing_ok=True)
    if source.is_dir():
        beside.symlink_to(source.name)
    else:
        try:
            os.link(source, beside)
        except OSError:  # the file system has no hard links
            shutil.copyfile(source, beside)
            sync(beside)
    os.replace(beside, path)


def move_shards(beside: Path, stamp: tuple[int, int]) -> Path:
    """Give a complete folder of shards an unused name, since one step may be saved more than once."""
    stem = f"{_SHARDS_PREFIX}ep{stamp[0]}-ba{stamp[1]}"
    names = itertools.chain([stem], (f"{stem}.{n}" for n in itertools.count(1)))
    folder = next(path for name in names if not (path := beside.with_name(name)).exists())
    beside.rename(folder)
    return folder


def remove_unnamed(folder: Path) -> None:
    """Remove the folders of shards that no link points to."""
    links = [*folder.glob("*.pt"), *folder.glob(f"{_BESIDE_PREFIX}*{_BESIDE_SUFFIX}")]
    named = {path.resolve() for path in links if path.is_symlink()}
    for shards in folder.glob(f"{_SHARDS_PREFIX}*"):
        if shards.resolve() not in named:
            shutil.rmtree(shards, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush the file to disk before it gets its name: otherwise a power failure may leave the name without contents."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextmanager
def explained(beside: Path) -> Iterator[None]:
    """Turn a failure to write into an error that says where and what to do, and leave no partial file."""
    try:
        yield
    except BaseException as error:
        if dist.get_global_rank() == 0:
            remove(beside)
        cause = _disk_error(error) if isinstance(error, Exception) else None
        if cause is None:
            raise
        folder = beside.parent
        raise OSError(
            f"could not write a checkpoint to {folder}: {cause}. {_free_space(folder)} "
            f"Make room or give a folder that can be written; {folder / LATEST} still is the last whole checkpoint, "
            "if there is one, and the run can resume from it"
        ) from error


def _disk_error(error: BaseException | None) -> OSError | None:
    """The OSError behind `error`, which torch.save masks with a RuntimeError from its cleanup."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError):
            return error
        seen.add(id(error))
        failures = getattr(error, "failures", {}).values()  # torch's CheckpointException: each rank's error
        error = next((failure for failure, _ in failures), error.__cause__ or error.__context__)
    return None


def _free_space(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB are free there."
    except OSError:
        return ""


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be created or written to, without creating it."""
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise ValueError(f"checkpoint folder {folder}: {existing} is a file, not a folder; give another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(
            f"checkpoint folder {folder}: no permission to write to {existing}; give another folder or change its owner"
        )


def prepare(folder: Path) -> None:
    """Create the folder, test that it is writable, and remove what a killed run left half-written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stray in folder.glob(f"{_BESIDE_PREFIX}*{_BESIDE_SUFFIX}"):
            remove(stray)
        remove_unnamed(folder)
        probe = beside_of(folder / "probe")
        probe.write_bytes(b"writable")
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"checkpoint folder {folder} cannot be written to: {error}; make room, change its permissions, "
            "or give another folder"
        ) from error
