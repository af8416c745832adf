"""Optimizers by name against their formulas, and which weights decay."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from training.optimizers import build_optimizer, check_settings, parameter_groups, peak_learning_rate, settings_of
from training.recipe.schema import RecipeError, parse

STEPS = 6
TORCHS = [
    "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamw", "asgd", "nadam", "radam", "rmsprop", "rprop", "sgd",
]  # fmt: skip


def settings(name: str, **given: Any) -> dict[str, Any]:
    return {"name": name, **parse(settings_of(name), {"learning_rate": 0.1, **given}, path="optimizer")}


def gradients(seed: int) -> torch.Tensor:
    return torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def train(name: str, *, rates: list[float], **given: Any) -> torch.Tensor:
    """Five weights after `rates` steps along fixed gradients."""
    layer = nn.Linear(5, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    optimizer = build_optimizer(layer, settings(name, **given), learning_rate=rates[0])
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        layer.weight.grad = gradients(step)[None]
        optimizer.step()
    return layer.weight.detach()[0]


RATES = [0.1 * (1 + math.cos(math.pi * step / STEPS)) / 2 for step in range(STEPS)]


def test_sgd_adds_its_decay_to_the_gradient() -> None:
    weight, momentum = torch.ones(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for step, rate in enumerate(RATES):
        momentum = 0.8 * momentum + gradients(step) + 0.01 * weight
        weight = weight - rate * momentum
    assert torch.allclose(train("sgd", rates=RATES, momentum=0.8, weight_decay=0.01), weight, rtol=0, atol=1e-12)


def test_decoupled_sgdw_shrinks_weights_in_proportion_to_the_schedule_and_not_to_the_rate() -> None:
    weight, momentum = torch.ones(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for step, rate in enumerate(RATES):
        momentum = 0.875 * momentum + gradients(step)
        weight = weight * (1 - 0.01 * rate / RATES[0]) - rate * momentum
    ours = train("decoupled_sgdw", rates=RATES, momentum=0.875, weight_decay=0.01)
    assert torch.allclose(ours, weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "shrink"), [("adamw", lambda rate: rate), ("decoupled_adamw", lambda rate: rate / RATES[0])]
)
def test_adams_decay_is_apart_from_its_gradient(name: str, shrink: Any) -> None:
    weight = torch.ones(5, dtype=torch.float64)
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, rate in enumerate(RATES):
        first = 0.9 * first + 0.1 * gradients(step)
        second = 0.99 * second + 0.01 * gradients(step) ** 2
        direction = (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8)
        weight = weight * (1 - 0.01 * shrink(rate)) - rate * direction
    ours = train(name, rates=RATES, betas=[0.9, 0.99], weight_decay=0.01)
    assert torch.allclose(ours, weight, rtol=0, atol=1e-10)


def test_lion_of_pytorch_optimizer_takes_the_sign() -> None:
    pytest.importorskip("pytorch_optimizer")
    weight, average = torch.ones(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for step, rate in enumerate(RATES):
        weight = weight * (1 - rate * 0.02) - rate * (0.9 * average + 0.1 * gradients(step)).sign()
        average = 0.99 * average + 0.01 * gradients(step)
    ours = train("pytorch_optimizer.lion", rates=RATES, weight_decay=0.02)
    assert torch.allclose(ours, weight, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "name",
    [
        "adadelta",
        "adafactor",
        "adagrad",
        "adam",
        "adamax",
        "adamw",
        "asgd",
        "nadam",
        "radam",
        "rmsprop",
        "rprop",
        "sgd",
    ],
)
def test_torchs_are_there_by_name(name: str) -> None:
    made = build_optimizer(nn.Linear(2, 2), settings(f"torch.{name}"), learning_rate=0.25)
    assert type(made) is getattr(torch.optim, type(made).__name__)
    assert type(made).__name__.lower() == name
    assert {group["lr"] for group in made.param_groups} == {0.25}
    check_settings(settings(f"torch.{name}"))


@pytest.mark.parametrize("name", ["lamb", "lars", "lion", "adan", "ranger", "shampoo", "sgdw"])
def test_pytorch_optimizers_are_there_by_name(name: str) -> None:
    pytest.importorskip("pytorch_optimizer")
    check_settings(settings(f"pytorch_optimizer.{name}"))


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("sdg", {}, "'sdg' is no optimizer; known: adamw, .*torch.<name>.* did you mean sgd?"),
        ("torch.rmsprob", {}, "'torch.rmsprob' is no optimizer; .* did you mean torch.rmsprop?"),
        ("tensorflow.sgd", {}, "unknown library 'tensorflow'"),
        ("torch.lbfgs", {}, "torch.lbfgs cannot train with these settings: .*closure"),
        ("pytorch_optimizer.lam", {}, "did you mean pytorch_optimizer.lamb?"),
        ("pytorch_optimizer.lomo", {}, "needs 'model', which no recipe can give"),
        ("pytorch_optimizer.schedulefreesgd", {}, "keeps other weights for evaluation"),
        ("sgd", {"momentun": 0.9}, "optimizer.momentun: unknown key .* did you mean momentum?"),
        ("torch.adam", {"amsgrad": "perhaps"}, "optimizer.amsgrad: is 'perhaps'; it must be true or false"),
        ("torch.adam", {"betas": [0.9]}, "optimizer.betas: is .*; it must be a list of 2 values"),
        ("torch.adam", {"betas": [0.9, 1.5]}, "cannot train with these settings: Invalid beta parameter"),
        (
            "sgd",
            {"learning_rate": None},
            "learning_rate is None and learning_rate_per_256_images is None; give exactly",
        ),
        ("sgd", {"learning_rate_per_256_images": 0.1}, "is 0.1 and learning_rate_per_256_images is 0.1; give exactly"),
        ("sgd", {"learning_rate": -1}, "learning_rate is -1.*; it must be above 0"),
        ("sgd", {"clip_norm": 0}, "clip_norm is 0.*; it must be above 0"),
        ("sgd", {"weight_decay": -1}, "weight_decay is -1.0; it must be at least 0"),
        ("sgd", {"nesterov": True, "momentum": 0}, "nesterov is true and momentum is 0; give a momentum"),
        ("sgd", {"momentum": 1.0}, r"momentum is 1.0; it must lie in \[0, 1\)"),
        ("adamw", {"betas": [0.9, 1.5]}, r"betas\[1\] is 1.5; it must lie in \[0, 1\)"),
        ("decoupled_adamw", {"eps": -1e-8}, "eps is -1e-08; it must be at least 0"),
        ("torch.rprop", {"weight_decay": 0.1}, "optimizer.weight_decay: unknown key"),
    ],
)
def test_mistakes_are_told(name: str, given: dict[str, Any], says: str) -> None:
    if name.startswith("pytorch_optimizer"):
        pytest.importorskip("pytorch_optimizer")
    with pytest.raises((RecipeError, ValueError), match=says.replace("?", r"\?")) as error:
        check_settings(settings(name, **given))
    assert "\n" not in str(error.value)


def test_the_rate_goes_with_the_batch_where_it_is_given_per_256_images() -> None:
    per_image = settings("sgd", learning_rate=None, learning_rate_per_256_images=0.1)
    assert [peak_learning_rate(per_image, global_batch_size=size) for size in (128, 256, 4096)] == pytest.approx(
        [0.05, 0.1, 1.6]
    )
    assert peak_learning_rate(settings("sgd", learning_rate=0.3), global_batch_size=4096) == 0.3


class OddlyNamed(nn.Module):
    """Norms and biases that no rule on names would find, and a weight whose name says norm."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut = nn.ModuleDict({"1": nn.SyncBatchNorm(4), "ln": nn.LayerNorm(4), "x": nn.RMSNorm(4)})
        self.group = nn.GroupNorm(2, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.bn_weight = nn.Linear(4, 4)


@pytest.mark.parametrize("everything", [False, True])
def test_norms_by_type_and_biases_do_not_decay(everything: bool) -> None:
    model = OddlyNamed()
    groups = parameter_groups(model, weight_decay=0.1, decay_norms_and_biases=everything)
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decays) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    decayed = {name for name, p in model.named_parameters() if decays[id(p)]}
    expected = {"attention.in_proj_weight", "attention.out_proj.weight", "bn_weight.weight"}
    assert decayed == ({name for name, _ in model.named_parameters()} if everything else expected)
