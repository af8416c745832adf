"""Several files over each other: what merges, what is replaced, whose name an error bears; the shipped profiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from training.cli import main
from training.facts import planned_facts
from training.planning import Place, make_plan
from training.recipe import RecipeError, load_recipe
from training.recipe.layers import blamed_file, lay_over
from training.recipe.listing import listing, profile_files, recipe_files

ROOT = Path(__file__).parents[3]
MEDIUM, DIGITS = ROOT / "yamls" / "resnet50_medium.yaml", ROOT / "yamls" / "digits_medium.yaml"
# All that a profile may say: what depends on the machine, and no setting of what is trained.
MACHINE_KEYS = {
    "data.train.num_workers", "data.train.per_device_microbatch_size", "data.eval.num_workers",
    "data.eval.per_device_batch_size", "precision", "compile", "device",
}  # fmt: skip
STAGES = "algorithms.progressive_resizing.stages."


def flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{path}.{key}".strip(".")).items()}
    return {path: value}


def test_mappings_merge_and_everything_else_is_replaced() -> None:
    below = {"a": {"b": 1, "c": [1, 2]}, "d": 4}
    assert lay_over(below, {"a": {"c": [3]}, "d": None, "e": {"f": 5}}) == {
        "a": {"b": 1, "c": [3]}, "d": None, "e": {"f": 5},
    }  # fmt: skip
    assert below == {"a": {"b": 1, "c": [1, 2]}, "d": 4}


def test_one_batch_size_takes_away_the_other() -> None:
    laid = lay_over(
        {"data": {"train": {"global_batch_size": 8, "x": 1}}}, {"data": {"train": {"per_device_batch_size": 2}}}
    )
    assert laid == {"data": {"train": {"x": 1, "per_device_batch_size": 2}}}


def test_rows_lie_over_the_stages_of_up_to_their_size_that_give_a_batch_size() -> None:
    stages = [
        {"epochs": 1, "image_size": 100, "global_batch_size": 512},
        {"epochs": 2, "image_size": 128, "per_device_batch_size": 64},
        {"epochs": 3, "image_size": 129, "per_device_batch_size": 64},
        {"epochs": 4, "image_size": 300, "per_device_batch_size": 16},
        {"epochs": 5, "image_size": 100},
    ]
    rows = {128: {"per_device_batch_size": 9}, 224: {"per_device_batch_size": 5}}
    below = {"algorithms": {"progressive_resizing": {"stages": stages, "size_multiple": 8}, "sam": {}}}
    laid = lay_over(below, {"algorithms": {"progressive_resizing": {"stages": rows}}})["algorithms"]
    assert laid["sam"] == {}
    assert laid["progressive_resizing"]["size_multiple"] == 8
    assert laid["progressive_resizing"]["stages"] == [
        {"epochs": 1, "image_size": 100, "per_device_batch_size": 9},
        {"epochs": 2, "image_size": 128, "per_device_batch_size": 9},
        {"epochs": 3, "image_size": 129, "per_device_batch_size": 5},
        {"epochs": 4, "image_size": 300, "per_device_batch_size": 16},
        {"epochs": 5, "image_size": 100},
    ]


def test_rows_do_not_turn_resizing_on() -> None:
    rows = {"algorithms": {"progressive_resizing": {"stages": {128: {"per_device_batch_size": 9}}}}}
    assert lay_over({"algorithms": {"sam": {}}}, rows) == {"algorithms": {"sam": {}}}
    assert lay_over({"algorithms": {"progressive_resizing": None}}, rows)["algorithms"] == {
        "progressive_resizing": None
    }


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"big": {"per_device_batch_size": 1}}, "row 'big'; a row is named by an image size"),
        ({128: 64}, "has 64 at 128 px; a row is a mapping"),
        ({128: {"epochs": 3}}, "has epochs in the row of 128 px; a row may give global_batch_size or per_device"),
    ],
)
def test_a_wrong_row_is_refused(rows: dict[Any, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        lay_over({}, {"algorithms": {"progressive_resizing": {"stages": rows}}})


def test_an_error_names_the_file_that_it_is_in(tmp_path: Path) -> None:
    profile = tmp_path / "profile.yaml"
    for text, message in (
        (
            "data: {train: {num_wrokers: 3}}",
            f"{profile}: data.train.num_wrokers: unknown key .*did you mean num_workers",
        ),
        ("precision: fp17", f"{profile}: precision: is 'fp17'"),
        ("algorithms: {progressive_resizing: {stages: {8: 1}}}", f"{profile}: algorithms.progressive_resizing.stages"),
    ):
        profile.write_text(text)
        with pytest.raises(RecipeError, match=f"^{message}"):
            load_recipe([DIGITS, profile])
    with pytest.raises(RecipeError, match=f"^{DIGITS}: algorithms.mixup.alpa: unknown key"):
        load_recipe([DIGITS, ROOT / "yamls/hardware/cpu.yaml"], ["algorithms.mixup.alpa=1"])
    with pytest.raises(RecipeError, match=r"^nowhere.yaml: no such file"):
        load_recipe([DIGITS, "nowhere.yaml"])


def test_the_last_file_that_holds_a_key_is_blamed() -> None:
    files = [("a", {"x": {"y": 1}, "z": 1}), ("b", {"x": {"y": 2}})]
    assert [blamed_file(path, files) for path in ("x.y[3].q", "z", "x.other", "")] == ["b", "a", "b", "a + b"]


def test_overrides_win_over_profiles_and_profiles_over_recipes() -> None:
    recipe = load_recipe([MEDIUM, ROOT / "yamls/hardware/t4.yaml"], ["data.train.num_workers=1"])
    assert (recipe.data.train.num_workers, recipe.data.eval.num_workers) == (1, 4)
    sizes = [stage.per_device_batch_size for stage in recipe.algorithms["progressive_resizing"]["stages"]]
    assert sizes == [256, 128, 64]
    assert recipe.epochs == 90


@pytest.mark.parametrize("profile", profile_files(ROOT), ids=lambda path: path.stem)
def test_every_profile_says_only_what_depends_on_the_machine_and_lies_over_every_recipe(profile: Path) -> None:
    text = profile.read_text()
    raw = yaml.safe_load(text)
    assert {key for key in flat(raw) if not key.startswith(STAGES)} <= MACHINE_KEYS
    assert "# Measured: " in text
    assert "# Changes the training: " in text
    rows = raw.get("algorithms", {}).get("progressive_resizing", {}).get("stages")
    assert ("# Changes the training: yes" in text) == bool(rows)
    for path in recipe_files(ROOT):
        if raw.get("compile") and path.stem == "vit_cifar100_deepspeed":
            with pytest.raises(
                RecipeError, match=f"^{profile}: compile: is true, and parallelism.strategy is deepspeed"
            ):
                load_recipe([path, profile])
        else:
            load_recipe([path, profile])


def test_a_recipe_under_a_profile_plans() -> None:
    recipe = load_recipe([MEDIUM, ROOT / "yamls/hardware/8xa100.yaml"])
    plan = make_plan(recipe, planned_facts(recipe), Place("gpu", 8))
    assert {(epoch.image_size, epoch.global_batch_size) for epoch in plan.epochs} == {
        (128, 4096),
        (224, 2560),
        (288, 2048),
    }


def test_list_shows_every_recipe_and_profile_with_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for path in (*recipe_files(ROOT), *profile_files(ROOT)):
        (line,) = [one for one in lines if str(path.relative_to(ROOT)) in one]
        assert len(line.split()) > 4
    assert "no recipes in" in listing(tmp_path)


def test_a_recipe_is_required_without_list(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "-f/--file" in capsys.readouterr().err
