"""Small runs of Composer's Trainer on any device, for the tests of this folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.core import Callback, DataSpec, State
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "algos"))
from composition import arranged
from resumed_runs import quiet

from data import Normalizer, build_loader
from models.classifier import ImageClassifier
from models.resnet import SmallResNet
from training.callbacks import _LoaderPosition

NUM_CLASSES, BATCH_SIZE = 4, 8


def small_network() -> nn.Module:
    """A ResNet with batch norm in float32; SiLU, so that rounding makes no gradient jump."""
    torch.manual_seed(0)
    return SmallResNet(num_classes=NUM_CLASSES, width=16, blocks_per_stage=1, activation=nn.SiLU)


def make_trainer(
    device: torch.device,
    network: nn.Module,
    chosen: Sequence[str] | Sequence[Any],
    *,
    epochs: int = 3,
    steps: int = 4,
    image_size: int = 16,
    callbacks: Iterable[Callback] = (),
    model: Callable[..., Any] = ImageClassifier,
    **settings: Any,
) -> Trainer:
    """A Trainer for `network` on synthetic images. chosen: names of algorithms with example settings, or algorithms."""
    loader = build_loader(
        source="synthetic", source_settings={"num_samples": BATCH_SIZE * steps, "num_classes": NUM_CLASSES},
        split="train", loader="torch", per_device_batch_size=BATCH_SIZE, image_size=image_size, num_workers=0,
        log=quiet, device=device,
    )  # fmt: skip
    names = [one for one in chosen if isinstance(one, str)]
    classifier = model(network, num_classes=NUM_CLASSES)
    return Trainer(
        model=classifier,
        train_dataloader=DataSpec(
            loader,
            batch_transforms=Normalizer(loader.mean, loader.std),
            get_num_samples_in_batch=lambda batch: len(batch[1]),
        ),
        max_duration=f"{epochs}ep",
        algorithms=[*arranged(names, torch.float32), *(one for one in chosen if not isinstance(one, str))],
        optimizers=torch.optim.SGD(classifier.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3),
        callbacks=[_LoaderPosition(loader), *callbacks],
        progress_bar=False,
        spin_dataloaders=False,
        device="gpu" if device.type == "cuda" else "cpu",
        seed=0,
        auto_log_hparams=False,
        **settings,
    )


def fit(trainer: Trainer) -> None:
    """Train to the end and close the Trainer."""
    try:
        trainer.fit()
    finally:
        trainer.close()


def weights(model: nn.Module) -> list[Tensor]:
    """Copies of all parameters."""
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether all tensors are equal bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class WeightsOfSteps(Callback):
    """Copies of the weights before the first step and after each one, and the loss scale."""

    def __init__(self) -> None:
        self.weights: list[list[Tensor]] = []
        self.scales: list[float] = []

    def fit_start(self, state: State, logger: Any) -> None:
        self._keep(state)

    def batch_end(self, state: State, logger: Any) -> None:
        self._keep(state)

    def _keep(self, state: State) -> None:
        self.weights.append(weights(state.model))
        self.scales.append(state.scaler.get_scale() if state.scaler is not None else 1.0)
