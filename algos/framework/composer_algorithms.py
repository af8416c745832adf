"""Composer's own algorithms under recipe names such as `composer.ema`, as they are, with a Contract for ordering."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .base import Contract, Event, Resource

if TYPE_CHECKING:
    from .base import Algorithm

PREFIX = "composer."


def names() -> list[str]:
    """The recipe name of every algorithm of Composer's, sorted. Imports nothing of Composer: there are no new ones."""
    return sorted(PREFIX + name for name in _KNOWN)


def find(name: str) -> Callable[..., Any]:
    """A function that makes the algorithm `name` (`composer.ema`) from its constructor's keyword arguments.

    It has the constructor's signature. What it returns is an instance of Composer's class, unchanged but for two
    attributes that this package's algorithms have too: `contract`, and `events`, those at which it may act. It raises
    ValueError for arguments that the constructor does not have, lacks or refuses.

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
        except (ValueError, TypeError, AttributeError, AssertionError, ImportError) as error:  # how it refuses
            raise ValueError(f"{name} refuses {settings}: {error or type(error).__name__}") from error
        algorithm.contract, algorithm.events = _KNOWN.get(name.removeprefix(PREFIX), _UNKNOWN)
        return algorithm

    make.__name__ = cls.__name__
    make.__signature__ = inspect.signature(cls)  # pyright: ignore[reportFunctionMemberAccess]
    return make


@dataclass(frozen=True)
class Described:
    """What `arrange` and a plan ask of an algorithm that has not been made."""

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
            # Each has a package of its own, whose name is the one in snake_case: composer.algorithms.gyro_dropout.
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


_R = Resource
_AT_INIT = (Event.INIT,)
_CHANGES_MODEL = (Contract(writes=[_R.MODEL]), _AT_INIT)
_MIXES = (
    Contract(owns=[_R.MIXING], writes=[_R.IMAGES, _R.TARGETS], after=[_R.IMAGES]),
    (Event.BEFORE_FORWARD, Event.BEFORE_LOSS, Event.BEFORE_BACKWARD),
)
_LOW_PRECISION = (Contract(writes=[_R.MODEL]), (Event.INIT, Event.BEFORE_LOAD, Event.AFTER_LOAD))

# What each does, so that `arrange` can order it and refuse what cannot be together.
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
    "layer_freezing": (Contract(owns=[_R.TRAINABLE], after=[_R.MODEL]), (Event.EPOCH_END,)),
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
# Of a Composer that has one more: it may touch anything, so that whoever waits for anything waits for it.
_UNKNOWN = (Contract(writes=list(Resource)), ())
