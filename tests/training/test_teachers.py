"""Teachers: runs and published classifiers, their classes and normalization, and recipes that learn from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from data import normalize
from training import session
from training.arrangement import network_as_trained
from training.build import build_algorithms
from training.planning import plan_run, without_algorithms
from training.planning.text import format_plan
from training.recipe import RecipeError
from training.teachers import find_teacher, for_images_of
from training.trained import Preprocessing, load_trained, write_about

DIGITS = [str(digit) for digit in range(10)]
PLAIN = ("algorithms=null", "duration.epochs=2", "schedule.warmup_epochs=0", "data.train.image_size=12")


@pytest.fixture
def finished_run(short_recipe: Any, tmp_path: Path) -> Any:
    """Makes a run's folder with random weights."""

    def make(name: str, *, class_names: list[str] = DIGITS, mean: float = 70.0, seed: int = 3) -> Path:
        recipe = short_recipe(*PLAIN, f"run_name={name}", "model.width=8", f"seed={seed}")
        network = network_as_trained(recipe, num_classes=len(class_names))
        (recipe.run_dir / "checkpoints").mkdir(parents=True)
        (recipe.run_dir / "recipe.yaml").write_text(yaml.safe_dump(recipe.settings))
        state = {f"module.{key}": value for key, value in network.state_dict().items()}
        torch.save({"state": {"model": state}}, recipe.run_dir / "checkpoints" / "best.pt")
        write_about(
            recipe.run_dir,
            class_names=class_names,
            preprocessing=Preprocessing(12, 1.0, (mean,) * 3, (60.0, 50.0, 40.0)),
        )
        return recipe.run_dir

    return make


def distilled(short_recipe: Any, teacher: Path | str, *more: str) -> Any:
    plain = [one for one in PLAIN if one != "algorithms=null"]
    names = ("blurpool", "channels_last", "fixres", "label_smoothing", "mixup", "progressive_resizing", "sam")
    off = [f"algorithms.{name}=null" for name in names]
    return short_recipe(*plain, *off, f"algorithms.distillation={{teacher: {teacher}}}", *more)


def test_a_recipe_learns_from_a_run_and_resumes_exactly(short_recipe: Any, finished_run: Any) -> None:
    teacher = finished_run("teacher")
    more = ("model.width=4", "algorithms.mixup={}", "checkpoints.keep_every_epochs=1", "seed=1")
    recipe = distilled(short_recipe, teacher, *more, "run_name=whole")
    whole = session.train(recipe, say=lambda text: None)
    assert whole.history.steps["loss"][0] < 1  # a tenth of a cross entropy of some 2.3, and the teacher's term
    moved = teacher.rename(teacher.with_name("moved"))
    # As if the run had ended after its first epoch: a moved teacher is the same one.
    checkpoints = recipe.run_dir / "checkpoints"
    kept = torch.load(checkpoints / "latest.pt", weights_only=False)
    (checkpoints / "ep1.pt").replace(checkpoints / "latest.pt")
    continued = distilled(short_recipe, moved, *more, "run_name=whole", "load=latest")
    session.train(continued, say=lambda text: None)
    again = torch.load(checkpoints / "latest.pt", weights_only=False)
    for name, value in kept["state"]["model"].items():
        assert torch.equal(again["state"]["model"][name], value), name
    assert not [name for name in kept["state"]["model"] if "teacher" in name]
    assert load_trained(recipe.run_dir).network  # needs no teacher
    other = finished_run("other", seed=4)
    (checkpoints / "ep1.pt").unlink(missing_ok=True)
    longer = distilled(
        short_recipe, other, *more, "run_name=longer", f"load={checkpoints / 'latest.pt'}", "duration.epochs=3"
    )
    with pytest.raises(ValueError, match="continue it with the same teacher"):
        session.train(longer, say=lambda text: None)


def test_the_plan_counts_the_teacher(short_recipe: Any, finished_run: Any) -> None:
    recipe = distilled(short_recipe, finished_run("teacher"), "model.width=4")
    plan, without = plan_run(recipe), plan_run(without_algorithms(recipe, "off"))
    teacher = load_trained(recipe.algorithms["distillation"]["teacher"]).network
    from models.summary import count_forward_macs, count_parameters

    macs = plan.images * count_forward_macs(teacher, image_size=12)
    assert plan.total_macs == without.total_macs + macs
    assert plan.forward_macs == without.forward_macs + macs
    assert plan.teacher_parameters == count_parameters(teacher)
    assert f"teacher {recipe.algorithms['distillation']['teacher']}: {plan.teacher_parameters:,} parameters" in (
        format_plan(plan, without)
    )


