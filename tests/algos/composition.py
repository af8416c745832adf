"""Small runs of any set of algorithms under any condition, for comparison with a plain run of the same set.

Run as a script on several ranks (`python -m torch.distributed.run ... composition.py STRATEGY FOLDER [sets] [pairs]
[neighbors] [composer]`), it trains every case in turn and writes its weights to FOLDER.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.core import Algorithm, Callback, DataSpec, Event, State
from composer.utils import dist
from torch import Tensor, nn

import algos.framework.base
from algos import LearningRate, arrange
from algos.framework.base import SpeedUp
from algos.framework.registry import find, maker, names
from algos.patch_dropout import PatchDropout
from data import Normalizer, build_loader
from models.classifier import ImageClassifier
from models.resnet import SmallResNet
from models.vit import VisionTransformer
from training.callbacks import _LoaderPosition
from training.checkpoints.saving import Checkpoints
from training.engines.composer import restore_random_state
from training.engines.parallel import LikeDDP

EPOCHS, STEPS_AN_EPOCH, GLOBAL_BATCH_SIZE, IMAGE_SIZE = 3, 4, 8, 16
STOPPED_AT = {"resumed in mid-epoch": "batch 6", "resumed at an epoch's end": "epoch 2"}

# The settings that each algorithm is tried with: strong enough to show within a dozen steps.
EXAMPLES: dict[str, dict[str, Any]] = {
    "blurpool": {},
    "channels_last": {},
    "cutmix": {"alpha": 1.0},
    "distillation": {"temperature": 2.0, "weight": 0.7},  # its teacher comes from `make`
    "ema": {"half_life_steps": 4},
    "fixres": {"epochs": 1, "image_size": 16, "train": "classifier", "learning_rate": 0.01},
    "label_smoothing": {"smoothing": 0.1},
    "mixup": {"alpha": 0.5},
    "patch_dropout": {"keep_rate": 0.5, "final_epochs": 1},
    "progressive_resizing": {
        "stages": [{"epochs": 1, "image_size": 12}, {"epochs": 2, "image_size": 16, "global_batch_size": 4}],
    },
    "randaugment": {"num_ops": 1},
    "sam": {"rho": 0.05, "interval": 2},
    "selective_backprop": {"start": 0.3, "end": 0.67, "keep": 0.5, "interval": 2},  # of the second epoch
    "stochastic_depth": {"drop_rate": 0.3},
}
# Others of an algorithm's ways: name -> the algorithm and its settings.
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "progressive_resizing, sampled": (
        "progressive_resizing",
        {"sizes": [8, 12, 16], "global_batch_sizes": [8, 8, 4], "final_epochs": 1, "learning_rate_scaling": "linear"},
    ),
}
ALONE = {name: [name] for name in sorted([*names(), *WAYS])}
SETS: dict[str, list[str]] = {"nothing": [], **ALONE, "all together": names()}
PAIRS = {"+".join(pair): list(pair) for pair in combinations(names(), 2)}
# Each algorithm with the next one in the registry: the pairs that every change is tested with.
NEIGHBORS = {"+".join(sorted(pair)): sorted(pair) for pair in pairwise([*names(), names()[0]])}
# Composer's own, in recipes under composer.<name>, with settings as close to ours as they go.
COMPOSER_EXAMPLES: dict[str, dict[str, Any]] = {
    "composer.blurpool": {"replace_convs": True, "replace_maxpools": True, "blur_first": True},
    "composer.channels_last": {},
    "composer.cutmix": {"alpha": 1.0},
    "composer.ema": {"half_life": "4ba"},
    "composer.ghost_batchnorm": {"ghost_batch_size": 2},
    "composer.label_smoothing": {"smoothing": 0.1},
    "composer.layer_freezing": {"freeze_start": 0.0},
    "composer.mixup": {"alpha": 0.5},
    "composer.progressive_resizing": {"initial_scale": 0.75, "delay_fraction": 0.3, "finetune_fraction": 0.4},
    "composer.sam": {"rho": 0.05, "interval": 2},
    "composer.squeeze_excite": {"min_channels": 16, "latent_channels": 4},
}
# A compilation for each image size. With sizes as variables, torch 2.7.0 has inductor fail on these networks, and
# aot_eager return wrong gradients behind reflection padding.
COMPILED = {"backend": "aot_eager", "dynamic": False}
DRAW_PER_RANK = {"mixup", "cutmix", "patch_dropout", "randaugment", "selective_backprop", "stochastic_depth"}


def composer_sets() -> dict[str, list[str]]:
    """Each of Composer's own alone, and those together that its notes recommend."""
    together = ["blurpool", "label_smoothing", "mixup", "progressive_resizing", "sam"]
    return {**{name: [name] for name in COMPOSER_EXAMPLES}, "five together": [f"composer.{name}" for name in together]}


