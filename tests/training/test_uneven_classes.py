"""Runs on uneven classes: weights of the loss, the balanced sampler and alternating flips."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from resumed_runs import assert_same_training, quiet, train_until

from data import digits, write_beton
from data.sources import ArraySource, labels_of
from training import session
from training.facts import class_weights, data_facts
from training.planning import Place, make_plan, plan_run
from training.planning.text import format_plan
from training.recipe import RecipeError, load_recipe

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "yamls" / "digits_medium.yaml"
COUNTS = {"0": 120, "1": 50, "8": 14}  # training images of each class


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three digits as image files, many of the first and few of the last."""
    root = tmp_path_factory.mktemp("uneven")
    for split, most in (("train", COUNTS), ("val", dict.fromkeys(COUNTS, 10))):
        source = digits(split="train" if split == "train" else "eval")
        labels = labels_of(source)
        for name, count in most.items():
            (root / split / name).mkdir(parents=True)
            for index in np.flatnonzero(labels == int(name))[:count]:
                Image.fromarray(source.image(int(index))).save(root / split / name / f"{index}.png")
    return root


@pytest.fixture
def recipe(folder: Path, tmp_path: Path) -> Any:
    """Makes a recipe of two epochs of five steps: a Vision Transformer, whose samples know nothing of each other."""

    def make(*more: str) -> Any:
        return load_recipe(DIGITS, given(folder, tmp_path, *more))

    return make


def given(folder: Path, results: Path, *more: str) -> list[str]:
    everything = [
        f"data.source={{name: folder, path: {folder}}}", "model=vit_digits", "model.image_size=8",
        "algorithms.progressive_resizing=null", "algorithms.fixres=null", "algorithms.blurpool=null",
        "data.train.image_size=8", "data.eval.image_size=8", "data.eval.per_device_batch_size=30",
        "data.train.global_batch_size=36", "data.train.num_workers=1", "data.eval.num_workers=1",
        "duration.epochs=2", "schedule.warmup_epochs=0", "optimizer.learning_rate=0.05", "logging.progress_bar=false",
        "checkpoints.every_steps=2", f"results_dir={results}", f"data.cache_dir={results / 'cache'}", *more,
    ]  # fmt: skip
    return list({override.partition("=")[0]: override for override in everything}.values())


def losses(recipe: Any) -> list[float]:
    return session.train(recipe, say=quiet).history.steps["loss"]


def test_counts_and_weights_come_from_the_labels(recipe: Any, tmp_path: Path) -> None:
    counts = list(COUNTS.values())
    expected = [sum(counts) / (len(counts) * count) for count in counts]
    weighted = plan_run(recipe("loss.class_weights=auto"), Place("cpu"))
    assert weighted.facts.class_counts == tuple(counts)
    assert weighted.class_weights == pytest.approx(expected)
    assert plan_run(recipe("loss.class_weights=[1, 2.5, 0]"), Place("cpu")).class_weights == (1, 2.5, 0)
    assert plan_run(recipe("loss.class_weights=none"), Place("cpu")).class_weights is None
    text = format_plan(weighted, weighted)
    assert "\nclasses of 14 to 120 training images, loss weights from 0.511 to 4.38\n" in text
    balanced = plan_run(recipe("data.train.sampler=balanced"), Place("cpu"))
    assert "\nclasses of 14 to 120 training images, sampled equally, 61 images of each in an epoch\n" in format_plan(
        balanced, weighted
    )
    # A file's table of labels counts in place of the source's images.
    source = ArraySource(
        np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 2, 2, 2]), class_names=tuple(COUNTS), name="few"
    )  # fmt: skip
    file = write_beton(source, tmp_path / "few.beton", progress=False)
    facts = data_facts(recipe("loss.class_weights=auto", f"data.train.path={file}"))
    assert facts.class_counts == (1, 0, 3)
    source = ArraySource(np.zeros((4, 8, 8, 3), np.uint8), np.arange(4), class_names=tuple("abcd"), name="four")
    path = write_beton(source, tmp_path / "four.beton", progress=False)
    with pytest.raises(RecipeError, match=r"with labels of 4 classes, and data.source has 3; give data of the same"):
        data_facts(recipe("loss.class_weights=auto", f"data.train.path={path}"))


def test_a_plan_without_the_data_says_what_it_cannot_know(recipe: Any) -> None:
    plan = plan_run(recipe("loss.class_weights=auto"), Place("cpu"))
    absent = replace(plan.facts, present=False, class_counts=None)
    assert class_weights(plan.recipe, absent) is None
    text = format_plan(make_plan(plan.recipe, absent, Place("cpu")), plan)
    assert "loss weights from the numbers of images in each class, which are not here" in text


def test_microbatches_train_what_whole_batches_do(recipe: Any) -> None:
    """Cut unevenly, after MixUp and label smoothing; the weighted run differs from the plain one."""
    settings = ("loss.class_weights=auto", "data.train.flip_probability=0.5", "duration.epochs=1")
    whole = losses(recipe("run_name=whole", *settings))
    cut = losses(recipe("run_name=cut", "data.train.per_device_microbatch_size=16", *settings))
    np.testing.assert_allclose(cut, whole, rtol=1e-4)
    plain = losses(recipe("run_name=plain", *settings[1:]))
    assert np.abs(np.subtract(plain, whole)).min() > 1e-2


def test_a_resumed_run_ends_with_the_same_weights(recipe: Any) -> None:
    settings = ("loss.class_weights=[1, 2, 3]", "data.train.sampler=balanced", "data.train.flip=alternating",
                "data.train.flip_probability=0.5")  # fmt: skip
    whole = recipe("run_name=whole", *settings)
    expected = losses(whole)
    train_until(7, recipe("run_name=stopped", *settings))  # in the second epoch
    resumed = recipe("run_name=stopped", "load=latest", *settings)
    assert losses(resumed) == expected
    assert_same_training(whole.run_dir, resumed.run_dir)


@pytest.mark.exhaustive
@pytest.mark.timeout(240)
@pytest.mark.parametrize("settings", [["loss.class_weights=auto"], ["data.train.sampler=balanced"]], ids=str)
def test_two_ranks_train_what_one_process_does(recipe: Any, settings: list[str], folder: Path, tmp_path: Path) -> None:
    same = [*settings, "algorithms.mixup=null", "data.train.flip=alternating", "data.train.flip_probability=0.5"]
    one = losses(recipe("run_name=one", *same))
    launched = subprocess.run(
        [str(Path(sys.executable).parent / "composer"), "-n", "2", "run.py", "-f", "yamls/digits_medium.yaml",
         *given(folder, tmp_path, "run_name=two", *same)],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert launched.returncode == 0, launched.stdout + launched.stderr
    two = np.load(tmp_path / "two" / "metrics.npz")
    np.testing.assert_allclose(two["step_loss"], one, rtol=1e-4)


def test_smoke_keeps_as_many_classes_as_weights(recipe: Any) -> None:
    small = recipe("loss.class_weights=[1, 2, 3]", "smoke=true")
    assert small.data.source["num_classes"] == 3
    assert small.class_weights == [1, 2, 3]
