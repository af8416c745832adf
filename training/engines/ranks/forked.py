"""Starts the ranks of a run on this machine, forked from one process that has imported Composer.

An import of Composer takes 7 to 12 CPU-seconds, and two ranks under each of five engines need nine of them. Python's
fork server imports it once, and a rank then starts in milliseconds. On a machine with a GPU each rank is a fresh
process instead, since CUDA does not work after a fork from a process that has looked for a GPU.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch


@contextlib.contextmanager
def local_ranks(
    target: Callable[..., int | None],
    *arguments: object,
    outputs: Sequence[Path],
    environment: Mapping[str, str],
    also_import: Sequence[str] = (),
) -> Iterator[list[BaseProcess]]:
    """Run `target(*arguments)` on as many ranks as there are `outputs`; any exit from the block kills what still runs.

    Each rank leads a session of its own, appends both its outputs to its file, and ends with the status that `target`
    returns, or with this process. A module must hold `target` by its name.

    environment: replaces that of this process.
    also_import: modules that the ranks share if this is the first call in this process, beside Composer.
    """
    context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    context.set_forkserver_preload(["training.engines.ranks.preload", *also_import])
    common = {
        **environment, "WORLD_SIZE": str(len(outputs)), "LOCAL_WORLD_SIZE": str(len(outputs)), "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    processes: list[BaseProcess] = []
    try:
        for rank, output in enumerate(outputs):
            own = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(context.Process(target=_run, args=(target, arguments, own, output)))
            processes[-1].start()
        yield processes
    finally:
        for process in processes:
            if process.pid is None:
                continue
            with contextlib.suppress(ProcessLookupError):  # it has ended, or leads no session yet
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def _run(
    target: Callable[..., int | None], arguments: tuple[object, ...], environment: Mapping[str, str], output: Path
) -> None:
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(output, "ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # data loaders start their workers in the usual way
    if "OMP_NUM_THREADS" in environment:  # libgomp has read the variable in the process that this one was forked from
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.exit(target(*arguments))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.killpg(0, signal.SIGKILL)
