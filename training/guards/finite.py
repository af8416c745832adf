"""What to do when a step's loss or gradients are no numbers: stop, skip the step, or go on.

Nothing is waited for on a GPU. Flags that say which gradients are not finite are computed on the device before the
optimizer's step; they and the loss are read two steps late, or before an evaluation or a checkpoint. So a run ends up
to two steps after the one that it names, with nothing saved in between. Only `skip` has to know before the optimizer's
step, and waits for the backward pass; fp16's gradient scaler waits for it too.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor, nn

from data.whole_files import replace_file
from training.late import LateQueue, LateValue, Number
from training.recipe.keys import OnNan

log = logging.getLogger(__name__)
_untyped: Any = torch  # torch's type stubs lack the functions that work on lists of tensors

MOST_SKIPPED = 50  # steps in a row, after which nothing speaks for a better one
SUNK_SCALE = 1.0  # of fp16's gradients; torch begins at 65,536 and halves it at each overflow
IMAGES_FILE = "not_finite_images.txt"
_NAMED_IMAGES = 8
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # of compile, FSDP1, recomputation


class NotFinite(ValueError):
    """A loss, a gradient or a weight is nan or infinite; the message says which, where, and what to do."""


class FiniteGuard(Callback):
    """Checks the loss and the gradients of every step.

    Under fp16 the gradient scaler skips steps whose gradients overflow, which is no fault; a scale that has sunk below
    SUNK_SCALE is told once. Then the loss alone is checked, and only MOST_SKIPPED bad ones in a row count. So it is
    where the engine keeps gradients to itself, as ZeRO does, without the row.

    on_nan: "stop" raises NotFinite at the end of the step (on a GPU up to two steps later, and before anything is
        saved, if `settle` is called then); "skip" leaves the step out, and raises after MOST_SKIPPED
        in a row; "continue" tells it once.
    run_dir: for the list of the batch's images, and to name the last checkpoint.
    image_indices: this rank's images in batch `b` of epoch `e`, both from 0, as indices into the training data.
    """

    def __init__(
        self, on_nan: OnNan, *, run_dir: Path, image_indices: Callable[[int, int], Sequence[int]] | None = None
    ) -> None:
        self._on_nan = on_nan
        self._run_dir = run_dir
        self._image_indices = image_indices
        self._learning_rate = math.nan
        self._flags: LateValue | None = None  # of the step under way: 1 for each gradient that is not finite
        self._skipped_name: str | None = None  # the first gradient that was not, of a step left out
        self._unjudged: LateQueue[_Step] = LateQueue()
        self._bad_in_a_row = 0
        self._told_scale = False

    def fit_start(self, state: State, logger: Logger) -> None:
        """Raises NotFinite if a weight is not finite, as in a checkpoint of a run that had failed."""
        self._unjudged.clear()
        if self._on_nan != "continue" and agree(not_finite(weights(state.model))):
            name = _first(_on_all_ranks(_first_not_finite(state.model.named_parameters())))
            raise NotFinite(
                f"the weights of {name or 'another rank'} are not finite before the first step; "
                "start from another checkpoint, or from new weights"
            )

    def after_train_batch(self, state: State, logger: Logger) -> None:
        self._learning_rate = float(state.optimizers[0].param_groups[0]["lr"])
        self._flags = self._skipped_name = None
        gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
        if _scales(state) or not gradients or self._on_nan == "continue":
            return
        flags = which_not_finite(gradients)
        if any(_is_sharded(one) for one in gradients) or state.fsdp_enabled:
            dist.all_reduce(flags, reduce_operation="MAX")  # elsewhere every rank has the same gradients
        if self._on_nan == "stop":
            self._flags = LateValue(flags)
        elif flags.any().item():
            self._skipped_name = _first(_on_all_ranks(_first_not_finite(_named_gradients(state.model)))) or "?"
            for parameter in state.model.parameters():
                parameter.grad = None  # without gradients an optimizer changes neither weights nor its own state

    def batch_end(self, state: State, logger: Logger) -> None:
        step = _Step(
            number=int(state.timestamp.batch),
            epoch=int(state.timestamp.epoch),
            batch_in_epoch=int(state.timestamp.batch_in_epoch) - 1,
            learning_rate=self._learning_rate,
            loss=state.total_loss_dict.get("loss/train/total"),
            flags=self._flags,
            skipped_name=self._skipped_name,
        )
        self._unjudged.put(step, step.loss, step.flags)
        self._watch_scale(state)
        for due in self._unjudged.take_due():
            self._judge(due, state)

    def epoch_end(self, state: State, logger: Logger) -> None:
        self.settle(state)  # before the evaluation, and before FixRes changes which weights have gradients

    def settle(self, state: State) -> None:
        """Judge the steps up to now, for which this waits. Every rank must call it. Raises NotFinite."""
        for step in self._unjudged.take_all():
            self._judge(step, state)

    def _judge(self, step: _Step, state: State) -> None:
        bad_loss = step.loss is not None and not math.isfinite(float(step.loss))
        bad_gradient = step.skipped_name is not None or (step.flags is not None and any(step.flags.values))
        if not (bad_loss or bad_gradient):
            self._bad_in_a_row = 0
            return
        self._bad_in_a_row += 1
        what = f"a loss of {float(step.loss):g}" if bad_loss else _gradient_text(step, state)  # pyright: ignore
        where = (
            f"step {step.number}, in epoch {step.epoch + 1}, gave {what} at a learning rate of {step.learning_rate:.4g}"
        )
        if self._on_nan == "stop" and (not _scales(state) or self._bad_in_a_row >= MOST_SKIPPED):
            self._unjudged.clear()
            raise NotFinite(f"{where}. {self._images_text(step)}{self._advice()}")
        if self._on_nan == "skip" and self._bad_in_a_row >= MOST_SKIPPED:
            raise NotFinite(f"{where}, the last of {MOST_SKIPPED} in a row that were left out. {self._advice()}")
        if not _scales(state) and _is_power_of_two(self._bad_in_a_row) and dist.get_global_rank() == 0:
            done = "the step is left out" if step.skipped_name else f"on_nan={self._on_nan} goes on"
            log.warning("%s; %s", where, done)

    def _images_text(self, step: _Step) -> str:
        if self._image_indices is None:
            return ""
        own = self._image_indices(step.epoch, step.batch_in_epoch)
        images = [int(i) for part in dist.all_gather_object(list(own)) for i in part]
        path = self._run_dir / IMAGES_FILE
        if dist.get_global_rank() == 0:
            replace_file(path, lambda file: file.write("\n".join([*map(str, images), ""]).encode()))
        shown = ", ".join(map(str, images[:_NAMED_IMAGES]))
        more = f" and {len(images) - _NAMED_IMAGES} more" if len(images) > _NAMED_IMAGES else ""
        return f"Its images are number {shown}{more} of the training data (all of them: {path}). "

    def _advice(self) -> str:
        latest = self._run_dir / "checkpoints" / "latest.pt"
        kept = f"The last checkpoint before it is {latest}" if latest.exists() else "There is no checkpoint before it"
        return f"{kept}. Lower the learning rate, or leave such steps out with on_nan=skip"

    def _watch_scale(self, state: State) -> None:
        if self._told_scale or not _scales(state):
            return
        scale = state.scaler.get_scale()  # pyright: ignore[reportOptionalMemberAccess]
        if scale < SUNK_SCALE:
            self._told_scale = True
            if dist.get_global_rank() == 0:
                log.warning(
                    "step %d: fp16's gradient scale has sunk to %g, since gradients kept overflowing; lower the "
                    "learning rate, or use precision=amp_bf16",
                    int(state.timestamp.batch),
                    scale,
                )


@dataclass(frozen=True)
class _Step:
    """A step whose loss and gradients may not be known yet. epoch and batch_in_epoch count from 0, number from 1."""

    number: int
    epoch: int
    batch_in_epoch: int
    learning_rate: float
    loss: Number | None
    flags: LateValue | None
    skipped_name: str | None


def not_finite(tensors: Iterable[Tensor]) -> Tensor:
    """A 0-dimensional float32 tensor on the tensors' device: 1 if any of their values is nan or infinite, otherwise 0.

    Of sharded tensors this rank's part is looked at. Nothing is waited for.
    """
    tensors = list(tensors)
    return which_not_finite(tensors).amax() if tensors else torch.zeros(())


def which_not_finite(tensors: Sequence[Tensor]) -> Tensor:
    """For each of the tensors, at least one, 1 if any of its values is nan or infinite, otherwise 0: float32 [N].

    Of sharded tensors this rank's part is looked at. Nothing is waited for.
    """
    local = [part if part.numel() else part.new_zeros(1) for part in map(_local, tensors)]
    # Extremes are nan if any value is; a sum of squares could overflow. On a GPU one kernel takes many tensors; on a
    # CPU the extremes of each are found several times as fast.
    if local[0].device.type == "cpu":
        extremes = [end for part in local for end in torch.aminmax(part)]
    else:
        extremes = list(_untyped._foreach_norm(local, math.inf))
    if len({one.dtype for one in extremes}) > 1:
        extremes = [one.double() for one in extremes]
    return (~torch.isfinite(torch.stack(extremes))).view(len(local), -1).any(dim=1).float()


def agree(flag: Tensor) -> bool:
    """Whether `flag` is set on any rank; every rank must call this."""
    if dist.get_world_size() > 1:
        return any(dist.all_gather_object(bool(flag.item())))
    return bool(flag.item())


def weights(model: nn.Module) -> Iterator[Tensor]:
    """The model's weights, or this rank's part of them under ZeRO 3."""
    for parameter in model.parameters():
        yield getattr(parameter, "ds_tensor", parameter).detach()


def _named_gradients(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            yield name, parameter.grad


def _gradient_text(step: _Step, state: State) -> str:
    name = step.skipped_name
    if step.flags is not None:
        names = [name for name, parameter in state.model.named_parameters() if parameter.grad is not None]
        name = _plain(next(name for name, flag in zip(names, step.flags.values, strict=True) if flag))
    return f"gradients of {name or 'a weight'} that are not finite"


def _first_not_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    for name, tensor in named:
        if not_finite([tensor.detach()]).item():
            return _plain(name)
    return None


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("module.").removeprefix("module.")  # DDP's, and ImageClassifier's own


def _on_all_ranks(name: str | None) -> list[str | None]:
    return dist.all_gather_object(name)


def _first(names: Sequence[str | None]) -> str | None:
    return next(filter(None, names), None)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if _is_sharded(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def _is_sharded(tensor: Any) -> bool:
    return hasattr(tensor, "to_local")


def _scales(state: State) -> bool:
    return state.scaler is not None and state.scaler.is_enabled()


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
