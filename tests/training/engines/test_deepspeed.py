"""DeepSpeed on gloo ranks: DDP's losses under every stage and algorithm, resumption after kills, export, refusals."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed_ranks import (
    ALGORITHMS,
    KILLED_AT_STEP,
    MICROBATCHED,
    OTHER_ENGINES,
    OTHER_THREES,
    RESNET,
    RESUMED,
    STEPS_AN_EPOCH,
    THREE,
    VIT,
    zero,
)
from fsdp_ranks import DIGITS, recipe_of
from ranks import run_ranks
from safetensors.torch import load_file

from algos.framework import registry
from training import cli
from training.build import build_loaders
from training.checkpoints.export import export_checkpoint
from training.checkpoints.export import main as export
from training.checkpoints.weights import read_network_weights
from training.checkpoints.zero import is_zero, load_zero, read_zero_weights
from training.engines.composer import build_trainer
from training.engines.deepspeed.settings import deepspeed_config
from training.engines.parallel import check_parallelism
from training.planning import Place, plan_run
from training.recipe import Recipe, RecipeError

pytest.importorskip("deepspeed")
SCRIPT = str(Path(__file__).with_name("deepspeed_ranks.py"))
KILL = -9
# Everything agrees to a few units in the last place of a loss of about 2; what is asked for is 1e-3.
TOLERANCE = 1e-5


pytestmark = pytest.mark.xdist_group("deepspeed")  # one worker of pytest-xdist has the runs that these share


@pytest.fixture(scope="module")
def some_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of two ranks that the default suite looks at, from one start of them."""
    folder = tmp_path_factory.mktemp("two_ranks")
    run_ranks(2, SCRIPT, str(folder), "compare_some", timeout=560)
    return folder


@pytest.fixture(scope="module")
def run_job(some_runs: Path) -> Callable[[str], str]:
    """Has two ranks do a job of the script, once."""
    return cache(lambda job: run_ranks(2, SCRIPT, str(some_runs), job, timeout=580))


@pytest.fixture
def runs(request: pytest.FixtureRequest, some_runs: Path, run_job: Callable[[str], str]) -> Path:
    """The folder, with the runs of the job that the test's mark names."""
    marker = request.node.get_closest_marker("exhaustive")
    for job in marker.args if marker else ():
        run_job(job)
    return some_runs


def exhaustive(job: str, *values: Any) -> Any:
    """A case that only the exhaustive suite has, with the job whose runs it looks at."""
    return pytest.param(*values, marks=pytest.mark.exhaustive(job))


def record(run_dir: Path) -> Any:
    return np.load(run_dir / "metrics.npz")


def assert_same_losses(run: Path, reference: Path, *, steps: int, tolerance: float = TOLERANCE) -> None:
    found, expected = record(run), record(reference)
    assert len(expected["step_loss"]) == steps
    assert expected["step_loss"][0] > expected["step_loss"][-1] > 0
    for column in ("step_loss", "eval_loss", "train_loss"):
        np.testing.assert_allclose(found[column], expected[column], atol=tolerance, rtol=0)
    np.testing.assert_array_equal(found["step_learning_rate"], expected["step_learning_rate"])
    np.testing.assert_allclose(found["eval_top1"], expected["eval_top1"], atol=1 / 300, rtol=0)  # an image


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ["zero3", *(exhaustive("compare_engines", name) for name in OTHER_ENGINES)])
def test_losses_are_those_of_ddp(runs: Path, engine: str) -> None:
    assert_same_losses(runs / engine, runs / "ddp", steps=STEPS_AN_EPOCH)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "algorithm", ["together", *(exhaustive("compare_algorithms", name) for name in [*ALGORITHMS, "none"])]
)
def test_algorithms_do_what_they_do_under_ddp(runs: Path, algorithm: str) -> None:
    found, expected, without = (runs / name for name in (f"{algorithm}_zero", f"{algorithm}_ddp", "none_ddp"))
    steps = len(record(expected)["step_loss"])
    assert steps >= STEPS_AN_EPOCH
    assert_same_losses(found, expected, steps=steps)
    if algorithm not in ("none", "channels_last"):  # which alone changes no figure
        column = "eval_loss" if algorithm == "ema" else "step_loss"
        same = np.allclose(record(expected)[column][:9], record(without)[column][:9])
        assert not same, "the algorithm was not on"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sam_ema_and_fixres_do_what_they_do_under_ddp(runs: Path) -> None:
    assert_same_losses(runs / "three_zero2_whole", runs / "three_ddp", steps=2 * STEPS_AN_EPOCH)
    assert_the_phase_trains_the_last_layers_only(runs / "three_zero2_whole")


