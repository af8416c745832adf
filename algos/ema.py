"""Exponential moving average of the weights: train with the weights themselves, evaluate and export their average."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .framework.base import Contract, Event, Logger, Resource, SpeedUp, State, world_size
from .framework.shards import is_sharded, local_part

Average = Mapping[str, Tensor]  # name of a parameter or a buffer -> its average


def ema_update(average: nn.Module | Average, model: nn.Module, *, decay: float) -> None:
    """Move `average` towards `model`, in place: a <- decay · a + (1 - decay) · w.

    Parameters and floating-point buffers (batch norm's running statistics) are averaged; integer buffers (its count of
    batches) are copied, and non-persistent buffers are left alone. Names ignore wrappers such as DDP.

    average: another module of the same structure (`copy.deepcopy(model)` starts one), or its tensors by name. Under
        FSDP2 both must be sharded the same way; no rank waits for another.
    decay: share of the average that is kept, in [0, 1]. After t updates a weight's contribution has shrunk by decay^t,
        to a half after log(1/2) / log(decay) updates.

    Raises ValueError for a decay out of range, names or shapes that do not match, and for a model under FSDP1.

    Polyak and Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging"; with exponential weights and deep
    networks, Tarvainen and Valpola 2017 (arXiv 1703.01780), equation 2.
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay {decay} must lie in [0, 1]; 0.999 is usual")
    averages, current = _matched(average, model)
    moving = [name for name, tensor in averages.items() if tensor.is_floating_point()]
    with torch.no_grad():
        if moving:
            into = [local_part(averages[name]) for name in moving]
            towards = [local_part(current[name]).to(one) for name, one in zip(moving, into, strict=True)]
            get_ema_multi_avg_fn(decay)(into, towards, 0)
        for name in averages.keys() - moving:
            local_part(averages[name]).copy_(local_part(current[name]))


@contextlib.contextmanager
def averaged_weights(model: nn.Module, average: nn.Module | Average) -> Iterator[nn.Module]:
    """Inside the context `model` holds `average`; afterwards its previous values, bit for bit.

    This takes one more copy of the weights.

    Export inside: `with averaged_weights(model, average): torch.save(model.state_dict(), path)`. May be nested.
    Raises ValueError as `ema_update` does.
    """
    before = _put(model, average)
    try:
        yield model
    finally:
        _put(model, before)


def averaged_state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The model's state dict with its average in place of the weights, from a checkpoint of a run with `EMA`.

    checkpoint: what torch.load returned for one file of Composer's Trainer.
    Raises ValueError when it holds no average.
    """
    model = checkpoint["state"]["model"]
    if averages := averages_in(checkpoint):
        return {**model, **{name: tensor.to(model[name]) for name, tensor in averages.items()}}
    raise ValueError(
        "the checkpoint holds no averaged weights; give one of a run with the algorithm ema, after its first update"
    )


def averages_in(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The averages that a checkpoint holds, by the model's names; empty without `EMA`, or before its first update."""
    for name, saved in checkpoint["state"].get("algorithms", ()):
        if name == EMA.__qualname__:
            return dict(saved["tensors"])
    return {}


