"""A recipe: one YAML file that describes a whole run, checked before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from training.recipe.checks import check
from training.recipe.compiling import Compile
from training.recipe.keys import (
    DDP,
    FSDP,
    Checkpoints,
    Data,
    EvalData,
    Expected,
    Logging,
    OnNan,
    Parallelism,
    RunNameTaken,
    TestData,
    TrainData,
)
from training.recipe.layers import blamed_file, lay_over
from training.recipe.overrides import apply_overrides, read_yaml, with_names
from training.recipe.schema import RecipeError


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `settings` is all of it as plain data, defaults filled in; a run writes it to recipe.yaml.

    algorithms: name -> keyword arguments, only those that are on.
    class_weights: of the loss: auto, one for each class, or None where all weigh the same.
    """

    settings: dict[str, Any]
    run_name: str
    run_name_taken: RunNameTaken
    model: dict[str, Any]
    data: Data
    algorithms: dict[str, dict[str, Any]]
    loss: str
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    epochs: int
    precision: str
    compile: Compile | None
    device: str
    parallelism: Parallelism
    logging: Logging
    checkpoints: Checkpoints
    seed: int
    results_dir: Path
    load: str | None
    autoresume: bool
    trust_checkpoint: bool
    on_nan: OnNan
    class_weights: Literal["auto"] | list[float] | None = None

    @property
    def run_dir(self) -> Path:
        """Where this run's results go."""
        return self.results_dir / self.run_name

    def named(self, run_name: str) -> Recipe:
        """The same recipe under another name."""
        return replace(self, run_name=run_name, settings={**self.settings, "run_name": run_name})


def load_recipe(path: str | Path | Sequence[str | Path], overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe. Raises RecipeError with one line that starts with the file's name.

    path: the recipe; or several files, each of which lies over those before it (`lay_over`).
    """
    paths = [path] if isinstance(path, (str, Path)) else list(path)
    files = [(one, _read(one)) for one in paths]
    merged: dict[str, Any] = {}
    for number, (one, raw) in enumerate(files):
        try:
            merged = lay_over(merged, raw) if number else raw
        except RecipeError as error:
            raise RecipeError("", f"{one}: {error}") from None
    try:
        return recipe_from(apply_overrides(merged, overrides))
    except RecipeError as error:
        raise RecipeError("", f"{blamed_file(error.path, files)}: {error}") from None


def _read(path: str | Path) -> dict[str, Any]:
    try:
        return with_names(read_yaml(path))
    except RecipeError as error:
        raise RecipeError("", f"{path}: {error}") from None


def recipe_from(raw: dict[str, Any]) -> Recipe:
    """Check plain data and make a Recipe of it, shrunk if smoke is set. Raises RecipeError."""
    top = check(raw)
    if top["smoke"]:
        from training.recipe.smoke import shrink

        top = check(shrink(_plain(top)))
    return _recipe(top)


def _recipe(top: dict[str, Any]) -> Recipe:
    data, loss = top["data"], top["loss"]
    sections = {"train": TrainData(**data["train"]), "eval": EvalData(**data["eval"])}
    for name, section in (("expected", Expected), ("test", TestData)):
        if data[name] is not None:
            sections[name] = section(**data[name])
    return Recipe(
        settings=_plain(top),
        run_name=top["run_name"],
        run_name_taken=top["run_name_taken"],
        model=top["model"],
        data=Data(**{**data, **sections}),
        algorithms={name: settings for name, settings in top["algorithms"].items() if settings is not None},
        loss=loss if isinstance(loss, str) else loss["name"],
        optimizer=top["optimizer"],
        schedule=top["schedule"],
        epochs=top["duration"]["epochs"],
        precision=top["precision"],
        compile=Compile(**top["compile"]) if top["compile"] else None,
        device=top["device"],
        parallelism=_parallelism(top["parallelism"]),
        logging=Logging(**top["logging"]),
        checkpoints=Checkpoints(**top["checkpoints"]),
        seed=top["seed"],
        results_dir=Path(top["results_dir"]),
        load=top["load"],
        autoresume=top["autoresume"],
        trust_checkpoint=top["trust_checkpoint"],
        on_nan=top["on_nan"],
        class_weights=None if isinstance(loss, str) else loss["class_weights"],
    )


def _parallelism(section: dict[str, Any]) -> Parallelism:
    return Parallelism(**{**section, "ddp": DDP(**section["ddp"]), "fsdp": FSDP(**section["fsdp"])})


def _plain(value: Any) -> Any:
    """`value` as mappings, lists and scalars only, which YAML and JSON can hold."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
