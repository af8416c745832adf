"""CutMix (Yun 2019, arXiv 1905.04899): paste a box of another sample into each, and mix targets by the box's area.

Shapes: N samples, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .framework.base import Contract, Event, Logger, Resource, SpeedUp, State, global_rank
from .framework.batches import check_num_classes, count_classes, soften, split_batch
from .framework.mixing import check_alpha, check_counts, check_permutation, check_seed, draw_beta, has_turn, mix
from .framework.randomness import generator_at

Box = tuple[int, int, int, int]  # top, left, bottom, right in px; bottom and right are exclusive


def cutmix_batch(
    images: Tensor, targets: Tensor, *, box: Box | Tensor, permutation: Tensor, num_classes: int | None = None
) -> tuple[Tensor, Tensor]:
    """Paste the box of sample permutation[i] into sample i, and mix their targets by area.

        images[i][:, top:bottom, left:right] <- images[permutation[i]][:, top:bottom, left:right]
        targets[i] <- lam · targets[i] + (1 - lam) · targets[permutation[i]],  lam = 1 - (area of the box) / (H · W)

    images: [N, C, H, W] of any dtype; the result keeps it and the memory format.
    targets: class indices [N] of an integer type, or probabilities [N, K].
    box: (top, left, bottom, right) in px for the batch, or an integer tensor [N, 4], one per sample. It may be empty.
    permutation: [N], integers 0..N-1 each once.
    num_classes: K; needed for indices only.

    Returns (images, probabilities [N, K]) as new tensors. Deterministic; `draw_cutmix` draws box and permutation.
    Raises ValueError for images of another shape, a box outside the image, targets that do not fit and an invalid
    permutation (tensors' values are checked on CPU only, since reading an accelerator's would wait for it).

    Yun et al. 2019, "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", section 3.
    """
    if images.ndim != 4:
        raise ValueError(f"received images of shape {list(images.shape)}; they must be [N, C, H, W]")
    _check_box(box, images)
    check_permutation(permutation, num_samples=images.shape[0])
    probabilities = soften(targets, num_classes=num_classes)
    check_counts(images, probabilities)
    permutation = permutation.to(images.device, non_blocking=True)
    lam = _own_share(box, height=images.shape[2], width=images.shape[3])
    return _paste(images, box, permutation), mix(probabilities, lam, permutation)


def draw_cutmix(
    num_samples: int, *, height: int, width: int, alpha: float, generator: torch.Generator, per_sample: bool = False
) -> tuple[Box | Tensor, Tensor]:
    """Draw (box, permutation): a box of about 1 - lam of the image, lam ~ Beta(alpha, alpha), and a permutation [N].

    The box's sides are √(1 - lam) of the image's. It is centered on a uniformly drawn pixel and clipped at the border,
    so its area may be less than 1 - lam; `cutmix_batch` weights the targets by the area that is left.

    height, width: of the images, px.
    alpha: above 0; 1, the paper's, draws lam uniformly.
    generator: a CPU generator, the only source of randomness.
    per_sample: False draws one box; True draws a tensor [N, 4] of them.

    Raises ValueError for an alpha that is not above 0 and finite, and for less than one sample or pixel.
    """
    check_alpha(alpha, usual=1.0, algorithm="CutMix")
    for name, value in (("num_samples", num_samples), ("height", height), ("width", width)):
        if value < 1:
            raise ValueError(f"{name} {value} must be at least 1")
    permutation = torch.randperm(num_samples, generator=generator)
    count = num_samples if per_sample else 1
    lam = torch.as_tensor(draw_beta(alpha, generator=generator, num_samples=count), dtype=torch.float64)
    sides = (1 - lam).sqrt()
    top, bottom = _interval(sides, height, generator)
    left, right = _interval(sides, width, generator)
    boxes = torch.stack([top, left, bottom, right], dim=1)
    if per_sample:
        return boxes, permutation
    first_top, first_left, first_bottom, first_right = boxes[0].tolist()
    return (first_top, first_left, first_bottom, first_right), permutation


class CutMix(SpeedUp):
    """Pastes a box of another sample into every image of a training batch, but not in evaluation.

    alpha: of Beta(alpha, alpha), from which the share of a sample's own area is drawn; above 0.
    per_sample: draw a box for each sample instead of one for the batch.
    switch_probability: share of the batches that CutMix takes if MixUp is on as well, in [0, 1]; MixUp takes the
        others. Without MixUp, CutMix takes every batch.
    num_classes: classes; None reads the model's `num_classes`.
    seed: of the boxes and permutations, 0 or more; None uses the run's seed.

    Draws once per device batch, whatever the microbatch size. A draw is a function of the seed, the rank and the number
    of batches done, so ranks draw differently, and a resumed run repeats and skips nothing. Targets become
    probabilities [N, K]: the loss must accept them, as torch.nn.functional.cross_entropy does.
    """

    # MixUp owns mixing, CutMix does not: `has_turn` lets exactly one of the two act on a batch.
    contract = Contract(writes=[Resource.MIXING, Resource.IMAGES, Resource.TARGETS], after=[Resource.IMAGES])
    events = (Event.BATCH_START,)

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        per_sample: bool = False,
        switch_probability: float = 0.5,
        num_classes: int | None = None,
        seed: int | None = None,
    ) -> None:
        check_alpha(alpha, usual=1.0, algorithm="CutMix")
        if not 0 <= switch_probability <= 1:
            raise ValueError(
                f"switch_probability {switch_probability} must lie in [0, 1]; 0.5 gives CutMix and MixUp half the "
                "batches each"
            )
        check_num_classes(num_classes)
        check_seed(seed)
        self.alpha = alpha
        self.per_sample = per_sample
        self.switch_probability = switch_probability
        self.num_classes = num_classes
        self.seed = seed

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Replace the batch with its mixture, unless it is MixUp's turn."""
        if not has_turn(self, state):
            return
        images, targets = split_batch(state.batch)
        seed = state.rank_zero_seed if self.seed is None else self.seed
        generator = generator_at(seed, rank=global_rank(), step=state.timestamp.batch.value, stream="cutmix")
        height, width = images.shape[-2:]
        box, permutation = draw_cutmix(
            images.shape[0],
            height=height,
            width=width,
            alpha=self.alpha,
            generator=generator,
            per_sample=self.per_sample,
        )
        num_classes = count_classes(state.model, num_classes=self.num_classes)
        state.batch = cutmix_batch(images, targets, box=box, permutation=permutation, num_classes=num_classes)


