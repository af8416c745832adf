"""Reports: files read back as they were written, figures are not empty, comparisons are correct."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from training.results.comparison import format_comparison, write_comparison
from training.results.figures import plot_curves
from training.results.history import (
    EPOCH_COLUMNS,
    STEP_COLUMNS,
    History,
    read_metrics,
    write_epochs_csv,
    write_metrics,
)
from training.results.summary import summarize, write_json
from training.results.text import format_seconds, format_summary

pytestmark = pytest.mark.timeout(120)


def make_history(
    *, epochs: int = 6, steps_per_epoch: int = 5, eval_every: int = 1, seconds: float = 2.0, top1: float = 0.9
) -> History:
    history = History()
    for epoch in range(1, epochs + 1):
        evaluated = epoch % eval_every == 0
        for index in range(steps_per_epoch):
            step = (epoch - 1) * steps_per_epoch + index + 1
            for name, value in zip(STEP_COLUMNS, (step, epoch, 2.0 / step, 0.1 * index), strict=True):
                history.steps[name].append(value)
        values = (
            epoch,
            2.0 / epoch,
            0.1 * epoch,
            2.5 / epoch if evaluated else None,
            top1 - 0.3 / epoch if evaluated else None,
            0.4,
            16 if epoch <= epochs // 2 else 32,
            64,
            1000.0 / epoch,
            seconds,
            0.25,
        )
        history.epochs.append(dict(zip(EPOCH_COLUMNS, values, strict=True)))
    return history


def make_summary(history: History, **changes) -> dict:
    settings = {"run_name": "digits", "seconds": 20.0, "parameters": 12345, "seed": 7, "algorithms": {"blurpool": {}}}
    return summarize(history, **{**settings, **changes})


class TestMetrics:
    def test_csv_reads_back(self, tmp_path):
        history = make_history(eval_every=2)
        write_metrics(history, tmp_path)
        assert read_metrics(tmp_path / "metrics.csv") == history.epochs
        first = (tmp_path / "metrics.csv").read_text().splitlines()[1]
        assert first == "1,2.0,0.1,,,0.4,16,64,1000.0,2.0,0.25"

    def test_npz_reads_back_without_pickle(self, tmp_path):
        history = make_history(eval_every=2)
        write_metrics(history, tmp_path)
        with np.load(tmp_path / "metrics.npz", allow_pickle=False) as arrays:
            assert set(arrays) == {*EPOCH_COLUMNS, "step", "step_epoch", "step_loss", "step_learning_rate"}
            for name in EPOCH_COLUMNS:
                expected = [math.nan if row[name] is None else row[name] for row in history.epochs]
                np.testing.assert_array_equal(arrays[name], expected)
            for name in STEP_COLUMNS:
                np.testing.assert_array_equal(arrays["step" if name == "step" else f"step_{name}"], history.steps[name])
            assert np.isnan(arrays["eval_top1"]).tolist() == [True, False] * 3
            assert arrays["step_epoch"].dtype == arrays["epoch"].dtype == np.int64

    def test_no_epochs(self, tmp_path):
        write_metrics(History(), tmp_path)
        assert read_metrics(tmp_path / "metrics.csv") == []
        with np.load(tmp_path / "metrics.npz", allow_pickle=False) as arrays:
            assert all(array.size == 0 for array in arrays.values())

    def test_nan_is_not_a_missing_value(self, tmp_path):
        history = make_history(epochs=1)
        history.epochs[0]["train_loss"] = math.nan
        history.epochs[0]["eval_loss"] = None
        write_metrics(history, tmp_path)
        (row,) = read_metrics(tmp_path / "metrics.csv")
        assert math.isnan(row["train_loss"])
        assert row["eval_loss"] is None

    def test_a_failed_write_leaves_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "metrics.csv"
        write_epochs_csv(make_history(epochs=1), path)
        monkeypatch.setattr(os, "replace", refuse_to_move)
        with pytest.raises(OSError, match="full"):
            write_epochs_csv(make_history(epochs=2), path)
        assert len(read_metrics(path)) == 1
        assert os.listdir(tmp_path) == ["metrics.csv"]


def refuse_to_move(source, target):
    raise OSError("the disk is full")


class TestJson:
    def test_is_strict_and_plain(self, tmp_path):
        data = {
            "nan": math.nan,
            "nested": {"infinite": [math.inf, 1.5], 3: (1, 2)},
            "numpy": np.float32(0.5),
            "torch": torch.tensor(4),
            "path": Path("runs/a"),
            "truth": True,
            "nothing": None,
        }
        write_json(data, tmp_path / "a" / "summary.json")
        with open(tmp_path / "a" / "summary.json") as file:
            read = json.load(file, parse_constant=pytest.fail)
        assert read == {
            "nan": None,
            "nested": {"infinite": [None, 1.5], "3": [1, 2]},
            "numpy": 0.5,
            "torch": 4,
            "path": "runs/a",
            "truth": True,
            "nothing": None,
        }


class TestSummary:
    def test_values(self):
        history = make_history(eval_every=2, top1=0.9)
        history.epochs[3]["eval_top1"] = 0.95
        summary = make_summary(history, resumed=True, forward_macs=1e12)
        assert summary["top1"] == pytest.approx(0.9 - 0.3 / 6)  # the last, not the best
        assert summary["best_top1"] == 0.95
        assert summary["loss"] == pytest.approx(2.5 / 6)
        assert (summary["epochs"], summary["seconds"], summary["train_seconds"]) == (6, 20.0, 12.0)
        images = sum(2.0 * 1000 / epoch for epoch in range(1, 7))
        assert summary["images_per_second"] == pytest.approx(images / 12)
        assert summary["algorithms"] == {"blurpool": {}}
        assert (summary["resumed"], summary["forward_macs"]) == (True, 1e12)
        assert summary["versions"]["torch"] == torch.__version__.partition("+")[0]
        assert summary["versions"]["composer"] == "0.32.1"
        assert set(summary["versions"]) == {
            "python", "torch", "composer", "ffcv", "numpy", "torchvision", "brisk-vision"
        }  # fmt: skip
        assert summary["hardware"]["cores"] == os.cpu_count()
        assert summary["hardware"]["memory_gb"] > 0

    def test_an_absent_package_has_no_version(self, monkeypatch):
        from importlib import metadata

        def version(name):
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(metadata, "version", version)
        assert make_summary(History())["versions"]["ffcv"] is None

    def test_without_measurements(self):
        summary = make_summary(History())
        assert (summary["top1"], summary["best_top1"], summary["loss"]) == (None, None, None)
        assert (summary["epochs"], summary["images_per_second"]) == (0, None)
        assert "n/a" in format_summary(summary)

    def test_a_diverged_evaluation_is_not_hidden(self):
        history = make_history(epochs=2)
        history.epochs[1]["eval_loss"] = math.nan
        assert math.isnan(make_summary(history)["loss"])

    def test_text_of_a_resumed_run(self):
        text = format_summary(make_summary(make_history(), seconds=5.0, resumed=True))
        assert "0:05 since it was resumed, 0:12 of training in all" in text
        assert "6 (resumed)" in text

    def test_text_is_aligned(self):
        text = format_summary(make_summary(make_history(), world_size=2))
        lines = text.splitlines()
        assert len({line.index(line.split("  ", 1)[1].lstrip()) for line in lines}) == 1
        assert "85.00 % (best 85.00 %)" in text
        assert "2 processes" in text
        assert "blurpool" in text


def compare(*, on: dict, off: dict) -> str:
    return format_comparison({"speed-ups on": on, "all off": off})


def verdict(**summaries) -> str:
    return compare(**summaries).splitlines()[-1]


class TestComparison:
    SLOW_AND_GOOD: ClassVar = {
        "top1": 0.9312,
        "loss": 0.3,
        "seconds": 70.0,
        "train_seconds": 60.0,
        "images_per_second": 1000.0,
    }
    FAST_AND_BAD: ClassVar = {
        "top1": 0.9210,
        "loss": 0.4,
        "seconds": 40.0,
        "train_seconds": 30.0,
        "images_per_second": 2000.0,
    }

    def test_a_trade_is_called_one(self):
        assert verdict(on=self.FAST_AND_BAD, off=self.SLOW_AND_GOOD) == (
            "'all off' is ahead of 'speed-ups on' in top-1 by 1.02 points (93.12 % against 92.10 %); "
            "'speed-ups on' is ahead of 'all off' in training time by 30.0 s "
            "(30.0 s against 60.0 s, 2.00 times as fast)."
        )

    def test_the_other_way_round(self):
        assert verdict(on=self.SLOW_AND_GOOD, off=self.FAST_AND_BAD) == (
            "'speed-ups on' is ahead of 'all off' in top-1 by 1.02 points (93.12 % against 92.10 %); "
            "'all off' is ahead of 'speed-ups on' in training time by 30.0 s "
            "(30.0 s against 60.0 s, 2.00 times as fast)."
        )

    def test_what_the_table_cannot_tell_apart_is_equal(self):
        other = {**self.FAST_AND_BAD, "top1": 0.92100004, "train_seconds": 30.01}
        assert verdict(on=self.FAST_AND_BAD, off=other) == (
            "Top-1 is equal (92.10 %); training time is equal (30.0 s)."
        )

    def test_what_was_not_measured_is_not_judged(self):
        nothing = {"top1": None, "seconds": None}
        assert verdict(on=self.FAST_AND_BAD, off=nothing) == (
            "Top-1 was not measured in both runs; time was not measured in both runs."
        )

    def test_total_time_where_training_time_is_unknown(self):
        on = {"top1": 0.5, "seconds": 10.0}
        assert "in total time by 10.0 s" in verdict(on=on, off={"top1": 0.5, "seconds": 20.0})

    def test_the_last_session_of_a_resumed_run_is_not_its_time(self):
        on = {"top1": 0.5, "seconds": 10.0, "resumed": True}
        assert "time was not measured in both runs" in verdict(on=on, off={"top1": 0.5, "seconds": 20.0})
        text = compare(on={**self.FAST_AND_BAD, "resumed": True}, off=self.SLOW_AND_GOOD)
        assert next(line for line in text.splitlines() if line.startswith("total time")).split()[2:] == [
            "n/a",
            "70.0",
            "s",
        ]

    def test_table(self):
        on = {**self.FAST_AND_BAD, "forward_macs": 1.234e12}
        lines = compare(on=on, off={**self.SLOW_AND_GOOD, "forward_macs": 2.5e12}).splitlines()
        assert lines[0].split() == ["speed-ups", "on", "all", "off"]
        table = {line[:13].strip(): line[13:].split("  ") for line in lines[1:-2]}
        cells = {name: [cell.strip() for cell in row if cell.strip()] for name, row in table.items()}
        assert cells == {
            "top-1": ["92.10 %", "93.12 %"],
            "loss": ["0.4000", "0.3000"],
            "training time": ["30.0 s", "60.0 s"],
            "total time": ["40.0 s", "70.0 s"],
            "throughput": ["2,000 images/s", "1,000 images/s"],
            "forward MACs": ["1.23 T", "2.5 T"],
        }
        assert len({len(line) for line in lines[:-2]}) == 1

    def test_takes_two(self):
        with pytest.raises(ValueError, match="summaries of 1 runs were given; a comparison takes exactly two"):
            format_comparison({"one": self.FAST_AND_BAD})

    def test_files(self, tmp_path):
        histories = {"speed-ups on": make_history(seconds=1.0), "all off": make_history(seconds=2.0)}
        summaries = {label: make_summary(history) for label, history in histories.items()}
        write_comparison(histories, summaries, tmp_path)
        assert sorted(os.listdir(tmp_path)) == ["compare.json", "compare.png"]
        written = json.loads((tmp_path / "compare.json").read_text())
        assert list(written["runs"]) == ["speed-ups on", "all off"]
        assert written["runs"]["all off"]["train_seconds"] == 12
        assert written["verdict"] == format_comparison(summaries).splitlines()[-1]
        assert count_colors(tmp_path / "compare.png") > 20

    def test_files_refuse_other_runs(self, tmp_path):
        summaries = {"a": self.FAST_AND_BAD, "b": self.SLOW_AND_GOOD}
        with pytest.raises(ValueError, match=r"histories of \['a', 'c'\] were given with summaries of \['a', 'b'\]"):
            write_comparison({"a": History(), "c": History()}, summaries, tmp_path)


def read_png(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)


def count_colors(path: Path) -> int:
    return len(np.unique(read_png(path).reshape(-1, 4), axis=0))


def has_color(image: np.ndarray, color: str) -> bool:
    from matplotlib.colors import to_rgb

    return bool((np.abs(image[..., :3] - to_rgb(color)) < 0.02).all(axis=-1).any())


class TestCurves:
    TRAIN, EVAL = "#8aa4c8", "#c2410c"

    def test_shows_training_and_evaluation(self, tmp_path):
        plot_curves(make_history(), tmp_path / "figures" / "curves.png", title="digits")
        image = read_png(tmp_path / "figures" / "curves.png")
        assert image.shape[0] > 600
        assert image.shape[1] > 1000
        assert has_color(image, self.TRAIN)
        assert has_color(image, self.EVAL)
        assert os.listdir(tmp_path / "figures") == ["curves.png"]

    def test_a_missing_evaluation_is_left_out(self, tmp_path):
        plot_curves(make_history(eval_every=99), tmp_path / "curves.png")
        image = read_png(tmp_path / "curves.png")
        assert has_color(image, self.TRAIN)
        assert not has_color(image, self.EVAL)

    @pytest.mark.filterwarnings("error", "ignore::ResourceWarning")  # which earlier tests' leftovers cause
    @pytest.mark.parametrize(
        "history", [make_history(epochs=1, steps_per_epoch=1), make_history(eval_every=4), History()]
    )
    def test_short_and_sparse_histories(self, tmp_path, history):
        plot_curves(history, tmp_path / "curves.png")
        assert count_colors(tmp_path / "curves.png") > 20

    @pytest.mark.filterwarnings("error", "ignore::ResourceWarning")  # which earlier tests' leftovers cause
    def test_nan_and_an_unfinished_epoch(self, tmp_path):
        history = make_history()
        for row in history.epochs:
            row.update(train_loss=math.nan, image_size=None, images_per_second=None)
        for name, value in zip(STEP_COLUMNS, (31, 7, math.nan, 0.1), strict=True):
            history.steps[name].append(value)
        plot_curves(history, tmp_path / "curves.png")
        assert count_colors(tmp_path / "curves.png") > 20

    def test_leaves_pyplot_alone(self, tmp_path):
        code = (
            "import sys; from training.results.figures import plot_curves; "
            "from training.results.history import History; "
            f"plot_curves(History(), {str(tmp_path / 'curves.png')!r}); "
            "assert 'matplotlib.pyplot' not in sys.modules; assert 'composer' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0:00"),
        (42, "0:42"),
        (59.6, "1:00"),
        (725, "12:05"),
        (11261, "3:07:41"),
        (None, "-:--"),
        (math.inf, "-:--"),
    ],
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text
