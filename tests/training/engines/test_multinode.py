"""Two machines, as two connected network namespaces, train as two local ranks do, and neither outlives the other."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ranks import ROOT, rank_environment, run_ranks

from training.engines.peers import Silence, describe_lost_rank

PORT = 29500  # within the namespaces, which nothing else lives in
SHORT = ["-f", "yamls/digits_medium.yaml", "algorithms=null", "schedule.warmup_epochs=0", "parallelism.strategy=ddp"]
needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and iproute2"
)


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20)
    if done.returncode:
        pytest.skip(f"this kernel does not let us: ip {' '.join(words)}: {done.stderr.strip()}")


class Hosts:
    """Two namespaces with a veth pair between them, and what runs in them."""

    def __init__(self) -> None:
        self.names = [f"brisk{os.getpid()}{letter}" for letter in "ab"]
        self.processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Hosts:
        try:
            for name in self.names:
                ip("netns", "add", name)
            ip("link", "add", "veth0", "netns", self.names[0], "type", "veth", "peer", "veth0", "netns", self.names[1])
            for number, name in enumerate(self.names, start=1):
                ip("-n", name, "addr", "add", f"10.99.0.{number}/24", "dev", "veth0")
                for device in ("lo", "veth0"):
                    ip("-n", name, "link", "set", device, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=20)
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=20)

    def start(self, *arguments: str) -> list[subprocess.Popen[str]]:
        """One rank a host, which find each other by the environment, over TCP."""
        started = []
        for rank, name in enumerate(self.names):
            environment = {
                **rank_environment(rank, 2, port=PORT), "MASTER_ADDR": "10.99.0.1", "GLOO_SOCKET_IFNAME": "veth0",
                "NODE_RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
            }  # fmt: skip
            started.append(start(["ip", "netns", "exec", name, sys.executable, "run.py", *arguments], environment))
        self.processes += started
        return started

    def cut_the_cable(self) -> None:
        ip("-n", self.names[1], "link", "set", "veth0", "down")


def start(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with Hosts() as hosts:
        yield hosts


def losses(run_dir: Path) -> np.ndarray:
    with np.load(run_dir / "metrics.npz") as file:
        return file["step_loss"]


def wait_for(path: Path, *, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.1)


@needs_root
@pytest.mark.slow
@pytest.mark.timeout(280)
def test_two_hosts_train_what_two_local_ranks_do(hosts: Hosts, tmp_path: Path) -> None:
    common = [*SHORT, "duration.epochs=1", f"results_dir={tmp_path}", f"data.cache_dir={tmp_path / 'cache'}"]
    over_tcp = [process.communicate(timeout=130) for process in hosts.start(*common, "run_name=hosts")]
    assert (tmp_path / "hosts" / "metrics.npz").exists(), over_tcp
    run_ranks(2, "run.py", *common, "run_name=local", timeout=130)
    assert len(losses(tmp_path / "local")) == 22
    np.testing.assert_array_equal(losses(tmp_path / "hosts"), losses(tmp_path / "local"))


@needs_root
@pytest.mark.slow
@pytest.mark.timeout(290)
@pytest.mark.parametrize("loss", ["process killed", "cable cut"])
def test_losing_a_host_ends_the_other_and_the_same_command_goes_on(hosts: Hosts, tmp_path: Path, loss: str) -> None:
    common = [*SHORT, f"results_dir={tmp_path}", f"data.cache_dir={tmp_path / 'cache'}", "run_name=run",
              "autoresume=true", "checkpoints.every_steps=5"]  # fmt: skip
    first, second = hosts.start(*common, "duration.epochs=4000")
    wait_for(tmp_path / "run" / "checkpoints" / "latest.pt", seconds=130)
    if loss == "process killed":
        os.killpg(second.pid, signal.SIGKILL)
    else:
        hosts.cut_the_cable()
    _, said = first.communicate(timeout=60)
    assert first.returncode == 1, said
    message = [line for line in said.splitlines() if line.startswith("run.py: ")]
    assert len(message) == 1, said
    assert "Traceback" not in said
    assert "autoresume=true" in message[0]
    if loss == "cable cut":
        _, said = second.communicate(timeout=60)
        assert second.returncode == 1
        assert "has heard nothing from rank 0" in said
        ip("-n", hosts.names[1], "link", "set", "veth0", "up")
    else:
        second.communicate(timeout=10)
    again = hosts.start(*common, "duration.epochs=4000")
    output = again[0].stdout
    assert output is not None
    assert "continuing after epoch" in output.readline()


def test_silence_is_measured_by_change_and_not_by_clocks() -> None:
    silence = Silence()
    silence.note({0: "here 0", 1: "there 7", 2: "far 3"}, now=100.0)
    silence.note({0: "here 1", 1: "there 7", 2: "far 4"}, now=130.0)
    assert silence.longer_than(29, now=130.0) == {1: "there"}
    assert silence.longer_than(30, now=130.0) == {}
    silence.note({1: "there done"}, now=131.0)
    assert silence.longer_than(5, now=200.0) == {2: "far"}


def test_only_a_lost_connection_is_called_one(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = RuntimeError(
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]"
    )
    assert describe_lost_rank(closed) is None  # one process has no other
    monkeypatch.setattr("composer.utils.dist.get_world_size", lambda: 2)
    assert "Connection closed by peer" in str(describe_lost_rank(closed))
    assert describe_lost_rank(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
