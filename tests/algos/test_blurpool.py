"""BlurPool against the paper's models and Composer's, and what an in-place change must leave alone."""

import copy
import functools
import io
import math
import pickle
import warnings
from types import SimpleNamespace

import antialiased_cnns
import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from algos import BlurPool as PublicBlurPool
from algos.blurpool import BlurPool, _Blurred, apply_blurpool
from algos.blurring.blur import _Axis, _reflect_channels_last, binomial_kernel, blur, convolve


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def small_resnet(block=BasicBlock, *, num_classes=10):
    return ResNet(block, [1, 1, 1, 1], num_classes=num_classes)


def strided_net():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),  # three channels: spared
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1, groups=2),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.Conv2d(24, 8, 1, stride=2),
    )


def blurred(model):
    return [module for module in model.modules() if isinstance(module, _Blurred)]


def randomize_batch_norms(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)


# --- the filter ---


@pytest.mark.parametrize("size", range(2, 8))
def test_blur_is_the_binomial_filter(size):
    taps = np.array([1.0])
    for _ in range(size - 1):
        taps = np.convolve(taps, [0.5, 0.5])
    impulse = torch.zeros(1, 1, 21, 21, dtype=torch.float64)
    impulse[..., 10, 10] = 1
    response = blur(impulse, filter_size=size)[0, 0]
    start = 10 - size // 2  # cross-correlation mirrors the window, and the filter is symmetric
    expected = torch.zeros(21, 21, dtype=torch.float64)
    expected[start : start + size, start : start + size] = torch.from_numpy(np.outer(taps, taps))
    torch.testing.assert_close(response, expected, rtol=0, atol=1e-15)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layer = apply_blurpool(nn.Conv2d(16, 1, 3, stride=2).to(dtype), filter_size=size)
        assert layer.blur_kernel.dtype == dtype
        assert torch.equal(layer.blur_kernel[0, 0].double(), torch.from_numpy(np.outer(taps, taps)))


@pytest.mark.parametrize("size", range(2, 8))
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("pad", "theirs"), [("reflect", "reflect"), ("zeros", "zero")])
def test_blur_equals_the_authors_layer(size, stride, pad, theirs):
    images = torch.randn(2, 3, 9, 12, dtype=torch.float64)
    reference = antialiased_cnns.BlurPool(3, filt_size=size, stride=stride, pad_type=theirs).double()
    torch.testing.assert_close(blur(images, filter_size=size, stride=stride, pad=pad), reference(images))


@pytest.mark.parametrize("height", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [2, 3, 5, 7])
def test_reflecting_keeps_a_constant_constant_at_every_size(height, size):
    images = torch.full((1, 16, height, 5), 0.7, dtype=torch.float64)
    torch.testing.assert_close(blur(images, filter_size=size, stride=2), images[:, :, ::2, ::2])
    assert blur(images, filter_size=3, pad="zeros").min() < 0.6


PADS = {"reflect": "reflect", "zeros": "constant"}


