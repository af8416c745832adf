"""The test split: the best checkpoint is evaluated on it once, after training."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from resumed_runs import quiet

from data.sources import digits
from models.weights import load_weights
from training import cli, session
from training.build import build_network
from training.planning import plan_run
from training.recipe import Recipe, RecipeError
from training.results.text import format_summary
from training.session import train

TEST = ("data.source.test_fraction=0.2", "data.test={}")


def logits(recipe: Recipe, images: np.ndarray) -> torch.Tensor:
    """Of best.pt, without a loader: digits of 8x8 px as they are, normalized by the training split."""
    network = load_weights(build_network(plan_run(recipe)), str(recipe.run_dir / "checkpoints" / "best.pt")).eval()
    source = digits(split="train", test_fraction=0.2)
    seen = np.stack([source.image(i) for i in range(len(source))]).astype(np.float64)
    normal = (images - seen.mean(axis=(0, 1, 2))) / seen.std(axis=(0, 1, 2))
    with torch.no_grad():
        return network(torch.from_numpy(normal).permute(0, 3, 1, 2).float())


def test_best_pt_is_judged_on_the_test_split(short_recipe: Any) -> None:
    plain = ["algorithms=null", "data.train.image_size=8", "data.eval.image_size=8", "data.train.augmentations=[]"]
    # The rate of the last epoch undoes what was learned.
    jump = "schedule={warmup_epochs: 0, decay: piecewise_linear, points: [[0, 1], [3, 1], [3.1, 50], [4, 50]]}"
    recipe = short_recipe(*TEST, *plain, jump)
    result = train(recipe, say=quiet)
    top1 = [epoch["eval_top1"] for epoch in result.history.epochs]
    assert max(top1) > top1[-1]  # or best.pt and latest.pt are the same, and nothing is shown
    source = digits(split="test", test_fraction=0.2)
    labels = torch.tensor([source.label(i) for i in range(len(source))])
    outputs = logits(recipe, np.stack([source.image(i) for i in range(len(source))]))
    measured = result.summary["test"]
    assert measured["checkpoint"] == "best.pt"
    assert measured["top1"] == pytest.approx((outputs.argmax(dim=1) == labels).float().mean().item(), abs=1e-6)
    assert measured["loss"] == pytest.approx(torch.nn.functional.cross_entropy(outputs, labels).item(), rel=1e-4)
    assert json.loads((recipe.run_dir / "summary.json").read_text())["test"] == measured
    said = format_summary(result.summary)
    assert f"top-1 {measured['top1']:.2%}"[:-1] in said.replace(" %", "%")
    assert "(best.pt, test split)" in said


@pytest.mark.parametrize("averaged", ["null", "{half_life_steps: 10, update_interval_steps: 2}"])
def test_given_the_evaluation_split_it_repeats_the_best_evaluation(
    short_recipe: Any, averaged: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under every speed-up, so whatever evaluation lends the model the test lends it too."""
    monkeypatch.setattr(session, "build_test_loader", lambda *args, **place: session.build_loaders(*args, **place)[1])
    summary = train(short_recipe(*TEST, f"algorithms.ema={averaged}"), say=quiet).summary
    assert summary["test"]["top1"] == summary["best_top1"]


def test_without_a_best_checkpoint_it_is_refused(short_recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RecipeError, match=r"data.test: is judged by best.pt, which checkpoints.keep_best: false"):
        short_recipe(*TEST, "checkpoints.keep_best=false")


def test_a_source_without_a_test_split_is_refused_before_training(
    overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["-f", "yamls/digits_medium.yaml", *overrides, "data.test={}"]) == 2
    assert "data.source: split 'test' has no images: give a test_fraction above 0" in capsys.readouterr().err