def _paste(images: Tensor, box: Box | Tensor, permutation: Tensor) -> Tensor:
    if not isinstance(box, Tensor):
        top, left, bottom, right = box
        pasted = images.clone()
        pasted[:, :, top:bottom, left:right] = images[:, :, top:bottom, left:right][permutation]
        return pasted
    top, left, bottom, right = box.to(images.device, non_blocking=True).view(-1, 4, 1, 1, 1).unbind(1)
    rows = torch.arange(images.shape[2], device=images.device).view(1, -1, 1)
    columns = torch.arange(images.shape[3], device=images.device)
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)  # [N, 1, H, W]
    return torch.where(inside, images[permutation], images)


def _own_share(box: Box | Tensor, *, height: int, width: int) -> float | Tensor:
    """lam: the share of the image outside the box, exact for the box that is pasted."""
    if isinstance(box, Tensor):
        area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
        return 1.0 - area.double() / (height * width)
    top, left, bottom, right = box
    return 1.0 - (bottom - top) * (right - left) / (height * width)


def _interval(sides: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Start and end, in px of an axis of `size`, of boxes that span `sides` of it around uniformly drawn centers."""
    center = torch.randint(size, sides.shape, generator=generator)
    half = (sides * size / 2).long()
    return (center - half).clamp(min=0), (center + half).clamp(max=size)


def _check_box(box: Box | Tensor, images: Tensor) -> None:
    num_samples, _, height, width = images.shape
    if isinstance(box, Tensor):
        if box.shape != (num_samples, 4) or box.is_floating_point():
            raise ValueError(
                f"received boxes of shape {list(box.shape)} and type {box.dtype} for {num_samples} images; they must "
                f"be integers [{num_samples}, 4]: draw them for this batch"
            )
        if box.device.type != "cpu":
            return
        boxes = box.tolist()
    else:
        boxes = [list(box)]
    for top, left, bottom, right in boxes:
        if not (0 <= top <= bottom <= height and 0 <= left <= right <= width):
            raise ValueError(
                f"received box {(top, left, bottom, right)} for images of {height} x {width} px; it must be "
                "(top, left, bottom, right) within the image: draw it with draw_cutmix"
            )
