"""Measures groups of training steps within a time budget; what cannot be measured is a result that says why."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import importlib.util
import random
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks.algorithm_variants import NUM_CLASSES, Bench, Step, baseline
from benchmarks.gpu_step.plan import CHANGE_THE_MODEL, Case, Group
from benchmarks.measuring import time_step

MEASURED, NO_MEMORY, FAILED, LEFT_OUT = "measured", "out of memory", "failed", "left out"
PACKAGES = {"composer": "mosaicml", "timm": "timm", "antialiased_cnns": "antialiased_cnns",
            "pytorch_optimizer": "pytorch_optimizer"}  # fmt: skip
# What a case is taken to need until another one of its network was measured: to be ready uncompiled, for rounds.
_READY_SECONDS, _ROUNDS_SECONDS = 4.0, 3.0
_MEASURED_MS = {"cuda": 400.0, "cpu": 0.0}  # of steps in a measurement; on a CPU a single step will do
_FIRST_STEPS = {"cuda": 3, "cpu": 1}
_MOST_STEPS = 100
_WARM_STEPS = 3
_REASON_CHARACTERS = 100


@dataclass
class Result:
    """What became of a case. times_ms: of a step, one per round. ready_seconds: building, compiling and warming it up.

    peak_bytes: of the device's memory, that this step alone would need; None on a CPU. graph_breaks: of its
    model, where torch's compiler had to leave the graph.
    """

    case: Case
    status: str = LEFT_OUT
    note: str = ""
    times_ms: list[float] = field(default_factory=list)
    first_ms: float | None = None
    ready_seconds: float | None = None
    peak_bytes: int | None = None
    graph_breaks: int = 0

    @property
    def step_ms(self) -> list[float]:
        """The rounds' times; before the first round, the one of a measurement by itself."""
        return self.times_ms or ([self.first_ms] if self.first_ms is not None else [])


