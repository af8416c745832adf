"""Every multi-GPU recipe, at small scale, on two ranks under its own engine."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from ranks import ROOT, needs_fsdp, run_ranks

from training.checkpoints.zero import is_zero

# Recipe -> what `parallelism.strategy` its file gives.
ENGINES = {
    "resnet50_medium": "ddp",
    "resnet50_baseline": "ddp",
    "alexnet_ddp": "ddp",
    "alexnetish_birds_fsdp": "fsdp",
    "vit_cifar100_fsdp": "fsdp",
    "vit_cifar100_deepspeed": "deepspeed",
}


# One recipe an engine; the others train in one process in the default suite.
IN_DEFAULT_SUITE = {"resnet50_medium", "vit_cifar100_fsdp", "vit_cifar100_deepspeed"}


def _case(name: str) -> Any:
    marks = [needs_fsdp] if ENGINES[name] == "fsdp" else []
    return pytest.param(name, marks=marks if name in IN_DEFAULT_SUITE else [*marks, pytest.mark.exhaustive])


@pytest.mark.slow
@pytest.mark.timeout(290)
@pytest.mark.parametrize("name", [_case(name) for name in ENGINES])
def test_runs_under_the_engine_that_it_names(name: str, tmp_path: Path) -> None:
    path = ROOT / "yamls" / f"{name}.yaml"
    given = ["smoke=true", f"results_dir={tmp_path}", f"data.cache_dir={tmp_path / 'cache'}"]
    run_ranks(2, "run.py", "-f", str(path), *given, timeout=280)
    run_dir = tmp_path / f"{name}_smoke"
    written = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    named = yaml.safe_load(path.read_text())["parallelism"]
    assert written["parallelism"]["strategy"] == named["strategy"] == ENGINES[name]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["world_size"] == 2
    record = np.load(run_dir / "metrics.npz")
    assert len(record["train_loss"]) == written["duration"]["epochs"]
    assert all(math.isfinite(loss) for loss in (*record["step_loss"], *record["eval_loss"]))
    latest = run_dir / "checkpoints" / "latest.pt"
    assert is_zero(latest) if ENGINES[name] == "deepspeed" else latest.is_file()
