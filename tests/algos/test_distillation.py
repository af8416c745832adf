"""Distillation against its formula in numpy, timm's, and a loop of the plain function."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import composition
from composition import make_trainer
from test_selective_backprop import Record, batch_norm_and_dropout

from algos import SAM, ChannelsLast, Distillation, MixUp, distillation_loss, soft_target_loss


def teacher(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(54, 4)
    ).double()


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composition, "network", lambda *_, **__: batch_norm_and_dropout())


def logits() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z, y = (3 * torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    return z, y, torch.tensor([0, 4, 2, 2, 1, 3])


@pytest.mark.parametrize(("temperature", "weight"), [(4.0, 0.9), (1.0, 1.0), (0.5, 0.3), (2.0, 0.0)])
def test_the_loss_is_the_formula(temperature: float, weight: float) -> None:
    z, y, targets = logits()

    def softmax(values: np.ndarray) -> np.ndarray:
        return np.exp(values) / np.exp(values).sum(axis=1, keepdims=True)

    p, q = softmax(y.numpy() / temperature), softmax(z.numpy() / temperature)
    divergence = (p * np.log(p / q)).sum(axis=1).mean()
    cross_entropy = -np.log(softmax(z.numpy())[np.arange(6), targets]).mean()
    expected = (1 - weight) * cross_entropy + weight * temperature**2 * divergence
    found = distillation_loss(z, y, targets, temperature=temperature, weight=weight)
    assert float(found) == pytest.approx(expected, abs=1e-13)
    one_hot = distillation_loss(z, y, torch.eye(5).double()[targets], temperature=temperature, weight=weight)
    assert float(one_hot) == pytest.approx(expected, abs=1e-13)


def test_the_gradient_at_a_high_temperature_is_that_of_matching_logits() -> None:
    # Hinton 2015, equation 4: for zero-mean logits dC/dz -> (z - y) / (N K), T² cancelled.
    z, y, _ = logits()
    z, y = (values - values.mean(dim=1, keepdim=True) for values in (z, y))
    z.requires_grad_()
    soft_target_loss(z, y, temperature=1e6).backward()
    assert z.grad is not None
    torch.testing.assert_close(z.grad, (z - y).detach() / z.numel(), rtol=1e-3, atol=1e-6)


def test_it_is_timms() -> None:
    task = pytest.importorskip("timm.task", reason="of a newer timm")
    (z, y, targets), temperature, weight = logits(), 3.0, 0.7
    images = torch.zeros(6, 5).double()

    class Gives(nn.Module):
        def __init__(self, values: Tensor) -> None:
            super().__init__()
            self.values = nn.Parameter(values)
            self.num_classes, self.in_chans = 5, 3
            self.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}

        def forward(self, images: Tensor) -> Tensor:
            return self.values

    theirs = task.LogitDistillationTask(
        student_model=Gives(z), teacher_model=Gives(y), criterion=nn.CrossEntropyLoss(), temperature=temperature,
        distill_loss_weight=weight, task_loss_weight=1 - weight, verbose=False,
    )  # fmt: skip
    theirs.teacher.normalize_input = lambda images, mean, std: images
    found = distillation_loss(z, y, targets, temperature=temperature, weight=weight)
    torch.testing.assert_close(found, theirs(images, targets)["loss"].detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: soft_target_loss(torch.rand(2, 3), torch.rand(2, 4), temperature=1), r"\[2, 3\], and the teacher's"),
        (lambda: soft_target_loss(torch.rand(3), torch.rand(3), temperature=1), "logits of the same classes"),
        (lambda: distillation_loss(*logits(), temperature=0), "temperature 0 must be above 0"),
        (lambda: distillation_loss(*logits(), weight=1.1), r"weight 1.1 must lie in \[0, 1\]"),
        (lambda: Distillation(teacher=""), "give a network, or in a recipe"),
        (lambda: Distillation(teacher=3), "teacher is 3; give a network"),  # pyright: ignore[reportArgumentType]
        (lambda: Distillation(teacher="x", temperature=float("inf")), "temperature inf"),
        (lambda: make_trainer([Distillation(teacher="results/x")]), "'results/x', a name that only recipes know"),
    ],
)
def test_mistakes_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_run_is_a_loop_of_the_plain_function() -> None:
    """The teacher gets the mixed images, in evaluation mode, and draws nothing."""
    record, mine = Record(), teacher().train()
    trainer = make_trainer([MixUp(), Distillation(teacher=mine, temperature=2, weight=0.6)], callbacks=[record])
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    trainer.fit()

    model, other = batch_norm_and_dropout(), teacher().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    torch.set_rng_state(record.random_state)
    for images, targets in record.trained:
        with torch.no_grad():
            outputs = other(images)
        distillation_loss(model(images), outputs, targets, temperature=2, weight=0.6).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = trainer.state.model.state_dict()
    assert found.keys() == {f"module.{name}" for name in model.state_dict()}, "the teacher is no part of the model"
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[f"module.{name}"], value, rtol=0, atol=1e-13)
    assert mine.training
    assert all(torch.equal(value, before[name]) for name, value in mine.state_dict().items())
    assert all(parameter.grad is None for parameter in mine.parameters())
    trainer.close()


def test_the_teacher_is_asked_once_for_each_microbatch_and_not_again_by_sam() -> None:
    mine, sizes = teacher(), []
    mine.register_forward_hook(lambda module, inputs, outputs: sizes.append(len(inputs[0])))
    trainer = make_trainer([Distillation(teacher=mine), SAM()], device_train_microbatch_size=5)
    trainer.fit(duration="2ba")
    assert sizes == [5, 3, 5, 3]
    trainer.close()


def test_the_teacher_takes_the_models_memory_format() -> None:
    for algorithms, expected in (([], False), ([ChannelsLast()], True)):
        mine = teacher()
        trainer = make_trainer([*algorithms, Distillation(teacher=mine)])
        trainer.fit(duration="1ba")
        assert mine[0].weight.is_contiguous(memory_format=torch.channels_last) == expected
        trainer.close()


def test_a_run_is_continued_with_the_same_teacher_alone(tmp_path: Path) -> None:
    trainer = make_trainer([Distillation(teacher=teacher())], save_folder=str(tmp_path), save_interval="1ep")
    trainer.fit(duration="1ep")
    trainer.close()
    saved = str(tmp_path / "ep1-ba4-rank0.pt")
    state = torch.load(saved, weights_only=False)["state"]
    assert not [name for name in state["model"] if "5.weight" in name and state["model"][name].shape == (4, 54)]
    same = make_trainer([Distillation(teacher=teacher())], load_path=saved)
    same.fit(duration="1ba")
    same.close()
    other = make_trainer([Distillation(teacher=teacher(seed=2))], load_path=saved)
    with pytest.raises(ValueError, match=r"hash .*; continue it with the same teacher, or start a new run"):
        other.fit(duration="1ba")
    other.close()


@pytest.mark.parametrize(
    ("teacher_classes", "loss", "message"),
    [
        (5, None, r"the model's outputs have the shape \[8, 4\], and the teacher's \[8, 5\]"),
        (4, lambda outputs, batch: {"total": outputs.sum()}, "which is a dict; it must be one tensor"),
    ],
)
def test_what_does_not_fit_is_said_at_the_first_step(teacher_classes: int, loss: Any, message: str) -> None:
    mine = teacher()
    mine[-1] = nn.Linear(54, teacher_classes).double()
    algorithm = Distillation(teacher=mine)
    trainer = make_trainer([algorithm])
    if loss is not None:
        trainer.state.model.loss._loss = loss
    with pytest.raises(ValueError, match=message):
        trainer.fit()
    trainer.close()
