"""Every algorithm of Composer's on the digits recipe: it trains two epochs, or is first refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from resumed_runs import last_state, quiet

from algos.framework.composer_algorithms import _KNOWN
from training import session
from training.planning.text import plan_text
from training.recipe import Recipe, RecipeError, load_recipe

DIGITS = Path(__file__).parents[3] / "yamls" / "digits_medium.yaml"
# Settings with which each does something to a small network, or the ones that have no default.
SETTINGS: dict[str, dict[str, Any]] = {
    "alibi": {"max_sequence_length": 8},
    "blurpool": {"min_channels": 8},
    "factorize": {"min_channels": 8, "latent_channels": 4, "min_features": 8, "latent_features": 4},
    "ghost_batchnorm": {"ghost_batch_size": 16},
    "gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 1.0},
    "layer_freezing": {"freeze_start": 0.0},
    "selective_backprop": {"start": 0.0, "end": 1.0},
    "squeeze_excite": {"min_channels": 8, "latent_channels": 4},
    "stochastic_depth": {"target_layer_name": "ResNetBottleneck"},
    "swa": {"swa_start": "1ep", "swa_end": "2ep"},
}
REFUSED = {"alibi", "augmix", "gated_linear_units", "no_op_model", "randaugment", "seq_length_warmup"}
TRAINED = sorted(set(_KNOWN) - REFUSED)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def recipe_of(tmp_path: Path, cache_dir: Path) -> Any:
    """Makes the digits recipe with one algorithm of Composer's, other settings of it, and more overrides."""

    def make(name: str, *overrides: str, **settings: Any) -> Recipe:
        import yaml

        chosen = yaml.safe_dump({**SETTINGS.get(name, {}), **settings}, default_flow_style=True).strip()
        few = ["data.source.test_fraction=0.6", "data.train.image_size=8", "data.eval.image_size=8", "model.width=8"]
        fixed = ["algorithms=null", f"algorithms.composer.{name}={chosen}", "duration.epochs=2", *few]
        places = [f"results_dir={tmp_path / 'results'}", f"data.cache_dir={cache_dir}", "logging.progress_bar=false"]
        given = {override.partition("=")[0]: override for override in (*fixed, *places, *overrides)}
        return load_recipe(DIGITS, list(given.values()))

    return make


def weights(recipe: Recipe) -> dict[str, torch.Tensor]:
    return last_state(recipe.run_dir)["model"]


def test_every_one_is_tried() -> None:
    assert set(SETTINGS) <= set(_KNOWN) == REFUSED | set(TRAINED)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_it_trains(name: str, recipe_of: Any) -> None:
    recipe = recipe_of(name)
    assert plan_text(recipe)
    result = session.train(recipe, say=quiet)
    assert len(result.history.epochs) == 2
    assert all(tensor.isfinite().all() for tensor in weights(recipe).values() if tensor.is_floating_point())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layer_freezing", "selective_backprop", "squeeze_excite"])
def test_a_resumed_run_is_the_whole_run(name: str, recipe_of: Any) -> None:
    whole = recipe_of(name, "run_name=whole", "duration.epochs=3", "checkpoints.keep_every_epochs=1")
    session.train(whole, say=quiet)
    path = next((whole.run_dir / "checkpoints").glob("ep*1.pt"))
    resumed = recipe_of(name, "run_name=resumed", "duration.epochs=3", f"load={path}")
    session.train(resumed, say=quiet)
    ours, theirs = weights(whole), weights(resumed)
    assert ours.keys() == theirs.keys()
    assert not [key for key in ours if not torch.equal(ours[key], theirs[key])]


def test_a_ghost_batch_must_fit_a_training_pass_and_need_not_fit_an_evaluation_one(recipe_of: Any) -> None:
    for override in ("data.train.global_batch_size=8", "data.train.per_device_microbatch_size=8"):
        with pytest.raises(RecipeError, match="in batches of 8 a device: Worker batch size 8 < ghost_batch_size 16"):
            plan_text(recipe_of("ghost_batchnorm", override))
    with pytest.raises(RecipeError, match="in batches of 7 a device: Worker batch size 7 < "):  # 359 = 11 x 32 + 7
        plan_text(recipe_of("ghost_batchnorm", "data.train.global_batch_size=32", "data.train.drop_last=false"))
    recipe = recipe_of(
        "ghost_batchnorm", "duration.epochs=1", "schedule.warmup_epochs=0", "data.eval.per_device_batch_size=7"
    )
    assert len(session.train(recipe, say=quiet).history.epochs) == 1


def test_new_parameters_go_to_the_group_of_most_that_are_like_them() -> None:
    from types import SimpleNamespace
    from unittest.mock import Mock

    from torch import nn

    from algos.framework.base import Event
    from algos.framework.composer_algorithms import find
    from training.optimizers import parameter_groups

    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(16, 2))
    groups = parameter_groups(model, weight_decay=0.1)
    optimizer = torch.optim.SGD(groups, lr=0.1)
    state: Any = SimpleNamespace(model=model, optimizers=(optimizer,))
    find("composer.factorize")(min_channels=16, latent_channels=4, min_features=99).apply(Event.INIT, state, Mock())
    assert type(model[2]).__name__ == "FactorizedConv2d"
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    decayed, exempt = ({id(one) for one in group["params"]} for group in optimizer.param_groups)
    assert decayed == {id(one) for one in model.parameters() if one.ndim > 1}
    assert exempt == {id(one) for one in model.parameters() if one.ndim == 1}


def test_all_ranks_draw_the_same_new_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace
    from unittest.mock import Mock

    from torch import nn

    from algos.framework import composer_algorithms
    from algos.framework.base import Event

    def new_weights(seed: int) -> list[torch.Tensor]:
        model = nn.Sequential(nn.Conv2d(3, 3, 1))
        state: Any = SimpleNamespace(model=model, optimizers=())
        torch.manual_seed(seed)
        make = composer_algorithms.find("composer.squeeze_excite")
        make(min_channels=3, latent_channels=4).apply(Event.INIT, state, Mock())
        return [parameter for name, parameter in model.named_parameters() if ".se." in name]

    expected = new_weights(0)
    after = torch.get_rng_state()
    sent = torch.manual_seed(0).get_state()
    monkeypatch.setattr(composer_algorithms, "world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda into, src: into.__setitem__(src, sent))
    for rank, then in ((0, after), (1, torch.manual_seed(1).get_state())):
        monkeypatch.setattr(composer_algorithms, "global_rank", lambda rank=rank: rank)
        found = new_weights(seed=rank)
        assert len(found) == 2
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert torch.equal(torch.get_rng_state(), then)  # rank 1 goes on with its own draws


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_it_is_refused_in_one_line_before_training(name: str, recipe_of: Any) -> None:
    with pytest.raises(RecipeError, match=f"algorithms.composer.{name}: .*; (use|leave)") as refusal:
        recipe_of(name)
    assert "\n" not in str(refusal.value)