def pad_and_convolve(images, taps, stride, pad):
    """What a blur is, in PyTorch's own operations and with their derivatives."""
    kernel = binomial_kernel(taps, like=images)
    (above, left), (below, right) = ([(size - 1) // 2 for size in taps], [size // 2 for size in taps])
    padded = F.pad(images, (left, right, above, below), mode=PADS[pad])
    return F.conv2d(padded, kernel.expand(images.shape[1], -1, -1, -1), stride=stride, groups=images.shape[1])


@pytest.mark.parametrize("size", [(4, 5), (8, 8), (9, 12)])  # the last is beyond what a matrix product blurs
@pytest.mark.parametrize("taps", [(3, 3), (2, 2), (5, 7), (4, 1)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_blur_and_its_derivatives_are_those_of_padding_and_convolving(size, taps, stride, pad, memory_format):
    images = torch.randn(2, 3, *size, dtype=torch.float64).contiguous(memory_format=memory_format)
    ours = functools.partial(convolve, kernel=binomial_kernel(taps, like=images), stride=stride, pad=pad)
    theirs = functools.partial(pad_and_convolve, taps=taps, stride=stride, pad=pad)
    blurred, back = torch.func.vjp(ours, images)
    close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-14)
    close(blurred, theirs(images))
    assert blurred.is_contiguous(memory_format=memory_format)
    gradient = torch.randn_like(blurred)
    close(back(gradient), torch.func.vjp(theirs, images)[1](gradient))
    close(torch.func.jvp(ours, (images,), (images,))[1], theirs(images))
    close(torch.func.vmap(ours)(images[:, None])[:, 0], theirs(images))
    close(ours(images[0]), theirs(images)[0])
    # Along random directions: entry by entry it takes minutes.
    assert torch.autograd.gradgradcheck(ours, (images[:1].clone().requires_grad_(),), fast_mode=True)


@pytest.mark.parametrize("taps", [3, 4, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_padding_of_gpus_is_torchs(taps, stride):
    images = torch.randn(2, 3, 5, 8).contiguous(memory_format=torch.channels_last)
    rows, columns = (_Axis.of(size, taps, stride, "reflect", any_size=False) for size in (5, 8))
    padded = _reflect_channels_last(images, rows, columns)
    expected = F.pad(images, (columns.before, columns.after, rows.before, rows.after), mode="reflect")
    assert torch.equal(padded, expected)
    assert padded.is_contiguous(memory_format=torch.channels_last)


def test_a_blur_keeps_no_image_for_its_derivative():
    images = torch.randn(2, 16, 32, 32, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x):
        blur(images * 2)
    assert kept == [9]  # the filter


@pytest.mark.parametrize("size", [(1, 70), (2, 40), (40, 2), (1, 2), (2, 9)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_an_axis_too_short_to_reflect_repeats_its_last_pixel(size, stride, memory_format):
    def theirs(images):
        for axis, sides in ((3, (2, 2, 0, 0)), (2, (0, 0, 2, 2))):
            images = F.pad(images, sides, mode="reflect" if images.shape[axis] > 2 else "replicate")
        kernel = binomial_kernel((5, 5), like=images).expand(3, -1, -1, -1)
        return F.conv2d(images, kernel, stride=stride, groups=3)

    images = torch.randn(2, 3, *size, dtype=torch.float64).contiguous(memory_format=memory_format)
    blurred, back = torch.func.vjp(functools.partial(blur, filter_size=5, stride=stride), images)
    torch.testing.assert_close(blurred, theirs(images), rtol=0, atol=1e-14)
    gradient = torch.randn_like(blurred)
    expected = torch.func.vjp(theirs, images)[1](gradient)
    torch.testing.assert_close(back(gradient), expected, rtol=0, atol=1e-14)


def test_only_subsampled_axes_are_blurred():
    layer = apply_blurpool(nn.MaxPool2d((1, 2), stride=(1, 2)))
    images = torch.randn(1, 1, 6, 8, dtype=torch.float64)
    maxima = F.max_pool2d(images, (1, 2), stride=1)
    row = nn.functional.pad(maxima, (1, 1, 0, 0), mode="reflect")
    expected = (row[..., :-2] + 2 * row[..., 1:-1] + row[..., 2:])[..., ::2] / 4
    torch.testing.assert_close(layer(images), expected)


# --- whole models ---


def with_weights_of(reference, model):
    values = [value for name, value in reference.state_dict().items() if not name.endswith("filt")]
    model.load_state_dict(dict(zip(model.state_dict(), values, strict=True)))
    return model


@pytest.mark.parametrize(
    ("name", "size", "settings", "theirs"),
    [
        ("resnet18", 3, {}, {}),
        ("resnet18", 4, {}, {}),
        ("resnet18", 3, {"min_channels": 3}, {"pool_only": False}),
        ("resnet50", 3, {}, {}),
        pytest.param("vgg11_bn", 3, {}, {}, marks=pytest.mark.slow),
        ("alexnet", 3, {"min_channels": 3}, {"pool_only": False}),
        ("mobilenet_v2", 3, {}, {}),
        pytest.param("densenet121", 3, {}, {}, marks=pytest.mark.slow),
    ],
)
def test_after_equals_the_authors_models(name, size, settings, theirs):
    reference = getattr(antialiased_cnns, name)(filter_size=size, num_classes=10, **theirs).double().eval()
    randomize_batch_norms(reference)
    model = torchvision.models.get_model(name, weights=None, num_classes=10).double().eval()
    with_weights_of(reference, model)
    apply_blurpool(model, placement="after", filter_size=size, **settings)
    images = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), reference(images), rtol=1e-10, atol=1e-10)
        ours, expected = model.float()(images.float()), reference.float()(images.float())
    # Of the largest, since float32 rounds at every layer: random weights make outputs of up to a hundred.
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()


def test_after_trains_as_the_authors_model_does():
    reference = antialiased_cnns.ResNet(antialiased_cnns.resnet.Bottleneck, [1, 1, 1, 1], num_classes=4, filter_size=3)
    model = with_weights_of(reference, small_resnet(Bottleneck, num_classes=4)).double()
    reference.double()
    apply_blurpool(model, placement="after")
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    for network in (model, reference):
        network(images).square().mean().backward()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("build", [small_resnet, lambda: small_resnet(Bottleneck), strided_net])
def test_before_with_zeros_equals_composers(build):
    import composer.functional

    model = build().double().eval()
    reference = copy.deepcopy(model)
    composer.functional.apply_blurpool(
        reference, replace_convs=True, replace_maxpools=True, blur_first=True, min_channels=16
    )
    reference.double()
    apply_blurpool(model, pad="zeros")
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(model(images), reference(images), rtol=1e-5, atol=1e-5)


def test_models_of_residual_blocks_without_torchvisions_stem_take_after():
    shortcut = nn.Sequential(nn.Conv2d(16, 32, 1, stride=2, bias=False), nn.BatchNorm2d(32))
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), BasicBlock(16, 32, stride=2, downsample=shortcut))
    apply_blurpool(model, placement="after")
    block = model[1]
    assert blurred(model) == [block.conv1, block.conv2, block.downsample[0]]
    assert block.conv1.stride == block.downsample[0].stride == (1, 1)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 32, 8, 8)


def test_subclasses_of_resnet_take_after():
    class Wider(ResNet):
        pass

    reference = small_resnet().eval()
    model = Wider(BasicBlock, [1, 1, 1, 1], num_classes=10).eval()
    model.load_state_dict(reference.state_dict())
    images = torch.randn(1, 3, 64, 64)
    ours, theirs = (apply_blurpool(network, placement="after")(images) for network in (model, reference))
    assert torch.equal(ours, theirs)


def test_after_refuses_a_structure_that_it_does_not_know():
    model = strided_net()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"convolution '2' of Sequential.*placement='before'"):
        apply_blurpool(model, placement="after")
    assert repr(model) == repr(before)


# --- single layers ---


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 2, "dilation": 2},
        {"kernel_size": 5, "padding": 1, "groups": 4},
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
        {"kernel_size": 3, "padding": (0, 1), "bias": False},
        {"kernel_size": 1},
        {"kernel_size": 1, "groups": 8, "padding_mode": "reflect"},
        {"kernel_size": 1, "padding": 1},
        {"kernel_size": 2, "padding": "valid"},
    ],
)
@pytest.mark.parametrize("stride", [2, (1, 3)])
def test_before_is_the_convolution_of_the_blurred_image(settings, stride):
    layer = nn.Conv2d(16, 8, stride=stride, **settings).double()
    original = copy.deepcopy(layer)
    apply_blurpool(layer, filter_size=3)
    images = torch.randn(2, 16, 13, 11, dtype=torch.float64)
    taps = [3 if axis > 1 else 1 for axis in original.stride]
    kernel = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for axis, size in enumerate(taps):
        if size == 3:
            kernel = kernel * torch.tensor([1.0, 2, 1], dtype=torch.float64).view((-1, 1) if axis == 0 else (1, -1)) / 4
    halo = (taps[1] // 2, taps[1] // 2, taps[0] // 2, taps[0] // 2)
    soft = F.conv2d(F.pad(images, halo, mode="reflect"), kernel.expand(16, 1, *taps), groups=16)
    torch.testing.assert_close(layer(images), original(soft))


def test_pointwise_convolutions_work_on_the_kept_pixels_only():
    layer = apply_blurpool(nn.Conv2d(16, 32, 1, stride=2))
    seen = []
    original = F.conv2d

    def spy(images, *args, **kwargs):
        seen.append(tuple(images.shape))
        return original(images, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "conv2d", spy)
        layer(torch.randn(1, 16, 8, 8))
    assert layer.stride == (1, 1)
    assert seen[-1] == (1, 16, 4, 4)


@pytest.mark.parametrize("size", [*range(4, 14), 32])
@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize(
    "window",
    [
        {"kernel_size": 2},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 3, "stride": 2},
        {"kernel_size": 2, "stride": 3, "padding": 1},
        {"kernel_size": 2, "stride": 2, "dilation": 2},
        {"kernel_size": (2, 3), "stride": (1, 2), "padding": (0, 1)},
    ],
)
def test_max_pools_keep_their_output_size_and_take_dense_maxima(size, ceil_mode, window):
    original = nn.MaxPool2d(ceil_mode=ceil_mode, **window)
    layer = apply_blurpool(copy.deepcopy(original), filter_size=3)
    images = torch.randn(1, 2, size, size + 1, dtype=torch.float64)
    wanted = original(images)
    pooled = layer(images)
    assert pooled.shape == wanted.shape
    assert torch.isfinite(pooled).all()
    # Blurring keeps the range: no value may leave that of the dense maxima.
    assert pooled.max() <= images.max() + 1e-12


