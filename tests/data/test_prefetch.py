"""Prefetching: order, bounds, errors, and the end of its threads."""

from __future__ import annotations

import threading
from functools import partial

import pytest

from data.prefetch import PrefetchIterator

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def _no_thread_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_results_come_in_order_and_end(num_workers: int):
    iterator = PrefetchIterator((partial(pow, i, 2) for i in range(50)), num_workers=num_workers)
    assert list(iterator) == [i**2 for i in range(50)]
    assert list(iterator) == []


@pytest.mark.parametrize("num_workers", [1, 2])
def test_no_more_than_promised_is_done_ahead(num_workers: int):
    asked = []
    tasks = (partial(asked.append, i) for i in range(100))
    iterator = PrefetchIterator(tasks, num_workers=num_workers)
    for taken in range(5):
        assert len(asked) <= taken + num_workers + 2
        next(iterator)
    iterator.close()
    assert len(asked) <= 5 + num_workers + 2


def test_how_much_is_done_ahead_may_change():
    drawn = []
    tasks = (partial(int, drawn.append(i) or i) for i in range(100))
    iterator = PrefetchIterator(tasks, num_workers=2, num_ahead=3)
    assert len(drawn) == 5
    found = [next(iterator)]
    assert len(drawn) == 6
    iterator.num_ahead = 7
    found.append(next(iterator))
    assert len(drawn) == 2 + 2 + 7
    iterator.num_ahead = 1
    for _ in range(6):
        found.append(next(iterator))
        assert len(drawn) == 11
    found.append(next(iterator))
    assert len(drawn) == 12
    assert found + list(iterator) == list(range(100))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_reaches_the_consumer_in_its_turn(num_workers: int):
    iterator = PrefetchIterator((partial(divmod, 6, 3 - i) for i in range(50)), num_workers=num_workers)
    assert [next(iterator) for _ in range(3)] == [(2, 0), (3, 0), (6, 0)]
    with pytest.raises(ZeroDivisionError):
        next(iterator)
    with pytest.raises(RuntimeError, match="was closed"):
        next(iterator)


def test_an_error_in_the_tasks_themselves():
    def tasks():
        yield partial(int, 1)
        raise KeyError("gone")

    with pytest.raises(KeyError, match="gone"):
        list(PrefetchIterator(tasks(), num_workers=2))


def test_closing_and_dropping_end_the_threads():
    for leave in (lambda iterator: iterator.close(), lambda iterator: None):
        iterator = PrefetchIterator((partial(int, i) for i in range(50)), num_workers=3)
        next(iterator)
        leave(iterator)
        del iterator
        assert not [t for t in threading.enumerate() if t.name.startswith("brisk-data")]
