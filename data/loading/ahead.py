"""How many decoded batches wait for the consumer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

BatchesAhead: TypeAlias = "Literal['auto'] | int"
LEAST_AHEAD = 2


class Ahead:
    def __init__(self, setting: BatchesAhead) -> None:
        self._setting = setting

    def batches(self, batch_bytes: int) -> int:
        return LEAST_AHEAD if self._setting == "auto" else self._setting

    def timed(self, task: Callable[[], None]) -> Callable[[], None]:
        return task