def test_a_layer_takes_one_image_without_a_batch_and_batches_of_batches():
    images = torch.randn(3, 2, 16, 20, 20)
    model = apply_blurpool(nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.Conv2d(16, 8, 3, stride=2)))
    expected = torch.stack([model(batch) for batch in images])
    torch.testing.assert_close(torch.func.vmap(model)(images), expected)
    torch.testing.assert_close(torch.stack([model(image) for image in images[0]]), expected[0])


def test_max_pool_equals_maximum_then_blur():
    images = torch.randn(2, 4, 10, 10, dtype=torch.float64)
    layer = apply_blurpool(nn.MaxPool2d(3, stride=2, padding=1))
    torch.testing.assert_close(layer(images), blur(F.max_pool2d(images, 3, stride=1, padding=1), stride=2))
    assert layer.stride == (1, 1)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_max_pools_keep_the_format_and_the_gradients_of_ties(memory_format):
    images = torch.randint(3, (2, 4, 10, 10)).double().contiguous(memory_format=memory_format).requires_grad_()
    pooled = apply_blurpool(nn.MaxPool2d(3, stride=2, padding=1))(images)
    wanted = blur(F.max_pool2d(images, 3, stride=1, padding=1), stride=2)
    assert pooled.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(pooled, wanted, rtol=0, atol=1e-12)
    upstream = torch.randn_like(pooled)
    gradients = [torch.autograd.grad(outputs, images, upstream)[0] for outputs in (pooled, wanted)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_ceil_mode_reaches_the_last_partial_window():
    images = torch.arange(8.0, dtype=torch.float64).view(1, 1, 1, 8).expand(1, 1, 8, 8).contiguous()
    layer = apply_blurpool(nn.MaxPool2d(3, stride=2, ceil_mode=True))
    # Dense maxima along a row: 2..7, then the partial window's 7; reflected, blurred, every second.
    row = np.array([3, 2, 3, 4, 5, 6, 7, 7, 7.0])
    expected = ((row[:-2] + 2 * row[1:-1] + row[2:]) / 4)[::2]
    torch.testing.assert_close(layer(images)[0, 0, 0], torch.from_numpy(expected))


def test_layers_without_aliasing_are_left_alone():
    model = nn.Sequential(
        nn.Conv2d(16, 16, 3), nn.MaxPool2d(3, stride=1), nn.AvgPool2d(2), nn.Conv2d(8, 16, 3, stride=2)
    )
    before = repr(model)
    with pytest.warns(UserWarning, match="BlurPool changed nothing in Sequential"):
        apply_blurpool(model)
    assert repr(model) == before


def test_pools_that_return_indices_are_left_alone_with_a_warning():
    model = nn.ModuleDict({"pool": nn.MaxPool2d(2, return_indices=True), "other": nn.MaxPool2d(2)})
    with pytest.warns(UserWarning, match="max-pool 'pool' alone"):
        apply_blurpool(model)
    assert blurred(model) == [model["other"]]


@pytest.mark.parametrize(("switch", "kinds"), [("convolutions", {nn.MaxPool2d}), ("max_pools", {nn.Conv2d})])
def test_either_kind_can_be_left_out(switch, kinds):
    model = apply_blurpool(strided_net(), **{switch: False})
    assert {type(layer).__bases__[1] for layer in blurred(model)} == kinds


# --- what an in-place change must not touch ---


@pytest.mark.parametrize("placement", ["before", "after"])
def test_weights_load_before_and_after_the_change(placement):
    plain = small_resnet().eval()
    state = copy.deepcopy(plain.state_dict())
    changed = apply_blurpool(plain, placement=placement)
    assert changed is plain
    assert list(changed.state_dict()) == list(state)
    late = apply_blurpool(small_resnet().eval(), placement=placement)
    late.load_state_dict(state)
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(late(images), changed(images))


def test_an_earlier_optimizer_trains_the_same_tensors():
    model = strided_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parameters = list(model.parameters())
    apply_blurpool(model)
    assert all(ours is theirs for ours, theirs in zip(model.parameters(), parameters, strict=True))
    before = [parameter.clone() for parameter in parameters]
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(new, old) for new, old in zip(model.parameters(), before, strict=True))


