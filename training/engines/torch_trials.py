"""What the torch at hand can do, found by trying it, since its number says it only for versions that somebody tried.

Each function says what 2.6.0, 2.7.0 and 2.15.0 do on a CPU. No other file depends on a version. What is always worked
around, since that costs nothing, and was seen on all three: loading a full optimizer state raises KeyError for a key
that a parameter group lacks (LikeDDP adds it); a checkpointed block with context_fn does not compile
(models/checkpointing.py). Seen on 2.7.0 alone: inductor with dynamic shapes fails at the second image size of a ResNet
(training/engines/composer.py compiles each size).
"""

from __future__ import annotations

import datetime
import functools
from typing import Any

import torch
from torch import distributed
from torch.distributed import ReduceOp


def fsdp2_runs_on_cpu() -> bool:
    """Whether FSDP2's events, which order its copies, exist on CPUs: not in 2.6."""
    return hasattr(torch.cpu.Stream, "record_event")


@functools.cache
def gloo_averages() -> bool:
    """Whether an all-reduce on gloo takes ReduceOp.AVG, as replicas of shards need: 2.15 does, 2.7 raises."""
    if not distributed.is_gloo_available():
        return False
    store = distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]: documented, not listed
    alone: Any = distributed.ProcessGroupGloo(store, 0, 1, datetime.timedelta(seconds=10))
    options = distributed.AllreduceOptions()
    options.reduceOp = ReduceOp.AVG
    try:
        alone.allreduce([torch.ones(1)], options).wait()
    except RuntimeError:
        return False
    return True


def reduce_scatter_sums(device: torch.device) -> bool:
    """Whether a reduce-scatter with ReduceOp.AVG over all ranks returns the sum; on gloo 2.7's does, pytorch#162338."""
    ones, mean = torch.ones(distributed.get_world_size(), device=device), torch.empty(1, device=device)
    distributed.reduce_scatter_tensor(mean, ones, op=ReduceOp.AVG)
    return mean.item() != 1
