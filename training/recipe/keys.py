"""The keys of a recipe: names, types, ranges and defaults. Models, algorithms etc. define theirs in signatures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from omegaconf import MISSING

from training.recipe.schema import Range

LoaderName = Literal["auto", "ffcv", "torch"]
Count = Annotated[int, Range(minimum=1)]
CropRatio = Annotated[float, Range(above=0, maximum=1)]
RunNameTaken = Literal["refuse", "next"]
Compression = Literal["bf16", "fp16"]
OnNan = Literal["stop", "skip", "continue"]
Workers = Annotated[int, Range(minimum=0, note=", which loads in the training process")]


@dataclass
class TrainData:
    """What the model is trained on. Give one of global_batch_size and per_device_batch_size."""

    image_size: Count = MISSING  # px, unless an algorithm sets another
    global_batch_size: Count | None = None
    per_device_batch_size: Count | None = None
    # Images per forward pass. null: the whole batch; auto: halved until it fits the GPU's memory.
    per_device_microbatch_size: int | str | None = None
    loader: LoaderName = "auto"
    path: str | None = None  # an existing .beton file; null: converted from the source at first use
    # [256, 500]: the conversion writes the images at these longest sides (px), and each stage reads the smallest file
    # that serves it. A file of your own has the sizes that it was written with. null: one file.
    sizes: list[int] | None = None
    # Of the shorter side of such a file over the image size, at least. null: 1.5, or 1 / crop_ratio.
    tier_headroom: Annotated[float, Range(minimum=1)] | None = None
    num_workers: Workers = 2
    batches_ahead: int | str = "auto"  # decoded batches that may wait for the step; auto: 2, or more if times vary
    drop_last: bool = True
    crop_scale: tuple[float, float] = (0.08, 1.0)  # share of the image's area
    crop_aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    # Side of a square crop over the image's short side, instead of the two settings above. 0.875 is 224 of 256.
    crop_ratio: CropRatio | None = None
    # random: each image is mirrored with flip_probability; alternating: in every second epoch.
    flip: Literal["random", "alternating", "none"] = "random"
    flip_probability: Annotated[float, Range(minimum=0, maximum=1)] = 0.5
    # Further augmentations after crop and flip, in this order: [{name: color_jitter, brightness: 0.4}]
    augmentations: list[Any] = field(default_factory=list)
    sampler: Literal["shuffled", "balanced"] = "shuffled"  # balanced: an epoch has each class equally often


@dataclass
class EvalData:
    """What the model is evaluated on: held-out images, each counted once."""

    image_size: Count = MISSING  # px
    per_device_batch_size: Count = MISSING
    crop_ratio: CropRatio = 0.875  # side of the center crop over the image's short side; 0.875 is 224 of 256
    every_epochs: Count = 1
    loader: LoaderName = "auto"
    path: str | None = None
    num_workers: Workers = 2


@dataclass
class TestData:
    """The source's test split, on which best.pt is evaluated once, after training, with the settings of `EvalData`."""

    path: str | None = None


@dataclass
class Expected:
    """What the source is known to hold, so that a run can be planned without the data."""

    num_classes: Count = MISSING
    num_train: Count = MISSING
    num_eval: Count = MISSING


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
    """How long a run trains: passes over the training images, at any image and batch size."""

    epochs: Annotated[int, Range(minimum=1, maximum=1_000_000)] = MISSING


@dataclass
class DDP:
    """How `strategy: ddp` averages gradients; see training/engines/ddp.py."""

    gradient_compression: Compression | None = None  # the type in which gradients travel; null: float32


@dataclass
class FSDP:
    """How `strategy: fsdp` shards; see training/engines/parallel.py."""

    version: Literal[1, 2] = 2
    replicas: Count = 1  # HSDP: copies of the model, each sharded over ranks / replicas. 1: all ranks shard one copy
    reshard_after_forward: bool = True  # false: keep the gathered weights until backward; more memory, less traffic
    # Dtypes in which weights are gathered and gradients reduced. full: float32 for both. default: the run's precision,
    # and float32. pure: the run's precision for both.
    mixed_precision: Literal["full", "default", "pure"] = "full"


