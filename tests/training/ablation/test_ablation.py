"""Ablations: their runs, what their figures say (against SciPy's t-test), budgets, and going on after a stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import scipy.stats
import yaml

from training import ablate
from training.ablation import carry_out
from training.ablation.variants import COST, EPOCHS, plan_variant, stretched, variants_of
from training.ablation.verdict import difference, pareto_front, recommended, rows, spread
from training.planning import plan_run
from training.recipe import load_recipe

ROOT = Path(__file__).parents[3]
DIGITS = ROOT / "yamls" / "digits_medium.yaml"


def result(variant: str, seed: int, top1: float, seconds: float = 1.0, equal: str = EPOCHS) -> dict[str, Any]:
    algorithms = [] if variant == "none" else variant.split()
    return {"variant": variant, "algorithms": algorithms, "equal": equal, "seed": seed, "top1": top1,
            "epochs": 3, "train_seconds": seconds}  # fmt: skip


def test_each_is_left_out_and_alone() -> None:
    names = [one.name for one in variants_of(["sam", "mixup", "ema"])]
    alone = ["sam alone", "mixup alone", "ema alone"]
    assert names == ["none", "all", "without sam", "without mixup", "without ema", *alone]
    assert variants_of(["sam", "mixup", "ema"])[2].algorithms == ("mixup", "ema")
    assert [one.name for one in variants_of(["sam", "mixup"])] == ["none", "all", "sam alone", "mixup alone"]
    assert [one.name for one in variants_of(["sam"])] == ["none", "all"]
    with pytest.raises(ValueError, match="no algorithm to leave out"):
        variants_of([])


@pytest.mark.parametrize("epochs", [4, 7, 15, 61])
def test_phases_keep_their_proportions(epochs: int) -> None:
    recipe = load_recipe(DIGITS)
    made = stretched(recipe.settings, epochs)
    stages = made["algorithms"]["progressive_resizing"]["stages"]
    assert sum(stage["epochs"] for stage in stages) == made["duration"]["epochs"] == epochs
    share = epochs / recipe.epochs
    before = recipe.settings["algorithms"]["progressive_resizing"]["stages"]
    for stage, old in zip(stages, before, strict=True):
        assert stage["epochs"] >= 1
        assert stage["epochs"] == pytest.approx(old["epochs"] * share, abs=1)
    assert made["schedule"]["warmup_epochs"] == recipe.settings["schedule"]["warmup_epochs"] * share
    assert made["algorithms"]["fixres"]["epochs"] == max(1, round(6 * share)) or share != 1


def test_equal_cost_is_equal_arithmetic(short_recipe: Any) -> None:
    recipe = short_recipe("algorithms.fixres=null", "algorithms.progressive_resizing=null", "duration.epochs=12")
    by_name = {one.name: one for one in variants_of(list(recipe.algorithms))}
    target = plan_run(plan_variant(recipe, by_name["none"], equal=EPOCHS, seed=0).recipe).total_macs
    for name in ("sam alone", "all", "mixup alone"):
        run = plan_variant(recipe, by_name[name], equal=COST, seed=1)
        one_epoch = run.macs / run.recipe.epochs
        assert abs(run.macs - target) <= one_epoch / 2, name
        assert set(run.recipe.algorithms) == set(by_name[name].algorithms)
        assert run.recipe.seed == 1
    sam = plan_variant(recipe, by_name["sam alone"], equal=COST, seed=0).recipe
    assert sam.epochs < 12


def test_differences_are_told_apart_as_scipy_does() -> None:
    draws = np.random.default_rng(0)
    told = 0
    for shift in (0.0, 0.01, 0.05):
        for seeds in (2, 3, 8, 40):
            first = dict(enumerate(draws.normal(0.9 + shift, 0.01, seeds)))
            second = dict(enumerate(draws.normal(0.9, 0.01, seeds)))
            gap = difference(first, second)
            test = scipy.stats.ttest_rel(list(first.values()), list(second.values()))
            low, high = test.confidence_interval(0.95)
            assert gap.mean == pytest.approx((low + high) / 2)
            assert gap.half_width == pytest.approx((high - low) / 2, rel=0.04)  # the normal's quantile from 30 on
            assert gap.is_told == (test.pvalue < 0.05)
            told += gap.is_told
    assert 2 < told < 12
    assert spread([1.0, 2.0, 4.0]) == pytest.approx(np.std([1, 2, 4], ddof=1))


def test_one_seed_tells_nothing_apart() -> None:
    table = rows([result("none", 0, 0.9), result("all", 0, 0.95)], equal=EPOCHS)
    assert table[1].verdict == "+5.00 points against none; one seed, not told apart"
    assert table[1].spread is None
    assert difference({0: 1.0}, {1: 1.0}).seeds == 0


def test_verdicts_compare_with_all_or_none() -> None:
    results = [
        result(name, seed, value + 0.001 * seed)
        for name, value in (("none", 0.80), ("all", 0.90), ("without sam", 0.85), ("sam alone", 0.80))
        for seed in range(3)
    ]
    verdicts = {row.name: row.verdict for row in rows(results, equal=EPOCHS)}
    assert verdicts["none"] == ""
    assert verdicts["all"].startswith("+10.00 points against none")
    assert verdicts["without sam"].startswith("-5.00 points against all (± 0.00)")
    assert verdicts["sam alone"].endswith("not told apart")


def test_the_cheapest_of_the_best_is_recommended() -> None:
    values = {"none": (0.80, 5.0), "all": (0.905, 9.0), "without sam": (0.904, 6.0), "sam alone": (0.85, 8.0)}
    noise = [0.002, -0.001, -0.001]
    results = [
        result(name, seed, top1 + (noise[seed] if name == "all" else -noise[seed]), seconds)
        for name, (top1, seconds) in values.items()
        for seed in range(3)
    ]
    table = rows(results, equal=EPOCHS)
    chosen, reason = recommended(table, results, equal=EPOCHS)
    assert chosen.name == "without sam"
    assert "is not told apart from it (0.10 points below)" in reason
    assert [row.name for row in pareto_front(table)] == ["none", "without sam", "all"]
    worse = [one for one in results if one["variant"] != "without sam"]
    assert recommended(rows(worse, equal=EPOCHS), worse, equal=EPOCHS)[0].name == "all"


def arguments(folder: Path, cache: Path, *more: str) -> list[str]:
    return ["-f", str(DIGITS), f"results_dir={folder}", f"data.cache_dir={cache}", "algorithms=null",
            "algorithms.mixup={alpha: 0.2}", "duration.epochs=2", "schedule.warmup_epochs=0",
            "data.train.image_size=8", "data.eval.image_size=8", *more]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(250)
def test_an_interrupted_one_goes_on(tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    given = arguments(
        tmp_path, cache_dir, "--seeds", "2", "--add", "label_smoothing={smoothing: 0.1}", "--equal", "epochs"
    )
    trained: list[str] = []
    train = carry_out.train

    def stopping(recipe: Any, **settings: Any) -> Any:
        trained.append(recipe.run_name)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return train(recipe, **settings)

    monkeypatch.setattr(carry_out, "train", stopping)
    assert ablate.main(given) == 130
    assert ablate.main(given) == 0
    out = capsys.readouterr().out
    assert len(trained) == len({*trained}) + 1 == 9  # four variants, two seeds; the third is begun twice
    folder = tmp_path / "digits_medium_ablation"
    written = json.loads((folder / "ablation.json").read_text())
    assert [row["seeds"] for row in written["tables"]["epochs"]] == [2, 2, 2, 2]
    for run in written["runs"]:
        assert run["top1"] == json.loads((folder / run["folder"] / "summary.json").read_text())["top1"]
    assert "mixup alone" in (folder / "equal_epochs.txt").read_text()
    assert matplotlib.image.imread(folder / "equal_epochs.png").std() > 0.01
    recipe = load_recipe(folder / "recommended.yaml")
    assert recipe.run_name == "digits_medium_recommended"
    assert f"recommended: {', '.join(recipe.algorithms) or 'no algorithm'}, 2 epochs" in out
    assert yaml.safe_load((folder / "recommended.yaml").read_text())["results_dir"] == str(tmp_path)

    assert ablate.main([one.replace("epochs=2", "epochs=3") for one in given]) == 2
    assert "is of another ablation" in capsys.readouterr().err


def test_a_budget_ends_it_between_two_runs(short_recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = short_recipe("algorithms.fixres=null", "algorithms.progressive_resizing=null")
    now, done = [0.0], {}

    def train(one: Any, **settings: Any) -> None:
        now[0] += 100
        done[one.run_name] = {"epochs": one.epochs, "top1": 0.5, "train_seconds": 90.0}

    monkeypatch.setattr(carry_out, "train", train)
    monkeypatch.setattr(carry_out, "_result", lambda run: done.get(run.recipe.run_name))
    variants = variants_of(["mixup"])
    made = carry_out.carry_out(
        recipe, variants, equals=[EPOCHS], seeds=3, budget_seconds=350, say=lambda text: None, clock=lambda: now[0]
    )
    assert len(made.results) == 3
    assert made.left == 3
    assert now[0] <= 350


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--add", "mixup2"], "is no algorithm; known"),
        (["--budget", "soon"], "give a time such as 90s"),
        (["--seeds", "0"], "must be a whole number"),
        (["--add", "mixup=null"], "given twice"),
        (["--add", "sam={rho: -1}"], "algorithms.sam"),
    ],
)
def test_mistakes_of_users_are_one_line(
    tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str], more: list[str], says: str
) -> None:
    try:
        status: Any = ablate.main(arguments(tmp_path, cache_dir, *more))
    except SystemExit as stop:  # argparse's
        status = stop.code
    assert status == 2
    err = capsys.readouterr().err
    assert says in err
    assert "Traceback" not in err
    assert not (tmp_path / "digits_medium_ablation" / "ablation.json").exists()
