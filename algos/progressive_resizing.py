"""Progressive resizing: early epochs on small images, which cost less, and late ones at full size.

Howard & Gugger 2020 (Deep Learning for Coders with fastai and PyTorch, chapter 7); Tan & Le 2021 (arXiv 2104.00298).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

from algos.base import Contract, Event, Logger, Resource, SpeedUp, State, world_size
from algos.learning_rate import require_schedule, run_epochs
from algos.protocols import ResizableLoader

log = logging.getLogger(__name__)

LearningRateScaling = Literal["none", "linear", "sqrt"]


@dataclass(frozen=True)
class Stage:
    """A number of epochs at one image size, and perhaps at a batch size of its own.

    image_size: px, side of the square images. A batch size of None keeps the loader's own; give at most one.
    """

    epochs: int
    image_size: int
    per_device_batch_size: int | None = None
    global_batch_size: int | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"a stage's {name} is {value!r}; it must be a whole number of at least 1")
        if self.per_device_batch_size is not None and self.global_batch_size is not None:
            raise ValueError(
                f"a stage gives per_device_batch_size {self.per_device_batch_size} and global_batch_size "
                f"{self.global_batch_size}; give one of them"
            )


def stage_at(epoch: int, stages: Sequence[Stage]) -> Stage:
    """The stage that `epoch` (counted from 0) falls into. Raises ValueError past the last one's end."""
    end = 0
    for stage in stages:
        end += stage.epochs
        if epoch < end:
            return stage
    raise ValueError(f"epoch {epoch} lies beyond the {end} epochs that the stages cover; lengthen the last stage")


def ramp_stages(
    *,
    total_epochs: int,
    final_image_size: int,
    initial_scale: float = 0.5,
    delay_fraction: float = 0.4,
    finetune_fraction: float = 0.2,
    size_multiple: int = 4,
) -> list[Stage]:
    """Stages whose size rises linearly from `initial_scale` times the final one to all of it.

    The scale at epoch e of E is s0 + (1 - s0) clip((e/E - d) / (1 - d - f), 0, 1), with d = `delay_fraction` (share of
    the run before the rise) and f = `finetune_fraction` (share at full size at the end); sizes are rounded to the
    nearest multiple of `size_multiple` px, and the last one is `final_image_size` exactly.

    Raises ValueError for shares outside 0..1, d + f > 1, or a scale outside (0, 1].
    """
    if not 0 < initial_scale <= 1:
        raise ValueError(f"initial_scale is {initial_scale}; it must lie in (0, 1]")
    if delay_fraction < 0 or finetune_fraction < 0 or delay_fraction + finetune_fraction > 1:
        raise ValueError(
            f"delay_fraction {delay_fraction} and finetune_fraction {finetune_fraction} are shares of the run: "
            "neither may be negative, nor their sum exceed 1"
        )
    if size_multiple < 1:
        raise ValueError(f"size_multiple is {size_multiple}; it must be at least 1 px")
    rise = 1.0 - delay_fraction - finetune_fraction

    def size(epoch: int) -> int:
        elapsed = epoch / total_epochs - delay_fraction
        share = min(max(elapsed / rise, 0.0), 1.0) if rise > 0 else float(elapsed >= 0)
        scale = initial_scale + (1.0 - initial_scale) * share
        if scale >= 1.0:
            return final_image_size
        return max(size_multiple, round(final_image_size * scale / size_multiple) * size_multiple)

    sizes = [size(epoch) for epoch in range(total_epochs)]
    return [Stage(epochs=len(list(run)), image_size=image_size) for image_size, run in groupby(sizes)]


