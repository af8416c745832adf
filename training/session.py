"""One run from recipe to results folder: fresh or resumed, on any number of ranks."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from composer.utils import dist

from data.whole_files import replace_file
from training.arrangement import network_as_trained
from training.build import build_loaders, build_test_loader
from training.checkpoints.choosing import choose_checkpoint
from training.engines.composer import evaluate_composer, train_composer
from training.engines.memory import describe_out_of_memory, forget, is_out_of_memory, largest_batch
from training.engines.ranks.peers import PeerWatch
from training.engines.ranks.start import start_distributed
from training.guards.run_lock import FolderTaken, RunLock
from training.planning import Plan, choose_place, plan_run, without_algorithms
from training.recipe import Recipe, RecipeError, flat_keys, users_mistake
from training.results.comparison import format_comparison, write_comparison
from training.results.figures import plot_curves
from training.results.history import History, write_metrics
from training.results.report import write_report
from training.results.summary import summarize, write_json
from training.results.text import format_summary
from training.trained import Preprocessing, write_about

log = logging.getLogger(__name__)

# Keys that may differ between a run and its continuation: they do not change what is computed.
_FREE_ON_RESUME = (
    "load", "autoresume", "run_name_taken", "trust_checkpoint", "on_nan", "logging", "results_dir", "checkpoints",
    "device", "compile", "data.cache_dir", "parallelism.strategy", "parallelism.fsdp",
    "parallelism.lost_rank_timeout_seconds",
)  # fmt: skip
# A teacher may have moved; that it is the same one, its hash in the checkpoint says.
_FREE_ON_RESUME_ENDINGS = (".num_workers", ".batches_ahead", ".loader", ".path", ".teacher")


@dataclass(frozen=True)
class Result:
    """The result of a run."""

    history: History
    summary: dict[str, Any]


def at_free_name(recipe: Recipe, *, say: Callable[[str], None] = print) -> Recipe:
    """The recipe under its own name, or where it asks for that the first of NAME, NAME-2 ... that no living run has."""
    if recipe.run_name_taken == "refuse":
        return recipe
    start_distributed(recipe, choose_place(recipe))
    name = _free_name(recipe, say) if dist.get_global_rank() == 0 else ""
    return recipe.named(dist.all_gather_object(name)[0])


def _free_name(recipe: Recipe, say: Callable[[str], None]) -> str:
    name = recipe.run_name
    for number in itertools.count(2):
        try:
            with RunLock(recipe.results_dir / name, say=say):
                return name
        except FolderTaken as error:
            say(f"{str(error).partition('. ')[0]}; trying the next name")
            name = f"{recipe.run_name}-{number}"
        except OSError:  # which taking the folder explains
            return name
    raise AssertionError("unreachable")


def train(recipe: Recipe, *, say: Callable[[str], None] = print) -> Result:
    """Train `recipe` and write results/<run>/. Returns on every rank; rank 0 writes the files.

    Raises RecipeError before the first step if the recipe, its data or its results folder make the run impossible.
    """
    place = choose_place(recipe)
    _check_trackers(recipe)
    start_distributed(recipe, place)
    with PeerWatch(timeout_seconds=recipe.parallelism.lost_rank_timeout_seconds):
        plan, say = plan_run(recipe, place), say if dist.get_global_rank() == 0 else _silent
        with _folder_to_itself(recipe, say):
            return _carry_out(plan, say)


@contextlib.contextmanager
def _folder_to_itself(recipe: Recipe, say: Callable[[str], None]) -> Iterator[None]:
    """Rank 0 holds the run's folder. Raises RecipeError on every rank if another run has it."""
    lock, mistake = RunLock(recipe.run_dir, say=say), None
    if dist.get_global_rank() == 0:
        try:
            lock.acquire()
        except FolderTaken as error:
            mistake = ("run_name", str(error))
        except OSError as error:
            mistake = ("results_dir", _not_writable(recipe.run_dir, error))
    mistake = dist.all_gather_object(mistake)[0]
    if mistake is not None:
        raise RecipeError(*mistake)
    try:
        yield
    finally:
        lock.release()


def _check_trackers(recipe: Recipe) -> None:
    settings = recipe.logging.trackers.get("wandb")
    if settings is not None:
        from training.results.tracking import check_wandb_login

        with users_mistake("logging.trackers.wandb"):
            check_wandb_login(settings)


def _carry_out(plan: Plan, say: Callable[[str], None]) -> Result:
    load_path = _prepare_run_dir(plan.recipe, say)
    rank = dist.get_global_rank()
    loaders, test_loader = build_loaders(plan, rank=rank, say=say), build_test_loader(plan, rank=rank, say=say)
    if rank == 0:
        _write_about(plan, loaders[0])
    engine, judge = train_composer, evaluate_composer
    if plan.recipe.parallelism.strategy == "deepspeed":
        from training.engines.deepspeed.run import evaluate_deepspeed as judge
        from training.engines.deepspeed.run import train_deepspeed as engine
    try:
        history, seconds = engine(plan, loaders, load_path=load_path, say=say)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(_out_of_memory_text(plan, error)) from error
    result = _result(plan, history, seconds=seconds, resumed=load_path is not None)
    if test_loader is not None:
        checkpoint = _best_checkpoint(plan.recipe)
        measured = judge(plan, (loaders[0], test_loader), checkpoint=str(checkpoint))
        result.summary["test"] = {"checkpoint": checkpoint.name, **measured}
    if dist.get_global_rank() == 0:
        _write_results(plan.recipe, result)
    return result


