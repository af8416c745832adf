"""Write docs/composition.md: every algorithm, ours and Composer's, under every condition. Takes several minutes.

python scripts/composition.py
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "algos")]
import composition as runs  # noqa: E402

PAGE = ROOT / "docs" / "composition.md"
STRATEGIES = {"ddp": "DDP, 2 ranks", "fsdp": "FSDP2, 2 ranks"}
ROUNDING = 1e-10  # float64

HEADER = """# What composes with what

Each cell compares a whole run of a small ResNet in float64, on gloo ranks if there are several, with a plain run of the
same algorithm in one process: the largest difference of any final weight. **=** means a difference below 1e-10 (below
1e-5 under FSDP2, where Composer computes in float32), and after resuming no difference at all.

`tests/algos/test_every.py` checks the first table at every change, and `make composition` writes this page.
"""

NOTES = """
- Our algorithms that draw per rank (MixUp, CutMix, RandAugment, StochasticDepth) are compared with one process that
  makes both ranks' draws for the halves of its batch. The draws of Composer's cannot be set, so their cells under two
  ranks only say that they ran.
- Composer's algorithms make new layers in float32; these runs convert them. Ghost batch norm has the ResNet's own batch
  norms, in groups of two images, and microbatches of two; the other rows have group norms.
- These runs have no evaluation, during which Composer's EMA fails under FSDP2.
- Listed twice, our algorithms are refused before training, with a message that names them. Composer's act twice; a
  number is the resulting difference.
- Each pair of our algorithms is tested like each one alone (tests marked slow): microbatches, compiled, resumed in
  mid-epoch, DDP, FSDP2.
- Compiled means aot_eager, with kernels for each shape (`dynamic=False`).
"""


def main() -> None:
    """Run everything and write the page."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tables = {"Brisk": runs.SETS, "Composer 0.32.1": runs.composer_sets()}
    with tempfile.TemporaryDirectory() as folder:
        for strategy in STRATEGIES:
            _launch(strategy, Path(folder))
        text = [HEADER, *(line for title, sets in tables.items() for line in _table(title, sets, Path(folder))), NOTES]
    text.append(
        f"Made on {datetime.date.today()} with torch {torch.__version__}, Python {sys.version.split()[0]}, on a CPU.\n"
    )
    PAGE.write_text("\n".join(text))
    print(f"wrote {PAGE.relative_to(ROOT)}")


def _launch(strategy: str, folder: Path) -> None:
    (folder / strategy).mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = [str(ROOT / "tests" / "algos" / "composition.py"), strategy, str(folder / strategy), "sets", "composer"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*launcher, *script], cwd=ROOT, env=environment, timeout=900, check=False, capture_output=True, text=True
    )
    if done.returncode:
        print(f"{strategy}: ended with status {done.returncode}\n{done.stderr[-2000:]}", file=sys.stderr)


def _table(title: str, sets: dict[str, list[str]], folder: Path) -> list[str]:
    columns = ["microbatches", "compiled", *runs.STOPPED_AT, *STRATEGIES.values(), "listed twice"]
    lines = [f"## {title}", "", f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name, chosen in sets.items():
        print(f"{title}: {name}", file=sys.stderr)
        lines.append(f"| {name} | {' | '.join(_row(name, chosen, folder))} |")
    return [*lines, ""]


def _row(name: str, chosen: list[str], folder: Path) -> list[str]:
    try:
        reference = runs.train(chosen)
    except Exception as error:
        return [_failure(error)] * (3 + len(runs.STOPPED_AT) + len(STRATEGIES))
    cells = [
        _cell(lambda: runs.train(chosen, device_train_microbatch_size=2), reference, ROUNDING),
        _cell(lambda: _compiled(chosen), reference, ROUNDING),
    ]
    for moment in runs.STOPPED_AT.values():
        with tempfile.TemporaryDirectory() as checkpoints:
            cells.append(
                _cell(lambda m=moment, c=checkpoints: runs.train_interrupted(chosen, Path(c), moment=m), reference, 0.0)
            )
    cells += [_two_ranks(name, chosen, folder / strategy, strategy) for strategy in STRATEGIES]
    return [*cells, _twice(chosen, reference)]


def _twice(chosen: list[str], reference: dict[str, torch.Tensor]) -> str:
    try:
        difference = runs.furthest(runs.train_applied_twice(chosen), reference)
    except Exception as error:
        return "refused" if "twice" in str(error) else _failure(error)
    return "=" if difference <= ROUNDING else f"{difference:.0e}"


def _compiled(chosen: list[str]) -> dict[str, torch.Tensor]:
    torch._dynamo.reset()
    return runs.train(chosen, compile_config=runs.COMPILED)


def _two_ranks(name: str, chosen: list[str], folder: Path, strategy: str) -> str:
    refused = json.loads((folder / "refused.0.json").read_text()) if (folder / "refused.0.json").exists() else {}
    if name in refused:
        return refused[name]
    files = [folder / f"{name}.{rank}.pt" for rank in (0, 1)]
    if not all(file.exists() for file in files):
        return "crash"
    ranks = [torch.load(file) for file in files]
    drift = runs.furthest(*ranks)
    if drift:
        return f"ranks drift {drift:.0e}"
    if any(one.startswith("composer.") and one.removeprefix("composer.") in runs.DRAW_PER_RANK for one in chosen):
        return "runs"
    return _cell(lambda: runs.train(chosen, as_two_ranks=True), ranks[0], ROUNDING if strategy == "ddp" else 1e-5)


def _cell(run: Callable[[], dict[str, torch.Tensor]], reference: dict[str, torch.Tensor], tolerance: float) -> str:
    try:
        difference = runs.furthest(run(), reference)
    except Exception as error:
        return _failure(error)
    return "=" if difference <= tolerance else f"{difference:.0e}"


def _failure(error: Exception) -> str:
    return type(error).__name__


if __name__ == "__main__":
    main()
