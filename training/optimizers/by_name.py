"""Optimizers by name, a recipe's peak learning rate, and which parameters get no weight decay."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import inspect
import warnings
from collections.abc import Callable, Collection
from typing import Any, get_type_hints

import torch
from omegaconf import MISSING
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
# Constructor arguments that no recipe sets: the program sets them, they reverse training, or serve other programs.
_NO_SETTINGS = ("params", "parameters", "lr", "learning_rate", "maximize", "differentiable")


@dataclasses.dataclass(kw_only=True)
class _Common:
    """Settings of every optimizer, in addition to its own.

    learning_rate: at the schedule's peak. learning_rate_per_256_images: the same, multiplied by the global batch size
        over 256. Give exactly one of them.
    clip_norm: gradients with a larger norm, over all parameters together, are scaled down to it; null: no clipping.
    """

    learning_rate: float | None = None
    learning_rate_per_256_images: float | None = None
    clip_norm: float | None = None


@dataclasses.dataclass(kw_only=True)
class _WithDecay(_Common):
    """For optimizers with weight decay: whether it also applies to norms' parameters and biases."""

    decay_norms_and_biases: bool = False


def sgd(
    parameters: Any, *, lr: float, momentum: float = 0.9, nesterov: bool = False, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """SGD with momentum; weight decay is added to the gradient (coupled to the learning rate)."""
    from training.optimizers.fused import SGD

    return SGD(parameters, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)


def adamw(
    parameters: Any,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov 2019, arXiv 1711.05101); weight decay shrinks the weights by lr x weight_decay per step."""
    from training.optimizers.fused import AdamW

    return AdamW(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


def decoupled_sgdw(
    parameters: Any, *, lr: float, momentum: float = 0.9, nesterov: bool = False, weight_decay: float = 1e-5
) -> torch.optim.Optimizer:
    """Composer's DecoupledSGDW: weight decay shrinks the weights by weight_decay x lr / peak lr per step."""
    from training.optimizers.decoupled import DecoupledSGDW

    return DecoupledSGDW(parameters, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)


def decoupled_adamw(
    parameters: Any,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 1e-5,
) -> torch.optim.Optimizer:
    """Composer's DecoupledAdamW: weight decay shrinks the weights by weight_decay x lr / peak lr per step."""
    from training.optimizers.decoupled import DecoupledAdamW

    return DecoupledAdamW(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


def muon(
    parameters: Any,
    *,
    lr: float,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.1,
    adjust_lr_fn: str = "original",
    newton_schulz_steps: int = 5,
    newton_schulz_dtype: str = "auto",
    others: dict[str, Any] | None = None,
) -> torch.optim.Optimizer:
    """Muon for `parameters`; `build_optimizer` makes what `others` describes. Decay as in adamw, of the matrices."""
    from training.optimizers.muon import Muon

    scale: Any = adjust_lr_fn
    dtype: Any = newton_schulz_dtype
    made: Any = others
    return Muon(
        parameters,
        lr=lr,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        adjust_lr_fn=scale,
        newton_schulz_steps=newton_schulz_steps,
        newton_schulz_dtype=dtype,
        others=made,
    )


def schedule_free_sgd(
    parameters: Any, *, lr: float, momentum: float = 0.9, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """Schedule-free SGD; weight decay is added to the gradient."""
    from training.optimizers.schedule_free import ScheduleFreeSGD

    return ScheduleFreeSGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)


def schedule_free_adamw(
    parameters: Any,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """Schedule-free AdamW; weight decay shrinks the weights by lr x weight_decay per step."""
    from training.optimizers.schedule_free import ScheduleFreeAdamW

    return ScheduleFreeAdamW(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


_OWN: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": adamw,
    "decoupled_adamw": decoupled_adamw,
    "decoupled_sgdw": decoupled_sgdw,
    "muon": muon,
    "schedule_free_adamw": schedule_free_adamw,
    "schedule_free_sgd": schedule_free_sgd,
    "sgd": sgd,
}
OTHERS = ("adamw", "sgd")  # what may update the weights that are no hidden matrices
SCHEDULE_FREE = ("schedule_free_adamw", "schedule_free_sgd")
_MUON_CHOICES = {
    "adjust_lr_fn": ("original", "match_rms_adamw"),
    "newton_schulz_dtype": ("auto", "bfloat16", "float32"),
}


def find(name: str) -> Callable[..., torch.optim.Optimizer]:
    """The factory of optimizer `name`: one of this module's, `torch.<name>` or `pytorch_optimizer.<name>`.

    Names in libraries are lower case: torch.rmsprop, pytorch_optimizer.lamb.

    Raises ValueError with the nearest match for an unknown name, and for a library that is not installed.
    """
    library, dot, short = name.partition(".")
    if not dot:
        return _pick(name, _OWN, prefix="", also=", torch.<name>, pytorch_optimizer.<name>")
    if library == "torch":
        return _pick(short, _torch_optimizers(), prefix="torch.")
    if library == "pytorch_optimizer":
        return _pick(short, _pytorch_optimizers(name), prefix="pytorch_optimizer.")
    raise ValueError(f"unknown library {library!r} of optimizer {name!r}; known: torch, pytorch_optimizer")


def settings_of(name: str) -> type:
    """A dataclass of a recipe's settings for optimizer `name`: its constructor's arguments and the common settings.

    Raises ValueError as `find` does.
    """
    factory = find(name)
    function: Any = factory.__init__ if inspect.isclass(factory) else factory
    hints = _type_hints(function)
    fields: list[tuple[str, Any, Any]] = []
    for key, parameter in inspect.signature(factory).parameters.items():
        if key in _NO_SETTINGS or parameter.kind not in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            continue
        if isinstance(parameter.default, enum.Enum):
            continue
        default = MISSING if parameter.default is parameter.empty else parameter.default
        hint = _plain_hint(hints.get(key), default)
        if hint is Any and default == MISSING:
            raise ValueError(f"{name} needs {key!r}, which no recipe can give; use another")
        fields.append((key, hint, dataclasses.field(default=default)))
    decays = name != "muon" and any(key == "weight_decay" for key, *_ in fields)  # of Muon's, all or none
    base = _WithDecay if decays else _Common
    return dataclasses.make_dataclass(base.__name__, fields, bases=(base,), kw_only=True)


def check_settings(settings: dict[str, Any]) -> None:
    """Raise ValueError for values out of range, and for optimizers that need more than gradients.

    This module's own optimizers are checked by range. A library's takes a step on a few weights, which shows whether it
    needs a closure, second derivatives, or a switch between training and evaluation. That imports torch's compiler,
    which torch uses in every optimizer's constructor and which takes seconds to load.
    """
    rates = {key: settings[key] for key in ("learning_rate", "learning_rate_per_256_images")}
    if sum(rate is not None for rate in rates.values()) != 1:
        given = " and ".join(f"{key} is {rate}" for key, rate in rates.items())
        raise ValueError(f"{given}; give exactly one of them")
    for key, value in {**rates, "clip_norm": settings["clip_norm"]}.items():
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{key} is {value}; it must be above 0")
    if settings["name"] in _OWN:
        _check_own(settings)
        if settings["name"] == "muon":
            _check_muon(settings)
    else:
        _try_a_step(settings)


def _check_own(settings: dict[str, Any]) -> None:
    shares = {"momentum": settings.get("momentum", 0)}
    shares |= {f"betas[{place}]": beta for place, beta in enumerate(settings.get("betas", ()))}
    for key, value in shares.items():
        if not 0 <= value < 1:
            raise ValueError(f"{key} is {value}; it must lie in [0, 1)")
    for key in ("weight_decay", "eps"):
        if not 0 <= settings.get(key, 0) < float("inf"):
            raise ValueError(f"{key} is {settings[key]}; it must be at least 0")
    if settings["name"] in SCHEDULE_FREE and not (settings.get("momentum", 1) and settings.get("betas", (1,))[0]):
        key = "momentum" if "momentum" in settings else "betas[0]"
        raise ValueError(f"{key} is 0, and gradients are taken between the last weights and their average; raise it")
    if settings.get("nesterov") and not settings["momentum"]:
        raise ValueError("nesterov is true and momentum is 0; give a momentum, or set nesterov=false")


def _check_muon(settings: dict[str, Any]) -> None:
    for key, choices in _MUON_CHOICES.items():
        if settings[key] not in choices:
            raise ValueError(f"{key} is {settings[key]!r}; it must be one of {', '.join(choices)}")
    if not 1 <= settings["newton_schulz_steps"] <= 20:
        raise ValueError(f"newton_schulz_steps is {settings['newton_schulz_steps']}; it must lie in [1, 20]")
    key = _rate_key(settings)
    if settings["others"].get(key) is None:
        raise ValueError(f"{key} is given for the matrices; give others.{key} too, or the other kind for both")


def _rate_key(settings: dict[str, Any]) -> str:
    given = settings["learning_rate"] is not None
    return "learning_rate" if given else "learning_rate_per_256_images"


def _try_a_step(settings: dict[str, Any]) -> None:
    weights = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            optimizer = build_optimizer(weights, settings, learning_rate=1e-3)
            weights(torch.ones(2, 3, 3, 3)).sum().backward()
            optimizer.step()
        except Exception as error:  # libraries raise different types
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{settings['name']} cannot train with these settings: {reason}") from None
    if hasattr(optimizer, "train") and hasattr(optimizer, "eval"):
        raise ValueError(
            f"{settings['name']} keeps other weights for evaluation than for training, and nothing here switches them; "
            "use schedule_free_adamw or schedule_free_sgd, or another with algorithms.ema for averaged weights"
        )


def peak_learning_rate(settings: dict[str, Any], *, global_batch_size: int) -> float:
    """The learning rate at schedule factor 1, for a run that starts with this global batch size."""
    if settings["learning_rate"] is not None:
        return settings["learning_rate"]
    return settings["learning_rate_per_256_images"] * global_batch_size / 256


def other_peak_learning_rate(settings: dict[str, Any], learning_rate: float) -> float:
    """Of muon's `others`, where the matrices' is `learning_rate`.

    Both go with the batch, and with a search for the best one, in the recipe's proportion.
    """
    key = _rate_key(settings)
    return settings["others"][key] * learning_rate / settings[key]


def build_optimizer(
    model: nn.Module, settings: dict[str, Any], *, learning_rate: float, matrices: Collection[str] = ()
) -> torch.optim.Optimizer:
    """The optimizer that `settings` (a name and its arguments) describes, over `model`'s parameters.

    matrices: names of the parameters that muon orthogonalizes; no other optimizer reads them.
    """
    if settings["name"] == "muon":
        return _build_muon(model, settings, learning_rate=learning_rate, matrices=matrices)
    arguments = _arguments(settings)
    parameters: Any = list(model.parameters())
    if "weight_decay" in arguments:
        parameters = parameter_groups(
            model,
            weight_decay=arguments["weight_decay"],
            decay_norms_and_biases=settings["decay_norms_and_biases"],
        )
    return find(settings["name"])(parameters, lr=learning_rate, **arguments)


def parameter_groups(
    model: nn.Module, *, weight_decay: float, decay_norms_and_biases: bool = False, without: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Parameters with weight decay; and without it, those of norm layers and every bias.

    Norm layers are recognized by type, not by name, so a norm in a shortcut called "downsample.1" is one of them.
    without: names of parameters to leave out.
    """
    exempt: set[int] = set()
    if not decay_norms_and_biases:
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(module, _NORMS) or name == "bias" or name.endswith("_bias"):  # attention's in_proj_bias
                    exempt.add(id(parameter))
    parameters = [parameter for name, parameter in model.named_parameters() if name not in without]
    groups = [
        {"params": [p for p in parameters if id(p) not in exempt], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) in exempt], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _build_muon(
    model: nn.Module, settings: dict[str, Any], *, learning_rate: float, matrices: Collection[str]
) -> torch.optim.Optimizer:
    others = settings["others"]
    groups = parameter_groups(
        model,
        weight_decay=others["weight_decay"],
        decay_norms_and_biases=others["decay_norms_and_biases"],
        without=matrices,
    )
    made = None
    if groups:
        rate = other_peak_learning_rate(settings, learning_rate)
        made = find(others["name"])(groups, lr=rate, **_arguments(others))
    named = dict(model.named_parameters())
    return muon([named[name] for name in matrices], lr=learning_rate, **{**_arguments(settings), "others": made})


def _arguments(settings: dict[str, Any]) -> dict[str, Any]:
    common = {field.name for field in dataclasses.fields(_WithDecay)}
    return {key: value for key, value in settings.items() if key not in common and key != "name"}


def _pick(name: str, known: dict[str, Any], *, prefix: str, also: str = "") -> Any:
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"; did you mean {prefix}{near[0]}?" if near else ""
    raise ValueError(f"{prefix + name!r} is no optimizer; known: {', '.join(sorted(known))}{also}{hint}")


def _torch_optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    classes = (one for one in vars(torch.optim).values() if inspect.isclass(one))
    return {
        one.__name__.lower(): one
        for one in classes
        if issubclass(one, torch.optim.Optimizer) and one is not torch.optim.Optimizer
    }


def _pytorch_optimizers(asked: str) -> dict[str, type[torch.optim.Optimizer]]:
    try:
        import pytorch_optimizer
    except ModuleNotFoundError as error:
        if error.name != "pytorch_optimizer":
            raise
        raise ValueError(f"{asked} needs pytorch-optimizer: pip install pytorch-optimizer") from None
    return {name: pytorch_optimizer.load_optimizer(name) for name in pytorch_optimizer.get_supported_optimizers()}


def _type_hints(function: Any) -> dict[str, Any]:
    try:
        return get_type_hints(function)
    except (NameError, TypeError):  # annotations may name types that only a type checker imports
        return {}


def _plain_hint(hint: Any, default: Any) -> Any:
    """The type to check a recipe's value against: the library's if it is plain, else the default's."""
    if hint in (bool, int, float, str):
        return hint
    if isinstance(default, bool) or (isinstance(default, str) and default != MISSING):
        return type(default)
    if isinstance(default, (int, float)):
        return float
    if isinstance(default, tuple) and all(isinstance(value, (int, float)) for value in default):
        return tuple[(float,) * len(default)]  # pyright: ignore[reportInvalidTypeArguments]
    return Any
