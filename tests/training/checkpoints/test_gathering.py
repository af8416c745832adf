"""A gathered state is Composer's, to the order of its keys, and shares the run's memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from composer import Trainer
from composer.core import State
from ranks import one_rank
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from algos import EMA
from models.classifier import ImageClassifier
from training.checkpoints.gathering import gather, parameters
from training.optimizers import build_optimizer

pytestmark = pytest.mark.timeout(120)

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"weight_decay": 0.1, "decay_norms_and_biases": False},
    "sgd": {"momentum": 0.9, "weight_decay": 0.1, "decay_norms_and_biases": False},
    "torch.sgd": {"weight_decay": 0.0, "decay_norms_and_biases": True},  # it has no state
}


def trained(optimizer: str, *, change: Callable[[nn.Sequential], None] = lambda network: None) -> State:
    first, second = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    second.weight = first.weight  # one parameter with two names
    first.bias = nn.Parameter(torch.zeros(4), requires_grad=False)  # of which an optimizer has no state
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(first, second), nn.Flatten(), nn.Linear(16, 3)
    )
    network.register_buffer("table", torch.full((2,), -torch.inf))
    change(network)
    model = ImageClassifier(network, num_classes=3)
    settings = {"name": optimizer, **OPTIMIZERS[optimizer]}
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(TensorDataset(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])), batch_size=2),
        algorithms=[EMA(decay=0.9)],
        optimizers=build_optimizer(model, settings, learning_rate=0.1),
        max_duration="2ba",
        device="cpu",
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    return trainer.state


def compile_a_part(network: nn.Sequential) -> None:
    network[0] = torch.compile(network[0], backend="eager")  # pyright: ignore[reportArgumentType]: other names


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or vars(one) == vars(other)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("change", [lambda network: None, compile_a_part])
def test_it_is_composers_state(optimizer: str, change: Callable[[nn.Sequential], None]) -> None:
    state = trained(optimizer, change=change)
    assert same(gather(state), state.state_dict())
    with one_rank():
        state.model = DistributedDataParallel(state.model)  # pyright: ignore
        under_ddp = gather(state)
        assert same(under_ddp, state.state_dict())
        names = [name for name in under_ddp["model"] if "num_batches" not in name and "running" not in name]
        assert len(parameters(state.model, under_ddp)) == len(names) - 1  # all but the table


def test_a_whole_state_is_not_asked_of_composer(monkeypatch: pytest.MonkeyPatch) -> None:
    state = trained("sgd")
    monkeypatch.setattr(State, "get_model_state_dict", None)
    assert list(gather(state))[:2] == ["model", "optimizers"]


def test_a_parameter_of_nobody_is_composers_error() -> None:
    state = trained("sgd")
    state.optimizers[0].add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(KeyError):
        gather(state)
