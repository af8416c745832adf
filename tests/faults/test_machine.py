"""What else goes wrong on a machine: descriptors, loaders, replaced files, the clock, and stops at any moment."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow, pytest.mark.xdist_group("faults of machine")]
only_in_all = pytest.mark.exhaustive


@pytest.mark.exhaustive
def test_no_descriptor_is_left(runs: Any) -> None:
    ended = runs.start("descriptors", "checkpoints.every_steps=10", fault="batch_end:35:descriptors=0")
    runs.assert_one_line(ended, 1, "Too many open files", "ulimit -n")
    assert runs.step("descriptors") == 30
    runs.assert_goes_on("descriptors", "checkpoints.every_steps=10")


@pytest.mark.exhaustive
def test_a_thread_of_the_loader_fails(runs: Any) -> None:
    ended = runs.start("decoder", "checkpoints.every_steps=10", fault="batch_end:25:decoder")
    runs.assert_one_line(ended, 1, "Input/output error")
    runs.assert_goes_on("decoder", "checkpoints.every_steps=10")


@pytest.mark.exhaustive
def test_a_worker_of_the_torch_loader_is_killed(runs: Any) -> None:
    torch_loader = ("data.train.loader=torch", "checkpoints.every_steps=10")
    whole = runs.start("whole torch", *torch_loader)
    assert whole.returncode == 0, whole.stderr
    ended = runs.start("worker", *torch_loader, fault="batch_end:25:workers")
    runs.assert_one_line(ended, 1, "worker", "autoresume=true")
    runs.assert_goes_on("worker", *torch_loader, as_one="whole torch")


@pytest.fixture
def own_cache(runs: Any, tmp_path: Path) -> Path:
    """A copy of the converted files, which a test may spoil."""
    return Path(shutil.copytree(runs.folder / "cache", tmp_path / "cache"))


@pytest.mark.exhaustive
def test_a_file_that_is_replaced_under_a_run_is_read_on(runs: Any, own_cache: Path) -> None:
    train, other = sorted(own_cache.glob("*-train-*.beton")), sorted(own_cache.glob("*-eval-*.beton"))
    fault = f"batch_end:30:replaced={train[0]}={other[0]}"
    done = runs.start("replaced", f"data.cache_dir={own_cache}", fault=fault)
    assert done.returncode == 0, done.stderr
    runs.assert_same_end("replaced", "whole")
    refused = runs.start("other data", f"data.cache_dir={own_cache}")  # whose description is of the file before
    runs.assert_one_line(refused, 2, str(train[0]))


@pytest.mark.exhaustive
def test_a_file_that_is_cut_short_under_a_run(runs: Any, own_cache: Path) -> None:
    fault = f"batch_end:30:cut_off={own_cache}/*-train-*.beton=0.5"
    settings = ("checkpoints.every_steps=10", f"data.cache_dir={own_cache}")
    ended = runs.start("short", *settings, fault=fault)
    runs.assert_one_line(ended, 1, "was cut short while it was read", "resume")
    refused = runs.start("short", "autoresume=true", *settings)
    runs.assert_one_line(refused, 2, ".beton")
    runs.assert_goes_on("short", "checkpoints.every_steps=10")  # with the whole file


@pytest.mark.exhaustive
@pytest.mark.parametrize("seconds", [-86400, 86400])
def test_the_clock_is_set(runs: Any, seconds: int) -> None:
    name = f"clock {seconds}"
    faults = f"batch_end:5:clock={seconds},batch_end:40:SIGKILL"
    # Every step is late enough: saves go on although the clock says that none is due for a day.
    killed = runs.start(name, "checkpoints.every_minutes=0.00001", "checkpoints.asynchronous=false", fault=faults)
    assert killed.returncode == -signal.SIGKILL
    assert runs.step(name) == 39
    again = runs.start(name, "autoresume=true", fault=f"batch_end:2:clock={seconds}")
    assert again.returncode == 0, again.stderr
    runs.assert_same_end(name, "whole")


STATUS = {"SIGINT": 130, "SIGTERM": 143, "SIGKILL": -9}


@pytest.mark.parametrize(
    ("event", "signal_name"),
    [
        pytest.param("batch_end:13", "SIGINT", marks=only_in_all),
        pytest.param("before_forward:29", "SIGINT", marks=only_in_all),
        pytest.param("after_train_batch:47", "SIGINT", marks=only_in_all),
        pytest.param("eval_batch_end:1", "SIGINT", marks=only_in_all),
        pytest.param("open=*.checkpoint-latest*:3", "SIGINT", marks=only_in_all),
        pytest.param("open=*.checkpoint-latest*:3", "SIGTERM", marks=only_in_all),
        pytest.param("open=*.checkpoint-latest*:3", "SIGKILL", marks=only_in_all),
        ("name=*/previous.pt:2", "SIGKILL"),  # best.pt is the newest then, and latest.pt not there yet
        pytest.param("name=*/latest.pt:3", "SIGINT", marks=only_in_all),
        pytest.param("name=*/latest.pt:3", "SIGTERM", marks=only_in_all),
        pytest.param("name=*/latest.pt:3", "SIGKILL", marks=only_in_all),
        pytest.param("name=*/best.pt:2", "SIGKILL", marks=only_in_all),
        pytest.param("name=*/recipe.yaml:1", "SIGKILL", marks=only_in_all),
        pytest.param("name=*/metrics.csv:2", "SIGKILL", marks=only_in_all),
        pytest.param("name=*/summary.json:1", "SIGKILL", marks=only_in_all),
        pytest.param("open=*curves.png*:1", "SIGINT", marks=only_in_all),
    ],
)
def test_a_stop_at_any_moment(runs: Any, event: str, signal_name: str) -> None:
    name = f"{event} {signal_name}".translate({ord(one): "-" for one in ":=*/."})
    stopped = runs.start(name, "autoresume=true", "checkpoints.every_steps=15", fault=f"{event}:{signal_name}")
    assert stopped.returncode == STATUS[signal_name], stopped.stderr
    assert "Traceback" not in stopped.stderr
    runs.assert_goes_on(name, "checkpoints.every_steps=15")
    folder = runs.folder / name
    assert {path.name for path in folder.iterdir()} == {path.name for path in (runs.folder / "whole").iterdir()}
    assert not list((folder / "checkpoints").glob(".*"))
