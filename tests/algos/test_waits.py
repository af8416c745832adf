"""What a training step makes the host wait for on a GPU: nothing, with any algorithm and with every run's callbacks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Trainer
from composer.core import Callback, State
from composition import SETS
from torch import nn
from waits import COPY, DEVICE, WAIT, PretendGPU
from watched_steps import callbacks_of_a_run, copies, waits, watch

from algos import CutMix, MixUp, randaugment_batch
from algos.randaugment import OPERATIONS
from training.optimizers import find

# Composer's own copies of each step: images and labels, the sums of the losses, and each microbatch's loss.
COMPOSERS_COPIES = {
    "composer/trainer/trainer.py:_train_loop": 2,
    "composer/trainer/trainer.py:_train_batch": 1,
    "composer/trainer/trainer.py:_train_microbatch": 1,
}
OF_THE_CALLBACKS = {"training/late.py:_start_copy": 3}  # loss, top-1, and which gradients are not finite
OF_AN_ALGORITHM = {
    "cutmix": {"algos/cutmix.py:cutmix_batch": 1},
    "mixup": {"algos/mixup.py:mixup_batch": 1},
    "patch_dropout": {"algos/patch_dropout.py:_draw": 1},
    "selective_backprop": {"algos/selective_backprop.py:apply": 1},
    "stochastic_depth": {"algos/stochastic_depth.py:_draw": 1},
}
QUICK = ("nothing", "all together")  # the rest is in make test-all
COMPOSERS_WAITS = {
    "composer/trainer/trainer.py:<dictcomp>": 1,
    "composer/trainer/trainer.py:<lambda>": 1,
    "composer/trainer/trainer.py:_accumulate_time_across_ranks": 3,
    "composer/trainer/trainer.py:_iter_dataloader": 1,
    "composer/trainer/trainer.py:_train_microbatches": 1,
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    # The networks are so small that threads wait for each other longer than they work.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "name", [one if one in QUICK else pytest.param(one, marks=pytest.mark.exhaustive) for one in SETS]
)
def test_no_algorithm_and_no_callback_waits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = name in ("fixres", "progressive_resizing", "all together")  # which act in later epochs
    gpu, steady = watch(monkeypatch, SETS[name], callbacks_of_a_run(tmp_path), last_step=None if whole else 3)
    assert len(steady) >= 2
    assert waits(gpu, steady) == {}
    found = copies(gpu, steady)
    found.pop("algos/randaugment.py:__torch_function__", None)  # as many as operations are drawn
    assert found == {
        **COMPOSERS_COPIES,
        **OF_THE_CALLBACKS,
        **{place: count for one in SETS[name] for place, count in OF_AN_ALGORITHM.get(one, {}).items()},
    }


def test_an_epochs_end_reads_what_is_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, steady = watch(monkeypatch, [], callbacks_of_a_run(tmp_path), last_step=6)
    places = {note.where for note in gpu.notes if note.kind == WAIT and note.step == 4}
    assert "training/late.py:values" in places, "an early reading is noted"
    assert waits(gpu, steady) == {}


def test_composers_own_trainer_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, steady = watch(monkeypatch, [], last_step=3, kind=Trainer)
    assert waits(gpu, steady) == COMPOSERS_WAITS


def test_skipping_needs_to_know_before_the_optimizers_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, steady = watch(monkeypatch, [], callbacks_of_a_run(tmp_path, on_nan="skip"), last_step=3)
    assert waits(gpu, steady) == {"training/guards/finite.py:after_train_batch": 1}


class ReadLoss(Callback):
    """A user's callback that reads the loss at every step."""

    def batch_end(self, state: State, logger: Any) -> None:
        float(state.total_loss_dict["loss/train/total"])


def test_a_callback_that_reads_the_loss_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, steady = watch(monkeypatch, [], [ReadLoss()], last_step=3)
    assert waits(gpu, steady) == {"training/late.py:values": 1}


@pytest.mark.parametrize("other", [MixUp(per_sample=True), CutMix(per_sample=True)])
def test_nor_does_mixing_each_sample_its_own_way(other: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, steady = watch(monkeypatch, [other], last_step=3)
    assert waits(gpu, steady) == {}


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_no_operation_of_randaugment_waits(interpolation: Any) -> None:
    images = torch.randint(0, 256, (len(OPERATIONS), 3, 16, 16), dtype=torch.uint8)
    operations = torch.arange(len(OPERATIONS)).expand(2, -1)
    signs = torch.tensor([[1], [-1]]).expand(2, len(OPERATIONS))
    plain = randaugment_batch(images, operations=operations, signs=signs, interpolation=interpolation)
    with PretendGPU() as gpu:
        gpu.mark([images])
        there = randaugment_batch(images, operations=operations, signs=signs, interpolation=interpolation)
    assert gpu.holds(there)
    assert torch.equal(there, plain)
    assert [note for note in gpu.notes if note.kind == WAIT] == []


@pytest.mark.parametrize("name", ["sgd", "adamw", "decoupled_sgdw", "torch.nadam"])
def test_no_optimizer_waits_and_none_fills_memory_with_zeros(name: str) -> None:
    weights = nn.Linear(4, 3)
    optimizer = find(name)(weights.parameters(), lr=0.1)
    inputs = torch.randn(2, 4)
    with PretendGPU() as gpu:
        gpu.mark([inputs, *weights.parameters()])
        for gpu.step in range(3):
            optimizer.zero_grad(set_to_none=True)
            assert all(parameter.grad is None for parameter in weights.parameters())
            weights(inputs).square().sum().backward()
            optimizer.step()
    assert waits(gpu, [1, 2]) == {}


def test_what_is_noted() -> None:
    on_device, index = torch.arange(6.0), torch.tensor([0, 1])
    with PretendGPU() as gpu:
        gpu.mark([on_device])
        derived = on_device * 2
        host, pinned = torch.zeros(6), torch.empty(6)
        assert (derived.device, host.device) == (DEVICE, torch.device("cpu"))
        acts: dict[str, Any] = {
            "_local_scalar_dense": lambda: derived[0].item(),
            "tolist": derived.tolist,
            "numpy": derived.numpy,
            "nonzero": derived.nonzero,
            "index": lambda: derived[derived > 2],
            "index by a tensor of the host": lambda: derived[index],
            "tensor(device=...)": lambda: torch.tensor([1.0], device=derived.device),
            "host to device": lambda: host.to(derived.device),
            "device to host": derived.cpu,
        }
        for operation, act in acts.items():
            gpu.notes.clear()
            act()
            assert [(note.kind, note.operation) for note in gpu.notes] == [(WAIT, operation)]
        gpu.notes.clear()
        moved = host.to(derived.device, non_blocking=True)
        pinned.copy_(derived, non_blocking=True)
        assert pinned[0].item() == host[0].item() == 0
        torch.zeros(3, device=derived.device).sum()
        assert gpu.holds(moved)
        assert [note.kind for note in gpu.notes] == [COPY, COPY]
