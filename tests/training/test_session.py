"""Whole runs: results, bit-for-bit resumption, several ranks, and what happens to earlier results."""

from __future__ import annotations

import csv
import gc
import json
import re
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_python
from resumed_runs import assert_same_training, flat, last_state, quiet, train_until
from torch import nn

from models import registry as models
from models.classifier import ImageClassifier
from training import cli, session
from training.recipe import RecipeError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def dropout_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """resnet_digits with dropout, so that resuming has torch's random state to restore."""
    find = models.find

    def with_dropout(name: str) -> Any:
        def build(*, num_classes: int, width: int = 16) -> nn.Module:
            network: Any = find("resnet_digits")(num_classes=num_classes, width=width)
            network.avgpool = nn.Sequential(network.avgpool, nn.Dropout(0.3))
            return network

        return build if name == "resnet_digits" else find(name)

    monkeypatch.setattr(models, "find", with_dropout)


def timeless(epochs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what a clock measured."""
    return [{k: v for k, v in row.items() if "second" not in k and k != "data_wait_share"} for row in epochs]


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("dropout_model")
@pytest.mark.parametrize(
    "step",
    [
        20,  # in the second epoch, six steps after the last checkpoint's batch size and image size came into force
        37,  # just after the checkpoint of the second epoch's end
        73,  # in the FixRes epoch, with most layers frozen
    ],
)
def test_a_resumed_run_ends_with_the_same_weights(short_recipe: Any, step: int) -> None:
    whole = short_recipe("run_name=whole", "checkpoints.every_steps=4")
    expected = session.train(whole, say=quiet)
    cut = short_recipe("run_name=cut", "checkpoints.every_steps=4")
    train_until(step, cut)
    torch.manual_seed(1234)  # nothing may depend on what the process drew before
    resumed = session.train(short_recipe("run_name=cut", "checkpoints.every_steps=4", "load=latest"), say=quiet)
    assert_same_training(whole.run_dir, cut.run_dir)
    assert resumed.history.steps == expected.history.steps
    assert timeless(resumed.history.epochs) == timeless(expected.history.epochs)


KILL = """
import os, signal, sys
from composer.core import Callback
from training import cli
from training.engines import composer

class Kill(Callback):
    def batch_end(self, state, logger):
        if state.timestamp.batch.value == 43:
            os.kill(os.getpid(), signal.SIGKILL)

build = composer.build_callbacks
composer.build_callbacks = lambda *given: [*build(*given), Kill()]
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.timeout(240)
def test_sigkill_in_mid_epoch_then_the_same_command_again(
    short_recipe: Any, overrides: list[str], tmp_path: Path
) -> None:
    whole = short_recipe("run_name=whole")
    session.train(whole, say=quiet)
    script = tmp_path / "killed.py"
    script.write_text(KILL)
    arguments = ["-f", "yamls/digits_medium.yaml", *overrides, "run_name=killed", "autoresume=true"]
    killed = run_python(str(script), *arguments, timeout=100)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = run_python("run.py", *arguments, timeout=100)
    assert again.returncode == 0, again.stderr
    assert "continuing after epoch" in again.stdout
    assert_same_training(whole.run_dir, whole.run_dir.with_name("killed"))


@pytest.mark.timeout(300)
def test_two_ranks_train_what_one_process_does(short_recipe: Any, overrides: list[str]) -> None:
    # One epoch at the recipe's own 64 images; random draws per rank are off, SAM and everything else is on.
    same = [
        "algorithms.mixup=null",
        "duration.epochs=2",
        "algorithms.progressive_resizing.stages=[{epochs: 1, image_size: 12}, {epochs: 1, image_size: 16}]",
    ]
    one = session.train(short_recipe("run_name=one", *same), say=quiet).history
    given = {override.partition("=")[0]: override for override in (*overrides, "run_name=two", *same)}
    launched = subprocess.run(
        [str(Path(sys.executable).parent / "composer"), "-n", "2", "run.py", "-f", "yamls/digits_medium.yaml",
         *given.values()],
        cwd=ROOT, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    two_dir = short_recipe("run_name=two").run_dir
    assert (two_dir / "summary.json").exists(), launched.stdout + launched.stderr
    two = np.load(two_dir / "metrics.npz")
    np.testing.assert_allclose(two["step_loss"][:20], one.steps["loss"][:20], atol=1e-4, rtol=0)
    np.testing.assert_allclose(two["step_learning_rate"], one.steps["learning_rate"])
    assert json.loads((two_dir / "summary.json").read_text())["world_size"] == 2


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_compiled_model_trains_alike(short_recipe: Any) -> None:
    one_size = ("duration.epochs=1", "schedule.warmup_epochs=0", "algorithms.progressive_resizing=null",
                "algorithms.fixres=null")  # fmt: skip
    plain = session.train(short_recipe("run_name=plain", *one_size), say=quiet).history
    compiled = session.train(short_recipe("run_name=compiled", "compile=true", *one_size), say=quiet).history
    np.testing.assert_allclose(compiled.steps["loss"], plain.steps["loss"], atol=1e-4, rtol=0)
    # The same names in the checkpoint: what a compiled run leaves loads anywhere.
    states = [last_state(short_recipe(f"run_name={name}").run_dir) for name in ("plain", "compiled")]
    names = [flat([state["model"], state["optimizers"]]).keys() for state in states]
    assert names[0] == names[1]


@pytest.mark.timeout(120)
def test_a_finished_run_leaves_no_network_in_memory(short_recipe: Any) -> None:
    def alive() -> list[Any]:
        gc.collect()
        return [one for one in gc.get_objects() if type(one) is ImageClassifier]

    # Those of earlier tests may go at any time, so only new ones count.
    before = weakref.WeakSet(alive())
    session.train(short_recipe("duration.epochs=2", "algorithms=null"), say=quiet)
    assert [one for one in alive() if one not in before] == []


def test_a_run_leaves_what_people_look_at(short_recipe: Any) -> None:
    recipe = short_recipe()
    result = session.train(recipe, say=quiet)
    files = {str(path.relative_to(recipe.run_dir)) for path in recipe.run_dir.rglob("*") if path.is_file()}
    assert files == {
        "recipe.yaml", "metrics.csv", "metrics.npz", "curves.png", "summary.json", "model.json",
        "checkpoints/latest.pt", "checkpoints/previous.pt", "checkpoints/best.pt",
    }  # fmt: skip
    rows = list(csv.DictReader((recipe.run_dir / "metrics.csv").open()))
    assert [row["image_size"] for row in rows] == ["8", "12", "12", "16"]
    summary = json.loads((recipe.run_dir / "summary.json").read_text())
    assert summary["top1"] == result.summary["top1"] == pytest.approx(float(rows[-1]["eval_top1"]))
    assert summary["top1"] > 0.5
    assert sorted(summary["algorithms"]) == sorted(recipe.algorithms)
    assert {"seconds", "images_per_second", "parameters", "seed", "versions", "hardware", "loss"} <= summary.keys()


@pytest.mark.timeout(120)
def test_an_earlier_run_is_kept_and_a_finished_one_not_repeated(short_recipe: Any) -> None:
    short = ("duration.epochs=1", "schedule.warmup_epochs=0", "algorithms=null")
    recipe = short_recipe(*short)
    first = session.train(recipe, say=quiet)
    said: list[str] = []
    session.train(short_recipe(*short, "seed=1"), say=said.append)
    kept = recipe.run_dir.with_name(f"{recipe.run_dir.name}.1")
    assert json.loads((kept / "summary.json").read_text())["top1"] == first.summary["top1"]
    assert any("is kept as" in text for text in said)
    session.train(short_recipe(*short, "seed=1", "autoresume=true"), say=said.append)
    assert "is complete already" in said[-1]


@pytest.mark.timeout(120)
def test_resuming_under_another_recipe_is_refused(short_recipe: Any) -> None:
    short = ("duration.epochs=1", "schedule.warmup_epochs=0", "algorithms=null")
    session.train(short_recipe(*short), say=quiet)
    with pytest.raises(RecipeError, match=r"algorithms\.mixup\.alpha was None and is 0\.2") as error:
        session.train(
            short_recipe(
                "duration.epochs=1",
                "schedule.warmup_epochs=0",
                "algorithms=null",
                "algorithms.mixup.alpha=0.2",
                "load=latest",
            ),
            say=quiet,
        )
    # The way that it names works.
    (named,) = re.findall(r"start a new run from it: run_name=NEW (load=\S+)$", str(error.value))
    session.train(short_recipe("duration.epochs=2", *short[1:], "run_name=new", named), say=quiet)
    # What does not change the result may change.
    session.train(short_recipe(*short, "load=latest", "data.train.num_workers=0", "data.eval.num_workers=0"), say=quiet)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("load=latest", "holds no checkpoint"),
        ("load=/nowhere/a.pt", "there is no such file"),
        ("device=gpu", "device: is gpu, which this machine does not have"),
        ("precision=amp_bf16", "precision: is amp_bf16, which Composer does not train in on a CPU"),
        ("compile=1.5", "compile: is 1.5; it must be true or false, or a mapping with the keys mode, ahead"),
        ("compile=max-autotune", "compile: is 'max-autotune', which is a mode; give compile.mode=max-autotune"),
        ("compile.mode=max-autotun", "did you mean max-autotune?"),
        ("compile.mode=reduce-overhead", "compile.mode: is reduce-overhead, which records CUDA graphs, and the device"),
        ("results_dir=/proc/results", "cannot be written"),
        ("data.source={name: folder, path: /nowhere}", "no folder /nowhere/train"),
        ("data.train.path=/nowhere.beton", "/nowhere.beton"),
    ],
)
@pytest.mark.timeout(60)
def test_mistakes_end_with_status_2_and_one_line(
    overrides: list[str], override: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if override == "device=gpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    given = {one.partition("=")[0]: one for one in (*overrides, override)}
    assert cli.main(["-f", str(ROOT / "yamls" / "digits_medium.yaml"), *given.values()]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.startswith("run.py: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
        ConnectionResetError(104, "Connection reset by peer"),  # when it died while it handed a batch over
        EOFError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_lost_worker_process_is_told_in_one_line(
    error: Exception, overrides: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(recipe: Any, say: Any) -> None:
        raise error

    monkeypatch.setattr(session, "train", train)
    assert cli.main(["-f", str(ROOT / "yamls" / "digits_medium.yaml"), *overrides]) == 1
    said = capsys.readouterr().err
    assert said.startswith(("run.py: DataLoader worker", "run.py: A worker process of the loader is gone"))
    assert "autoresume=true" in said
    assert said.count("\n") == 1


def test_a_closed_pipe_is_no_lost_worker(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(recipe: Any, say: Any) -> None:
        raise BrokenPipeError(32, "Broken pipe")  # run.py | head

    monkeypatch.setattr(session, "train", train)
    assert cli.main(["-f", str(ROOT / "yamls" / "digits_medium.yaml"), *overrides]) == 1
    assert "worker" not in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(["--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert "algorithms.sam=null" in text
    assert "composer -n 2 run.py" in text
    assert "Exit status" in text
