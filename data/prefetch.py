"""Runs tasks ahead of the consumer of their results, in order, until closed."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class PrefetchIterator(Generic[T]):
    """Results of `tasks` in order, with `num_workers` tasks running at a time.

    At most `num_workers + num_ahead` results exist ahead of the consumer. `next()` raises what a task raises, and then
    the iterator is closed. Threads end when the tasks do, on `close()`, and when the iterator is deleted; each
    finishes its current task.

    Args:
        tasks: functions without arguments; iterated in the consumer's thread.
        num_workers: threads; 0 runs each task when its result is requested.
        num_ahead: results that may wait for the consumer, besides the one per running worker.

    Attributes:
        num_ahead: may be changed; from the next `next()` on.
    """

    def __init__(self, tasks: Iterable[Callable[[], T]], *, num_workers: int, num_ahead: int = 2) -> None:
        self._tasks = iter(tasks)
        self._pending: deque[Future[T]] = deque()
        self._state = "open"
        self._num_workers, self.num_ahead = num_workers, num_ahead
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="brisk-data") if num_workers else None
        if self._pool is not None:
            try:
                self._submit(self._pool, num_workers + num_ahead)
            except BaseException:
                self.close()
                raise

    def __iter__(self) -> PrefetchIterator[T]:
        return self

    def __next__(self) -> T:
        if self._state == "exhausted":
            raise StopIteration
        if self._state == "closed":
            raise RuntimeError("no more results: the iterator was closed before its end")
        try:
            if self._pool is None:
                return next(self._tasks)()
            if not self._pending:
                raise StopIteration
            self._submit(self._pool, self._num_workers + self.num_ahead + 1)  # the one returned here leaves
            return self._pending.popleft().result()
        except StopIteration:
            self.close()
            self._state = "exhausted"
            raise
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Cancel tasks that have not started and wait for the threads to end. May be repeated."""
        if self._state == "open":
            self._state = "closed"
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()

    def __del__(self) -> None:
        if getattr(self, "_pool", None) is not None:
            self.close()

    def _submit(self, pool: ThreadPoolExecutor, most_pending: int) -> None:
        for task in itertools.islice(self._tasks, max(0, most_pending - len(self._pending))):
            self._pending.append(pool.submit(task))
