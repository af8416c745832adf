"""fp16 with its loss scale and SAM's second pass, and bf16."""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]


class Classifier(nn.Module):
    """Two layers whose loss is infinite in call number `overflow`."""

    def __init__(self, overflow: int | None, factor: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 16, 4))
        self.overflow, self.factor, self.calls = overflow, factor, 0

    def forward(self, batch: Any) -> torch.Tensor:
        return self.module(batch[0])

    def loss(self, logits: torch.Tensor, batch: Any) -> torch.Tensor:
        self.calls += 1
        return F.cross_entropy(logits, batch[1]) * (math.inf if self.overflow == self.calls - 1 else self.factor)


def scaled_step(device: torch.device, *, scale: float, overflow: int | None = None, factor: float = 1.0) -> Any:
    """A step of two microbatches with SAM, in the Trainer's order of events; fp16 where the device has it.

    Returns the weights before and after it, the scaler and the number of forward passes.
    """
    from composer.core import Event, Precision

    from algos.framework.base import precision_context
    from algos.sam import SAM

    owner, sam = Classifier(overflow, factor).to(device), SAM(rho=0.3)
    optimizer = torch.optim.SGD(owner.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(5)
    images, labels = torch.randn(8, 3, 4, 4, generator=generator).to(device), (torch.arange(8) % 4).to(device)
    scaler = torch.amp.GradScaler(device.type, init_scale=scale)
    state: Any = SimpleNamespace(
        algorithms=[sam], model=owner, batch=(images, labels), scaler=scaler, precision=Precision.AMP_FP16,
        precision_config=None, fsdp_config_version=0, optimizers=(optimizer,),
        timestamp=SimpleNamespace(batch=SimpleNamespace(value=0)),
    )  # fmt: skip
    before = [parameter.detach().clone() for parameter in owner.parameters()]
    for event in (Event.FIT_START, Event.BATCH_START, Event.BEFORE_TRAIN_BATCH):
        sam.apply(event, state, None)
    for microbatch in zip(images.split(4), labels.split(4), strict=True):
        state.batch = microbatch
        sam.apply(Event.BEFORE_FORWARD, state, None)
        with precision_context(state) if device.type == "cuda" else contextlib.nullcontext():
            logits = owner(microbatch)
            sam.apply(Event.BEFORE_LOSS, state, None)
            loss = owner.loss(logits, microbatch)
        if device.type == "cuda":
            assert logits.dtype == torch.float16
        scaler.scale(loss).mul(0.5).backward()
        sam.apply(Event.AFTER_BACKWARD, state, None)
    scaler.unscale_(optimizer)
    sam.apply(Event.AFTER_TRAIN_BATCH, state, None)
    scaler.step(optimizer)
    scaler.update()
    return before, [parameter.detach().clone() for parameter in owner.parameters()], scaler, owner.calls


@pytest.fixture
def _no_autocast_on_a_cpu(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cpu":
        monkeypatch.setattr("algos.sam.precision_context", lambda state: contextlib.nullcontext())


@pytest.mark.usefixtures("_no_autocast_on_a_cpu")
@pytest.mark.parametrize("overflow", [0, 1, 2, 3])  # two microbatches of the first pass, then of the second
def test_an_overflow_in_either_pass_skips_the_step(device: torch.device, overflow: int) -> None:
    before, after, scaler, calls = scaled_step(device, scale=1024.0, overflow=overflow)
    assert all(torch.equal(one, other) for one, other in zip(after, before, strict=True))
    assert scaler.get_scale() == 512.0
    assert calls == 4


@pytest.mark.usefixtures("_no_autocast_on_a_cpu")
def test_an_overflow_by_the_scale_itself_skips_the_step(device: torch.device) -> None:
    before, after, scaler, _ = scaled_step(device, scale=2.0**127, factor=1000.0)
    assert all(torch.equal(one, other) for one, other in zip(after, before, strict=True))
    assert scaler.get_scale() == 2.0**126


@pytest.mark.usefixtures("_no_autocast_on_a_cpu")
def test_the_scale_changes_no_step(device: torch.device) -> None:
    before, after, scaler, calls = scaled_step(device, scale=2.0**10)
    _, plain, _, _ = scaled_step(device, scale=1.0)
    assert scaler.get_scale() == 2.0**10
    assert calls == 4
    for start, one, other in zip(before, after, plain, strict=True):
        assert not torch.equal(start, one)
        # Gradients in fp16 have 11 bits, and those below 6e-5 fewer, which is what the scale is for.
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 if device.type == "cuda" else 1e-6)


@pytest.mark.parametrize("overflow", [None, 4, 5])  # of the third step: the first pass, and SAM's second
def test_the_trainer_skips_the_step_of_an_overflow_and_goes_on(device: torch.device, overflow: int | None) -> None:
    from gpu_runs import WeightsOfSteps, fit, make_trainer, same, small_network

    from algos.sam import SAM
    from models.classifier import ImageClassifier

    if device.type == "cpu" and overflow is not None:
        pytest.skip("needs CUDA itself: the CPU has no loss scale")

    class Overflowing(ImageClassifier):
        calls = 0

        def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
            call, self.calls = self.calls, self.calls + 1
            return super().loss(outputs, batch) * (math.inf if call == overflow else 1.0)

    kept = WeightsOfSteps()
    precision = "amp_fp16" if device.type == "cuda" else "fp32"
    trainer = make_trainer(
        device, small_network(), [SAM(rho=0.05)], epochs=1, steps=6, callbacks=[kept], model=Overflowing,
        precision=precision,
    )  # fmt: skip
    fit(trainer)
    assert trainer.state.model.calls == 12  # two passes in each of six steps
    changed = [not same(one, other) for one, other in zip(kept.weights, kept.weights[1:], strict=False)]
    if overflow is None:
        # The scale begins at 65,536 and may be too high for a step or two.
        assert changed[-1]
        assert sum(changed) >= 4
        return
    assert not changed[2]
    assert kept.scales[3] == kept.scales[2] / 2
    assert changed[-1]
    assert all(torch.isfinite(weight).all() for weight in kept.weights[-1])


@pytest.mark.parametrize("precision", ["amp_bf16", "amp_fp16"])
def test_the_digits_are_learned_with_all_speed_ups(precision: str, device: torch.device, digits: Any) -> None:
    from resumed_runs import quiet

    from training.session import train

    precision = precision if device.type == "cuda" else "fp32"
    recipe = digits(
        f"precision={precision}", "duration.epochs=8", "schedule.warmup_epochs=1",
        "algorithms.progressive_resizing.stages=[{epochs: 4, image_size: 12}, {epochs: 4, image_size: 16}]",
        "algorithms.fixres={epochs: 2, image_size: 16, learning_rate: 0.02}",
    )  # fmt: skip
    result = train(recipe, say=quiet)
    losses = result.history.steps["loss"]
    assert all(math.isfinite(loss) for loss in losses)
    assert result.summary["top1"] > 0.8
    saved = torch.load(recipe.run_dir / "checkpoints" / "latest.pt", weights_only=False)["state"]["model"]
    assert all(value.dtype != torch.float16 for value in saved.values())  # autocast leaves the weights in float32