def _write_about(plan: Plan, train_loader: Any) -> None:
    evaluation = plan.recipe.data.eval
    preprocessing = Preprocessing(
        evaluation.image_size, evaluation.crop_ratio, tuple(train_loader.mean), tuple(train_loader.std)
    )
    write_about(plan.recipe.run_dir, class_names=plan.facts.class_names, preprocessing=preprocessing)


def _best_checkpoint(recipe: Recipe) -> Path:
    """best.pt, or latest.pt if no evaluation of this run beat that of the checkpoint it started from."""
    folder = recipe.run_dir / "checkpoints"
    best = folder / "best.pt"
    return best if best.exists() else folder / "latest.pt"


def _out_of_memory_text(plan: Plan, error: BaseException) -> str:
    forget(error)
    fits = None
    if plan.place.device != "mps":  # which does not report its memory
        with contextlib.suppress(RuntimeError, MemoryError):  # the few images to measure may not fit either
            fits = largest_batch(plan, network_as_trained(plan.recipe, num_classes=plan.facts.num_classes))
    return describe_out_of_memory(plan, fits=fits)


def compare(recipe: Recipe, *, say: Callable[[str], None] = print) -> str:
    """Train `recipe`, then the same with every speed-up off. Writes and returns the comparison."""
    from dataclasses import replace

    start_distributed(recipe, choose_place(recipe))
    say = say if dist.get_global_rank() == 0 else _silent
    off = without_algorithms(replace(recipe, load=None), f"{recipe.run_name}_speedups_off")
    results = {}
    for label, one in (("speed-ups on", recipe), ("all off", off)):
        say(f"== {label} ==")
        results[label] = train(one, say=say)
        say(format_summary(results[label].summary) + "\n")
    summaries = {label: result.summary for label, result in results.items()}
    if dist.get_global_rank() == 0:
        write_comparison({label: r.history for label, r in results.items()}, summaries, recipe.run_dir)
        write_report([recipe.run_dir, off.run_dir])
    return format_comparison(summaries)


def _result(plan: Plan, history: History, *, seconds: float, resumed: bool) -> Result:
    recipe = plan.recipe
    summary = summarize(
        history,
        run_name=recipe.run_name,
        seconds=seconds,
        parameters=plan.parameters,
        seed=recipe.seed,
        algorithms=recipe.algorithms,
        world_size=plan.place.world_size,
        resumed=resumed,
        forward_macs=plan.forward_macs,
    )
    return Result(history=history, summary=summary)


def _write_results(recipe: Recipe, result: Result) -> None:
    write_metrics(result.history, recipe.run_dir)
    plot_curves(result.history, recipe.run_dir / "curves.png", title=recipe.run_name)
    write_json(result.summary, recipe.run_dir / "summary.json")


def _prepare_run_dir(recipe: Recipe, say: Callable[[str], None]) -> str | None:
    """The checkpoint to continue from, if any; rank 0 makes the folder and writes the recipe into it."""
    run_dir = recipe.run_dir
    load_path = choose_checkpoint(recipe, say)
    if load_path is not None and Path(load_path).parent.parent == run_dir:
        _refuse_another_recipe(recipe, load_path)
    dist.barrier()  # every rank has checked before rank 0 moves anything
    if dist.get_global_rank() == 0:
        try:
            if load_path is None and run_dir.exists() and any(run_dir.iterdir()):
                kept = next(p for n in range(1, 10**6) if not (p := run_dir.with_name(f"{run_dir.name}.{n}")).exists())
                run_dir.rename(kept)
                say(f"{run_dir} was there already; it is kept as {kept}")
            text = yaml.safe_dump(recipe.settings, sort_keys=False)
            replace_file(run_dir / "recipe.yaml", lambda file: file.write(text.encode()))
        except OSError as error:
            raise RecipeError("results_dir", _not_writable(run_dir, error)) from None
    dist.barrier()
    return load_path


def _not_writable(run_dir: Path, error: OSError) -> str:
    return f"{run_dir} cannot be written ({error.strerror}); choose another with results_dir=DIR"


def _refuse_another_recipe(recipe: Recipe, load_path: str) -> None:
    try:
        before = yaml.safe_load((recipe.run_dir / "recipe.yaml").read_text())
    except FileNotFoundError:
        return
    old, new = flat_keys(before), flat_keys(recipe.settings)
    changed = [
        f"{key} was {old.get(key)!r} and is {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and not key.startswith(_FREE_ON_RESUME)
        and not key.endswith(_FREE_ON_RESUME_ENDINGS)
    ]
    if changed:
        raise RecipeError(
            "load",
            f"the run in {recipe.run_dir} was started with another recipe: {'; '.join(changed)}. "
            f"Continue it as it was, or start a new run from it: run_name=NEW load={load_path}",
        )


def _silent(text: str) -> None:
    """Used as `say` on ranks other than the first."""
