"""Stages of progressive resizing: the image size and batch size of every epoch, given or rising along a ramp."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any


@dataclass(frozen=True)
class Stage:
    """A number of epochs at one image size and, optionally, one batch size.

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
    """The stage of `epoch` (counted from 0). Raises ValueError for an epoch that no stage covers."""
    if epoch < 0:
        raise ValueError(f"epoch {epoch} is negative; epochs count from 0")
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
    """Stages whose size rises linearly from `initial_scale` times the final size to the final size.

    The scale at epoch e of E is s0 + (1 - s0) clip((e/E - d) / (1 - d - f), 0, 1), with d = `delay_fraction` (share of
    the run before the rise) and f = `finetune_fraction` (share at full size at the end). Sizes are rounded to the
    nearest multiple of `size_multiple` px (never to 0). The last epoch is at `final_image_size` exactly, whatever f is
    and however short the run is.

    Raises ValueError for shares outside 0..1, d + f > 1, a scale outside (0, 1], or lengths and sizes below 1.
    """
    _check_ramp(initial_scale, delay_fraction, finetune_fraction)
    for name, value in (
        ("total_epochs", total_epochs), ("final_image_size", final_image_size), ("size_multiple", size_multiple),
    ):  # fmt: skip
        if value < 1:
            raise ValueError(f"{name} {value} must be at least 1")
    sizes = [
        ramp_size(
            epoch,
            total=total_epochs,
            final_image_size=final_image_size,
            initial_scale=initial_scale,
            delay_fraction=delay_fraction,
            finetune_fraction=finetune_fraction,
            size_multiple=size_multiple,
        )
        for epoch in range(total_epochs)
    ]
    return [Stage(epochs=len(list(run)), image_size=image_size) for image_size, run in groupby(sizes)]


def ramp_size(
    step: int,
    *,
    total: int,
    final_image_size: int,
    initial_scale: float,
    delay_fraction: float,
    finetune_fraction: float,
    size_multiple: int,
) -> int:
    """The image size at `step` (from 0) of `total` epochs or batches; see `ramp_stages`."""
    rise = 1.0 - finetune_fraction - delay_fraction
    elapsed = step / total - delay_fraction
    # A rounding error must not lower the size right at the end of the rise. The last step's completed share is below 1,
    # and in a short run below 1 - f as well.
    if elapsed > rise - 1e-9 or step >= total - 1:
        return final_image_size
    share = elapsed / rise if elapsed > 0 else 0.0
    scale = initial_scale + (1.0 - initial_scale) * share
    rounded = round(final_image_size * scale / size_multiple) * size_multiple
    return min(max(rounded, size_multiple), final_image_size)


def as_stage(stage: Any) -> Stage:
    """A `Stage`, or one made of a mapping of its settings. Raises ValueError for anything else."""
    if isinstance(stage, Stage):
        return stage
    if not isinstance(stage, Mapping):
        raise ValueError(f"a stage is {stage!r}; give algos.Stage(epochs=..., image_size=...) or a mapping of these")
    try:
        return Stage(**stage)
    except TypeError as error:  # a missing or unknown key
        raise ValueError(
            f"a stage is {dict(stage)}: {error}; its keys are {', '.join(Stage.__dataclass_fields__)}"
        ) from None


def described(stages: Sequence[Stage]) -> str:
    """The stages in words, as in "2 epochs at 12 px, 1 epochs at 16 px"."""
    return ", ".join(
        f"{stage.epochs} epochs at {stage.image_size} px"
        + (f" in batches of {stage.per_device_batch_size} a device" if stage.per_device_batch_size else "")
        + (f" in batches of {stage.global_batch_size}" if stage.global_batch_size else "")
        for stage in stages
    )


def _check_ramp(initial_scale: float, delay_fraction: float, finetune_fraction: float) -> None:
    if not 0 < initial_scale <= 1:
        raise ValueError(f"initial_scale {initial_scale} must lie in (0, 1]; 0.5 is usual")
    if not (delay_fraction >= 0 and finetune_fraction >= 0 and delay_fraction + finetune_fraction <= 1):
        raise ValueError(
            f"delay_fraction {delay_fraction} and finetune_fraction {finetune_fraction} are shares of the run: "
            "neither may be negative, nor their sum exceed 1"
        )
