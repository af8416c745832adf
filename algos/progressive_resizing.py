"""Progressive resizing: early epochs on small images, which cost less, and late ones at full size.

Howard & Gugger 2020 (Deep Learning for Coders with fastai and PyTorch, chapter 7); Tan & Le 2021 (arXiv 2104.00298).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .framework.base import Contract, Event, Logger, Resource, SpeedUp, State, world_size
from .framework.batches import split_batch
from .framework.protocols import MixedSizesLoader, ResizableLoader
from .learning_rate import require_schedule, run_epochs, run_length
from .resizing.sampled_sizes import SampledSizes, Shape
from .resizing.stages import Stage, as_stage, described, ramp_size, ramp_stages, stage_at

log = logging.getLogger(__name__)

LearningRateScaling = Literal["none", "linear", "sqrt"]
Schedule = Literal["stages", "ramp", "sampled"]

_HALVES = (torch.float16, torch.bfloat16)


def resize_images(images: Tensor, *, image_size: int) -> Tensor:
    """Floating-point images [N, C, H, W] resized to [N, C, S, S], S = `image_size` px, bilinear and anti-aliased.

    Downscaling averages over every source pixel, so patterns finer than the new grid fade instead of aliasing. Dtype
    and memory format are kept; images already of that size are returned as they are.

    Raises ValueError for integer images, images that are not square, and a size below 1.
    """
    if not images.is_floating_point():
        raise ValueError(
            f"received {str(images.dtype).removeprefix('torch.')} images; resizing needs floating point: "
            "normalize the images (or have the loader do it) first"
        )
    if images.ndim != 4 or images.shape[-1] != images.shape[-2]:
        raise ValueError(
            f"received images of shape {list(images.shape)}; they must be [N, C, S, S], since others would be "
            "distorted: crop them to squares first"
        )
    if image_size < 1:
        raise ValueError(f"image_size {image_size} must be at least 1 px")
    if images.shape[-1] == image_size:
        return images
    # torch does not filter half-precision images on CPU.
    wide = images.float() if images.device.type == "cpu" and images.dtype in _HALVES else images
    return F.interpolate(wide, size=(image_size, image_size), mode="bilinear", antialias=True).to(images.dtype)


class ProgressiveResizing(SpeedUp):
    """Trains each stage's epochs at its image size and batch size, or each step at a size that is drawn.

    schedule: "stages", explicit ones; "ramp" (see `ramp_stages`), up to the images' own size; "sampled", a size for
        each step (see `SampledSizes`). None: what the other settings are for; without any a ramp.
    stages: explicit ones that cover the whole run.
    initial_scale, delay_fraction, finetune_fraction, size_multiple: of the ramp.
    sizes, per_device_batch_sizes, global_batch_sizes, final_epochs, spread, uniform_share: of the draws.
    learning_rate_scaling: how a stage, or a draw, whose batch size differs from the loader's scales the learning rate:
        not at all ("none"), by the ratio of the batch sizes ("linear", Goyal 2017), or by its square root ("sqrt").
        Scaling needs a LearningRate among the algorithms.

    A `ResizableLoader` changes the size itself, so images are decoded at the size at which they are trained; otherwise
    batches are resized on the device with anti-aliasing, which is logged (batch sizes cannot change then, and are
    refused). A stage without a batch size uses the loader's. On the device, a ramp is a share of each batch's own
    size; in a run whose length is given in batches it rises from batch to batch. Draws need a `MixedSizesLoader`, or a
    loader that knows its length.

    Size and batch size depend only on the epoch (or the batch) and the run's length, so a resumed run continues where
    the interrupted one stopped. Another `fit` of the same Trainer extends the run, and the ramp with it. Before the
    first step it refuses stages that do not cover the run, sizes that the loader rejects, a global batch size that does
    not divide over the ranks, a batch size in a run whose length is given in batches, and resuming a run that had
    other stages.
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
        schedule: Schedule | None = None,
        sizes: list[int] | None = None,
        per_device_batch_sizes: list[int] | None = None,
        global_batch_sizes: list[int] | None = None,
        final_epochs: int = 0,
        spread: float = 0.65,
        uniform_share: float = 0.1,
    ) -> None:
        if stages is not None and not stages:
            raise ValueError("stages is an empty list; give at least one stage, or leave it out for a ramp")
        _check_schedule(schedule, stages=stages, sizes=sizes)
        if learning_rate_scaling not in ("none", "linear", "sqrt"):
            raise ValueError(f"learning_rate_scaling {learning_rate_scaling!r} must be 'none', 'linear' or 'sqrt'")
        self.stages = None if stages is None else [as_stage(stage) for stage in stages]
        self._follows_ramp = stages is None and sizes is None
        self._sampled: SampledSizes | None = None
        if sizes is not None:
            self._sampled = SampledSizes(
                tuple(sizes),
                None if per_device_batch_sizes is None else tuple(per_device_batch_sizes),
                None if global_batch_sizes is None else tuple(global_batch_sizes),
                final_epochs,
                spread,
                uniform_share,
            )
        elif per_device_batch_sizes is not None or global_batch_sizes is not None or final_epochs:
            raise ValueError(
                "per_device_batch_sizes, global_batch_sizes and final_epochs are of drawn sizes, and sizes is not "
                "given; give sizes, or leave them out"
            )
        self.learning_rate_scaling = learning_rate_scaling
        self._ramp: dict[str, Any] = dict(
            initial_scale=initial_scale,
            delay_fraction=delay_fraction,
            finetune_fraction=finetune_fraction,
            size_multiple=size_multiple,
        )
        ramp_stages(total_epochs=1, final_image_size=1, **self._ramp)  # raises for invalid settings
        self._full_image_size: int | None = None  # px, of the loader before any stage
        self._reference_batch_size: int | None = None  # images per device that the learning rate was chosen for
        self._microbatch_size: int | float | None = None  # the run's own; None: a batch is not split
        self._num_ranks: int | None = None  # that a plan is made for; None: those that train together
        self._batch_size: int | None = None  # images per device in the current stage
        self._total_epochs = self._num_images = self._seed = 0  # of the run, for draws
        self._drop_last = False
        self._shapes: tuple[int, list[Shape]] | None = None  # of the epoch that was asked for last
        self._num_steps: tuple[int, int] | None = None  # the current epoch and its steps
        self._batches_per_epoch: int | None = None  # the run's own; None: all of the loader's
        self._loaded_plan: dict[str, Any] | None = None

    def prepare(
        self,
        *,
        total_epochs: int,
        image_size: int,
        per_device_batch_size: int | None,
        num_ranks: int | None = None,
        num_images: int = 1,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        """Fix the stages for a run of `total_epochs` whose loader is set to these sizes.

        num_ranks: that the run is planned for; None for the processes that train together. num_images, seed: of an
        epoch and of the run, for draws. drop_last: whether the loader drops an epoch's last batch if it is not full.

        Raises ValueError when explicit stages do not cover the run exactly, and final epochs that are more than those.
        """
        if self._reference_batch_size is None:
            self._reference_batch_size = per_device_batch_size
        self._num_ranks = num_ranks
        if self._sampled is not None:
            self._total_epochs, self._num_images, self._seed = total_epochs, num_images, seed
            self._drop_last = drop_last
            self._shapes = None
            if self._sampled.final_epochs > total_epochs:
                raise ValueError(
                    f"progressive_resizing.final_epochs is {self._sampled.final_epochs} and the run has {total_epochs} "
                    f"epochs, of which they are a part; make it at most {total_epochs}"
                )
            return
        if self.stages is None or self._follows_ramp:
            self.stages = ramp_stages(total_epochs=total_epochs, final_image_size=image_size, **self._ramp)
        covered = sum(stage.epochs for stage in self.stages)
        if covered != total_epochs:
            lengths = " + ".join(str(stage.epochs) for stage in self.stages)
            raise ValueError(
                f"the stages of progressive_resizing cover {lengths} = {covered} epochs and the run has "
                f"{total_epochs}; they must be equal: change a stage's epochs or the run's length"
            )

    def shapes(self, epoch: int) -> list[Shape]:
        """(image size in px, images per device) of each step of `epoch` (counted from 0), if it is drawn, else nothing.

        The last batch may have fewer images; whether it is trained on is the loader's decision. Call `prepare` first.
        """
        sampled = self._sampled
        if sampled is None or epoch >= self._total_epochs - sampled.final_epochs:
            return []
        if self._shapes is None or self._shapes[0] != epoch:
            drawn = sampled.shapes(
                epoch,
                total_epochs=self._total_epochs,
                num_images=self._num_images,
                seed=self._seed,
                per_device_batch_size=self._reference_batch_size,
                num_ranks=self._ranks(),
            )
            if self._drop_last and sum(images for _, images in drawn) * self._ranks() > self._num_images:
                drawn.pop()
            self._shapes = epoch, drawn
        return self._shapes[1]

    def stage(self, epoch: int) -> Stage:
        """The stage of `epoch` (counted from 0); call `prepare` first."""
        if self._sampled is not None:  # the final epochs; before them, the largest images that are drawn
            batch_size = self._sampled.batch_sizes(self._reference_batch_size, self._ranks())[-1]
            return Stage(1, self._sampled.sizes[-1], batch_size)
        assert self.stages is not None, "prepare() comes first"
        return stage_at(epoch, self.stages)

    def per_device_batch_size(self, epoch: int, num_ranks: int) -> int:
        """The batch size per device in `epoch`. Raises ValueError when a global one does not divide over the ranks."""
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
        """Set the loader to the epoch's stage, or resize the batch if the loader cannot."""
        resizable = isinstance(state.dataloader, ResizableLoader)
        if event == Event.BATCH_START:
            if not resizable:
                self._resize_on_device(state)
            return
        if event == Event.FIT_START:
            self._bind(state)
        if resizable:
            self._set_loader(state, state.timestamp.epoch.value)

    def modify_learning_rate(self, learning_rate: float, epoch: float, total_epochs: float) -> float:
        """Scale by the ratio of the stage's batch size to the one that the rate was given for."""
        if self.learning_rate_scaling == "none" or self._reference_batch_size is None:
            return learning_rate
        ratio = self._batch_size_at(epoch) / self._reference_batch_size
        return learning_rate * (ratio if self.learning_rate_scaling == "linear" else ratio**0.5)

    def state_dict(self) -> dict[str, Any]:
        """The current stages, so that a resumed run with another plan can be refused."""
        return self._plan()

    def load_state_dict(self, state: dict[str, Any], strict: bool = False) -> None:
        """Keep the stages of the resumed run, to compare them when training begins."""
        self._loaded_plan = state

    def _ranks(self) -> int:
        return world_size() if self._num_ranks is None else self._num_ranks

    def _batch_size_at(self, epoch: float) -> int:
        """Images per device of the step after `epoch` epochs."""
        whole = int(epoch)
        shapes = self.shapes(whole)
        if not shapes:
            return self.per_device_batch_size(whole, self._ranks())
        current = self._num_steps
        steps = current[1] if current is not None and current[0] == whole else len(shapes)
        return shapes[min(round((epoch - whole) * steps), len(shapes) - 1)][1]

    def _bind(self, state: State) -> None:
        loader = state.dataloader
        resizable = isinstance(loader, ResizableLoader)
        first = self._reference_batch_size is None
        if self._full_image_size is None:
            self._full_image_size = getattr(loader, "image_size", None)
        if self._sampled is not None:
            self._refuse_loader_of_one_size(state, resizable=resizable)
        if resizable or not self._follows_ramp:
            drawn = {} if self._sampled is None else self._of_draws(state, resizable=resizable)
            self.prepare(
                total_epochs=run_epochs(state),
                image_size=self._full_image_size or 1,
                **{"per_device_batch_size": getattr(loader, "batch_size", None), **drawn},
            )
        else:
            run_length(state)  # raises for other units
        self._refuse_another_plan()
        self._refuse_batches_of_changing_size(state)
        if self.learning_rate_scaling != "none":
            require_schedule(state, f"progressive_resizing.learning_rate_scaling={self.learning_rate_scaling}")
        if not resizable:
            self._refuse_batch_sizes(loader)
            log.warning("%s cannot change its image size: batches are resized on the device", type(loader).__name__)
            return
        if first:
            self._note_run(state, loader)
        self._try_every_stage(loader)

    def _of_draws(self, state: State, *, resizable: bool) -> dict[str, int]:
        if resizable:
            return {"num_images": state.dataloader.num_samples, "seed": state.rank_zero_seed}  # pyright: ignore
        # A draw for each batch, whatever is in it.
        assert state.dataloader_len is not None
        batches = state.dataloader_len.value
        return {"num_images": batches, "per_device_batch_size": 1, "num_ranks": 1, "seed": state.rank_zero_seed}

    def _note_run(self, state: State, loader: ResizableLoader) -> None:
        self._batch_size = loader.batch_size
        if state.device_train_microbatch_size != loader.batch_size:
            self._microbatch_size = state.device_train_microbatch_size
        if state.dataloader_len is not None and state.dataloader_len.value < len(loader):
            self._batches_per_epoch = state.dataloader_len.value

    def _try_every_stage(self, loader: ResizableLoader) -> None:
        # Setters act on the next pass, so trying costs nothing; a late stage's error would waste the run up to it.
        if self._sampled is not None:
            batch_sizes = self._sampled.batch_sizes(self._reference_batch_size, world_size())
            for size, batch_size in zip(self._sampled.sizes, batch_sizes, strict=True):
                loader.set_image_size(size)
                loader.set_batch_size(batch_size)
            return
        epoch = 0
        assert self.stages is not None
        for number, stage in enumerate(self.stages, start=1):
            try:
                loader.set_image_size(stage.image_size)
                loader.set_batch_size(self.per_device_batch_size(epoch, world_size()))
            except ValueError as error:
                raise ValueError(f"stage {number} of progressive_resizing: {error}") from None
            epoch += stage.epochs

    def _set_loader(self, state: State, epoch: int) -> None:
        loader: Any = state.dataloader
        batch_size = self.per_device_batch_size(epoch, world_size())
        loader.set_image_size(self.stage(epoch).image_size)
        loader.set_batch_size(batch_size)
        if self._sampled is not None:
            shapes = self.shapes(epoch)
            loader.set_batch_shapes(shapes or None)
            batch_size = max([batch_size, *(images for _, images in shapes)])
        # Composer reads both only when the Trainer is created: a stale length drops part of every epoch, and a stale
        # microbatch size splits the larger batch for no reason.
        length = len(loader)
        length = length if self._batches_per_epoch is None else min(length, self._batches_per_epoch)
        state.dataloader_len = length
        self._num_steps = epoch, length
        if state.auto_microbatching and state.device_train_microbatch_size != self._batch_size:
            self._microbatch_size = state.device_train_microbatch_size  # Composer found that a larger one does not fit
        state.device_train_microbatch_size = min(self._microbatch_size or batch_size, batch_size)
        self._batch_size = batch_size

    def _sets_batch_size(self) -> bool:
        if self._sampled is not None:
            return self._sampled.sets_batch_size
        return any(stage.per_device_batch_size or stage.global_batch_size for stage in self.stages or ())

    def _refuse_batches_of_changing_size(self, state: State) -> None:
        length, unit = run_length(state)
        if unit == "ba" and self._sets_batch_size():
            raise ValueError(
                f"{self._which()} sets a batch size, so epochs differ in their number of batches, and the run's length "
                f"is {length} batches; give it in epochs (for example max_duration='90ep')"
            )

    def _refuse_loader_of_one_size(self, state: State, *, resizable: bool) -> None:
        loader = state.dataloader
        if resizable and not isinstance(loader, MixedSizesLoader):
            raise ValueError(
                f"progressive_resizing draws a size for each step, and the loader, a {type(loader).__name__}, changes "
                "its size between passes alone; use a loader with set_batch_shapes "
                "(algos.framework.protocols.MixedSizesLoader), or give stages"
            )
        if not resizable and state.dataloader_len is None:
            raise ValueError(
                f"progressive_resizing draws a size for each step of an epoch, and the loader, a "
                f"{type(loader).__name__}, does not tell how many an epoch has; give it a length, or give stages"
            )

    def _refuse_batch_sizes(self, loader: Any) -> None:
        if self._sets_batch_size():
            raise ValueError(
                f"{self._which()} sets a batch size, and the loader, a {type(loader).__name__}, cannot change it; use "
                "a loader with set_image_size and set_batch_size (algos.framework.protocols.ResizableLoader), or drop "
                "the batch sizes"
            )

    def _which(self) -> str:
        return "a stage" if self._sampled is None else "a drawn size"

    def _refuse_another_plan(self) -> None:
        plan, loaded, self._loaded_plan = self._plan(), self._loaded_plan, None  # once: another fit may be longer
        if loaded is not None and loaded != plan:
            raise ValueError(
                f"the run that is continued had the {_described_plan(loaded)}, and this one the "
                f"{_described_plan(plan)}; continue it with the same stages and length, or start a new run"
            )

    def _plan(self) -> dict[str, Any]:
        if self._sampled is not None:
            drawn = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self._sampled).items()}
            return {"stages": None, "sampled": drawn | {"seed": self._seed, "epochs": self._total_epochs}}
        if self.stages is None:
            return {"stages": None, "ramp": self._ramp}
        return {"stages": [asdict(stage) for stage in self.stages]}

    def _resize_on_device(self, state: State) -> None:
        images, targets = split_batch(state.batch)
        epoch = state.timestamp.epoch.value
        if self._sampled is not None:
            size = self._drawn_size(epoch, state)
        elif self.stages is not None:
            size = self.stage(epoch).image_size
        else:
            length, unit = run_length(state)
            done = state.timestamp.epoch if unit == "ep" else state.timestamp.batch
            size = ramp_size(done.value, total=length, final_image_size=images.shape[-1], **self._ramp)
        state.batch = (resize_images(images, image_size=size), targets)

    def _drawn_size(self, epoch: int, state: State) -> int:
        """Where the loader makes batches of one size: a draw for each of them."""
        assert self._sampled is not None
        shapes = self.shapes(epoch)
        return shapes[state.timestamp.batch_in_epoch.value][0] if shapes else self._sampled.sizes[-1]


