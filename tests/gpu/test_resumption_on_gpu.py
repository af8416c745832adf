"""A resumed run on a GPU is the run that was not interrupted, bit for bit, with deterministic algorithms on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(180)]


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("precision", ["fp32", "amp_fp16"])
def test_resuming_is_exact(precision: str, device: Any, digits: Any) -> None:
    from resumed_runs import assert_same_training, train, train_until

    precision = precision if device.type == "cuda" else "fp32"
    common = (f"precision={precision}", "checkpoints.every_steps=1")
    whole, again, resumed = (digits(f"run_name={name}", *common) for name in ("whole", "again", "resumed"))
    train(whole)
    train(again)
    assert_same_training(again.run_dir, whole.run_dir)  # otherwise there is nothing that a resumed run could equal
    train_until(29, resumed)  # within the second epoch
    torch.manual_seed(99)
    train(digits("run_name=resumed", "load=latest", *common))
    assert_same_training(resumed.run_dir, whole.run_dir)
