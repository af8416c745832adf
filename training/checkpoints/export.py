"""Export a run's checkpoint, from any engine, to one .safetensors file that `model.weights` reads.

python -m training.checkpoints.export results/my_run weights.safetensors
python -m training.checkpoints.export results/my_run/checkpoints/best.pt weights.safetensors
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from training.checkpoints.weights import find_checkpoint, read_network_weights
from training.recipe import RecipeError


def export_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    averaged: bool = True,
    trust_checkpoint: bool = False,
) -> int:
    """Write the network's weights and buffers to `target`; returns the number of tensors.

    source: a run's folder, for its latest checkpoint, or a checkpoint file or folder.
    target: a new file whose name ends in .safetensors. It is written completely or not at all.
    averaged: write EMA's averages, which the run's evaluations used, instead of the weights, if there are any.
    trust_checkpoint: read the source with Python's unrestricted unpickler, which runs what it says.

    The tensors are contiguous, keep their training dtypes (ZeRO: float32) and have the network's own names.

    Raises RecipeError for a source that names code, and ValueError if the source is not a checkpoint, or the target
    exists or has another suffix.
    """
    from safetensors.torch import save_file

    checkpoint, target = find_checkpoint(source), Path(target)
    if target.suffix != ".safetensors":
        raise ValueError(f"{target} is no name of a .safetensors file; give one that ends so")
    if target.exists():
        raise ValueError(f"{target} is there already; remove it, or give another name")
    tensors, _ = read_network_weights(checkpoint, trust=trust_checkpoint, averaged=averaged)
    beside = target.with_name(f".{target.name}.tmp")
    try:
        save_file(tensors, beside)
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    return len(tensors)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m training.checkpoints.export", description=about)
    parser.add_argument("source", metavar="RUN", help="a run's folder, or one of its checkpoints")
    parser.add_argument("target", metavar="FILE.safetensors")
    parser.add_argument(
        "--trust-checkpoint", action="store_true", help="read a checkpoint that names code, and run what it says"
    )
    parser.add_argument("--not-averaged", action="store_true", help="the weights themselves, even if EMA averaged them")
    options = parser.parse_args(arguments)
    try:
        count = export_checkpoint(
            options.source,
            options.target,
            averaged=not options.not_averaged,
            trust_checkpoint=options.trust_checkpoint,
        )
    except (ValueError, OSError, ModuleNotFoundError, RecipeError) as error:
        print(f"export_checkpoint: {error}", file=sys.stderr)
        return 2
    print(f"{options.target}: {count} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
