"""Every algorithm, alone and with all others, under every condition: equal to a plain run of the same algorithms.

A cell is the largest difference of any weight after a whole run in float64. `make composition` writes the table of
docs/composition.md from such runs, with Composer's own algorithms next to ours.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from composition import (
    COMPILED,
    EXAMPLES,
    NEIGHBORS,
    PAIRS,
    SETS,
    STOPPED_AT,
    furthest,
    train,
    train_applied_twice,
    train_interrupted,
)
from ranks import needs_fsdp, run_ranks

from algos.framework.registry import find, names

HERE = Path(__file__).parent
ROUNDING = 1e-12  # float64, a dozen steps
# With --exhaustive each algorithm is tried with every other.
TESTED_PAIRS = [pytest.param(name, marks=[] if name in NEIGHBORS else pytest.mark.exhaustive) for name in PAIRS]
_references: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}
_as_two_ranks: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    # The networks are so small that threads wait for each other longer than they work.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def reference(chosen: list[str]) -> dict[str, torch.Tensor]:
    """A plain run on one process, once for all tests."""
    key = tuple(sorted(chosen))
    if key not in _references:
        _references[key] = train(chosen)
    return _references[key]


def reference_as_two_ranks(chosen: list[str]) -> dict[str, torch.Tensor]:
    """One process that does to each half of a batch what a rank would; once for both strategies."""
    key = tuple(sorted(chosen))
    if key not in _as_two_ranks:
        _as_two_ranks[key] = train(chosen, as_two_ranks=True)
    return _as_two_ranks[key]


def test_every_algorithm_has_example_settings() -> None:
    assert sorted(EXAMPLES) == names()


NO_LAYERS_OF_THEIR_OWN = {"distillation", "selective_backprop"}
NO_EFFECT_ON_WEIGHTS = {"channels_last", "ema"}


@pytest.mark.parametrize("name", sorted(set(names()) - NO_EFFECT_ON_WEIGHTS))
def test_it_changes_what_is_trained(name: str) -> None:
    without = train([], vit=True) if name == "patch_dropout" else reference([])
    assert furthest(reference([name]), without) > 1e-3


@pytest.mark.parametrize("chosen", SETS.values(), ids=SETS)
def test_microbatches_change_nothing(chosen: list[str]) -> None:
    assert furthest(train(chosen, device_train_microbatch_size=2), reference(chosen)) < ROUNDING


@pytest.mark.parametrize(
    "chosen",
    # These two add no layer; together with the others they are compiled at every change.
    [
        pytest.param(chosen, id=name, marks=[pytest.mark.exhaustive] if name in NO_LAYERS_OF_THEIR_OWN else [])
        for name, chosen in SETS.items()
    ],
)
def test_compiling_changes_nothing(chosen: list[str]) -> None:
    torch._dynamo.reset()
    assert furthest(train(chosen, compile_config=COMPILED), reference(chosen)) < ROUNDING


@pytest.mark.slow
@pytest.mark.exhaustive  # tests/training/test_session.py trains a recipe with them
def test_generated_kernels_change_nothing() -> None:
    torch._dynamo.reset()
    chosen = SETS["all together"]
    assert furthest(train(chosen, compile_config={"dynamic": False}), reference(chosen)) < ROUNDING


@pytest.mark.parametrize("moment", STOPPED_AT.values(), ids=STOPPED_AT)
@pytest.mark.parametrize("chosen", SETS.values(), ids=SETS)
def test_resuming_is_exact(chosen: list[str], moment: str, tmp_path: Path) -> None:
    assert furthest(train_interrupted(chosen, tmp_path, moment=moment), reference(chosen)) == 0.0


@pytest.mark.parametrize("name", names())
def test_listed_twice_it_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{find(name).__name__} is among .* twice"):
        train_applied_twice([name])


@pytest.fixture(scope="session", params=["ddp", pytest.param("fsdp", marks=needs_fsdp)])
def two_ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Every set trained by two gloo ranks in one launch: the strategy, and the folder with their weights."""
    return request.param, launch(request.param, "sets", tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session", params=["ddp", pytest.param("fsdp", marks=[needs_fsdp, pytest.mark.exhaustive])])
def pairs_on_two_ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The same of every pair that is tested."""
    what = "pairs" if request.config.getoption("--exhaustive") else "neighbors"
    return request.param, launch(request.param, what, tmp_path_factory.mktemp(f"{request.param}_pairs"))


def launch(strategy: str, what: str, folder: Path) -> Path:
    run_ranks(2, str(HERE / "composition.py"), strategy, str(folder), what, timeout=580)
    return folder


def assert_as_one_process(chosen: list[str], name: str, strategy: str, folder: Path) -> None:
    refused = json.loads((folder / "refused.0.json").read_text())
    assert name not in refused, refused.get(name)
    ranks = [torch.load(folder / f"{name}.{rank}.pt") for rank in (0, 1)]
    assert furthest(*ranks) == 0.0, "the ranks drifted apart"
    difference = furthest(ranks[0], reference_as_two_ranks(chosen))
    if strategy == "fsdp" and difference >= 1e-5:  # Composer's FSDP2 computes in float32: is it that?
        difference = furthest(ranks[0], train(chosen, as_two_ranks=True, dtype=torch.float32))
    assert difference < (1e-10 if strategy == "ddp" else 1e-5)


@pytest.mark.timeout(600)
@pytest.mark.xdist_group("two_ranks")  # one worker of pytest-xdist has the runs that these share
@pytest.mark.parametrize("name", SETS)
def test_two_ranks_train_what_one_process_does(name: str, two_ranks: tuple[str, Path]) -> None:
    assert_as_one_process(SETS[name], name, *two_ranks)


# Those of Composer's that this package has no equivalent of and that a recipe's classifier may want.
COMPOSERS = ["composer.ghost_batchnorm", "composer.layer_freezing", "composer.squeeze_excite"]


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=needs_fsdp)])
def test_composers_own_train_on_two_ranks_as_in_one_process(strategy: str, tmp_path: Path) -> None:
    launch(strategy, "composer", tmp_path)
    for name in COMPOSERS:
        assert_as_one_process([name], name, strategy, tmp_path)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", COMPOSERS)
def test_composers_own_survive_microbatches_compiling_and_resuming(name: str, tmp_path: Path) -> None:
    assert furthest(train([name], device_train_microbatch_size=2), reference([name])) < ROUNDING
    for moment in STOPPED_AT.values():
        assert furthest(train_interrupted([name], tmp_path / moment, moment=moment), reference([name])) == 0.0
    torch._dynamo.reset()
    assert furthest(train([name], compile_config=COMPILED), reference([name])) < ROUNDING


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.xdist_group("pairs_on_two_ranks")
@pytest.mark.parametrize("name", TESTED_PAIRS)
def test_two_ranks_train_a_pair_as_one_process_does(name: str, pairs_on_two_ranks: tuple[str, Path]) -> None:
    assert_as_one_process(PAIRS[name], name, *pairs_on_two_ranks)


@pytest.mark.slow
@pytest.mark.parametrize("name", TESTED_PAIRS)
def test_every_pair_survives_microbatches_compiling_and_resuming(name: str, tmp_path: Path) -> None:
    chosen = PAIRS[name]
    assert furthest(train(chosen, device_train_microbatch_size=2), reference(chosen)) < ROUNDING
    assert furthest(train_interrupted(chosen, tmp_path, moment="batch 6"), reference(chosen)) == 0.0
    torch._dynamo.reset()
    assert furthest(train(chosen, compile_config=COMPILED), reference(chosen)) < ROUNDING
