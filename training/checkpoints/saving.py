"""Saves the whole training state, so that a run killed at any moment can resume from its last checkpoint."""

from __future__ import annotations

import itertools
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import checkpoint, dist

from training.checkpoints.sharded import save_shards
from training.guards.finite import agree, not_finite, weights

__all__ = ["Checkpoints", "find_latest"]

log = logging.getLogger(__name__)

_LATEST, _BEST = "latest.pt", "best.pt"
_BESIDE_PREFIX, _BESIDE_SUFFIX = ".checkpoint-", ".tmp"
_SHARDS_PREFIX = "shards-"


class Checkpoints(Callback):
    """Keeps latest.pt, best.pt and ep{n}.pt in `folder`, each a full Composer checkpoint in one file, or in shards.

    A checkpoint is written to a temporary name and renamed: latest.pt is complete at any moment, even if the process
    is killed during a save. The other names are hard links to the same file, or copies if the file system has no
    links. An epoch is saved after its evaluation; a save due at an epoch's last step waits for that. The end of
    training is always saved.

    A sharded checkpoint is a folder shards-ep{n}-ba{m} to which every rank writes its part, and the names are symbolic
    links to it; a folder without links is removed.

    Weights that are not finite are not saved, whatever asked for it.

    List it after the callbacks whose state belongs in the checkpoint. Rank 0 writes the files; all ranks take part in
    gathering the state.

    folder: where checkpoints are written; created when training starts.
    every_epochs, every_steps: save every so many epochs or steps; None: not at this interval.
    keep_every_epochs: also keep ep{n}.pt every so many epochs.
    keep_best: also keep best.pt, the state at the best evaluation so far of `best_metric` on the evaluator `evaluator`.
    best_metric: the highest value is best, or the lowest if the name contains "loss".
    sharded: write shards, under any engine; see training/checkpoints/sharded.py.
    save_folder: writes them; every rank calls it with the state and the path of a folder that does not exist yet.

    Raises:
        ValueError: an interval below 1, or a folder that cannot be written to.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        every_epochs: int | None = 1,
        every_steps: int | None = None,
        keep_every_epochs: int | None = None,
        keep_best: bool = True,
        best_metric: str = "top1",
        evaluator: str = "eval",
        sharded: bool = False,
        save_folder: Callable[[State, Path], None] = save_shards,
    ) -> None:
        intervals = {"every_epochs": every_epochs, "every_steps": every_steps, "keep_every_epochs": keep_every_epochs}
        for name, value in intervals.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: an interval is at least 1; give a positive number, or None for none")
        self._folder = Path(folder)
        self._every_epochs = every_epochs
        self._every_steps = every_steps
        self._keep_every_epochs = keep_every_epochs
        self._keep_best = keep_best
        self._best_metric = best_metric
        self._evaluator = evaluator
        self._sharded = sharded
        self._save_folder = save_folder
        self._best: float | None = None
        self._evaluated: tuple[int, float] | None = None  # step and value of the latest evaluation
        self._saved: tuple[int, int] | None = None  # epoch and step of the latest save
        self._due = False  # a save by steps that waits for the end of its epoch
        self._fit_ended = False
        if dist.get_global_rank() == 0:
            _check_writable(self._folder)

    @property
    def best(self) -> float | None:
        """The best value of the metric so far; None before the first evaluation."""
        return self._best

    def init(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0:
            _prepare(self._folder)

    def fit_start(self, state: State, logger: Logger) -> None:
        if state.fsdp_sharded_state_dict_enabled:
            raise ValueError(
                "state_dict_type is 'sharded', which is Composer's own format; set the FSDP configuration's "
                "state_dict_type to 'full', and Checkpoints' sharded to true for shards"
            )
        self._fit_ended = False
        self._due = False

    def eval_end(self, state: State, logger: Logger) -> None:
        metric = state.eval_metrics.get(self._evaluator, {}).get(self._best_metric)
        if state.dataloader_label == self._evaluator and metric is not None:
            self._evaluated = (int(state.timestamp.batch), float(metric.compute()))

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        due = self._every_steps is not None and int(state.timestamp.batch) % self._every_steps == 0
        if state.dataloader_len is not None and int(state.timestamp.batch_in_epoch) >= int(state.dataloader_len):
            self._due = due  # EPOCH_CHECKPOINT is next
            return
        is_best = self._take_best(state)
        if due or is_best:
            self._save(state, is_best=is_best)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        epoch = int(state.timestamp.epoch)
        is_best = self._take_best(state)
        keeps = self._keep_every_epochs is not None and epoch % self._keep_every_epochs == 0
        if self._due or is_best or keeps or (self._every_epochs is not None and epoch % self._every_epochs == 0):
            self._save(state, is_best=is_best, kept_name=f"ep{epoch}.pt" if keeps else None)
        self._due = False

    def fit_end(self, state: State, logger: Logger) -> None:
        self._fit_ended = True
        if self._saved != _stamp(state):
            self._save(state)

    def eval_after_all(self, state: State, logger: Logger) -> None:
        # If evaluation is not due after every epoch, the Trainer runs a last one after FIT_END.
        if self._fit_ended and self._evaluated is not None and self._evaluated[0] == int(state.timestamp.batch):
            self._fit_ended = False
            self._save(state, is_best=self._take_best(state))

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "best_metric": self._best_metric}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # The best value of another metric says nothing about this one.
        self._best = state["best"] if state["best_metric"] == self._best_metric else None

    def _take_best(self, state: State) -> bool:
        """Whether the evaluation of the current weights is the best so far; if so, record it as the best."""
        if not self._keep_best or self._evaluated is None or self._evaluated[0] != int(state.timestamp.batch):
            return False
        value = self._evaluated[1]
        if math.isnan(value):
            return False
        sign = -1 if "loss" in self._best_metric else 1
        if self._best is not None and sign * value <= sign * self._best:
            return False
        self._best = value
        return True

    def _save(self, state: State, *, is_best: bool = False, kept_name: str | None = None) -> None:
        """Save the state as latest.pt and under the other names that apply. Every rank must call this.

        A state whose weights are not finite is of no use to anyone, and does not replace one that is.
        """
        self._saved = _stamp(state)
        if agree(not_finite(weights(state.model))):
            if dist.get_global_rank() == 0:
                log.warning(
                    "the weights after step %d are not finite; they are not saved, and %s keeps what it holds",
                    self._saved[1],
                    self._folder,
                )
            return
        beside = _beside(self._folder / _LATEST)
        with _explained(beside):
            written = self._write(state, beside)
            if written is not None:
                # latest.pt is last: a run killed in between resumes from before this evaluation and repeats it.
                if is_best:
                    _give_name(written, self._folder / _BEST)
                if kept_name is not None:
                    _give_name(written, self._folder / kept_name)
                _give_name(written, self._folder / _LATEST, only=not self._sharded)
                _remove_unnamed(self._folder)

    def _write(self, state: State, beside: Path) -> Path | None:
        """Write the state to `beside`, or to a folder of shards; returns its path, on rank 0 only."""
        if self._sharded:
            self._save_folder(state, beside)
            return _move_shards(beside, _stamp(state)) if dist.get_global_rank() == 0 else None
        # Composer fills in placeholders such as {epoch}; a brace in the folder's name is not one.
        name = str(beside).replace("{", "{{").replace("}", "}}")
        if checkpoint.save_checkpoint(state, name) is None:
            return None
        _sync(beside)
        return beside


def find_latest(folder: str | os.PathLike[str]) -> Path | None:
    """The checkpoint that a run in `folder` should resume from; None if there is none yet."""
    path = Path(folder) / _LATEST
    return path if path.exists() else None


def _stamp(state: State) -> tuple[int, int]:
    return int(state.timestamp.epoch), int(state.timestamp.batch)


def _beside(path: Path) -> Path:
    # Without the name's .pt: Composer parses what follows ".pt." as a compression format.
    return path.with_name(f"{_BESIDE_PREFIX}{path.stem}{_BESIDE_SUFFIX}")


def _give_name(source: Path, path: Path, *, only: bool = False) -> None:
    """Make `path` a name of `source` atomically, never missing or partial; `only`: the only name."""
    if only:
        os.replace(source, path)
        return
    beside = _beside(path)
    beside.unlink(missing_ok=True)
    if source.is_dir():
        beside.symlink_to(source.name)
    else:
        try:
            os.link(source, beside)
        except OSError:  # the file system has no hard links
            shutil.copyfile(source, beside)
            _sync(beside)
    os.replace(beside, path)


def _move_shards(beside: Path, stamp: tuple[int, int]) -> Path:
    """Give a complete folder of shards an unused name, since one step may be saved more than once."""
    stem = f"{_SHARDS_PREFIX}ep{stamp[0]}-ba{stamp[1]}"
    names = itertools.chain([stem], (f"{stem}.{n}" for n in itertools.count(1)))
    folder = next(path for name in names if not (path := beside.with_name(name)).exists())
    beside.rename(folder)
    return folder


def _remove_unnamed(folder: Path) -> None:
    """Remove the folders of shards that no link points to."""
    named = {path.resolve() for path in folder.glob("*.pt") if path.is_symlink()}
    for shards in folder.glob(f"{_SHARDS_PREFIX}*"):
        if shards.resolve() not in named:
            shutil.rmtree(shards, ignore_errors=True)


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Flush the file to disk before it gets its name: otherwise a power failure may leave the name without contents."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextmanager
def _explained(beside: Path) -> Iterator[None]:
    """Turn a failure to write into an error that says where and what to do, and leave no partial file."""
    try:
        yield
    except BaseException as error:
        if dist.get_global_rank() == 0:
            _remove(beside)
        cause = _disk_error(error) if isinstance(error, Exception) else None
        if cause is None:
            raise
        folder = beside.parent
        raise OSError(
            f"could not write a checkpoint to {folder}: {cause}. {_free_space(folder)} "
            f"Make room or give a folder that can be written; {folder / _LATEST} still is the last whole checkpoint, "
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


def _check_writable(folder: Path) -> None:
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


def _prepare(folder: Path) -> None:
    """Create the folder, test that it is writable, and remove what a killed run left half-written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stray in folder.glob(f"{_BESIDE_PREFIX}*{_BESIDE_SUFFIX}"):
            _remove(stray)
        _remove_unnamed(folder)
        probe = _beside(folder / "probe")
        probe.write_bytes(b"writable")
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"checkpoint folder {folder} cannot be written to: {error}; make room, change its permissions, "
            "or give another folder"
        ) from error
