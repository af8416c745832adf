"""What every rank of test_deepspeed.py runs: `deepspeed_ranks.py FOLDER JOB ...`, with RANK, WORLD_SIZE ... set."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from composer.core import State
from composer.utils import dist
from fsdp_ranks import recipe_of
from resumed_runs import train, train_until

from training import session
from training.engines.deepspeed import run as deepspeed
from training.recipe import Recipe

# A ViT under AdamW with gradients clipped, and a ResNet under SGD with Nesterov's momentum and gradients as they are.
VIT = ("model=null", "model.name=vit_digits", "model.dropout=0.1", "algorithms=null", "optimizer=null",
       "optimizer.name=adamw", "optimizer.learning_rate=2e-3", "optimizer.clip_norm=0.5")  # fmt: skip
RESNET = ("model=null", "model.name=resnet_digits", "algorithms=null")


def zero(stage: int, **settings: Any) -> tuple[str, ...]:
    """Overrides that turn DeepSpeed on."""
    pairs = ", ".join(f"{key}: {{device: {value}}}" for key, value in settings.items())
    inner = f"stage: {stage}" + (f", {pairs}" if pairs else "")
    return "parallelism.strategy=deepspeed", f"parallelism.deepspeed={{zero_optimization: {{{inner}}}}}"


DDP = ("parallelism.strategy=ddp",)
# Those that must all have one loss; the reference is "ddp".
ENGINES = {
    "ddp": DDP,
    **{f"zero{stage}": zero(stage) for stage in range(4)},
    "zero1_offload": zero(1, offload_optimizer="cpu"),
    "zero2_offload": zero(2, offload_optimizer="cpu"),
    "zero3_offload": zero(3, offload_optimizer="cpu", offload_param="cpu"),
}
OTHER_ENGINES = [name for name in ENGINES if name not in ("ddp", "zero3")]
ALGORITHMS = {
    "blurpool": ("algorithms.blurpool={}",),
    "channels_last": ("algorithms.channels_last={}",),
    "label_smoothing": ("algorithms.label_smoothing={smoothing: 0.1}",),
    "mixup": ("algorithms.mixup={alpha: 0.2}",),
    "cutmix": ("algorithms.cutmix={alpha: 1.0}",),
    "progressive_resizing": (
        "algorithms.progressive_resizing.stages=[{epochs: 1, image_size: 8, per_device_batch_size: 48}, "
        "{epochs: 1, image_size: 12, per_device_batch_size: 32}]",
        "duration.epochs=2",
    ),
    "ema": ("algorithms.ema={half_life_steps: 5}",),
    "fixres": (
        "algorithms.fixres={epochs: 1, image_size: 16, learning_rate: 0.02}",
        "data.train.image_size=12",
        "duration.epochs=2",
    ),
    "sam": ("algorithms.sam={rho: 0.1, interval: 2}",),
    "randaugment": ("algorithms.randaugment={num_ops: 1}", "optimizer.learning_rate=0.05"),
    "stochastic_depth": (
        "algorithms.stochastic_depth={drop_rate: 0.3}",
        "optimizer.learning_rate=0.05",
        "data.train.per_device_microbatch_size=12",
    ),
    "patch_dropout": (*VIT, "algorithms.patch_dropout={keep_rate: 0.5}", "data.train.per_device_microbatch_size=12"),
}
NOT_TOGETHER = ("cutmix", "ema", "fixres", "patch_dropout", "sam")  # the three others are in THREE
TOGETHER = tuple(one for name, overrides in ALGORITHMS.items() if name not in NOT_TOGETHER for one in overrides)


MICROBATCHED = (0, 2, 3)
# Rounding depends on the size of the batch that a kernel sees. AdamW divides by a gradient's own size, so it widens
# that where gradients are small (1e-4 after 22 steps); SGD does not.
WITHOUT_WIDENING = ("model.dropout=0.0", "optimizer.name=sgd", "optimizer.learning_rate=0.05")
# SAM, EMA and FixRes, whose phase is the second epoch, with a rank's 32 images in parts of 12, 12 and 8. At the rate of
# the recipe, rounding grows to 3e-5 where the phase begins to normalize with running statistics.
THREE = (*RESNET, *ALGORITHMS["sam"], *ALGORITHMS["ema"], *ALGORITHMS["fixres"], "optimizer.learning_rate=0.05",
         "data.train.per_device_microbatch_size=12")  # fmt: skip
OTHER_THREES = {
    "zero0": ENGINES["zero0"],
    "zero1": ENGINES["zero1"],
    "zero2_offload": ENGINES["zero2_offload"],
    "zero1_per_rank": (*ENGINES["zero1"], "algorithms.sam={rho: 0.5, adaptive: true, perturbation: per_rank}"),
    "zero1_adamw": (*ENGINES["zero1"], "optimizer=null", "optimizer.name=adamw", "optimizer.learning_rate=2e-3",
                    "optimizer.clip_norm=0.5"),
    "zero3_without_two": (*ENGINES["zero3"], "algorithms.sam=null", "algorithms.ema=null"),
}  # fmt: skip
RESUMED = ("zero0", "zero1", "zero3_offload")
TWO_EPOCHS = ("duration.epochs=2", "checkpoints.every_steps=10", "checkpoints.keep_every_epochs=1")
KILLED_IN_MID_EPOCH = ("killed_in_mid_epoch", *THREE, *ENGINES["zero2"])
KILLED_AT_EPOCH_END = ("killed_at_epoch_end", *VIT, *ENGINES["zero3"])
STEPS_AN_EPOCH = 22
STOP_AT_STEP = 30  # in the second epoch
KILLED_AT_STEP = 40


def compare_some(folder: Path) -> None:
    """What the default suite looks at."""
    for name in ("ddp", "zero3"):
        train(recipe_of(folder, name, *VIT, *ENGINES[name]))
    train(recipe_of(folder, "none_ddp", *RESNET, *DDP))
    _compare_algorithm(folder, "together", TOGETHER, stage=3)
    train(_two_epochs(folder, "three_ddp", *THREE, *DDP))
    _resume(folder, "three_zero2", *THREE, *ENGINES["zero2"])


def compare_engines(folder: Path) -> None:
    """The same 22 steps of a ViT under the other engines."""
    for name in OTHER_ENGINES:
        train(recipe_of(folder, name, *VIT, *ENGINES[name]))


def compare_parts(folder: Path) -> None:
    """The same with whole batches, and with batches in parts."""
    for stage in MICROBATCHED:
        for name, size in (("at_once", "null"), ("in_parts", "12")):  # 12, 12 and 8 of a rank's 32 images
            microbatch = f"data.train.per_device_microbatch_size={size}"
            train(recipe_of(folder, f"zero{stage}_{name}", *VIT, *WITHOUT_WIDENING, *zero(stage), microbatch))


def compare_algorithms(folder: Path) -> None:
    """The same ResNet under each algorithm, DDP and ZeRO-2."""
    train(recipe_of(folder, "none_zero", *RESNET, *zero(2)))
    for name, overrides in ALGORITHMS.items():
        _compare_algorithm(folder, name, overrides, stage=2)


def compare_threes(folder: Path) -> None:
    """SAM, EMA and FixRes under the other engines, and under DDP."""
    for name, overrides in OTHER_THREES.items():
        train(_two_epochs(folder, f"three_{name}_zero", *THREE, *overrides))
        train(_two_epochs(folder, f"three_{name}_ddp", *THREE, *overrides, *DDP, "parallelism.deepspeed=null"))


def resume(folder: Path) -> None:
    """Under other stages: a run that never stops, and one that stops in mid-epoch and goes on."""
    for name in RESUMED:
        _resume(folder, name, *VIT, *ENGINES[name])
    train(_two_epochs(folder, "zero3_whole", *VIT, *ENGINES["zero3"]))


def _compare_algorithm(folder: Path, name: str, overrides: tuple[str, ...], *, stage: int) -> None:
    for engine, settings in (("ddp", DDP), ("zero", zero(stage))):
        train(recipe_of(folder, f"{name}_{engine}", *RESNET, *overrides, *settings))


def _resume(folder: Path, name: str, *overrides: str) -> None:
    train(_two_epochs(folder, f"{name}_whole", *overrides))
    recipe = _two_epochs(folder, f"{name}_resumed", *overrides)
    train_until(STOP_AT_STEP, recipe, event="batch_checkpoint")
    torch.manual_seed(99)  # nothing may depend on what the process drew before
    train(_two_epochs(folder, f"{name}_resumed", *overrides, "load=latest"))


def die_while_saving(folder: Path) -> None:
    """Every rank is killed when DeepSpeed is about to write its part of a checkpoint, in mid-epoch."""
    save = deepspeed.save_zero

    def die(engine: Any, state: State, folder: Path, **settings: Any) -> None:
        if state.timestamp.batch.value == KILLED_AT_STEP:
            engine.save_checkpoint = lambda *given, **named: _kill()
        save(engine, state, folder, **settings)

    deepspeed.save_zero = die
    train(_two_epochs(folder, *KILLED_IN_MID_EPOCH))


def die_at_an_epochs_end(folder: Path) -> None:
    """Every rank is killed right after the first epoch's checkpoint."""
    train_until(STEPS_AN_EPOCH, _two_epochs(folder, *KILLED_AT_EPOCH_END), event="epoch_checkpoint", end=_kill)


def resume_killed_in_mid_epoch(folder: Path) -> None:
    train(_two_epochs(folder, *KILLED_IN_MID_EPOCH, "autoresume=true"))


def resume_killed_at_epoch_end(folder: Path) -> None:
    train(_two_epochs(folder, *KILLED_AT_EPOCH_END, "autoresume=true"))


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _two_epochs(folder: Path, run_name: str, *overrides: str) -> Recipe:
    return recipe_of(folder, run_name, *TWO_EPOCHS, *overrides)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    session.plot_curves = lambda *given, **named: None  # other tests look at the plots
    os.environ["DS_ACCELERATOR"] = "cpu"
    dist.initialize_dist("cpu", timeout=120.0)
    for job in sys.argv[2:]:
        globals()[job](Path(sys.argv[1]))