class Budget:
    """The time that there is, in seconds from now; None for no end."""

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun = clock()
        self.seconds = float("inf") if seconds is None else seconds

    @property
    def used(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._begun

    @property
    def left(self) -> float:
        """Seconds until the end, negative after it."""
        return self.seconds - self.used


@dataclass
class Runner:
    """Prepares and measures cases on one device. Steps and models are kept for as long as a later group needs them.

    say: gets a line on what is being done. compile_seconds: what a network is taken to need at first.
    """

    device: torch.device
    budget: Budget
    say: Callable[[str], None]
    backend: str = "inductor"
    compile_seconds: float = 40.0
    rounds: int | None = None
    results: list[list[Result]] = field(default_factory=list)
    titles: list[str] = field(default_factory=list)
    _benches: dict[tuple[Any, ...], Bench] = field(default_factory=dict)
    _steps: dict[Case, tuple[Step, float, int]] = field(default_factory=dict)
    _rest_bytes: dict[Any, int] = field(default_factory=dict)
    _ready_seconds: dict[tuple[str, bool], float] = field(default_factory=dict)
    _rounds_seconds: dict[str, float] = field(default_factory=dict)
    _random: random.Random = field(default_factory=lambda: random.Random(0))

    def run(self, groups: Sequence[Group], *, after_group: Callable[[int], None] = lambda index: None) -> None:
        """Measure `groups` in order; `results` has every case of theirs, whatever interrupts it.

        after_group: gets the index of each group when it is done, while its steps are still there.
        """
        for group in groups:
            self.results.append([Result(case) for case in group.cases])
            self.titles.append(group.title)
        try:
            for index, group in enumerate(groups):
                self._run_or_leave_out(index, group, self._eta(groups[index:]))
                after_group(index)
                self._forget_all_but(case for later in groups[index + 1 :] for case in later.cases)
        finally:
            for result in (result for results in self.results for result in results):
                if result.status == LEFT_OUT and not result.note:
                    result.note = "stopped before it"

    def expected_seconds(self, cases: Iterable[Case]) -> float:
        """Seconds that `cases` are likely to take together: as others of their network and mode did."""
        seconds, benches = 0.0, set(self._benches)
        for case in dict.fromkeys(cases):
            seconds += self._expected(case, benches)
            benches.add(_bench_key(case))
        return seconds

    def step(self, case: Case) -> Step | None:
        """The step of a case that was measured and is still wanted."""
        made = self._steps.get(case)
        return made[0] if made else None

    # --- one group ---------------------------------------------------------------------------------------------

    def _run_or_leave_out(self, index: int, group: Group, eta: str) -> None:
        needed = self.expected_seconds(group.cases)
        if index > 0 and needed > self.budget.left:  # of the first, what the time allows
            for result in self.results[index]:
                result.note = f"no time: needs some {needed:.0f} s, {max(0, self.budget.left):.0f} s left"
        else:
            self.say(f"{index + 1} of {len(self.results)}: {group.title}, {eta}")
            self._run_group(group, self.results[index])

    def _run_group(self, group: Group, results: list[Result]) -> None:
        ready: list[Result] = []
        for result in results:
            # The first always begins; one of the others may have taken longer than expected.
            if ready and self._expected(result.case, self._benches) > self.budget.left:
                result.note = f"no time: {max(0, self.budget.left):.0f} s left"
            elif self._guarded(result, self._prepare):
                ready.append(result)
        begun = time.monotonic()
        for number in range(self.rounds or group.rounds):
            if not ready or self.budget.left < (time.monotonic() - begun) / max(1, number):
                break
            self._round(ready)
        network, took = group.cases[0].network, (time.monotonic() - begun) / max(1, len(ready))
        self._rounds_seconds[network] = max(took, self._rounds_seconds.get(network, 0.0))

    def _round(self, ready: list[Result]) -> None:
        gc.collect()
        try:
            for result in self._random.sample(ready, len(ready)):
                if not self._guarded(result, self._measure):
                    ready.remove(result)
        finally:  # of a round that was cut short, nothing: ratios are those of whole rounds
            whole = min((len(result.times_ms) for result in ready), default=0)
            for result in ready:
                del result.times_ms[whole:]

    def _guarded(self, result: Result, work: Callable[[Result], None]) -> bool:
        """Whether `work` succeeded. A failure becomes the result, and what it held is freed."""
        try:
            work(result)
        except _MissingError as error:
            result.status, result.note = LEFT_OUT, str(error)
        except Exception as error:  # another library, or a compiler, may fail in any way; the next case runs
            result.status = NO_MEMORY if is_out_of_memory(error) else FAILED
            result.note = "" if result.status == NO_MEMORY else one_line(error)
            result.times_ms, result.first_ms = [], None
        else:
            result.status = MEASURED
            return True
        self._steps.pop(result.case, None)
        self._free()
        return False

    def _prepare(self, result: Result) -> None:
        case, begun = result.case, time.monotonic()
        if case not in self._steps:
            kind = case.network, _compiles(case, self._benches)
            require(case.library)
            before, breaks = self._allocated(), _graph_breaks()
            step = self._make(case)
            for _ in range(_WARM_STEPS):
                time_step(step, self.device, 1)
            self._rest_bytes[case] = self._allocated() - before
            seconds = time.monotonic() - begun
            self._steps[case] = step, seconds, _graph_breaks() - breaks
            self._ready_seconds[kind] = max(seconds, self._ready_seconds.get(kind, 0.0))
        step, result.ready_seconds, result.graph_breaks = self._steps[case]
        result.first_ms = self._time(case, step, result)

    def _measure(self, result: Result) -> None:
        result.times_ms.append(self._time(result.case, self._steps[result.case][0], result))

    def _time(self, case: Case, step: Step, result: Result) -> float:
        known = result.times_ms[0] if result.times_ms else result.first_ms
        kind = self.device.type
        steps = _FIRST_STEPS[kind] if known is None else _clamp(round(_MEASURED_MS[kind] / known), 1, _MOST_STEPS)
        before = self._allocated()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        cost_ms, wall_ms = time_step(step, self.device, steps)
        if self.device.type == "cuda":
            rest = self._rest_bytes.get(case, 0) + self._rest_bytes.get(_bench_key(case), 0)
            result.peak_bytes = torch.cuda.max_memory_allocated(self.device) - before + rest
        return cost_ms if self.device.type == "cuda" else wall_ms

    # --- what steps are made of -----------------------------------------------------------------------------------

    def _make(self, case: Case) -> Step:
        before = self._allocated()
        key = _bench_key(case)
        if key not in self._benches:
            self._benches[key] = self._bench(case)
            if case.algorithm not in CHANGE_THE_MODEL:
                self._benches[key].plain_model  # noqa: B018 (several steps share it)
            self._rest_bytes[key] = self._allocated() - before
        variant = case.variant
        return (variant.make if variant else baseline)(self._benches[key])

    def _bench(self, case: Case) -> Bench:
        return Bench(
            case.network,
            case.image_size,
            case.batch_size,
            self.device,
            torch.channels_last if case.channels_last else torch.contiguous_format,
            case.compiled,
            precision=case.precision,
            build=functools.partial(build_network, case.network, image_size=case.image_size),
            backend=self.backend,
        )

    def _forget_all_but(self, wanted: Iterable[Case]) -> None:
        cases = set(wanted)
        keys = {_bench_key(case) for case in cases}
        gone = [case for case in self._steps if case not in cases]
        for case in gone:
            del self._steps[case]
        for key in [key for key in self._benches if key not in keys]:
            del self._benches[key]
        if gone:
            self._free()

    def _free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            with contextlib.suppress(RuntimeError):  # after a kernel failed, every call fails, and says so in its case
                torch.cuda.empty_cache()

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    # --- time -------------------------------------------------------------------------------------------------------

    def _expected(self, case: Case, benches: Collection[tuple[Any, ...]]) -> float:
        if case.library in PACKAGES and importlib.util.find_spec(case.library) is None:
            return 0.0
        rounds = self._rounds_seconds.get(case.network, _ROUNDS_SECONDS)
        if case in self._steps:
            return rounds
        kind = case.network, _compiles(case, benches)
        return rounds + self._ready_seconds.get(kind, self.compile_seconds if kind[1] else _READY_SECONDS)

    def _eta(self, groups: Sequence[Group]) -> str:
        ahead = self.expected_seconds(case for group in groups for case in group.cases)
        return f"{min(ahead, max(0.0, self.budget.left)):.0f} s to go"


def build_network(name: str, *, num_classes: int = NUM_CLASSES, image_size: int) -> nn.Module:
    """The network of models/, or timm's, whose position embeddings are for `image_size` px where it has some."""
    from models import registry

    sized = {"image_size": image_size} if "vit" in name else {}
    return registry.find(name)(num_classes=num_classes, **sized)


def require(library: str) -> None:
    """Import `library`, Composer as run.py does. Raises _MissingError with the reason if that fails."""
    if library not in PACKAGES:
        return
    if importlib.util.find_spec(library) is None:
        raise _MissingError(f"{PACKAGES[library]} is not installed")
    from training.engines.lean_import import import_lean

    import_lean()
    try:
        importlib.import_module("composer.functional" if library == "composer" else library)
    except Exception as error:  # a library too old for this torch may fail in any way
        raise _MissingError(f"{PACKAGES[library]} cannot be imported: {one_line(error)}") from None


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether `error`, or what led to it, is a lack of memory on the device or the machine."""
    while error is not None:
        told = str(error).lower()
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            return True
        if isinstance(error, RuntimeError) and any(words in told for words in _NO_MEMORY_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


_NO_MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")


def one_line(error: BaseException) -> str:
    """The kind of `error` and the beginning of what it says."""
    said = " ".join(str(error).split())
    text = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return text if len(text) <= _REASON_CHARACTERS else f"{text[: _REASON_CHARACTERS - 3]}..."


class _MissingError(Exception):
    """A library that a case needs is not to be had."""


def _bench_key(case: Case) -> tuple[Any, ...]:
    return case.network, case.image_size, case.batch_size, case.precision, case.channels_last, case.compiled


def _compiles(case: Case, benches: Collection[tuple[Any, ...]]) -> bool:
    """Whether torch's compiler has to work for it: it has a model of its own, or is the first of those sharing one."""
    return case.compiled and (case.algorithm in CHANGE_THE_MODEL or _bench_key(case) not in benches)


def _graph_breaks() -> int:
    from torch._dynamo.utils import counters

    return sum(counters["graph_break"].values())


def _clamp(value: int, low: int, high: int) -> int:
    return max(low, min(high, value))
