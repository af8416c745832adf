"""run.py with a fault: python tests/faults/faulty_run.py EVENT:COUNT:WHAT[:RANK] -f RECIPE ...

Another command, with `-m MODULE` after the fault: python tests/faults/faulty_run.py FAULT -m data.convert ...

At the COUNT-th EVENT, on rank RANK or on each. EVENT is one of Composer's, or one of these: `start`, before anything;
`open=GLOB`, when a file is opened for writing; `name=GLOB`, when one is given its name by a rename or a link. WHAT is
the name of a signal, which this process gets, or one of `FAULTS`; several are joined by +. Several faults are joined by
commas.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import glob
import json
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HANG_SECONDS = 60


def hang(state: Any) -> None:
    time.sleep(HANG_SECONDS)


def pause(state: Any, seconds: str) -> None:
    time.sleep(float(seconds))


def nan(state: Any) -> None:
    """A weight's gradient is no number."""
    gradient = next(p.grad for p in state.model.parameters() if p.grad is not None)
    gradient[(0,) * gradient.dim()] = float("nan")


def deny(state: Any, error: str, pattern: str) -> None:
    """From now on, no file that matches can be written, named or made."""
    number = getattr(errno, error)

    def refuse(path: str) -> None:
        if fnmatch.fnmatch(path, pattern):
            raise OSError(number, os.strerror(number), path)

    at_writing(opened=refuse, named=refuse)


def full(state: Any, folder: str, left: str) -> None:
    """The folder's file system, which had better be small, has so many bytes left."""
    free = os.statvfs(folder)
    with open(Path(folder, "filler"), "wb") as file:
        file.write(bytes(max(0, free.f_bavail * free.f_frsize - int(left))))


def largest(state: Any, size: str) -> None:
    """No file can grow beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), resource.RLIM_INFINITY))


def files(state: Any, folder: str) -> None:
    """The folder's file system takes no more files."""
    with contextlib.suppress(OSError):
        for number in range(10**6):
            Path(folder, f"filler{number}").touch()


def descriptors(state: Any, more: str) -> None:
    """This process can open so many more files."""
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + int(more), resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def clock(state: Any, seconds: str) -> None:
    """The time of day is moved."""
    now, shift = (time.time, time.time_ns), int(seconds)
    time.time, time.time_ns = lambda: now[0]() + shift, lambda: now[1]() + shift * 10**9


def replaced(state: Any, path: str, other: str) -> None:
    """Another file has the name."""
    shutil.copy(other, f"{path}.other")
    os.replace(f"{path}.other", path)


def cut_off(state: Any, pattern: str, share: str) -> None:
    """The files that match have lost their ends."""
    for path in glob.glob(pattern):
        os.truncate(path, int(os.path.getsize(path) * float(share)))


def launcher(state: Any) -> None:
    os.kill(os.getppid(), signal.SIGKILL)


def cable(state: Any) -> None:
    subprocess.run(["ip", "link", "set", "veth0", "down"], check=True)


def workers(state: Any) -> None:
    """A worker process of the loader's is killed."""
    import psutil

    (psutil.Process().children()[-1]).kill()


def ports(state: Any, path: str) -> None:
    """Writes on which addresses this process and its children listen."""
    import psutil

    one = psutil.Process()
    found = [c.laddr.ip for each in (one, *one.children(recursive=True)) for c in each.net_connections("inet")
             if c.status == psutil.CONN_LISTEN]  # fmt: skip
    with open(path, "a") as file:
        file.write(json.dumps(found) + "\n")


def uploaded(state: Any) -> None:
    """Waits until all checkpoints are at the remote."""
    from training.checkpoints.saving import Checkpoints

    checkpoints = next(one for one in state.callbacks if isinstance(one, Checkpoints))
    checkpoints._background.wait()
    checkpoints._finish_uploads(60)


def decoder(state: Any) -> None:
    """The loader's threads raise."""
    from data.loading import ffcv_loader

    def fail(*given: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "train.beton")

    ffcv_loader._decode_part = fail


FAULTS: dict[str, Callable[..., None]] = {
    one.__name__: one for one in (
        hang, pause, nan, deny, full, largest, files, descriptors, clock, replaced, cut_off, launcher, cable, workers,
        ports, uploaded, decoder,
    )
}  # fmt: skip

_written: list[Callable[[str, tuple[Any, ...]], None]] = []


def at_writing(*, opened: Callable[[str], None] | None = None, named: Callable[[str], None] | None = None) -> None:
    """Call `opened` with each path that is opened for writing, and `named` with each that a file or folder gets."""

    def look(event: str, given: tuple[Any, ...]) -> None:
        if event == "open" and opened and isinstance(given[0], (str, bytes)):
            path, mode, flags = given
            if set(mode or "") & set("wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR):
                opened(os.fsdecode(path))
        elif event in ("os.rename", "os.link", "os.symlink") and named:
            named(os.fspath(given[1]))
        elif event == "os.mkdir" and named:
            named(os.fspath(given[0]))

    if not _written:
        sys.addaudithook(lambda event, given: [look(event, given) for look in _written] and None)
    _written.append(look)


class Fault:
    """Counts its event, and does what it is to do when it is time."""

    def __init__(self, text: str) -> None:
        self.event, count, self.what, *self.rank = text.split(":")
        self.left = int(count)

    def at_event(self, state: Any = None, logger: Any = None) -> None:
        self.left -= 1
        if self.left != 0 or (self.rank and self.rank[0] != os.environ.get("RANK", "0")):
            return
        for one in self.what.split("+"):
            name, *given = one.split("=")
            if name in FAULTS:
                FAULTS[name](state, *given)
            else:
                os.kill(os.getpid(), getattr(signal, name))

    def arm(self) -> None:
        kind, _, pattern = self.event.partition("=")
        if kind == "start":
            self.at_event()
        elif kind in ("open", "name"):

            def matched(path: str) -> None:
                if fnmatch.fnmatch(path, pattern):
                    self.at_event()

            at_writing(**{"opened" if kind == "open" else "named": matched})
        else:
            self._at_composers()

    def _at_composers(self) -> None:
        from training.engines.lean_import import import_lean

        import_lean()
        from composer.core import Callback

        from training import callbacks
        from training.engines import composer

        # Listed first, so that the fault is there before any other callback sees the event.
        first = type("FaultCallback", (Callback,), {self.event: staticmethod(self.at_event)})()
        build = callbacks.build_callbacks

        def with_fault(*given: Any, **named: Any) -> list[Callback]:
            return [first, *build(*given, **named)]

        callbacks.build_callbacks = composer.build_callbacks = with_fault
        if any(one.startswith("parallelism.strategy=deepspeed") for one in sys.argv):
            from training.engines.deepspeed import run as deepspeed

            deepspeed.build_callbacks = with_fault


if __name__ == "__main__":
    for fault in sys.argv[1].split(","):
        Fault(fault).arm()
    if sys.argv[2] == "-m":
        module = sys.argv[3]
        sys.argv[:] = [module, *sys.argv[4:]]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        from training import cli

        sys.exit(cli.main(sys.argv[2:]))