def make(name: str, dtype: torch.dtype = torch.float64) -> Algorithm:
    """The algorithm with its example settings. dtype: of a teacher."""
    if name in COMPOSER_EXAMPLES:
        return maker(name)(**COMPOSER_EXAMPLES[name])
    name, settings = WAYS.get(name, (name, dict(EXAMPLES.get(name, {}))))
    if "stages" in settings:
        from algos import Stage

        settings["stages"] = [Stage(**stage) for stage in settings["stages"]]
    if name == "distillation":
        settings["teacher"] = network(4, vit=False, seed=1).to(dtype)
    return find(name)(**settings)


def arranged(chosen: Iterable[str], dtype: torch.dtype = torch.float64) -> list[Algorithm]:
    """The algorithms in the order of their Contracts, with the learning rate's schedule."""
    made = {"learning_rate": LearningRate(warmup_epochs=1), **{name: make(name, dtype) for name in chosen}}
    return [made[name] for name in arrange({name: one.contract for name, one in made.items()})]


def act_as_two_ranks(algorithm: Any) -> None:
    """Have `algorithm` do, in one process, to each half of the batch what it would do to it on that rank."""
    apply_to_batch = algorithm.apply

    def apply(event: Event, state: State, logger: Any) -> None:
        if event != Event.BATCH_START:
            apply_to_batch(event, state, logger)
            return
        batch, halves, kept = state.batch, [], []
        whole = algos.framework.base._distributed
        try:
            for rank in (0, 1):
                algos.framework.base._distributed = lambda what, default, rank=rank: rank if what == "get_rank" else 1
                state.batch = tuple(part.chunk(2)[rank] for part in batch)
                apply_to_batch(event, state, logger)
                halves.append(state.batch)
                kept.append(getattr(algorithm, "_kept", None))
        finally:
            algos.framework.base._distributed = whole
        if kept[0] is not None:  # what stochastic depth or patch dropout has drawn for the rows of the batch
            algorithm._kept = torch.cat(kept, dim=0 if isinstance(algorithm, PatchDropout) else 1)
        state.batch = tuple(torch.cat(parts) for parts in zip(*halves, strict=True))

    algorithm.apply = apply


def keep_precision(algorithm: Any, *, buffers: bool) -> None:
    """Have one of Composer's algorithms, which make new layers in float32, make them in float64."""
    apply_in_float32 = algorithm.apply

    def apply(event: Event, state: State, logger: Any = None) -> None:
        apply_in_float32(event, state, logger)
        if event == Event.INIT:
            made = [*state.model.parameters(), *(state.model.buffers() if buffers else ())]
            for tensor in made:
                tensor.data = tensor.data.double() if tensor.is_floating_point() else tensor.data

    algorithm.apply = apply


class _Stop(Exception):
    pass


class _StopAt(Callback):
    """Ends the run right after a checkpoint: "batch 6" after six steps, "epoch 2" after two epochs."""

    def __init__(self, moment: str) -> None:
        self.unit, count = moment.split()
        self.count = int(count)

    def batch_checkpoint(self, state: State, logger: Any) -> None:
        if self.unit == "batch" and state.timestamp.batch.value == self.count:
            raise _Stop

    def epoch_checkpoint(self, state: State, logger: Any) -> None:
        if self.unit == "epoch" and state.timestamp.epoch.value == self.count:
            raise _Stop


class _ResNetAndViT(nn.Module):
    """The sum of both networks' logits, so that every algorithm finds what it changes."""

    def __init__(self, resnet: nn.Module, vit: nn.Module) -> None:
        super().__init__()
        self.vit, self.resnet = vit, resnet  # FixRes looks for the last classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.vit(images) + self.resnet(images)


