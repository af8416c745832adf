"""What every rank of test_deepspeed.py runs: `deepspeed_ranks.py FOLDER JOB ...`, with RANK, WORLD_SIZE ... set."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.utils import dist
from fsdp_ranks import recipe_of

from training import session
from training.engines import deepspeed
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
}
TOGETHER = tuple(one for name, overrides in ALGORITHMS.items() if name != "cutmix" for one in overrides)


MICROBATCHED = (0, 2, 3)
# Rounding depends on the size of the batch that a kernel sees. AdamW divides by a gradient's own size, so it widens
# that where gradients are small (1e-4 after 22 steps); SGD does not.
WITHOUT_WIDENING = ("model.dropout=0.0", "optimizer.name=sgd", "optimizer.learning_rate=0.05")
RESUMED = ("zero0", "zero1", "zero3_offload")
KILLED = {"killed_in_mid_epoch": "zero2", "killed_at_epoch_end": "zero3"}
TWO_EPOCHS = ("duration.epochs=2", "checkpoints.every_steps=10", "checkpoints.keep_every_epochs=1")
STEPS_AN_EPOCH = 22
STOP_AT_STEP = 30  # in the second epoch
KILLED_AT_STEP = 40


def compare_engines(folder: Path) -> None:
    """The same 22 steps of a ViT under every engine, and with the batch in parts."""
    for name, engine in ENGINES.items():
        train(recipe_of(folder, name, *VIT, *engine))
    for stage in MICROBATCHED:
        for name, size in (("at_once", "null"), ("in_parts", "12")):  # 12, 12 and 8 of a rank's 32 images
            microbatch = f"data.train.per_device_microbatch_size={size}"
            train(recipe_of(folder, f"zero{stage}_{name}", *VIT, *WITHOUT_WIDENING, *zero(stage), microbatch))


def compare_algorithms(folder: Path) -> None:
    """The same ResNet under each algorithm, DDP and ZeRO-2; then all of them at once with ZeRO-3."""
    for name, overrides in {**ALGORITHMS, "none": (), "together": TOGETHER}.items():
        for engine, settings in (("ddp", DDP), ("zero", zero(3 if name == "together" else 2))):
            train(recipe_of(folder, f"{name}_{engine}", *RESNET, *overrides, *settings))


def resume(folder: Path) -> None:
    """A run that never stops, under every stage; some that stop in mid-epoch, and go on."""
    for name in (*RESUMED, *KILLED.values()):
        train(_two_epochs(folder, f"{name}_whole", name))
    for name in RESUMED:
        with contextlib.suppress(_Stop):
            _train_until("batch_checkpoint", STOP_AT_STEP, _two_epochs(folder, f"{name}_resumed", name), end=_stop)
        torch.manual_seed(99)  # nothing may depend on what the process drew before
        train(_two_epochs(folder, f"{name}_resumed", name, "load=latest"))


def die_while_saving(folder: Path) -> None:
    """Every rank is killed when DeepSpeed is about to write its part of a checkpoint, in mid-epoch."""
    save = deepspeed.save_zero

    def die(engine: Any, state: State, folder: Path, **settings: Any) -> None:
        if state.timestamp.batch.value == KILLED_AT_STEP:
            engine.save_checkpoint = lambda *given, **named: _kill()
        save(engine, state, folder, **settings)

    deepspeed.save_zero = die
    train(_two_epochs(folder, "killed_in_mid_epoch", KILLED["killed_in_mid_epoch"]))


def die_at_an_epochs_end(folder: Path) -> None:
    """Every rank is killed right after the first epoch's checkpoint."""
    recipe = _two_epochs(folder, "killed_at_epoch_end", KILLED["killed_at_epoch_end"])
    _train_until("epoch_checkpoint", STEPS_AN_EPOCH, recipe, end=_kill)


def resume_the_killed(folder: Path) -> None:
    for name, engine in KILLED.items():
        train(_two_epochs(folder, name, engine, "autoresume=true"))


def train(recipe: Recipe) -> None:
    session.train(recipe, say=_quiet)


class _Stop(Exception):
    pass


class _EndAt(Callback):
    def __init__(self, event: str, step: int, end: Callable[[], None]) -> None:
        setattr(self, event, lambda state, logger: end() if state.timestamp.batch.value == step else None)


def _train_until(event: str, step: int, recipe: Recipe, *, end: Callable[[], None]) -> None:
    """Call `end` after the callbacks that hear `event` at `step`, the one that saves among them."""
    build = deepspeed.build_callbacks
    deepspeed.build_callbacks = lambda *given, **named: [*build(*given, **named), _EndAt(event, step, end)]
    try:
        train(recipe)
        raise AssertionError("was not stopped")
    finally:
        deepspeed.build_callbacks = build


def _stop() -> None:
    raise _Stop


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _two_epochs(folder: Path, run_name: str, engine: str, *overrides: str) -> Recipe:
    return recipe_of(folder, run_name, *VIT, *ENGINES[engine], *TWO_EPOCHS, *overrides)


def _quiet(text: str) -> None:
    pass


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    session.plot_curves = lambda *given, **named: None  # other tests look at the plots
    os.environ["DS_ACCELERATOR"] = "cpu"
    dist.initialize_dist("cpu", timeout=120.0)
    for job in sys.argv[2:]:
        globals()[job](Path(sys.argv[1]))
