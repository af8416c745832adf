"""Losses, gradients and weights that are no numbers: found at their step, named, and never saved."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer import Trainer
from composer.core import Callback
from tiny_model import TinyModel
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from training import late
from training.checkpoints.saving import Checkpoints
from training.engines.trainer import StepTrainer
from training.guards import finite
from training.guards.finite import FiniteGuard, NotFinite, not_finite
from training.results.recorder import Recorder

BATCH, STEPS = 8, 6


class Poison(Callback):
    """Makes the gradient of one weight nan at the given steps (from 1), or the loss."""

    def __init__(self, *steps: int, loss: bool = False) -> None:
        self.steps, self.loss = steps, loss
        self.weights: list[torch.Tensor] = []

    def after_train_batch(self, state: Any, logger: Any) -> None:
        if int(state.timestamp.batch) + 1 in self.steps and not self.loss:
            state.model.module.bias.grad[1] = math.nan

    def before_loss(self, state: Any, logger: Any) -> None:
        if int(state.timestamp.batch) + 1 in self.steps and self.loss:
            state.outputs = state.outputs * math.inf

    def batch_end(self, state: Any, logger: Any) -> None:
        self.weights.append(state.model.module.weight.detach().clone())


def make_trainer(
    folder: Path, poison: Poison, on_nan: Any, *, optimizer: Any = None, epochs: int = 1, every_steps: int | None = 1
) -> Trainer:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(BATCH * STEPS, 6, generator=generator)
    data = TensorDataset(images, torch.randint(0, 3, (len(images),), generator=generator))
    model = TinyModel()
    guard = FiniteGuard(on_nan, run_dir=folder, image_indices=lambda epoch, batch: range(batch * 8, batch * 8 + 8))
    return StepTrainer(
        drop_last=True,
        model=model,
        train_dataloader=DataLoader(data, batch_size=BATCH),
        optimizers=optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
        max_duration=f"{epochs}ep",
        device="cpu",
        callbacks=[
            poison,
            Recorder(),
            guard,
            Checkpoints(folder / "checkpoints", every_steps=every_steps, before_save=guard.settle),
        ],
        progress_bar=False,
        log_to_console=False,
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_value_among_many_is_found(bad: float, place: int, dtype: torch.dtype) -> None:
    tensors = [torch.full((3, 4), 3e38 if dtype != torch.float64 else 1e308, dtype=dtype) for _ in range(3)]
    assert not_finite(tensors) == 0
    tensors[place][1, 2] = bad
    assert not_finite(tensors) == 1
    assert not_finite([torch.zeros(0), *tensors]) == 1
    assert not_finite([]) == 0


@pytest.mark.parametrize("loss", [False, True])
def test_a_run_stops_at_the_step_and_keeps_the_checkpoint_before_it(tmp_path: Path, loss: bool) -> None:
    trainer = make_trainer(tmp_path, Poison(3, loss=loss), "stop")
    what = "a loss of nan" if loss else r"gradients of bias that are not finite"
    told = (
        rf"step 3, in epoch 1, gave {what} at a learning rate of 0\.1\. Its images are number 16, 17, 18, 19, 20, 21, "
        r"22, 23 of the training data \(all of them: \S+\)\. "
        rf"The last checkpoint before it is {tmp_path}/checkpoints/latest\.pt\. "
        r"Lower the learning rate, or .* on_nan=skip"
    )
    with pytest.raises(NotFinite, match=told):
        trainer.fit()
    trainer.close()  # waits for the thread that writes
    saved = torch.load(tmp_path / "checkpoints" / "latest.pt", weights_only=False)["state"]
    assert int(saved["timestamp"]["Timestamp"]["batch"]) == 2
    assert (tmp_path / finite.IMAGES_FILE).read_text().split() == [str(i) for i in range(16, 24)]


@pytest.mark.parametrize("every_steps", [1, None])
@pytest.mark.parametrize("loss", [False, True])
def test_what_is_read_late_is_told_with_its_step(
    tmp_path: Path, loss: bool, every_steps: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(late, "_LATE_DEVICES", {"cpu"})
    monkeypatch.setattr(late, "_end_of_work", lambda device: SimpleNamespace(synchronize=lambda: None))
    poison = Poison(3, loss=loss)
    trainer = make_trainer(tmp_path, poison, "stop", every_steps=every_steps)
    what = "a loss of nan" if loss else "gradients of bias that are not finite"
    with pytest.raises(NotFinite, match=rf"step 3, in epoch 1, gave {what} at .* Its images are number 16, 17"):
        trainer.fit()
    trainer.close()
    assert (tmp_path / finite.IMAGES_FILE).read_text().split() == [str(i) for i in range(16, 24)]
    # A save is due: at once. Otherwise two steps later.
    assert int(trainer.state.timestamp.batch) == (3 if every_steps else 5)
    if every_steps:
        saved = torch.load(tmp_path / "checkpoints" / "latest.pt", weights_only=False)["state"]
        assert int(saved["timestamp"]["Timestamp"]["batch"]) == 2


@pytest.mark.parametrize("step", [5, 6])
def test_what_is_read_late_is_told_before_the_epochs_evaluation(
    tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(late, "_LATE_DEVICES", {"cpu"})
    monkeypatch.setattr(late, "_end_of_work", lambda device: SimpleNamespace(synchronize=lambda: None))
    trainer = make_trainer(tmp_path, Poison(step), "stop", every_steps=None)
    with pytest.raises(NotFinite, match=f"step {step}, in epoch 1, .* Its images are number {8 * (step - 1)},"):
        trainer.fit()
    trainer.close()
    assert not (tmp_path / "checkpoints" / "latest.pt").exists()


@pytest.mark.parametrize("loss", [False, True])
def test_a_skipped_step_changes_neither_weights_nor_the_optimizer(
    tmp_path: Path, loss: bool, caplog: pytest.LogCaptureFixture
) -> None:
    poison = Poison(3, loss=loss)
    trainer = make_trainer(tmp_path, poison, "skip")
    momentum: list[torch.Tensor] = []

    class Watch(Callback):
        def batch_end(self, state: Any, logger: Any) -> None:
            momentum.append(state.optimizers[0].state[state.model.module.weight]["momentum_buffer"].clone())

    trainer.state.callbacks.append(Watch())
    trainer.fit()
    assert torch.equal(poison.weights[2], poison.weights[1])
    assert torch.equal(momentum[2], momentum[1])
    assert not torch.equal(poison.weights[3], poison.weights[2])
    assert all(torch.isfinite(one).all() for one in poison.weights)
    assert ["the step is left out" in text for text in caplog.messages] == [True]


def test_other_steps_are_as_if_nothing_checked_them(tmp_path: Path) -> None:
    weights = []
    for on_nan in ("stop", "skip", "continue"):
        poison = Poison()
        make_trainer(tmp_path / on_nan, poison, on_nan).fit()
        weights.append(poison.weights)
    for others in weights[1:]:
        assert all(map(torch.equal, weights[0], others))


def test_skipping_ends_when_no_step_is_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "MOST_SKIPPED", 3)
    with pytest.raises(NotFinite, match=r"step 5, .*the last of 3 in a row that were left out"):
        make_trainer(tmp_path, Poison(1, 3, 4, 5), "skip").fit()


def test_going_on_saves_nothing_that_is_not_finite(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_trainer(tmp_path, Poison(3), "continue", epochs=2).fit()
    saved = torch.load(tmp_path / "checkpoints" / "latest.pt", weights_only=False)["state"]
    assert int(saved["timestamp"]["Timestamp"]["batch"]) == 2
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sum("the weights after step 3 are not finite; they are not saved" in text for text in told) == 1
    assert sum("on_nan=continue goes on" in text for text in told) <= 5  # at powers of two, not at every step


def test_weights_that_are_bad_from_the_start_are_named(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, Poison(), "stop")
    with torch.no_grad():
        trainer.state.model.module.bias[0] = math.inf
    with pytest.raises(NotFinite, match=r"the weights of bias are not finite before the first step"):
        trainer.fit()


def test_steps_that_the_gradient_scaler_skips_are_no_faults_but_a_sunk_scale_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Scaler:
        scale = 65536.0

        def is_enabled(self) -> bool:
            return True

        def get_scale(self) -> float:
            return self.scale

    guard = FiniteGuard("stop", run_dir=tmp_path)
    trainer = make_trainer(tmp_path, Poison(), "stop")
    state = trainer.state
    monkeypatch.setattr(state, "_scaler", Scaler(), raising=False)
    monkeypatch.setattr(type(state), "scaler", property(lambda self: self._scaler), raising=False)
    state.total_loss_dict = {"loss/train/total": math.inf}
    nn.init.ones_(state.model.module.bias)
    state.model.module.bias.grad = torch.full((3,), math.inf)
    for _ in range(finite.MOST_SKIPPED - 1):
        guard.after_train_batch(state, trainer.logger)
        guard.batch_end(state, trainer.logger)
        assert state.model.module.bias.grad is not None
    assert not caplog.messages
    Scaler.scale = 0.5
    with pytest.raises(NotFinite, match="loss of inf"):
        guard.batch_end(state, trainer.logger)
    assert ["gradient scale has sunk to 0.5" in text for text in caplog.messages] == [True]
