"""What the algorithms that mix samples share: the draw, the mixture, and which algorithm mixes a batch.

Shapes: N samples.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .base import Resource, SpeedUp, State
from .randomness import generator_at


def has_turn(algorithm: SpeedUp, state: State) -> bool:
    """Whether `algorithm` is the one that mixes this batch.

    Alone it mixes every batch. Of two, the one with a `switch_probability` p takes a batch with probability p and the
    other takes the rest. The draw is a function of the run's seed and the number of batches done, so both algorithms
    and all ranks agree, whatever their order in the list, and a resumed run repeats it.

    Raises ValueError when several algorithms mix samples and do not share the batches.
    """
    mixers = [other for other in state.algorithms if _mixes(other)]
    if len(mixers) < 2:
        return True
    sharing = [other for other in mixers if hasattr(other, "switch_probability")]
    if len(mixers) > 2 or len(sharing) != 1 or not all(isinstance(other, SpeedUp) for other in mixers):
        raise ValueError(
            f"{' and '.join(type(other).__name__ for other in mixers)} would mix the same batches; "
            "this project's MixUp and CutMix take turns, and nothing else does: leave the other out"
        )
    step = state.timestamp.batch.value
    generator = generator_at(state.rank_zero_seed, rank=0, step=step, stream="mixing")  # rank 0: the same on every rank
    share: float = getattr(sharing[0], "switch_probability")  # noqa: B009 (it is not every algorithm's)
    switched = float(torch.rand((), generator=generator, dtype=torch.float64)) < share
    return (algorithm is sharing[0]) == switched


def draw_beta(alpha: float, *, generator: torch.Generator, num_samples: int | None = None) -> float | Tensor:
    """One number ~ Beta(alpha, alpha), or a float32 tensor [N] of them."""
    # torch cannot draw Beta from a given generator; NumPy can, and stays finite down to the smallest alpha.
    beta = np.random.default_rng(int(torch.randint(2**63 - 1, (), generator=generator)))
    if num_samples is None:
        return float(beta.beta(alpha, alpha))
    return torch.from_numpy(beta.beta(alpha, alpha, size=num_samples)).float()


def mix(values: Tensor, lam: float | Tensor, permutation: Tensor) -> Tensor:
    """lam · values + (1 - lam) · values[permutation], with lam a number or one per row."""
    # Indexing by a tensor keeps channels_last where index_select does not; lerp reads both parts once and writes once.
    partners = values[permutation]
    if isinstance(lam, Tensor):
        lam = lam.to(values.device, values.dtype, non_blocking=True).view(-1, *[1] * (values.ndim - 1))
    return torch.lerp(partners, values, lam)


def check_alpha(alpha: float, *, usual: float, algorithm: str) -> None:
    """ValueError unless `alpha` is above 0 and finite."""
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(
            f"alpha {alpha} must be above 0 and finite; {usual} is usual, and to mix nothing leave {algorithm} out"
        )


def check_seed(seed: int | None) -> None:
    """ValueError unless `seed` is None or 0 or more."""
    if seed is not None and seed < 0:
        raise ValueError(f"seed {seed} must be 0 or more; leave it out to use the run's seed")


def check_permutation(permutation: Tensor, *, num_samples: int) -> None:
    """ValueError unless `permutation` holds 0..N-1, each once (its values are checked on CPU only)."""
    if permutation.shape != (num_samples,):
        raise ValueError(
            f"received a permutation of shape {list(permutation.shape)} for {num_samples} images; it must be "
            f"[{num_samples}]: draw it for this batch"
        )
    on_cpu = permutation.device.type == "cpu"
    if on_cpu and not torch.equal(permutation.sort().values, torch.arange(num_samples, dtype=permutation.dtype)):
        raise ValueError(
            f"received a permutation in which some sample is missing; it must hold 0..{num_samples - 1}, each once: "
            "torch.randperm gives one"
        )


def check_counts(images: Tensor, probabilities: Tensor) -> None:
    """ValueError unless there is one target per image."""
    if probabilities.shape[0] != images.shape[0]:
        raise ValueError(
            f"received {images.shape[0]} images and {probabilities.shape[0]} targets; the numbers must be equal: "
            "pass the targets of these images"
        )


def _mixes(algorithm: object) -> bool:
    contract = getattr(algorithm, "contract", None)  # Composer's own algorithms may lack one
    return contract is not None and Resource.MIXING in contract.writes
