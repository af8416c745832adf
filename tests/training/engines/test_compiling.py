"""Compiled runs: as many graphs as the plan says, all before the first step, and the same training, to the bit."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_python, run_ranks
from resumed_runs import assert_same_training, last_state

from training.engines.compiling import keep_kernels
from training.planning import Place, plan_run
from training.planning.graphs import graphs_of
from training.planning.text import plan_text

HERE = Path(__file__).parent
RUNS = HERE / "compiled_runs.py"
MICROBATCHES = "data.train.per_device_microbatch_size=240"


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "network",
    ["resnet_digits", pytest.param("vit_digits", marks=pytest.mark.exhaustive)],
)
def test_every_graph_is_compiled_once_and_ahead_and_the_training_is_the_same(tmp_path: Path, network: str) -> None:
    from compiled_runs import train_noting_graphs

    changed = [] if network == "resnet_digits" else [
        "model=null", "model.name=vit_digits", "model.dropout=0.1", "algorithms.blurpool=null",
        "algorithms.fixres.train=classifier", "algorithms.patch_dropout={keep_rate: 0.5, final_epochs: 2}",
    ]  # fmt: skip
    lazily, breaks = train_noting_graphs(tmp_path, "lazily", "compile.ahead=false", MICROBATCHES, *changed)
    assert not breaks
    # FixRes's phase has a graph of its own, since the backward pass of frozen layers is left out of it.
    assert lazily == [
        ["epoch 0", [240, 3, 8, 8]],
        ["evaluation", [180, 3, 12, 12]],
        ["epoch 1", [240, 3, 12, 12]],
        ["epoch 1", [480, 3, 12, 12]],  # the losses of a whole batch, of which half are trained in one microbatch
        ["epoch 2", [240, 3, 12, 12]],
    ]
    ahead, breaks = train_noting_graphs(tmp_path, "ahead", MICROBATCHES, *changed)
    assert not breaks
    assert ahead == [["ahead", images] for _, images in lazily]
    assert_same_training(tmp_path / "lazily", tmp_path / "ahead")
    # The phase's graph is taken in the phase's second epoch too, after an evaluation: nothing frozen has moved.
    plain, _ = train_noting_graphs(tmp_path, "plain", "compile=false", MICROBATCHES, *changed)
    assert not plain
    models = [last_state(tmp_path / run)["model"] for run in ("plain", "ahead")]
    torch.testing.assert_close(models[1], models[0], rtol=1e-3, atol=1e-4)


@pytest.mark.exhaustive
@pytest.mark.timeout(400)
def test_two_ranks_compile_ahead_together(tmp_path: Path) -> None:
    """DDP with batch norm over ranks; a last batch that is smaller, and of two sizes, as are the evaluations."""
    uneven = ["data.train.drop_last=false", "parallelism.sync_batchnorm=true", "algorithms.mixup=null"]
    run_ranks(2, str(RUNS), str(tmp_path), *uneven, timeout=360)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        (lazily, breaks), (ahead, breaks_ahead) = found["lazily"], found["ahead"]
        assert not breaks
        assert not breaks_ahead
        assert {when for when, *_ in ahead} == {"ahead"}
        assert sorted(images for _, images in ahead) == sorted(images for _, images in lazily)
    assert_same_training(tmp_path / "lazily", tmp_path / "ahead")


@pytest.mark.exhaustive
@pytest.mark.timeout(400)
def test_two_ranks_of_fsdp_compile_ahead_together(tmp_path: Path) -> None:
    run_ranks(2, str(RUNS), str(tmp_path), "parallelism.strategy=fsdp", timeout=360)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert {when for when, *_ in found["ahead"][0]} == {"ahead"}
    assert_same_training(tmp_path / "lazily", tmp_path / "ahead")


def test_a_plan_counts_its_graphs(short_recipe: Any) -> None:
    # 1438 images: 22 a rank and step on four ranks, then 30 on all; evaluations of 90 and of 89 of 359.
    recipe = short_recipe(
        "compile=true", "algorithms=null", "data.train.global_batch_size=88", "data.train.drop_last=false",
        "data.eval.per_device_batch_size=180",
    )  # fmt: skip
    plan = plan_run(recipe, Place("cpu", 4))
    for rank, left in enumerate((8, 8, 7, 7)):
        expected = [(22, True), (left, True), (90, False)]
        assert [(graph.images, graph.training) for graph in graphs_of(plan, rank=rank)] == expected
    assert graphs_of(plan, first_epoch=4) == []
    assert "\n3 graphs to compile before the first step: 20 px, batch 88; 20 px, batch 30; " in plan_text(recipe)


def test_kernels_are_kept_only_where_no_one_else_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    variable = "TORCHINDUCTOR_CACHE_DIR"
    monkeypatch.setenv(variable, "/somewhere")
    keep_kernels(tmp_path / "kernels")
    assert os.environ[variable] == "/somewhere"
    assert not (tmp_path / "kernels").exists()
    monkeypatch.delenv(variable)
    keep_kernels(tmp_path / "kernels")
    assert os.environ[variable] == str(tmp_path / "kernels")
    assert (tmp_path / "kernels").stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv(variable)
    (tmp_path / "kernels").chmod(0o777)
    with caplog.at_level(logging.WARNING):
        keep_kernels(tmp_path / "kernels")
    assert variable not in os.environ
    assert "other users can write there" in caplog.text


@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.timeout(580)
def test_a_second_start_compiles_nothing(tmp_path: Path) -> None:
    from compiled_runs import DIGITS, EVERYTHING

    said = []
    for run_name in ("first", "second"):
        done = run_python(
            "run.py", "-f", str(DIGITS), *EVERYTHING, MICROBATCHES, "compile=true", f"run_name={run_name}",
            f"results_dir={tmp_path}", f"data.cache_dir={tmp_path / 'cache'}", timeout=280,
            environment={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "kernels")},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said.append(next(line for line in done.stdout.splitlines() if line.startswith("compiled")))
    assert said[0].startswith("compiled 5 graphs")
    assert ", 0 from the cache" in said[0]
    assert ", 5 from the cache" in said[1], said
    assert_same_training(tmp_path / "first", tmp_path / "second")
