"""Plans of selective backpropagation: which steps select, how many images they train, what that takes, which graphs."""

from __future__ import annotations

from typing import Any

import pytest

from algos.selective_backprop import count_kept
from models.summary import count_forward_macs
from training import session
from training.arrangement import network_as_trained
from training.planning import Place, plan_run, without_algorithms
from training.planning.graphs import graphs_of
from training.planning.text import format_plan
from training.probing.phases import phases_of

# 1438 images in steps of 92: 15 full ones and one of 58, on two ranks 29 each.
ALONE = (
    "algorithms=null", "data.train.global_batch_size=92", "data.train.drop_last=false", "data.eval.every_epochs=4",
    "data.eval.image_size=20", "data.train.image_size=16", "data.eval.per_device_batch_size=200",
)  # fmt: skip
SETTINGS = "{start: 0.3, end: 0.8, keep: 0.4, interval: 3, scale: 0.75}"


def selecting(short_recipe: Any, settings: str = SETTINGS, *more: str) -> Any:
    off = [one for one in ALONE if one != "algorithms=null"]
    names = ("blurpool", "channels_last", "fixres", "label_smoothing", "mixup", "progressive_resizing", "sam")
    nulls = [f"algorithms.{name}=null" for name in names]
    return short_recipe(*off, *nulls, f"algorithms.selective_backprop={settings}", *more)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_plan_counts_what_is_trained_and_what_it_takes(short_recipe: Any, ranks: int) -> None:
    recipe = selecting(short_recipe)
    plan = plan_run(recipe, Place("cpu", ranks))
    network = network_as_trained(recipe, num_classes=10)
    whole, small = (count_forward_macs(network, image_size=size) for size in (16, 12))
    macs = trained = 0
    for step in range(4 * 16):
        batch = 58 if step % 16 == 15 else 92
        kept = batch
        if 0.3 <= step / 64 < 0.8 and step % 3 == 0:
            kept = ranks * count_kept(batch // ranks, 0.4)
            macs += batch * small
        macs += 3 * kept * whole
        trained += kept
    assert plan.total_macs == macs
    assert sum(epoch.trained_images for epoch in plan.epochs) == trained
    text = format_plan(plan, plan_run(without_algorithms(recipe, "off"), Place("cpu", ranks)))
    assert f"5,752 images seen, {trained:,} of them trained" in text
    assert "0.4 of the images in 11 of the steps, found at 12 px" in text
    assert "steps that select" not in text


def test_the_run_is_as_planned(short_recipe: Any) -> None:
    recipe = selecting(short_recipe, SETTINGS, "model.width=4")
    plan, history = plan_run(recipe), session.train(recipe, say=lambda text: None).history
    for epoch, row in zip(plan.epochs, history.epochs, strict=True):
        seconds = row["images_per_second"] * row["train_seconds"]
        assert round(seconds) == epoch.trained_images
        assert row["train_top1"] is not None, "every image that was trained was measured"


def test_graphs_of_steps_that_select(short_recipe: Any) -> None:
    settings = SETTINGS.replace("interval: 3", "interval: 1")
    plan = plan_run(selecting(short_recipe, settings, "data.train.per_device_microbatch_size=40"), Place("cpu", 2))
    # Whole batches 46 and 29, in microbatches of 40; of 46 are kept 18, and of 29 11 (of a last step).
    assert [(one.image_size, one.images, one.training) for one in graphs_of(plan)] == [
        (16, 40, True), (16, 6, True), (16, 29, True), (12, 46, False), (16, 18, True), (12, 29, False), (16, 11, True),
        (20, 180, False),
    ]  # fmt: skip
    always = plan_run(selecting(short_recipe, "{start: 0, end: 1, interval: 1}", "data.train.drop_last=true"))
    found = [(one.image_size, one.images, one.training) for one in graphs_of(always)]
    assert found == [(16, 92, False), (16, 46, True), (20, 180, False)]


def test_a_probe_measures_whole_intervals(short_recipe: Any) -> None:
    plan = plan_run(selecting(short_recipe, SETTINGS, "algorithms.sam={interval: 2}"))
    without, with_selection = phases_of(plan)[0], phases_of(plan)[1]
    assert (without.window_steps, with_selection.window_steps) == (2, 6)
    assert "trains 0.4 of the images" in with_selection.notes


def test_a_network_that_cannot_take_the_scaled_images_is_refused(short_recipe: Any) -> None:
    vit = ("model=null", "model.name=vit_digits", "data.eval.image_size=16")
    recipe = selecting(short_recipe, SETTINGS.replace("0.75", "0.6"), *vit)
    with pytest.raises(ValueError, match="vit_digits cannot take images of 10 px"):
        plan_run(recipe)


@pytest.mark.exhaustive
@pytest.mark.timeout(180)
def test_compiled_ahead_there_are_the_planned_graphs(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "engines"))
    from compiled_runs import train_noting_graphs
    from test_compiling import assert_same_training

    changed = ("algorithms.selective_backprop={start: 0.25, end: 0.5, interval: 2, scale: 0.75}",)
    lazily, breaks = train_noting_graphs(tmp_path, "lazily", "compile.ahead=false", *changed)
    assert not breaks
    ahead, breaks = train_noting_graphs(tmp_path, "ahead", *changed)
    assert not breaks
    assert {when for when, *_ in ahead} == {"ahead"}
    assert sorted(images for _, images in ahead) == sorted(images for _, images in lazily)
    assert [240, 3, 12, 12] in [images for _, images in ahead], "the half that is kept"
    assert [480, 3, 9, 9] in [images for _, images in ahead], "the pass that finds the losses, not filled up"
    assert_same_training(tmp_path / "lazily", tmp_path / "ahead")