def network(num_classes: int, *, vit: bool, batch_norm: bool = False, seed: int = 0) -> nn.Module:
    """In float64, with norms that know no batch, so that splitting a batch changes nothing by itself.

    vit: with a Vision Transformer beside the small ResNet. batch_norm: with its own norms instead.
    """
    torch.manual_seed(seed)
    resnet = SmallResNet(num_classes=num_classes, width=16, blocks_per_stage=1, activation=nn.SiLU)
    for module in list(resnet.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d) and not batch_norm:
                setattr(module, name, nn.GroupNorm(4, child.num_features))
    if not vit:
        return resnet.double()
    transformer = VisionTransformer(
        num_classes=num_classes, image_size=16, patch_size=4, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=16,
        dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    nn.init.normal_(transformer.heads.get_parameter("head.weight"), std=0.1)  # zeros would pass no gradient on
    return _ResNetAndViT(resnet, transformer).double()


def make_trainer(
    algorithms: list[Algorithm],
    *,
    callbacks: Iterable[Callback] = (),
    fsdp: bool = False,
    vit: bool = False,
    dtype: torch.dtype = torch.float64,
    kind: Callable[..., Trainer] = Trainer,
    **settings: Any,
) -> Trainer:
    """A Trainer of twelve steps in three epochs (more where a stage has smaller batches) on made-up images.

    vit: of the network, which has one in any case if an algorithm needs it. dtype: of network and images.
    """
    rank, ranks = dist.get_global_rank(), dist.get_world_size()
    loader = build_loader(
        source="synthetic", source_settings={"num_samples": GLOBAL_BATCH_SIZE * STEPS_AN_EPOCH, "num_classes": 4},
        split="train", loader="torch", per_device_batch_size=GLOBAL_BATCH_SIZE // ranks, image_size=IMAGE_SIZE,
        num_workers=0, rank=rank, world_size=ranks, log=lambda text: None,
    )  # fmt: skip
    normalize = Normalizer(loader.mean, loader.std, dtype=dtype)
    vit = vit or any(isinstance(algorithm, PatchDropout) for algorithm in algorithms)
    ghosts = any(type(algorithm).__name__ == "GhostBatchNorm" for algorithm in algorithms)
    classifier = ImageClassifier(network(4, vit=vit, batch_norm=ghosts).to(dtype), num_classes=4)
    for algorithm in algorithms:
        if not isinstance(algorithm, SpeedUp):
            keep_precision(algorithm, buffers=not fsdp)
    if fsdp:
        for buffer in classifier.buffers():  # Composer's FSDP2 computes in float32
            buffer.data = buffer.data.float() if buffer.is_floating_point() else buffer.data
        from composer.utils.parallelism import FSDP2Config

        settings["parallelism_config"] = {"fsdp": FSDP2Config()}
        callbacks = [LikeDDP(), *callbacks]  # the mean over ranks, whatever this torch's gloo does
    return kind(
        model=classifier,
        train_dataloader=DataSpec(loader, batch_transforms=normalize, get_num_samples_in_batch=lambda b: len(b[1])),
        max_duration=f"{EPOCHS}ep",
        algorithms=algorithms,
        optimizers=torch.optim.SGD(classifier.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3),
        callbacks=[_LoaderPosition(loader), *callbacks],
        progress_bar=False,
        spin_dataloaders=False,
        device="cpu",
        seed=0,
        auto_log_hparams=False,
        **settings,
    )


def weights(trainer: Trainer) -> dict[str, Tensor]:
    """Every parameter under its plain name, whole on every rank."""
    for module in trainer.state.model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    whole = {}
    for name, parameter in trainer.state.model.named_parameters():
        tensor: Any = parameter.detach()
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        plain = name.replace("_orig_mod.", "").removeprefix("module.")
        whole[plain.removeprefix("module.")] = tensor.clone().contiguous()
    return whole


def train(chosen: list[str], *, as_two_ranks: bool = False, **settings: Any) -> dict[str, Tensor]:
    """Weights after a whole run of these algorithms."""
    algorithms = arranged(chosen, settings.get("dtype", torch.float64))
    if as_two_ranks:
        drawing = tuple(find(name) for name in DRAW_PER_RANK)
        for algorithm in filter(lambda one: isinstance(one, drawing), algorithms):
            act_as_two_ranks(algorithm)
    trainer = make_trainer(algorithms, **settings)
    try:
        trainer.fit()
        return weights(trainer)
    finally:
        trainer.close()


def train_interrupted(chosen: list[str], folder: Path, *, moment: str, **settings: Any) -> dict[str, Tensor]:
    """The same, stopped at `moment` (see `_StopAt`) and begun again from the checkpoint."""
    checkpoints = [Checkpoints(folder, every_steps=1, keep_best=False), _StopAt(moment)]
    trainer = make_trainer(arranged(chosen), callbacks=checkpoints, **settings)
    try:
        trainer.fit()
        raise AssertionError("was not stopped")
    except _Stop:
        trainer.close()
    torch.manual_seed(99)
    trainer = make_trainer(arranged(chosen), load_path=str(folder / "latest.pt"), **settings)
    try:
        restore_random_state(trainer)
        trainer.fit()
        return weights(trainer)
    finally:
        trainer.close()


def furthest(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Largest absolute difference of two runs' weights."""
    assert one.keys() == other.keys(), one.keys() ^ other.keys()
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


def train_applied_twice(chosen: list[str]) -> dict[str, Tensor]:
    """Weights after a run whose Trainer is given each of these algorithms twice."""
    trainer = make_trainer([*arranged(chosen), *(make(name) for name in chosen)])
    try:
        trainer.fit()
        return weights(trainer)
    finally:
        trainer.close()


def main(strategy: str, folder: Path, wanted: list[str]) -> None:
    """Train every set on this rank; write its weights, or why it was refused."""
    from composer.utils import get_device

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.initialize_dist(get_device("cpu"), timeout=120.0)
    rank, refused = dist.get_global_rank(), {}
    known = {"sets": SETS, "pairs": PAIRS, "neighbors": NEIGHBORS, "composer": composer_sets()}
    for name, chosen in {name: chosen for what in wanted for name, chosen in known[what].items()}.items():
        try:
            torch.save(train(chosen, fsdp=strategy == "fsdp"), folder / f"{name}.{rank}.pt")
        except Exception as error:  # whatever it is, it is what the cell says
            refused[name] = type(error).__name__
    (folder / f"refused.{rank}.json").write_text(json.dumps(refused))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
