"""Starts the ranks of a run on this machine, without a launcher's seconds."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[3]


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environment(rank: int, ranks: int, *, port: int) -> dict[str, str]:
    """What a launcher would set."""
    return {
        **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'algos'}",
    }  # fmt: skip


def run_ranks(ranks: int, *arguments: str, timeout: float, statuses: Sequence[int] | None = None) -> None:
    """Run `python arguments...` as so many ranks. Raises AssertionError with what they said unless all end well.

    statuses: with what else each shall end; -9 is a kill.
    """
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=rank_environment(rank, ranks, port=port),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == list(statuses or [0] * ranks), "\n".join(said)
