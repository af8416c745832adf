"""Saves the whole training state, so that a run killed at any moment can resume from its last checkpoint."""

from __future__ import annotations

import itertools
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import checkpoint, dist

from training.checkpoints.sharded import save_shards
from training.checkpoints.sums import write_sums
from training.guards.finite import agree, not_finite, weights
from training.guards.stop_signals import StopSignals

__all__ = ["Checkpoints", "newest_first"]

log = logging.getLogger(__name__)

_LATEST, _BEST = "latest.pt", "best.pt"
_MOST_KEPT = 100
_BESIDE_PREFIX, _BESIDE_SUFFIX = ".checkpoint-", ".tmp"
_SHARDS_PREFIX = "shards-"


class Checkpoints(Callback):
    """Keeps latest.pt, previous.pt, best.pt and ep{n}.pt in `folder`, each a full Composer checkpoint.

    Each is one file, or a folder of shards.

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
    every_epochs, every_steps, every_minutes: save every so many epochs, steps or minutes; None: not at this interval.
    keep_every_epochs: also keep ep{n}.pt every so many epochs.
    keep_best: also keep best.pt, the state at the best evaluation so far of `best_metric` on the evaluator `evaluator`.
    keep: how many to keep of those that are saved: latest.pt, previous.pt, previous-2.pt ... Should the newest be
        damaged, a run resumes from the one before. An older one is removed once a newer one is on disk.
    best_metric: the highest value is best, or the lowest if the name contains "loss".
    sharded: write shards, under any engine; see training/checkpoints/sharded.py.
    stop_seconds: SIGTERM and SIGUSR1 on any rank, while it trains, end the run with 128 + the signal's number at the
        end of the step, after a save; or after so many seconds, whatever it does then.
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
        every_minutes: float | None = None,
        keep_every_epochs: int | None = None,
        keep_best: bool = True,
        keep: int = 2,
        best_metric: str = "top1",
        evaluator: str = "eval",
        sharded: bool = False,
        stop_seconds: float = 30.0,
        save_folder: Callable[[State, Path], None] = save_shards,
    ) -> None:
        intervals = {
            "every_epochs": every_epochs, "every_steps": every_steps, "keep_every_epochs": keep_every_epochs,
        }  # fmt: skip
        if every_minutes is not None and not every_minutes > 0:
            raise ValueError(f"every_minutes={every_minutes}: give a positive number, or None")
        if not 1 <= keep <= _MOST_KEPT:
            raise ValueError(f"keep={keep}: give the number of checkpoints to keep, from 1 to {_MOST_KEPT}")
        for name, value in intervals.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: an interval is at least 1; give a positive number, or None for none")
        self._folder = Path(folder)
        self._every_epochs = every_epochs
        self._every_steps = every_steps
        self._every_seconds = None if every_minutes is None else every_minutes * 60
        self._signals = StopSignals(limit_seconds=stop_seconds)
        self._saved_at = time.monotonic()
        self._keep_every_epochs = keep_every_epochs
        self._keep_best = keep_best
        self._keep = keep
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
        self._saved_at = time.monotonic()
        self._signals.watch()

    def close(self, state: State, logger: Logger) -> None:
        self._signals.unwatch()

    def eval_end(self, state: State, logger: Logger) -> None:
        metric = state.eval_metrics.get(self._evaluator, {}).get(self._best_metric)
        if state.dataloader_label == self._evaluator and metric is not None:
            self._evaluated = (int(state.timestamp.batch), float(metric.compute()))

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        signal, is_time = self._ask_all_ranks(state)
        due = is_time or (self._every_steps is not None and int(state.timestamp.batch) % self._every_steps == 0)
        if state.dataloader_len is not None and int(state.timestamp.batch_in_epoch) >= int(state.dataloader_len):
            self._due = due  # EPOCH_CHECKPOINT is next
            return
        is_best = self._take_best(state)
        if due or is_best or signal:
            self._save(state, is_best=is_best)
        self._stop_if(signal)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        epoch = int(state.timestamp.epoch)
        is_best = self._take_best(state)
        keeps = self._keep_every_epochs is not None and epoch % self._keep_every_epochs == 0
        regular = self._every_epochs is not None and epoch % self._every_epochs == 0
        signal, is_time = self._ask_all_ranks(state)
        if self._due or is_time or is_best or keeps or regular or signal:
            self._save(state, is_best=is_best, kept_name=f"ep{epoch}.pt" if keeps else None)
        self._due = False
        self._stop_if(signal)

    def fit_end(self, state: State, logger: Logger) -> None:
        self._fit_ended = True
        self._signals.unwatch()  # from here on nothing is lost
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

    def _ask_all_ranks(self, state: State) -> tuple[int, bool]:
        """A signal that any rank has received, 0 if none has; and whether rank 0's clock says that it is time."""
        is_time = self._every_seconds is not None and time.monotonic() - self._saved_at >= self._every_seconds
        if dist.get_world_size() == 1:
            return self._signals.received, is_time
        # Once a step, and small: Composer adds up the loss and the images of all ranks at every step as well.
        answers = torch.tensor([self._signals.received, int(is_time and dist.get_global_rank() == 0)])
        answers = state.device.tensor_to_device(answers)
        dist.all_reduce(answers, reduce_operation="MAX")
        signal, is_time = answers.tolist()
        return signal, bool(is_time)

    def _stop_if(self, signal: int) -> None:
        """End the process as the signal would have, now that the state is saved."""
        if signal:
            self._signals.unwatch()
            raise SystemExit(128 + signal)

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
        self._saved_at = time.monotonic()
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
                self._keep_previous()
                _give_name(written, self._folder / _LATEST, only=not self._sharded)
                _remove_unnamed(self._folder)

    def _keep_previous(self) -> None:
        """Give what is latest.pt now its next name. One rename at a time: a kill in between loses none."""
        for number in range(self._keep - 2, 0, -1):
            if (self._folder / _previous(number)).exists():
                os.replace(self._folder / _previous(number), self._folder / _previous(number + 1))
        latest = self._folder / _LATEST
        if self._keep > 1 and latest.exists():
            _give_name(latest.resolve() if latest.is_dir() else latest, self._folder / _previous(1))

    def _write(self, state: State, beside: Path) -> Path | None:
        """Write the state to `beside`, or to a folder of shards; returns its path, on rank 0 only."""
        if self._sharded:
            self._save_folder(state, beside)
            write_sums(beside)
            return _move_shards(beside, _stamp(state)) if dist.get_global_rank() == 0 else None
        # Composer fills in placeholders such as {epoch}; a brace in the folder's name is not one.
        name = str(beside).replace("{", "{{").replace("}", "}}")
        if checkpoint.save_checkpoint(state, name) is None:
            return None
        _sync(beside)
        return beside


def newest_first(folder: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints in `folder`, in the order in which a run should try to resume from them."""
    folder = Path(folder)
    numbered = [folder / _LATEST, *(folder / _previous(n) for n in range(1, _MOST_KEPT))]
    others = [path for path in folder.glob("*.pt") if path not in numbered and path.exists()]
    return [path for path in numbered if path.exists()] + sorted(others, key=_written, reverse=True)


def _previous(number: int) -> str:
    """The name of the checkpoint that is `number` saves older than latest.pt."""
    return f"previous{'' if number == 1 else f'-{number}'}.pt"


def _written(path: Path) -> tuple[int, str]:
    return path.stat().st_mtime_ns, path.name


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
