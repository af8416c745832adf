"""A recipe: one YAML file that says everything about a run, checked before anything is built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from training.recipe.composers_own import refusal
from training.recipe.schema import RecipeError, parse, refuse_unknown, schema_of

LoaderName = Literal["auto", "ffcv", "torch"]


@dataclass
class TrainData:
    """What the model is trained on. Give one of global_batch_size and per_device_batch_size."""

    image_size: int = MISSING  # px, where no algorithm sets another
    global_batch_size: int | None = None
    per_device_batch_size: int | None = None
    # Images of one forward pass. null: the whole batch; auto: halved until it fits the GPU's memory.
    per_device_microbatch_size: int | str | None = None
    loader: LoaderName = "auto"
    path: str | None = None  # a .beton of one's own; null: converted from the source at first use
    num_workers: int = 2
    drop_last: bool = True
    crop_scale: tuple[float, float] = (0.08, 1.0)  # share of the image's area
    crop_aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    # Side of a crop over the image's short side: squares of one size, in place of the two above. 0.875 is 224 of 256.
    crop_ratio: float | None = None
    flip_probability: float = 0.5
    # What else the loader does to an image after crop and flip, in this order: [{name: color_jitter, brightness: 0.4}]
    augmentations: list[Any] = field(default_factory=list)


@dataclass
class EvalData:
    """What the model is judged on: held-out images, each counted once."""

    image_size: int = MISSING  # px
    per_device_batch_size: int = MISSING
    crop_ratio: float = 0.875  # side of the center crop over the image's short side; 0.875 is 224 of 256
    every_epochs: int = 1
    loader: LoaderName = "auto"
    path: str | None = None
    num_workers: int = 2


@dataclass
class TestData:
    """The source's test split, on which best.pt is judged once, after training, as `EvalData` says."""

    path: str | None = None


@dataclass
class Expected:
    """What the source is known to hold, so that a run can be planned where the data are not."""

    num_classes: int = MISSING
    num_train: int = MISSING
    num_eval: int = MISSING


@dataclass
class Data:
    """Where the images come from; `source` is a name in data/ and its settings."""

    source: Any = MISSING
    expected: Expected | None = None
    train: TrainData = field(default_factory=TrainData)
    eval: EvalData = field(default_factory=EvalData)
    test: TestData | None = None
    cache_dir: str = ".cache/brisk"


@dataclass
class Duration:
    """How long a run trains: passes over the training images, whatever their sizes and batches."""

    epochs: int = MISSING


@dataclass
class FSDP:
    """How `strategy: fsdp` shards; see training/engines/parallel.py."""

    version: Literal[1, 2] = 2
    replicas: int = 1  # HSDP: whole copies of the model; ranks / replicas shard each. 1: all ranks shard one copy
    reshard_after_forward: bool = True  # false: keep the gathered weights until backward; more memory, less traffic
    # What weights are gathered, and gradients reduced, in. full: float32. default: the run's precision, and float32.
    # pure: the run's precision, both.
    mixed_precision: Literal["full", "default", "pure"] = "full"


@dataclass
class Parallelism:
    """The engine, and nothing else: the rest of a recipe means the same under each.

    strategy: none is one process; ddp as many as the launcher starts; fsdp shards weights, gradients and optimizer
        state over them; deepspeed does so with ZeRO. sync_batchnorm: statistics over all ranks' images.
    """

    strategy: Literal["none", "ddp", "fsdp", "deepspeed"] = "ddp"
    sync_batchnorm: bool = False
    fsdp: FSDP = field(default_factory=FSDP)
    deepspeed: Any = None  # DeepSpeed's own JSON settings, less what the recipe says elsewhere
    lost_rank_timeout_seconds: float = 40.0  # how long a rank may be silent before the others end the run


@dataclass
class Checkpoints:
    """latest.pt at every interval, best.pt by held-out top-1, ep<N>.pt every keep_every_epochs.

    sharded: each rank writes its part, and the names stand for folders; needs a file system that all ranks share.
    """

    every_epochs: int = 1
    every_steps: int | None = None
    keep_every_epochs: int | None = None
    keep_best: bool = True
    sharded: bool = False


@dataclass
class Logging:
    """What a run says on standard error while it trains."""

    progress_bar: bool | None = None  # null: a bar on a terminal, a line an epoch elsewhere
    level: Literal["debug", "info", "warning", "error"] = "warning"


