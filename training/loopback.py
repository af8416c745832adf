"""Joins ranks, and keeps the ports of those that are all on one machine off its networks.

The ranks of a run trust each other: what they exchange is unpickled, and nobody asks who connects. torch's store
listens on every interface, gloo and NCCL on that of the host's name. On one machine none of them need be reached from
outside, so the store is given a socket on 127.0.0.1, and the others are given the loopback interface.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta

from torch import distributed
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

LOOPBACK = "127.0.0.1"
_INTERFACES = ("lo", "lo0")  # Linux's name, and that of BSD and macOS
_INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def join_ranks(backend: str, *, timeout_seconds: float) -> None:
    """Make the process group of the ranks that the environment tells of, as a launcher sets it.

    If one machine has them all, they listen on loopback alone, unless the environment names an interface. torchrun
    serves the store itself, on every interface.

    Raises:
        ValueError: another process has the store's port.
    """
    timeout = timedelta(seconds=timeout_seconds)
    if not _is_one_machine():
        distributed.init_process_group(backend, timeout=timeout)
        return
    interface = next((name for _, name in socket.if_nameindex() if name in _INTERFACES), None)
    if interface is not None:
        for variable in _INTERFACE_VARIABLES:
            os.environ.setdefault(variable, interface)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        distributed.init_process_group(backend, timeout=timeout)
        return
    os.environ["MASTER_ADDR"] = LOOPBACK  # for whoever connects to the store later
    rank, ranks, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    listening = _listening(port) if rank == 0 else None
    store = TCPStore(
        LOOPBACK,
        port,
        ranks,
        is_master=rank == 0,
        timeout=timeout,
        master_listen_fd=listening,
        use_libuv=False,  # the other server, made for thousands of ranks, takes no socket in torch 2.6 and 2.7
    )
    distributed.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)


def _is_one_machine() -> bool:
    needed = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")  # torch says which is missing
    return (
        os.name == "posix"  # Windows has no descriptors of sockets
        and all(name in os.environ for name in needed)
        and os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]
    )


def _listening(port: int) -> int:
    """The descriptor of a socket that listens on loopback; the store closes it."""
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((LOOPBACK, port))
        listening.listen(socket.SOMAXCONN)
    except OSError as error:
        listening.close()
        raise ValueError(
            f"MASTER_PORT is {port}, on which this process cannot listen: {error.strerror}. Give another, or let the "
            "launcher choose one"
        ) from error
    return listening.detach()
