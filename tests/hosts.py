"""Two hosts on one machine: network namespaces with a cable between them, and a rank of a run in each."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import pytest
from ranks import start_ranks

CLONE_NEWNET = 0x40000000
PORT = 29500  # within the namespaces, which nothing else lives in
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
        self._running = contextlib.ExitStack()

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
        self._running.close()
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=20)

    def start(self, folder: Path, *arguments: str, script: str = "run.py") -> list[Host]:
        """`script` as one rank a host, which find each other by the environment, over TCP."""
        outputs = [folder / f"said by {name}" for name in self.names]
        for output in outputs:
            output.write_text("")
        ranks = start_ranks(script, *arguments, outputs=outputs, before=partial(enter, self.names))
        return [Host(*one) for one in zip(self._running.enter_context(ranks), outputs, strict=True)]

    def cut_the_cable(self) -> None:
        ip("-n", self.names[1], "link", "set", "veth0", "down")


class Host(NamedTuple):
    """The rank on one of the hosts, and the file with what it says."""

    process: BaseProcess
    output: Path

    def wait(self, seconds: float) -> str:
        """What it said, once it has ended."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running after {seconds:g} s: {self.said()}"
        return self.said()

    def said(self) -> str:
        return self.output.read_text()


def enter(namespaces: Sequence[str]) -> None:
    """Move this rank to its namespace; every host calls its rank its first."""
    name = namespaces[int(os.environ["RANK"])]
    with open(f"/run/netns/{name}") as file:  # os.setns is in Python 3.12
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns to {name}")
    os.environ.update(
        NODE_RANK=os.environ["RANK"], LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="10.99.0.1",
        MASTER_PORT=str(PORT), GLOO_SOCKET_IFNAME="veth0",
    )  # fmt: skip
