"""Saves the whole training state, so that a run killed at any moment can resume from its last checkpoint."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import checkpoint, dist, reproducibility
from torch import Tensor, distributed
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException

from training.checkpoints.background import Background, Copies
from training.checkpoints.gathering import gather, parameters
from training.checkpoints.names import (
    BEST,
    LATEST,
    MOST_KEPT,
    beside_of,
    check_writable,
    explained,
    give_name,
    keep_previous,
    move_shards,
    prepare,
    remove_unnamed,
    sync,
)
from training.checkpoints.remote.uploads import Uploads
from training.checkpoints.sharded import gather_shards, write_shards
from training.checkpoints.sums import write_sums
from training.guards.finite import agree, not_finite, weights
from training.guards.stop_signals import StopSignals
from training.late import LateQueue, LateValue

log = logging.getLogger(__name__)

_UPLOAD_SECONDS = 600.0  # that the end of training waits for the last upload
_MARGIN_SECONDS = 1.0  # of checkpoints.stop_seconds, for what follows the upload


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
    asynchronous: training waits for a copy of the state in the CPU's memory, which a thread writes. What
        goes wrong is raised at the next save, or at the end. What `save_folder` writes is always waited for.
    stop_seconds: SIGTERM and SIGUSR1 on any rank, while it trains, end the run with 128 + the signal's number at the
        end of the step, after a save; or after so many seconds, whatever it does then.
    uploads: copies what is saved to another place. At the end, rank 0 waits for the last one, the others for it.
    before_save: called with the state before each save, by every rank; what it raises keeps the save from happening.
    save_folder: writes another engine's shards; every rank calls it with the state and the path of a folder that does
        not exist yet.

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
        asynchronous: bool = True,
        stop_seconds: float = 30.0,
        save_folder: Callable[[State, Path], None] | None = None,
        before_save: Callable[[State], None] | None = None,
        uploads: Uploads | None = None,
    ) -> None:
        intervals = {
            "every_epochs": every_epochs, "every_steps": every_steps, "keep_every_epochs": keep_every_epochs,
        }  # fmt: skip
        if every_minutes is not None and not every_minutes > 0:
            raise ValueError(f"every_minutes={every_minutes}: give a positive number, or None")
        if not 1 <= keep <= MOST_KEPT:
            raise ValueError(f"keep={keep}: give the number of checkpoints to keep, from 1 to {MOST_KEPT}")
        for name, value in intervals.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: an interval is at least 1; give a positive number, or None for none")
        self._folder = Path(folder)
        self._every_epochs = every_epochs
        self._every_steps = every_steps
        self._every_seconds = None if every_minutes is None else every_minutes * 60
        self._signals = StopSignals(limit_seconds=stop_seconds, has_launcher=dist.get_world_size() > 1)
        self._saved_at = time.monotonic()
        self._keep_every_epochs = keep_every_epochs
        self._keep_best = keep_best
        self._keep = keep
        self._best_metric = best_metric
        self._evaluator = evaluator
        self._sharded = sharded
        self._asynchronous = asynchronous
        self._background = Background()
        self._copies = Copies()
        self._save_folder = save_folder
        self._before_save = before_save
        self._answers: LateQueue[LateValue] = LateQueue()  # of all ranks, at the last steps
        self._group: Any = None
        self._uploads = uploads
        self._best: float | None = None
        self._evaluated: tuple[int, float] | None = None  # step and value of the latest evaluation
        self._saved: tuple[int, int] | None = None  # epoch and step of the latest save
        self._due = False  # a save by steps that waits for the end of its epoch
        self._fit_ended = False
        if dist.get_global_rank() == 0:
            check_writable(self._folder)

    @property
    def best(self) -> float | None:
        """The best value of the metric so far; None before the first evaluation."""
        return self._best

    def init(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0:
            prepare(self._folder)

    def fit_start(self, state: State, logger: Logger) -> None:
        if state.fsdp_sharded_state_dict_enabled:
            raise ValueError(
                "state_dict_type is 'sharded', which is Composer's own format; set the FSDP configuration's "
                "state_dict_type to 'full', and Checkpoints' sharded to true for shards"
            )
        self._fit_ended = False
        self._due = False
        self._saved_at = time.monotonic()
        self._answers.clear()
        self._signals.watch()
        if self._uploads is not None and dist.get_global_rank() == 0:
            self._uploads.start(fresh=not int(state.timestamp.batch))

    def close(self, state: State, logger: Logger) -> None:
        self._signals.unwatch()
        try:
            self._background.wait()
        except (Exception, CheckpointException) as error:
            log.error("%s", error)  # on the way out for another reason; after a training to its end, fit_end has waited
        if self._uploads is not None:
            error = sys.exc_info()[1]
            if error is None and not self._uploads.is_started and dist.get_global_rank() == 0:
                self._upload_complete(_stamp(state))
            by_hand = isinstance(error, KeyboardInterrupt)
            self._uploads.close(seconds=0 if by_hand else self._signals.left_seconds)

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
        self._background.wait()
        self._finish_uploads(_UPLOAD_SECONDS)

    def eval_after_all(self, state: State, logger: Logger) -> None:
        # If evaluation is not due after every epoch, the Trainer runs a last one after FIT_END.
        if self._fit_ended and self._evaluated is not None and self._evaluated[0] == int(state.timestamp.batch):
            self._fit_ended = False
            self._save(state, is_best=self._take_best(state))
            self._background.wait()
            self._finish_uploads(_UPLOAD_SECONDS)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "best_metric": self._best_metric}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # The best value of another metric says nothing about this one.
        self._best = state["best"] if state["best_metric"] == self._best_metric else None

    def _ask_all_ranks(self, state: State) -> tuple[int, bool]:
        """A signal that any rank has received, 0 if none has; and whether rank 0's clock says that it is time.

        Ranks that use GPUs answer two steps late, since the host would have to wait for the answers.
        """
        is_time = self._every_seconds is not None and time.monotonic() - self._saved_at >= self._every_seconds
        if dist.get_world_size() == 1:
            return self._signals.received, is_time
        # Once a step, and small: Composer adds up the loss and the images of all ranks at every step as well.
        answers = torch.tensor([self._signals.received, int(is_time and dist.get_global_rank() == 0)])
        answers = state.device.tensor_to_device(answers)
        dist.all_reduce(answers, reduce_operation="MAX")
        answers = LateValue(answers)
        self._answers.put(answers, answers)
        due = [answer.values for answer in self._answers.take_due()]
        return int(max((signal for signal, _ in due), default=0)), any(is_time for _, is_time in due)

    def _stop_if(self, signal: int) -> None:
        """End the process as the signal would have, now that the state is saved."""
        if signal:
            self._background.wait()
            self._finish_uploads(self._signals.left_seconds - _MARGIN_SECONDS)
            self._signals.unwatch()
            raise SystemExit(128 + signal)

    def _finish_uploads(self, seconds: float) -> None:
        if self._uploads is not None:
            self._uploads.finish(seconds=seconds)
            if dist.get_global_rank() == 0:
                remove_unnamed(self._folder)

    def _upload_complete(self, stamp: tuple[int, int]) -> None:
        """For a run that was complete when it was started again: its last upload may not have made it."""
        assert self._uploads is not None
        latest, best = self._folder / LATEST, self._folder / BEST
        if stamp[1] and latest.exists():
            self._uploads.start(fresh=False)
            names = [LATEST, *([BEST] if best.exists() and best.samefile(latest) else [])]
            self._uploads.offer(latest.resolve(), names, stamp)

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
        if self._before_save is not None:
            self._before_save(state)
        self._saved, self._saved_at = _stamp(state), time.monotonic()
        self._answers.clear()  # those on their way may still ask for this save
        beside, stamp = beside_of(self._folder / LATEST), self._saved
        names = [*([BEST] if is_best else []), *([kept_name] if kept_name is not None else [])]
        if self._sharded:
            if not self._refuses(agree(not_finite(weights(state.model))), stamp):
                self._save_shards(state, beside, names, stamp)
            return
        whole = {"state": gather(state), "rng": reproducibility.get_rng_state()}  # all ranks take part
        if dist.get_global_rank() != 0:
            return
        if self._asynchronous:
            self._background.wait()  # what is being written lies in the memory that the copy takes
            whole = self._copies.of(whole)
        write = partial(self._write, whole, parameters(state.model, whole["state"]), beside, names, stamp)
        self._background.start(write) if self._asynchronous else write()

    def _refuses(self, bad: bool, stamp: tuple[int, int]) -> bool:
        """Whether weights are `bad`, not finite; says so."""
        if bad and dist.get_global_rank() == 0:
            log.warning(
                "the weights after step %d are not finite; they are not saved, and %s keeps what it holds",
                stamp[1],
                self._folder,
            )
        return bad

    def _save_shards(self, state: State, beside: Path, names: Sequence[str], stamp: tuple[int, int]) -> None:
        if self._save_folder is not None:
            self._write_shards(partial(self._save_folder, state), beside, names, stamp)
            return
        if not self._asynchronous:
            self._write_shards(partial(write_shards, gather_shards(state)), beside, names, stamp)
            return
        self._background.wait()
        write = partial(write_shards, self._copies.of(gather_shards(state)), group=self._threads_group())
        self._background.start(partial(self._write_shards, write, beside, names, stamp, group=self._threads_group()))

    def _write_shards(
        self,
        write: Callable[[Path], None],
        beside: Path,
        names: Sequence[str],
        stamp: tuple[int, int],
        *,
        group: ProcessGroup | None = None,
    ) -> None:
        with explained(beside):
            write(beside)
            write_sums(beside, group=group)
            if dist.get_global_rank() == 0:
                self._name(move_shards(beside, stamp), names, stamp)

    def _threads_group(self) -> Any:
        """Through which the threads of all ranks agree while training uses the other; None in a single process."""
        if self._group is None and distributed.is_initialized():
            self._group = distributed.new_group(backend="gloo")
        return self._group

    def _write(
        self,
        whole: dict[str, Any],
        judged: Sequence[Tensor],
        beside: Path,
        names: Sequence[str],
        stamp: tuple[int, int],
    ) -> None:
        """judged: the tensors in `whole` that must be finite."""
        if self._refuses(bool(not_finite(judged)), stamp):
            return
        with explained(beside):
            checkpoint._write_checkpoint_file(whole, str(beside))
            sync(beside)
            self._name(beside, names, stamp)

    def _name(self, written: Path, names: Sequence[str], stamp: tuple[int, int]) -> None:
        """Give a complete checkpoint its names. latest.pt is last: a run killed in between resumes from before this
        evaluation, and repeats it."""
        for name in names:
            give_name(written, self._folder / name)
        keep_previous(self._folder, self._keep)
        give_name(written, self._folder / LATEST, only=not self._sharded)
        if self._uploads is not None:
            self._uploads.offer(written if self._sharded else self._folder / LATEST, [LATEST, *names], stamp)
        remove_unnamed(self._folder)


def _stamp(state: State) -> tuple[int, int]:
    return int(state.timestamp.epoch), int(state.timestamp.batch)