@dataclass
class _RecipeKeys:
    """The top level of a recipe; sections with names of their own (model, algorithms ...) are checked one by one."""

    run_name: str = MISSING
    model: Any = MISSING
    data: Data = field(default_factory=Data)
    algorithms: Any = None
    loss: Literal["cross_entropy", "binary_cross_entropy"] = "cross_entropy"
    optimizer: Any = MISSING
    schedule: Any = None
    duration: Duration = field(default_factory=Duration)
    precision: Literal["fp32", "amp_bf16", "amp_fp16"] = "fp32"
    compile: bool = False  # the model, by torch.compile: once for each image size and batch size, a minute or so each
    device: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    parallelism: Parallelism = field(default_factory=Parallelism)
    logging: Logging = field(default_factory=Logging)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    seed: int = 0
    results_dir: str = "results"
    load: str | None = None  # latest, or a checkpoint's path
    autoresume: bool = False
    smoke: bool = False  # the same run in small, on made-up images; see training/recipe/smoke.py


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `settings` is the whole of it as plain data, defaults filled in: what a run writes down.

    algorithms: name -> keyword arguments, only those that are on.
    """

    settings: dict[str, Any]
    run_name: str
    model: dict[str, Any]
    data: Data
    algorithms: dict[str, dict[str, Any]]
    loss: str
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    epochs: int
    precision: str
    compile: bool
    device: str
    parallelism: Parallelism
    logging: Logging
    checkpoints: Checkpoints
    seed: int
    results_dir: Path
    load: str | None
    autoresume: bool

    @property
    def run_dir(self) -> Path:
        """Where this run's results go."""
        return self.results_dir / self.run_name


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe. Raises RecipeError with one line that starts with the file's name."""
    try:
        return recipe_from(_apply_overrides(_read_yaml(path), overrides))
    except RecipeError as error:
        raise RecipeError("", f"{path}: {error}") from None


def recipe_from(raw: dict[str, Any]) -> Recipe:
    """Check plain data and make a Recipe of it, shrunk where it says smoke. Raises RecipeError."""
    top = _check(raw)
    if top["smoke"]:
        from training.recipe.smoke import shrink

        top = _check(shrink(_plain(top)))
    return _recipe(top)


def _check(raw: dict[str, Any]) -> dict[str, Any]:
    """Every section checked and filled with its defaults. What costs an import comes last, when the rest is right."""
    from algos import LearningRate
    from data.loading.augment import build_augmentations
    from data.sources import SOURCES

    top = parse(_RecipeKeys, raw, path="")
    top["data"]["source"] = _parse_named(top["data"]["source"], SOURCES, path="data.source", without=("split",))
    top["algorithms"] = _parse_algorithms(top["algorithms"])
    top["schedule"] = parse(schema_of(LearningRate), top["schedule"], path="schedule")
    _try(LearningRate.for_planning, top["schedule"], path="schedule")
    _try(build_augmentations, {"entries": top["data"]["train"]["augmentations"]}, path="data.train.augmentations")
    _check_ranges(top)
    top["optimizer"] = _parse_optimizer(top["optimizer"])
    top["model"] = _parse_model(top["model"])
    _try_composers(top["algorithms"])
    return top


def _recipe(top: dict[str, Any]) -> Recipe:
    data = top["data"]
    sections = {"train": TrainData(**data["train"]), "eval": EvalData(**data["eval"])}
    for name, section in (("expected", Expected), ("test", TestData)):
        if data[name] is not None:
            sections[name] = section(**data[name])
    return Recipe(
        settings=_plain(top),
        run_name=top["run_name"],
        model=top["model"],
        data=Data(**{**data, **sections}),
        algorithms={name: settings for name, settings in top["algorithms"].items() if settings is not None},
        loss=top["loss"],
        optimizer=top["optimizer"],
        schedule=top["schedule"],
        epochs=top["duration"]["epochs"],
        precision=top["precision"],
        compile=top["compile"],
        device=top["device"],
        parallelism=Parallelism(**{**top["parallelism"], "fsdp": FSDP(**top["parallelism"]["fsdp"])}),
        logging=Logging(**top["logging"]),
        checkpoints=Checkpoints(**top["checkpoints"]),
        seed=top["seed"],
        results_dir=Path(top["results_dir"]),
        load=top["load"],
        autoresume=top["autoresume"],
    )


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        raw = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError:
        near = sorted(str(other) for other in Path("yamls").glob("*.yaml"))
        raise RecipeError("", f"no such file; recipes here: {', '.join(near) or 'none'}") from None
    except OSError as error:
        raise RecipeError("", f"cannot be read: {error.strerror or error}") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise RecipeError("", _one_line(error)) from None
    if not isinstance(raw, dict):
        raise RecipeError("", "is not a mapping of keys to values")
    return raw  # pyright: ignore