def _described_plan(plan: Mapping[str, Any]) -> str:
    if plan.get("sampled") is not None:
        return "drawn sizes with " + ", ".join(f"{name}={value}" for name, value in plan["sampled"].items())
    if plan.get("stages") is None:
        settings = ", ".join(f"{name}={value}" for name, value in (plan.get("ramp") or {}).items())
        return f"ramp {settings}"
    return f"stages {described([Stage(**stage) for stage in plan['stages']])}"


def _check_schedule(schedule: Schedule | None, *, stages: Any, sizes: Any) -> None:
    if schedule not in (None, "stages", "ramp", "sampled"):
        raise ValueError(f"schedule {schedule!r} must be 'stages', 'ramp' or 'sampled'")
    if stages is not None and sizes is not None:
        raise ValueError(
            "stages and sizes are both given; stages fix each epoch's size, sizes are drawn from: drop one"
        )
    given = "stages" if stages is not None else "sampled" if sizes is not None else "ramp"
    if schedule is not None and schedule != given:
        needs = {"stages": "give stages", "sampled": "give sizes", "ramp": "leave stages and sizes out"}[schedule]
        raise ValueError(
            f"schedule is {schedule!r} and the other settings are those of {given!r}; {needs}, or give "
            f"schedule={given!r}"
        )
