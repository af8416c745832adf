"""run.py's import of Composer skips what it should, and that can still be imported when needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
HEAVY = ("transformers", "scipy", "matplotlib", "gql", "prompt_toolkit")

pytestmark = pytest.mark.timeout(120)


def run(script: str, *arguments: str) -> None:
    """Run `script` in a process of its own, which has imported none of it yet."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr


def test_run_py_trains_without_what_composer_imports_for_others(tmp_path: Path) -> None:
    run(
        f"""
import sys
from training.cli import main
# The checkpoint is looked for when everything that training imports is there.
status = main(["-f", "yamls/digits_medium.yaml", "load=/nowhere/a.pt", "results_dir=" + sys.argv[1]])
assert status == 2, status
assert "composer.trainer" in sys.modules
from composer.algorithms import SelectiveBackprop  # which Composer's engine imports when it begins
found = {{name for name in {HEAVY} if name in sys.modules}}
assert not found, found
""",
        str(tmp_path),
    )


def test_metrics_find_it_absent_and_nobody_else_does() -> None:
    run(
        f"""
import sys
from training.engines.lean_import import import_lean
import_lean()
import_lean()
import torch, torchmetrics
assert not set({HEAVY}) & set(sys.modules)
from torchmetrics.utilities.imports import _MATPLOTLIB_AVAILABLE, _TORCHVISION_AVAILABLE, _TRANSFORMERS_AVAILABLE
assert not _MATPLOTLIB_AVAILABLE and not _TRANSFORMERS_AVAILABLE and _TORCHVISION_AVAILABLE
accuracy = torchmetrics.classification.MulticlassAccuracy(num_classes=3, average="micro")
assert accuracy(torch.eye(3), torch.tensor([0, 1, 1])) == torch.tensor(2 / 3)
assert torchmetrics.__spec__.loader is torchmetrics.__loader__
assert type(torchmetrics.__loader__).__name__ == "SourceFileLoader"

from lightning_utilities.core.imports import RequirementCache, package_available
assert RequirementCache("matplotlib>=3.0") and package_available("scipy")
"""
    )


@pytest.mark.parametrize("use", ["update = mcli.update_run_metadata", "from mcli.api.runs import update_run_metadata"])
def test_the_platform_is_imported_when_it_is_used(use: str) -> None:
    run(
        f"""
import sys
from training.engines.lean_import import import_lean
import_lean()
import mcli
assert "gql" not in sys.modules
{use}
assert "gql" in sys.modules
import mcli as itself
assert itself is not mcli and itself.__file__
assert mcli.update_run_metadata is itself.update_run_metadata
"""
    )
