"""Ranks started here: their environment and output, and that none outlives the block or the process that started it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from training.engines.ranks.forked import local_ranks

ROOT = Path(__file__).parents[3]
STARTS = """
import os, sys
from pathlib import Path
import test_local_ranks as tests
from training.engines.ranks.forked import local_ranks
folder = Path(sys.argv[1])
with local_ranks(tests.wait, folder, outputs=[folder / "0", folder / "1"], environment=os.environ) as ranks:
    ranks[0].join()
"""


def describe(folder: Path) -> int:
    """Tell what this rank is, and what it was given."""
    rank = int(os.environ["RANK"])
    print("of", os.environ["WORLD_SIZE"], flush=True)
    os.system("echo its children say >&2")
    told = [os.environ.get("GIVEN"), torch.get_num_threads(), multiprocessing.get_start_method(), os.getsid(0)]
    (folder / f"{rank}.told").write_text(repr(told))
    return 5 * rank


def wait(folder: Path) -> None:
    """Write this rank's number and do nothing more."""
    (folder / f"pid{os.environ['RANK']}").write_text(str(os.getpid()))
    time.sleep(100)


def numbers(folder: Path) -> list[int]:
    """The process numbers of two ranks that wait."""
    paths = [folder / f"pid{rank}" for rank in (0, 1)]
    end = time.monotonic() + 90
    while not all(path.exists() and path.read_text() for path in paths):
        assert time.monotonic() < end, "no ranks were started"
        time.sleep(0.05)
    return [int(path.read_text()) for path in paths]


def gone(number: int, *, seconds: float) -> bool:
    try:
        psutil.Process(number).wait(seconds)
    except psutil.NoSuchProcess:
        pass
    except psutil.TimeoutExpired:
        return False
    return True


@pytest.mark.timeout(100)
@pytest.mark.parametrize("has_gpu", [False, True], ids=["forked", "fresh"])
def test_a_rank_has_its_environment_its_output_and_its_status(
    has_gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)  # in this process, which chooses how they start
    outputs = [tmp_path / "0", tmp_path / "1"]
    environment = {**os.environ, "GIVEN": "so", "OMP_NUM_THREADS": "2"}
    with local_ranks(describe, tmp_path, outputs=outputs, environment=environment) as processes:
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 5]
        own = [process.pid for process in processes]
    usual = multiprocessing.get_start_method()
    assert [(tmp_path / f"{rank}.told").read_text() for rank in (0, 1)] == [repr(["so", 2, usual, pid]) for pid in own]
    assert [output.read_text() for output in outputs] == ["of 2\nits children say\n"] * 2


@pytest.mark.timeout(100)
def test_none_outlives_the_block(tmp_path: Path) -> None:
    outputs = [tmp_path / "0", tmp_path / "1"]
    with contextlib.suppress(RuntimeError), local_ranks(wait, tmp_path, outputs=outputs, environment=os.environ):
        ranks = numbers(tmp_path)
        raise RuntimeError("enough")
    assert all(gone(number, seconds=0) for number in ranks)


@pytest.mark.timeout(150)
def test_none_outlives_a_process_that_is_killed(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    with subprocess.Popen([sys.executable, "-c", STARTS, str(tmp_path)], env=environment) as starter:
        try:
            ranks = numbers(tmp_path)
        finally:
            starter.kill()
    assert all(gone(number, seconds=20) for number in ranks)
