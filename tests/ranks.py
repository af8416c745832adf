"""Runs Python scripts, as one process or as the ranks of a run, without the import of Composer in each of them."""

from __future__ import annotations

import atexit
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from training.engines import ranks as forked

ROOT = Path(__file__).parents[1]
PATHS = tuple(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "algos")))
_ALSO_IMPORT = ("matplotlib.figure", "pytorch_optimizer", "sklearn.datasets", "training.cli")
_OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")


def run_ranks(ranks: int, *arguments: str, timeout: float, statuses: Sequence[int] | None = None) -> str:
    """Run `python arguments...` as so many ranks; returns what they said.

    Raises AssertionError, which has that too, unless all end well.

    statuses: with what else each shall end; -9 is a kill.
    """
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder, "said")
        ended = _run(ranks, arguments, said, None, os.environ, timeout)
        text = said.read_text(errors="replace")
    assert ended == list(statuses or [0] * ranks), f"{text}\nended with {ended}"
    return text


def run_python(
    *arguments: str, timeout: float, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python arguments...` as a process that no launcher started; returns its status and what it said.

    arguments: `script.py ...`, `-m module ...` or `-c code ...`.
    environment: beside that of this process.
    """
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
        (status,) = _run(1, arguments, stdout, stderr, {**os.environ, **(environment or {})}, timeout)
        texts = [path.read_text(errors="replace") for path in (stdout, stderr)]
    assert status is not None, f"{arguments} was not done after {timeout:g} s:\n{texts[1]}"
    return subprocess.CompletedProcess(arguments, status, *texts)


def _run(
    ranks: int, arguments: Sequence[str], stdout: Path, stderr: Path | None, environment: Mapping[str, str],
    timeout: float,
) -> list[int | None]:  # fmt: skip
    """What each rank ended with; None if it was still running after `timeout` seconds."""
    with forked.local_ranks(
        _python, arguments, stderr, outputs=[stdout] * ranks, environment=environment, also_import=_ALSO_IMPORT
    ) as processes:
        end = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        return [process.exitcode for process in processes]


def _python(arguments: Sequence[str], stderr: Path | None) -> int:
    """What the interpreter does with its arguments, to the functions that are due at its exit."""
    if stderr is not None:  # nobody launched this process
        with open(stderr, "wb") as file:
            os.dup2(file.fileno(), sys.stderr.fileno())
        for name in _OF_A_LAUNCHER:
            del os.environ[name]
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
