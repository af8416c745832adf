"""The plan matches what the run does."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from models.registry import find
from models.summary import count_forward_macs, count_parameters
from training.planning import Place, plan_run, without_algorithms
from training.planning.graphs import graphs_of
from training.planning.text import format_plan
from training.recipe import RecipeError
from training.session import train


def test_macs_of_resnet50_are_the_published_ones() -> None:
    network = find("resnet50")(num_classes=1000)
    assert count_parameters(network) == 25_557_032
    for image_size, gmacs in ((128, 1.34), (224, 4.09), (288, 6.76)):
        assert count_forward_macs(network, image_size=image_size) / 1e9 == pytest.approx(gmacs, abs=0.005)


def test_plan_and_run_agree(short_recipe: Any) -> None:
    recipe = short_recipe("algorithms.progressive_resizing.learning_rate_scaling=linear")
    plan = plan_run(recipe)
    history = train(recipe, say=lambda text: None).history
    assert plan.steps == len(history.steps["step"])
    assert (
        [epoch.image_size for epoch in plan.epochs] == [row["image_size"] for row in history.epochs] == [8, 12, 12, 16]
    )
    assert [epoch.global_batch_size for epoch in plan.epochs] == [row["global_batch_size"] for row in history.epochs]
    epochs = np.array(history.steps["epoch"])
    rates = np.array(history.steps["learning_rate"])
    for index, epoch in enumerate(plan.epochs):
        of_epoch = rates[epochs == index + 1]
        np.testing.assert_allclose([of_epoch[0], of_epoch[-1]], epoch.learning_rate, rtol=1e-6, atol=1e-12)


DRAWN = (
    "algorithms.progressive_resizing.stages=null", "algorithms.progressive_resizing.sizes=[8, 12, 16]",
    "algorithms.progressive_resizing.per_device_batch_sizes=[240, 180, 120]",
    "algorithms.progressive_resizing.final_epochs=2",
    "algorithms.progressive_resizing.learning_rate_scaling=linear",
)  # fmt: skip


@pytest.mark.parametrize("drop_last", [True, False])
def test_plan_and_run_of_drawn_sizes_agree(short_recipe: Any, drop_last: bool) -> None:
    recipe = short_recipe(*DRAWN, f"data.train.drop_last={drop_last}".lower())
    plan = plan_run(recipe)
    history = train(recipe, say=lambda text: None).history
    epochs, rates = np.array(history.steps["epoch"]), np.array(history.steps["learning_rate"])
    for index, (epoch, row) in enumerate(zip(plan.epochs, history.epochs, strict=True)):
        assert (epoch.image_size, epoch.global_batch_size) == (row["image_size"], row["global_batch_size"])
        of_epoch = rates[epochs == index + 1]
        assert len(of_epoch) == epoch.steps
        np.testing.assert_allclose([of_epoch[0], of_epoch[-1]], epoch.learning_rate, rtol=1e-6, atol=1e-12)
        assert epoch.images == 1438 or drop_last
    drawn = [epoch.drawn for epoch in plan.epochs]
    assert [bool(steps) for steps in drawn] == [True, True, False, False]
    for epoch in plan.epochs[:2]:
        assert {(one.image_size, one.global_batch_size) for one in epoch.drawn} <= {(8, 240), (12, 180), (16, 120)}
        assert sum(one.images for one in epoch.drawn) == epoch.images > 1438 - 120
        exact = sum(one.images * one.forward_macs for one in epoch.drawn)
        assert epoch.total_forward_macs == pytest.approx(epoch.passes * exact, rel=1e-6)
    # One graph for each size and what is left over, for FixRes's phase, and for evaluation.
    graphs = graphs_of(plan)
    whole = {(graph.image_size, graph.images) for graph in graphs if graph.training and not graph.frozen}
    assert {(8, 240), (12, 180), (16, 120)} >= whole if drop_last else len(whole) <= 3 + len(drawn)
    text = format_plan(plan, plan_run(without_algorithms(recipe, "off")))
    assert re.search(r"^ +1-2   drawn   drawn .* px in 240, \d+% at 12 px in 180", text, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["algorithms.progressive_resizing.final_epochs=0"], "fixres trains the last 1 epochs at one size, .*final_ep"),
        (["algorithms.progressive_resizing.final_epochs=9"], "final_epochs is 9 and the run has 4 epochs"),
        (["algorithms.progressive_resizing.sizes=[8]"], r"sizes \[8\] must be at least two image sizes"),
        (["algorithms.progressive_resizing.schedule=ramp"], "schedule is 'ramp' and the other settings are those of"),
    ],
)
def test_draws_that_cannot_be_are_refused(short_recipe: Any, changes: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        plan_run(short_recipe(*DRAWN, *changes))


def test_the_rates_of_stages_with_a_global_batch_do_not_depend_on_the_ranks(short_recipe: Any) -> None:
    recipe = short_recipe(
        "algorithms.progressive_resizing.learning_rate_scaling=linear",
        "algorithms.progressive_resizing.stages=[{epochs: 2, image_size: 8, global_batch_size: 128}, "
        "{epochs: 2, image_size: 16}]",
    )
    rates = [
        [epoch.learning_rate for epoch in plan_run(recipe, Place("cpu", ranks)).epochs]
        for ranks in (1, 8)  # the second is planned by one process, as with WORLD_SIZE=8 and --plan
    ]
    np.testing.assert_allclose(rates[0], rates[1])


def test_text_names_order_phases_and_savings(short_recipe: Any) -> None:
    recipe = short_recipe()
    text = format_plan(plan_run(recipe), plan_run(without_algorithms(recipe, "off")))
    names = [line.split()[0] for line in text.splitlines() if line.startswith("  ")]
    assert sorted(names[:8]) == sorted([*recipe.algorithms, "learning_rate"])
    assert names.index("mixup") < names.index("label_smoothing")
    assert "1,438 training and 359 held-out images of 10 classes, 78,042 parameters" in text
    assert "test-time crop, last layers only, no mixup" in text
    assert "less forward" in text


def test_order_does_not_depend_on_the_order_of_keys(short_recipe: Any) -> None:
    recipe = short_recipe()
    order = [planned.name for planned in plan_run(recipe).algorithms]
    recipe.algorithms.update({name: recipe.algorithms.pop(name) for name in sorted(recipe.algorithms, reverse=True)})
    assert [planned.name for planned in plan_run(recipe).algorithms] == order


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ("duration.epochs=7", r"cover 1 \+ 2 \+ 1 = 4 epochs and the run has 7"),
        ("schedule.warmup_epochs=9", "schedule.warmup_epochs: is 9, longer than the run of 4 epochs"),
        ("algorithms.fixres.image_size=12", "fixres.image_size is 12 px and progressive_resizing trains"),
        ("algorithms.fixres.epochs=9", "fixres.epochs is 9 and the run has 4 epochs"),
        ("data.train.global_batch_size=5000", "a global batch of 5000 is larger than the 1438 training images"),
        ("model=torchvision.alexnet algorithms.fixres=null", "torchvision.alexnet cannot take images of 8 px"),
        ("model=torchvision.alexnet", "fixres.train is classifier_and_norm and AlexNet has no batch norm before its"),
    ],
)
def test_what_cannot_be_done_is_said_before_training(short_recipe: Any, changes: str, says: str) -> None:
    recipe = short_recipe(*changes.split())
    with pytest.raises(RecipeError, match=says):
        plan_run(recipe)