@pytest.mark.slow
@pytest.mark.exhaustive("compare_threes")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", OTHER_THREES)
def test_sam_ema_and_fixres_do_so_under_other_engines(runs: Path, name: str) -> None:
    assert_same_losses(runs / f"three_{name}_zero", runs / f"three_{name}_ddp", steps=2 * STEPS_AN_EPOCH)
    assert_the_phase_trains_the_last_layers_only(runs / f"three_{name}_zero")


def assert_the_phase_trains_the_last_layers_only(run: Path) -> None:
    before, after = (read_zero_weights(run / "checkpoints" / f"ep{epoch}.pt") for epoch in (1, 2))
    trained = {name for name, value in before.items() if not torch.equal(value, after[name])}
    parts = {name.rpartition(".")[0] for name in trained}
    assert len(parts) == 2, sorted(trained)  # a norm and the classifier
    assert {name for part in parts for name in before if name.startswith(f"{part}.")} == trained


@pytest.mark.slow
@pytest.mark.exhaustive(
    "compare_parts"
)  # parts of a batch are in test_sam_ema_and_fixres_do_what_they_do_under_ddp too
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", MICROBATCHED)
def test_accumulated_gradients_are_the_whole_batchs(runs: Path, stage: int) -> None:
    in_parts, at_once = (runs / f"zero{stage}_{how}" for how in ("in_parts", "at_once"))
    assert_same_losses(in_parts, at_once, steps=STEPS_AN_EPOCH)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ["three_zero2", *(exhaustive("resume", name) for name in RESUMED)])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(runs: Path, engine: str) -> None:
    run, whole = runs / f"{engine}_resumed", runs / f"{engine}_whole"
    assert_same_losses(run, whole, steps=2 * STEPS_AN_EPOCH, tolerance=0)
    expected, found = (read_zero_weights(one / "checkpoints" / "latest.pt") for one in (whole, run))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    if engine == "three_zero2":
        (ours, averaged), (theirs, _) = (
            read_network_weights(one / "checkpoints" / "latest.pt") for one in (whole, run)
        )
        assert averaged
        assert all(torch.equal(theirs[name], ours[name]) for name in ours)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_killed_while_it_saves_goes_on_as_if_it_had_not_been(runs: Path) -> None:
    run_ranks(2, SCRIPT, str(runs), "die_while_saving", timeout=120, statuses=[KILL, KILL])
    latest = runs / "killed_in_mid_epoch" / "checkpoints" / "latest.pt"
    assert latest.resolve().name == f"shards-ep1-ba{KILLED_AT_STEP - 10}"
    assert any(latest.parent.glob(".checkpoint-*")), "was not killed in the middle of a save"
    run_ranks(2, SCRIPT, str(runs), "resume_killed_in_mid_epoch", timeout=120)
    assert_went_on(runs / "killed_in_mid_epoch", runs / "three_zero2_whole")


@pytest.mark.slow
@pytest.mark.exhaustive("resume")
@pytest.mark.timeout(600)
def test_a_run_killed_at_an_epochs_end_goes_on_as_if_it_had_not_been(runs: Path) -> None:
    run_ranks(2, SCRIPT, str(runs), "die_at_an_epochs_end", timeout=120, statuses=[KILL, KILL])
    run_ranks(2, SCRIPT, str(runs), "resume_killed_at_epoch_end", timeout=120)
    assert_went_on(runs / "killed_at_epoch_end", runs / "zero3_whole")


