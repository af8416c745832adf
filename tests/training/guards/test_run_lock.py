"""The lock of a run's folder: against a second process, after kill -9, and between machines."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training.guards import run_lock
from training.guards.run_lock import FolderTaken, RunLock

HOLD = "import sys, pathlib; from training.guards.run_lock import RunLock\nwith RunLock(pathlib.Path(sys.argv[1])):\n"


def hold(run_dir: Path, *, until: str = "print('held', flush=True); sys.stdin.read()") -> subprocess.Popen[str]:
    """A process that holds `run_dir`'s lock; it has it when this returns."""
    command = [sys.executable, "-c", f"{HOLD}    {until}", str(run_dir)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def lock_file(run_dir: Path) -> Path:
    return run_dir.with_name(f".{run_dir.name}.lock")


def of_another_machine(run_dir: Path) -> Path:
    """A lock file as a process on another machine left it."""
    path = lock_file(run_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = {"pid": 7, "host": "node7", "kernel": "another", "since": "2026-11-29 06:00:00", "token": "t"}
    path.write_text(json.dumps(holder))
    return path


def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "lockf", refuse)
    monkeypatch.setattr(run_lock, "_SETTLE_SECONDS", 0.05)


@pytest.mark.timeout(60)
def test_a_second_process_is_told_who_has_the_folder_until_the_first_ends(tmp_path: Path) -> None:
    run_dir = tmp_path / "results" / "a"
    first = hold(run_dir)
    with pytest.raises(FolderTaken, match=rf"belongs to a run .*: process {first.pid} on .*, since 20.*run_name=NAME"):
        RunLock(run_dir).acquire()
    with RunLock(run_dir.with_name("b")):  # another name is another folder
        pass
    first.communicate("", timeout=20)
    assert not lock_file(run_dir).exists()
    with RunLock(run_dir):
        assert json.loads(lock_file(run_dir).read_text())["pid"] == os.getpid()


@pytest.mark.timeout(60)
def test_a_killed_process_leaves_nothing_that_bars_the_next(tmp_path: Path) -> None:
    run_dir = tmp_path / "a"
    first = hold(run_dir)
    first.kill()
    first.wait()
    assert lock_file(run_dir).exists()
    started = time.monotonic()
    with RunLock(run_dir, stale_seconds=30):
        assert time.monotonic() - started < 30  # nothing is waited for


@pytest.mark.timeout(60)
def test_a_fork_that_outlives_the_run_does_not_hold_its_folder(tmp_path: Path) -> None:
    fork = "import os, time\n    if os.fork() == 0: time.sleep(50)\n    print('held', flush=True); sys.stdin.read()"
    first = hold(tmp_path / "a", until=fork)
    first.kill()
    first.wait()
    with RunLock(tmp_path / "a", stale_seconds=30):
        pass


@pytest.mark.timeout(60)
@pytest.mark.parametrize("locks", [True, False])
def test_a_holder_on_another_machine_is_dead_when_it_is_silent_for_long(
    tmp_path: Path, locks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not locks:
        without_locks(monkeypatch)
    said: list[str] = []
    of_another_machine(tmp_path / "a")
    with RunLock(tmp_path / "a", stale_seconds=0.4, say=said.append):
        pass
    assert ["process 7 on node7, since 2026-11-29 06:00:00" in text for text in said] == [True]
    os.utime(of_another_machine(tmp_path / "a"), (0, 0))
    with RunLock(tmp_path / "a", stale_seconds=1000, say=said.append):  # silent since long before: no waiting
        pass
    assert len(said) == 1


@pytest.mark.timeout(60)
@pytest.mark.parametrize("locks", [True, False])
def test_a_living_holder_on_another_machine_is_known_by_its_heartbeat(
    tmp_path: Path, locks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The heartbeat alone: a process beats, and its record says another kernel."""
    other = RunLock(tmp_path / "a", beat_seconds=0.1)
    with monkeypatch.context() as elsewhere:
        without_locks(elsewhere)
        elsewhere.setattr(run_lock, "_kernel", lambda: "another")
        other.acquire()
    if not locks:
        without_locks(monkeypatch)
    with pytest.raises(FolderTaken, match=f"process {os.getpid()} on"):
        RunLock(tmp_path / "a", stale_seconds=20).acquire()
    other.release()
    with RunLock(tmp_path / "a", stale_seconds=20):
        pass


@pytest.mark.timeout(120)
def test_one_of_many_at_once_gets_it(tmp_path: Path) -> None:
    until = "print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", f"{HOLD}    {until}", str(tmp_path / "results" / "a")]
    for _ in range(3):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes: list[subprocess.Popen[str]] = [subprocess.Popen(command, **pipes) for _ in range(6)]  # pyright: ignore
        while sum(process.poll() is None for process in processes) > 1:
            time.sleep(0.05)
        outputs = [process.communicate("", timeout=60) for process in processes]
        assert [out for out, _ in outputs].count("held\n") == 1, outputs
        assert sum("FolderTaken" in error for _, error in outputs) == 5
        assert not lock_file(tmp_path / "results" / "a").exists()


def test_a_folder_made_for_nothing_is_removed_and_a_users_stays(tmp_path: Path) -> None:
    with RunLock(tmp_path / "new" / "a"):
        assert (tmp_path / "new").exists()
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with RunLock(tmp_path / "old" / "a"):
        pass
    assert (tmp_path / "old").exists()


def test_a_half_written_record_names_nobody_and_bars_nobody(tmp_path: Path) -> None:
    lock_file(tmp_path / "a").write_text('{"pid": 3, "ho')
    with RunLock(tmp_path / "a"):
        pass
