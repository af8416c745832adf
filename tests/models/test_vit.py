"""ViT against torchvision's and transformers', positions against both and against an independent formula."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
import transformers
from torch import nn

from models.summary import count_parameters
from models.vit import translate_names, vit_b16, vit_digits
from models.weights import interpolate_positions


def randomized(network: nn.Module, seed: int = 0) -> nn.Module:
    """No parameter at zero or one, where a term that is left out would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def tiny_hugging_face(image_size: int = 32, **settings) -> transformers.ViTForImageClassification:
    config = transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=image_size,
        patch_size=4,
        num_labels=10,
        **settings,
    )
    return randomized(transformers.ViTForImageClassification(config))  # pyright: ignore


@torch.no_grad()
def test_vit_b16_equals_torchvisions() -> None:
    torch.manual_seed(0)
    theirs = randomized(torchvision.models.vit_b_16(num_classes=100)).double()
    ours = vit_b16(num_classes=100).double().eval()
    ours.load_state_dict(theirs.state_dict())
    assert count_parameters(vit_b16(num_classes=1000)) == 86_567_656
    images = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    expected = theirs(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(images), expected, rtol=1e-12, atol=1e-12)


def test_vit_b16_starts_as_torchvisions() -> None:
    torch.manual_seed(0)
    theirs, ours = torchvision.models.vit_b_16(num_classes=10), vit_b16(num_classes=10)
    for (name, expected), (own_name, value) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        assert (name, expected.shape) == (own_name, value.shape)
        assert value.std().item() == pytest.approx(expected.std().item(), rel=0.1, abs=1e-6), name
        assert value.mean().item() == pytest.approx(expected.mean().item(), abs=0.002), name


@torch.no_grad()
def test_equals_transformers_with_translated_names() -> None:
    theirs, ours = tiny_hugging_face(layer_norm_eps=1e-6), vit_digits(num_classes=10).eval()
    ours.load_state_dict(translate_names(theirs.state_dict()))
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_names_in_memory_and_in_files_lead_to_the_same_weights(tmp_path) -> None:
    """transformers 5 renames the parameters, and writes files with transformers 4's names."""
    theirs = tiny_hugging_face()
    theirs.save_pretrained(tmp_path)
    in_memory, in_file = theirs.state_dict(), safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert any(".attention.attention.query." in name for name in in_file)
    renamed = {_as_transformers_5(name): value for name, value in in_file.items()}
    assert in_memory.keys() in (in_file.keys(), renamed.keys())
    expected = translate_names(in_file)
    for state in (in_memory, renamed):
        translated = translate_names(state)
        assert translated.keys() == expected.keys() == vit_digits(num_classes=10).state_dict().keys()
        for name, value in expected.items():
            assert torch.equal(translated[name], value), name


def _as_transformers_5(name: str) -> str:
    for before, after in {
        "encoder.layer.": "layers.", "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj", "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj", "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2",
    }.items():  # fmt: skip
        name = name.replace(before, after)
    return name