def test_a_teacher_gets_images_as_it_was_trained_on_them(short_recipe: Any, finished_run: Any) -> None:
    class Loader:
        mean, std = (100.0, 110.0, 120.0), (50.0, 55.0, 60.0)

    recipe = distilled(short_recipe, finished_run("teacher", mean=42.0))
    algorithm: Any = build_algorithms(plan_run(recipe), loader=Loader)["distillation"]
    pixels = torch.randint(0, 256, (4, 3, 12, 12), dtype=torch.uint8)
    theirs = load_trained(recipe.algorithms["distillation"]["teacher"])
    with torch.no_grad():
        found = algorithm.teacher(normalize(pixels, mean=Loader.mean, std=Loader.std))
        torch.testing.assert_close(found, theirs.network(theirs.preprocessing.normalized(pixels)), rtol=1e-4, atol=1e-4)
    teacher = find_teacher(recipe.algorithms["distillation"]["teacher"])
    network = nn.Identity()
    assert for_images_of(network, teacher, mean=teacher.mean, std=teacher.std) is network


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "nowhere is not there; give results/RUN"),
        ("torchvision.resnet18", "torchvision.resnet18, which tells 1000 classes apart, and the data have 10"),
        ("torchvision.resnet19", "did you mean torchvision.resnet18?"),
        ("fewer", "which tells 9 classes apart, and the data have 10"),
        ("renamed", "whose class 3 is 'three', and the data's is '3'"),
        ("digits_medium", "which this run replaces; give the run another run_name"),
    ],
)
def test_a_teacher_that_does_not_suit_is_refused_by_the_plan(
    short_recipe: Any, finished_run: Any, tmp_path: Path, name: str, message: str
) -> None:
    others = {"fewer": DIGITS[:9], "renamed": [*DIGITS[:3], "three", *DIGITS[4:]]}
    where: Any = finished_run(name, class_names=others[name]) if name in others else name
    where = tmp_path / "results" / name if name in ("nowhere", "digits_medium") else where
    with pytest.raises(RecipeError, match=r"^algorithms.distillation.teacher: is |did you mean") as refusal:
        plan_run(distilled(short_recipe, where))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_recipe_gives_a_teachers_name(short_recipe: Any) -> None:
    with pytest.raises(RecipeError, match=r"distillation.teacher: is missing; give text"):
        short_recipe("algorithms.distillation={weight: 0.5}")


def test_torchvisions_weights_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import ShuffleNet_V2_X0_5_Weights, shufflenet_v2_x0_5

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    published = shufflenet_v2_x0_5().eval()
    file = tmp_path / "checkpoints" / Path(ShuffleNet_V2_X0_5_Weights.DEFAULT.url).name
    file.parent.mkdir()
    torch.save(published.state_dict(), file)  # where a download leaves them
    teacher = find_teacher("torchvision.shufflenet_v2_x0_5")
    assert (teacher.num_classes, teacher.class_names) == (1000, None)
    assert teacher.mean == pytest.approx((123.675, 116.28, 103.53))
    assert teacher.std == pytest.approx((58.395, 57.12, 57.375))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(teacher.load()(images), published(images))


@pytest.mark.exhaustive  # imports both; the ways of torchvision's are the same
def test_timms_and_transformers_tell_their_classes_and_normalization(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    teacher = find_teacher("timm.vit_tiny_patch16_224")
    assert (teacher.num_classes, teacher.mean, teacher.std) == (1000, (127.5,) * 3, (127.5,) * 3)
    with pytest.raises(ValueError, match=r"timm has no weights for .*; use one that timm.list_pretrained\(\) has"):
        find_teacher("timm.resnet200")
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8,
        num_labels=7,
    )  # fmt: skip
    published = transformers.ViTForImageClassification(config).eval()
    published.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no preprocessor_config.json"):
        find_teacher(f"hf.{tmp_path}")
    about: dict[str, Any] = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(about))
    teacher = find_teacher(f"hf.{tmp_path}")
    assert teacher.num_classes == 7
    assert teacher.mean == pytest.approx((25.5, 51.0, 76.5))
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(teacher.load()(images), published(images).logits)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ValueError, match="does not say how its images are normalized"):
        find_teacher(f"hf.{tmp_path}")
