"""A rank of test_ddp.py: trains sets of algorithms with Composer's Trainer and its DDP, and in this project's ways.

    ddp_ranks.py WAYS [NAMES]       both with commas

views: gradients that are views of DDP's buffers. bf16, fp16: and travel in that type. steps: StepTrainer, with the
callbacks of a run. Rank 0 prints, for each set, how far the weights of each way end up from Composer's, and which
collectives a step of Composer's Trainer and of StepTrainer makes beside DDP's: {"distances": ..., "collectives": ...}.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Trainer
from composer.utils import dist, get_device
from composition import SETS, furthest, train
from watched_steps import callbacks_of_a_run, watch

from training.engines.ddp import composer_wraps_so
from training.engines.trainer import StepTrainer
from training.recipe.keys import Compression

_TYPES: dict[str, Compression | None] = {"views": None, "steps": None, "bf16": "bf16", "fp16": "fp16"}


def main(ways: list[str], names: list[str]) -> None:
    """Compare the `ways` for each set of SETS in `names`; all, if none is named."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.initialize_dist(get_device("cpu"), timeout=120.0)
    distances: dict[str, dict[str, float]] = {}
    for name in names or SETS:
        microbatches: dict[str, Any] = {} if name == "ema" else {"device_train_microbatch_size": 2}
        expected = train(SETS[name], **microbatches)
        distances[name] = {}
        for way in ways:
            settings = dict(microbatches)
            if way == "steps":
                settings["kind"] = partial(StepTrainer, drop_last=True)
            with composer_wraps_so(_TYPES[way]):
                distances[name][way] = furthest(train(SETS[name], **settings), expected)
    collectives = {kind.__name__: _collectives(kind) for kind in (Trainer, StepTrainer)}
    if dist.get_global_rank() == 0:
        print(json.dumps({"distances": distances, "collectives": collectives}))


def _collectives(kind: type[Trainer]) -> dict[str, int]:
    """Place -> collectives of a step in mid-epoch that Python starts."""
    made = partial(StepTrainer, drop_last=True) if kind is StepTrainer else kind
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        gpu, _ = watch(patch, [], callbacks_of_a_run(Path(folder)), last_step=3, kind=made)
    counts = Counter(f"{note.where} {note.operation}" for note in gpu.collectives if note.step == 2)
    return dict(sorted(counts.items()))


if __name__ == "__main__":
    main(sys.argv[1].split(","), sys.argv[2].split(",") if len(sys.argv) > 2 else [])
