"""Selective backpropagation (Jiang 2019, arXiv 1910.00762): only the samples with high losses get a backward pass.

Shapes: N samples, K of which are kept.
"""

from __future__ import annotations

import inspect
import math
from bisect import bisect_left
from typing import Any

import torch
from torch import Tensor, nn

from .framework.base import Contract, Event, Logger, Resource, SpeedUp, State, global_rank, precision_context
from .framework.batches import split_batch
from .framework.passes import evaluating, without_ddp
from .framework.randomness import generator_at
from .learning_rate import epochs_done, run_length_epochs
from .progressive_resizing import resize_images


def select_samples(losses: Tensor, *, ranks: Tensor) -> Tensor:
    """Places in the batch of the samples whose losses have these ranks: int64 [K], rising, on the losses' device.

    losses: [N], a sample's each. Equal losses rank in the order of the batch, and nan ranks above all others.
    ranks: int64 [K], each once: 0 for the lowest loss, N - 1 for the highest; `draw_loss_ranks` draws them.

    Index images and targets with the result. Raises ValueError for losses that are not [N], and for ranks that are not
    integers [K] with K at most N.
    """
    if losses.ndim != 1:
        raise ValueError(
            f"received losses of shape {list(losses.shape)}; they must be [N], one for each sample: compute them with "
            "reduction='none'"
        )
    if ranks.ndim != 1 or ranks.is_floating_point() or len(ranks) > len(losses):
        raise ValueError(
            f"received ranks of shape {list(ranks.shape)} and type {ranks.dtype} for {len(losses)} losses; they must "
            "be integers [K], K at most the number of losses: draw them with draw_loss_ranks"
        )
    order = losses.argsort(stable=True)
    return order[ranks.to(losses.device, non_blocking=True)].sort().values


def draw_loss_ranks(num_samples: int, *, keep: float, generator: torch.Generator) -> Tensor:
    """Draw the ranks of the losses that are kept: int64 [K] on the CPU, rising, K as `count_kept` says.

    They are drawn without replacement, rank r = 0 (the lowest loss) to N - 1 with a probability proportional to

        ((r + 1/2) / N) ** (1 / keep - 1)

    so that a sample in the middle of the batch is about `keep` times as likely as the one with the highest loss. Which
    sample has a rank does not matter for the draw, so it waits for no loss.

    num_samples: N, at least 1. keep: share of the samples, in (0, 1]. generator: a CPU generator, the only source of
    randomness. Raises ValueError for values out of range.

    The weights are those of Composer's `select_using_loss`; Jiang 2019, section 3.2, has the percentile to a power.
    """
    _check_keep(keep)
    if num_samples < 1:
        raise ValueError(f"num_samples {num_samples} must be at least 1")
    percentiles = (torch.arange(num_samples, dtype=torch.float64) + 0.5) / num_samples
    # The highest of Gumbel's variables, each moved by the logarithm of a weight, are a draw without replacement.
    uniform = torch.rand(num_samples, generator=generator, dtype=torch.float64)
    keys = (1 / keep - 1) * percentiles.log() - (-uniform.log()).log()
    return keys.topk(count_kept(num_samples, keep)).indices.sort().values


def count_kept(num_samples: int, keep: float) -> int:
    """K = max(1, floor(keep · N)), with products that rounding left just below a whole number rounded up."""
    return max(1, math.floor(num_samples * keep + 1e-9))


