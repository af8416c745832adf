"""Every recipe in yamls/ plans, trains at small scale, and follows its source's published schedule."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from algos.framework.protocols import LearningRateModifier
from algos.learning_rate import LearningRate
from algos.progressive_resizing import ProgressiveResizing
from training.build import build_algorithms
from training.facts import planned_facts
from training.planning import Place, make_plan
from training.planning.text import plan_text
from training.recipe import Recipe, RecipeError, load_recipe
from training.session import train

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "yamls").glob("*.yaml"))
IMAGENET = 1_281_167
by_name = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


@by_name
def test_header_says_where_it_is_from_and_what_was_measured(path: Path) -> None:
    header = path.read_text().partition("run_name:")[0]
    for part in ("# Source:", "# Hardware:", "# Cost:", "# Measured here:"):
        assert part in header
    assert yaml.safe_load(path.read_text())["run_name"] == path.stem


@by_name
def test_plan(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # where no data are
    recipe = load_recipe(path)
    text = plan_text(recipe)
    lines = text.splitlines()
    expected = recipe.data.expected
    if expected is not None:
        assert f"{expected.num_train:,} training and {expected.num_eval:,} held-out images" in lines[0]
        assert "the data are not here" in lines[1]
    assert re.search(rf"^ +\d+-{recipe.epochs} +\d+ px", text, re.MULTILINE)
    assert not list(tmp_path.iterdir())  # nothing was fetched or made


def test_a_plan_without_data_or_what_to_expect_of_them_says_what_to_do(tmp_path: Path) -> None:
    path = ROOT / "yamls" / "resnet50_medium.yaml"
    with pytest.raises(RecipeError, match=r"no folder .*; to plan without the data, tell of them: data.expected="):
        plan_text(load_recipe(path, [f"data.source.path={tmp_path / 'none'}", "data.expected=null"]))


@pytest.mark.parametrize("key", ["data.train.path", "data.eval.path", "load", "model.weights"])
def test_a_plan_refuses_a_file_that_is_named_and_not_there(key: str) -> None:
    with pytest.raises(RecipeError, match=rf"^{re.escape(key)}: is /nowhere/x.pt, and there is no such file"):
        plan_text(load_recipe(ROOT / "yamls" / "resnet50_medium.yaml", [f"{key}=/nowhere/x.pt"]))


@pytest.mark.slow
@by_name
def test_smoke(path: Path, tmp_path: Path) -> None:
    overrides = ["smoke=true", f"results_dir={tmp_path}", f"data.cache_dir={tmp_path}/cache"]
    whole, recipe = load_recipe(path), load_recipe(path, overrides)
    assert recipe.model["name"] == whole.model["name"]
    assert list(recipe.algorithms) == list(whole.algorithms)
    assert recipe.optimizer["name"] == whole.optimizer["name"]
    result = train(recipe, say=lambda text: None)
    stages = whole.algorithms.get("progressive_resizing", {}).get("stages") or ()
    assert len(result.history.epochs) == recipe.epochs == max(2, len(stages))
    assert all(math.isfinite(epoch["train_loss"]) for epoch in result.history.epochs)
    written = yaml.safe_load((recipe.run_dir / "recipe.yaml").read_text())
    assert written["data"]["source"]["name"] == "synthetic"


# --- what the sources published, written out on its own ---


def phases(recipe: Recipe, *, world_size: int) -> tuple[list[int], list[int], list[list[float]]]:
    """Image size and global batch size of every epoch, and the learning rate of every step in it."""
    plan = make_plan(recipe, planned_facts(recipe), Place("gpu", world_size))
    algorithms = build_algorithms(plan)
    schedule, resizing = algorithms["learning_rate"], algorithms.get("progressive_resizing")
    assert isinstance(schedule, LearningRate)
    per_device = plan.per_device_batch_size
    sizes, batches = [recipe.data.train.image_size] * recipe.epochs, [per_device * world_size] * recipe.epochs
    if isinstance(resizing, ProgressiveResizing):
        resizing.prepare(total_epochs=recipe.epochs, image_size=sizes[0], per_device_batch_size=per_device)
        sizes = [resizing.stage(epoch).image_size for epoch in range(recipe.epochs)]
        batches = [resizing.per_device_batch_size(e, world_size) * world_size for e in range(recipe.epochs)]
    modifiers = [one for one in algorithms.values() if isinstance(one, LearningRateModifier)]
    initial = plan.peak_learning_rate
    rates = [
        [
            schedule.learning_rate(
                epoch + step / (IMAGENET // batch), total_epochs=recipe.epochs, initial=initial, modifiers=modifiers
            )
            for step in range(IMAGENET // batch)
        ]
        for epoch, batch in enumerate(batches)
    ]
    return sizes, batches, rates


def recipe(name: str) -> Recipe:
    return load_recipe(ROOT / "yamls" / f"{name}.yaml")


def flat(rates: list[list[float]]) -> list[float]:
    return [rate for epoch in rates for rate in epoch]


@pytest.mark.parametrize(("epochs", "ramp"), [(16, (11, 13)), (40, (29, 34)), (88, (65, 76))])
def test_ffcv_imagenets(epochs: int, ramp: tuple[int, int]) -> None:
    """libffcv/ffcv-imagenet: rn50_configs/rn50_{epochs}_epochs.yaml, and get_cyclic_lr, get_resolution and
    apply_blurpool of train_imagenet.py."""
    checked = recipe(f"resnet50_ffcv_{epochs}")
    assert checked.algorithms["label_smoothing"]["smoothing"] == 0.1
    assert checked.algorithms["blurpool"] == {
        "filter_size": 3, "pad": "zeros", "max_pools": False, "min_channels": 16,
        "placement": "before", "convolutions": True,
    }  # fmt: skip
    assert (checked.optimizer["momentum"], checked.optimizer["weight_decay"]) == (0.9, 1e-4)
    assert (checked.data.eval.image_size, checked.data.eval.crop_ratio) == (256, 224 / 256)
    sizes, batches, rates = phases(checked, world_size=8)
    assert set(batches) == {4096}
    steps = IMAGENET // 4096
    published = []
    for epoch in range(epochs):
        ends = np.interp([epoch, epoch + 1], [0, 2, epochs], [1.7e-4, 1.7, 0])
        published.extend(np.interp(np.arange(steps), [0, steps], ends))
        share = min(max((epoch - ramp[0]) / (ramp[1] - ramp[0]), 0), 1)
        assert sizes[epoch] == int(np.round((160 + 32 * share) / 32)) * 32
    assert flat(rates) == pytest.approx(published, rel=0, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "epochs", "scale", "delay", "finetune"),
    [("mild", 36, 0.5, 0.4, 0.2), ("hot", 270, 0.6, 0.2, 0.2)],
)
def test_mosaicmls(name: str, epochs: int, scale: float, delay: float, finetune: float) -> None:
    """mosaicml/examples: main.py and model.py of examples/resnet_imagenet, and Composer's ProgressiveResizing."""
    checked = recipe(f"resnet50_{name}")
    sizes, batches, rates = phases(checked, world_size=8)
    assert set(batches) == {2048}
    steps = IMAGENET // 2048
    warmup, total = 8 * steps, epochs * steps
    published = [
        2.048 * (t / warmup if t < warmup else 0.5 * (1 + math.cos(math.pi * (t - warmup) / (total - warmup))))
        for t in range(total)
    ]
    assert flat(rates) == pytest.approx(published, rel=0, abs=1e-9)
    for epoch, size in enumerate(sizes):
        share = min(max(epoch / epochs - delay, 0) / (1 - delay - finetune), 1)
        wanted = 176 * (scale + (1 - scale) * share)
        assert abs(size - wanted) <= 2 + 1e-9
        assert size % 4 == 0
    assert checked.loss == "binary_cross_entropy"
    assert (checked.model["initialization"], checked.model["bce_head_bias"]) == ("mosaicml", True)
    optimizer = checked.optimizer
    assert (optimizer["name"], optimizer["momentum"], optimizer["weight_decay"]) == ("decoupled_sgdw", 0.875, 5e-4)
    assert optimizer["decay_norms_and_biases"]
    assert round(checked.data.eval.image_size / checked.data.eval.crop_ratio) == 232
    assert checked.algorithms["ema"]["half_life_steps"] == 100
    assert checked.algorithms["ema"]["update_interval_steps"] == 20
    assert checked.algorithms["label_smoothing"]["smoothing"] == {"mild": 0.08, "hot": 0.13}[name]


