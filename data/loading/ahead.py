"""How many decoded batches wait for the consumer, so that a slow one does not make it wait.

A consumer that takes batches at 95 % of the pace at which they are decoded falls behind only by chance. The backlog of
such a queue is nearly exponential (Kingman 1962: its mean is cv² / (2 (1 - load)) batches, cv being the standard
deviation of a batch's decoding time over its mean), so ln(1000) times that mean covers all but one batch in 1,000.
`python -m benchmarks.loaders --ahead` compares this with recorded times.
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
LOAD, SHARE_WAITED_FOR = 0.95, 0.001
_FIRST_TIMES, _MOST_TIMES = 32, 1024


def batches_for_spread(cv: float) -> int:
    """ceil(ln(1 / SHARE_WAITED_FOR) * cv² / (2 (1 - LOAD))), at least 2; cv: std over mean of the times of batches."""
    return max(LEAST_AHEAD, math.ceil(math.log(1 / SHARE_WAITED_FOR) * cv**2 / (2 * (1 - LOAD))))


class Ahead:
    """The number of batches ahead: a given one, or what the spread of the decoding times asks for.

    Args:
        setting: a whole number of at least 1; or "auto": `batches_for_spread` of the last 1,024 batches of this size,
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
            times = np.array(self._seconds)
            most = MOST_AHEAD_BYTES // self._batch_bytes
            self._number = max(LEAST_AHEAD, min(batches_for_spread(times.std() / times.mean()), most))
        return self._number


def timed(task: Callable[[], None], seconds: list[float]) -> None:
    """Run `task`, and append how long it took."""
    begin = time.perf_counter()
    task()
    seconds.append(time.perf_counter() - begin)
