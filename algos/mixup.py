"""MixUp (Zhang 2018, arXiv 1710.09412): train on convex combinations of two samples and of their targets.

Shapes: N samples, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .framework.base import Contract, Event, Logger, Resource, SpeedUp, State, global_rank
from .framework.batches import check_num_classes, count_classes, soften, split_batch
from .framework.mixing import check_alpha, check_counts, check_permutation, check_seed, draw_beta, has_turn, mix
from .framework.randomness import generator_at


def mixup_batch(
    images: Tensor, targets: Tensor, *, lam: float | Tensor, permutation: Tensor, num_classes: int | None = None
) -> tuple[Tensor, Tensor]:
    """Mix each sample i with sample permutation[i], in both images and targets.

        images[i]  <- lam · images[i]  + (1 - lam) · images[permutation[i]]
        targets[i] <- lam · targets[i] + (1 - lam) · targets[permutation[i]]

    images: floating point [N, C, H, W], already normalized; the result keeps their dtype and memory format.
    targets: class indices [N] of an integer type, or probabilities [N, K].
    lam: weight of the sample itself, in [0, 1]: one number for the batch, or a tensor [N].
    permutation: [N], integers 0..N-1 each once.
    num_classes: K; needed for indices only.

    Returns (images, probabilities [N, K]) as new tensors. Deterministic; `draw_mixup` draws lam and permutation.
    Raises ValueError for uint8 images, shapes that do not fit, and a lam or permutation out of range (values are
    checked on CPU only, since reading an accelerator's would wait for it).

    Zhang et al. 2018, "mixup: Beyond Empirical Risk Minimization", equation 1.
    """
    _check_images(images)
    _check_draw(lam, permutation, num_samples=images.shape[0])
    probabilities = soften(targets, num_classes=num_classes)
    check_counts(images, probabilities)
    permutation = permutation.to(images.device, non_blocking=True)
    return mix(images, lam, permutation), mix(probabilities, lam, permutation)


def draw_mixup(
    num_samples: int, *, alpha: float, generator: torch.Generator, per_sample: bool = False
) -> tuple[float | Tensor, Tensor]:
    """Draw (lam, permutation): lam ~ Beta(alpha, alpha) and a uniform permutation [N], on CPU.

    alpha: above 0. Small values leave most samples nearly unmixed, 1 is uniform mixing.
    generator: a CPU generator, the only source of randomness.
    per_sample: False draws one lam, a float; True draws a tensor [N], float32.

    Raises ValueError for an alpha that is not above 0 and finite, or less than one sample.
    """
    check_alpha(alpha, usual=0.2, algorithm="MixUp")
    if num_samples < 1:
        raise ValueError(f"num_samples {num_samples} must be at least 1")
    permutation = torch.randperm(num_samples, generator=generator)
    return draw_beta(alpha, generator=generator, num_samples=num_samples if per_sample else None), permutation


class MixUp(SpeedUp):
    """Mixes the samples of every training batch, but not in evaluation. If CutMix is on as well, they take turns.

    alpha: of Beta(alpha, alpha), from which the weight of the sample itself is drawn; above 0.
    per_sample: draw a weight for each sample instead of one for the batch.
    num_classes: classes; None reads the model's `num_classes`.
    seed: of the draws, 0 or more; None uses the run's seed.

    Draws once per device batch, whatever the microbatch size. A draw is a function of the seed, the rank and the number
    of batches done, so ranks draw differently, and a resumed run repeats and skips nothing. Targets become
    probabilities [N, K]: the loss must accept them, as torch.nn.functional.cross_entropy does.
    """

    # After all other changes to images: augmentation is meant for single images. CutMix does not own mixing and may be
    # used as well; `has_turn` lets exactly one of them act.
    contract = Contract(owns=[Resource.MIXING], writes=[Resource.IMAGES, Resource.TARGETS], after=[Resource.IMAGES])
    events = (Event.BATCH_START,)

    def __init__(
        self, *, alpha: float = 0.2, per_sample: bool = False, num_classes: int | None = None, seed: int | None = None
    ) -> None:
        check_alpha(alpha, usual=0.2, algorithm="MixUp")
        check_num_classes(num_classes)
        check_seed(seed)
        self.alpha = alpha
        self.per_sample = per_sample
        self.num_classes = num_classes
        self.seed = seed

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Replace the batch with its mixture, unless it is CutMix's turn."""
        if not has_turn(self, state):
            return
        images, targets = split_batch(state.batch)
        seed = state.rank_zero_seed if self.seed is None else self.seed
        generator = generator_at(seed, rank=global_rank(), step=state.timestamp.batch.value, stream="mixup")
        lam, permutation = draw_mixup(
            images.shape[0], alpha=self.alpha, generator=generator, per_sample=self.per_sample
        )
        num_classes = count_classes(state.model, num_classes=self.num_classes)
        state.batch = mixup_batch(images, targets, lam=lam, permutation=permutation, num_classes=num_classes)


def _check_images(images: Tensor) -> None:
    if not images.is_floating_point():
        raise ValueError(
            f"received {str(images.dtype).removeprefix('torch.')} images; mixing needs floating point: "
            "normalize the images (or have the loader do it) before mixing them"
        )


def _check_draw(lam: float | Tensor, permutation: Tensor, *, num_samples: int) -> None:
    check_permutation(permutation, num_samples=num_samples)
    if not isinstance(lam, Tensor):
        in_range = 0 <= lam <= 1
    elif lam.shape != (num_samples,):
        raise ValueError(
            f"received a lam of shape {list(lam.shape)} for {num_samples} images; it must be a number or "
            f"[{num_samples}]: draw it for this batch"
        )
    else:
        in_range = lam.device.type != "cpu" or bool(((lam >= 0) & (lam <= 1)).all())
    if not in_range:
        raise ValueError(f"lam {lam} must lie in [0, 1]; draw it with draw_mixup")