def test_the_hot_recipes_own_algorithms() -> None:
    """mosaicml/examples, examples/resnet_imagenet/main.py."""
    algorithms = recipe("resnet50_hot").algorithms
    assert algorithms["mixup"]["alpha"] == 0.25
    assert (algorithms["sam"]["rho"], algorithms["sam"]["interval"]) == (0.5, 5)
    assert algorithms["composer.colout"] == {"p_row": 0.05, "p_col": 0.05}
    depth = algorithms["stochastic_depth"]
    assert (depth["drop_rate"], depth["mode"], depth["distribution"]) == (0.1, "sample", "linear")
    assert (algorithms["randaugment"]["num_ops"], algorithms["randaugment"]["magnitude"] / 30) == (1, 0.9)


def test_the_baselines() -> None:
    """dhairyag/ImageNet1k_ResNet50: main.py and albumentation.py."""
    checked = recipe("resnet50_baseline")
    assert checked.data.train.augmentations == [
        {"name": "color_jitter", "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.2, "probability": 0.5}
    ]
    assert checked.data.train.crop_scale == (0.08, 1.0)
    _, batches, rates = phases(checked, world_size=1)
    assert set(batches) == {256}
    steps = IMAGENET // 256
    published = []
    for t in range(90 * steps):
        epoch = t / steps
        if epoch < 5:
            published.append(0.005 + (0.05 - 0.005) * epoch / 5)
        else:
            published.append(1e-6 + (0.05 - 1e-6) * (1 + math.cos(math.pi * (epoch - 5) / 85)) / 2)
    assert flat(rates) == pytest.approx(published, rel=0, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "world_size", "per_device"),
    [("resnet50_medium", 8, (512, 320, 256)), ("resnet50_medium_mini", 1, (128, 64, 32))],
)
def test_the_medium_recipes_phases(name: str, world_size: int, per_device: tuple[int, int, int]) -> None:
    checked = recipe(name)
    sizes, batches, rates = phases(checked, world_size=world_size)
    assert sizes == [128] * 10 + [224] * 75 + [288] * 5
    assert batches == [n * world_size for n in np.repeat(per_device, (10, 75, 5))]
    for epoch in (0, 9, 10, 50, 84):  # 0.256 for each 256 images of the batch that the step has
        shape = epoch / 8 if epoch < 8 else 0.5 * (1 + math.cos(math.pi * (epoch - 8) / 82))
        assert rates[epoch][0] == pytest.approx(0.256 * batches[epoch] / 256 * shape, rel=1e-12)
    fixres = checked.algorithms["fixres"]["learning_rate"]
    assert rates[85][0] == pytest.approx(fixres)