def _apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    seen: set[str] = set()
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise RecipeError(override, "an override has the form key=value, for example algorithms.sam=null")
        if key in seen:
            raise RecipeError(key, "given twice on the command line")
        seen.add(key)
    try:
        merged = OmegaConf.create(_with_names(raw))
        for override in overrides:  # in turn: algorithms=null algorithms.mixup.alpha=0.1 leaves MixUp alone on
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([override]))
            merged = OmegaConf.create(_with_names(OmegaConf.to_container(merged)))
        return OmegaConf.to_container(merged, resolve=True)  # pyright: ignore
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise RecipeError("", _one_line(error)) from None


def _with_names(raw: Any) -> Any:
    """`model: resnet18` written out as `model: {name: resnet18}`, so that an override adds a setting to either."""
    if not isinstance(raw, dict):
        return raw
    named = {key: {"name": raw[key]} for key in ("model", "optimizer") if isinstance(raw.get(key), str)}
    data = raw.get("data")
    if isinstance(data, dict) and isinstance(data.get("source"), str):
        named["data"] = {**data, "source": {"name": data["source"]}}
    return {**raw, **named}


def _parse_model(given: Any) -> dict[str, Any]:
    from models import registry

    name, settings = _split_name(given, path="model")
    try:
        factory = registry.find(name)
    except ValueError as error:
        raise RecipeError("model.name", str(error)) from None
    return {"name": name, **parse(schema_of(factory, without=("num_classes",)), settings, path="model")}


def _parse_named(given: Any, known: dict[str, Any], *, path: str, without: Sequence[str]) -> dict[str, Any]:
    name, settings = _split_name(given, path=path)
    refuse_unknown(name, sorted(known), path=f"{path}.name", what=path.rpartition(".")[2])
    return {"name": name, **parse(schema_of(known[name], without=without), settings, path=path)}


def _parse_optimizer(given: Any) -> dict[str, Any]:
    from training.optimizers import check_settings, settings_of

    name, settings = _split_name(given, path="optimizer")
    try:
        schema = settings_of(name)
    except ValueError as error:
        raise RecipeError("optimizer.name", str(error)) from None
    parsed = {"name": name, **parse(schema, settings, path="optimizer")}
    _try(check_settings, {"settings": parsed}, path="optimizer")
    return parsed


def _parse_algorithms(given: Any) -> dict[str, dict[str, Any] | None]:
    from algos.framework import registry
    from algos.framework.composer_algorithms import PREFIX, refuse_doubles

    if given is None:
        return {}
    if not isinstance(given, dict):
        raise RecipeError("algorithms", f"is {given!r}; it must be a mapping of names to settings")
    parsed: dict[str, dict[str, Any] | None] = {}
    for name, settings in _name_composers(given).items():
        where = f"algorithms.{name}"
        composers = name.startswith(PREFIX)
        known = registry.composer_names() if composers else [*registry.names(), "composer"]
        refuse_unknown(name, known, path=where, what="algorithm")
        if settings is None:
            parsed[name] = None
        elif composers:  # see _try_composers
            parsed[name] = arguments = _mapping(settings, where)
            reason = refusal(name, arguments)
            if reason is not None:
                raise RecipeError(where, reason)
        else:
            parsed[name] = arguments = parse(schema_of(registry.find(name)), settings, path=where)
            _try(registry.planner(name), arguments, path=where)
    try:
        refuse_doubles(name for name, settings in parsed.items() if settings is not None)
    except ValueError as error:
        raise RecipeError("algorithms", str(error)) from None
    return parsed


def _try_composers(algorithms: dict[str, dict[str, Any] | None]) -> None:
    """Check the settings of Composer's own algorithms, which takes an import of Composer where there are any."""
    from algos.framework import registry
    from algos.framework.composer_algorithms import PREFIX

    for name, settings in algorithms.items():
        if settings is not None and name.startswith(PREFIX):
            _try(registry.maker(name), settings, path=f"algorithms.{name}")


def _name_composers(given: dict[str, Any]) -> dict[str, Any]:
    """Composer's own stand in a section of theirs, algorithms.composer.ema; from here on each has that as its name."""
    named = {name: settings for name, settings in given.items() if name != "composer"}
    for name, settings in _mapping(given.get("composer"), "algorithms.composer").items():
        if f"composer.{name}" in named:
            raise RecipeError(f"algorithms.composer.{name}", "given twice, in the section composer and outside of it")
        named[f"composer.{name}"] = settings
    return named


def _mapping(given: Any, path: str) -> dict[str, Any]:
    if given is not None and not isinstance(given, dict):
        raise RecipeError(path, f"is {given!r}; it must be a mapping")
    return dict(given or {})


