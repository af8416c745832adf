"""The other ranks' processes on this machine, to be killed if somebody has stopped them.

A process that is stopped, by SIGSTOP or a debugger, sees no SIGTERM, so it would stay when the others have ended, with
its memory, its GPU and its ports. SIGKILL reaches it.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable
from pathlib import Path

from composer.utils import dist

_BOOT_ID, _NAMESPACE = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")


class Neighbors:
    """Handles of those ranks whose processes this one can see. Every rank must call `meet` at the same time.

    A handle stays its process's even when the number belongs to another. There are none outside Linux.
    """

    def __init__(self) -> None:
        self._handles: dict[int, tuple[int, int]] = {}  # rank -> process number and handle

    def meet(self) -> None:
        """Exchange the ranks' process numbers."""
        place = _place()
        for rank, (where, pid) in enumerate(dist.all_gather_object((place, os.getpid()))):
            if place is not None and where == place and pid != os.getpid():
                with contextlib.suppress(OSError):  # it has ended already
                    self._handles[rank] = pid, os.pidfd_open(pid)

    def kill_stopped(self, ranks: Iterable[int]) -> None:
        """Kill those of `ranks` that are stopped; those that run, and those on other machines, are left alone."""
        for rank in ranks:
            pid, handle = self._handles.get(rank, (0, -1))
            if pid and _is_stopped(pid):
                with contextlib.suppress(OSError):  # it is gone
                    signal.pidfd_send_signal(handle, signal.SIGKILL)

    def part(self) -> None:
        """Close the handles."""
        while self._handles:
            _, (_, handle) = self._handles.popitem()
            os.close(handle)


def _place() -> tuple[str, int] | None:
    """The kernel and the numbering of processes that this one belongs to; None where there are no handles."""
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return _BOOT_ID.read_text(), _NAMESPACE.stat().st_ino
    except OSError:
        return None


def _is_stopped(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state in ("T", "t")  # by a signal, by a debugger
