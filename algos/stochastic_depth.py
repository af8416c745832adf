"""Stochastic depth (Huang 2016, arXiv 1603.09382): leave residual branches out at random while training.

The last layer of each residual branch is given a subclass of its own class, in place. Parameters, their names, hooks,
optimizers and checkpoints never notice: the same weights load before and after.

Shapes: N samples.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from algos.base import Contract, Event, Logger, Resource, SpeedUp, State

Mode = Literal["sample", "batch"]
Distribution = Literal["linear", "uniform"]


def apply_stochastic_depth(
    model: nn.Module, *, drop_rate: float = 0.1, mode: Mode = "sample", distribution: Distribution = "linear"
) -> nn.Module:
    """Let the residual branches of `model` drop out in training mode. In place.

        training:    y = x + b · f(x) / (1 - p_l),   b = 0 with probability p_l, else 1
        evaluation:  y = x + f(x)

    with x what the shortcut carries and f the branch, so that the expectation over b is what evaluation computes. (The
    paper scales at evaluation instead, which is the same up to that factor.) Block l of L, counted from 1 in the order
    of the model's modules, has p_l = drop_rate · l / L ("linear", the paper's) or p_l = drop_rate ("uniform").

    drop_rate: of the last block, in [0, 1).
    mode: "sample" draws b for each sample of the batch, "batch" one for all of it (the paper's).
    distribution: how the rate grows with depth.

    Blocks are torchvision's BasicBlock and Bottleneck (ResNet and its kin, and models made of these blocks) and the
    EncoderBlock of its ViT, both of whose branches have the block's rate. b is drawn from torch's own generator of the
    device, which checkpoints restore. Branches are computed whether or not they are dropped.

    Returns the same model. Applying it twice with the same settings is applying it once. Warns when nothing changed.
    Raises ValueError for settings out of range and for other settings than were applied before, and
    ModuleNotFoundError without torchvision.

    Huang et al. 2016, "Deep Networks with Stochastic Depth", equations 2 to 5.
    """
    settings = _Settings(drop_rate, mode, distribution)
    blocks = [module for module in model.modules() if _branch_ends(module)]
    earlier = [end for block in blocks for end in _branch_ends(block) if isinstance(end, _Dropped)]
    for end in earlier:
        if end.drop_settings != settings:
            raise ValueError(
                f"the model has stochastic depth already with {end.drop_settings}, and is now asked for {settings}; "
                "apply it once: build the model anew to change the settings"
            )
    if not blocks:
        warnings.warn(
            f"stochastic depth changed nothing in {type(model).__name__}: it has none of torchvision's residual blocks "
            f"({', '.join(sorted(name.rpartition('.')[2] for name in _BRANCH_ENDS))})",
            stacklevel=2,
        )
    if blocks and not earlier:
        from torchvision.ops import stochastic_depth  # noqa: F401 (missing, it is better missing here than in forward)
    for index, block in enumerate(blocks):
        for end in _branch_ends(block):
            if not isinstance(end, _Dropped):
                _change_layer(end, settings.rate_of(index, len(blocks)), settings)
    return model


class StochasticDepth(SpeedUp):
    """Drops residual branches at random from the start of training; see `apply_stochastic_depth` for the settings."""

    contract = Contract(writes=[Resource.MODEL])
    events = (Event.INIT,)

    def __init__(self, *, drop_rate: float = 0.1, mode: Mode = "sample", distribution: Distribution = "linear") -> None:
        self.settings = _Settings(drop_rate, mode, distribution)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Change the model in place and log how many branches were."""
        settings = self.settings
        apply_stochastic_depth(
            state.model, drop_rate=settings.drop_rate, mode=settings.mode, distribution=settings.distribution
        )
        ends = sum(isinstance(module, _Dropped) for module in state.model.modules())
        logger.log_hyperparameters({"stochastic_depth/branches": ends})


# Residual blocks -> the last layers of their branches; by name, so that importing this does not need torchvision.
_BRANCH_ENDS: dict[str, tuple[str, ...]] = {
    "torchvision.models.resnet.BasicBlock": ("bn2",),
    "torchvision.models.resnet.Bottleneck": ("bn3",),
    "torchvision.models.vision_transformer.EncoderBlock": ("dropout", "mlp"),
}


@dataclass(frozen=True)
class _Settings:
    drop_rate: float
    mode: Mode
    distribution: Distribution

    def __post_init__(self) -> None:
        if not 0 <= self.drop_rate < 1:
            raise ValueError(
                f"drop_rate {self.drop_rate} must lie in [0, 1); 0.1 is usual for a ResNet-50, and 0 drops nothing"
            )
        if self.mode not in ("sample", "batch"):
            raise ValueError(f"mode {self.mode!r} must be 'sample' or 'batch' (the paper's)")
        if self.distribution not in ("linear", "uniform"):
            raise ValueError(f"distribution {self.distribution!r} must be 'linear' (the paper's) or 'uniform'")

    def rate_of(self, index: int, num_blocks: int) -> float:
        """Of block `index`, counted from 0."""
        return self.drop_rate if self.distribution == "uniform" else self.drop_rate * (index + 1) / num_blocks

    def __str__(self) -> str:
        return f"drop_rate={self.drop_rate!r}, mode={self.mode!r}, distribution={self.distribution!r}"


class _Dropped(nn.Module):
    """First base of every changed layer's class; the layer's former class is the second."""

    drop_rate_here: float
    drop_settings: _Settings

    def forward(self, values: Tensor) -> Tensor:
        from torchvision.ops import stochastic_depth

        mode = "row" if self.drop_settings.mode == "sample" else "batch"
        return stochastic_depth(super().forward(values), self.drop_rate_here, mode, self.training)

    def extra_repr(self) -> str:
        said = f"dropped at {self.drop_rate_here:.3g} a {self.drop_settings.mode}"
        return ", ".join(filter(None, [super().extra_repr(), said]))

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Classes made at run time cannot be found by name: rebuild this one from the layer's former class. Someone
        # else's subclass of it (a parametrization's, a sharding's) is theirs to copy.
        first, *others = type(self).__bases__
        if first is not _Dropped:
            return super().__reduce_ex__(protocol)
        return _rebuild, tuple(others), self.__dict__.copy()


def _branch_ends(module: Any) -> list[nn.Module]:
    """The last layers of the branches of `module`, if it is a residual block that is known."""
    for cls in type(module).__mro__:
        names = _BRANCH_ENDS.get(f"{cls.__module__}.{cls.__qualname__}")
        if names is not None:
            return [getattr(module, name) for name in names]
    return []


def _change_layer(layer: Any, drop_rate: float, settings: _Settings) -> None:
    layer.__class__ = _dropped_class(type(layer))
    layer.drop_rate_here, layer.drop_settings = drop_rate, settings


@functools.cache
def _dropped_class(cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"Dropped{cls.__name__}", (_Dropped, cls), {"__module__": __name__})


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    dropped = _dropped_class(cls)
    return dropped.__new__(dropped)