def _try(factory: Callable[..., Any], arguments: dict[str, Any], *, path: str) -> None:
    """Make it once, so that values out of range are found with the rest of the recipe."""
    try:
        factory(**arguments)
    except ValueError as error:
        raise RecipeError(path, str(error)) from None


def _split_name(given: Any, *, path: str) -> tuple[str, dict[str, Any]]:
    if isinstance(given, str):
        return given, {}
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        raise RecipeError(f"{path}.name", f"is missing (given {given!r}); name one and put its settings beside it")
    return given["name"], {key: value for key, value in given.items() if key != "name"}


def _check_ranges(top: dict[str, Any]) -> None:
    train, evaluation = top["data"]["train"], top["data"]["eval"]
    sizes = [train["global_batch_size"], train["per_device_batch_size"]]
    if sum(size is not None for size in sizes) != 1:
        raise RecipeError(
            "data.train",
            f"global_batch_size is {sizes[0]} and per_device_batch_size is {sizes[1]}; give exactly one of them",
        )
    positive = {
        "duration.epochs": top["duration"]["epochs"],
        "data.train.image_size": train["image_size"],
        "data.train.global_batch_size": train["global_batch_size"],
        "data.train.per_device_batch_size": train["per_device_batch_size"],
        "data.train.per_device_microbatch_size": _unless_auto(train["per_device_microbatch_size"]),
        "data.eval.image_size": evaluation["image_size"],
        "data.eval.per_device_batch_size": evaluation["per_device_batch_size"],
        "data.eval.every_epochs": evaluation["every_epochs"],
        **{f"data.expected.{key}": value for key, value in (top["data"]["expected"] or {}).items()},
        "parallelism.fsdp.replicas": top["parallelism"]["fsdp"]["replicas"],
        "parallelism.lost_rank_timeout_seconds": top["parallelism"]["lost_rank_timeout_seconds"],
        **{
            f"checkpoints.{key}": top["checkpoints"][key]
            for key in ("every_epochs", "every_steps", "keep_every_epochs")
        },
    }
    for path, value in positive.items():
        if value is not None and value < 1:
            raise RecipeError(path, f"is {value}; it must be at least 1")
    for path, num_workers in (("data.train", train["num_workers"]), ("data.eval", evaluation["num_workers"])):
        if num_workers < 0:
            raise RecipeError(
                f"{path}.num_workers", f"is {num_workers}; it must be at least 0, which loads in the training process"
            )
    if top["compile"] and top["parallelism"]["strategy"] == "deepspeed":
        raise RecipeError(
            "compile",
            "is true, and parallelism.strategy is deepspeed, which runs the model as it is; "
            "set compile=false, or parallelism.strategy to ddp or fsdp",
        )
    if not top["run_name"] or Path(top["run_name"]).name != top["run_name"]:
        raise RecipeError(
            "run_name", f"is {top['run_name']!r}; it names a folder, so it cannot be empty or hold a slash"
        )
    for path, ratio in (
        ("data.train.crop_ratio", train["crop_ratio"]),
        ("data.eval.crop_ratio", evaluation["crop_ratio"]),
    ):
        if ratio is not None and not 0 < ratio <= 1:
            raise RecipeError(path, f"is {ratio}; it must lie in (0, 1]")
    if train["crop_ratio"] is not None and _other_crop(train):
        raise RecipeError(
            "data.train.crop_ratio", f"is {train['crop_ratio']} beside {_other_crop(train)}; leave one of them out"
        )
    if top["data"]["test"] is not None and not top["checkpoints"]["keep_best"]:
        raise RecipeError(
            "data.test", "is judged by best.pt, which checkpoints.keep_best: false does not keep; drop one"
        )
    if not 0 <= train["flip_probability"] <= 1:
        raise RecipeError("data.train.flip_probability", f"is {train['flip_probability']}; it must lie in [0, 1]")


def _other_crop(train: dict[str, Any]) -> str:
    """What else than its default says how to crop."""
    default = TrainData()
    names = ("crop_scale", "crop_aspect_ratio")
    return " and ".join(name for name in names if tuple(train[name]) != getattr(default, name))


def _unless_auto(microbatch_size: int | str | None) -> int | None:
    if not isinstance(microbatch_size, str):
        return microbatch_size
    if microbatch_size != "auto":
        raise RecipeError(
            "data.train.per_device_microbatch_size",
            f"is {microbatch_size!r}; it must be a whole number, auto, or null for the whole batch",
        )
    return None


def _plain(value: Any) -> Any:
    """Only mappings, lists and scalars, as YAML and JSON know them."""
    from dataclasses import asdict, is_dataclass

    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
