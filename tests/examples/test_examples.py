"""Every example trains without Composer to a top-1 of at least 97 %."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
NEEDS = {"accelerate_loop": "accelerate", "fabric_loop": "lightning_fabric", "plain_pytorch": "torchvision"}

# Runs a script where nothing can import Composer, and its folder comes first, as for `python SCRIPT`.
RUN = """
import pathlib, runpy, sys
sys.path[0] = str(pathlib.Path(sys.argv[1]).parent)
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "composer":
            raise ModuleNotFoundError("No module named 'composer'", name="composer")
sys.meta_path.insert(0, Block())
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_an_example_learns_the_digits(script: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip(NEEDS[script.stem])
    # Composer, in other tests of this process, leaves the variables of a process group behind.
    launched = (
        "PYTHONPATH",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "NODE_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
    )
    inherited = {key: value for key, value in os.environ.items() if key not in launched}
    environment = inherited | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", RUN, str(script)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (top1,) = re.findall(r"^top-1: ([\d.]+)%$", done.stdout, flags=re.MULTILINE)
    assert float(top1) >= 97.0


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_an_example_is_short_and_in_the_table(script: Path) -> None:
    assert len(script.read_text().splitlines()) < 60
    assert f"({script.name})" in (EXAMPLES / "README.md").read_text()
