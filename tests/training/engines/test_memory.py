"""Running out of memory: the batch that the error names fits, and one much larger does not."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_python
from torch import nn

from models.resnet import resnet_digits
from training.engines.memory import copied_bytes, forget, free_bytes, is_out_of_memory, step_bytes
from training.planning import Place, plan_run

ROOT = Path(__file__).parents[3]
# Beyond what the process has after its imports; much, beside the address space that threads and libraries reserve.
ROOM_BYTES = 2_000_000_000
M_ARENA_MAX = -8  # glibc's malloc.h
LIMITED = f"""
import ctypes, resource, sys
import training.cli, training.session
from training.engines.memory import _field_bytes
ctypes.CDLL(None).mallopt({M_ARENA_MAX}, 1)  # an arena a thread reserves 64 MB each
resource.setrlimit(resource.RLIMIT_AS, (_field_bytes("/proc/self/status", "VmSize") + {ROOM_BYTES},) * 2)
sys.exit(training.cli.main(sys.argv[1:]))
"""
RECIPE = [
    "-f", str(ROOT / "yamls" / "digits_medium.yaml"), "parallelism.strategy=none", "algorithms=null",
    "duration.epochs=1", "schedule.warmup_epochs=0", "data.train.image_size=64", "data.train.global_batch_size=1024",
    "data.train.num_workers=1", "data.eval.num_workers=1", "data.eval.per_device_batch_size=20",
    "logging.progress_bar=false",
]  # fmt: skip
linux_only = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="limits are read from Linux's /proc")


def train_in_little_memory(folder: Path, microbatch_size: int | None) -> tuple[int, str]:
    """Exit status and what was said on stderr."""
    microbatch = "null" if microbatch_size is None else microbatch_size
    given = [*RECIPE, f"data.train.per_device_microbatch_size={microbatch}",
             f"results_dir={folder}", f"data.cache_dir={folder / 'cache'}"]  # fmt: skip
    done = run_python("-c", LIMITED, *given, timeout=180)
    return done.returncode, done.stderr


@linux_only
@pytest.mark.slow
@pytest.mark.timeout(560)
def test_the_batch_that_is_named_fits_and_twice_as_many_do_not(tmp_path: Path) -> None:
    status, said = train_in_little_memory(tmp_path, None)
    assert status == 1
    assert "Traceback" not in said
    line = said.strip().splitlines()[-1]
    named = re.search(
        r"out of memory with 1024 images a rank .*; set data\.train\.per_device_microbatch_size=(\d+)", line
    )
    assert named, said
    largest = int(named[1])
    assert 200 < largest < 512
    assert train_in_little_memory(tmp_path, largest)[0] == 0
    # Where memory ends inside a library that does not ask whether it got any, the process is killed: no status of ours.
    assert train_in_little_memory(tmp_path, 2 * largest)[0] in (1, -signal.SIGSEGV, -signal.SIGABRT)


@pytest.mark.timeout(60)
def test_a_step_takes_what_autograd_keeps_and_gradients() -> None:
    """Two convolutions and a sum: what they keep is known."""
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 1), nn.Flatten(), nn.Linear(16 * 24 * 24, 10))
    constant, per_image = step_bytes(network, image_size=24, device=torch.device("cpu"))
    outputs = 4 * (8 + 16) * 24 * 24  # of both convolutions, in float32
    assert outputs <= per_image <= 2.5 * outputs  # and gradients of the larger ones
    gradients = sum(parameter.nbytes for parameter in network.parameters())
    assert gradients <= constant + 0.1 * gradients <= 2 * gradients
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.timeout(60)
def test_a_larger_image_takes_more() -> None:
    network = resnet_digits(num_classes=10)
    small, large = (step_bytes(network, image_size=size, device=torch.device("cpu"))[1] for size in (16, 32))
    assert large == pytest.approx(4 * small, rel=0.2)


@linux_only
def test_free_memory_is_no_more_than_the_machine_has() -> None:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < free_bytes(torch.device("cpu")) <= pages


def test_a_limit_of_the_process_on_a_gpu_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {
        "empty_cache": None,
        "mem_get_info": (60, 100),
        "memory_reserved": 5,
        "get_per_process_memory_fraction": 1.0,
    }
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value, raising=False)
    assert free_bytes(torch.device("cuda")) == 60
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.3)
    assert free_bytes(torch.device("cuda")) == 25
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 40)
    assert free_bytes(torch.device("cuda")) == 0
    monkeypatch.delattr(torch.cuda, "get_per_process_memory_fraction")
    assert free_bytes(torch.device("cuda")) == 60


def test_forgetting_an_error_frees_what_its_frames_hold() -> None:
    freed = []

    class Held:
        def __del__(self) -> None:
            freed.append(True)

    def fail() -> None:
        held = Held()
        raise MemoryError(str(id(held)))

    try:
        fail()
    except MemoryError as error:
        assert not freed
        forget(error)
        assert freed


def test_what_is_no_lack_of_memory() -> None:
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**50)
    assert is_out_of_memory(refused.value)


def test_copies_of_the_weights_are_counted(short_recipe: Any) -> None:
    def copied(*overrides: str, device: str = "gpu") -> float:
        plan = plan_run(short_recipe("algorithms=null", *overrides), Place(device))
        return copied_bytes(plan, parameters=100, optimizer_state=70)

    both = ("algorithms.sam={}", "algorithms.ema={half_life_steps: 5}")
    assert copied() == 0
    assert copied(*both) == 200
    assert copied("algorithms.composer.ema={half_life: 5ba}") == 100
    assert copied(*both, device="cpu") == 370
    assert copied(*both, "checkpoints.asynchronous=false", device="cpu") == 200
    plan = replace(plan_run(short_recipe("algorithms=null"), Place("gpu")), teacher_parameters=10)
    assert copied_bytes(plan, parameters=100, optimizer_state=70) == 40
