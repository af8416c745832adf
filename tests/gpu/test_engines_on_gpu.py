"""FSDP1 and FSDP2 on one GPU train as no engine does."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(180)]

STEPS = 12  # to compare: later ones drift apart by rounding
TOLERANCE = 2e-3


@pytest.mark.usefixtures("no_tf32")
@pytest.mark.parametrize("engine", ["ddp", "fsdp 1", "fsdp 2"])
def test_an_engine_on_one_gpu_trains_as_none_does(engine: str, device: torch.device, digits: Any) -> None:
    from resumed_runs import quiet

    from training.session import train

    if device.type == "cpu" and engine == "fsdp 1":
        pytest.skip("needs CUDA itself: FSDP1 runs on GPUs alone")
    strategy, _, version = engine.partition(" ")
    keys = [f"parallelism.strategy={strategy}", *([f"parallelism.fsdp.version={version}"] if version else [])]
    plain = train(digits("run_name=plain", "parallelism.strategy=none"), say=quiet)
    other = train(digits("run_name=other", *keys), say=quiet)
    losses = [np.array(result.history.steps["loss"]) for result in (plain, other)]
    assert len(losses[0]) == len(losses[1]) > STEPS
    assert all(math.isfinite(loss) for loss in losses[1])
    np.testing.assert_allclose(losses[1][:STEPS], losses[0][:STEPS], atol=TOLERANCE, rtol=0)
    assert abs(other.summary["top1"] - plain.summary["top1"]) < 0.1
    # What any engine leaves, any other one loads: the same names and shapes.
    saved = [
        torch.load(result_dir / "checkpoints" / "latest.pt", weights_only=False, map_location="cpu")["state"]["model"]
        for result_dir in (digits("run_name=plain").run_dir, digits("run_name=other").run_dir)
    ]
    assert {name: value.shape for name, value in saved[0].items()} == {
        name: value.shape for name, value in saved[1].items()
    }