def test_hooks_ties_and_frozen_parameters_survive():
    model = nn.ModuleList([nn.Conv2d(16, 16, 3, stride=2), nn.Conv2d(16, 16, 3, stride=2)])
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[0].register_forward_pre_hook(lambda *_: calls.append("before"))
    apply_blurpool(model)
    model[0](torch.randn(1, 16, 8, 8))
    assert calls == ["before", "forward"]
    assert model[1].weight is model[0].weight
    assert not model[0].bias.requires_grad
    assert model[0].weight.requires_grad


def test_subclasses_keep_their_own_forward():
    class Standardized(nn.Conv2d):
        def forward(self, images):
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return self._conv_forward(images, weight, self.bias)

    layer = Standardized(16, 4, 1, stride=2).double()
    original = copy.deepcopy(layer)
    apply_blurpool(layer)
    assert isinstance(layer, Standardized)
    images = torch.randn(1, 16, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(images), original(blur(images)))


def test_parametrizations_before_and_after_survive():
    images = torch.randn(1, 16, 9, 9, dtype=torch.float64)
    early = parametrizations.weight_norm(nn.Conv2d(16, 4, 3, stride=2)).double()
    original = copy.deepcopy(early)
    apply_blurpool(early)
    torch.testing.assert_close(early(images), original(blur(images)))
    torch.testing.assert_close(copy.deepcopy(early)(images), early(images))

    late = apply_blurpool(nn.Conv2d(16, 4, 3, stride=2).double())
    expected = late(images)
    parametrizations.weight_norm(late)
    torch.testing.assert_close(late(images), expected)
    torch.testing.assert_close(copy.deepcopy(late)(images), expected)
    parametrize.remove_parametrizations(late, "weight")
    torch.testing.assert_close(late(images), expected)