@dataclass
class Parallelism:
    """The engine. The rest of a recipe means the same under each engine.

    strategy: none is one process; ddp is as many as the launcher starts; fsdp shards weights, gradients and optimizer
        state over them; deepspeed does so with ZeRO. sync_batchnorm: statistics over all ranks' images.
    """

    strategy: Literal["none", "ddp", "fsdp", "deepspeed"] = "ddp"
    sync_batchnorm: bool = False
    ddp: DDP = field(default_factory=DDP)
    fsdp: FSDP = field(default_factory=FSDP)
    deepspeed: Any = None  # DeepSpeed's own JSON settings, except what other sections set
    lost_rank_timeout_seconds: Annotated[float, Range(minimum=1)] = (
        40.0  # how long a rank may be silent before the others end the run
    )


@dataclass
class Checkpoints:
    """latest.pt at every interval with those before it, best.pt by held-out top-1, ep<N>.pt every keep_every_epochs.

    sharded: each rank writes its part, and the names are links to folders; needs a file system that all ranks share.
    """

    every_epochs: Count = 1
    every_steps: Count | None = None
    every_minutes: Annotated[float, Range(above=0)] | None = None
    keep_every_epochs: Count | None = None
    keep_best: bool = True
    # latest.pt, previous.pt, previous-2.pt ...: a run resumes from the newest whole one.
    keep: Annotated[int, Range(minimum=1, maximum=100)] = 2
    sharded: bool = False
    asynchronous: bool = True  # written by a thread, from a copy in the CPU's memory
    # SIGTERM and SIGUSR1 end a run after a checkpoint at the step's end, or after so many seconds without one.
    stop_seconds: Annotated[float, Range(above=0)] = 30.0
    # s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, sftp://USER@HOST/FOLDER or a folder: copies, to RUN_NAME/ there.
    remote: str | None = None


@dataclass
class Logging:
    """What a run shows while it trains: on standard error, in trackers, in a profile. See docs/tracking.md."""

    progress_bar: bool | None = None  # null: a bar on a terminal, otherwise one line per epoch
    level: Literal["debug", "info", "warning", "error"] = "warning"
    trackers: Any = None  # {tensorboard: {}, wandb: {project: ...}, mlflow: {...}}; for settings see watching.py
    tracker_interval_steps: Count = 10  # trackers get means over so many steps
    profile: Any = None  # {steps: [100, 110]}: torch's profiler over these steps


@dataclass
class RecipeKeys:
    """The top level of a recipe; sections that name something (model, algorithms ...) are checked separately."""

    run_name: str = MISSING
    run_name_taken: RunNameTaken = "refuse"  # by a run that is still going; next: NAME-2, NAME-3 ...
    model: Any = MISSING
    data: Data = field(default_factory=Data)
    algorithms: Any = None
    # A name, or {name: ..., class_weights: auto | none | [a weight for each class]}; see sections.py
    loss: Any = "cross_entropy"
    optimizer: Any = MISSING
    schedule: Any = None
    duration: Duration = field(default_factory=Duration)
    precision: Literal["fp32", "amp_bf16", "amp_fp16"] = "fp32"
    # torch.compile the model: a switch, or {mode: ..., ahead: ...}; see training/recipe/compiling.py
    compile: Any = False
    device: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    parallelism: Parallelism = field(default_factory=Parallelism)
    logging: Logging = field(default_factory=Logging)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    # A loss or gradients that are nan or infinite: end the run, leave the step out, or go on.
    on_nan: OnNan = "stop"
    seed: Annotated[int, Range(minimum=0, maximum=2**32 - 1)] = 0
    results_dir: str = "results"
    load: str | None = None  # latest, or a checkpoint's path
    autoresume: bool = False
    trust_checkpoint: bool = False
    smoke: bool = False  # the same run at small scale, on synthetic images; see training/recipe/smoke.py
