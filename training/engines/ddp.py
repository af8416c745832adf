"""How DistributedDataParallel averages gradients, in ways that Composer's Trainer does not let anybody set.

Gradients are views of the buffers that the ranks average, instead of copies: the same numbers in less memory and one
copy less. `gradient_compression` sends them in 16 bits. static_graph is left off: torch fails an assertion when a batch
has several microbatches, and it saves a search for unused parameters that is not made here anyway
(algos/framework/ranks.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from composer.trainer import trainer
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from training.recipe.keys import Compression

_composers: Any = trainer  # the module, where the Trainer looks its function up
_HOOKS: dict[Compression, Any] = {"bf16": default_hooks.bf16_compress_hook, "fp16": default_hooks.fp16_compress_hook}


def wrap_in_ddp(
    model: nn.Module, *, compression: Compression | None = None, find_unused_parameters: bool = False
) -> DistributedDataParallel:
    """The model with its gradients averaged over all ranks.

    compression: the type in which they travel; None: their own. Each rank divides its gradients by the number of ranks,
    rounds them, and adds up what it receives in that type; weights and optimizer see their own type.
    """
    wrapped = DistributedDataParallel(
        model, find_unused_parameters=find_unused_parameters, gradient_as_bucket_view=True
    )
    if compression is not None:
        wrapped.register_comm_hook(None, _HOOKS[compression])
    return wrapped


@contextmanager
def composer_wraps_so(compression: Compression | None) -> Iterator[None]:
    """Inside, a Trainer that is made wraps its model with `wrap_in_ddp`."""
    original = _composers.prepare_ddp_module

    def prepare(module: nn.Module, find_unused_parameters: bool) -> nn.Module:
        if not any(parameter.requires_grad for parameter in module.parameters()):
            return original(module, find_unused_parameters)
        return wrap_in_ddp(module, compression=compression, find_unused_parameters=find_unused_parameters)

    _composers.prepare_ddp_module = prepare
    try:
        yield
    finally:
        _composers.prepare_ddp_module = original
