"""The profile of chosen steps: that it holds these steps, once, and what is said of steps that do not come."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from composer import Trainer
from composer.utils import dist
from tiny_model import Interrupt, TinyModel
from torch.utils.data import DataLoader, TensorDataset

from training.checkpoints.saving import Checkpoints
from training.recipe import RecipeError
from training.recipe.watching import check_profiled_steps, parse_profile
from training.results.profile import Profile

pytestmark = pytest.mark.timeout(120)

BATCH_SIZE, STEPS_PER_EPOCH = 8, 4


def train(*callbacks, load_path: Path | None = None) -> None:
    data = TensorDataset(torch.randn(STEPS_PER_EPOCH * BATCH_SIZE, 6), torch.arange(STEPS_PER_EPOCH * BATCH_SIZE) % 3)
    model = TinyModel()
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(data, batch_size=BATCH_SIZE, sampler=dist.get_sampler(data, shuffle=True)),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        max_duration="2ep",
        device="cpu",
        callbacks=list(callbacks),
        load_path=None if load_path is None else str(load_path),
        progress_bar=False,
        log_to_console=False,
    )
    try:
        trainer.fit()
    finally:
        trainer.engine.close()


def events(path: Path) -> list[str]:
    """Names of a trace's intervals."""
    with gzip.open(path) as file:
        return [event["name"] for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]


@pytest.mark.parametrize(("first", "last"), [(1, 2), (3, 6), (8, 8)])  # from the start, over an epoch's end, the last
def test_the_trace_holds_the_steps(tmp_path, first, last):
    train(Profile(tmp_path, first=first, last=last))
    name = f"steps_{first}-{last}_rank0"
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"operators_{name}.txt", f"trace_{name}.json.gz"]
    found = events(tmp_path / f"trace_{name}.json.gz")
    steps = last - first + 1
    assert len({one for one in found if one.startswith("ProfilerStep#")}) == steps
    # Not aten::linear: DeepSpeed replaces the function of that name for the whole process.
    assert found.count("aten::cross_entropy_loss") == steps
    assert steps - 1 <= found.count("wait for data") <= steps + 1  # the first begins before; an epoch's last finds none
    table = (tmp_path / f"operators_{name}.txt").read_text()
    assert "Self CPU" in table
    assert len([line for line in table.splitlines() if "ms" in line or "us" in line]) >= 10


def test_a_run_that_stops_in_between_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(Profile(tmp_path / "profile", first=3, last=6), Interrupt(after_step=4))
    assert not (tmp_path / "profile").exists()


@pytest.mark.filterwarnings("ignore:.* is not in the state_dict")  # none of these callbacks has a state
def test_a_resumed_run_says_what_it_cannot_profile(tmp_path, caplog):
    with pytest.raises(KeyboardInterrupt):
        train(Checkpoints(tmp_path, every_steps=1), Interrupt(after_step=5))
    train(Profile(tmp_path / "past", first=2, last=3), load_path=tmp_path / "latest.pt")
    assert "steps 2 to 3; this run continues after step 5, so nothing is profiled" in caplog.text
    assert not (tmp_path / "past").exists()
    train(Profile(tmp_path / "rest", first=4, last=7), load_path=tmp_path / "latest.pt")
    assert "steps 4 to 7; this run continues after step 5, so only the rest of them is" in caplog.text
    found = events(tmp_path / "rest" / "trace_steps_6-7_rank0.json.gz")
    assert found.count("aten::cross_entropy_loss") == 2


@pytest.mark.parametrize("everyone", [False, True])
def test_other_ranks_only_if_asked(tmp_path, monkeypatch, everyone):
    monkeypatch.setattr("training.results.profile.dist", SimpleNamespace(get_global_rank=lambda: 1))
    train(Profile(tmp_path / "profile", first=2, last=3, all_ranks=everyone))
    assert (tmp_path / "profile" / "trace_steps_2-3_rank1.json.gz").exists() == everyone


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"steps": [0, 3]}, r"logging\.profile\.steps: is \[0, 3\]; the first is at least 1"),
        ({"steps": [5, 3]}, r"is \[5, 3\]; .* the last not before it"),
        ({"steps": [1, 101]}, r"is \[1, 101\], 101 steps; .*100; give fewer"),
        ({"steps": [1, 2, 3]}, r"logging\.profile\.steps: is .*1, 2, 3"),
        ({"steps": "a"}, r"logging\.profile\.steps: is 'a'"),
        ({"step": [1, 2]}, r"logging\.profile\.step: unknown key .*did you mean steps"),
        ({}, r"logging\.profile\.steps: is missing"),
        (3, r"logging\.profile: is 3; it must be a mapping"),
    ],
)
def test_ranges_that_cannot_be(given, says):
    with pytest.raises(RecipeError, match=says):
        parse_profile(given)


def test_steps_beyond_the_run_are_found_before_it():
    check_profiled_steps({"steps": [5, 8], "all_ranks": False}, total_steps=8)
    with pytest.raises(RecipeError, match=r"is \[5, 9\], and the run has 8 steps; give steps from 1 to 8"):
        check_profiled_steps({"steps": [5, 9], "all_ranks": False}, total_steps=8)
