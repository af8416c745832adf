"""Random numbers as a pure function of the run's position, so that a resumed run draws the same numbers."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor, nn

_WORD = 2**32


def generator_at(seed: int, *, rank: int, step: int, stream: str) -> torch.Generator:
    """A CPU generator for `stream` (an algorithm's name) at `step` (batches done) on `rank`.

    The same four values always give the same generator; changing any one of them gives an unrelated one. Nothing has to
    be saved in a checkpoint, and the global generators are neither read nor advanced.

    Raises ValueError for a negative seed, rank or step.
    """
    for name, value in (("seed", seed), ("rank", rank), ("step", step)):
        if value < 0:
            raise ValueError(f"{name} {value} is negative; it must be 0 or more")
    # Fixed numbers of 32-bit words: (1, 23) and (12, 3) must differ.
    entropy = [*_two_words(seed), rank, *_two_words(step), zlib.crc32(stream.encode())]
    (state,) = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state))


class MicrobatchDraws:
    """What a model's random layers draw for the current microbatch; they share one such object as `microbatch_draws`.

    of_rows: a tensor with a row per layer and a column per sample, or None if layers draw for themselves. It is
        replaced for each microbatch and never written to, so that code that repeats a forward pass can keep and
        restore it.
    num_layers: how many layers share this object.
    """

    def __init__(self) -> None:
        self.of_rows: Tensor | None = None
        self.num_layers = 0

    def example(self, images: Tensor) -> Tensor | None:
        """A draw for `images` of the kind that training makes, for trying a forward pass."""
        return torch.ones(self.num_layers, len(images), dtype=torch.bool, device=images.device)


def microbatch_draws(model: nn.Module) -> list[MicrobatchDraws]:
    """The draws of `model`, each once."""
    found = [vars(module).get("microbatch_draws") for module in model.modules()]
    return list({id(draws): draws for draws in found if draws is not None}.values())


def _two_words(value: int) -> tuple[int, int]:
    return value % _WORD, value // _WORD % _WORD