def assert_went_on(run: Path, whole: Path) -> None:
    # Two processes differ in the last place from the third step on, before anything was killed; AdamW widens that.
    assert_same_losses(run, whole, steps=2 * STEPS_AN_EPOCH, tolerance=1e-4)
    folder = run / "checkpoints"
    assert not list(folder.glob(".checkpoint-*"))
    named = {path.resolve() for path in folder.glob("*.pt")}
    assert {path.resolve() for path in folder.iterdir() if not path.is_symlink()} == named
    assert all(is_zero(path) for path in named)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("run", "reference", "network"),
    [
        ("zero3", "ddp", VIT),
        ("three_zero2_whole", "three_ddp", THREE),  # averages, as the run's evaluations have them
        exhaustive("compare_engines", "zero0", "ddp", VIT),
        exhaustive("compare_engines", "zero3_offload", "ddp", VIT),
        exhaustive("compare_algorithms", "none_zero", "none_ddp", RESNET),
    ],
)
def test_a_checkpoint_of_two_ranks_becomes_one_file_for_one_process(
    runs: Path, tmp_path: Path, run: str, reference: str, network: tuple[str, ...]
) -> None:
    weights = tmp_path / "weights.safetensors"
    assert export([str(runs / run), str(weights)]) == 0
    export_checkpoint(runs / reference, tmp_path / "ddp.safetensors")
    found, expected = load_file(weights), load_file(tmp_path / "ddp.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(_that_matters(name, found[name]), _that_matters(name, value), atol=1e-4, rtol=0)

    recipe = recipe_of(
        tmp_path, "evaluated", *network, "algorithms=null", "parallelism.strategy=none", f"model.weights={weights}"
    )
    plan = plan_run(recipe)
    loaders = build_loaders(plan, rank=0, say=lambda text: None)
    trainer = build_trainer(plan, loaders, callbacks=[], load_path=None)
    trainer.eval()
    metrics = trainer.state.eval_metrics["eval"]
    trainer.close()
    assert metrics["top1"].compute().item() == pytest.approx(record(runs / run)["eval_top1"][-1], abs=1e-6)
    assert metrics["loss"].compute().item() == pytest.approx(record(runs / run)["eval_loss"][-1], abs=1e-5)


def _that_matters(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Without the bias of attention's keys, which adds the same to all scores of a query, so that softmax removes it.

    Its gradient is rounding alone, which AdamW makes as large as any other.
    """
    if not name.endswith("in_proj_bias"):
        return weight
    query, _, value = weight.chunk(3)
    return torch.cat([query, value])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("parallelism.strategy=ddp",), "which deepspeed wrote"),
        (zero(3), "whose world_size is 2, and here it is 1"),
    ],
)
def test_a_checkpoint_goes_on_only_as_it_was(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: tuple[str, ...], says: str
) -> None:
    load = f"load={runs / 'zero3' / 'checkpoints' / 'latest.pt'}"
    folders = (f"results_dir={tmp_path}", f"data.cache_dir={tmp_path / 'cache'}")
    assert cli.main(["-f", str(DIGITS), *VIT, "schedule.warmup_epochs=0", *overrides, load, *folders]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert says in said
    assert "training.checkpoints.export" in said


def small(*overrides: str) -> Recipe:
    return recipe_of(Path("nowhere"), "refused", "algorithms=null", "parallelism.strategy=deepspeed", *overrides)


@pytest.mark.parametrize("name", sorted({*registry.names(), "composer.ema", "composer.cutout"} - ALGORITHMS.keys()))
def test_other_algorithms_are_refused_by_name(name: str) -> None:
    settings = {"composer.ema": "{half_life: 1ba}", "distillation": "{teacher: there}"}.get(name, "{}")
    with pytest.raises(RecipeError, match=rf"^algorithms\.{name}: does not run under deepspeed, which takes "):
        check_parallelism(small(f"algorithms.{name}={settings}"), Place("cpu", 2))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_allowed_algorithms_are_not_refused(name: str) -> None:
    check_parallelism(small(*ALGORITHMS[name]), Place("cpu", 2))


@pytest.mark.timeout(120)
def test_a_refusal_is_one_line_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [f"results_dir={tmp_path / 'results'}", f"data.cache_dir={tmp_path / 'cache'}"]
    given = ["parallelism.strategy=deepspeed", "algorithms.composer.cutout={}"]
    assert cli.main(["-f", str(DIGITS), *given, *folders]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("run.py: algorithms.")
    assert "does not run under deepspeed" in said
    assert "\n" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("3", "is 3; it must be a mapping with the keys zero_optimization"),
        ("{zero_optimisation: {stage: 2}}", "did you mean zero_optimization?"),
        ("{gradient_allreduce_op: sum}", "unknown key"),  # other gradients than under other engines
        ("{optimizer: {type: Adam}}", "is what optimizer says"),
        ("{scheduler: {type: WarmupLR}}", "is what schedule says"),
        ("{fp16: {enabled: true}}", "is what precision=amp_fp16 says"),
        ("{bf16: {enabled: true}}", "is what precision=amp_bf16 says"),
        ("{gradient_clipping: 1.0}", "is what optimizer.clip_norm says"),
        ("{gradient_accumulation_steps: 4}", "is what data.train.per_device_microbatch_size says"),
        ("{train_batch_size: 64}", "is what data.train.global_batch_size says"),
        ("{activation_checkpointing: {}}", "is what model.gradient_checkpointing says"),
        ("{prescale_gradients: perhaps}", "is 'perhaps'; it must be true or false"),
        ("{gradient_predivide_factor: 0}", "is 0; it must be above 0"),
        ("{communication_data_type: fp8}", "is 'fp8'; it must be one of fp32, fp16, bf16"),
        ("{comms_logger: 3}", "comms_logger: is 3; it must be a mapping"),
        ("{comms_logger: {enabled: perhaps}}", r"comms_logger\.enabled: is 'perhaps'"),
        ("{zero_optimization: 3}", "zero_optimization: is 3; it must be a mapping"),
        ("{zero_optimization: {stage: 4}}", r"zero_optimization\.stage: is 4"),
        ("{zero_optimization: {stage: true}}", "is True; it must be 0, 1, 2 or 3"),
        (
            "{zero_optimization: {stage: 2, contiguous_gradient: true}}",
            r"gradient: unknown key \(given True",
        ),
        ("{zero_optimization: {stage: 3, sub_group_size: many}}", r"sub_group_size: is 'many'"),
        ("{zero_optimization: {stage: 2, cpu_offload: true}}", "is an old name; give offload_optimizer"),
        ("{zero_optimization: {stage: 2, zenflow: {topk_ratio: 0.1}}}", "applies some gradients late"),
        ("{zero_optimization: {stage: 2, offload_param: {device: cpu}}}", "needs ZeRO stage 3 or more"),
        ("{zero_optimization: {stage: 0, offload_optimizer: {device: cpu}}}", "needs ZeRO stage 1 or more"),
        ("{zero_optimization: {stage: 3, offload_param: {device: nvme, nvme_path: /tmp}}}", "must be {device: cpu}"),
    ],
)
def test_settings_are_checked_before_anything_is_built(settings: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says) as error:
        check_parallelism(small(f"parallelism.deepspeed={settings}"), Place("cpu", 2))
    assert error.value.path.startswith("parallelism.deepspeed")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "device", "says"),
    [
        (("data.train.per_device_microbatch_size=auto",), "gpu", "is not done under deepspeed"),
        ((), "mps", "does not run on mps"),
        (("checkpoints.sharded=true",), "cpu", "has no shards"),
        (("optimizer=null", "optimizer.name=torch.adafactor", "optimizer.learning_rate=0.1", *zero(1)), "cpu",
         "not known to treat each element of a weight alone"),
        (("algorithms.sam={}", *zero(3)), "cpu", r"^algorithms\.sam: moves all weights between its two passes"),
        (("algorithms.ema={decay: 0.99}", *zero(3)), "cpu", r"^algorithms\.ema: averages and swaps all weights"),
        (("algorithms.sam={}", "precision=amp_fp16"), "gpu", "runs its first pass without DeepSpeed's loss scale"),
    ],
)  # fmt: skip
def test_what_deepspeed_cannot_run_is_refused(overrides: tuple[str, ...], device: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        check_parallelism(small(*overrides), Place(device, 2))


def test_a_checkpoint_whose_parameter_groups_fixres_has_split_needs_fixres(tmp_path: Path) -> None:
    here: Any = {"world_size": 1, "zero_stage": 2, "fixres_trains": "classifier"}
    (tmp_path / "deepspeed.json").write_text('{"world_size": 1, "zero_stage": 2}')  # as written before there was one
    nothing: Any = None
    with pytest.raises(RecipeError, match="whose fixres_trains is None, and here it is classifier; continue as it was"):
        load_zero(nothing, nothing, nothing, tmp_path, settings=here)


def test_a_recipe_without_deepspeed_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install 'brisk-vision\[deepspeed\]'"):
        check_parallelism(small(), Place("cpu", 2))


def test_deepspeed_clips_only_where_the_recipe_does() -> None:
    """DeepSpeed 0.19 clips to a norm of 1 when it is told nothing."""
    assert deepspeed_config(small(), per_device_batch_size=32)["gradient_clipping"] == 0
    assert deepspeed_config(small("optimizer.clip_norm=0.5"), per_device_batch_size=32)["gradient_clipping"] == 0.5
