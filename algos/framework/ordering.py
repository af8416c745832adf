"""One order for a set of algorithms, determined by their Contracts, not by the order in which they were listed."""

from __future__ import annotations

from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter

from .base import Contract, Resource


def arrange(contracts: Mapping[str, Contract]) -> list[str]:
    """Names of `contracts` in the order in which they must act.

    An algorithm acts after every other one that writes a resource in its `after`. Ties are broken by name, so the same
    set always gives the same order. An algorithm that both writes and waits for a resource waits for the other writers.

    Raises ValueError when two own one resource, or when the Contracts form a cycle.
    """
    _refuse_two_owners(contracts)
    sorter = TopologicalSorter(
        {name: _predecessors(name, contracts) for name in contracts},
    )
    try:
        sorter.prepare()
    except CycleError as error:
        circle = " -> ".join(error.args[1])
        raise ValueError(f"algorithms wait for each other: {circle}; turn one of them off") from None
    order: list[str] = []
    while sorter.is_active():
        ready = sorted(sorter.get_ready())
        order.extend(ready)
        sorter.done(*ready)
    return order


def _predecessors(name: str, contracts: Mapping[str, Contract]) -> set[str]:
    waits_for = contracts[name].after
    return {
        other
        for other, contract in contracts.items()
        if other != name and contract.writes & (waits_for - _mutual(contracts[name], contract))
    }


def _mutual(mine: Contract, theirs: Contract) -> frozenset[Resource]:
    # Two that both write and both wait for a resource would wait for each other; they commute, or one would own it.
    return mine.after & theirs.after & mine.writes & theirs.writes


def _refuse_two_owners(contracts: Mapping[str, Contract]) -> None:
    owners: dict[Resource, str] = {}
    for name in sorted(contracts):
        for resource in sorted(contracts[name].owns):
            if resource in owners:
                raise ValueError(
                    f"{owners[resource]} and {name} both decide {resource.value}; only one can: "
                    f"turn one off with algorithms.{owners[resource]}=null or algorithms.{name}=null"
                )
            owners[resource] = name