class EMA(SpeedUp):
    """Averages the weights over training and evaluates the average; training itself does not change.

    Give exactly one of the first two:
    half_life_steps: steps after which a weight's contribution to the average has halved, above 0.
    decay: share of the average that is kept at each step, in (0, 1).
    update_interval_steps: steps between updates, 1 or more; an update then keeps decay^interval, so the average
        covers as many steps as before.

    The first update copies the weights, so the random start does not contribute. Evaluation and prediction use the
    average; the weights are restored afterwards, bit for bit. A checkpoint holds both: the model's entry has the
    weights (a resumed run continues from these), this algorithm's their average; `averaged_state_dict` extracts it.

    average: after the first update, the averages by name; for `averaged_weights`.
    """

    contract = Contract(after=[Resource.MODEL])
    events = (
        Event.INIT,
        Event.BEFORE_LOAD,
        Event.AFTER_LOAD,
        Event.FIT_START,
        Event.BATCH_END,
        Event.EVAL_START,
        Event.EVAL_END,
        Event.PREDICT_START,
        Event.PREDICT_END,
    )

    def __init__(
        self,
        *,
        half_life_steps: float | None = None,
        decay: float | None = None,
        update_interval_steps: int = 1,
    ) -> None:
        if (half_life_steps is None) == (decay is None):
            raise ValueError(
                f"half_life_steps is {half_life_steps} and decay is {decay}; give exactly one of them, for example "
                "decay=0.999, which is a half-life of 693 steps"
            )
        if half_life_steps is not None and not half_life_steps > 0:
            raise ValueError(f"half_life_steps {half_life_steps} must be above 0")
        if decay is not None and not 0 < decay < 1:
            raise ValueError(
                f"decay {decay} must lie between 0 and 1; 0.999 is usual, and to average nothing leave EMA out"
            )
        if update_interval_steps < 1:
            raise ValueError(f"update_interval_steps {update_interval_steps} must be at least 1")
        decay_a_step = decay if decay is not None else 0.5 ** (1 / (half_life_steps or 1))
        self.update_interval_steps = update_interval_steps
        self.decay_an_update = decay_a_step**update_interval_steps
        self.average: dict[str, Tensor] | None = None
        self._num_updates = 0
        self._loaded: Mapping[str, Any] | None = None
        self._weights: dict[str, Tensor] = {}  # the model's own, while it holds the average
        self._evaluations = 0  # in progress, nested

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Update the average after a step, and put it into the model during evaluation."""
        if event == Event.INIT:
            _refuse_other_averages(self, state)
        elif event == Event.BEFORE_LOAD:
            if state.fsdp_sharded_state_dict_enabled:  # loaded in place, so it must exist
                self.average = _snapshot(state.model)
        elif event == Event.AFTER_LOAD:
            self._take_loaded(state)
        elif event == Event.FIT_START:
            self._give_back(state)  # after an evaluation that failed
        elif event == Event.BATCH_END:
            if state.timestamp.batch.value % self.update_interval_steps == 0:
                self._update(state)
        elif event in (Event.EVAL_START, Event.PREDICT_START):
            if self._evaluations == 0 and self.average is not None:
                _broadcast_buffers(self.average, state.model)
                self._weights = _put(state.model, self.average)
            self._evaluations += 1
        elif self._evaluations == 1:
            self._give_back(state)
        else:
            self._evaluations -= 1

    def state_dict(self) -> dict[str, Any]:
        """The average, unsharded on every rank: under FSDP all ranks must call this together."""
        return {
            "num_updates": self._num_updates,
            "tensors": {name: _whole(tensor) for name, tensor in (self.average or {}).items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded = state  # the model may be sharded only after this

    def _update(self, state: State) -> None:
        if self.average is None:
            self.average = _snapshot(state.model)
        else:
            ema_update(self.average, state.model, decay=self.decay_an_update)
        self._num_updates += 1

    def _give_back(self, state: State) -> None:
        if self._weights:
            _put(state.model, self._weights)
        self._weights, self._evaluations = {}, 0

    def _take_loaded(self, state: State) -> None:
        self.average, loaded, self._loaded = None, self._loaded, None
        if loaded is not None and loaded["num_updates"]:
            self.average = _like_model(loaded["tensors"], state.model)
            self._num_updates = loaded["num_updates"]
        elif loaded is None and state.timestamp.batch.value > 0:
            raise ValueError(
                f"the checkpoint, of step {state.timestamp.batch.value}, was trained without ema and holds no averaged "
                "weights; go on without it (algorithms.ema=null), or start a new run from its weights alone"
            )


# --- tensors by name -----------------------------------------------------------------------------------------------


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers under the names of the unwrapped model, sharded ones as shards."""
    model = _unwrapped(module)
    transient = set()
    for prefix, part in model.named_modules():
        if hasattr(part, "_fsdp_wrapped_module"):
            raise ValueError(
                "the model is sharded by FSDP1, which flattens weights into pieces without names of their own; "
                "average under FSDP2 (fsdp version 2), DDP or on one device"
            )
        if hasattr(part, "unshard") and hasattr(part, "reshard"):
            part.reshard()  # FSDP2's root stays unsharded after an evaluation; this needs its shards
        transient |= {f"{prefix}.{name}".removeprefix(".") for name in part._non_persistent_buffers_set}
    buffers = {name: buffer for name, buffer in model.named_buffers() if name not in transient}
    return {_bare(name): tensor.detach() for name, tensor in [*model.named_parameters(), *buffers.items()]}


