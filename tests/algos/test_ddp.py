"""DDP's gradients as views and in 16 bits, and StepTrainer on two ranks, against Composer's Trainer and its DDP."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from composition import SETS
from ranks import run_ranks

from training.engines import composer as engine
from training.engines.parallel import check_parallelism
from training.planning import Place
from training.recipe import RecipeError, load_recipe

ROOT = Path(__file__).parents[2]
SCRIPT = str(Path(__file__).with_name("ddp_ranks.py"))
# Of weights of about 1 after twelve steps at a learning rate of 0.05: gradients lose all but 8 and 11 bits.
MOST_APART = {"bf16": 5e-3, "fp16": 5e-4}
OF_A_STEP = {
    "composer/trainer/trainer.py:_train_microbatch allreduce_": 1,  # DDP's gradients, all in one bucket
    "composer/utils/dist.py:all_reduce allreduce_": 2,  # the loss, and whether a rank has received a signal
    "models/classifier.py:_sync_dist allreduce_": 1,  # top-1
}


@pytest.mark.timeout(200)
def test_two_ranks_compute_the_same_and_ask_each_other_less() -> None:
    found = _two_ranks("steps,bf16", "all together", timeout=180)
    _check(found["distances"]["all together"])
    assert found["collectives"]["StepTrainer"] == OF_A_STEP
    assert sum(found["collectives"]["Trainer"].values()) == sum(OF_A_STEP.values()) + 4


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_two_ranks_compute_the_same_with_each_algorithm() -> None:
    found = _two_ranks("views,steps,bf16,fp16", ",".join(SETS), timeout=840)
    for distances in found["distances"].values():
        _check(distances)


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        ("none", "averages no gradients"),
        ("fsdp", "takes the type of its traffic from parallelism.fsdp.mixed_precision"),
        ("deepspeed", "takes the type of its traffic from parallelism.deepspeed.communication_data_type"),
    ],
)
def test_other_strategies_refuse_compression(strategy: str, reason: str) -> None:
    recipe = _recipe(f"parallelism.strategy={strategy}")
    with pytest.raises(
        RecipeError, match=rf"gradient_compression: is bf16, and .* is {strategy}, which {reason}; leave it out"
    ):
        check_parallelism(recipe, Place(device="cpu", world_size=1))


def test_the_trainer_is_made_with_the_recipes_compression(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(Exception):
        pass

    def wraps(compression: Any) -> Any:
        raise Asked(compression)

    monkeypatch.setattr(engine, "build_model", lambda plan: SimpleNamespace(module=None))
    monkeypatch.setattr(engine, "build_data_specs", lambda plan, loaders: (None, None))
    monkeypatch.setattr(engine, "build_optimizer_of", lambda model, plan: None)
    monkeypatch.setattr(engine, "composer_wraps_so", wraps)
    plan: Any = SimpleNamespace(recipe=_recipe())
    with pytest.raises(Asked, match="bf16"):
        engine.build_trainer(plan, (None, None), callbacks=[], load_path=None)


def _recipe(*overrides: str) -> Any:
    return load_recipe(ROOT / "yamls" / "digits_medium.yaml", ["parallelism.ddp.gradient_compression=bf16", *overrides])


def _two_ranks(ways: str, names: str, *, timeout: float) -> dict[str, Any]:
    return json.loads(run_ranks(2, SCRIPT, ways, names, timeout=timeout).strip().splitlines()[-1])


def _check(distances: dict[str, float]) -> None:
    for way, distance in distances.items():
        if way in MOST_APART:
            assert 0 < distance < MOST_APART[way], way
        else:
            assert distance == 0, way
