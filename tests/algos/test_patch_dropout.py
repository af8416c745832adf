"""Patch dropout: the formula on each kind of ViT, timm's own on the same draw, and that nothing else changes."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

from algos.framework.randomness import generator_at, microbatch_draws
from algos.patch_dropout import (
    PatchDropout,
    apply_patch_dropout,
    count_kept_patches,
    draw_kept_patches,
    keeping_patches,
)
from models.summary import count_forward_macs
from models.vit import vit_digits

SIDE, PATCH, CLASSES = 32, 4, 5
PATCHES = (SIDE // PATCH) ** 2


def ours() -> nn.Module:
    return vit_digits(num_classes=CLASSES)


def torchvisions() -> nn.Module:
    return TorchvisionViT(SIDE, PATCH, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=CLASSES)


def timms(**settings: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer  # pyright: ignore[reportMissingImports]

    settings = {"img_size": SIDE, "patch_size": PATCH, "depth": 2, "num_heads": 2, "embed_dim": 16, **settings}
    return VisionTransformer(num_classes=CLASSES, **settings)


def hugging_faces(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=SIDE,
        patch_size=PATCH, num_labels=CLASSES,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForImageClassification")(config)


NETWORKS = {
    "ours": (ours, 1),
    "torchvision": (torchvisions, 1),
    "timm": (timms, 1),
    "timm, registers": (lambda: timms(reg_tokens=3), 4),
    "timm, no class token": (lambda: timms(class_token=False, global_pool="avg"), 0),
    "ViT": (lambda: hugging_faces("ViT"), 1),
    "DeiT": (lambda: hugging_faces("DeiT"), 2),
    "Dinov2": (lambda: hugging_faces("Dinov2"), 1),
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, dtype=torch.float64)


def dropping(model: nn.Module) -> Any:
    (layer,) = [module for module in model.modules() if type(module).__name__.startswith("Dropping")]
    return layer


def watched(layer: nn.Module) -> dict[str, Tensor]:
    """Its input and output of the latest pass."""
    seen: dict[str, Tensor] = {}
    layer.register_forward_hook(lambda *call: seen.update(output=call[2]))
    return seen


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_kept_are_tokens_with_their_positions(name: str) -> None:
    if "timm" in name:
        pytest.importorskip("timm")
    make, prefix = NETWORKS[name]
    model = make().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    apply_patch_dropout(model, keep_rate=0.4)
    seen, batch = watched(dropping(model)), images()
    model.eval()(batch)
    whole = seen["output"]
    assert whole.shape[1] == prefix + PATCHES
    model.train()(batch)
    kept = count_kept_patches(PATCHES, 0.4)
    assert kept == 25
    assert seen["output"].shape[1] == prefix + kept
    assert torch.equal(seen["output"][:, :prefix], whole[:, :prefix])
    places = [
        [_place(token, row) for token in rows] for rows, row in zip(seen["output"][:, prefix:], whole, strict=True)
    ]
    assert all(sorted(set(row)) == row for row in places)  # in their order, each once
    assert places[0] != places[1]


def _place(token: Tensor, whole: Tensor) -> int:
    (place,) = (whole == token).all(dim=1).nonzero().flatten().tolist()
    return place


def test_it_is_timms_patch_dropout_on_the_same_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = pytest.importorskip("timm.layers")
    theirs = layers.PatchDropout(0.5, num_prefix_tokens=1, ordered=True).train()
    tokens, keys = torch.randn(4, 1 + 12, 3), torch.rand(4, 12)
    layer: Any = apply_patch_dropout(ours(), keep_rate=0.5).get_submodule("encoder.dropout").train()
    with monkeypatch.context() as patched:
        patched.setattr(torch, "rand", lambda *shape, **named: keys)
        patched.setattr(torch, "randn", lambda *shape, **named: keys)
        assert torch.equal(layer(tokens), theirs(tokens))
    for patches, rate in ((196, 0.5), (49, 0.3), (7, 0.05), (100, 0.29)):
        tokens = torch.zeros(1, patches, 1)
        count = layers.PatchDropout(1 - rate, num_prefix_tokens=0).train()(tokens).shape[1]
        assert count_kept_patches(patches, rate) - count in (0, 1)  # 1 where timm's product lies below a whole number
    assert count_kept_patches(100, 0.29) == 29


def test_every_patch_is_kept_as_often() -> None:
    kept = draw_kept_patches(20_000, 10, 0.3, generator=torch.Generator().manual_seed(1))
    assert kept.shape == (20_000, 3)
    shares = torch.bincount(kept.flatten(), minlength=10) / 20_000
    assert (shares - 0.3).abs().max() < 5 * (0.3 * 0.7 / 20_000) ** 0.5


def test_all_patches_are_the_network_itself() -> None:
    model, batch = ours().double(), images()
    expected = copy.deepcopy(model)(batch)
    assert torch.equal(apply_patch_dropout(model, keep_rate=1.0)(batch), expected)


def test_evaluation_state_and_copies_are_those_of_the_network() -> None:
    model = ours().double()
    names = list(model.state_dict())
    expected = copy.deepcopy(model).eval()(images())
    torch.manual_seed(0)
    apply_patch_dropout(apply_patch_dropout(model, keep_rate=0.5), keep_rate=0.5)
    assert list(model.state_dict()) == names
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.manual_seed(0)
        assert torch.equal(one.eval()(images()), expected)
        assert "keeps 0.5 of the patches" in repr(one)


def test_gradients_are_those_of_the_kept_tokens() -> None:
    model = apply_patch_dropout(ours().double(), keep_rate=0.5).train()
    layer, tokens = dropping(model), torch.randn(2, 1 + PATCHES, 64, dtype=torch.float64, requires_grad=True)
    layer.microbatch_draws.of_rows = kept = draw_kept_patches(2, PATCHES, 0.5, generator=torch.Generator())
    layer(tokens).sum().backward()
    expected = torch.zeros(2, 1 + PATCHES)
    expected[:, 0] = 1
    expected.scatter_(1, kept + 1, 1.0)
    assert tokens.grad is not None
    assert torch.equal(tokens.grad, expected.unsqueeze(-1).expand(-1, -1, 64).double())


def test_a_compiled_network_keeps_the_same_patches() -> None:
    torch._dynamo.reset()
    model = apply_patch_dropout(ours().double(), keep_rate=0.5).train()
    model.heads[0].weight.data.normal_()  # pyright: ignore
    (draws,) = microbatch_draws(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    for seed in range(2):
        draws.of_rows = draw_kept_patches(3, PATCHES, 0.5, generator=torch.Generator().manual_seed(seed))
        batch = images()
        torch.testing.assert_close(compiled(batch), model(batch), rtol=0, atol=1e-12)


def test_the_cost_of_training_is_counted() -> None:
    model = apply_patch_dropout(ours(), keep_rate=0.5)
    whole = count_forward_macs(model, image_size=SIDE)
    with keeping_patches(model, 0.5, in_evaluation=True):
        half = count_forward_macs(model, image_size=SIDE)
    assert count_forward_macs(model, image_size=SIDE) == whole
    width, mlp, layers = 64, 256, 4

    def macs(tokens: int) -> int:
        block = tokens * (4 * width * width + 2 * width * mlp) + 2 * tokens * tokens * width
        return PATCHES * 3 * PATCH * PATCH * width + layers * block + width * CLASSES

    assert (whole, half) == (macs(1 + PATCHES), macs(1 + PATCHES // 2))


def test_the_draw_is_a_function_of_seed_rank_and_step() -> None:
    first = draw_kept_patches(4, 9, 0.5, generator=generator_at(7, rank=1, step=3, stream="patch_dropout"))
    again = draw_kept_patches(4, 9, 0.5, generator=generator_at(7, rank=1, step=3, stream="patch_dropout"))
    other = draw_kept_patches(4, 9, 0.5, generator=generator_at(7, rank=0, step=3, stream="patch_dropout"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_last_epochs_keep_all() -> None:
    algorithm = PatchDropout(keep_rate=0.25, final_epochs=2)
    assert [algorithm.rate_at(epoch, 5) for epoch in range(5)] == [0.25, 0.25, 0.25, 1.0, 1.0]
    with pytest.raises(ValueError, match=r"final_epochs is 2 and the run has 1 epochs.* at most 1"):
        algorithm.rate_at(0, 1)


def test_images_that_changed_within_the_step_are_told() -> None:
    model = apply_patch_dropout(ours(), keep_rate=0.5).train()
    dropping(model).microbatch_draws.of_rows = torch.zeros(2, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"drew \[2, 8\] patches for a batch of 2 images with 64 patches"):
        model(torch.zeros(2, 3, SIDE, SIDE))


@pytest.mark.parametrize("rate", [0, -0.1, 1.1, float("nan")])
def test_a_rate_out_of_range(rate: float) -> None:
    with pytest.raises(ValueError, match=r"keep_rate .* must lie in \(0, 1\]"):
        PatchDropout(keep_rate=rate)
    with pytest.raises(ValueError, match=r"keep_rate .* must lie in \(0, 1\]"):
        apply_patch_dropout(ours(), keep_rate=rate)


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match=r"final_epochs -1 must be 0 or more"):
        PatchDropout(final_epochs=-1)
    with pytest.raises(ValueError, match=r"keeps 0.5 of its patches already, and is now asked to keep 0.4"):
        apply_patch_dropout(apply_patch_dropout(ours(), keep_rate=0.5), keep_rate=0.4)
    stem = ours()
    stem.conv_proj = nn.Sequential(stem.conv_proj)  # pyright: ignore
    with pytest.raises(ValueError, match=r"makes its patches with a Sequential.* without a stem"):
        apply_patch_dropout(stem)


def test_timms_own_is_not_applied_twice() -> None:
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"was made with a patch_drop_rate of its own"):
        apply_patch_dropout(timms(patch_drop_rate=0.5))


def test_a_network_without_patches_is_left_alone() -> None:
    with pytest.warns(UserWarning, match="patch dropout changed nothing in Linear"):
        apply_patch_dropout(nn.Linear(2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_patch_dropout(ours())