class ProgressiveResizing(SpeedUp):
    """Trains each stage's epochs at its image size and batch size.

    stages: explicit ones, covering the whole run; None makes a ramp of the other settings (see `ramp_stages`) up to the
    loader's own image size.
    learning_rate_scaling: what a stage with another batch size than the loader's does to the learning rate: nothing,
    times the ratio of the batch sizes ("linear", Goyal 2017), or times its square root.

    The size changes inside the loader when it is a `ResizableLoader`, so images are decoded at the size that they are
    trained at; else batches are resized on the device, anti-aliased, and the log says so (a batch size cannot change
    then, and is refused).
    """

    contract = Contract(owns=[Resource.LOADER_SHAPE], writes=[Resource.IMAGES])
    events = (Event.FIT_START, Event.EPOCH_START, Event.BATCH_START)

    def __init__(
        self,
        *,
        stages: list[Stage] | None = None,
        initial_scale: float = 0.5,
        delay_fraction: float = 0.4,
        finetune_fraction: float = 0.2,
        size_multiple: int = 4,
        learning_rate_scaling: LearningRateScaling = "none",
    ) -> None:
        if stages is not None and not stages:
            raise ValueError("stages is an empty list; give at least one stage, or leave it out for a ramp")
        if learning_rate_scaling not in ("none", "linear", "sqrt"):
            raise ValueError(f"learning_rate_scaling is {learning_rate_scaling!r}; it is none, linear or sqrt")
        self.stages = None if stages is None else list(stages)
        self.learning_rate_scaling = learning_rate_scaling
        self._ramp = dict(
            initial_scale=initial_scale,
            delay_fraction=delay_fraction,
            finetune_fraction=finetune_fraction,
            size_multiple=size_multiple,
        )
        ramp_stages(total_epochs=1, final_image_size=size_multiple, **self._ramp)  # raises for what cannot be
        self._reference_batch_size: int | None = None  # images a device that the learning rate was chosen for
        self._loaded_stages: list[dict[str, Any]] | None = None

    def prepare(self, *, total_epochs: int, image_size: int, per_device_batch_size: int | None) -> None:
        """Fix the stages for a run of `total_epochs` whose loader is set to these sizes.

        Raises ValueError when explicit stages do not cover the run exactly.
        """
        if self.stages is None:
            self.stages = ramp_stages(total_epochs=total_epochs, final_image_size=image_size, **self._ramp)
        covered = sum(stage.epochs for stage in self.stages)
        if covered != total_epochs:
            lengths = " + ".join(str(stage.epochs) for stage in self.stages)
            raise ValueError(
                f"the stages of progressive_resizing cover {lengths} = {covered} epochs and the run has {total_epochs}; "
                "they must be equal"
            )
        if self._reference_batch_size is None:
            self._reference_batch_size = per_device_batch_size

    def stage(self, epoch: int) -> Stage:
        """The stage of `epoch` (counted from 0); only after `prepare`."""
        assert self.stages is not None, "prepare() comes first"
        return stage_at(epoch, self.stages)

    def per_device_batch_size(self, epoch: int, num_ranks: int) -> int:
        """Images a device in a batch of `epoch`. Raises ValueError when a global one does not divide over the ranks."""
        assert self._reference_batch_size is not None, "prepare() comes first"
        stage = self.stage(epoch)
        if stage.per_device_batch_size is not None:
            return stage.per_device_batch_size
        if stage.global_batch_size is None:
            return self._reference_batch_size
        if stage.global_batch_size % num_ranks:
            raise ValueError(
                f"a stage's global_batch_size is {stage.global_batch_size} and there are {num_ranks} ranks; "
                f"make it a multiple of {num_ranks}"
            )
        return stage.global_batch_size // num_ranks

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.BATCH_START:
            self._resize_on_device(state)
            return
        if event == Event.FIT_START:
            self._bind(state)
        if isinstance(state.dataloader, ResizableLoader):
            epoch = state.timestamp.epoch.value
            state.dataloader.set_image_size(self.stage(epoch).image_size)
            _set_batch_size(state, state.dataloader, self.per_device_batch_size(epoch, world_size()))

    def modify_learning_rate(self, learning_rate: float, epoch: float, total_epochs: float) -> float:
        """Scale by the stage's batch size against the one that the recipe's rate was given for."""
        if self.learning_rate_scaling == "none" or self._reference_batch_size is None:
            return learning_rate
        ratio = self.per_device_batch_size(int(epoch), world_size()) / self._reference_batch_size
        return learning_rate * (ratio if self.learning_rate_scaling == "linear" else ratio**0.5)

    def state_dict(self) -> dict[str, Any]:
        """The stages in force, so that a resumed run can be refused when its plan is another."""
        return {"stages": None if self.stages is None else [asdict(stage) for stage in self.stages]}

    def load_state_dict(self, state: dict[str, Any], strict: bool = False) -> None:
        self._loaded_stages = state.get("stages")

    def _bind(self, state: State) -> None:
        loader = state.dataloader
        resizable = isinstance(loader, ResizableLoader)
        if self.stages is None and not resizable:
            raise ValueError(
                f"progressive_resizing has no stages and the loader, a {type(loader).__name__}, does not tell its image "
                "size to make a ramp for; give explicit stages"
            )
        self.prepare(
            total_epochs=run_epochs(state),
            image_size=getattr(loader, "image_size", 0),
            per_device_batch_size=getattr(loader, "batch_size", None),
        )
        assert self.stages is not None
        self._refuse_another_plan()
        if self.learning_rate_scaling != "none":
            require_schedule(state, f"progressive_resizing.learning_rate_scaling={self.learning_rate_scaling}")
        if resizable:
            return
        if any(stage.per_device_batch_size or stage.global_batch_size for stage in self.stages):
            raise ValueError(
                f"a stage sets a batch size, and the loader, a {type(loader).__name__}, cannot change it; use a loader "
                "with set_image_size and set_batch_size (algos.protocols.ResizableLoader), or drop the batch sizes"
            )
        log.warning("%s cannot change its image size: batches are resized on the device", type(loader).__name__)

    def _refuse_another_plan(self) -> None:
        assert self.stages is not None
        if self._loaded_stages is not None and self._loaded_stages != [asdict(stage) for stage in self.stages]:
            raise ValueError(
                f"the checkpoint was trained with the stages {self._loaded_stages} and this run has {self.stages}; "
                "resume with the same stages, or start a new run"
            )

    def _resize_on_device(self, state: State) -> None:
        if isinstance(state.dataloader, ResizableLoader):
            return
        images, targets = state.batch
        size = self.stage(state.timestamp.epoch.value).image_size
        state.batch = (resize_images(images, image_size=size), targets)


def resize_images(images: Tensor, *, image_size: int) -> Tensor:
    """Images [N, C, H, W] of floats resized to [N, C, image_size, image_size], bilinear with an anti-aliasing filter."""
    if images.shape[-2:] == (image_size, image_size):
        return images
    return F.interpolate(images, size=(image_size, image_size), mode="bilinear", antialias=True)


def _set_batch_size(state: State, loader: ResizableLoader, per_device_batch_size: int) -> None:
    before = loader.batch_size
    if per_device_batch_size == before:
        return
    loader.set_batch_size(per_device_batch_size)
    # Composer reads both once, when the Trainer is made: a stale length drops part of every epoch, and a stale
    # microbatch size splits the larger batch in pieces that nobody asked for.
    state.dataloader_len = -1
    if state.device_train_microbatch_size == before:
        state.device_train_microbatch_size = per_device_batch_size
