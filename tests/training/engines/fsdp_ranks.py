"""What every rank of test_fsdp.py runs: `python fsdp_ranks.py FOLDER JOB ...`, with RANK, WORLD_SIZE ... set."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.core import Callback
from composer.utils import dist
from resumed_runs import train, train_until

from training import session
from training.checkpoints.sharded import LoadShards, gather_shards, write_shards
from training.engines.parallel import HybridFSDP2Config, LikeDDP
from training.recipe import Recipe, load_recipe

DIGITS = Path(__file__).parents[3] / "yamls" / "digits_medium.yaml"
# Short runs of three kinds of network. alexnetish needs 39 px; dropout draws alike on each rank under every engine.
NETWORKS = {
    "resnet": ["model=null", "model.name=resnet_digits", "model.gradient_checkpointing=true"],
    "alexnetish": ["model=null", "model.name=alexnetish", "data.train.image_size=39", "data.eval.image_size=39"],
    "vit": ["model=null", "model.name=vit_digits", "model.dropout=0.1"],
}
# What draws alike on any number of ranks.
RESUMED = ["parallelism.strategy=fsdp", "duration.epochs=2", "algorithms.progressive_resizing=null",
           "algorithms.fixres=null", "algorithms.mixup=null", "algorithms.ema={half_life_steps: 10}",
           "data.train.image_size=12", "checkpoints.every_steps=10", "checkpoints.keep_every_epochs=1"]  # fmt: skip
STOP_AT_STEP = 30
# The digits recipe at one image size, with its batch norm over ranks.
FIXED = ["algorithms.progressive_resizing=null", "algorithms.fixres=null", "data.train.image_size=12",
         "data.eval.image_size=12", "parallelism.sync_batchnorm=true"]  # fmt: skip


def recipe_of(folder: Path, run_name: str, *overrides: str) -> Recipe:
    """The digits recipe, cut short."""
    common = [f"run_name={run_name}", f"results_dir={folder}", f"data.cache_dir={folder / 'cache'}"]
    short = ["duration.epochs=1", "schedule.warmup_epochs=0", "logging.progress_bar=false"]
    given = {one.partition("=")[0]: one for one in (*short, *common, *overrides)}
    # A whole section comes before settings within it.
    return load_recipe(DIGITS, sorted(given.values(), key=lambda one: one.partition("=")[0].count(".")))


def compare_with_ddp(folder: Path) -> None:
    """The same 22 steps of two networks under both engines."""
    for name in ("resnet", "vit"):
        _compare_with_ddp(folder, name)


def compare_alexnetish_with_ddp(folder: Path) -> None:
    _compare_with_ddp(folder, "alexnetish")


def _compare_with_ddp(folder: Path, name: str) -> None:
    for strategy in ("ddp", "fsdp"):
        overrides = ["algorithms=null", f"parallelism.strategy={strategy}", *NETWORKS[name]]
        train(recipe_of(folder, f"{name}_{strategy}", *overrides))


def compare_compiled(folder: Path) -> None:
    """The digits recipe at one image size with its batch norm over ranks: plain, and compiled under both engines."""
    for run_name, strategy, compiled in (("plain", "ddp", "false"), ("compiled_ddp", "ddp", "true"),
                                         ("compiled_fsdp", "fsdp", "true")):  # fmt: skip
        overrides = [*FIXED, f"parallelism.strategy={strategy}", f"compile={compiled}"]
        train(recipe_of(folder, run_name, *overrides))


def resume(folder: Path) -> None:
    """A run under FSDP2 that never stops, and two that stop in mid-epoch and go on: from a file, and from shards."""
    train(recipe_of(folder, "whole", *RESUMED))
    for kind in ("full", "sharded"):
        settings = [*RESUMED, f"checkpoints.sharded={str(kind == 'sharded').lower()}"]
        train_until(STOP_AT_STEP, recipe_of(folder, kind, *settings), event="batch_checkpoint")
        torch.manual_seed(99)
        train(recipe_of(folder, kind, *settings, "load=latest"))


def resume_here(folder: Path) -> None:
    """The second epoch of `sharded` again, on as many ranks as there are here."""
    load = folder / "sharded" / "checkpoints" / "ep1.pt"
    run_name = f"on_{dist.get_world_size()}_ranks"
    train(recipe_of(folder, run_name, *RESUMED, "checkpoints.sharded=true", f"load={load}"))


def shard_replicas(folder: Path) -> None:
    """How HSDP shards, and its checkpoint read back, which needs no reduction between replicas."""
    from composition import arranged, furthest, make_trainer, weights

    def hybrid(*callbacks: Callback) -> Trainer:
        config = HybridFSDP2Config(replicas=2, mixed_precision="FULL", state_dict_type="full")
        return make_trainer(arranged([]), callbacks=[LikeDDP(), *callbacks], parallelism_config={"fsdp": config})

    made = hybrid()
    with torch.no_grad():
        for parameter in made.state.model.parameters():
            parameter.add_(1)  # what was made from the seed alone is not what is read back
    folder = folder / "hybrid"
    write_shards(gather_shards(made.state), folder)
    loaded = hybrid(LoadShards(folder))
    parameters: Any = list(made.state.model.parameters())
    found = {
        "mesh": list(parameters[0].device_mesh.shape),
        "placements": sorted({str(tuple(parameter.placements)) for parameter in parameters}),
        "read_back": furthest(weights(loaded), weights(made)),
        "fresh": furthest(weights(hybrid()), weights(made)),
    }
    folder.with_name(f"hybrid.{dist.get_global_rank()}.json").write_text(json.dumps(found))


def train_replicas(folder: Path) -> None:
    """The digits recipe under DDP, and as two copies of the network, each sharded over two ranks; SAM and EMA on."""
    engines = {"ddp_of_4": ["parallelism.strategy=ddp"],
               "replicas": ["parallelism.strategy=fsdp", "parallelism.fsdp.replicas=2"]}  # fmt: skip
    for run_name, engine in engines.items():
        ema = "algorithms.ema={half_life_steps: 5}"
        train(recipe_of(folder, run_name, *FIXED, ema, *engine))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    session.plot_curves = lambda *given, **named: None  # other tests look at the plots
    dist.initialize_dist("cpu", timeout=120.0)
    for job in sys.argv[2:]:
        globals()[job](Path(sys.argv[1]))
