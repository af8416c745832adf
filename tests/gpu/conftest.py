"""Tests that need a CUDA device; each is skipped where there is none.

There, `pytest --exhaustive` or BRISK_GPU_TESTS_ON=cpu runs on the CPU all but those that need CUDA itself, which finds
mistakes in the tests: what they find out about a GPU they cannot show there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# cuBLAS reads it when it starts, and is deterministic with it; another one costs it nothing.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# The digits recipe with its seven speed-ups, in four epochs of which each has its own size.
DIGITS = (
    "duration.epochs=4",
    "algorithms.progressive_resizing.stages=[{epochs: 1, image_size: 8, per_device_batch_size: 96},"
    "{epochs: 2, image_size: 12},{epochs: 1, image_size: 16}]",
    "algorithms.fixres={epochs: 1, image_size: 16, learning_rate: 0.02}",
    "logging.progress_bar=false",
)


@pytest.fixture(scope="session")
def device_type(pytestconfig: pytest.Config) -> str:
    """Either "cuda", or "cpu" to try the tests themselves."""
    import torch

    rehearsed = pytestconfig.getoption("--exhaustive") and not torch.cuda.is_available()
    return os.environ.get("BRISK_GPU_TESTS_ON", "cpu" if rehearsed else "cuda")


@pytest.fixture(scope="package", autouse=True)
def _on_a_gpu(device_type: str) -> Iterator[None]:
    """Skips without a GPU; leaves no process group, since those of other tests work on the CPU."""
    import torch

    if device_type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    _end_process_group()
    yield
    _end_process_group()


@pytest.fixture
def device(device_type: str) -> Any:
    """The torch.device to test on."""
    import torch

    return torch.device(device_type)


@pytest.fixture
def only_on_gpu(device_type: str) -> None:
    """For what does not exist on a CPU."""
    if device_type == "cpu":
        pytest.skip("needs CUDA itself")


@pytest.fixture
def deterministic() -> Iterator[None]:
    """torch raises for an operation whose result depends on the order of threads."""
    import torch

    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False  # which would choose an algorithm by its time
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark


@pytest.fixture
def no_tf32() -> Iterator[None]:
    """Whole float32 in convolutions and products: ten bits of mantissa would hide a difference that matters."""
    import torch

    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the digits are converted once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def digits(tmp_path: Path, cache_dir: Path, device_type: str) -> Callable[..., Any]:
    """Makes the digits recipe in short: digits("precision=amp_bf16", ...)."""
    from training.recipe import load_recipe

    device = "gpu" if device_type == "cuda" else "cpu"
    fixed = (*DIGITS, f"results_dir={tmp_path}", f"data.cache_dir={cache_dir}", f"device={device}")

    def make(*more: str) -> Any:
        given = {override.partition("=")[0]: override for override in (*fixed, *more)}
        return load_recipe(ROOT / "yamls" / "digits_medium.yaml", list(given.values()))

    return make


def _end_process_group() -> None:
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
