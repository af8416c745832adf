"""What is measured, in order of importance: groups of training steps that are compared with each other."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from benchmarks.algorithm_variants import OURS, VARIANTS, Variant

GOAL_NETWORK, GOAL_PX, GOAL_PRECISION = "resnet50", 224, "bf16"
# Each with its own group; the others share one, against a step without any.
_IN_GROUPS_OF_THEIR_OWN = ("(nothing)", "blurpool", "channels_last")
# Those of ours that make sense for a ViT, which has one convolution.
_FOR_VIT = (
    "label_smoothing",
    "mixup",
    "cutmix",
    "ema",
    "stochastic_depth",
    "progressive_resizing",
    "sam",
    "patch_dropout",
    "selective_backprop",
    "distillation",
)
# The others share one model.
CHANGE_THE_MODEL = ("blurpool", "blurpool_after", "channels_last", "stochastic_depth", "patch_dropout")


@dataclass(frozen=True)
class Case:
    """One training step. network: as in a recipe's `model`. algorithm and who: of `VARIANTS`, empty for none."""

    network: str
    image_size: int
    batch_size: int
    precision: str
    channels_last: bool = True
    compiled: bool = False
    algorithm: str = ""
    who: str = OURS

    @property
    def label(self) -> str:
        """What distinguishes it from others of its network and image size."""
        words = [f"b{self.batch_size}", self.precision, "nhwc" if self.channels_last else "nchw"]
        words += ["compiled" if self.compiled else "eager"]
        words += [self.algorithm] if self.algorithm else []
        words += [self.library] if self.algorithm or self.library != OURS else []
        return " ".join(words)

    @property
    def name(self) -> str:
        """All of it, as --list prints it and --only matches it."""
        return f"{self.network} {self.image_size}px {self.label}"

    @property
    def library(self) -> str:
        """Whose code it needs; OURS for this project's own."""
        return "timm" if self.network.startswith("timm.") else self.who

    @property
    def variant(self) -> Variant | None:
        """The entry of `VARIANTS`; None for a step without an algorithm."""
        return next((one for one in VARIANTS if (one.algorithm, one.who) == (self.algorithm, self.who)), None)

    @property
    def plain(self) -> bool:
        """Whether it is a step of ours without an algorithm."""
        return not self.algorithm and self.library == OURS


@dataclass(frozen=True)
class Group:
    """Cases that are measured in turn, `rounds` times. The first is what the others are divided by.

    topic: what they differ in.
    """

    topic: str
    cases: tuple[Case, ...]
    rounds: int

    @property
    def title(self) -> str:
        """Network and image size, which its cases share up to the library, and the topic."""
        return f"{self.cases[0].network} {self.cases[0].image_size} px: {self.topic}"


@dataclass(frozen=True)
class Scale:
    """How large the steps are. Networks are names of models/, sizes in px; the first of each is compared most.

    timm: its names for both networks. compile_seconds: that torch's compiler is likely to take for a network.
    """

    cnn: str
    vit: str
    sizes: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    precisions: tuple[str, ...]
    rounds: int
    timm: tuple[str, str] | None
    compile_seconds: float


_PHOTOS = ("resnet50", "vit_b16", (224, 176, 128, 160, 288))
_TIMM = ("timm.resnet50", "timm.vit_base_patch16_224")
SCALES = {
    "cuda": Scale(*_PHOTOS, (256, 512, 128, 64), ("bf16", "fp16"), 7, _TIMM, 30.0),
    "cpu": Scale(*_PHOTOS, (8, 16, 4), ("fp32", "bf16"), 5, _TIMM, 90.0),
    # Small enough to end within a minute on two cores.
    "quick cuda": Scale("resnet_digits", "vit_digits", (32, 16), (64, 128), ("bf16", "fp16"), 3, None, 25.0),
    "quick cpu": Scale("resnet_digits", "vit_digits", (32, 16), (16, 32), ("fp32", "bf16"), 3, None, 5.0),
}


def plan(scale: Scale) -> list[Group]:
    """Every group, the most important first."""
    return [
        group
        for groups in (_headline(scale), _formats(scale), _algorithms(scale), _shapes(scale), _rest(scale))
        for group in groups
    ]


def chosen(groups: Sequence[Group], pattern: str | None) -> list[Group]:
    """The groups with cases that match, in which the first case stays, for the others are compared with it.

    pattern: a shell pattern or a part of `Case.name`, in any case; None for everything.
    """
    if pattern is None:
        return list(groups)
    found = []
    for group in groups:
        matching = [case for case in group.cases if matches(case, pattern)]
        if matching:
            cases = group.cases[:1] + tuple(case for case in matching if case != group.cases[0])
            found.append(replace(group, cases=cases))
    return found


