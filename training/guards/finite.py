"""What to do when a step's loss or gradients are no numbers: stop, skip the step, or go on.

Nothing more is waited for on a GPU than without this. The flag that says whether the gradients are finite is computed
on the device before the optimizer's step, and read at the step's end, after the loss, for which the Trainer waits in
any case. Only `skip` has to know before the optimizer's step, and waits for the backward pass.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor, nn

from data.whole_files import replace_file
from training.recipe.keys import OnNan

log = logging.getLogger(__name__)

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

    on_nan: "stop" raises NotFinite at the end of the step; "skip" leaves the step out, and raises after MOST_SKIPPED
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
        self._flag: Tensor | None = None  # of the step under way: 1 if a gradient is not finite
        self._skipped_name: str | None = None  # the first gradient that was not, of a step left out
        self._bad_in_a_row = 0
        self._told_scale = False

    def fit_start(self, state: State, logger: Logger) -> None:
        """Raises NotFinite if a weight is not finite, as in a checkpoint of a run that had failed."""
        if self._on_nan != "continue" and agree(not_finite(weights(state.model))):
            name = _first(_on_all_ranks(_first_not_finite(state.model.named_parameters())))
            raise NotFinite(
                f"the weights of {name or 'another rank'} are not finite before the first step; "
                "start from another checkpoint, or from new weights"
            )

    def after_train_batch(self, state: State, logger: Logger) -> None:
        self._learning_rate = float(state.optimizers[0].param_groups[0]["lr"])
        self._flag = self._skipped_name = None
        gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
        if _scales(state) or not gradients or self._on_nan == "continue":
            return
        flag = not_finite(gradients)
        if any(_is_sharded(one) for one in gradients) or state.fsdp_enabled:
            dist.all_reduce(flag, reduce_operation="MAX")  # elsewhere every rank has the same gradients
        if self._on_nan == "stop":
            self._flag = flag
        elif flag.item():
            self._skipped_name = _first(_on_all_ranks(_first_not_finite(_named_gradients(state.model)))) or "?"
            for parameter in state.model.parameters():
                parameter.grad = None  # without gradients an optimizer changes neither weights nor its own state

    def batch_end(self, state: State, logger: Logger) -> None:
        loss = state.total_loss_dict.get("loss/train/total")
        bad_loss = loss is not None and not math.isfinite(float(loss))
        bad_gradient = self._skipped_name is not None or (self._flag is not None and bool(self._flag.item()))
        self._watch_scale(state)
        if not (bad_loss or bad_gradient):
            self._bad_in_a_row = 0
            return
        self._bad_in_a_row += 1
        what = f"a loss of {float(loss):g}" if bad_loss else self._gradient_text(state)  # pyright: ignore
        step, epoch = int(state.timestamp.batch), int(state.timestamp.epoch) + 1
        where = f"step {step}, in epoch {epoch}, gave {what} at a learning rate of {self._learning_rate:.4g}"
        if self._on_nan == "stop" and (not _scales(state) or self._bad_in_a_row >= MOST_SKIPPED):
            raise NotFinite(f"{where}. {self._images_text(state)}{self._advice()}")
        if self._on_nan == "skip" and self._bad_in_a_row >= MOST_SKIPPED:
            raise NotFinite(f"{where}, the last of {MOST_SKIPPED} in a row that were left out. {self._advice()}")
        if not _scales(state) and _is_power_of_two(self._bad_in_a_row) and dist.get_global_rank() == 0:
            done = "the step is left out" if self._skipped_name else f"on_nan={self._on_nan} goes on"
            log.warning("%s; %s", where, done)

    def _gradient_text(self, state: State) -> str:
        name = self._skipped_name or _first(_on_all_ranks(_first_not_finite(_named_gradients(state.model))))
        return f"gradients of {name or 'a weight'} that are not finite"

    def _images_text(self, state: State) -> str:
        if self._image_indices is None:
            return ""
        own = self._image_indices(int(state.timestamp.epoch), int(state.timestamp.batch_in_epoch) - 1)
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


def not_finite(tensors: Iterable[Tensor]) -> Tensor:
    """A 0-dimensional float32 tensor on the tensors' device: 1 if any of their values is nan or infinite, otherwise 0.

    Of sharded tensors this rank's part is looked at. Nothing is waited for.
    """
    local = [part for tensor in tensors if (part := _local(tensor)).numel()]
    if not local:
        return torch.zeros(())
    # Extremes are nan if any value is; a sum of squares could overflow. On a GPU one kernel takes many tensors; on a
    # CPU the extremes of each are found several times as fast.
    if local[0].device.type == "cpu":
        extremes = torch.stack([end.double() for tensor in local for end in torch.aminmax(tensor)])
    else:
        extremes = torch.nn.utils.get_total_norm(local, norm_type=math.inf)
    return (~torch.isfinite(extremes)).any().float()


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


def _first_not_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    for name, tensor in named:
        if not_finite([tensor.detach()]).item():
            for wrapper in _WRAPPERS:
                name = name.replace(wrapper, "")
            return name.removeprefix("module.").removeprefix("module.")  # DDP's, and ImageClassifier's own
    return None


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