def test_the_birds_steps() -> None:
    """javidanaslanli/AlexNet-ish-model, main.py: StepLR of 8 epochs and 0.7."""
    _, batches, rates = phases(recipe("alexnetish_birds_fsdp"), world_size=2)
    assert set(batches) == {128}
    assert [epoch[-1] for epoch in rates] == pytest.approx([1e-3 * 0.7 ** (epoch // 8) for epoch in range(30)])


def test_alexnets_steps() -> None:
    _, batches, rates = phases(recipe("alexnet_ddp"), world_size=8)
    assert set(batches) == {128}
    for epoch, expected in (
        (0, 1e-2),
        (29, 1e-2),
        (30, 1e-3),
        (59, 1e-3),
        (60, 1e-4),
        (79, 1e-4),
        (80, 1e-5),
        (89, 1e-5),
    ):
        assert rates[epoch] == pytest.approx([expected] * len(rates[epoch]))


# --- smoke ---


def small(name: str, *overrides: str) -> dict[str, Any]:
    return load_recipe(ROOT / "yamls" / f"{name}.yaml", ["smoke=true", *overrides]).settings


def test_smoke_keeps_every_phase_and_all_proportions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    made = small("resnet50_medium")
    stages = made["algorithms"]["progressive_resizing"]["stages"]
    assert [(s["epochs"], s["image_size"], s["per_device_batch_size"]) for s in stages] == [
        (1, 48, 4), (1, 80, 2), (1, 112, 2),
    ]  # fmt: skip
    assert made["algorithms"]["fixres"]["epochs"] == 1
    assert made["algorithms"]["fixres"]["image_size"] == made["data"]["eval"]["image_size"] == 112
    assert made["schedule"]["warmup_epochs"] == pytest.approx(8 * 3 / 90)
    assert made["data"]["source"]["num_classes"] == 1000
    assert (made["precision"], made["device"], made["parallelism"]["strategy"]) == ("fp32", "cpu", "none")
    ffcv = small("resnet50_ffcv_16")
    assert ffcv["schedule"]["points"] == [[0, 1e-4], [pytest.approx(2 * 2 / 16), 1], [2, 0]]
    assert ffcv["optimizer"]["learning_rate"] == pytest.approx(1.7 * 2 / 512)
    assert small("vit_cifar100_fsdp")["model"]["weights"] is None


def test_smoke_keeps_the_engine_for_several_processes_and_the_precision_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    made = small("alexnetish_birds_fsdp", "device=gpu")
    assert made["parallelism"]["strategy"] == "fsdp"
    assert (made["precision"], made["device"]) == ("amp_fp16", "gpu")
    assert made["data"]["source"]["num_samples"] == 8


def test_smoke_leaves_small_images_as_they_are() -> None:
    stages = small("digits_medium")["algorithms"]["progressive_resizing"]["stages"]
    assert [stage["image_size"] for stage in stages] == [12, 16, 20]
