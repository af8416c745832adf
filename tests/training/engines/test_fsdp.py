"""FSDP2 on gloo ranks: the losses of DDP, checkpoints of both kinds, other numbers of ranks, replicas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fsdp_ranks import RESUMED, STOP_AT_STEP, recipe_of
from ranks import needs_fsdp, run_ranks
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from training import session
from training.build import build_loaders
from training.engines import parallel
from training.engines.composer import build_trainer
from training.engines.parallel import check_parallelism
from training.engines.torch_trials import fsdp2_runs_on_cpu, gloo_averages
from training.planning import Place, plan_run
from training.recipe import RecipeError

SCRIPT = str(Path(__file__).with_name("fsdp_ranks.py"))


pytestmark = pytest.mark.xdist_group("fsdp")  # one worker of pytest-xdist has the runs that these share


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run of two ranks, from one start of them."""
    if not fsdp2_runs_on_cpu():
        pytest.skip("this torch runs FSDP2 on GPUs alone")
    folder = tmp_path_factory.mktemp("two_ranks")
    run_ranks(2, SCRIPT, str(folder), "compare_with_ddp", "resume", timeout=280)
    return folder


@pytest.fixture(scope="module")
def four_ranks(two_ranks: Path) -> Path:
    run_ranks(4, SCRIPT, str(two_ranks), "shard_replicas", "resume_here", timeout=280)
    return two_ranks


def record(run_dir: Path) -> Any:
    return np.load(run_dir / "metrics.npz")


