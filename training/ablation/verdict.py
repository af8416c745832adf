"""What the results of an ablation say: mean, spread, and whether two variants can be told apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.ablation.variants import ALL, NONE

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; from 30 on, the normal distribution's.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
      2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045)  # fmt: skip
_NORMAL = 1.96


@dataclass(frozen=True)
class Row:
    """A variant over its seeds. top1 in shares of 1; the spread is the sample's standard deviation."""

    name: str
    algorithms: tuple[str, ...]
    epochs: int
    seeds: int
    top1: float
    spread: float | None
    train_seconds: float
    verdict: str


@dataclass(frozen=True)
class Difference:
    """Mean of the paired differences in top-1 over common seeds, and the half-width of its 95 % interval."""

    mean: float
    half_width: float | None
    seeds: int

    @property
    def is_told(self) -> bool:
        """Whether the interval excludes 0."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference:
    """first - second, over the seeds that both have: mean +- t * s / sqrt(n) of the pairs' differences."""
    seeds = sorted(first.keys() & second.keys())
    gaps = [first[seed] - second[seed] for seed in seeds]
    if not gaps:
        return Difference(math.nan, None, 0)
    mean = sum(gaps) / len(gaps)
    if len(gaps) < 2:
        return Difference(mean, None, 1)
    t = _T[len(gaps) - 2] if len(gaps) - 2 < len(_T) else _NORMAL
    return Difference(mean, t * spread(gaps) / math.sqrt(len(gaps)), len(gaps))


def spread(values: Sequence[float]) -> float:
    """The sample's standard deviation; 0 for a single value."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1))


def rows(results: Sequence[Mapping[str, Any]], *, equal: str) -> list[Row]:
    """The table at equal epochs or cost, from the results of single runs, in the order of their variants.

    An algorithm helps if `all` is better than without it; alone, if it is better than `none`.
    """
    found = [one for one in results if one["equal"] == equal]
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for one in found:
        by_name.setdefault(one["variant"], []).append(one)
    top1 = {name: {one["seed"]: one["top1"] for one in ones} for name, ones in by_name.items()}
    made = []
    for name, ones in by_name.items():
        values = [one["top1"] for one in ones]
        made.append(
            Row(
                name=name,
                algorithms=tuple(ones[0]["algorithms"]),
                epochs=ones[0]["epochs"],
                seeds=len(ones),
                top1=sum(values) / len(values),
                spread=spread(values) if len(values) > 1 else None,
                train_seconds=sum(one["train_seconds"] for one in ones) / len(ones),
                verdict=_verdict(name, top1),
            )
        )
    return made


def recommended(table: Sequence[Row], results: Sequence[Mapping[str, Any]], *, equal: str) -> tuple[Row, str]:
    """The cheapest of the variants that cannot be told apart from the best one, and why."""
    best = max(table, key=lambda row: row.top1)
    top1 = {
        row.name: {one["seed"]: one["top1"] for one in results if one["variant"] == row.name and one["equal"] == equal}
        for row in table
    }
    alike = [row for row in table if row is best or not _is_worse(difference(top1[row.name], top1[best.name]))]
    chosen = min(alike, key=lambda row: row.train_seconds)
    if chosen is best:
        others = "no cheaper variant is as good" if len(alike) > 1 else "every other variant is worse"
        return best, f"{best.name} has the highest top-1 ({100 * best.top1:.2f} %), and {others}"
    gap = 100 * (best.top1 - chosen.top1)
    return chosen, (
        f"{best.name} has the highest top-1 ({100 * best.top1:.2f} %); {chosen.name} is not told apart from it "
        f"({gap:.2f} points below) and trains in {chosen.train_seconds:,.1f} s instead of {best.train_seconds:,.1f} s"
    )


def pareto_front(table: Sequence[Row]) -> list[Row]:
    """The variants that no other beats in both top-1 and training time, the fastest first."""
    front: list[Row] = []
    for row in sorted(table, key=lambda row: (row.train_seconds, -row.top1)):
        if not front or row.top1 > front[-1].top1:
            front.append(row)
    return front


def _is_worse(gap: Difference) -> bool:
    # With one seed nothing is told apart by an interval; then only what is not below counts as alike.
    return gap.mean < 0 and (gap.is_told or gap.half_width is None)


def _verdict(name: str, top1: Mapping[str, Mapping[int, float]]) -> str:
    if name == NONE:
        return ""
    against = ALL if name.startswith("without ") else NONE
    if against not in top1:
        return ""
    gap = difference(top1[name], top1[against])
    if not gap.seeds:
        return ""
    sign = "+" if gap.mean >= 0 else "-"
    text = f"{sign}{100 * abs(gap.mean):.2f} points against {against}"
    if gap.half_width is None:
        return f"{text}; one seed, not told apart"
    return f"{text} (± {100 * gap.half_width:.2f})" + ("" if gap.is_told else ", not told apart")
