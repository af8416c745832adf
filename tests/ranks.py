"""Starts the ranks of a run on this machine, without the seconds that a launcher takes."""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


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
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests' / 'algos'}",
    }  # fmt: skip


def run_ranks(ranks: int, *arguments: str, timeout: float, statuses: Sequence[int] | None = None) -> str:
    """Run `python arguments...` as so many ranks; returns what they said.

    Raises AssertionError, which has that too, unless all end well.

    statuses: with what else each shall end; -9 is a kill.
    """
    starter = subprocess.Popen(
        [sys.executable, __file__, str(ranks), *arguments],
        cwd=ROOT, env=rank_environment(0, ranks, port=free_port()), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        said, _ = starter.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(starter.pid, signal.SIGKILL)
    ended = said.strip().rpartition("\n")[2]
    assert ended == f"ended with {list(statuses or [0] * ranks)}", said
    return said


def start_forked(ranks: int) -> int | None:
    """Import what every rank imports, once, and fork: each import of Composer costs ten seconds of a processor.

    Returns a rank's number in that rank, and None where all of them have ended.
    """
    from training.engines.lean_import import import_lean

    import_lean()  # as run.py does
    import composer  # noqa: F401
    import torchvision  # noqa: F401

    started = []
    for rank in range(ranks):
        process = os.fork()
        if process == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            return rank
        started.append(process)
    found = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in started]
    print(f"\nended with {found}", flush=True)
    return None


if __name__ == "__main__":
    script = sys.argv[2]
    if start_forked(int(sys.argv[1])) is not None:
        sys.argv[:] = sys.argv[2:]
        sys.path[0] = str((ROOT / script).parent)
        runpy.run_path(script, run_name="__main__")