@torch.no_grad()
@pytest.mark.parametrize("size", [(48, 48), (16, 16), (24, 40)])
def test_images_of_another_size_equal_transformers(size) -> None:
    theirs, ours = tiny_hugging_face(layer_norm_eps=1e-6), vit_digits(num_classes=10).eval()
    ours.load_state_dict(translate_names(theirs.state_dict()))
    images = torch.randn(2, 3, *size)
    expected = theirs(images, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(ours(images), expected, rtol=1e-5, atol=1e-5)


def cubic(t: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Keys' kernel of cubic convolution."""
    t = np.abs(t)
    near = (a + 2) * t**3 - (a + 3) * t**2 + 1
    far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
    return np.where(t <= 1, near, np.where(t < 2, far, 0.0))


def resampling_matrix(old: int, new: int) -> np.ndarray:
    """Row i: shares of the old pixels in new pixel i, centers at (i + 1/2) old / new - 1/2, borders repeated."""
    matrix = np.zeros((new, old))
    for i in range(new):
        center = (i + 0.5) * old / new - 0.5
        for j in range(int(np.floor(center)) - 1, int(np.floor(center)) + 3):
            matrix[i, min(max(j, 0), old - 1)] += cubic(np.array(center - j))
    return matrix


@pytest.mark.parametrize("grid", [(6, 6), (3, 3), (5, 9), (4, 4)])
def test_positions_are_resampled_by_cubic_convolution(grid) -> None:
    positions = torch.randn(1, 1 + 16, 8, dtype=torch.float64)
    rows, columns = (resampling_matrix(4, new) for new in grid)
    image = positions[0, 1:].reshape(4, 4, 8).numpy()
    expected = np.einsum("ri,cj,ijd->rcd", rows, columns, image).reshape(-1, 8)
    ours = interpolate_positions(positions, grid)
    np.testing.assert_allclose(ours[0, 1:].numpy(), expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(ours[:, :1], positions[:, :1])
    if grid == (4, 4):
        assert ours is positions


def test_positions_learn_at_another_size() -> None:
    network = vit_digits(num_classes=10)
    with torch.no_grad():
        randomized(network)
    network.train()(torch.randn(2, 3, 48, 48)).square().mean().backward()
    assert network.get_parameter("encoder.pos_embedding").grad.abs().min() > 0


def test_sizes_that_are_no_multiple_of_the_patch_are_refused() -> None:
    with pytest.raises(ValueError, match="image_size 225 must be a multiple of the patch, 16 px"):
        vit_b16(num_classes=10, image_size=225)
    with pytest.raises(ValueError, match="30x32 px do not divide into patches of 4 px; make both sides multiples of 4"):
        vit_digits(num_classes=10)(torch.zeros(1, 3, 30, 32))
    for name in ("dropout", "attention_dropout"):
        with pytest.raises(ValueError, match=rf"{name} 1.5 must lie in \[0, 1\)"):
            vit_digits(num_classes=10, **{name: 1.5})


# --- weights ---


@torch.no_grad()
@pytest.mark.parametrize("eps", [1e-12, 1e-3])
def test_a_hugging_face_folder_loads_with_its_epsilon(tmp_path, eps) -> None:
    theirs = tiny_hugging_face(layer_norm_eps=eps)
    theirs.save_pretrained(tmp_path)
    ours = vit_digits(num_classes=10, weights=str(tmp_path)).eval()
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_head_is_replaced_and_positions_are_interpolated_on_loading(tmp_path, caplog) -> None:
    theirs = tiny_hugging_face(image_size=32)
    theirs.save_pretrained(tmp_path)
    ours = vit_digits(num_classes=100, image_size=48, weights=str(tmp_path)).eval()
    assert "position embeddings interpolated from 8x8 to 12x12" in caplog.text
    assert "everything but the classifier, which is new for 100 classes" in caplog.text
    assert not ours.get_parameter("heads.head.weight").any()  # as the paper starts fine-tuning
    images = torch.randn(2, 3, 48, 48)
    features: list[torch.Tensor] = []
    ours.get_submodule("heads").register_forward_pre_hook(lambda module, inputs: features.append(inputs[0]))
    ours(images)
    expected = theirs.vit(images, interpolate_pos_encoding=True).last_hidden_state[:, 0]
    torch.testing.assert_close(features[0], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_backbone_without_classifier_loads(tmp_path) -> None:
    """As google/vit-base-patch16-224-in21k is: no head, and a pooler that classifiers do not use."""
    theirs = transformers.ViTModel(tiny_hugging_face().config, add_pooling_layer=True).eval()
    theirs.save_pretrained(tmp_path)
    ours = vit_digits(num_classes=10, weights=str(tmp_path)).eval()
    images = torch.randn(2, 3, 32, 32)
    patches = theirs(images).last_hidden_state
    grid = ours.conv_proj(images).flatten(2).transpose(1, 2)
    tokens = torch.cat([ours.class_token.expand(2, -1, -1), grid], dim=1)
    torch.testing.assert_close(ours.encoder(tokens, (8, 8)), patches, rtol=1e-5, atol=1e-5)


def test_another_activation_is_refused(tmp_path) -> None:
    tiny_hugging_face(hidden_act="relu").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="hidden_act 'relu', and this network has gelu; use model hf"):
        vit_digits(num_classes=10, weights=str(tmp_path))


def test_another_shape_is_refused_in_one_line(tmp_path) -> None:
    tiny_hugging_face().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"do not fit VisionTransformer: .* of the model are not in it") as error:
        vit_b16(num_classes=10, weights=str(tmp_path))
    assert "\n" not in str(error.value)


def test_what_is_not_in_the_hubs_cache_is_refused_without_a_network(monkeypatch, tmp_path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"someone/some-vit has no config.json in .*cache.* huggingface-cli"):
        vit_b16(num_classes=10, weights="someone/some-vit")
    with pytest.raises(ValueError, match=r"are not there: give the path of a \.pt"):
        vit_b16(num_classes=10, weights="weights/missing.pt")
    with pytest.raises(ValueError, match=r"are not there.* did you mean IMAGENET1K_V1"):
        vit_b16(num_classes=10, weights="IMAGENET1K_V9")
