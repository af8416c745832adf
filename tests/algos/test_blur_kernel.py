"""The blur's Triton kernel, interpreted on the CPU in a process of its own; tests/gpu has it compiled."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from algos.blurring import blur_kernel

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
CPU = torch.device("cpu")
CASES = Path(__file__).with_name("blur_kernel_cases.py")


def interpret(*arguments: str, timeout: float) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, CASES, *arguments], env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr


@needs_triton
def test_it_is_the_filter_with_all_derivatives() -> None:
    interpret(timeout=120)


@needs_triton
@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_every_border_size_filter_and_stride() -> None:
    interpret("all", timeout=1700)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Has a list of the trials, which do nothing."""
    trials: list[int] = []
    monkeypatch.delenv("BRISK_TRITON", raising=False)
    monkeypatch.setattr(blur_kernel, "_launch", lambda *_: trials.append(1))
    blur_kernel.is_available.cache_clear()
    yield trials
    blur_kernel.is_available.cache_clear()


@needs_triton
def test_a_trial_finds_out_once_whether_it_is_there(tried: list[int]) -> None:
    assert blur_kernel.is_available(CPU)
    assert blur_kernel.is_available(CPU)
    assert tried == [1]


def test_a_setting_turns_it_off(tried: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRISK_TRITON", "0")
    assert not blur_kernel.is_available(CPU)
    assert not tried


def test_it_is_off_without_triton(tried: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert not blur_kernel.is_available(CPU)
    assert not tried


@needs_triton
def test_a_triton_that_fails_is_told_once_and_left_out(tried: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(blur_kernel, "_launch", fail)
    with pytest.warns(UserWarning, match="without their Triton kernel.*Failed to find C compiler.*BRISK_TRITON=0"):
        assert not blur_kernel.is_available(CPU)
    assert not blur_kernel.is_available(CPU)


def test_tables_have_no_place_for_what_a_border_leaves_out() -> None:
    sources, weights = blur_kernel.Filter([{0: 0.5}, {0: 0.25, 1: 0.5}], [{0: 1.0}], transposed=([], [])).tables(
        torch.device("cpu")
    )[:2]
    assert sources.tolist() == [[0, 0], [0, 1]]
    assert weights.tolist() == [[0.5, 0.0], [0.25, 0.5]]
