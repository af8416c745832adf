"""Waits of all ranks for one, however long it takes: a collective by itself has a time limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from composer.utils import dist

from training.recipe import RecipeError

_Found = TypeVar("_Found")

_POLL_SECONDS = 0.2


def wait_together(is_done: Callable[[], bool]) -> None:
    """Return on every rank once `is_done` is true on each. Every rank must call this."""
    while not all(dist.all_gather_object(is_done())):
        time.sleep(_POLL_SECONDS)


def do_together(work: Callable[[], _Found]) -> list[_Found]:
    """What `work` returns on each rank. Every rank must call this.

    Raises RecipeError on every rank if `work` raises that on one, and RuntimeError if it raises something else.
    """
    found: list[tuple[Any, tuple[str, str] | None, str | None]] = []

    def note() -> None:
        try:
            found.append((work(), None, None))
        except RecipeError as error:
            found.append((None, (error.path, error.message), None))
        except Exception as error:
            found.append((None, None, f"{type(error).__name__}: {error}"))

    thread = threading.Thread(target=note, name="remote", daemon=True)
    thread.start()
    wait_together(lambda: not thread.is_alive())
    results = dist.all_gather_object(found[0])
    for _, mistake, failure in results:
        if mistake is not None:
            raise RecipeError(*mistake)
        if failure is not None:
            raise RuntimeError(failure)
    return [result for result, _, _ in results]
