"""Composer's own algorithms under recipe names such as `composer.ema`, with a Contract for ordering.

They are Composer's classes. If one of them fails with what a recipe trains, the instance is patched:

    those that change layers    an optimizer of several parameter groups is kept consistent; all ranks draw the same new
                                weights, of which FSDP takes each rank's part
    ghost_batchnorm             evaluation accepts batches smaller than a ghost batch
    layer_freezing              frozen parameters stay in the optimizer, so checkpoints can be saved; a resumed run
                                freezes before its first step
"""

from __future__ import annotations

import difflib
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from .base import Contract, Event, Resource, global_rank, world_size

if TYPE_CHECKING:
    from .base import Algorithm

PREFIX = "composer."


def names() -> list[str]:
    """The recipe names of Composer's algorithms, sorted. Does not import Composer, so newer ones are missing."""
    return sorted(PREFIX + name for name in _KNOWN)


def find(name: str) -> Callable[..., Any]:
    """A function that makes the algorithm `name` (`composer.ema`) from its constructor's keyword arguments.

    It has the constructor's signature. It returns an instance of Composer's class, patched as above, with two
    attributes that this package's algorithms have too: `contract`, and `events`, those at which it may act. It raises
    ValueError for arguments that are unknown, missing or refused.

    Raises ValueError with the nearest match for an unknown name.
    """
    classes = _classes()
    if name not in classes:
        near = difflib.get_close_matches(name, classes, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"unknown algorithm {name!r}; Composer has: {', '.join(sorted(classes))}{hint}")
    cls = classes[name]

    def make(**settings: Any) -> Algorithm:
        _check_arguments(name, cls, settings)
        try:
            algorithm: Any = cls(**settings)
        except (ValueError, TypeError, AttributeError, AssertionError, ImportError) as error:  # how Composer refuses
            raise ValueError(f"{name} refuses {settings}: {error or type(error).__name__}") from error
        algorithm.contract, algorithm.events = _KNOWN.get(name.removeprefix(PREFIX), _UNKNOWN)
        _mend(algorithm, name.removeprefix(PREFIX))
        return algorithm

    make.__name__ = cls.__name__
    make.__signature__ = inspect.signature(cls)  # pyright: ignore[reportFunctionMemberAccess]
    return make


@dataclass(frozen=True)
class Described:
    """What `arrange` and a plan need to know of an algorithm that is not made."""

    contract: Contract
    events: tuple[Event, ...]


def describe(name: str) -> Described:
    """What one of Composer's algorithms does, without importing it. Raises KeyError for an unknown name."""
    return Described(*_KNOWN[name.removeprefix(PREFIX)])


def refuse_doubles(chosen: Iterable[str]) -> None:
    """ValueError when `chosen` names an algorithm of this package and Composer's of the same name."""
    chosen = set(chosen)
    for name in sorted(chosen):
        if PREFIX + name in chosen:
            raise ValueError(
                f"{name} and {PREFIX}{name} do the same; only one can: "
                f"turn one off with algorithms.{name}=null or algorithms.{PREFIX}{name}=null"
            )


def _classes() -> dict[str, type[Algorithm]]:
    from composer import algorithms
    from composer.core import Algorithm

    found: dict[str, type[Algorithm]] = {}
    for public in vars(algorithms).values():
        if inspect.isclass(public) and issubclass(public, Algorithm):
            # Each has its own package, with its name in snake_case: composer.algorithms.gyro_dropout.
            found[PREFIX + public.__module__.split(".")[2]] = public
    return found


