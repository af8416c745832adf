"""Ranks of one machine listen on loopback alone; tests/faults/test_lost_ranks.py looks at those of a run."""

from __future__ import annotations

import socket

import pytest

from training.loopback import join_ranks


def test_a_port_that_is_taken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "MASTER_ADDR"):
        monkeypatch.setenv(variable, "")  # so that what is set here is taken back
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        here = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": str(port)}
        for name, value in here.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=f"MASTER_PORT is {port}, on which this process cannot listen: Address"):
            join_ranks("gloo", timeout_seconds=5)
