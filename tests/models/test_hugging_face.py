"""Hugging Face's classifiers from a folder: pretrained, new, with another head, at another size."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from torch import nn

from models.registry import find
from models.summary import find_layers

VIT = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4
)
SMALL = dict(hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1])
# class, settings, whether it can checkpoint gradients
TINY = {
    "vit": (transformers.ViTForImageClassification, VIT, True),
    "deit": (transformers.DeiTForImageClassificationWithTeacher, VIT, True),
    "resnet": (transformers.ResNetForImageClassification, SMALL | dict(embedding_size=8), False),
    "convnext": (transformers.ConvNextForImageClassification, SMALL, False),
}


def tiny(name: str) -> transformers.PreTrainedModel:
    kind, settings, _ = TINY[name]
    return kind(kind.config_class(**settings, num_labels=10)).eval()


@pytest.fixture(scope="module", params=TINY)
def saved(request, tmp_path_factory):
    """A model, and the folder that it was saved to."""
    torch.manual_seed(0)
    model = tiny(request.param)
    folder = tmp_path_factory.mktemp("hf") / request.param
    model.save_pretrained(folder)
    return request.param, model, folder


@torch.no_grad()
def test_a_saved_folder_loads_without_a_network(saved, caplog) -> None:
    name, theirs, folder = saved
    ours = find(f"hf.{folder}")(num_classes=10).eval()
    size = 32 if name in ("resnet", "convnext") else 16
    images = torch.randn(2, 3, size, size)
    torch.testing.assert_close(ours(images), theirs(images).logits, rtol=1e-5, atol=1e-5)
    assert "classifier" not in caplog.text


def test_head_is_replaced_for_the_datas_classes_and_trains(saved, caplog) -> None:
    _, theirs, folder = saved
    ours = find(f"hf.{folder}")(num_classes=7)
    assert f"{folder}: everything but the classifier, which is new for 7 classes" in caplog.text
    kept = dict(theirs.named_parameters())
    for key, parameter in ours.network.named_parameters():
        if "classifier" not in key:
            assert torch.equal(parameter, kept[key]), key
    logits = ours.train()(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 7)
    nn.functional.cross_entropy(logits, torch.tensor([0, 6])).backward()
    layers = find_layers(ours, image_size=32)
    assert layers[0].shape == (7,)
    assert layers[0].macs


def test_new_weights_are_new(saved) -> None:
    _, theirs, folder = saved
    torch.manual_seed(1)
    ours = find(f"hf.{folder}")(num_classes=10, weights=None)
    same = [torch.equal(*two) for two in zip(ours.parameters(), theirs.parameters(), strict=True) if two[0].ndim > 1]
    assert not all(same)


def test_gradient_checkpointing_changes_no_gradient(saved) -> None:
    name, _, folder = saved
    build = find(f"hf.{folder}")
    if not TINY[name][2]:
        with pytest.raises(ValueError, match=r"gradient_checkpointing is true and .* has none; set it to false"):
            build(num_classes=10, gradient_checkpointing=True)
        return
    gradients = []
    for gradient_checkpointing in (False, True):
        network = build(num_classes=10, gradient_checkpointing=gradient_checkpointing).train()
        torch.manual_seed(2)
        network(torch.randn(2, 3, 16, 16)).square().mean().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert any(getattr(module, "gradient_checkpointing", False) for module in network.modules())
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@torch.no_grad()
def test_positions_are_interpolated_at_another_size(tmp_path) -> None:
    theirs = tiny("vit")
    theirs.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 24, 24)
    expected = theirs(images, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(find(f"hf.{tmp_path}")(num_classes=10).eval()(images), expected, rtol=1e-5, atol=1e-5)


# --- what is refused ---


def refused(folder, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        find(f"hf.{folder}")(num_classes=10)
    assert "\n" not in str(error.value)


def test_pickled_weights_are_not_read(tmp_path) -> None:
    model = tiny("vit")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    refused(tmp_path, "cannot be built: .*model.safetensors")


def test_code_that_comes_with_a_model_is_not_run(tmp_path) -> None:
    trace = tmp_path / "it_ran"
    tiny("vit").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_type"] = "stranger"
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForImageClassification": "code.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(trace)!r}, 'w')\n")
    refused(tmp_path, "cannot be built")
    assert not trace.exists()


def test_weights_that_leave_parameters_out_are_refused(tmp_path) -> None:
    tiny("vit").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    refused(tmp_path, "its weights leave 16 parameters of ViTForImageClassification out .vit.(encoder.)?layers?.2")


def test_what_is_no_image_classifier_is_refused(tmp_path) -> None:
    transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    refused(tmp_path, "cannot be built")


def test_what_is_not_in_the_cache_is_refused_without_a_network(monkeypatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused("someone/some-vit", r"someone/some-vit has no config.json in .*cache.* huggingface-cli download someone/")


@torch.no_grad()
def test_an_id_in_the_cache_needs_no_network(tmp_path, monkeypatch) -> None:
    import huggingface_hub.constants

    torch.manual_seed(0)
    shape = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256)
    config = transformers.ViTConfig(**shape, image_size=32, patch_size=4, num_labels=10)
    theirs = transformers.ViTForImageClassification(config).eval()
    repository = tmp_path / "models--someone--some-vit"
    theirs.save_pretrained(repository / "snapshots" / "0123abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    images = torch.randn(2, 3, 32, 32)
    for build, settings in ((find("hf.someone/some-vit"), {}), (find("vit_digits"), {"weights": "someone/some-vit"})):
        ours = build(num_classes=10, **settings).eval()
        torch.testing.assert_close(ours(images), theirs(images).logits, rtol=1e-5, atol=1e-5)
