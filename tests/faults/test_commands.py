"""The other commands, stopped while they write: what they leave is whole or not there, and a second call is enough."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import run_python

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow, pytest.mark.xdist_group("faults of commands")]
only_in_all = pytest.mark.exhaustive
WARM = "schedule.warmup_epochs=0"
SCRIPT = "tests/faults/faulty_run.py"
STATUS = {"SIGINT": 130, "SIGTERM": 143, "SIGKILL": -9}


def command(*arguments: str, fault: str = "batch_end:0:SIGTERM") -> Any:
    """`python -m ...` with a fault; the default never happens."""
    return run_python(SCRIPT, fault, "-m", *arguments, timeout=250)


@pytest.mark.parametrize(
    ("event", "signal"),
    [
        pytest.param("open=*.beton.*:1", "SIGKILL", marks=only_in_all),
        pytest.param("name=*.beton:1", "SIGINT", marks=only_in_all),
        ("name=*.beton:1", "SIGTERM"),
        ("name=*.beton:1", "SIGKILL"),
        pytest.param("name=*.beton.json:1", "SIGKILL", marks=only_in_all),
    ],
)
def test_a_conversion_that_is_stopped(tmp_path: Path, event: str, signal: str) -> None:
    whole, path = tmp_path / "whole.beton", tmp_path / "digits.beton"
    assert command("data.convert", "digits", str(whole), "--split", "train").returncode == 0
    stopped = command("data.convert", "digits", str(path), "--split", "train", fault=f"{event}:{signal}")
    assert stopped.returncode == STATUS[signal], stopped.stderr
    assert not path.exists() or path.read_bytes() == whole.read_bytes()
    again = command("data.convert", "digits", str(path), "--split", "train")
    assert again.returncode == 0, again.stderr
    assert path.read_bytes() == whole.read_bytes()
    assert sorted(one.name for one in tmp_path.iterdir()) == [
        "digits.beton", "digits.beton.json", "whole.beton", "whole.beton.json",
    ]  # fmt: skip


@pytest.mark.exhaustive
def test_a_conversion_within_a_run_that_is_killed(runs: Any, tmp_path: Path) -> None:
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    killed = runs.start("converts", "autoresume=true", cache, fault="name=*.beton:2:SIGKILL")
    assert killed.returncode == -9
    again = runs.start("converts", "autoresume=true", cache)
    assert again.returncode == 0, again.stderr
    runs.assert_same_end("converts", "whole")
    assert not list((tmp_path / "cache").glob("*.partial"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("signal", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_an_export_that_is_stopped(runs: Any, tmp_path: Path, signal: str) -> None:
    run, folder = str(runs.folder / "whole"), tmp_path / "exported"
    given = ("training.export", run, "--to", "safetensors", "-o", str(folder))
    stopped = command(*given, fault=f"name=*/exported:1:{signal}")
    assert stopped.returncode == STATUS[signal] or (signal == "SIGTERM" and stopped.returncode == -15), stopped.stderr
    assert not folder.exists()
    again = command(*given)
    assert again.returncode == 0, again.stderr
    assert (folder / "model.safetensors").is_file()


@pytest.mark.exhaustive
@pytest.mark.parametrize("signal", ["SIGINT", "SIGKILL"])
def test_an_evaluation_that_is_stopped(runs: Any, tmp_path: Path, signal: str) -> None:
    given = ("evaluate", str(runs.folder / "whole"), "-o", str(tmp_path / "evaluation"), "--no-shifts")
    stopped = command(*given, fault=f"name=*evaluation/*:2:{signal}")
    assert stopped.returncode == STATUS[signal], stopped.stderr
    again = command(*given)
    assert again.returncode == 0, again.stderr
    left = {path.name for path in (tmp_path / "evaluation").rglob("*")}
    assert not [name for name in left if name.endswith((".partial", ".tmp"))]
    assert "evaluation.json" in left


@pytest.mark.exhaustive
def test_an_ablation_that_is_killed_goes_on(runs: Any, tmp_path: Path) -> None:
    def ablate(folder: str, fault: str = "batch_end:0:SIGTERM") -> Any:
        common = runs.arguments("ablated", f"results_dir={tmp_path / folder}", "duration.epochs=1", WARM)
        off = [f"algorithms.{one}=null" for one in ("blurpool", "channels_last", "label_smoothing", "sam")]
        return command("training.ablate", "--seeds", "1", "--equal", "epochs", *common, *off, fault=fault)

    def judged(folder: str) -> list[tuple[Any, ...]]:
        content = json.loads((tmp_path / folder / "ablated_ablation" / "ablation.json").read_text())
        return sorted((run["variant"], run["top1"], run["loss"]) for run in content["runs"])

    assert ablate("whole").returncode == 0
    assert ablate("killed", "name=*/summary.json:2:SIGKILL").returncode == -9
    again = ablate("killed")
    assert again.returncode == 0, again.stderr
    assert judged("killed") == judged("whole")
