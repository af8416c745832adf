"""Runs a network over a loader, on one rank or several, and gathers what it says of every image."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from tqdm import tqdm

from training.judging.metrics import probabilities
from training.trained import Preprocessing, Trained

_PRECISION = {"amp_fp16": torch.float16, "amp_bf16": torch.bfloat16}


@dataclass(frozen=True, order=True)
class Mistake:
    """An image that the network is wrong about."""

    confidence: float
    index: int  # in the order of the data
    label: int = field(compare=False)
    predicted: int = field(compare=False)
    pixels: np.ndarray = field(compare=False, repr=False)  # uint8 [S, S, 3], as the network saw them


@dataclass(frozen=True)
class Predictions:
    """logits [N, C] and labels [N], in the order of the data; the most confident mistakes, the worst first."""

    logits: Tensor
    labels: Tensor
    mistakes: list[Mistake]


class Network:
    """The network of a run on a device, at its recipe's precision there.

    flip: average the logits of each image with those of its mirror image.
    """

    def __init__(self, trained: Trained, *, device: str, flip: bool = False) -> None:
        self.preprocessing: Preprocessing = trained.preprocessing
        self.device = torch.device(device)
        self.loss = trained.recipe.loss
        self._flip = flip
        self._precision = _PRECISION.get(trained.recipe.precision) if device == "cuda" else None
        self._network: nn.Module = trained.network.to(self.device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, S, S] -> float32 logits [N, C] on the CPU."""
        inputs = self.preprocessing.normalized(images.to(self.device))
        with self._autocast():
            logits = self._network(inputs).float()
            if self._flip:
                logits = (logits + self._network(inputs.flip(3)).float()) / 2
        return logits.cpu()

    def _autocast(self) -> AbstractContextManager[object]:
        return nullcontext() if self._precision is None else torch.autocast("cuda", dtype=self._precision)


def predict(
    network: Network, loader: Iterable[tuple[Tensor, Tensor]], *, what: str, keep_mistakes: int = 0
) -> Predictions:
    """What the network says of every image of `loader`, gathered from all ranks, whose loaders share the data.

    what: shown beside the progress bar.
    keep_mistakes: how many of the most confident mistakes to keep with their pixels.
    """
    logits, labels, mistakes, seen = [], [], [], 0
    for images, targets in progress(loader, what):
        found = network(images)
        logits.append(found)
        labels.append(targets.cpu())
        if keep_mistakes:
            mistakes = heapq.nlargest(keep_mistakes, [*mistakes, *_mistakes(network, images, found, labels[-1], seen)])
        seen += len(targets)
    parts = gathered((torch.cat(logits), torch.cat(labels), mistakes))
    before = np.cumsum([0, *(len(part[1]) for part in parts)])
    everywhere = [
        Mistake(one.confidence, one.index + int(first), one.label, one.predicted, one.pixels)
        for first, part in zip(before, parts, strict=False)
        for one in part[2]
    ]
    return Predictions(
        torch.cat([part[0] for part in parts]),
        torch.cat([part[1] for part in parts]),
        heapq.nlargest(keep_mistakes, everywhere),
    )


def predict_shifted(
    network: Network,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    image_size: int,
    shifts: int,
    seed: int,
    every: int = 1,
) -> Tensor:
    """The class of every `every`-th image of each batch under random shifts, [N, shifts].

    loader: gives the images with a margin; the network sees windows of `image_size` px in them.
    """
    draws = np.random.default_rng(seed)
    found = []
    for images, _ in progress(loader, "shifts"):
        images = images[::every]  # data are in the order of their classes: the first ones would be a few classes
        margin = images.shape[-1] - image_size
        places = draws.permutation((margin + 1) ** 2)[:shifts]
        windows = [
            images[:, :, top : top + image_size, left : left + image_size]
            for top, left in (divmod(int(place), margin + 1) for place in places)
        ]
        found.append(torch.stack([network(window).argmax(dim=1) for window in windows], dim=1))
    return torch.cat(gathered(torch.cat(found)))


def with_margin(loader: Iterable[tuple[Tensor, Tensor]], margin: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The loader's images with `margin` px of their own mirror image on each side."""
    for images, labels in loader:
        yield F.pad(images.float(), (margin,) * 4, mode="reflect").to(torch.uint8), labels


def progress(loader: Iterable[tuple[Tensor, Tensor]], what: str) -> Iterable[tuple[Tensor, Tensor]]:
    """`loader` behind a progress bar on rank 0's terminal."""
    total = len(loader) if hasattr(loader, "__len__") else None  # pyright: ignore[reportArgumentType]
    quiet = True if _rank() else None  # None: quiet unless stderr is a terminal
    return tqdm(loader, desc=what, total=total, disable=quiet, leave=False, dynamic_ncols=True)


def gathered(value: object) -> list:
    """`value` of every rank, in their order."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    parts: list = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, value)
    return parts


def _rank() -> int:
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def _mistakes(network: Network, images: Tensor, logits: Tensor, labels: Tensor, first: int) -> list[Mistake]:
    confidence, predicted = probabilities(logits, loss=network.loss).max(dim=1)
    return [
        Mistake(
            confidence=float(confidence[i]),
            index=first + i,
            label=int(labels[i]),
            predicted=int(predicted[i]),
            pixels=images[i].permute(1, 2, 0).cpu().numpy().copy(),
        )
        for i in (predicted != labels).nonzero().flatten().tolist()
    ]
