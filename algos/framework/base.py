"""What every algorithm shares: the events, the Contract, and the base class.

Composer takes seconds to import, and a plain loop does not need it. This package therefore relies only on the shape of
Composer's objects: an algorithm is anything with `match` and `apply`, an event anything with a name. Composer itself is
imported when the first algorithm object is created, to register the class as an algorithm; if Composer is missing, the
error says what to install, and the functional forms work anyway.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from composer.core import Algorithm, Event, State
    from composer.loggers import Logger
else:
    Algorithm = object
    State = Logger = Any

    class Event(Enum):
        """Composer's events, by their names; equal to Composer's own members."""

        INIT = "init"
        BEFORE_LOAD = "before_load"
        AFTER_LOAD = "after_load"
        FIT_START = "fit_start"
        EPOCH_START = "epoch_start"
        BEFORE_DATALOADER = "before_dataloader"
        AFTER_DATALOADER = "after_dataloader"
        BATCH_START = "batch_start"
        BEFORE_TRAIN_BATCH = "before_train_batch"
        BEFORE_FORWARD = "before_forward"
        AFTER_FORWARD = "after_forward"
        BEFORE_LOSS = "before_loss"
        AFTER_LOSS = "after_loss"
        BEFORE_BACKWARD = "before_backward"
        AFTER_BACKWARD = "after_backward"
        AFTER_TRAIN_BATCH = "after_train_batch"
        BATCH_END = "batch_end"
        BATCH_CHECKPOINT = "batch_checkpoint"
        EPOCH_END = "epoch_end"
        EPOCH_CHECKPOINT = "epoch_checkpoint"
        FIT_END = "fit_end"
        EVAL_BEFORE_ALL = "eval_before_all"
        EVAL_START = "eval_start"
        EVAL_END = "eval_end"
        EVAL_AFTER_ALL = "eval_after_all"
        PREDICT_START = "predict_start"
        PREDICT_END = "predict_end"

        __hash__ = Enum.__hash__  # of the name, like Composer's

        def __eq__(self, other: object) -> bool:
            # Composer's own falls back to this, as the right-hand side, for a type that it does not know.
            return isinstance(other, Enum) and (self.name, self.value) == (other.name, other.value)


__all__ = ["Algorithm", "Contract", "Event", "Logger", "Resource", "SpeedUp", "State"]


class Resource(str, Enum):
    """What an algorithm may touch. The set is closed: ordering depends on these and never on other algorithms."""

    MODEL = "the model's modules"
    MEMORY_FORMAT = "the model's memory format"
    TRAINABLE = "which parameters are trained"
    LOADER_SHAPE = "the loader's image size and batch size"
    CROP = "the loader's crop"
    IMAGES = "the batch's images"
    MIXING = "how samples are mixed"
    TARGETS = "the batch's targets"
    SMOOTHING = "how targets are smoothed"
    SAMPLES = "which of the batch's samples are trained"
    LOSS = "the loss"
    GRADIENTS = "the gradients that the optimizer sees"
    LEARNING_RATE = "the learning rate"


@dataclass(frozen=True)
class Contract:
    """What an algorithm does to the training run, in terms of resources.

    owns: resources that no other algorithm may own as well; two owners are an error that names both.
    writes: resources that it changes and shares with other writers (owning a resource implies writing it).
    after: resources whose other writers must have acted before this algorithm does.
    """

    owns: frozenset[Resource] = frozenset()
    writes: frozenset[Resource] = frozenset()
    after: frozenset[Resource] = frozenset()

    def __init__(
        self, *, owns: Iterable[Resource] = (), writes: Iterable[Resource] = (), after: Iterable[Resource] = ()
    ) -> None:
        object.__setattr__(self, "owns", frozenset(owns))
        object.__setattr__(self, "writes", frozenset(writes) | self.owns)
        object.__setattr__(self, "after", frozenset(after))


class SpeedUp(Algorithm):
    """Base of this package's algorithms: a Composer algorithm with a Contract and a fixed list of events.

    A subclass declares `contract` and `events` and implements `apply`; its settings are its constructor's keyword
    arguments, which a recipe may set.
    """

    contract: ClassVar[Contract]
    events: ClassVar[tuple[Event, ...]]
    suspended: bool = False  # set by an algorithm that controls a phase of the run; nothing happens meanwhile

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # On resuming, Composer looks up a checkpoint's algorithms among its own by qualified name. Under "BlurPool" it
        # would find its own class, and try to build that from this one's settings.
        if "." not in cls.__qualname__:  # a class within a function cannot be confused
            cls.__qualname__ = f"Brisk{cls.__name__}"
            setattr(sys.modules[cls.__module__], cls.__qualname__, cls)  # so that instances pickle

    def match(self, event: Event, state: State) -> bool:
        """Whether to act at `event`: it is one of `events`, and this algorithm is not `suspended`.

        Raises ValueError at INIT when the Trainer has another algorithm of this class: two would smooth or mix twice.
        """
        if event == Event.INIT:
            refuse_twice(self, state)
        return event in self.events and not self.suspended

    if TYPE_CHECKING:

        @classmethod
        def for_planning(cls, **settings: Any) -> SpeedUp: ...

    else:  # what Composer expects of every algorithm, with its defaults
        find_unused_parameters = backwards_create_graph = False

        def __new__(cls, *args: Any, **kwargs: Any) -> SpeedUp:
            try:
                from composer.core import Algorithm
            except ModuleNotFoundError as error:
                if error.name != "composer":
                    raise  # Composer is installed but lacks a dependency: do not hide that
                raise ModuleNotFoundError(
                    f"{cls.__name__} hooks into MosaicML Composer's Trainer, and Composer is not installed: "
                    "pip install 'brisk-vision[train]', or use the functional form in your own loop "
                    "(see docs/algorithms)",
                    name="composer",
                ) from None
            Algorithm.register(SpeedUp)  # for isinstance checks
            return super().__new__(cls)

        @classmethod
        def for_planning(cls, **settings: Any) -> SpeedUp:
            """An algorithm for planning, not for training: it checks its settings, and says what it would do when.

            Works without Composer, which takes seconds to import; so Composer's Trainer does not accept it.
            Raises what the constructor raises for `settings`.
            """
            planned = object.__new__(cls)
            planned.__init__(**settings)
            return planned

        @staticmethod
        def required_on_load() -> bool:
            """Whether a checkpoint written with this algorithm cannot be loaded without it."""
            return False

        def state_dict(self) -> dict[str, Any]:
            """What a checkpoint stores for it."""
            return {"repr": repr(self)}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            """Restore what `state_dict` returned."""


def act_last(algorithm: Algorithm, state: State) -> None:
    """Move `algorithm` to the end of the Trainer's list, wherever it was listed.

    Composer then calls it last at every event but `AFTER_*`, and first at those, whose order it reverses.
    """
    if algorithm in state.algorithms:  # and not nested in another one
        state.algorithms.remove(algorithm)
        state.algorithms.append(algorithm)


def refuse_twice(algorithm: Algorithm, state: State) -> None:
    """Raise ValueError when another algorithm of the same class is among the Trainer's."""
    if any(type(other) is type(algorithm) and other is not algorithm for other in state.algorithms):
        name = type(algorithm).__name__
        raise ValueError(f"{name} is among the Trainer's algorithms twice, and acts once: list it once")


def global_rank() -> int:
    """This process's rank among all of the run's."""
    return _distributed("get_rank", default=0)


def world_size() -> int:
    """Number of processes that train together."""
    return _distributed("get_world_size", default=1)


def precision_context(state: State) -> AbstractContextManager[Any]:
    """The autocast context of the Trainer's forward passes and losses."""
    from composer.core.precision import get_precision_context

    return get_precision_context(state.precision, state.precision_config)


def _distributed(what: str, *, default: int) -> int:
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        return getattr(distributed, what)()
    return default
