"""Detects that another rank is lost, and ends this one with a message that says so.

A process that dies closes its connections, and the ranks that wait for it get an error at once, which
`describe_lost_rank` explains. A machine that drops off the network closes nothing, and a collective waits for it for
many minutes. So every rank writes a heartbeat to the run's key-value store every few seconds, and ends when another
rank's heartbeat has not changed for too long. A silent rank that is stopped, on the same machine, is killed.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from datetime import timedelta

from composer.utils import dist
from torch import distributed
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import PrefixStore

from training.engines.ranks.neighbors import Neighbors

_BEAT_SECONDS = 2.0
_LOOK_SECONDS = 0.5
_STANDSTILL_SECONDS = 1.0  # a longer pause of this process's own is no silence of the others
_DONE = "done"
_CONTINUE = "the same command with autoresume=true goes on from the last checkpoint"
# Messages of gloo, NCCL and torch's store for a lost connection; their exceptions are plain RuntimeErrors.
_LOST_CONNECTION = (
    "gloo/transport",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "No route to host",
    "Socket Timeout",
    "NCCL communicator was aborted",
    "remote process exited",
)


def describe_lost_rank(error: BaseException) -> str | None:
    """A one-line message if `error` means that another rank cannot be reached, otherwise None."""
    text = str(error)
    is_network = isinstance(error, (distributed.DistNetworkError, distributed.DistBackendError))
    if dist.get_world_size() == 1 or not (is_network or any(sign in text for sign in _LOST_CONNECTION)):
        return None
    reason = text.strip().splitlines()[0].rpartition("] ")[2] if text.strip() else type(error).__name__
    return (
        f"rank {dist.get_global_rank()} lost another rank ({reason}), whose own output says why it ended; {_CONTINUE}"
    )


class PeerWatch:
    """While open, ends this process with status 1 once a rank has sent no heartbeat for `timeout_seconds`.

    Silent ranks of this machine that are stopped are killed. The time for which this process was stopped itself does
    not count. Does nothing in a run of one process.
    """

    def __init__(self, *, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._closed = threading.Event()
        self._silence = Silence()
        self._neighbors = Neighbors()

    def __enter__(self) -> PeerWatch:
        if dist.get_world_size() == 1:
            return self
        self._store = _connect(self._timeout_seconds)
        self._beat(0)
        self._neighbors.meet()  # every rank has written once by then, so that no read waits for a key
        self._silence.note(self._read(), time.monotonic())
        # Two threads: the one that talks to the store may hang in a call that never returns.
        for loop in (self._keep_beating, self._keep_watching):
            threading.Thread(target=loop, name=loop.__name__, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        if dist.get_world_size() > 1:
            with contextlib.suppress(Exception):  # rank 0, which hosts the store, may have ended already
                self._store.set(_key(dist.get_global_rank()), f"{socket.gethostname()} {_DONE}")
        self._neighbors.part()

    def _keep_beating(self) -> None:
        count = 0
        while not self._closed.wait(min(_BEAT_SECONDS, self._timeout_seconds / 4)):
            count += 1
            try:
                self._beat(count)
                self._silence.note(self._read(), time.monotonic())
            except Exception:  # after any error, the other thread detects the silence
                continue

    def _keep_watching(self) -> None:
        looked = time.monotonic()
        while not self._closed.wait(_LOOK_SECONDS):
            now = time.monotonic()
            if now - looked > _LOOK_SECONDS + _STANDSTILL_SECONDS:
                self._silence.leave_out(now - looked, now)
            looked = now
            silent = self._silence.longer_than(self._timeout_seconds, now)
            if silent and not self._closed.is_set():
                self._give_up(silent)

    def _give_up(self, silent: Mapping[int, str]) -> None:
        names = ", ".join(f"{rank} ({host})" for rank, host in silent.items())
        print(
            f"run.py: rank {dist.get_global_rank()} has heard nothing from rank {names} for {self._timeout_seconds:g} "
            f"s: its process, its machine or the network is gone; {_CONTINUE}",
            file=sys.stderr,
            flush=True,
        )
        self._neighbors.kill_stopped(silent)
        os._exit(1)  # the main thread waits inside a library, where no exception reaches it

    def _beat(self, count: int) -> None:
        self._store.set(_key(dist.get_global_rank()), f"{socket.gethostname()} {count}")

    def _read(self) -> dict[int, str]:
        ranks = range(dist.get_world_size())
        beats = self._store.multi_get([_key(rank) for rank in ranks])  # pyright: ignore[reportAttributeAccessIssue]
        return {rank: beat.decode() for rank, beat in zip(ranks, beats, strict=True)}


class Silence:
    """Tracks when each rank's heartbeat last changed. A heartbeat is the rank's host and a count."""

    def __init__(self) -> None:
        self._heard: dict[int, tuple[str, float]] = {}

    def note(self, beats: Mapping[int, str], now: float) -> None:
        """Record every rank's heartbeat as read at `now`, in seconds of a monotonic clock."""
        for rank, beat in beats.items():
            if self._heard.get(rank, ("", 0.0))[0] != beat:
                self._heard[rank] = (beat, now)

    def leave_out(self, seconds: float, now: float) -> None:
        """Count the `seconds` before `now` as no silence of anyone: this rank has not listened."""
        for rank, (beat, heard) in list(self._heard.items()):
            self._heard[rank] = (beat, min(heard + seconds, now))

    def longer_than(self, seconds: float, now: float) -> dict[int, str]:
        """The ranks that have been silent for longer, with their hosts; excludes this rank and those that are done."""
        me = dist.get_global_rank()
        return {
            rank: beat.partition(" ")[0]
            for rank, (beat, heard) in sorted(self._heard.items())
            if rank != me and now - heard > seconds and not beat.endswith(_DONE)
        }


def _connect(timeout_seconds: float) -> PrefixStore:
    """A separate connection: the process group's is busy while a collective waits for a rank to join."""
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_seconds),
    )
    return PrefixStore("brisk/alive", store)


def _key(rank: int) -> str:
    return f"rank{rank}"
