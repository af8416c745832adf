"""A run that is told to stop, or killed, goes on later as if nothing had been."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from ranks import run_ranks

pytestmark = [pytest.mark.timeout(200), pytest.mark.slow, pytest.mark.xdist_group("faults")]


@pytest.mark.parametrize(
    ("number", "fault", "step"),
    [
        pytest.param(signal.SIGTERM, "batch_end:7:SIGTERM", 7, marks=pytest.mark.exhaustive),
        (signal.SIGTERM, "before_forward:30:SIGTERM", 30),  # in the middle of a step, which is finished
        pytest.param(signal.SIGUSR1, "batch_end:43:SIGUSR1", 43, marks=pytest.mark.exhaustive),
        (signal.SIGUSR1, "batch_end:9:SIGUSR1+SIGTERM+SIGTERM", 9),  # as SLURM does it
        pytest.param(
            signal.SIGTERM, "batch_end:22:SIGTERM", 22, marks=pytest.mark.exhaustive
        ),  # an epoch's last step: its evaluation is done first
        (signal.SIGTERM, "eval_batch_end:1:SIGTERM", 22),
    ],
)
def test_a_signal_costs_no_step(runs: Any, number: int, fault: str, step: int) -> None:
    name = fault.replace(":", "-").replace("+", "-")
    stopped = runs.start(name, "autoresume=true", fault=fault)
    assert stopped.returncode == 128 + number, stopped.stderr
    assert stopped.stderr.count("run.py: stopped; load=latest with the same command continues") == 1
    assert runs.step(name) == step
    again = runs.start(name, "autoresume=true")
    assert again.returncode == 0, again.stderr
    assert f"step {step}" in again.stdout
    runs.assert_same_end(name, "whole")


def test_a_step_that_never_ends_is_not_waited_for(runs: Any) -> None:
    stopped = runs.start("hangs", fault="before_forward:30:SIGTERM")
    assert stopped.returncode == 143, stopped.stderr
    hung = runs.start("hangs", "checkpoints.stop_seconds=0.5", "load=latest", fault="before_forward:3:SIGTERM+hang")
    assert hung.returncode == 143, hung.stderr
    assert "no checkpoint could be written within 0.5 s of SIGTERM; the last one before it is whole" in hung.stderr
    assert runs.step("hangs") == 30
    again = runs.start("hangs", "load=latest")
    assert again.returncode == 0, again.stderr
    runs.assert_same_end("hangs", "whole")


@pytest.mark.exhaustive
@pytest.mark.parametrize("fault", ["batch_end:7:SIGKILL", "eval_batch_end:2:SIGKILL", "epoch_checkpoint:2:SIGKILL"])
def test_a_kill_costs_an_epoch_at_most(runs: Any, fault: str) -> None:
    name = fault.replace(":", "-")
    killed = runs.start(name, "autoresume=true", fault=fault)
    assert killed.returncode == -signal.SIGKILL
    again = runs.start(name, "autoresume=true")
    assert again.returncode == 0, again.stderr
    runs.assert_same_end(name, "whole")


def test_a_signal_before_the_first_checkpoint_says_so(runs: Any) -> None:
    stopped = runs.start("early", fault="fit_start:1:SIGTERM")
    assert stopped.returncode == 143
    assert "stopped; there is no checkpoint yet, so the same command begins anew" in stopped.stderr


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.exhaustive), 1])
def test_a_signal_to_one_rank_stops_both_at_the_same_step(runs: Any, rank: int) -> None:
    name = f"ranks{rank}"
    script = ["tests/faults/faulty_run.py", f"before_forward:7:SIGTERM:{rank}", *runs.arguments(name)]
    said = run_ranks(2, *script, timeout=150, statuses=[143, 143])
    assert said.count("stopped; load=latest") == 1
    assert runs.step(name) == 7
