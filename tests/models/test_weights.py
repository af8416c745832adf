"""Weights from elsewhere: torchvision's, antialiased-cnns', files in any format; and invalid files."""

from __future__ import annotations

import pickle
from pathlib import Path

import antialiased_cnns
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from algos import apply_blurpool
from models.registry import find
from models.weights import classifier_names, copy_weights, load_weights, read_weights


def randomized(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    torch.manual_seed(0)
    return randomized(torchvision.models.resnet18(num_classes=10))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))


def save(state: dict, path: Path) -> str:
    if path.suffix == ".safetensors":
        save_file({name: value.clone() for name, value in state.items()}, path)
    else:
        torch.save(state, path)
    return str(path)


@torch.no_grad()
@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin", "w.pth.tar", "w.safetensors"])
def test_every_format_loads(resnet18, images, tmp_path, name) -> None:
    path = save(resnet18.state_dict(), tmp_path / name)
    ours = find("resnet18")(num_classes=10, weights=path).eval()
    torch.testing.assert_close(ours(images), resnet18(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_of_training_scripts_are_seen_through(resnet18, tmp_path, wrapper, prefix) -> None:
    state = {prefix + name: value for name, value in resnet18.state_dict().items()}
    path = save({"epoch": 90, "best_acc": 76.1, wrapper: state}, tmp_path / "checkpoint.pth")
    found = read_weights(path)
    assert list(found) == list(resnet18.state_dict())
    assert all(torch.equal(found[name], value) for name, value in resnet18.state_dict().items())


@pytest.mark.timeout(120)
def test_a_runs_own_checkpoint_loads(tmp_path) -> None:
    """Composer's checkpoints, which hold random states and times besides."""
    from composer import Trainer

    from models.classifier import ImageClassifier

    network = find("resnet_digits")(num_classes=10)
    batches = torch.utils.data.TensorDataset(torch.randn(4, 3, 8, 8), torch.randint(10, (4,)))
    trainer = Trainer(
        model=ImageClassifier(network, num_classes=10),
        train_dataloader=torch.utils.data.DataLoader(batches, batch_size=4),
        optimizers=torch.optim.SGD(network.parameters(), lr=0.1),
        max_duration="1ba",
        device="cpu",
        progress_bar=False,
    )
    trainer.fit()
    path = trainer.save_checkpoint(str(tmp_path / "best.pt"))
    trainer.close()
    assert isinstance(path, str)
    found = read_weights(path)
    assert all(torch.equal(found[name], value) for name, value in network.state_dict().items())
    find("resnet_digits")(num_classes=10, weights=path)


@torch.no_grad()
def test_another_number_of_classes_leaves_the_head_and_says_so(resnet18, images, tmp_path, caplog) -> None:
    path = save(resnet18.state_dict(), tmp_path / "w.pt")
    torch.manual_seed(5)
    fresh = find("resnet18")(num_classes=7)
    torch.manual_seed(5)
    ours = find("resnet18")(num_classes=7, weights=path).eval()
    assert torch.equal(ours.fc.weight, fresh.fc.weight)
    assert torch.equal(ours.fc.bias, fresh.fc.bias)
    assert f"{path}: everything but the classifier, which is new for 7 classes" in caplog.text
    ours.fc, theirs = nn.Identity(), torchvision.models.resnet18(num_classes=10).eval()
    theirs.load_state_dict(resnet18.state_dict())
    theirs.fc = nn.Identity()
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


def test_the_same_number_of_classes_is_not_spoken_of(resnet18, tmp_path, caplog) -> None:
    find("resnet18")(num_classes=10, bce_head_bias=True, weights=save(resnet18.state_dict(), tmp_path / "w.pt"))
    assert not caplog.text


@torch.no_grad()
def test_weights_from_before_batches_were_counted_load(resnet18, images, tmp_path) -> None:
    old = {name: value for name, value in resnet18.state_dict().items() if not name.endswith("num_batches_tracked")}
    ours = find("resnet18")(num_classes=10, weights=save(old, tmp_path / "w.pth")).eval()
    torch.testing.assert_close(ours(images), resnet18(images), rtol=1e-5, atol=1e-5)


# --- torchvision's by name, from its cache ---


@torch.no_grad()
def test_torchvisions_names_load_from_its_cache(resnet18, images, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    theirs = randomized(torchvision.models.resnet18())
    (tmp_path / "checkpoints").mkdir()
    torch.save(theirs.state_dict(), tmp_path / "checkpoints" / Path(weights.url).name)
    for name in ("resnet18", "torchvision.resnet18"):
        ours = find(name)(num_classes=1000, weights="IMAGENET1K_V1").eval()
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


def test_torchvisions_names_without_a_network(tmp_path, monkeypatch) -> None:
    def refuse(*arguments, **settings):
        raise OSError("no route\nto host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(
        ValueError, match=r"IMAGENET1K_V2 of resnet50 could not be had from https.* \(no route to host\)"
    ) as e:
        find("resnet50")(num_classes=10, weights="IMAGENET1K_V2")
    assert str(tmp_path / "checkpoints" / "resnet50-11ad3fa6.pth") in str(e.value)
    assert "\n" not in str(e.value)


@torch.no_grad()
@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_heads_of_training_alone_are_left_out(name, tmp_path) -> None:
    torch.manual_seed(0)
    theirs = randomized(torchvision.models.get_model(name, num_classes=10, aux_logits=True, init_weights=True))
    ours = find(f"torchvision.{name}")(num_classes=10, weights=save(theirs.state_dict(), tmp_path / "w.pt"))
    images = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(ours.eval()(images), theirs(images), rtol=1e-5, atol=1e-5)
    assert isinstance(ours.train()(images), torch.Tensor)


# --- antialiased-cnns ---


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "settings", "theirs"),
    [
        ("resnet18", {}, {}),
        ("resnet50", {"filter_size": 4}, {"filter_size": 4}),
        ("alexnet", {"min_channels": 3}, {"pool_only": False}),
    ],
)
@pytest.mark.parametrize("blur_first", [True, False])
def test_antialiased_weights_load_with_blurpool(name, settings, theirs, blur_first, images, tmp_path) -> None:
    torch.manual_seed(0)
    reference = randomized(getattr(antialiased_cnns, name)(num_classes=10, **({"filter_size": 3} | theirs)))
    path = save({"state_dict": reference.state_dict(), "epoch": 90}, tmp_path / "lpf.pth.tar")
    build = find("alexnet_torchvision" if name == "alexnet" else name)
    if blur_first:
        ours = build(num_classes=10)
        apply_blurpool(ours, placement="after", **settings)
        load_weights(ours, path)
    else:
        ours = build(num_classes=10, weights=path)
        apply_blurpool(ours, placement="after", **settings)
    torch.testing.assert_close(ours.eval()(images), reference(images), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_torchvisions_weights_load_under_blurpool(resnet18, images, tmp_path) -> None:
    path = save(resnet18.state_dict(), tmp_path / "w.pt")
    before, after = find("resnet18")(num_classes=10, weights=path), find("resnet18")(num_classes=10)
    apply_blurpool(before)
    apply_blurpool(after)
    load_weights(after, path)
    torch.testing.assert_close(after.eval()(images), before.eval()(images), rtol=0, atol=0)
    assert (after(images) - resnet18(images)).abs().max() > 1e-3  # BlurPool is there


def test_antialiased_weights_of_another_network_are_refused(tmp_path) -> None:
    path = save(antialiased_cnns.resnet18(num_classes=10).state_dict(), tmp_path / "lpf.pth")
    with pytest.raises(ValueError, match="do not fit ResNet: "):
        find("resnet34")(num_classes=10, weights=path)


# --- what is refused ---


class Payload:
    """Runs code when an unrestricted unpickler reads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("plain_pickle", [True, False])
def test_pickles_run_no_code(tmp_path, plain_pickle) -> None:
    trace, path = tmp_path / "it_ran", tmp_path / "w.pt"
    if plain_pickle:
        path.write_bytes(pickle.dumps({"state_dict": Payload(trace)}, protocol=2))
    else:
        torch.save({"state_dict": Payload(trace)}, path)
    with pytest.raises(ValueError, match=f"{path} holds more than tensors.* torch.save") as error:
        find("resnet18")(num_classes=10, weights=str(path))
    assert "\n" not in str(error.value)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", None])
def test_broken_files_are_refused_in_one_line(resnet18, tmp_path, name, content) -> None:
    path = Path(save(resnet18.state_dict(), tmp_path / name))
    path.write_bytes(path.read_bytes()[:100_000] if content is None else content)
    with pytest.raises(ValueError, match=str(path)) as error:
        find("resnet18")(num_classes=10, weights=str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("held", [{}, {"epoch": 3}, [1, 2], torch.zeros(3), {"state_dict": {"fc.weight": 3.0}}])
def test_files_without_a_state_dict_are_refused(tmp_path, held) -> None:
    torch.save(held, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w.pt holds no state dict .* save one"):
        find("resnet18")(num_classes=10, weights=str(tmp_path / "w.pt"))


def test_weights_of_another_network_are_refused_by_what_differs(resnet18, tmp_path) -> None:
    path = save(resnet18.state_dict(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"do not fit ResNet: \d+ parameters of the model are not in it \(layer1.2"):
        find("resnet34")(num_classes=10, weights=path)
    with pytest.raises(ValueError, match=r"\d+ of its tensors have no place in the model \(conv1.weight first"):
        copy_weights(nn.Sequential(nn.Linear(2, 2)), resnet18.state_dict(), source="w.pt")
    wide = find("resnet_digits")(num_classes=10, width=32)
    narrow = save(find("resnet_digits")(num_classes=10).state_dict(), tmp_path / "narrow.pt")
    with pytest.raises(ValueError, match=r"differ in shape \(stem.0.weight, \[16, 3, 3, 3\] where .* \[32, 3, 3, 3\]"):
        load_weights(wide, narrow)


def test_a_model_that_is_refused_is_left_as_it_was(resnet18) -> None:
    model = find("resnet34")(num_classes=10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="do not fit"):
        copy_weights(model, resnet18.state_dict(), source="w.pt")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_names_that_are_near_are_suggested() -> None:
    with pytest.raises(ValueError, match=r"'IMAGENET1K_V3' are not there: .* IMAGENET1K_V1, .* did you mean"):
        find("resnet50")(num_classes=10, weights="IMAGENET1K_V3")


def test_the_classifier_is_the_last_linear_layer_or_convolution() -> None:
    assert classifier_names(find("resnet18")(num_classes=2)) == ["fc.weight", "fc.bias"]
    assert classifier_names(find("torchvision.squeezenet1_1")(num_classes=2)) == [
        "classifier.1.weight",
        "classifier.1.bias",
    ]
    assert classifier_names(nn.Flatten()) == []
