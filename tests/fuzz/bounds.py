"""What every fuzzing process has: limits on memory and on the seconds of one example, and a count of the outcomes."""

from __future__ import annotations

import faulthandler
import json
import resource
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, Phase, settings

_SECONDS = 30.0  # of one example, on a machine with other work
_MEMORY_BYTES = 4 << 30  # addresses beside those that the imports take


class TooLong(BaseException):
    """An example has used up its seconds; no `except Exception` hides it."""


def limit_memory() -> None:
    """From here on an example that takes too much memory fails in this process, instead of ending another one."""
    warnings.simplefilter("ignore")
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + _MEMORY_BYTES,) * 2)


@contextmanager
def limited_seconds(seconds: float = _SECONDS) -> Iterator[None]:
    """Raises TooLong in Python code; code that does not return to Python ends the process with its stack."""
    faulthandler.dump_traceback_later(2 * seconds, exit=True)
    signal.signal(signal.SIGALRM, _too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()


def settings_of(examples: int) -> settings:
    """Hypothesis', the same examples each time."""
    return settings(
        max_examples=examples, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip


def report(outcomes: Counter[str]) -> None:
    """Print the outcomes and the peak of this process' memory, for `fuzzed`."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"outcomes": outcomes, "peak_bytes": peak}), flush=True)


def run(examples: int, fuzz: Callable[..., None], given: Any, outcomes: Counter[str]) -> None:
    """Call `fuzz` with `examples` of what the strategies `given` make, within the limits, and report."""
    limit_memory()
    settings_of(examples)(given(fuzz))()
    report(outcomes)


def _too_long(number: int, frame: Any) -> None:
    raise TooLong("an example took too long")


def arguments() -> tuple[int, list[str]]:
    """The number of examples and the rest of the command line."""
    return int(sys.argv[1]), sys.argv[2:]
