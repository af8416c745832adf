"""What benchmarks.algorithms and benchmarks.gpu compare: a step without an algorithm, and with each library's version.

A variant is a function that makes a step, given the `Bench`; a step trains the model once on the bench's batch.
Libraries are imported inside the functions, so that a missing one only removes its own variants.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

Step = Callable[[], None]
Prepare = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (images, labels) -> what the model and the loss get
Loss = Callable[[Tensor, Tensor], Tensor]

NUM_CLASSES = 1000
OURS = "brisk"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_GRAPHS = 1024  # of one function, beyond which torch's compiler would silently run it as it is; its own limit is 8


@dataclass
class Bench:
    """One batch on one device, and the models that train on it.

    precision: of autocast, a key of `DTYPES`; empty for bf16 on a GPU and fp32 on a CPU. fp16 scales the loss.
    build: makes the model, given num_classes; None for torchvision's model of that name. backend: of torch.compile.
    """

    model_name: str
    image_size: int
    batch_size: int
    device: torch.device
    memory_format: torch.memory_format
    compiled: bool
    precision: str = ""
    build: Callable[..., nn.Module] | None = None
    backend: str = "inductor"

    def __post_init__(self) -> None:
        self.precision = self.precision or ("bf16" if self.device.type == "cuda" else "fp32")
        shape = (self.batch_size, 3, self.image_size, self.image_size)
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(shape, generator=generator).to(self.device)
        self.images = images.contiguous(memory_format=self.memory_format)
        self.labels = torch.randint(NUM_CLASSES, (self.batch_size,), generator=generator).to(self.device)

    def new_model(self) -> nn.Module:
        """The model, unchanged, on the CPU."""
        torch.manual_seed(0)
        return (self.build or getattr(torchvision.models, self.model_name))(num_classes=NUM_CLASSES)

    def ready(self, model: nn.Module, *, memory_format: torch.memory_format | None = None) -> Any:
        """`model` on the device, in the bench's memory format unless another is given."""
        model = model.to(self.device, memory_format=memory_format or self.memory_format)  # pyright: ignore
        return self.compile(model) if self.compiled else model

    def compile(self, model: nn.Module) -> Any:
        """`model` compiled for the shapes that it gets, however many of its kind this process has compiled."""
        for name in ("recompile_limit", "cache_size_limit"):  # the second is an older torch's name for it
            for limit in (name, f"accumulated_{name}"):
                if hasattr(torch._dynamo.config, limit):
                    setattr(torch._dynamo.config, limit, _GRAPHS)
        return torch.compile(model, dynamic=False, backend=self.backend)

    @functools.cached_property
    def plain_model(self) -> Any:
        """Shared by all variants that leave the model unchanged, so that they differ only in the algorithm."""
        return self.ready(self.new_model())

    def autocast(self) -> torch.autocast:
        """The context of forward passes and losses."""
        return torch.autocast(self.device.type, DTYPES[self.precision], enabled=self.precision != "fp32")

    def evaluate(self, model: nn.Module, images: Tensor) -> Tensor:
        """Outputs in evaluation mode, without gradients; the mode is as before afterwards."""
        training = model.training
        with torch.no_grad(), self.autocast():
            outputs = model.eval()(images)
        model.train(training)
        return outputs

    def pass_once(
        self,
        model: nn.Module,
        images: Tensor,
        targets: Tensor,
        loss: Loss = F.cross_entropy,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Tensor:
        """Forward and backward; gradients accumulate in the parameters, scaled by `scaler` if there is one."""
        with self.autocast():
            outputs = model(images)
            value = loss(outputs, targets)
        (value if scaler is None else scaler.scale(value)).backward()
        return value

    def step(
        self,
        model: nn.Module,
        *,
        prepare: Prepare | None = None,
        loss: Loss = F.cross_entropy,
        images: Tensor | None = None,
        after: Callable[[], Any] | None = None,
    ) -> Step:
        """A step of SGD with momentum on `model`."""
        optimizer = sgd(model)
        given = self.images if images is None else images
        scaler = torch.amp.GradScaler(self.device.type) if self.precision == "fp16" else None

        def train_once() -> None:
            x, y = (given, self.labels) if prepare is None else prepare(given, self.labels)
            self.pass_once(model, x, y, loss, scaler)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
            if after is not None:
                after()

        return train_once


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of every variant; its rate is so small that the weights hardly change while they are timed."""
    return torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)


def baseline(bench: Bench) -> Step:
    """The step without any algorithm."""
    return bench.step(bench.plain_model)


def contiguous_baseline(bench: Bench) -> Step:
    """The step in NCHW, against which channels-last is measured."""
    model = bench.ready(bench.new_model(), memory_format=torch.contiguous_format)
    return bench.step(model, images=bench.images.contiguous())


# --- blurpool ------------------------------------------------------------------------------------------------------


def our_blurpool(bench: Bench, **settings: Any) -> Step:
    from algos import apply_blurpool

    return bench.step(bench.ready(apply_blurpool(bench.new_model(), **settings)))


def composer_blurpool(bench: Bench) -> Step:
    from composer.functional import apply_blurpool

    model = bench.new_model()
    apply_blurpool(model)
    return bench.step(bench.ready(model))


def authors_blurpool(bench: Bench) -> Step:
    import antialiased_cnns

    make = getattr(antialiased_cnns, bench.model_name)
    return bench.step(bench.ready(make(filter_size=3, num_classes=NUM_CLASSES)))


def timm_blurpool(bench: Bench) -> Step:
    import timm

    return bench.step(bench.ready(timm.create_model("resnetblur50", num_classes=NUM_CLASSES)))


# --- channels-last -------------------------------------------------------------------------------------------------


def _channels_last(bench: Bench, apply: Callable[[nn.Module], Any]) -> Step:
    model = bench.new_model().to(bench.device)
    apply(model)
    # Batches are NCHW, as loaders make them; the first convolution converts them.
    return bench.step(bench.compile(model) if bench.compiled else model, images=bench.images.contiguous())


def our_channels_last(bench: Bench) -> Step:
    from algos import apply_channels_last

    return _channels_last(bench, apply_channels_last)


def composer_channels_last(bench: Bench) -> Step:
    from composer.functional import apply_channels_last

    return _channels_last(bench, apply_channels_last)


# --- label smoothing -----------------------------------------------------------------------------------------------


def our_label_smoothing(bench: Bench) -> Step:
    from algos import smooth_labels

    def prepare(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return images, smooth_labels(labels, smoothing=0.1, num_classes=NUM_CLASSES)

    return bench.step(bench.plain_model, prepare=prepare)


def composer_label_smoothing(bench: Bench) -> Step:
    from composer.functional import smooth_labels

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs, smooth_labels(outputs, labels, smoothing=0.1))

    return bench.step(bench.plain_model, loss=loss)


def torch_label_smoothing(bench: Bench) -> Step:
    return bench.step(bench.plain_model, loss=functools.partial(F.cross_entropy, label_smoothing=0.1))


def timm_label_smoothing(bench: Bench) -> Step:
    from timm.loss.cross_entropy import LabelSmoothingCrossEntropy

    return bench.step(bench.plain_model, loss=LabelSmoothingCrossEntropy(smoothing=0.1))


# --- mixing samples ------------------------------------------------------------------------------------------------


def our_mixup(bench: Bench) -> Step:
    from algos import draw_mixup, mixup_batch

    generator = torch.Generator().manual_seed(0)

    def prepare(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        lam, permutation = draw_mixup(len(images), alpha=0.2, generator=generator)
        return mixup_batch(images, labels, lam=lam, permutation=permutation, num_classes=NUM_CLASSES)

    return bench.step(bench.plain_model, prepare=prepare)


def our_cutmix(bench: Bench) -> Step:
    from algos import cutmix_batch, draw_cutmix

    generator = torch.Generator().manual_seed(0)
    size = bench.image_size

    def prepare(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        box, permutation = draw_cutmix(len(images), height=size, width=size, alpha=1.0, generator=generator)
        return cutmix_batch(images, labels, box=box, permutation=permutation, num_classes=NUM_CLASSES)

    return bench.step(bench.plain_model, prepare=prepare)


def composer_mixing(bench: Bench, *, name: str) -> Step:
    from composer import functional

    mixing = {"mixup": functional.mixup_batch, "cutmix": functional.cutmix_batch}[name]

    def prepare(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        # As its algorithms do: MixUp's weight is the partner's, CutMix's the sample's own.
        mixed, partners, weight = mixing(images, labels)[:3]
        first, second = (labels, partners) if name == "cutmix" else (partners, labels)
        rows = [F.one_hot(indices, NUM_CLASSES).float() for indices in (first, second)]
        return mixed, weight * rows[0] + (1 - weight) * rows[1]

    return bench.step(bench.plain_model, prepare=prepare)


def torchvision_mixing(bench: Bench, *, name: str) -> Step:
    from torchvision.transforms import v2

    alpha = {"mixup": 0.2, "cutmix": 1.0}[name]
    mix = {"mixup": v2.MixUp, "cutmix": v2.CutMix}[name](alpha=alpha, num_classes=NUM_CLASSES)
    return bench.step(bench.plain_model, prepare=mix)


def timm_mixing(bench: Bench, *, name: str) -> Step:
    from timm.data.mixup import Mixup

    mixup_alpha, cutmix_alpha = {"mixup": (0.2, 0.0), "cutmix": (0.0, 1.0)}[name]
    mix = Mixup(mixup_alpha, cutmix_alpha, label_smoothing=0.0, num_classes=NUM_CLASSES)

    def prepare(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return mix(images.clone(), labels)  # which it changes in place

    return bench.step(bench.plain_model, prepare=prepare)


# --- the rest ------------------------------------------------------------------------------------------------------


def our_ema(bench: Bench) -> Step:
    from algos import ema_update

    average = copy.deepcopy(_bare(bench.plain_model))
    model = _bare(bench.plain_model)
    return bench.step(bench.plain_model, after=lambda: ema_update(average, model, decay=0.999))


def composer_ema(bench: Bench) -> Step:
    from composer.functional import compute_ema

    average = copy.deepcopy(_bare(bench.plain_model))
    model = _bare(bench.plain_model)
    return bench.step(bench.plain_model, after=lambda: compute_ema(model, average, smoothing=0.999))


def torch_ema(bench: Bench) -> Step:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = _bare(bench.plain_model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=True)
    return bench.step(bench.plain_model, after=lambda: average.update_parameters(model))


def timm_ema(bench: Bench) -> Step:
    from timm.utils.model_ema import ModelEmaV3

    model = _bare(bench.plain_model)
    average = ModelEmaV3(model, decay=0.999)
    return bench.step(bench.plain_model, after=lambda: average.update(model))


def our_resizing(bench: Bench) -> Step:
    from algos.progressive_resizing import resize_images

    def prepare(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return resize_images(images, image_size=bench.image_size // 2), labels

    return bench.step(bench.plain_model, prepare=prepare)


def composer_resizing(bench: Bench) -> Step:
    from composer.functional import resize_batch

    prepare = functools.partial(resize_batch, scale_factor=0.5, mode="resize")
    return bench.step(bench.plain_model, prepare=prepare)


def our_stochastic_depth(bench: Bench) -> Step:
    from algos import apply_stochastic_depth

    return bench.step(bench.ready(apply_stochastic_depth(bench.new_model(), drop_rate=0.1)))


def composer_stochastic_depth(bench: Bench) -> Step:
    from composer.functional import apply_stochastic_depth

    model = bench.new_model()
    apply_stochastic_depth(model, "ResNetBottleneck", stochastic_method="sample", drop_rate=0.1)
    return bench.step(bench.ready(model))


def our_patch_dropout(bench: Bench) -> Step:
    from algos import apply_patch_dropout

    return bench.step(bench.ready(apply_patch_dropout(bench.new_model(), keep_rate=0.5)))


def our_selective_backprop(bench: Bench) -> Step:
    from algos import draw_loss_ranks, select_samples

    model, generator = bench.plain_model, torch.Generator().manual_seed(0)

    def keep_half(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        ranks = draw_loss_ranks(len(images), keep=0.5, generator=generator)
        outputs = bench.evaluate(model, images)
        kept = select_samples(F.cross_entropy(outputs, labels, reduction="none"), ranks=ranks)
        return images[kept], labels[kept]

    return bench.step(model, prepare=keep_half)


def composer_selective_backprop(bench: Bench) -> Step:
    from composer.functional import select_using_loss

    def keep_half(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with bench.autocast():
            return select_using_loss(images, labels, bench.plain_model, F.cross_entropy, keep=0.5)

    return bench.step(bench.plain_model, prepare=keep_half)


def our_distillation(bench: Bench) -> Step:
    from algos import distillation_loss

    teacher = bench.ready(bench.new_model()).eval()

    def with_teacher(outputs: Tensor, labels: Tensor) -> Tensor:
        return distillation_loss(outputs, bench.evaluate(teacher, bench.images), labels)

    return bench.step(bench.plain_model, loss=with_teacher)


def our_sam(bench: Bench) -> Step:
    from algos import sam_gradients
    from algos.sam import frozen_statistics

    model = bench.plain_model
    optimizer = sgd(model)
    parameters = list(model.parameters())

    def train_once() -> None:
        bench.pass_once(model, bench.images, bench.labels)
        with frozen_statistics(model):
            sam_gradients(parameters, lambda: bench.pass_once(model, bench.images, bench.labels))
        optimizer.step()
        optimizer.zero_grad()

    return train_once


def composer_sam(bench: Bench) -> Step:
    from composer.algorithms.sam.sam import SAMOptimizer

    optimizer = SAMOptimizer(sgd(bench.plain_model))

    def closure(**_: Any) -> Tensor:
        optimizer.zero_grad()
        return bench.pass_once(bench.plain_model, bench.images, bench.labels)

    def train_once() -> None:
        optimizer.step(closure)
        optimizer.zero_grad()

    return train_once


def pytorch_optimizer_sam(bench: Bench) -> Step:
    from pytorch_optimizer import SAM

    optimizer = SAM(bench.plain_model.parameters(), torch.optim.SGD, lr=1e-6, momentum=0.9)

    def closure() -> Any:
        return bench.pass_once(bench.plain_model, bench.images, bench.labels)

    def train_once() -> None:
        closure()
        optimizer.step(closure)  # drops the first pass's gradients itself
        optimizer.zero_grad()

    return train_once


def _bare(model: Any) -> nn.Module:
    return getattr(model, "_orig_mod", model)  # below torch.compile


# --- the list ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One row: `who`'s version of an algorithm.

    bottleneck_only: it supports only ResNet-50's residual blocks. vit_only: only networks that have patches.
    """

    algorithm: str
    who: str
    how: str
    make: Callable[[Bench], Step]
    bottleneck_only: bool = False
    vit_only: bool = False


_p = functools.partial

VARIANTS = [
    # The noise: a step against itself.
    Variant("(nothing)", OURS, "the baseline once more", baseline),
    Variant("blurpool", OURS, "apply_blurpool", our_blurpool),
    Variant("blurpool", OURS, "apply_blurpool(pad='zeros')", _p(our_blurpool, pad="zeros")),
    Variant("blurpool", "composer", "apply_blurpool", composer_blurpool),
    Variant("blurpool_after", OURS, "apply_blurpool(placement='after')", _p(our_blurpool, placement="after")),
    Variant("blurpool_after", "antialiased_cnns", "its own model, filter_size=3", authors_blurpool),
    Variant("blurpool_after", "timm", "its own model, resnetblur50", timm_blurpool, bottleneck_only=True),
    Variant("channels_last", OURS, "apply_channels_last", our_channels_last),
    Variant("channels_last", "composer", "apply_channels_last", composer_channels_last),
    Variant("label_smoothing", OURS, "smooth_labels", our_label_smoothing),
    Variant("label_smoothing", "composer", "smooth_labels", composer_label_smoothing),
    Variant("label_smoothing", "torch", "cross_entropy(label_smoothing=)", torch_label_smoothing),
    Variant("label_smoothing", "timm", "LabelSmoothingCrossEntropy", timm_label_smoothing),
    Variant("mixup", OURS, "draw_mixup, mixup_batch", our_mixup),
    Variant("mixup", "composer", "mixup_batch", _p(composer_mixing, name="mixup")),
    Variant("mixup", "torchvision", "v2.MixUp", _p(torchvision_mixing, name="mixup")),
    Variant("mixup", "timm", "data.Mixup", _p(timm_mixing, name="mixup")),
    Variant("cutmix", OURS, "draw_cutmix, cutmix_batch", our_cutmix),
    Variant("cutmix", "composer", "cutmix_batch", _p(composer_mixing, name="cutmix")),
    Variant("cutmix", "torchvision", "v2.CutMix", _p(torchvision_mixing, name="cutmix")),
    Variant("cutmix", "timm", "data.Mixup(cutmix_alpha=)", _p(timm_mixing, name="cutmix")),
    Variant("ema", OURS, "ema_update", our_ema),
    Variant("ema", "composer", "compute_ema", composer_ema),
    Variant("ema", "torch", "swa_utils.AveragedModel", torch_ema),
    Variant("ema", "timm", "utils.ModelEmaV3", timm_ema),
    Variant("progressive_resizing", OURS, "resize_images, to half", our_resizing),
    Variant("progressive_resizing", "composer", "resize_batch, to half", composer_resizing),
    Variant("stochastic_depth", OURS, "apply_stochastic_depth", our_stochastic_depth),
    Variant("stochastic_depth", "composer", "apply_stochastic_depth", composer_stochastic_depth, bottleneck_only=True),
    Variant("patch_dropout", OURS, "apply_patch_dropout, half", our_patch_dropout, vit_only=True),
    Variant("selective_backprop", OURS, "select_samples, half", our_selective_backprop),
    Variant("selective_backprop", "composer", "select_using_loss, half", composer_selective_backprop),
    Variant("distillation", OURS, "distillation_loss, a teacher of its size", our_distillation),
    Variant("sam", OURS, "sam_gradients, frozen_statistics", our_sam),
    Variant("sam", "composer", "SAMOptimizer", composer_sam),
    Variant("sam", "pytorch_optimizer", "SAM", pytorch_optimizer_sam),
]
PEERS = ("composer", "antialiased_cnns", "pytorch_optimizer", "timm")  # besides torch and torchvision, always installed
BASELINES = {"channels_last": contiguous_baseline}  # the others use `baseline`


def absent_peers(names: Iterable[str] = PEERS) -> dict[str, str]:
    """The libraries of `names` that cannot be imported, each with the reason."""
    absent = {}
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # a library too old for this torch may fail in any way
            absent[name] = f"{type(error).__name__}: {error}"
    return absent
