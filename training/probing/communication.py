"""Measures how long local ranks take to add up a run's gradients."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from training.engines.ranks.forked import local_ranks
from training.loopback import join_ranks

_BUCKET_BYTES = 25_000_000  # DDP's
_ROUNDS = 5
_TIMEOUT_SECONDS = 120.0


def all_reduce_seconds(*, num_parameters: int, ranks: int, on_gpu: bool) -> float | None:
    """Median seconds to all-reduce float32 gradients between `ranks` processes of this machine.

    None if this machine cannot tell: fewer GPUs or CPU cores than ranks, or no answer in time.
    """
    if ranks > (torch.cuda.device_count() if on_gpu else os.cpu_count() or 1):
        return None
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / f"{rank}.log" for rank in range(ranks)]
        answer = Path(folder) / "seconds.json"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with local_ranks(_measure, num_parameters, on_gpu, answer, outputs=outputs, environment=environment) as started:
            deadline = time.monotonic() + _TIMEOUT_SECONDS
            for process in started:
                process.join(max(0.0, deadline - time.monotonic()))
        return json.loads(answer.read_text()) if answer.exists() else None


def _measure(num_parameters: int, on_gpu: bool, answer: Path) -> int:
    from torch import distributed

    rank = int(os.environ["RANK"])
    if on_gpu:
        torch.cuda.set_device(rank)
    join_ranks("nccl" if on_gpu else "gloo", timeout_seconds=_TIMEOUT_SECONDS)
    left, buckets = num_parameters, []
    while left > 0:
        buckets.append(torch.zeros(min(left, _BUCKET_BYTES // 4), device="cuda" if on_gpu else "cpu"))
        left -= buckets[-1].numel()
    taken = []
    for _ in range(_ROUNDS + 1):
        distributed.barrier()
        started = time.perf_counter()
        for bucket in buckets:
            distributed.all_reduce(bucket)
        if on_gpu:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    if rank == 0:
        answer.write_text(json.dumps(statistics.median(taken[1:])))  # the first connects
    distributed.destroy_process_group()
    return 0
