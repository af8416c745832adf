"""One real probe of a tiny recipe; and what the measurement is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from training.cli import main
from training.planning import Place, plan_run
from training.probing.communication import all_reduce_seconds
from training.probing.measure import covered, extrapolated, one_rank
from training.probing.phases import phases_of
from training.recipe import load_recipe

DIGITS = Path(__file__).parents[3] / "yamls" / "digits_medium.yaml"
STAGES = (
    "[{epochs: 1, image_size: 8, per_device_batch_size: 96}, {epochs: 2, image_size: 12}, {epochs: 1, image_size: 16}]"
)
SHORT = (
    "duration.epochs=4",
    f"algorithms.progressive_resizing.stages={STAGES}",
    "algorithms.fixres=null",
    "data.train.image_size=16",
)


def test_batches_that_were_not_measured_are_as_slow_as_the_measured_ones_after_the_first() -> None:
    assert extrapolated([0.0, 5.0, 6.0, 7.0], 8.0, count=3) == 8
    assert extrapolated([0.0, 5.0, 6.0, 7.0], 8.0, count=10) == 8 + 7
    assert extrapolated([0.0, 5.0], 6.0, count=10) == 60


def test_overlapping_work_counts_once() -> None:
    assert covered([(5, 9), (0, 3), (1, 2), (8, 10)]) == 3 + 5


def test_phases_cover_the_run_and_differ(short_recipe: Any) -> None:
    plan = plan_run(short_recipe(), Place("cpu"))
    phases = phases_of(plan)
    assert [(phase.image_size, phase.global_batch_size, phase.epochs) for phase in phases] == [
        (8, 96, 1), (12, 64, 2), (16, 64, 1),
    ]  # fmt: skip
    assert sum(phase.macs * phase.steps * phase.epochs for phase in phases) == pytest.approx(plan.total_macs)
    assert phases[0].window_steps == 4  # SAM's interval


def test_one_rank_trains_what_each_of_several_does(short_recipe: Any) -> None:
    stages = "algorithms.progressive_resizing.stages=[{epochs: 3, image_size: 8, global_batch_size: 96},"
    recipe = short_recipe(stages + "{epochs: 1, image_size: 16}]")
    four = plan_run(recipe, Place("cpu", 4))
    alone = plan_run(one_rank(recipe, per_device_batch_size=four.per_device_batch_size, world_size=4), Place("cpu"))
    assert [epoch.global_batch_size for epoch in alone.epochs] == [24, 24, 24, 16]
    assert [epoch.global_batch_size for epoch in four.epochs] == [96, 96, 96, 64]


@pytest.mark.timeout(120)
def test_all_reduce_is_measured_between_ranks_or_unknown() -> None:
    seconds = all_reduce_seconds(num_parameters=1000, ranks=2, on_gpu=False)
    assert seconds is not None
    assert 0 < seconds < 5
    assert all_reduce_seconds(num_parameters=1000, ranks=10_000, on_gpu=False) is None


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Any:
    """One probe for the tests of this module: its report's text, its folder."""
    from training.probing.probe import probe, write_profile
    from training.probing.text import format_report

    folder = tmp_path_factory.mktemp("probed")
    recipe = load_recipe(DIGITS, [*SHORT, f"results_dir={folder / 'results'}", f"data.cache_dir={cache_dir}"])
    report = probe(recipe, seconds=1.5, say=lambda text: None)
    write_profile(report, folder / "profile.yaml")
    return report, format_report(report), folder


@pytest.mark.timeout(300)
def test_a_probe_measures_every_phase_and_leaves_no_results(probed: Any) -> None:
    report, text, folder = probed
    assert set(report.measured.phases) == {0, 1, 2}
    total = report.prediction.total
    assert 0 < total.low <= total.mean <= total.high < 300
    for times in report.measured.phases.values():
        assert min(times.windows) > 0
        assert times.cached
        assert times.loader
        assert 0 <= times.wait_share <= 1
        assert times.peak_bytes > 50e6
    assert report.measured.evaluations
    assert report.measured.checkpoints
    assert not (folder / "results").exists()
    for part in ("8 px", "12 px", "16 px", "predicted: ", "evaluation: 4 x", "what would lift the", "device-hours"):
        assert part in text


@pytest.mark.timeout(300)
def test_a_written_profile_lies_over_the_recipe(probed: Any) -> None:
    _, _, folder = probed
    text = (folder / "profile.yaml").read_text()
    assert "# Measured: 20" in text
    recipe = load_recipe([DIGITS, folder / "profile.yaml"])
    assert recipe.device == "cpu"
    assert recipe.algorithms.keys() == load_recipe(DIGITS).algorithms.keys()


@pytest.mark.parametrize("option", [["--ranks", "2"], ["--write-profile", "x.yaml"]])
def test_options_of_the_probe_alone_are_refused(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["-f", str(DIGITS), *option])
    assert stop.value.code == 2
    assert f"{option[0]} belongs to --probe" in capsys.readouterr().err


def test_an_existing_profile_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("device: cpu\n")
    with pytest.raises(SystemExit) as stop:
        main(["-f", str(DIGITS), "--probe", "--write-profile", str(path)])
    assert stop.value.code == 2
    assert "which exists; name a new file" in capsys.readouterr().err
    assert path.read_text() == "device: cpu\n"


@pytest.mark.parametrize("option", ["--probe", "--find-lr"])
def test_a_launcher_is_refused(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["-f", str(DIGITS), option, f"results_dir={tmp_path}"]) == 2
    assert f"{option} runs in one process; start it without a launcher" in capsys.readouterr().err
