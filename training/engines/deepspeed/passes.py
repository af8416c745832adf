"""Forward and backward passes under DeepSpeed: the engine's own, and the first of the two that SAM takes.

SAM needs the whole batch's gradient, averaged over ranks, before the weights move. ZeRO reduces gradients only at the
step (stages 0 and 1), or takes each away as it is computed (stage 2). So the first pass is torch's own:
`torch.autograd.grad` runs none of DeepSpeed's hooks. The second is the engine's, as in any other step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from composer.core import Event, State
from composer.core.precision import get_precision_context
from composer.utils import dist
from torch import Tensor

from algos import SAM

_untyped: Any = torch  # torch's type stubs lack the functions that work on lists of tensors


class Pass(Protocol):
    """One pass over a batch's microbatches."""

    forward: Callable[[Any], Tensor]  # a microbatch -> the model's outputs
    backward: Callable[[Tensor], Any]  # adds a microbatch's gradients
    finish: Callable[[], None]  # called after the last microbatch's backward


class EnginePass:
    """The engine's, which keeps the gradients for its step."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.forward: Callable[[Any], Tensor] = engine

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    def finish(self) -> None:
        pass


class WholeGradientPass:
    """SAM's first, which leaves whole gradients in the parameters' `.grad`, as DDP does.

    average: average them over ranks.
    """

    def __init__(self, state: State, *, average: bool) -> None:
        self._state = state
        self._parameters = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
        self._average = average
        # In the parameters' layout and apart from each other, which autograd's own need not be.
        self._gradients = [torch.zeros_like(parameter) for parameter in self._parameters]

    def forward(self, microbatch: Any) -> Tensor:
        with get_precision_context(self._state.precision, self._state.precision_config):
            return self._state.model(microbatch)

    def backward(self, loss: Tensor) -> None:
        gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True, materialize_grads=True)
        _untyped._foreach_add_(self._gradients, gradients)

    def finish(self) -> None:
        if self._average:
            _average_over_ranks(self._gradients)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient


class Passes:
    """Chooses the pass for each step; the engine computes SAM's second one."""

    def __init__(self, state: State, engine: Any) -> None:
        self._state = state
        self._engines = EnginePass(engine)
        self._sam: Any = next((one for one in state.algorithms if isinstance(one, SAM)), None)
        if self._sam is not None:
            self._sam.compute_second_pass_with(self._engines.forward, self._engines.backward)

    def for_this_step(self) -> Pass:
        """Every rank must call this at the same step."""
        if self._sam is None or not self._sam.match(Event.AFTER_BACKWARD, self._state):
            return self._engines
        return WholeGradientPass(self._state, average=self._sam.perturbation == "global")


def _average_over_ranks(gradients: Sequence[Tensor]) -> None:
    if dist.get_world_size() == 1:
        return
    _untyped._foreach_div_(gradients, dist.get_world_size())
    sent = [torch.distributed.all_reduce(gradient, async_op=True) for gradient in gradients]
    for work in sent:
        assert work is not None
        work.wait()
