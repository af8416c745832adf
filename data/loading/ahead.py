"""How many decoded batches wait for the consumer, so that a slow one does not make it wait.

A consumer that takes batches more slowly than they are decoded still falls behind now and then: where some batches in a
row take long, as beside another process, or by chance. How far follows from the times themselves, without assuming
that they are independent. `python -m benchmarks.loaders --ahead` plays recorded times back at each number of batches.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Literal, TypeAlias

import numpy as np

BatchesAhead: TypeAlias = "Literal['auto'] | int"
LEAST_AHEAD = 2
MOST_AHEAD_BYTES = 1 << 30  # of "auto", in one process
LOAD = 0.95  # of the consumer's time, in which the batches could be decoded
_FIRST_TIMES, _MOST_TIMES = 32, 1024


def batches_for_times(seconds: np.ndarray) -> int:
    """As many batches as a consumer would have fallen behind at most, at least 2.

    The decoding times x are scaled so that their mean is LOAD of a step of the consumer. Its backlog, in steps, is
    w(n) = max(0, w(n - 1) + x(n) - 1) (Lindley 1952, for a queue); the result is the largest w, rounded up.
    """
    behind = np.cumsum(seconds / seconds.mean() * LOAD - 1)
    backlog = behind - np.minimum.accumulate(np.minimum(behind, 0))
    return max(LEAST_AHEAD, math.ceil(backlog.max()))


class Ahead:
    """The number of batches ahead: a given one, or what the decoding times ask for.

    Args:
        setting: a whole number of at least 1; or "auto": `batches_for_times` of the last 1,024 batches of this size,
            as far as they fit into 1 GiB, and 2 for the first 32.

    Raises:
        ValueError: neither.
    """

    def __init__(self, setting: BatchesAhead) -> None:
        if setting != "auto" and (type(setting) is not int or setting < 1):
            raise ValueError(f"batches_ahead {setting}: give auto or a whole number of at least 1")
        self._setting = setting
        self._batch_bytes = 0
        self._seconds: deque[float] = deque(maxlen=_MOST_TIMES)
        self._number = LEAST_AHEAD if setting == "auto" else int(setting)

    def begin(self, batch_bytes: int) -> int:
        """The number at the start of a pass over batches of `batch_bytes`. Times of batches of another size say nothing
        about it."""
        if self._setting == "auto" and batch_bytes != self._batch_bytes:
            self._seconds.clear()
            self._batch_bytes, self._number = batch_bytes, LEAST_AHEAD
        return self._number

    def after(self, seconds: float) -> int:
        """The number after a batch whose decoding took `seconds`, of all threads together."""
        if self._setting != "auto":
            return self._number
        self._seconds.append(seconds)
        if len(self._seconds) % _FIRST_TIMES == 0:  # once it is full, after every batch, for which it is fast enough
            asked, most = batches_for_times(np.array(self._seconds)), MOST_AHEAD_BYTES // self._batch_bytes
            self._number = max(LEAST_AHEAD, min(asked, most))
        return self._number


def timed(task: Callable[[], None], seconds: list[float]) -> None:
    """Run `task`, and append how long it took."""
    begin = time.perf_counter()
    task()
    seconds.append(time.perf_counter() - begin)
