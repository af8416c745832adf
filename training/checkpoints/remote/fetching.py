"""Brings the newest whole checkpoint from the remote, if it is newer than what this machine has."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from composer.utils import dist

from models.data_only import is_archive
from training.checkpoints.names import (
    BEST,
    LATEST,
    beside_of,
    give_name,
    keep_previous,
    move_shards,
    newest_first,
    remove,
    remove_unnamed,
)
from training.checkpoints.reading import DamagedCheckpoint, check_checkpoint, check_whole, reading
from training.checkpoints.remote.index import INDEX, Index, Stored, difference, read_index
from training.checkpoints.remote.store import Store, reason_of
from training.checkpoints.remote.together import do_together
from training.recipe import Recipe, RecipeError

_KEY = "checkpoints.remote"
_WAITS_SECONDS = (1.0, 2.0, 4.0)  # between attempts
_PROBE = "probe"

_Found = TypeVar("_Found")


class _Damaged(Exception):
    """A checkpoint at the remote is not as it was written."""


def bring_newest(recipe: Recipe, say: Callable[[str], None]) -> None:
    """Make the newest whole checkpoint of the remote latest.pt here, if no newer one is here.

    Every rank must call this. The first one decides; on every other machine that has a folder of its own, its first
    rank downloads the same.

    Raises RecipeError if the remote cannot be read and nothing is here to continue from: a run that silently begins
    anew would lose what is there.
    """
    assert recipe.checkpoints.remote is not None, "the caller looks"
    fetch = _Fetch(recipe, Store(recipe.checkpoints.remote, recipe.run_name), say)
    brought = do_together(lambda: fetch.as_first() if dist.get_global_rank() == 0 else None)[0]
    if brought is not None:
        do_together(lambda: fetch.as_other(*brought) if _is_first_of_another_machine() else None)


class _Fetch:
    def __init__(self, recipe: Recipe, store: Store, say: Callable[[str], None]) -> None:
        self._store = store
        self._say = say
        self._run_dir = recipe.run_dir
        self._folder = recipe.run_dir / "checkpoints"
        self._keep = recipe.checkpoints.keep
        self._trust = recipe.trust_checkpoint

    def as_first(self) -> tuple[Index, Stored] | None:
        """The index, and which of its checkpoints is latest.pt here now; None if what is here is as new."""
        here = newest_step(self._folder)
        try:
            return self._bring(here)
        except RecipeError:
            raise
        except Exception as error:  # whatever the protocol's library raises
            if here is None:
                raise RecipeError(
                    _KEY,
                    f"is {self._store}, which cannot be read: {reason_of(error)}. {self._folder} has no whole "
                    "checkpoint either, and a run that begins anew would leave the one there behind. Try again later, "
                    "or begin anew with autoresume=false",
                ) from None
            self._say(f"{self._store} cannot be read: {reason_of(error)}. Continuing with what is in {self._folder}")
            return None

    def as_other(self, index: Index, state: Stored) -> None:
        """Download what the first rank did, unless its folder is this machine's too."""
        try:
            self._bring_best(index, state)
            if difference(self._folder / LATEST, state) is not None:
                self._take(self._downloaded(state, LATEST), _names(index, state), state)
        except Exception as error:  # whatever the protocol's library raises
            raise RecipeError(
                _KEY, f"is {self._store}, and rank {dist.get_global_rank()} cannot read it: {reason_of(error)}"
            ) from None

    def _bring(self, here: int | None) -> tuple[Index, Stored] | None:
        content = self._patiently(lambda: self._store.read(INDEX))
        if content is None:
            if here is None:  # a bucket that is not there looks the same as an empty one, until it is written to
                self._patiently(lambda: self._store.write(_PROBE, b"writable"))
                self._patiently(lambda: self._store.remove(_PROBE))
            return None
        index, damaged = read_index(content), []
        newer = [state for state in index.in_order() if here is None or state.step > here]
        for state in newer:
            try:
                beside = self._downloaded(state, LATEST)
            except _Damaged as error:
                damaged.append(f"{self._store}/{state.key} is no whole checkpoint ({error})")
                continue
            self._settle(beside, index, state)
            self._say(f"{''.join(f'{one}; ' for one in damaged)}downloaded {state} from {self._store}")
            return index, state
        if damaged and here is None:
            raise RecipeError(_KEY, f"has none that is whole: {'; '.join(damaged)}. Begin anew with autoresume=false")
        if damaged:
            self._say(f"{'; '.join(damaged)}. Continuing with what is in {self._folder}")
        return None

    def _settle(self, beside: Path, index: Index, state: Stored) -> None:
        """The files of a run's folder, as if the run had been here; latest.pt is last."""
        for name, text in index.texts.items():
            (self._run_dir / name).write_text(text)
        self._bring_best(index, state)
        keep_previous(self._folder, self._keep)
        self._take(beside, _names(index, state), state)

    def _bring_best(self, index: Index, latest: Stored) -> None:
        best = index.states.get(index.names.get(BEST, ""))
        if best is None or best.key == latest.key or difference(self._folder / BEST, best) is None:
            return
        try:
            self._take(self._downloaded(best, BEST), [BEST], best)
        except _Damaged as error:
            self._say(f"{self._store}/{best.key}, the best checkpoint, is not whole ({error}); it is left out")

    def _take(self, beside: Path, names: Sequence[str], state: Stored) -> None:
        written = move_shards(beside, (state.epoch, state.step)) if state.is_folder else beside
        for name in names[:-1]:
            give_name(written, self._folder / name)
        give_name(written, self._folder / names[-1], only=not state.is_folder)
        remove_unnamed(self._folder)

    def _downloaded(self, state: Stored, name: str) -> Path:
        """The checkpoint, whole, beside `name`. Raises _Damaged."""
        self._folder.mkdir(parents=True, exist_ok=True)
        beside = beside_of(self._folder / name)
        remove(beside)
        for file in state.files:
            path = beside / file
            path.parent.mkdir(parents=True, exist_ok=True)
            source = state.path_of(file)
            try:
                self._patiently(lambda path=path, source=source: self._store.get(source, path))
            except FileNotFoundError:
                raise _Damaged(f"{file or 'its file'} is missing") from None
        reason = difference(beside, state) or self._damage(beside)
        if reason is not None:
            remove(beside)
            raise _Damaged(reason)
        return beside

    def _damage(self, checkpoint: Path) -> str | None:
        """What was wrong with it already when it was uploaded."""
        try:
            check_whole(checkpoint) if self._trust else check_checkpoint(checkpoint)
        except DamagedCheckpoint as error:
            return error.message
        return None

    def _patiently(self, ask: Callable[[], _Found]) -> _Found:
        """What `ask` returns, at the last of several attempts at the latest."""
        for seconds in _WAITS_SECONDS:
            try:
                return ask()
            except FileNotFoundError:
                raise
            except Exception:  # whatever the protocol's library raises
                self._store.disconnect()
                time.sleep(seconds)
        return ask()


def _names(index: Index, state: Stored) -> list[str]:
    return [*([BEST] if index.names.get(BEST) == state.key else []), LATEST]


def _is_first_of_another_machine() -> bool:
    return dist.get_local_rank() == 0 and dist.get_global_rank() != 0


def newest_step(folder: Path) -> int | None:
    """The step of the newest whole checkpoint in `folder`; None if there is none."""
    for path in newest_first(folder):
        try:
            check_checkpoint(path)
            return step_of(path)
        except RecipeError:  # which `choose_checkpoint` tells
            continue
    return None


def step_of(checkpoint: Path) -> int:
    """The step at which a checkpoint was written, which was found to hold data only."""
    file = checkpoint / "state.pt" if checkpoint.is_dir() else checkpoint
    with reading(checkpoint):
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=is_archive(file))
    return int(saved["state"]["timestamp"]["Timestamp"]["batch"])
