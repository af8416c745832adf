"""The plan matches what the run does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from models.registry import find
from models.summary import count_forward_macs, count_parameters
from training.plan import Place, plan_run, without_algorithms
from training.plan_text import format_plan
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
