"""The parent's side of a contender process: requests passes over the data, watches it, and ends it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

_WATCH_SECONDS = 0.2  # between two readings of its memory
_LEAVE_SECONDS = 10.0  # for it to end after the last request


class ContenderError(Exception):
    """A contender that crashed, hung, or could not be imported, and why."""


class ContenderProcess:
    """Runs `command`, which answers every line of JSON with a line of JSON, in its own process group.

    Args:
        timeout_seconds: the longest that an answer may take.

    Attributes:
        begun_at: when it was started, by time.monotonic.
    """

    def __init__(self, command: Sequence[str], *, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `close`)
        self.begun_at = time.monotonic()
        self._process = subprocess.Popen(
            command,
            cwd=Path(__file__).parents[1],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Its answer, plus "memory_mib": the peak memory of it and its children meanwhile, or None.

        Raises:
            ContenderError: it ended, or did not answer in time.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ContenderError(self._last_words()) from None
        deadline = time.monotonic() + self._timeout_seconds
        most: float | None = None
        while not select.select([self._process.stdout], [], [], _WATCH_SECONDS)[0]:
            most = max((one for one in (most, memory_mib(self._process.pid)) if one is not None), default=None)
            if time.monotonic() > deadline:
                raise ContenderError(f"no answer within {self._timeout_seconds:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise ContenderError(self._last_words())
        last = memory_mib(self._process.pid)
        most = max((one for one in (most, last) if one is not None), default=None)
        return {**json.loads(line), "memory_mib": most}

    def close(self) -> None:
        """Let it end; after some seconds, kill what is left of its process group."""
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_LEAVE_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End it and its children now. Harmless when repeated."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _last_words(self) -> str:
        self._process.wait(_LEAVE_SECONDS)
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else f"it ended with status {self._process.returncode} and said nothing"


def memory_mib(pid: int) -> float | None:
    """MiB of a process and its children that no file backs: anonymous and shared memory, each page counted once.

    Pages mapped from files (libraries, the images) are left out, since the system may drop them and every reader of a
    file shares them. None if the system does not report it (only Linux does).
    """
    total_kib = 0
    try:
        family = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return None
    for one in family:
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
        except OSError:  # it ended meanwhile
            continue
        fields = (line.split() for line in lines)
        total_kib += sum(int(field[1]) for field in fields if field[0] in ("Pss_Anon:", "Pss_Shmem:"))
    return total_kib / 1024 or None
