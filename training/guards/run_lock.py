"""One run, one folder: while a run has its folder, no other run of that name can take, rename or write to it.

The lock is a file beside the folder, results/.NAME.lock, with the process, the host and the start in it. It is held in
two ways, since each fails somewhere:

- A POSIX record lock, which the operating system releases however the process ends. It is not inherited by processes
  that outlive a killed run, and NFS carries it from machine to machine.
- A heartbeat, the file's modification time, for file systems that have no such locks or keep them to one machine. It is
  only compared with itself and with the file system's own clock, so that machines may disagree about the time.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

try:
    import fcntl
except ModuleNotFoundError:  # Windows has the heartbeat only
    fcntl = None

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # one per start of a kernel, the same in all its containers
_POLL_SECONDS = 0.5
_SETTLE_SECONDS = 1.0  # without locks: two that take a stale file at the same moment both look again after this


class FolderTaken(ValueError):
    """Another run has the folder; the message says which."""


@dataclass(frozen=True)
class Holder:
    """Who has a folder. kernel: identifies the running kernel. since: local time. token: of this taking."""

    pid: int
    host: str
    kernel: str
    since: str
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class RunLock:
    """Holds `run_dir` for this process from `acquire` to `release`, or within a `with` block.

    beat_seconds: how often the heartbeat is written. stale_seconds: a holder on another machine that is silent for
    longer counts as dead. say: told when it waits for that.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        beat_seconds: float = 10.0,
        stale_seconds: float = 60.0,
        say: Callable[[str], Any] = lambda text: None,
    ) -> None:
        self._run_dir = run_dir
        self._path = run_dir.with_name(f".{run_dir.name}.lock")
        self._beat_seconds = beat_seconds
        self._stale_seconds = stale_seconds
        self._say = say
        self._file: BinaryIO | None = None
        self._made_folder = False
        self._released = threading.Event()

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the folder; waits up to `stale_seconds` for a holder on another machine that may be dead.

        Raises:
            FolderTaken: a living process has it.
            OSError: the folder's parent cannot be written to.
        """
        self._made_folder = not self._path.parent.exists()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while self._file is None:
            file = self._path.open("a+b")
            try:
                self._file = file if self._take(file) else None
            finally:
                if self._file is None:
                    file.close()
        self._released.clear()
        threading.Thread(target=self._keep_beating, name="run lock", daemon=True).start()

    def release(self) -> None:
        """Give the folder back; does nothing if this process does not have it."""
        self._released.set()
        if self._file is None:
            return
        with contextlib.suppress(OSError):
            if self._is_at_path(self._file):
                self._path.unlink()  # before the lock is gone: whoever has opened it meanwhile sees that and retries
        self._file.close()
        self._file = None
        if self._made_folder:
            with contextlib.suppress(OSError):  # a run that ended in a mistake leaves no empty folder
                self._path.parent.rmdir()

    def _take(self, file: BinaryIO) -> bool:
        """Whether the folder is this process's now; False to try again with the file that is there by then."""
        locked, holder = _lock(file), _read(file)
        if locked is False:
            raise self._taken(holder)
        if not self._is_at_path(file):
            return False
        mine = Holder(os.getpid(), socket.gethostname(), _kernel(), time.strftime("%Y-%m-%d %H:%M:%S"), uuid4().hex)
        # On this machine, a lock that could be taken has no living holder. Elsewhere that may say nothing.
        if holder is not None and not (locked and holder.kernel == mine.kernel):
            self._wait_until_stale(holder)
            locked = _lock(file)  # anew: a process gives its lock back whenever it closes the file once
            if locked is False:
                raise self._taken(_read(file))
            if not self._is_at_path(file):
                return False
        file.truncate(0)
        file.write(json.dumps(asdict(mine)).encode())
        file.flush()
        os.fsync(file.fileno())
        if locked is None:
            time.sleep(_SETTLE_SECONDS)
            with self._path.open("rb") as now:
                found = _read(now)
            if found is not None and found.token != mine.token:
                raise self._taken(found)
        return True

    def _wait_until_stale(self, holder: Holder) -> None:
        """Raises FolderTaken as soon as the heartbeat moves."""
        first, age = self._beat_and_age()
        if age > self._stale_seconds:
            return
        self._say(
            f"{self._run_dir} belongs to {holder}; waiting {self._stale_seconds:g} s for a sign of life, to take it up "
            "if there is none"
        )
        ends = time.monotonic() + self._stale_seconds
        while time.monotonic() < ends:
            time.sleep(min(_POLL_SECONDS, self._stale_seconds / 4))
            if not self._path.exists():  # given back
                return
            if self._beat_and_age()[0] != first:
                raise self._taken(holder)

    def _beat_and_age(self) -> tuple[int, float]:
        """The last heartbeat, and the seconds since then by the clock of the file system."""
        with self._path.open("rb") as file:  # network file systems look anew at what is opened
            beat = os.fstat(file.fileno()).st_mtime_ns
        probe = self._path.with_name(f"{self._path.name}.{uuid4().hex[:8]}")
        try:
            probe.touch()
            now = probe.stat().st_mtime_ns
        finally:
            probe.unlink(missing_ok=True)
        return beat, (now - beat) / 1e9

    def _keep_beating(self) -> None:
        while not self._released.wait(self._beat_seconds):
            with contextlib.suppress(OSError):  # a server that is away for a while
                os.utime(self._path)

    def _is_at_path(self, file: BinaryIO) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _taken(self, holder: Holder | None) -> FolderTaken:
        who = holder or "another process"
        return FolderTaken(
            f"{self._run_dir} belongs to a run that is still going: {who}. Wait for its end or stop it, or give this "
            "run another name: run_name=NAME"
        )


def _lock(file: BinaryIO) -> bool | None:
    """Whether this process has the lock now; None where the file system has none."""
    if fcntl is None:
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX allows EAGAIN and EACCES
        return False
    except OSError:
        return None
    return True


def _read(file: BinaryIO) -> Holder | None:
    """Who wrote the file; None if it is empty or half-written."""
    file.seek(0)
    try:
        return Holder(**json.loads(file.read()))
    except (ValueError, TypeError):
        return None


def _kernel() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return socket.gethostname()
