"""Which checkpoint a run begins from, agreed on by all ranks and found whole before anything of it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from composer.utils import dist

from training.checkpoints.names import newest_first
from training.checkpoints.reading import DamagedCheckpoint, check_checkpoint, check_whole
from training.checkpoints.sharded import is_sharded
from training.checkpoints.zero import is_zero
from training.recipe import Recipe, RecipeError


def choose_checkpoint(recipe: Recipe, say: Callable[[str], None]) -> str | None:
    """The path, the same on every rank; None to begin anew. Every rank must call this.

    `load: latest` and `autoresume` take the newest whole checkpoint of the run's folder, and say which are damaged. A
    path is taken, or refused.

    Raises RecipeError: none is whole, not all ranks see it, or it names code; or the remote cannot be asked.
    """
    if recipe.checkpoints.remote is not None and (recipe.load == "latest" or (recipe.autoresume and not recipe.load)):
        from training.checkpoints.remote.fetching import bring_newest

        bring_newest(recipe, say)
    candidates = _agreed(lambda: _candidates(recipe))
    damaged: list[RecipeError] = []
    for path in candidates:
        damage = _damage(path, recipe)
        if damage is None:
            _check_engine(path, recipe)
            if damaged:
                say(f"{'; '.join(error.message for error in damaged)}. Continuing from {path}")
            return str(path)
        damaged.append(damage)
    if damaged:
        raise damaged[0]
    return None


def _candidates(recipe: Recipe) -> list[Path]:
    if recipe.load not in (None, "latest"):
        path = Path(str(recipe.load))
        if not (path.is_file() or is_sharded(path) or is_zero(path)):
            raise RecipeError(
                "load", f"is {path}, and there is no such file or folder of shards; give latest or a checkpoint's path"
            )
        return [path]
    found = newest_first(recipe.run_dir / "checkpoints") if recipe.load or recipe.autoresume else []
    if recipe.load and not found:
        raise RecipeError(
            "load", f"is latest, and {recipe.run_dir / 'checkpoints'} holds no checkpoint; leave load out"
        )
    return found


def _agreed(find: Callable[[], Sequence[Path]]) -> list[Path]:
    """What rank 0 finds. Raises its RecipeError on every rank, and one if a rank does not see all of it."""
    found, mistake = [], None
    if dist.get_global_rank() == 0:
        try:
            found = [str(path) for path in find()]
        except RecipeError as error:
            mistake = (error.path, error.message)
    found, mistake = dist.all_gather_object((found, mistake))[0]
    if mistake is not None:
        raise RecipeError(*mistake)
    unseen = dist.all_gather_object([path for path in found if not Path(path).exists()])
    for rank, paths in enumerate(unseen):
        if paths:
            raise RecipeError(
                "results_dir",
                f"rank {rank} does not see {paths[0]}; to resume, every machine needs the same folder",
            )
    return [Path(path) for path in found]


def _damage(path: Path, recipe: Recipe) -> DamagedCheckpoint | None:
    """What any rank finds wrong with `path`. Raises RecipeError if it names code, which is no accident."""
    damage = refusal = None
    if path.is_dir() or dist.get_local_rank() == 0:  # one rank a machine reads a file; a folder's are shared out
        try:
            if recipe.trust_checkpoint:
                check_whole(path, shared=True)
            else:
                check_checkpoint(path, shared=True)
        except DamagedCheckpoint as error:
            damage = error.message
        except RecipeError as error:
            refusal = error.message
    found = dist.all_gather_object((damage, refusal))
    for damage, _ in found:
        if damage is not None:
            return DamagedCheckpoint("load", damage)
    for _, refusal in found:
        if refusal is not None:
            raise RecipeError("load", refusal)
    return None


def _check_engine(path: Path, recipe: Recipe) -> None:
    if is_zero(path) and recipe.parallelism.strategy != "deepspeed":
        raise RecipeError(
            "load",
            f"is {path}, which deepspeed wrote; continue with parallelism.strategy=deepspeed, or start from its "
            "weights: python -m training.checkpoints.export, then model.weights",
        )