class SelectiveBackprop(SpeedUp):
    """In a part of the run, trains only the samples with high losses; see `draw_loss_ranks` for the choice.

    start, end: the part of the run, as shares of its length: from `start` on, up to but not including `end`.
    keep: share of each batch that is trained on, in (0, 1].
    interval: every so many steps one selects; the others train on the whole batch. 1 selects in every step.
    scale: of the image size of the forward pass that finds the losses, in (0, 1]; training is at the full size.

    That pass covers the whole device batch at once, in evaluation mode and without gradients: no running statistics
    move, nothing random is drawn, and the microbatch size does not change what is kept. It sees images and targets as
    mixing and label smoothing leave them, and the model's own loss. The draw is a function of the run's seed, the rank
    and the number of batches done. Every rank keeps as many of its samples as the others. Batches are pairs (images,
    targets).

    Before the first step it refuses a model whose loss takes no reduction="none".
    """

    contract = Contract(owns=[Resource.SAMPLES], after=[Resource.IMAGES, Resource.TARGETS])
    events = (Event.FIT_START, Event.BATCH_START)

    def __init__(
        self, *, start: float = 0.5, end: float = 0.9, keep: float = 0.5, interval: int = 2, scale: float = 1.0
    ) -> None:
        if not 0 <= start < end <= 1:
            raise ValueError(
                f"start {start} and end {end} are shares of the run: 0 <= start < end <= 1; 0.5 and 0.9 are usual"
            )
        _check_keep(keep)
        if interval < 1:
            raise ValueError(f"interval {interval} must be at least 1 step, which selects in every step")
        if not 0 < scale <= 1:
            raise ValueError(f"scale {scale} must lie in (0, 1]; 1 finds the losses at the size that is trained")
        self.start = start
        self.end = end
        self.keep = keep
        self.interval = interval
        self.scale = scale

    def selecting_steps(self, epoch: int, *, total_epochs: float, steps: int, first_step: int) -> range:
        """The steps of `epoch`, each from 0, that select.

        steps: of the epoch. first_step: steps of the run before the epoch.
        """
        if self.keep == 1:
            return range(0)
        first, last = (
            bisect_left(range(steps), True, key=lambda step: (epoch + step / steps) / total_epochs >= share)
            for share in (self.start, self.end)
        )
        return range(first + -(first_step + first) % self.interval, last, self.interval)

    def selection_size(self, image_size: int) -> int:
        """Size in px of the images that the losses are found with, for training at `image_size`."""
        return max(1, round(image_size * self.scale))

    def match(self, event: Event, state: State) -> bool:
        """Whether to act at `event`: at a run's start, and at the start of a step that selects."""
        return super().match(event, state) and (event == Event.FIT_START or self._selects(state))

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Replace the batch with the samples that are kept of it."""
        if event == Event.FIT_START:
            _check_loss(state.model)
            return
        images, targets = split_batch(state.batch)
        generator = generator_at(
            state.rank_zero_seed, rank=global_rank(), step=state.timestamp.batch.value, stream="selective_backprop"
        )
        ranks = draw_loss_ranks(len(images), keep=self.keep, generator=generator)
        ranks = state.device.tensor_to_device(ranks)  # while the losses are computed
        kept = select_samples(self._losses(images, targets, state), ranks=ranks)
        state.batch = (images[kept], targets[kept])

    def _selects(self, state: State) -> bool:
        share = epochs_done(state) / run_length_epochs(state)
        in_part = self.keep < 1 and self.start <= share < self.end
        return in_part and state.timestamp.batch.value % self.interval == 0

    def _losses(self, images: Tensor, targets: Tensor, state: State) -> Tensor:
        """[N], of the whole batch."""
        model: Any = without_ddp(state.model)
        if self.scale < 1:
            images = resize_images(images, image_size=self.selection_size(images.shape[-1]))
        batch = (images, targets)
        with evaluating(state.model), precision_context(state):
            losses = model.loss(model(batch), batch, reduction="none")
        return losses if losses.ndim < 2 else losses.flatten(start_dim=1).sum(dim=1)  # binary cross entropy's classes


def _check_keep(keep: float) -> None:
    if not 0 < keep <= 1:
        raise ValueError(f"keep {keep} must lie in (0, 1]; 0.5 is usual, and 1 keeps every sample")


def _check_loss(wrapped: nn.Module) -> None:
    model: Any = without_ddp(wrapped)
    taken = inspect.signature(model.loss).parameters
    if "reduction" not in taken and all(one.kind is not one.VAR_KEYWORD for one in taken.values()):
        raise ValueError(
            f"selective_backprop needs a loss for each sample, and {type(model).__name__}.loss takes no "
            "reduction='none'; give it that argument, as Composer's ComposerClassifier does, or leave "
            "selective_backprop out"
        )
