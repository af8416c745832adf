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

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader

from models.weights import read_weights
from training.checkpoints.reading import check_checkpoint, reading
from training.checkpoints.sharded import is_sharded, reader_of
from training.checkpoints.zero import is_zero, read_zero_weights
from training.recipe import RecipeError

_PREFIX = "module."  # of the network within ImageClassifier


def export_checkpoint(
    source: str | os.PathLike[str], target: str | os.PathLike[str], *, trust_checkpoint: bool = False
) -> int:
    """Write the network's weights and buffers to `target`; returns the number of tensors.

    source: a run's folder, for its latest checkpoint, or a checkpoint file or folder.
    target: a new file whose name ends in .safetensors. It is written completely or not at all.
    trust_checkpoint: read the source with Python's unrestricted unpickler, which runs what it says.

    The tensors are contiguous, keep their training dtypes (ZeRO: float32) and have the network's own names.

    Raises RecipeError for a source that names code, and ValueError if the source is not a checkpoint, or the target
    exists or has another suffix.
    """
    from safetensors.torch import save_file

    checkpoint, target = _find(Path(source)), Path(target)
    if target.suffix != ".safetensors":
        raise ValueError(f"{target} is no name of a .safetensors file; give one that ends so")
    if target.exists():
        raise ValueError(f"{target} is there already; remove it, or give another name")
    if not trust_checkpoint:
        check_checkpoint(checkpoint)
    with reading(checkpoint, trust=trust_checkpoint):
        read = _read(checkpoint, trust_checkpoint)
    tensors = {name.removeprefix(_PREFIX): value.contiguous() for name, value in read.items()}
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
    options = parser.parse_args(arguments)
    try:
        count = export_checkpoint(options.source, options.target, trust_checkpoint=options.trust_checkpoint)
    except (ValueError, OSError, ModuleNotFoundError, RecipeError) as error:
        print(f"export_checkpoint: {error}", file=sys.stderr)
        return 2
    print(f"{options.target}: {count} tensors")
    return 0


def _find(source: Path) -> Path:
    latest = source / "checkpoints" / "latest.pt"
    path = latest if latest.exists() else source
    if path.is_file() or is_zero(path) or is_sharded(path):
        return path
    raise ValueError(f"{source} is no checkpoint, and no run's folder that holds one; give results/RUN")


def _read(checkpoint: Path, trust: bool) -> dict[str, Tensor]:
    if is_zero(checkpoint):
        return read_zero_weights(checkpoint)
    if is_sharded(checkpoint):
        return _read_shards(checkpoint, reader_of(trust))
    return read_weights(str(checkpoint), trust=trust)


def _read_shards(folder: Path, reader: type[FileSystemReader]) -> dict[str, Tensor]:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    entries = reader(folder).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }
    load(tensors, storage_reader=reader(folder), no_dist=True)
    return {name.removeprefix("model."): value for name, value in tensors.items()}


if __name__ == "__main__":
    sys.exit(main())