def test_copies_and_pickles_compute_the_same():
    model = apply_blurpool(strided_net()).eval()
    images = torch.randn(1, 3, 32, 32)
    expected = model(images)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stored, weights_only=False)]
    for other in copies:
        assert torch.equal(other(images), expected)
        assert [type(layer) for layer in blurred(other)] == [type(layer) for layer in blurred(model)]


@pytest.mark.parametrize("placement", ["before", "after"])
def test_bfloat16_and_channels_last_pass_through(placement):
    model = small_resnet(Bottleneck).to(torch.bfloat16, memory_format=torch.channels_last).eval()
    apply_blurpool(model, placement=placement)
    formats = []
    for layer in blurred(model):
        layer.register_forward_hook(
            lambda _, __, output: formats.append(output.is_contiguous(memory_format=torch.channels_last))
        )
    images = torch.randn(2, 3, 64, 64, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    assert model(images).dtype == torch.bfloat16
    assert formats
    assert all(formats)


def test_autocast_works():
    model = apply_blurpool(strided_net())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(torch.randn(1, 3, 32, 32))
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()


def test_the_filter_follows_the_model_and_survives_the_meta_device():
    with torch.device("meta"):
        model = strided_net()
    apply_blurpool(model)
    model.to_empty(device="cpu")
    source = strided_net()
    model.load_state_dict(source.state_dict())
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(images), apply_blurpool(source)(images))
    assert {layer.blur_kernel.dtype for layer in blurred(model.double())} == {torch.float64}


@pytest.mark.parametrize("placement", ["before", "after"])
def test_compiles_to_one_graph(placement):
    torch._dynamo.reset()
    model = apply_blurpool(small_resnet().eval(), placement=placement)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    images = torch.randn(2, 3, 32, 32)
    with warnings.catch_warnings():
        # torch 2.7 reads a deprecated attribute of its own while tracing.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\..*")
        torch.testing.assert_close(compiled(images), model(images))


