"""Runs Python scripts, as one process or as the ranks of a run, without the import of Composer in each of them."""

from __future__ import annotations

import atexit
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

import pytest
from torch import distributed
from torch._C._distributed_c10d import HashStore

from training.engines.ranks import forked
from training.engines.torch_trials import fsdp2_runs_on_cpu

needs_fsdp = pytest.mark.skipif(not fsdp2_runs_on_cpu(), reason="this torch runs FSDP2 on GPUs alone")
ROOT = Path(__file__).parents[1]
PATHS = tuple(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "algos")))
_ALSO_IMPORT = (
    "composer.algorithms", "deepspeed.runtime.zero.muon.original_muon", "matplotlib.figure", "pytorch_optimizer",
    "sklearn.datasets", "training.cli",
)  # fmt: skip
_OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")


def run_ranks(ranks: int, *arguments: str, timeout: float, statuses: Sequence[int] | None = None) -> str:
    """Run `python arguments...` as so many ranks; returns what they said.

    Raises AssertionError, which has that too, unless all end well.

    statuses: with what else each shall end; -9 is a kill.
    """
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder, "said")
        with start_ranks(*arguments, outputs=[said] * ranks) as processes:
            ended = _statuses(processes, timeout)
        text = said.read_text(errors="replace")
    assert ended == list(statuses or [0] * ranks), f"{text}\nended with {ended}"
    return text


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    made = not distributed.is_initialized()  # a Trainer may have made it
    numbers = {"RANK": "0", "LOCAL_RANK": "0", "NODE_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    with mock.patch.dict(os.environ, numbers):
        if made:
            distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        try:
            yield
        finally:
            if made:
                distributed.destroy_process_group()


def run_python(
    *arguments: str, timeout: float, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python arguments...` as a process that no launcher started; returns its status and what it said.

    arguments: `script.py ...`, `-m module ...` or `-c code ...`.
    environment: beside that of this process.
    """
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
        environment = {**os.environ, **(environment or {})}
        with _start(arguments, stderr, None, outputs=[stdout], environment=environment) as processes:
            (status,) = _statuses(processes, timeout)
        texts = [path.read_text(errors="replace") for path in (stdout, stderr)]
    assert status is not None, f"{arguments} was not done after {timeout:g} s:\n{texts[1]}"
    return subprocess.CompletedProcess(arguments, status, *texts)


def start_ranks(
    *arguments: str, outputs: Sequence[Path], before: Callable[[], None] | None = None
) -> AbstractContextManager[list[BaseProcess]]:
    """`python arguments...` as one rank for each of `outputs`, until the block ends; each calls `before` first."""
    return _start(arguments, None, before, outputs=outputs, environment=os.environ)


def _start(
    *given: object, outputs: Sequence[Path], environment: Mapping[str, str]
) -> AbstractContextManager[list[BaseProcess]]:
    return forked.local_ranks(_python, *given, outputs=outputs, environment=environment, also_import=_ALSO_IMPORT)


def _statuses(processes: Sequence[BaseProcess], timeout: float) -> list[int | None]:
    """What each ends with; None for one that is still running after `timeout` seconds."""
    end = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    return [process.exitcode for process in processes]


def _python(arguments: Sequence[str], stderr: Path | None, before: Callable[[], None] | None) -> int:
    """What the interpreter does with its arguments, to the functions that are due at its exit."""
    if stderr is not None:  # nobody launched this process
        with open(stderr, "wb") as file:
            os.dup2(file.fileno(), sys.stderr.fileno())
        for name in _OF_A_LAUNCHER:
            del os.environ[name]
    if before is not None:
        before()
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = os.pathsep.join(PATHS)
    first, *rest = arguments
    try:
        if first == "-c":
            sys.path[:0], sys.argv[:] = ["", *PATHS], ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        elif first == "-m":
            sys.path[:0], sys.argv[:] = PATHS, rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[:0], sys.argv[:] = [str((ROOT / first).parent), *PATHS], list(arguments)
            runpy.run_path(str(ROOT / first), run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out
    return 0
