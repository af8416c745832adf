"""Uploads checkpoints while training goes on: the newest state first, and only that one after an outage."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from composer.utils import dist

from training.checkpoints.names import LATEST, beside_of, give_name
from training.checkpoints.remote.index import INDEX, TEXTS, Index, Stored, describe, new_writer, read_index
from training.checkpoints.remote.store import PARTIAL, Store, reason_of
from training.checkpoints.remote.together import wait_together

log = logging.getLogger(__name__)

_WAITS_SECONDS = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)  # between attempts; the last one again and again
_SILENT_SECONDS = 2.0  # of waiting for the last upload


@dataclass(eq=False)
class _Pinned:
    """A checkpoint that is to be uploaded. path: a name of its own, so that it stays while other names move on."""

    path: Path
    stamp: tuple[int, int]
    described: Stored | None = None


class _Superseded(Exception):
    """Another process uploads to the same folder now."""


class Uploads:
    """Uploads what `offer` is given, on a thread; nothing that goes wrong there reaches who calls.

    A state that waits is replaced by a newer one of the same name: after an outage the newest latest.pt is uploaded,
    and not each one missed. The disk holds up to two states more meanwhile: the one under way, and the next.

    folder: the local checkpoints folder.
    keep: how many of latest.pt, previous.pt, previous-2.pt ... the index names; others are removed there.
    """

    def __init__(
        self, store: Store, folder: Path, *, keep: int, waits_seconds: Sequence[float] = _WAITS_SECONDS
    ) -> None:
        self.store = store
        self._folder = folder
        self._keep = keep
        self._waits_seconds = waits_seconds
        self._writer = new_writer()
        self._fresh = False
        self._changed = threading.Condition()
        self._wanted: dict[str, _Pinned] = {}  # name -> what it shall be
        self._under_way: _Pinned | None = None
        self._pins = itertools.count(1)
        self._in_hurry = threading.Event()
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._claimed = False
        self._away: str | None = None  # why nothing could be uploaded
        self._uploaded: Stored | None = None
        self._put: list[str] = []  # since the index was last written
        self._unneeded: list[str] = []

    @property
    def is_started(self) -> bool:
        """Whether `start` was called."""
        return self._thread is not None

    def start(self, *, fresh: bool) -> None:
        """Begin. fresh: the run starts anew, so that the index of one before it is put aside."""
        if self._thread is None:
            self._fresh = fresh
            # A daemon: an upload that hangs keeps no process from its end.
            self._thread = threading.Thread(target=self._run, name="upload", daemon=True)
            self._thread.start()

    def offer(self, source: Path, names: Sequence[str], stamp: tuple[int, int]) -> None:
        """Upload the checkpoint `source`, of epoch and step `stamp`, under `names`. Returns at once."""
        with self._changed:
            if self._stopped:
                return
            pin = beside_of(self._folder / f"upload-{next(self._pins)}")
            try:
                give_name(source, pin)
            except OSError as error:  # without links, a copy for which there may be no room
                log.warning("the checkpoint of step %d is not uploaded: %s", stamp[1], error)
                return
            self._let_go(names)
            self._wanted |= dict.fromkeys(names, _Pinned(pin, stamp))
            self._changed.notify_all()

    def is_done(self) -> bool:
        """Whether all that was offered is at the remote, or nothing more will be."""
        with self._changed:
            return not self._wanted

    def finish(self, *, seconds: float) -> None:
        """Wait until all is uploaded, so many seconds at most, and tell what is not. Every rank must call this.

        The others wait with the first one: a launcher ends a rank whose neighbors are gone. seconds: on each rank what
        it has; the least counts.
        """
        seconds = min(dist.all_gather_object(seconds))
        self._in_hurry.set()
        started = time.monotonic()
        for limit_seconds in (min(seconds, _SILENT_SECONDS), seconds):
            ends = started + limit_seconds
            wait_together(lambda ends=ends: self.is_done() or time.monotonic() >= ends)
            if limit_seconds < seconds and not self.is_done():
                log.warning("waiting for the last upload to %s, %.0f s at most", self.store, seconds)
        self._in_hurry.clear()
        self._give_up(waited_seconds=time.monotonic() - started)

    def close(self, *, seconds: float) -> None:
        """End the thread, after so many seconds for what is not uploaded; the other ranks may be gone."""
        self._in_hurry.set()
        with self._changed:
            self._changed.wait_for(lambda: not self._wanted, timeout=seconds)
        self._give_up(waited_seconds=seconds)
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _give_up(self, *, waited_seconds: float) -> None:
        with self._changed:
            if not self._wanted:
                return
            newest = max(pinned.stamp for pinned in self._wanted.values())
            self._let_go(tuple(self._wanted))
            self._stopped = True
        there = "nothing of this run is there" if self._uploaded is None else f"step {self._uploaded.step} is there"
        why = "" if self._away is None else f" ({self._away})"
        log.warning(
            "the checkpoint of step %d could not be uploaded to %s within %.0f s%s; %s. It is whole in %s",
            newest[1], self.store, waited_seconds, why, there, self._folder,
        )  # fmt: skip

    def _let_go(self, names: Sequence[str]) -> None:
        """Want `names` no more, and unpin what nothing wants."""
        gone = [self._wanted.pop(name) for name in names if name in self._wanted]
        self._changed.notify_all()
        for pinned in gone:
            self._unpin(pinned)

    def _unpin(self, pinned: _Pinned) -> None:
        if pinned is not self._under_way and pinned not in self._wanted.values():
            pinned.path.unlink(missing_ok=True)

    def _run(self) -> None:
        failures = 0
        while not self._stopped:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._stopped)
            try:
                self._upload_next()
            except _Superseded as error:
                self._stop(str(error))
            except Exception as error:  # whatever the protocol's library raises
                self.store.disconnect()
                self._tell_away(error)
                self._pause(self._waits_seconds[min(failures, len(self._waits_seconds) - 1)])
                failures += 1
            else:
                failures = 0
                self._tell_back()
        self.store.disconnect()

    def _pause(self, seconds: float) -> None:
        shortest = self._waits_seconds[0]
        time.sleep(min(seconds, shortest))
        self._in_hurry.wait(max(0.0, seconds - shortest))

    def _upload_next(self) -> None:
        """Upload one state, latest.pt first, under all names that it shall have."""
        with self._changed:
            if not self._wanted:
                return
            pinned = self._under_way = self._wanted.get(LATEST) or next(iter(self._wanted.values()))
            names = [name for name, other in self._wanted.items() if other is pinned]
        try:
            self._upload(pinned, names)
            with self._changed:
                self._let_go([name for name in names if self._wanted.get(name) is pinned])
        finally:
            with self._changed:
                self._under_way = None
                self._unpin(pinned)

    def _upload(self, pinned: _Pinned, names: Sequence[str]) -> None:
        index = self._own_index()
        state = pinned.described = pinned.described or describe(pinned.path, pinned.stamp)
        if state.key not in index.states:
            self._put.append(state.key)
            for name in state.files:
                self.store.put(pinned.path / name, state.path_of(name))
            index = self._own_index()  # which may be another's by now
        new = replace(index.with_state(state, names, keep=self._keep), texts=self._texts())
        self.store.write(INDEX, new.to_json())
        if LATEST in names:
            self._uploaded = state
        self._unneeded += [key for key in dict.fromkeys([*index.states, *self._put]) if key not in new.states]
        self._put.clear()
        self._remove_unneeded()

    def _remove_unneeded(self) -> None:
        while self._unneeded:
            self.store.remove(self._unneeded[0])
            del self._unneeded[0]

    def _own_index(self) -> Index:
        """The index at the remote, which is this process's from the first time on."""
        content = self.store.read(INDEX)
        if self._claimed:
            index = None if content is None else read_index(content)
            if index is None or index.writer != self._writer:
                who = "something removed its index" if index is None else f"another run uploads there: {index.writer}"
                raise _Superseded(who)
            return index
        return self._claim(content)

    def _claim(self, content: bytes | None) -> Index:
        before = None
        with contextlib.suppress(ValueError):
            before = None if content is None else read_index(content)
        continues = before is not None and not self._fresh
        if content is not None and not continues and (before is None or before.states):
            self._put_aside(content)
        index = replace(before, writer=self._writer) if before is not None and continues else Index(self._writer)
        self.store.write(INDEX, index.to_json())
        self._claimed = True
        self._sweep()
        return index

    def _put_aside(self, content: bytes) -> None:
        there = self.store.names()
        kept = next(name for n in itertools.count(1) if (name := INDEX.replace(".json", f".{n}.json")) not in there)
        self.store.write(kept, content)
        log.warning("%s holds a run that began before; its checkpoints stay there, named in %s", self.store, kept)

    def _sweep(self) -> None:
        """Remove what killed processes left half-done: nothing names it."""
        there = self.store.names()
        named: set[str] = set()
        for name in there:
            if name.startswith("index") and name.endswith(".json"):
                try:
                    named |= {name, *read_index(self.store.read(name) or b"").states}
                except ValueError:
                    return  # of a later version, perhaps: then nothing is ours to judge
        for name in there:
            if name not in named and name.startswith((PARTIAL, "ep")):
                self.store.remove(name)

    def _texts(self) -> dict[str, str]:
        paths = [self._folder.parent / name for name in TEXTS]
        return {path.name: path.read_text() for path in paths if path.is_file()}

    def _tell_away(self, error: Exception) -> None:
        if self._away is None and not self._stopped:
            log.warning(
                "%s cannot be written to: %s. Training goes on; the newest checkpoint is uploaded once it can be",
                self.store, reason_of(error),
            )  # fmt: skip
        self._away = reason_of(error)

    def _tell_back(self) -> None:
        if self._away is not None:
            self._away = None
            there = "" if self._uploaded is None else f"; {self._uploaded} is there"
            log.warning("%s can be written to again%s", self.store, there)

    def _stop(self, why: str) -> None:
        with self._changed:
            self._stopped = True
            self._let_go(tuple(self._wanted))
        log.warning("%s: %s. Training goes on, and nothing more is uploaded", self.store, why)
