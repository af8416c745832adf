"""Stochastic depth (Huang 2016, arXiv 1603.09382): drop residual branches at random while training.

The class of each residual branch's last layer is replaced in place by a subclass of it. Parameters, their names, hooks,
optimizers and checkpoints are unaffected: the same weights load before and after.

Shapes: N samples.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .framework.base import Contract, Event, Logger, Resource, SpeedUp, State, global_rank
from .framework.batches import count_samples
from .framework.changed_layers import Changed, change_class
from .framework.randomness import MicrobatchDraws, generator_at

Mode = Literal["sample", "batch"]
Distribution = Literal["linear", "uniform"]


def apply_stochastic_depth(
    model: nn.Module, *, drop_rate: float = 0.1, mode: Mode = "sample", distribution: Distribution = "linear"
) -> nn.Module:
    """Drop residual branches of `model` at random in training mode. In place.

        training:    y = x + b · f(x) / (1 - p_l),   b = 0 with probability p_l, else 1
        evaluation:  y = x + f(x)

    with x the shortcut's output and f the branch, so that the expectation over b is what evaluation computes. (The
    paper scales at evaluation instead, which is the same up to that factor.) Block l of L, counted from 1 in the order
    of the model's modules, has p_l = drop_rate · l / L ("linear", the paper's) or p_l = drop_rate ("uniform").

    drop_rate: of the last block, in [0, 1).
    mode: "sample" draws b for each sample of the batch, "batch" one for all of it (the paper's).
    distribution: how the rate grows with depth.

    Blocks are torchvision's BasicBlock and Bottleneck (ResNet, its variants, and models made of these blocks) and the
    EncoderBlock of its ViT, whose two branches both have the block's rate. b is drawn from torch's generator of the
    device, once per forward pass; the class draws once per device batch instead. Branches are computed whether or not
    they are dropped.

    Returns the same model. Applying it again with the same settings changes nothing. Warns when nothing changed.
    Raises ValueError for settings out of range and for settings that differ from those of an earlier call.

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
    draws = earlier[0].microbatch_draws if earlier else MicrobatchDraws()
    ends = [(end, index) for index, block in enumerate(blocks) for end in _branch_ends(block)]
    for branch, (end, index) in enumerate(ends):
        if not isinstance(end, _Dropped):
            _change_layer(end, branch, settings.rate_of(index, len(blocks)), settings, draws)
    draws.num_layers = len(ends)
    return model


def draw_stochastic_depth(
    drop_rates: Sequence[float], num_samples: int, *, generator: torch.Generator, mode: Mode = "sample"
) -> Tensor:
    """Draw which of B branches each of N samples keeps: bool [B, N] on CPU, False with a branch's drop rate.

    mode: "sample" draws for each sample, "batch" gives all samples of a branch the same.
    generator: a CPU generator, the only source of randomness.
    """
    columns = num_samples if mode == "sample" else 1
    uniform = torch.rand(len(drop_rates), columns, generator=generator, dtype=torch.float64)
    kept = uniform >= torch.tensor(drop_rates, dtype=torch.float64).unsqueeze(1)
    return kept.expand(-1, num_samples)


class StochasticDepth(SpeedUp):
    """Drops residual branches at random from the start of training; see `apply_stochastic_depth` for the settings.

    Draws once per device batch, whatever the microbatch size. A draw is a function of the run's seed, the rank and the
    number of batches done, so ranks draw differently, and a resumed run repeats and skips nothing.
    """

    contract = Contract(writes=[Resource.MODEL], after=[Resource.SAMPLES])  # draws for those that are trained
    events = (Event.INIT, Event.BATCH_START, Event.BEFORE_TRAIN_BATCH, Event.BEFORE_FORWARD, Event.BATCH_END)

    def __init__(self, *, drop_rate: float = 0.1, mode: Mode = "sample", distribution: Distribution = "linear") -> None:
        self.settings = _Settings(drop_rate, mode, distribution)
        self._draws = MicrobatchDraws()  # the model's own, once it has them
        self._drop_rates: list[float] = []  # per branch
        self._kept = torch.empty(0, 0, dtype=torch.bool)  # of the device batch, [B, N]
        self._first_row = 0  # of the next microbatch

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Change the model in place; then draw for each batch, and pass the layers each microbatch's part."""
        if event == Event.INIT:
            self._change_model(state, logger)
        elif event == Event.BATCH_START:
            self._kept = self._draw(state)
        elif event == Event.BEFORE_TRAIN_BATCH:  # again after a step that ran out of memory
            self._first_row = 0
        elif event == Event.BEFORE_FORWARD:
            last_row = self._first_row + count_samples(state.batch)
            # Contiguous: compiled code is for certain strides, which the part of a whole batch would have of its own.
            self._draws.of_rows = self._kept[:, self._first_row : last_row].contiguous()
            self._first_row = last_row
        else:
            self._draws.of_rows = None

    def _change_model(self, state: State, logger: Logger) -> None:
        settings = self.settings
        apply_stochastic_depth(
            state.model, drop_rate=settings.drop_rate, mode=settings.mode, distribution=settings.distribution
        )
        ends = [module for module in state.model.modules() if isinstance(module, _Dropped)]
        self._drop_rates = [end.drop_rate_here for end in ends]
        if ends:
            self._draws = ends[0].microbatch_draws
        logger.log_hyperparameters({"stochastic_depth/branches": len(ends)})

    def _draw(self, state: State) -> Tensor:
        generator = generator_at(
            state.rank_zero_seed, rank=global_rank(), step=state.timestamp.batch.value, stream="stochastic_depth"
        )
        kept = draw_stochastic_depth(
            self._drop_rates, count_samples(state.batch), generator=generator, mode=self.settings.mode
        )
        return state.device.tensor_to_device(kept)


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
        """Rate of block `index`, from 0."""
        return self.drop_rate if self.distribution == "uniform" else self.drop_rate * (index + 1) / num_blocks

    def __str__(self) -> str:
        return f"drop_rate={self.drop_rate!r}, mode={self.mode!r}, distribution={self.distribution!r}"


class _Dropped(Changed):
    """The last layer of a residual branch."""

    named = "Dropped"
    drop_branch: int
    drop_rate_here: float
    drop_settings: _Settings
    microbatch_draws: MicrobatchDraws

    def forward(self, values: Tensor) -> Tensor:
        values = super().forward(values)
        if not self.training or not self.drop_rate_here:
            return values
        keep_rate = 1 - self.drop_rate_here
        return values * self._draw(values, keep_rate).div_(keep_rate)

    def _draw(self, values: Tensor, keep_rate: float) -> Tensor:
        of_rows = self.microbatch_draws.of_rows
        if of_rows is not None:
            return of_rows[self.drop_branch].to(values.dtype).view(-1, *[1] * (values.ndim - 1))
        rows = values.shape[0] if self.drop_settings.mode == "sample" else 1
        return values.new_empty([rows, *[1] * (values.ndim - 1)]).bernoulli_(keep_rate)

    def extra_repr(self) -> str:
        said = f"dropped at {self.drop_rate_here:.3g} a {self.drop_settings.mode}"
        return ", ".join(filter(None, [super().extra_repr(), said]))


def _branch_ends(module: Any) -> list[nn.Module]:
    """The last layers of the branches of `module`, if it is a known residual block."""
    for cls in type(module).__mro__:
        names = _BRANCH_ENDS.get(f"{cls.__module__}.{cls.__qualname__}")
        if names is not None:
            return [getattr(module, name) for name in names]
    return []


def _change_layer(layer: Any, branch: int, drop_rate: float, settings: _Settings, draws: MicrobatchDraws) -> None:
    change_class(layer, _Dropped)
    layer.drop_branch, layer.drop_rate_here, layer.drop_settings, layer.microbatch_draws = (
        branch,
        drop_rate,
        settings,
        draws,
    )