def _check_arguments(name: str, cls: type[Algorithm], settings: dict[str, Any]) -> None:
    parameters = inspect.signature(cls).parameters
    for setting in settings:
        if setting not in parameters:
            near = difflib.get_close_matches(setting, parameters, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{name} has no setting {setting!r}; it has: {', '.join(parameters) or 'none'}{hint}")
    missing = [key for key, one in parameters.items() if one.default is one.empty and key not in settings]
    if missing:
        raise ValueError(f"{name} needs {' and '.join(missing)}, which have no default; give them")


# --- patches (Composer 0.32.1) ---------------------------------------------------------------------------------------


def _mend(algorithm: Any, name: str) -> None:
    # Attributes of the instance, which Composer's engine finds before the class's; partials of functions here pickle.
    if name == "layer_freezing":
        algorithm.match = partial(_is_among_events, algorithm)
        algorithm.apply = partial(_freeze, algorithm)
        algorithm.state_dict = dict  # nothing, and without Composer's warning of what is patched here
        algorithm.load_state_dict = dict
    elif name == "ghost_batchnorm":
        algorithm.apply = partial(_add_ghost_batchnorm, algorithm)
    elif Event.INIT in algorithm.events and Resource.MODEL in algorithm.contract.writes:
        algorithm.apply = partial(_apply_with_one_group, algorithm)


def _apply_with_one_group(algorithm: Any, event: Event, state: Any, logger: Any = None) -> None:
    """Composer's `apply`, with each optimizer's parameter groups merged for its duration.

    With more than one group, its module surgery refuses layers whose parameters are in different groups, or that gain
    parameters. A new parameter goes to the group with most parameters of the same ndim: a bias or a norm's weight to
    the one without weight decay, if there is one.
    """
    before = [(optimizer, list(optimizer.param_groups)) for optimizer in state.optimizers or ()]
    for optimizer, groups in before:
        if len(groups) > 1:
            optimizer.param_groups[:] = [{**groups[0], "params": [one for group in groups for one in group["params"]]}]
    with _drawing_as_rank_zero():
        type(algorithm).apply(algorithm, event, state, logger)
    for optimizer, groups in before:
        if len(groups) > 1:
            _share_out(optimizer.param_groups[0]["params"], groups)
            optimizer.param_groups[:] = [group for group in groups if group["params"]]


@contextmanager
def _drawing_as_rank_zero() -> Iterator[None]:
    """Inside, every rank draws what rank 0 does; the generators of the others are then as before."""
    if world_size() == 1:
        yield
        return
    import torch

    before = torch.get_rng_state()
    of_rank_zero = [before]
    torch.distributed.broadcast_object_list(of_rank_zero, src=0)
    torch.set_rng_state(of_rank_zero[0])
    try:
        yield
    finally:
        if global_rank() != 0:
            torch.set_rng_state(before)


def _share_out(parameters: list[Any], groups: list[dict[str, Any]]) -> None:
    """Put `parameters` back into their groups, and new ones into the group with most parameters like them."""
    place = {id(one): index for index, group in enumerate(groups) for one in group["params"]}
    alike = [Counter(min(one.ndim, 2) for one in group["params"]) for group in groups]
    for group in groups:
        group["params"] = []
    for parameter in parameters:
        counts = [counter[min(parameter.ndim, 2)] for counter in alike]
        groups[place.get(id(parameter), counts.index(max(counts)))]["params"].append(parameter)


def _add_ghost_batchnorm(algorithm: Any, event: Event, state: Any, logger: Any = None) -> None:
    _apply_with_one_group(algorithm, event, state, logger)
    for module in state.model.modules():
        if hasattr(module, "ghost_batch_size"):
            module.register_forward_pre_hook(partial(_take_small_batches, ghost_batch_size=module.ghost_batch_size))


def _take_small_batches(module: Any, inputs: Any, *, ghost_batch_size: int) -> None:
    # In evaluation the chunks share the running statistics: one chunk gives the same as many. Images on the meta device
    # test the shapes of training, in which a batch smaller than a ghost batch is a mistake.
    (images,) = inputs
    in_training = module.training or images.is_meta
    module.ghost_batch_size = ghost_batch_size if in_training else max(len(images), 1)


def _is_among_events(algorithm: Any, event: Event, state: Any) -> bool:
    return event in algorithm.events


def _freeze(algorithm: Any, event: Event, state: Any, logger: Any) -> None:
    # Without an optimizer to remove parameters from. A parameter without a gradient is not stepped, not even by decay
    # and momentum.
    asked = SimpleNamespace(model=state.model, optimizers=(), get_elapsed_duration=state.get_elapsed_duration)
    type(algorithm).apply(algorithm, event, asked, logger)
    for parameter in state.model.parameters():
        if not parameter.requires_grad:
            parameter.grad = None


_R = Resource
_AT_INIT = (Event.INIT,)
_CHANGES_MODEL = (Contract(writes=[_R.MODEL]), _AT_INIT)
_MIXES = (
    Contract(owns=[_R.MIXING], writes=[_R.IMAGES, _R.TARGETS], after=[_R.IMAGES]),
    (Event.BEFORE_FORWARD, Event.BEFORE_LOSS, Event.BEFORE_BACKWARD),
)
_LOW_PRECISION = (Contract(writes=[_R.MODEL]), (Event.INIT, Event.BEFORE_LOAD, Event.AFTER_LOAD))

# What each does, so that `arrange` can order it and refuse conflicts.
_KNOWN: dict[str, tuple[Contract, tuple[Event, ...]]] = {
    "alibi": (Contract(writes=[_R.MODEL]), (Event.INIT, Event.AFTER_DATALOADER)),
    "augmix": (Contract(writes=[_R.IMAGES]), (Event.FIT_START,)),
    "blurpool": _CHANGES_MODEL,
    "channels_last": (Contract(writes=[_R.MEMORY_FORMAT], after=[_R.MODEL]), _AT_INIT),
    "colout": (Contract(writes=[_R.IMAGES]), (Event.INIT, Event.FIT_START, Event.AFTER_DATALOADER)),
    "cutmix": _MIXES,
    "cutout": (Contract(writes=[_R.IMAGES]), (Event.AFTER_DATALOADER,)),
    "ema": (
        Contract(after=[_R.MODEL]),
        (
            Event.INIT,
            Event.FIT_START,
            Event.BATCH_START,
            Event.BATCH_END,
            Event.EPOCH_END,
            Event.EVAL_START,
            Event.EVAL_END,
            Event.PREDICT_START,
            Event.BATCH_CHECKPOINT,
            Event.EPOCH_CHECKPOINT,
        ),
    ),
    "factorize": _CHANGES_MODEL,
    "gated_linear_units": _CHANGES_MODEL,
    "ghost_batchnorm": _CHANGES_MODEL,
    "gradient_clipping": (Contract(writes=[_R.GRADIENTS]), (Event.INIT, Event.AFTER_TRAIN_BATCH)),
    "gyro_dropout": (Contract(writes=[_R.MODEL]), (Event.FIT_START,)),
    "label_smoothing": (
        Contract(owns=[_R.SMOOTHING], writes=[_R.TARGETS], after=[_R.MIXING]),
        (Event.BEFORE_LOSS, Event.AFTER_LOSS),
    ),
    "layer_freezing": (Contract(owns=[_R.TRAINABLE], after=[_R.MODEL]), (Event.FIT_START, Event.EPOCH_END)),
    "low_precision_groupnorm": _LOW_PRECISION,
    "low_precision_layernorm": _LOW_PRECISION,
    "mixup": _MIXES,
    "no_op_model": _CHANGES_MODEL,
    "progressive_resizing": (
        Contract(owns=[_R.LOADER_SHAPE], writes=[_R.IMAGES]),
        (Event.AFTER_DATALOADER,),
    ),
    "randaugment": (Contract(writes=[_R.IMAGES]), (Event.INIT, Event.FIT_START)),
    "sam": (Contract(owns=[_R.GRADIENTS]), (Event.AFTER_LOAD,)),
    "selective_backprop": (Contract(writes=[_R.IMAGES, _R.TARGETS]), (Event.INIT, Event.AFTER_DATALOADER)),
    "seq_length_warmup": (Contract(owns=[_R.LOADER_SHAPE], writes=[_R.IMAGES]), (Event.INIT, Event.AFTER_DATALOADER)),
    "squeeze_excite": _CHANGES_MODEL,
    "stochastic_depth": (Contract(writes=[_R.MODEL]), (Event.INIT, Event.BATCH_START)),
    "swa": (
        Contract(writes=[_R.LEARNING_RATE], after=[_R.MODEL]),
        (Event.INIT, Event.BATCH_END, Event.EPOCH_END),
    ),
    "weight_standardization": _CHANGES_MODEL,
}
# For those of a newer Composer: they may touch anything, so whatever waits for a resource waits for them.
_UNKNOWN = (Contract(writes=list(Resource)), ())
