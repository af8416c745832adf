"""A run of two ranks that loses one, or its launcher: all of it ends, and it goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from hosts import Hosts, needs_root
from ranks import needs_fsdp, run_ranks, start_ranks

from training.engines.ranks.forked import free_port

ROOT = Path(__file__).parents[2]
SCRIPT = "tests/faults/faulty_run.py"
pytestmark = [pytest.mark.timeout(590), pytest.mark.slow, pytest.mark.xdist_group("faults of ranks")]

LOST_AFTER_SECONDS = 5
ENGINES = {
    "ddp": [],
    "fsdp": ["parallelism.strategy=fsdp", "algorithms.sam=null"],
    "shards": ["parallelism.strategy=fsdp", "algorithms.sam=null", "checkpoints.sharded=true"],
    "deepspeed": ["parallelism.strategy=deepspeed", "algorithms.sam=null", "parallelism.sync_batchnorm=false",
                  "parallelism.deepspeed={zero_optimization: {stage: 2}}"],
}  # fmt: skip


def settings_of(engine: str, *, lost_after_seconds: float = LOST_AFTER_SECONDS) -> list[str]:
    return [*ENGINES[engine], "autoresume=true", "checkpoints.every_steps=10",
            f"parallelism.lost_rank_timeout_seconds={lost_after_seconds}"]  # fmt: skip


def undisturbed(runs: Any, engine: str) -> str:
    """The name of a run of two ranks under this engine."""
    name = f"whole {engine}"
    if not (runs.folder / name).exists():
        run_ranks(2, "run.py", *runs.arguments(name, *settings_of(engine)), timeout=250)
    return name


def goes_on(runs: Any, name: str, engine: str) -> None:
    """The same command again ends as the run that nothing happened to."""
    said = run_ranks(2, "run.py", *runs.arguments(name, *settings_of(engine)), timeout=250)
    assert "continuing after epoch" in said
    runs.assert_same_end(name, undisturbed(runs, "fsdp" if engine == "shards" else engine))


only_in_all = pytest.mark.exhaustive


@pytest.mark.parametrize(
    ("engine", "signal", "rank"),
    [
        pytest.param("ddp", "SIGKILL", 0, marks=only_in_all),
        pytest.param("ddp", "SIGKILL", 1, marks=only_in_all),
        pytest.param("fsdp", "SIGKILL", 1, marks=[needs_fsdp, only_in_all]),
        pytest.param("shards", "SIGKILL", 0, marks=[needs_fsdp, only_in_all]),
        pytest.param("deepspeed", "SIGKILL", 1, marks=only_in_all),
        pytest.param("ddp", "SIGSTOP", 0, marks=only_in_all),  # the one that serves the store
        ("ddp", "SIGSTOP", 1),
        pytest.param("fsdp", "SIGSTOP", 1, marks=[needs_fsdp, only_in_all]),
        pytest.param("deepspeed", "SIGSTOP", 1, marks=only_in_all),
    ],
)
def test_a_lost_rank_ends_with_the_other(runs: Any, engine: str, signal: str, rank: int) -> None:
    if engine == "deepspeed":
        pytest.importorskip("deepspeed")
    name = f"{engine} {signal} {rank}"
    fault = f"batch_end:35:{signal}:{rank}"
    statuses = [1, 1]
    statuses[rank] = -9  # a stopped rank is killed by the other
    said = run_ranks(2, SCRIPT, fault, *runs.arguments(name, *settings_of(engine)), timeout=250, statuses=statuses)
    message = "has heard nothing from rank" if signal == "SIGSTOP" else "lost another rank"
    (line,) = (line for line in said.splitlines() if line.startswith("run.py: "))
    assert line.startswith(f"run.py: rank {1 - rank} {message}")
    goes_on(runs, name, engine)


@needs_root
@pytest.mark.exhaustive
@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp", marks=needs_fsdp), "deepspeed"])
def test_ranks_that_are_cut_off_both_end(runs: Any, tmp_path: Path, engine: str) -> None:
    name = f"{engine} cut off"
    arguments = runs.arguments(name, *settings_of(engine))
    with Hosts() as hosts:
        ranks = hosts.start(tmp_path, "batch_end:35:cable:1", *arguments, script=SCRIPT)
        said = [rank.wait(150) for rank in ranks]
    assert [rank.process.exitcode for rank in ranks] == [1, 1], said
    for rank, text in enumerate(said):
        assert text.count("run.py: ") == 1, text
        assert f"run.py: rank {rank} has heard nothing from rank {1 - rank}" in text
    goes_on(runs, name, engine)


@pytest.mark.exhaustive
def test_both_stopped_for_a_while_go_on(runs: Any, tmp_path: Path) -> None:
    """As Ctrl-Z and fg do it, or a machine that was suspended: nobody is silent while nobody listens."""
    name, outputs = "paused", [tmp_path / "0", tmp_path / "1"]
    with start_ranks(
        SCRIPT, "batch_end:35:SIGSTOP", *runs.arguments(name, *settings_of("ddp")), outputs=outputs
    ) as ranks:
        both = [psutil.Process(rank.pid) for rank in ranks]
        wait_until(lambda: all(one.status() == psutil.STATUS_STOPPED for one in both), seconds=60)
        time.sleep(LOST_AFTER_SECONDS + 2)
        for one in both:
            one.resume()
        for rank in ranks:
            rank.join(100)
        assert [rank.exitcode for rank in ranks] == [0, 0], [path.read_text() for path in outputs]
    runs.assert_same_end(name, undisturbed(runs, "ddp"))


LAUNCHERS = {
    "composer": ["composer.cli.launcher", "-n", "2"],
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2"],
}


@pytest.mark.parametrize("launcher", ["composer", pytest.param("torchrun", marks=pytest.mark.exhaustive)])
def test_a_lost_launcher_costs_no_step_and_the_ports_are_this_machines(
    runs: Any, tmp_path: Path, launcher: str
) -> None:
    name, ports, mark = f"lost {launcher}", tmp_path / "ports", f"faults{os.getpid()}{launcher}"
    fault = f"batch_end:30:ports={ports}+launcher+pause=3:0"  # in which the ranks see that it is gone
    settings = settings_of("ddp", lost_after_seconds=40)  # torchrun's store is gone with it: time enough for a save
    started = launch(launcher, fault, *runs.arguments(name, *settings), mark=mark)
    assert started.returncode == -9, started.stderr
    wait_until(lambda: not processes_of(mark), seconds=60)
    assert runs.step(name) == 30
    listening = [address for line in ports.read_text().splitlines() for address in json.loads(line)]
    assert listening
    assert set(listening) == {"127.0.0.1"}
    goes_on(runs, name, "ddp")


@pytest.mark.exhaustive
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_whose_rank_is_stopped_leaves_nobody(runs: Any, launcher: str) -> None:
    name, mark = f"{launcher} SIGSTOP", f"faults{os.getpid()}{launcher}stopped"
    ended = launch(launcher, "batch_end:35:SIGSTOP:1", *runs.arguments(name, *settings_of("ddp")), mark=mark)
    assert ended.returncode not in (0, -9), ended.stderr
    assert ended.stderr.count("run.py: rank 0 has heard nothing from rank 1") == 1
    assert processes_of(mark) == []
    goes_on(runs, name, "ddp")


def launch(launcher: str, *arguments: str, mark: str) -> subprocess.CompletedProcess[str]:
    """`SCRIPT arguments...` under a launcher; its processes can be found by the mark."""
    port = ["--master-port" if launcher == "torchrun" else "--master_port", str(free_port())]
    command = [sys.executable, "-m", *LAUNCHERS[launcher], *port, SCRIPT, *arguments]
    environment = {**os.environ, "BRISK_FAULTS": mark}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)


def processes_of(mark: str) -> list[psutil.Process]:
    found = []
    for one in psutil.process_iter():
        try:
            if one.environ().get("BRISK_FAULTS") == mark and one.status() != psutil.STATUS_ZOMBIE:
                found.append(one)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def wait_until(holds: Any, *, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not so after {seconds:g} s"
        time.sleep(0.1)
