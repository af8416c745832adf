"""Runs a process with a time limit, keeps the end of what it said, and leaves nothing of it behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_KEPT_LINES = 40
_PAUSE_BEFORE_KILL_SECONDS = 5.0


@dataclass(frozen=True)
class Ended:
    """How a process ended. told: that in words. lines: the last of what it printed."""

    status: int
    told: str
    seconds: float
    lines: list[str]
    timed_out: bool = False


def run(command: Sequence[str], *, limit_seconds: float, environment: Mapping[str, str] | None = None) -> Ended:
    """Run `command` in the checkout; at the limit, or on Ctrl-C, it and what it started are ended."""
    begun = time.monotonic()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
            start_new_session=True,  # a group of its own, which is ended as a whole
        )
        timed_out = False
        try:
            status = process.wait(timeout=limit_seconds)
            told = f"ended with status {status}"
        except subprocess.TimeoutExpired:
            status, told, timed_out = 124, f"did not end within {limit_seconds:.0f} s", True
        finally:
            _end_group(process)
        said.seek(0)
        lines = said.read().decode(errors="replace").splitlines()
    return Ended(status, told, round(time.monotonic() - begun, 1), lines[-_KEPT_LINES:], timed_out)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_PAUSE_BEFORE_KILL_SECONDS)