@pytest.mark.filterwarnings("ignore")  # both exporters warn of their own constants and annotations
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("settings", [{}, {"pad": "zeros"}, {"filter_size": 4}])
def test_exports_to_onnx(settings, dynamo, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, stride=2), nn.MaxPool2d(3, stride=2, padding=1))
    apply_blurpool(model.eval(), **settings)
    images = torch.randn(1, 3, 33, 32)
    torch.onnx.export(model, (images,), str(tmp_path / "model.onnx"), dynamo=dynamo)
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(images), rtol=0, atol=1e-5)


# --- repeated and mistaken use ---


@pytest.mark.parametrize("placement", ["before", "after"])
def test_twice_is_once(placement):
    model = apply_blurpool(small_resnet().eval(), placement=placement)
    images = torch.randn(1, 3, 64, 64)
    expected, text = model(images), repr(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_blurpool(model, placement=placement)
    assert repr(model) == text
    assert torch.equal(model(images), expected)


def test_other_settings_the_second_time_are_refused():
    model = apply_blurpool(strided_net())
    with pytest.raises(ValueError, match=r"filter_size=3.*now asked for filter_size=5"):
        apply_blurpool(model, filter_size=5)


def test_lazy_layers_are_refused_until_they_know_their_channels():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that lazy modules are under development
        model = nn.Sequential(nn.LazyConv2d(16, 3), nn.MaxPool2d(2))
    with pytest.raises(ValueError, match="'0' is a LazyConv2d"):
        apply_blurpool(model)
    model(torch.randn(1, 3, 8, 8))
    assert blurred(apply_blurpool(model)) == [model[1]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"filter_size": 1}, "filter_size 1 must be"),
        ({"filter_size": 8}, "filter_size 8 must be"),
        ({"filter_size": 2.5}, "filter_size 2.5 must be"),
        ({"placement": "behind"}, "placement 'behind' must be"),
        ({"pad": "same"}, "pad 'same' must be"),
        ({"min_channels": 0}, "min_channels 0 must be"),
        ({"convolutions": False, "max_pools": False}, "leaves nothing to blur"),
    ],
)
def test_settings_out_of_range_are_refused_by_both_forms(settings, message):
    with pytest.raises(ValueError, match=message):
        apply_blurpool(strided_net(), **settings)
    with pytest.raises(ValueError, match=message):
        BlurPool(**settings)


def test_shift_invariance_improves():
    """What the blur is for: a grating finer than the new pixels leaves less of itself behind."""
    columns = torch.arange(64, dtype=torch.float64)
    grating = torch.cos(2 * math.pi * 0.42 * columns).expand(1, 16, 64, 64)
    plain = nn.Conv2d(16, 1, 1, stride=2, bias=False).double()
    soft = apply_blurpool(copy.deepcopy(plain))
    inner = (..., slice(2, -2), slice(2, -2))
    assert soft(grating)[inner].std() < 0.1 * plain(grating)[inner].std()


# --- in the Trainer ---


def test_class_is_public_pickles_and_acts_at_init():
    from composer.core import Event

    assert PublicBlurPool is BlurPool
    algorithm = pickle.loads(pickle.dumps(BlurPool(filter_size=5)))
    assert algorithm.settings.filter_size == 5
    assert [event for event in Event if algorithm.match(event, SimpleNamespace(algorithms=[algorithm]))] == [Event.INIT]


def test_trainer_blurs_saves_and_resumes_without_warning(tmp_path):
    from composer import Trainer
    from composer.models import ComposerClassifier
    from torch.utils.data import DataLoader, TensorDataset

    def train(duration, **settings):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(16, 4),
        )  # fmt: skip
        model = ComposerClassifier(network, num_classes=4)
        samples = TensorDataset(torch.randn(8, 3, 8, 8), torch.arange(8) % 4)
        trainer = Trainer(
            model=model, train_dataloader=DataLoader(samples, batch_size=4), max_duration=duration, device="cpu",
            optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), algorithms=[BlurPool()],
            progress_bar=False, log_to_console=False, **settings,
        )  # fmt: skip
        trainer.fit()
        trainer.close()
        return network

    folder = str(tmp_path)
    whole = train("2ep")
    train("1ep", save_folder=folder, run_name="a")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed = train("2ep", load_path=f"{folder}/ep1-ba2-rank0.pt")
    assert not [warning for warning in caught if "required_on_load" in str(warning.message)]
    assert len(blurred(resumed)) == 1
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
