"""Microbatches that fit by themselves, and what is said when memory runs out, on a GPU most of which is taken."""

from __future__ import annotations

import contextlib
import gc
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(180)]

BATCH_SIZE = 1024
FREE_BYTES = 1_500_000_000  # less than a batch needs, and more than its weights do
RECIPE = (
    "parallelism.strategy=none", "algorithms=null", "duration.epochs=1", "schedule.warmup_epochs=0",
    "data.train.image_size=64", f"data.train.global_batch_size={BATCH_SIZE}", "data.eval.per_device_batch_size=20",
    "data.train.num_workers=1", "data.eval.num_workers=1",
)  # fmt: skip


@contextlib.contextmanager
def little_memory(device: torch.device, how: str = "taken") -> Iterator[None]:
    """Leaves FREE_BYTES of the GPU, which takes no time; nothing on the CPU.

    how: "taken" allocates the rest, as another process would; "limited" has torch refuse it to this process.
    """
    if device.type == "cpu":
        yield
        return
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    if free <= FREE_BYTES:
        pytest.skip(f"the GPU has {free / 1e9:.1f} GB left, and the test needs more")
    held = []
    if how == "taken":
        held.append(torch.empty(free - FREE_BYTES, dtype=torch.uint8, device=device))
    else:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + FREE_BYTES) / total, device)
    try:
        yield
    finally:
        held.clear()
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        torch.cuda.empty_cache()


def train(recipe: Any) -> Any:
    from resumed_runs import quiet

    from training import session

    gc.collect()  # what an earlier run of this process left
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return session.train(recipe, say=quiet)


def test_auto_finds_a_microbatch_that_fits(device: torch.device, digits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from training.engines import composer as engine

    trainers: list[Any] = []
    build = engine.build_trainer
    monkeypatch.setattr(engine, "build_trainer", lambda *a, **k: trainers.append(build(*a, **k)) or trainers[-1])
    microbatch = "auto" if device.type == "cuda" else 256
    expected = train(digits("run_name=expected", *RECIPE, "data.train.per_device_microbatch_size=64")).history
    with little_memory(device):
        found = train(digits("run_name=auto", *RECIPE, f"data.train.per_device_microbatch_size={microbatch}")).history
    size = trainers[-1].state.device_train_microbatch_size
    assert 1 <= size < BATCH_SIZE
    assert len(found.steps["loss"]) == len(expected.steps["loss"]) >= 1
    # Batch norm sees microbatches, so that their size shows in the loss, but not much.
    assert found.steps["loss"][0] == pytest.approx(expected.steps["loss"][0], abs=0.2)
    assert all(math.isfinite(loss) for loss in found.steps["loss"])


@pytest.mark.usefixtures("only_on_gpu")
@pytest.mark.parametrize("how", ["taken", "limited"])
def test_the_batch_that_is_named_fits_and_twice_as_many_do_not(how: str, device: torch.device, digits: Any) -> None:
    if how == "limited" and not hasattr(torch.cuda, "get_per_process_memory_fraction"):
        pytest.skip("this torch does not tell its limit")
    with little_memory(device, how):
        with pytest.raises(ValueError, match="out of memory") as refused:
            train(digits("run_name=whole", *RECIPE))
        told = str(refused.value)
        named = re.search(
            rf"out of memory with {BATCH_SIZE} images a rank .*; set data\.train\.per_device_microbatch_size=(\d+)",
            told,
        )
        assert named, told
        assert "or data.train.per_device_microbatch_size=auto" in told
        largest = int(named[1])
        assert 16 < largest < BATCH_SIZE
        del refused
        train(digits("run_name=named", *RECIPE, f"data.train.per_device_microbatch_size={largest}"))
        with pytest.raises(ValueError, match="out of memory"):
            train(digits("run_name=twice", *RECIPE, f"data.train.per_device_microbatch_size={2 * largest}"))
    train(digits("run_name=freed", *RECIPE))  # with all of the memory, what failed before does not


def test_a_steps_bytes_are_what_a_larger_batch_takes(device: torch.device) -> None:
    """c + a b, measured on a few images, against the peak of a batch of 64."""
    from models.resnet import resnet_digits
    from training.engines.memory import _peak_bytes, step_bytes

    network = resnet_digits(num_classes=10)
    constant, per_image = step_bytes(network, image_size=64, device=device)
    assert all(parameter.grad is None for parameter in network.parameters())
    peak = _peak_bytes(network, torch.rand(64, 3, 64, 64, device=device), "fp32")
    assert per_image > 0
    # Convolutions take other amounts of scratch memory for other batches.
    assert peak == pytest.approx(constant + 64 * per_image, rel=0.5)
