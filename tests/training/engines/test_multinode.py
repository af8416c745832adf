"""Two machines, as two connected network namespaces, train as two local ranks do, and neither outlives the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hosts import Hosts, ip, needs_root
from ranks import run_ranks

from training.engines.ranks.peers import Silence, describe_lost_rank

SHORT = ["-f", "yamls/digits_medium.yaml", "algorithms=null", "schedule.warmup_epochs=0", "parallelism.strategy=ddp"]


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with Hosts() as hosts:
        yield hosts


def losses(run_dir: Path) -> np.ndarray:
    with np.load(run_dir / "metrics.npz") as file:
        return file["step_loss"]


def wait_until(holds: Callable[[], bool], *, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not so after {seconds:g} s"
        time.sleep(0.1)


@needs_root
@pytest.mark.slow
@pytest.mark.timeout(280)
def test_two_hosts_train_what_two_local_ranks_do(hosts: Hosts, tmp_path: Path) -> None:
    common = [*SHORT, "duration.epochs=1", f"results_dir={tmp_path}", f"data.cache_dir={tmp_path / 'cache'}"]
    over_tcp = [host.wait(130) for host in hosts.start(tmp_path, *common, "run_name=hosts")]
    assert (tmp_path / "hosts" / "metrics.npz").exists(), over_tcp
    run_ranks(2, "run.py", *common, "run_name=local", timeout=130)
    assert len(losses(tmp_path / "local")) == 22
    np.testing.assert_array_equal(losses(tmp_path / "hosts"), losses(tmp_path / "local"))


@needs_root
@pytest.mark.slow
@pytest.mark.timeout(290)
@pytest.mark.parametrize("loss", [pytest.param("process killed", marks=pytest.mark.exhaustive), "cable cut"])
def test_losing_a_host_ends_the_other_and_the_same_command_goes_on(hosts: Hosts, tmp_path: Path, loss: str) -> None:
    common = [*SHORT, f"results_dir={tmp_path}", f"data.cache_dir={tmp_path / 'cache'}", "run_name=run",
              "autoresume=true", "checkpoints.every_steps=5"]  # fmt: skip
    first, second = hosts.start(tmp_path, *common, "duration.epochs=4000")
    wait_until((tmp_path / "run" / "checkpoints" / "latest.pt").exists, seconds=130)
    if loss == "process killed":
        second.process.kill()
    else:
        hosts.cut_the_cable()
    said = first.wait(60)
    assert first.process.exitcode == 1, said
    message = [line for line in said.splitlines() if line.startswith("run.py: ")]
    assert len(message) == 1, said
    assert "Traceback" not in said
    assert "autoresume=true" in message[0]
    if loss == "cable cut":
        said = second.wait(60)
        assert second.process.exitcode == 1
        assert "has heard nothing from rank 0" in said
        ip("-n", hosts.names[1], "link", "set", "veth0", "up")
    again, _ = hosts.start(tmp_path, *common, "duration.epochs=4000")
    wait_until(lambda: "continuing after epoch" in again.said(), seconds=130)
    assert "loss" not in again.said().partition("continuing after epoch")[0]  # it trained nothing before


def test_silence_is_measured_by_change_and_not_by_clocks() -> None:
    silence = Silence()
    silence.note({0: "here 0", 1: "there 7", 2: "far 3"}, now=100.0)
    silence.note({0: "here 1", 1: "there 7", 2: "far 4"}, now=130.0)
    assert silence.longer_than(29, now=130.0) == {1: "there"}
    assert silence.longer_than(30, now=130.0) == {}
    silence.note({1: "there done"}, now=131.0)
    assert silence.longer_than(5, now=200.0) == {2: "far"}


def test_a_standstill_of_ones_own_is_no_silence_of_the_others() -> None:
    silence = Silence()
    silence.note({0: "here 0", 1: "there 7"}, now=100.0)
    silence.leave_out(50, now=152.0)
    assert silence.longer_than(5, now=152.0) == {}
    silence.leave_out(50, now=153.0)  # never beyond the present
    assert silence.longer_than(5, now=160.0) == {1: "there"}


def test_only_a_lost_connection_is_called_one(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = RuntimeError(
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]"
    )
    assert describe_lost_rank(closed) is None  # one process has no other
    monkeypatch.setattr("composer.utils.dist.get_world_size", lambda: 2)
    assert "Connection closed by peer" in str(describe_lost_rank(closed))
    assert describe_lost_rank(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