def model_of(checkpoint: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint of either kind, read by torch's own tools on one process."""
    if checkpoint.is_dir():
        dcp_to_torch_save(checkpoint, tmp_path / "whole.pt")
        return torch.load(tmp_path / "whole.pt", weights_only=False)["model"]
    return torch.load(checkpoint, weights_only=False)["state"]["model"]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("network", ["resnet", "vit"])
def test_losses_are_those_of_ddp(two_ranks: Path, network: str) -> None:
    assert_same_losses(two_ranks, network)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(300)
@needs_fsdp
def test_losses_of_a_plain_stack_of_layers_are_those_of_ddp(tmp_path: Path) -> None:
    run_ranks(2, SCRIPT, str(tmp_path), "compare_alexnetish_with_ddp", timeout=280)
    assert_same_losses(tmp_path, "alexnetish")


def assert_same_losses(folder: Path, network: str) -> None:
    ddp, fsdp = (record(folder / f"{network}_{strategy}") for strategy in ("ddp", "fsdp"))
    assert len(ddp["step_loss"]) >= 20
    assert ddp["step_loss"][0] != ddp["step_loss"][-1]
    np.testing.assert_allclose(fsdp["step_loss"], ddp["step_loss"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(fsdp["eval_loss"], ddp["eval_loss"], atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(560)
@needs_fsdp
def test_compiled_ranks_train_as_others_do(tmp_path: Path) -> None:
    run_ranks(2, SCRIPT, str(tmp_path), "compare_compiled", timeout=540)
    plain = record(tmp_path / "plain")
    for name in ("compiled_ddp", "compiled_fsdp"):
        np.testing.assert_allclose(record(tmp_path / name)["step_loss"], plain["step_loss"], atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(two_ranks: Path, tmp_path: Path, kind: str) -> None:
    whole, resumed = record(two_ranks / "whole"), record(two_ranks / kind)
    assert len(whole["step_loss"]) > STOP_AT_STEP
    for column in ("step_loss", "eval_loss", "eval_top1"):
        np.testing.assert_array_equal(resumed[column], whole[column])
    expected = model_of(two_ranks / "whole" / "checkpoints" / "latest.pt", tmp_path)
    found = model_of(two_ranks / kind / "checkpoints" / "latest.pt", tmp_path)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_shards_are_folders_that_lose_their_place_with_their_last_name(two_ranks: Path) -> None:
    folder = two_ranks / "sharded" / "checkpoints"
    names = {path.name: path.resolve().name for path in folder.glob("*.pt")}
    assert names["ep1.pt"] == "shards-ep1-ba22"
    assert names["latest.pt"] == names["ep2.pt"] == "shards-ep2-ba44"
    assert {path.name for path in folder.iterdir() if not path.is_symlink()} == set(names.values())
    parts = {path.name for path in (folder / "latest.pt").iterdir()}
    assert parts == {".metadata", "__0_0.distcp", "__1_0.distcp", "state.pt", "sums-rank0.json", "sums-rank1.json"}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_shards_of_two_ranks_are_evaluated_and_resumed_by_one_process(two_ranks: Path) -> None:
    one = [*RESUMED, "parallelism.strategy=none", "checkpoints.sharded=false"]
    recipe = recipe_of(two_ranks, "evaluated", *one)
    plan = plan_run(recipe)
    loaders = build_loaders(plan, rank=0, say=lambda text: None)
    latest = str(two_ranks / "sharded" / "checkpoints" / "latest.pt")
    trainer = build_trainer(plan, loaders, callbacks=[], load_path=latest)
    trainer.eval()
    expected = record(two_ranks / "sharded")
    metrics = trainer.state.eval_metrics["eval"]
    trainer.close()
    assert metrics["top1"].compute().item() == pytest.approx(expected["eval_top1"][-1])
    assert metrics["loss"].compute().item() == pytest.approx(expected["eval_loss"][-1], abs=1e-5)

    middle = two_ranks / "sharded" / "checkpoints" / "ep1.pt"
    session.train(recipe_of(two_ranks, "on_1_ranks", *one, f"load={middle}"), say=lambda text: None)
    resumed = record(two_ranks / "on_1_ranks")
    np.testing.assert_allclose(resumed["step_loss"], expected["step_loss"], atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.exhaustive  # one process resumes them in test_shards_of_two_ranks_are_evaluated_and_resumed_by_one_process
@pytest.mark.timeout(300)
def test_shards_of_two_ranks_are_resumed_by_four(four_ranks: Path) -> None:
    expected, resumed = record(four_ranks / "sharded"), record(four_ranks / "on_4_ranks")
    np.testing.assert_allclose(resumed["step_loss"], expected["step_loss"], atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.exhaustive  # test_replicas_of_shards_train_as_ddp_does makes and trains them
@pytest.mark.timeout(300)
def test_replicas_of_shards_are_made_and_read_back(four_ranks: Path) -> None:
    for rank in range(4):
        found = json.loads((four_ranks / f"hybrid.{rank}.json").read_text())
        assert found["mesh"] == [2, 2]
        assert found["placements"] == ["(Replicate(), Shard(dim=0))"]
        assert found["read_back"] == 0
        assert found["fresh"] == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not gloo_averages(), reason="this torch does not train replicas of shards on a CPU")
def test_replicas_of_shards_train_as_ddp_does(tmp_path: Path) -> None:
    run_ranks(4, SCRIPT, str(tmp_path), "train_replicas", timeout=280)
    found, expected = record(tmp_path / "replicas"), record(tmp_path / "ddp_of_4")
    assert len(expected["step_loss"]) > 10
    for column in ("step_loss", "eval_loss"):
        np.testing.assert_allclose(found[column], expected[column], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("overrides", "device", "ranks", "says"),
    [
        (["parallelism.strategy=none"], "cpu", 2, "is none, and 2 processes were started"),
        (["parallelism.strategy=fsdp", "parallelism.fsdp.version=1"], "cpu", 2, "is 1, which needs GPUs"),
        (["parallelism.strategy=fsdp", "parallelism.fsdp.replicas=3"], "gpu", 4, "does not divide the 4 ranks"),
        (["parallelism.strategy=fsdp"], "mps", 1, "does not run on mps"),
        (["checkpoints.sharded=true"], "gpu", 2, "is ddp, which has no shards"),
        (["parallelism.strategy=fsdp", "algorithms.composer.ema={half_life: 1ba}"], "gpu", 2, "use algorithms.ema"),
        (["data.train.per_device_microbatch_size=auto"], "cpu", 1, "reads a GPU's memory"),
        (["data.train.per_device_microbatch_size=auto", "parallelism.strategy=fsdp"], "gpu", 1, "under FSDP2"),
    ],
)
def test_what_an_engine_cannot_run_is_refused(
    tmp_path: Path, overrides: list[str], device: str, ranks: int, says: str
) -> None:
    recipe = recipe_of(tmp_path, "refused", *overrides)
    with pytest.raises(RecipeError, match=says) as error:
        check_parallelism(recipe, Place(device, ranks))
    assert "\n" not in str(error.value)


@pytest.mark.timeout(120)
def test_running_out_of_memory_names_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def take_it_all(*args: Any) -> torch.Tensor:
        return torch.empty(2**50)  # a petabyte and more, which the allocator refuses

    monkeypatch.setattr("models.classifier.ImageClassifier.loss", take_it_all)
    with pytest.raises(ValueError, match="out of memory with 64 images a rank") as error:
        session.train(recipe_of(tmp_path, "large", "algorithms=null"), say=lambda text: None)
    assert "data.train.per_device_microbatch_size=32" in str(error.value)
    assert "model.gradient_checkpointing=true" in str(error.value)


@pytest.mark.parametrize("trial", ["fsdp2_runs_on_cpu", "gloo_averages"])
def test_what_this_torch_lacks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trial: str) -> None:
    recipe = recipe_of(tmp_path, "refused", "parallelism.strategy=fsdp", "parallelism.fsdp.replicas=2")
    monkeypatch.setattr(parallel, trial, lambda: False)
    with pytest.raises(RecipeError, match="GPUs alone"):
        check_parallelism(recipe, Place("cpu", 2))
    check_parallelism(recipe, Place("gpu", 2))