def matches(case: Case, pattern: str) -> bool:
    """Whether `pattern`, in any case, is a part of the name, or matches a part of it as a shell pattern."""
    return fnmatch.fnmatchcase(case.name.lower(), f"*{pattern.lower()}*")


def _base(scale: Scale, network: str | None = None, **changes: object) -> Case:
    case = Case(network or scale.cnn, scale.sizes[0], scale.batch_sizes[0], scale.precisions[0])
    return replace(case, **changes)  # pyright: ignore[reportArgumentType]


def _pair(case: Case) -> tuple[Case, Case]:
    return case, replace(case, compiled=True)


def _with_algorithm(case: Case, algorithm: str, *, only: Sequence[str] = ()) -> tuple[Case, ...]:
    """The step without it, and with each library's version of it; `only` some libraries'."""
    fitting = [one for one in VARIANTS if one.algorithm == algorithm and _fits(one, case.network)]
    libraries = dict.fromkeys(one.who for one in fitting)
    chosen = [who for who in libraries if not only or who in only]
    return (case, *(replace(case, algorithm=algorithm, who=who) for who in chosen))


def _fits(variant: Variant, network: str) -> bool:
    if variant.vit_only:
        return network.startswith("vit")
    return network == GOAL_NETWORK or not (variant.bottleneck_only or variant.who == "antialiased_cnns")


def _headline(scale: Scale) -> Iterator[Group]:
    """What the goals ask for."""
    eager, compiled = _pair(_base(scale))
    rounds = 2 * scale.rounds + 1
    yield Group("compiler", (eager, compiled), rounds)
    yield Group("blurpool", _with_algorithm(eager, "blurpool"), rounds)
    yield Group("blurpool, compiled", _with_algorithm(compiled, "blurpool"), rounds)


def _formats(scale: Scale) -> Iterator[Group]:
    """Precisions and memory formats; and the other network."""
    eager, compiled = _pair(_base(scale))
    other = scale.precisions[1]
    rows, compiled_rows = replace(eager, channels_last=False), replace(compiled, channels_last=False)
    yield Group("precision", (eager, replace(eager, precision=other)), scale.rounds)
    yield Group("memory format", (rows, eager, *_with_algorithm(rows, "channels_last")[1:]), scale.rounds)
    yield Group("compiler", _pair(_base(scale, scale.vit)), scale.rounds)
    yield Group("precision, compiled", (compiled, replace(compiled, precision=other)), scale.rounds)
    yield Group("memory format, compiled", (compiled_rows, compiled), scale.rounds)


def _algorithms(scale: Scale) -> Iterator[Group]:
    """Every other algorithm, without the compiler."""
    for algorithm in _other_algorithms():
        yield Group(algorithm, _with_algorithm(_base(scale), algorithm), scale.rounds)


def _shapes(scale: Scale) -> Iterator[Group]:
    """Other image sizes and batch sizes."""
    for size in scale.sizes[1:]:
        yield Group("image size", _pair(_base(scale, image_size=size)), scale.rounds)
    for batch_size in scale.batch_sizes[1:]:
        yield Group("batch size", _pair(_base(scale, batch_size=batch_size)), scale.rounds)
    for size in scale.sizes[1:]:
        yield Group("image size", _pair(_base(scale, scale.vit, image_size=size)), scale.rounds)


def _rest(scale: Scale) -> Iterator[Group]:
    vit = _base(scale, scale.vit)
    yield Group("precision", (vit, replace(vit, precision=scale.precisions[1])), scale.rounds)
    for batch_size in scale.batch_sizes[1:]:
        yield Group("batch size", _pair(replace(vit, batch_size=batch_size)), scale.rounds)
    for compiled in (False, True):
        for ours, theirs in zip((scale.cnn, scale.vit), scale.timm or (), strict=False):
            case = _base(scale, ours, compiled=compiled)
            topic = "timm's network, compiled" if compiled else "timm's network"
            yield Group(topic, (case, replace(case, network=theirs)), scale.rounds)
    for algorithm in _FOR_VIT:
        yield Group(algorithm, _with_algorithm(vit, algorithm, only=(OURS,)), scale.rounds)
    for algorithm in _other_algorithms():
        case = _base(scale, compiled=True)
        yield Group(f"{algorithm}, compiled", _with_algorithm(case, algorithm), scale.rounds)


def _other_algorithms() -> list[str]:
    for_cnn = dict.fromkeys(one.algorithm for one in VARIANTS if not one.vit_only)
    return [name for name in for_cnn if name not in _IN_GROUPS_OF_THEIR_OWN]
