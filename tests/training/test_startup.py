"""What a command line imports: a mistake, --help and --plan import no library that they do not need.

The commands run in separate processes, since the tests' own has all of them imported. Commands that do not affect each
other share one: what none of them may import is absent after the last.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DIGITS = "yamls/digits_medium.yaml"
COMPILER = ("torch._dynamo.eval_frame", "sympy.core")
WATCHED = ("torch", "numpy", "yaml", "composer", "torchvision", "torchmetrics", "transformers", "sklearn", *COMPILER)
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
MISTAKES = {
    "key": (["foo=1"], "foo: unknown key"),
    "key of a section": (["data.train.batch=3"], "data.train.batch: unknown key"),
    "key of an algorithm": (["algorithms.mixup.alhpa=1"], "alhpa"),
    "value": (["duration.epochs=x"], "duration.epochs: is 'x'"),
    "value out of range": (["algorithms.mixup.alpha=-1"], "alpha"),
    "value of a model": (["model.width=wide"], "model.width: is 'wide'"),
    "name of an algorithm": (["algorithms.mixupp.alpha=1"], "did you mean mixup?"),
    "name of Composer's algorithm": (["algorithms.composer.cutmixx.alpha=1"], "did you mean composer.cutmix?"),
    "name of a model": (["model=resnet51"], "did you mean resnet50?"),
    "name of an optimizer": (["optimizer.name=sgdd"], "did you mean sgd?"),
}
PLANS = (DIGITS, "yamls/resnet50_medium.yaml")

# Runs run.py as `python run.py` does, once for each command line, and says how it ended.
RUN = """
import contextlib, io, json, os, runpy, sys
commands, watched = json.loads(sys.argv[1])
said = sys.stdout
for command in commands:
    sys.argv[:] = ["run.py", *command]
    status, out, err = None, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path("run.py", run_name="__main__")
        except SystemExit as stop:
            status = stop.code
    ended = {"status": status, "out": out.getvalue(), "err": err.getvalue()}
    ended |= {"imported": [name for name in watched if name in sys.modules], "environment": dict(os.environ)}
    print(json.dumps(ended), file=said)
"""

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.xdist_group("startup"),  # one worker of pytest-xdist has the processes that these share
]


def run(*commands: list[str], **environment: str) -> list[dict[str, Any]]:
    """Each command's status, output, modules and environment; in one process, in turn."""
    inherited = {name: value for name, value in os.environ.items() if name not in WAITING}
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps([commands, WATCHED])],
        cwd=ROOT, env={**inherited, **environment}, capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def mistakes() -> dict[str, dict[str, Any]]:
    """How --help, and then each of MISTAKES, ends."""
    commands = [["-f", DIGITS, *overrides] for overrides, _ in MISTAKES.values()]
    return dict(zip(("help", *MISTAKES), run(["--help"], *commands), strict=True))


def test_help_imports_no_library(mistakes: dict[str, Any]) -> None:
    ended = mistakes["help"]
    assert ended["status"] == 0
    assert "Exit status" in ended["out"]
    assert ended["imported"] == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_without_composer(mistake: str, mistakes: dict[str, Any]) -> None:
    ended, (_, says) = mistakes[mistake], MISTAKES[mistake]
    assert ended["status"] == 2
    assert ended["err"].startswith(f"run.py: {DIGITS}: ")
    assert ended["err"].count("\n") == 1
    assert says in ended["err"]
    assert not {"composer", "torchvision", "torchmetrics", "transformers", "sklearn"} & set(ended["imported"])


def test_a_plan_is_made_without_composer() -> None:
    done = run(*(["-f", recipe, "--plan"] for recipe in PLANS), GOMP_SPINCOUNT="7")
    for recipe, ended in zip(PLANS, done, strict=True):
        assert ended["status"] == 0, ended["err"]
        assert ended["out"].startswith(f"{Path(recipe).stem}: ")
        assert "algorithms, in the order they act" in ended["out"]
        assert not {"composer", "torchmetrics", "transformers", "sklearn", *COMPILER} & set(ended["imported"])
        assert ended["environment"]["GOMP_SPINCOUNT"] == "7"  # what the user has set


def test_threads_spin_briefly_where_the_user_has_not_said_how_they_wait(mistakes: dict[str, Any]) -> None:
    assert "GOMP_SPINCOUNT" not in mistakes["help"]["environment"]
    assert mistakes["key"]["environment"]["GOMP_SPINCOUNT"] == "30000"


@pytest.mark.slow
def test_a_plan_of_a_hugging_face_model_imports_what_it_needs(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = transformers.ViTConfig(image_size=16, patch_size=8, **small)
    config.architectures = ["ViTForImageClassification"]
    config.save_pretrained(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    text = (ROOT / DIGITS).read_text().replace("name: resnet_digits", f"name: hf.{tmp_path}")
    recipe.write_text(text.replace("  width: 16\n", "  weights: null\n"))
    (ended,) = run(["-f", str(recipe), "--plan", "algorithms=null"])
    assert ended["status"] == 0, ended["err"]
    assert "ViTForImageClassification" in ended["out"]
