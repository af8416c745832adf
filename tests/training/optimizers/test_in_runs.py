"""Muon and schedule-free optimizers in whole runs: resumed, evaluated, exported, planned, refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import whole_runs
from ranks import needs_fsdp, run_ranks
from resumed_runs import assert_same_training, last_state, quiet, train_until

from training import session
from training.checkpoints.weights import read_network_weights
from training.engines.parallel import check_parallelism
from training.judging.evaluation import Question, evaluate
from training.optimizers import switching
from training.planning import Place, plan_run
from training.planning.text import plan_text
from training.recipe import Recipe, RecipeError, load_recipe
from training.trained import load_trained

MUON = """
optimizer: {name: muon, learning_rate: 0.02, others: {name: sgd, learning_rate: 0.1}}
schedule: {decay: cosine}
"""
FREE = """
optimizer: {name: schedule_free_sgd, learning_rate: 0.5}
schedule: {decay: constant, warmup_epochs: 0.5}
"""
SMALL = """
run_name: small
model: {name: resnet_digits, width: 4}
data:
  source: {name: digits}
  train: {image_size: 8, global_batch_size: 64, num_workers: 1}
  eval: {image_size: 8, per_device_batch_size: 180, num_workers: 1}
duration: {epochs: 2}
checkpoints: {every_steps: 4}
logging: {progress_bar: false}
"""
SAM = "algorithms.sam={rho: 0.1, interval: 2}"
RUNS = {"muon": (MUON, SAM, "optimizer.clip_norm=1.0", "algorithms.ema={half_life_steps: 5}"), "free": (FREE, SAM)}


@pytest.fixture
def small_recipe(tmp_path: Path, cache_dir: Path) -> Any:
    """Makes a recipe of an optimizer: small_recipe(MUON, "run_name=other")."""

    def make(optimizer: str, *overrides: str) -> Recipe:
        file = tmp_path / "recipe.yaml"
        file.write_text(SMALL + optimizer)
        return load_recipe(file, [f"results_dir={tmp_path / 'results'}", f"data.cache_dir={cache_dir}", *overrides])

    return make


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", RUNS)
def test_a_run_resumed_in_mid_epoch_ends_alike_and_is_exported_as_it_was_evaluated(
    small_recipe: Any, kind: str
) -> None:
    whole = small_recipe(*RUNS[kind], "run_name=whole")
    expected = session.train(whole, say=quiet)
    train_until(30, small_recipe(*RUNS[kind], "run_name=cut"))  # in the second epoch
    torch.manual_seed(1234)
    cut = small_recipe(*RUNS[kind], "run_name=cut", "load=latest")
    resumed = session.train(cut, say=quiet)
    assert_same_training(whole.run_dir, cut.run_dir)
    assert resumed.history.steps == expected.history.steps
    trained = load_trained(whole.run_dir / "checkpoints" / "latest.pt")
    assert trained.averaged
    assert trained.averaged_by == ("EMA" if kind == "muon" else "the optimizer")
    measured, _ = evaluate(trained, Question(shifts=False), device="cpu", say=quiet)
    last = expected.history.epochs[-1]
    assert measured["top1"] == pytest.approx(last["eval_top1"])
    assert measured["loss"] == pytest.approx(last["eval_loss"], rel=1e-5)


@pytest.mark.timeout(60)
def test_evaluations_change_nothing_of_the_training(small_recipe: Any) -> None:
    histories, states = [], []
    for name, every in (("often", 1), ("once", 2)):
        recipe = small_recipe(*RUNS["free"], f"run_name={name}", f"data.eval.every_epochs={every}")
        histories.append(session.train(recipe, say=quiet).history)
        states.append(last_state(recipe.run_dir))
    assert histories[0].steps == histories[1].steps
    torch.testing.assert_close(states[0]["model"], states[1]["model"], rtol=0, atol=0)
    assert states[0]["callbacks"]["EvaluateAverages"]["statistics"]


@pytest.mark.timeout(60)
def test_the_statistics_are_the_mean_over_batches_at_the_averages(
    small_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first batch norm's, against the same convolution of the same batches, computed here."""
    seen: list[torch.Tensor] = []
    take = switching.EvaluateAverages._take_statistics

    def watch(self: Any, state: Any, network: Any) -> None:
        convolution = network.module.stem[0]
        hook = convolution.register_forward_hook(lambda module, inputs, output: seen.append(output))
        take(self, state, network)
        hook.remove()

    monkeypatch.setattr(switching.EvaluateAverages, "_take_statistics", watch)
    recipe = small_recipe(*RUNS["free"], "run_name=watched", "duration.epochs=1")
    session.train(recipe, say=quiet)
    state = last_state(recipe.run_dir)
    saved = state["callbacks"]["EvaluateAverages"]["statistics"]
    assert len(seen) == 16
    mean = torch.stack([one.mean((0, 2, 3)) for one in seen]).mean(0)
    variance = torch.stack([one.transpose(0, 1).flatten(1).var(1) for one in seen]).mean(0)
    torch.testing.assert_close(saved["module.stem.1.running_mean"], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(saved["module.stem.1.running_var"], variance, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(saved["module.stem.1.running_mean"], state["model"]["module.stem.1.running_mean"])


def test_the_plan_tells_which_rates_and_how_many_matrices(small_recipe: Any) -> None:
    recipe = small_recipe(MUON)
    assert "muon at a peak learning rate of 0.02, of 8 matrices, sgd at 0.1 of the rest" in plan_text(recipe)
    assert len(plan_run(recipe, Place("cpu")).matrices) == 8


@pytest.mark.parametrize(
    ("overrides", "path", "says"),
    [
        ((FREE, "schedule.decay=cosine"), "schedule.decay", "is cosine, and optimizer schedule_free_sgd averages"),
        ((FREE, "algorithms={ema: {half_life_steps: 5}}"), "algorithms.ema", "averages the weights too"),
        ((FREE, "algorithms={fixres: {epochs: 1, image_size: 8}}"), "algorithms.fixres", "needs the same rate up to"),
        (
            (FREE, "algorithms={progressive_resizing: {stages: "
             "[{epochs: 1, image_size: 8, per_device_batch_size: 96}, {epochs: 1, image_size: 8}], "
                 "learning_rate_scaling: linear}}"),
            "algorithms.progressive_resizing.learning_rate_scaling", "set it to none",
        ),
        ((MUON, "optimizer.others=null"), "optimizer.others.name", "is missing"),
        ((MUON, "optimizer.others={name: lamb}"), "optimizer.others.name",
         "'lamb' is no optimizer of muon's other weights; known: adamw, sgd"),
        ((MUON, "optimizer.others.clip_norm=1"), "optimizer.others.clip_norm", "give optimizer.clip_norm"),
        ((MUON, "optimizer.others.momentum=1.5"), "optimizer.others", "momentum is 1.5; it must lie in"),
    ],
)  # fmt: skip
def test_what_does_not_fit_a_recipe_is_refused(
    small_recipe: Any, overrides: tuple[str, ...], path: str, says: str
) -> None:
    with pytest.raises(RecipeError, match=f"{re.escape(path)}: .*{says}") as error:
        small_recipe(*overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("optimizer", [MUON, FREE])
@pytest.mark.parametrize(
    ("strategy", "path", "says"),
    [
        (("parallelism.strategy=deepspeed",), "optimizer.name", "use parallelism.strategy ddp or fsdp"),
        (("parallelism.strategy=fsdp", "parallelism.fsdp.version=1"), "parallelism.fsdp.version", "flattens weights"),
    ],
)
def test_engines_that_cut_weights_into_pieces_are_refused(
    small_recipe: Any, optimizer: str, strategy: tuple[str, ...], path: str, says: str
) -> None:
    if "deepspeed" in strategy[0]:
        pytest.importorskip("deepspeed")
    recipe = small_recipe(optimizer, *strategy)
    with pytest.raises(RecipeError, match=says) as error:
        check_parallelism(recipe, Place("gpu", 2))
    assert error.value.path == path
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(400)
@needs_fsdp
def test_two_ranks_train_as_one_process_does(tmp_path: Path) -> None:
    """Under DDP, FSDP2, and with checkpoints of shards, from either kind of which a run goes on bit for bit."""
    whole_runs.train(tmp_path, "none")
    run_ranks(2, str(Path(whole_runs.__file__)), str(tmp_path), "ddp", "fsdp", "shards", timeout=300)
    for kind in whole_runs.OPTIMIZERS:
        expected, _ = read_network_weights(tmp_path / f"{kind}_none" / "checkpoints" / "latest.pt")
        for strategy in ("ddp", "fsdp", "shards"):
            found, averaged = read_network_weights(tmp_path / f"{kind}_{strategy}" / "checkpoints" / "latest.pt")
            assert averaged == (kind == "free")
            for name, tensor in expected.items():
                torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-5, msg=f"{kind} {strategy} {name}")
            if strategy != "ddp":
                resumed, _ = read_network_weights(tmp_path / f"{kind}_{strategy}_resumed" / "checkpoints" / "latest.pt")
                torch.testing.assert_close(resumed, found, rtol=0, atol=0)