def _unwrapped(module: nn.Module) -> Any:
    while isinstance(module, DistributedDataParallel):
        module = module.module
    return module


def _bare(name: str) -> str:
    # Prefixes that torch.compile and activation checkpointing add.
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def _matched(average: nn.Module | Average, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    averages = _named_tensors(average) if isinstance(average, nn.Module) else dict(average)
    current = _named_tensors(model)
    _check_match({name: tensor.shape for name, tensor in averages.items()}, current)
    return averages, current


def _check_match(shapes: Mapping[str, Sequence[int]], current: Average) -> None:
    missing, unexpected = sorted(current.keys() - shapes.keys()), sorted(shapes.keys() - current.keys())
    if missing or unexpected:
        raise ValueError(
            f"the average and the model are of different networks: the average lacks {_some(missing)} and has "
            f"{_some(unexpected)} besides; use the average of this network"
        )
    for name, shape in shapes.items():
        if tuple(shape) != tuple(current[name].shape):
            raise ValueError(
                f"the average's {name} has shape {list(shape)} and the model's {list(current[name].shape)}; "
                "use the average of this network"
            )


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:3], *([f"{len(names) - 3} more"] if len(names) > 3 else [])]) or "nothing"


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy to average into, in float32 at least: bfloat16 would round a step of 1/1000 of the way to zero."""
    return {
        name: tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if tensor.is_floating_point() else tensor
        for name, tensor in ((name, tensor.clone()) for name, tensor in _named_tensors(model).items())
    }


@torch.no_grad()
def _put(model: nn.Module, values: nn.Module | Average) -> dict[str, Tensor]:
    """Put `values` into `model`; returns copies of what it held."""
    values, current = _matched(values, model)
    before = {name: tensor.clone() for name, tensor in current.items()}
    for name, tensor in current.items():
        local_part(tensor).copy_(local_part(values[name]))
    return before


def _broadcast_buffers(average: Average, model: nn.Module) -> None:
    """Send rank 0's averaged buffers, which are those of a checkpoint, to every rank.

    Ranks share gradients and so averaged parameters, but batch norm's statistics are of each rank's own images.
    """
    if world_size() == 1:
        return
    for name in sorted(average.keys() - {_bare(name) for name, _ in _unwrapped(model).named_parameters()}):
        if not is_sharded(average[name]):
            torch.distributed.broadcast(average[name], src=0)


def _like_model(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Unsharded `tensors` of a checkpoint, on the model's device and sharded as it is."""
    average = _snapshot(model)
    _check_match({name: tensor.shape for name, tensor in tensors.items()}, average)
    for name, tensor in average.items():
        whole = tensors[name]
        if is_sharded(tensor):
            from torch.distributed.tensor import distribute_tensor

            sharded: Any = tensor
            whole = distribute_tensor(whole.to(sharded.to_local()), sharded.device_mesh, sharded.placements)
        local_part(tensor).copy_(local_part(whole))
    return average


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor().cpu() if is_sharded(tensor) else tensor


def _refuse_other_averages(algorithm: EMA, state: State) -> None:
    for other in state.algorithms:
        # Composer's EMA and SWA have these names too. Each would restore the other's average as the weights.
        if other is not algorithm and type(other).__name__ in ("EMA", "SWA"):
            raise ValueError(
                f"ema and another algorithm, {type(other).__module__}.{type(other).__name__}, would both swap the "
                "weights for an average; only one can: turn one of them off"
            )
