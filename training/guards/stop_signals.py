"""SIGTERM and SIGUSR1, with which schedulers announce the end of a lease: noted, for a checkpoint at the next step.

SLURM sends what `--signal` names some time before its limit, then SIGTERM, then SIGKILL; Kubernetes and torchrun send
SIGTERM, and SIGKILL 30 seconds later. So a run has a time limit of its own: what cannot be saved within it is not
waited for.

A launcher that such a signal ends, as Composer's, passes nothing on to its ranks. They see that it is gone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

WATCHED = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))

_POLL_SECONDS = 0.5


class StopSignals:
    """Notes the signals WATCHED instead of ending the process, from `watch` to `unwatch`.

    limit_seconds: after the first signal. When it is over, the process ends with 128 + the signal's number, whatever it
        is doing. Further signals change nothing; SIGINT, Ctrl-C, still ends it at once.
    has_launcher: take the end of this process's parent for a SIGTERM.
    received: the number of the first signal; 0 before there is one.
    """

    def __init__(self, *, limit_seconds: float, has_launcher: bool = False) -> None:
        self._limit_seconds = limit_seconds
        self._has_launcher = has_launcher
        self._before: dict[int, Any] = {}
        self._closed = threading.Event()
        self._received_at: float | None = None
        self.received = 0

    @property
    def left_seconds(self) -> float:
        """Of the limit; all of it before a signal."""
        passed = 0.0 if self._received_at is None else time.monotonic() - self._received_at
        return max(0.0, self._limit_seconds - passed)

    def watch(self) -> None:
        """Take the signals over. Does nothing on a thread other than the main one, where Python allows no handlers."""
        if threading.current_thread() is threading.main_thread() and not self._before:
            self._closed.clear()
            self._before = {number: signal.signal(number, self._note) for number in WATCHED}
            if self._has_launcher:
                threading.Thread(target=self._watch_launcher, name="launcher", daemon=True).start()

    def unwatch(self) -> None:
        """Give the signals back to whoever had them. A time limit that runs ends."""
        self._closed.set()
        while self._before:
            number, handler = self._before.popitem()
            with contextlib.suppress(ValueError):  # on another thread, while the interpreter ends
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._received_at = number, time.monotonic()
            threading.Thread(target=self._end_in_time, name="time limit", daemon=True).start()

    def _watch_launcher(self) -> None:
        launcher = os.getppid()
        while not self._closed.wait(_POLL_SECONDS):
            if os.getppid() != launcher:
                self._note(signal.SIGTERM, None)
                return

    def _end_in_time(self) -> None:
        if not self._closed.wait(self._limit_seconds):
            name = signal.Signals(self.received).name
            print(
                f"run.py: no checkpoint could be written within {self._limit_seconds:g} s of {name}; the last one "
                "before it is whole",
                file=sys.stderr,
                flush=True,
            )
            os._exit(128 + self.received)  # the main thread may wait inside a library, where no exception reaches it
