"""What DistributedDataParallel averages over ranks when an algorithm changes what is trained during a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# The methods with which DistributedDataParallel rebuilds its reducer when unpickled. They are not public.
_BUILDERS = ("_build_params_for_reducer", "_build_debug_param_to_name_mapping", "_ddp_init_helper")


def can_change_what_is_trained() -> bool:
    """Whether this torch supports `average_what_is_trained`."""
    reducer = getattr(torch.distributed, "Reducer", None)  # absent if torch is built without distributed
    return hasattr(reducer, "_remove_autograd_hooks") and all(
        hasattr(DistributedDataParallel, name) for name in _BUILDERS
    )


@contextmanager
def average_what_is_trained(model: nn.Module) -> Iterator[None]:
    """Wraps a change of `requires_grad`: the ranks of `model` then average the gradients of what is trained after it.

    DistributedDataParallel waits for a gradient of every parameter that was trained when it was built; with
    find_unused_parameters it walks the graph in every step to find those without one. Rebuilding its reducer at the
    change avoids both. Enter this on all ranks, between two steps. It does nothing for other models, for one with
    find_unused_parameters, or if nothing changes.
    """
    before = _trained(model)
    yield
    if not isinstance(model, DistributedDataParallel) or model.find_unused_parameters or _trained(model) == before:
        return
    if not can_change_what_is_trained():
        raise RuntimeError(
            f"torch {torch.__version__} cannot change which gradients DistributedDataParallel averages; wrap the model "
            "with find_unused_parameters=True"
        )
    model.reducer._remove_autograd_hooks()
    parameters, expect_sparse_gradient = model._build_params_for_reducer()
    names = model._build_debug_param_to_name_mapping(parameters)
    model._ddp_init_helper(parameters, expect_sparse_gradient, names, model.static_graph)
    if model.static_graph:
        model.reducer._set_static_graph()
        model._static_graph_delay_allreduce_enqueued = False
    hooks, model._comm_hooks = model._comm_hooks, []
    for hook, state in hooks:
        model.register_comm_hook(state, hook)


def _trained(model: nn.Module) -> list[bool]:
    return [parameter.requires_grad for parameter in model.parameters()]
