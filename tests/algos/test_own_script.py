"""Every algorithm in a Composer script that uses nothing of this project but the algorithm.

The script has a torch model in Composer's ComposerClassifier and a torch DataLoader, which can change neither its image
size nor its crop, and has no mean and std.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Trainer
from composer.models import ComposerClassifier
from composer.utils import dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import BasicBlock

import algos
from algos.framework.registry import find, names

BATCHES_PER_EPOCH = 4
# What the algorithm's page says to write where the defaults do not do for such a script.
SETTINGS: dict[str, dict[str, Any]] = {
    "ema": {"decay": 0.9},
    "fixres": {"epochs": 1, "crop": "keep"},
    "randaugment": {"normalization": "unit"},
}
MAKERS = {name: lambda name=name: [find(name)(**SETTINGS.get(name, {}))] for name in names()} | {
    "distillation": lambda: [algos.Distillation(teacher=teacher())],
    "learning_rate": lambda: [algos.LearningRate(warmup_epochs=1)],
    "fixres with a rate of its own": lambda: [
        algos.FixRes(epochs=1, crop="keep", learning_rate=0.01),
        algos.LearningRate(),
    ],
    "stages": lambda: [
        algos.ProgressiveResizing(stages=[algos.Stage(epochs=1, image_size=8), algos.Stage(epochs=1, image_size=12)])
    ],
}


ENDLESS = {name: make for name, make in MAKERS.items() if name != "stages"}  # which cover a run of a given length


def network(dropout: float) -> nn.Module:
    """With something for every algorithm: residual blocks, strides, batch norm, dropout."""
    shortcut = nn.Sequential(nn.Conv2d(16, 16, 1, stride=2, bias=False), nn.BatchNorm2d(16))
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        BasicBlock(16, 16, stride=2, downsample=shortcut),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(16, 4),
    )  # fmt: skip


def teacher() -> nn.Module:
    """The same one at each call."""
    torch.manual_seed(1)
    return network(0.5)


def make_trainer(algorithms: list[Any], max_duration: str, *, draws: bool = True, **settings: Any) -> Trainer:
    """draws: whether the script itself draws random numbers in training, for dropout and the order of images."""
    torch.manual_seed(0)
    labels = torch.arange(8 * BATCHES_PER_EPOCH) % 4
    images = (torch.rand(len(labels), 3, 16, 16) + labels.view(-1, 1, 1, 1) / 4) / 2
    dataset = TensorDataset(images, labels)
    # Composer's sampler: with shuffle=True, a run without any algorithm is not exact when resumed in mid-epoch.
    sampler = dist.get_sampler(dataset, shuffle=draws)
    model = ComposerClassifier(network(0.2 if draws else 0.0), num_classes=4)
    return Trainer(
        model=model,
        train_dataloader=DataLoader(dataset, batch_size=8, sampler=sampler),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3),
        algorithms=algorithms,
        max_duration=max_duration,
        seed=7,
        device="cpu",
        progress_bar=False,
        log_to_console=False,
        auto_log_hparams=False,
        **settings,
    )


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    trainer.close()
    return {name: tensor.detach().clone() for name, tensor in trainer.state.model.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


pytestmark = pytest.mark.filterwarnings(  # float32's rounding of smoothed targets, which Composer's loss makes good
    "ignore:Some targets have less than 1 total probability"
)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(("length", "steps"), [("6ba", 6), ("2ep", 8)])
def test_it_trains(make: Any, length: str, steps: int) -> None:
    trainer = make_trainer(make(), length)
    before = {name: parameter.detach().clone() for name, parameter in trainer.state.model.named_parameters()}
    trainer.fit()
    assert trainer.state.timestamp.batch.value == steps
    after = state_of(trainer)
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert all(not torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("make", ENDLESS.values(), ids=ENDLESS)
@pytest.mark.parametrize(("length", "more", "checkpoint"), [("2ep", "1ep", "ep2-ba8"), ("6ba", "4ba", "ep1-ba6")])
def test_a_second_fit_is_a_longer_run(make: Any, length: str, more: str, checkpoint: str, tmp_path: Path) -> None:
    # Without draws: of a Trainer with no algorithm at all, Composer reseeds the one and not the other.
    trainer = make_trainer(make(), length, draws=False, save_folder=str(tmp_path), save_interval=length)
    trainer.fit()
    trainer.fit(duration=more)
    whole = f"{int(length[:-2]) + int(more[:-2])}{more[-2:]}"
    longer = make_trainer(make(), whole, draws=False, load_path=str(tmp_path / f"{checkpoint}-rank0.pt"))
    longer.fit()
    assert trainer.state.timestamp.batch == longer.state.timestamp.batch
    assert_equal(state_of(trainer), state_of(longer))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(("interval", "checkpoint"), [("3ba", "ep0-ba3"), ("1ep", "ep1-ba4"), ("3ba", "ep1-ba6")])
def test_a_resumed_run_is_the_whole_run(make: Any, interval: str, checkpoint: str, tmp_path: Path) -> None:
    whole = make_trainer(make(), "2ep", save_folder=str(tmp_path), save_interval=interval)
    whole.fit()
    resumed = make_trainer(make(), "2ep", load_path=str(tmp_path / f"{checkpoint}-rank0.pt"))
    torch.manual_seed(99)  # nothing may depend on what the process drew before
    resumed.fit()
    assert_equal(state_of(whole), state_of(resumed))


@pytest.mark.parametrize(
    ("algorithms", "message"),
    [
        (lambda: [algos.EMA()], "give exactly one of them, for example decay=0.999"),
        (lambda: [algos.FixRes(epochs=1)], r"the loader, a DataLoader, .*write FixRes\(epochs=1, crop='keep'\)"),
        (lambda: [algos.FixRes(epochs=1, crop="keep", learning_rate=0.01)], "fixres.learning_rate .* algos.LearningRa"),
        (lambda: [algos.RandAugment()], r"a DataLoader, .*write RandAugment\(normalization='imagenet'\)"),
        (lambda: [algos.FixRes(crop="keep")], "fixres.epochs is 5 and the run has 2 epochs"),
        (lambda: MAKERS["stages"](), "cover 1 . 1 = 2 epochs and the run has 3"),
    ],
)
def test_what_it_lacks_is_said_in_one_line(algorithms: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        make_trainer(algorithms(), "3ep" if "cover" in message else "2ep").fit()
    assert "\n" not in str(refusal.value)
    assert re.search(r"; (give|write|add|make|they)|: add", str(refusal.value))
