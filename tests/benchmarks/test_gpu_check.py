"""The GPU check's own logic: schema, table, parts that fail, tests that end pytest; and the kit's lists."""

from __future__ import annotations

import copy
import json
import math
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu_machine import check, kit
from benchmarks.gpu_machine.outcomes import VARIABLE
from benchmarks.gpu_machine.processes import Ended, run
from benchmarks.gpu_machine.recipe_run import phases
from benchmarks.gpu_machine.report import Row, exit_status, make_report, problems, table, write_report

pytestmark = pytest.mark.timeout(60)


def report(*rows: Row, stopped: bool = False) -> dict[str, Any]:
    about = {"started": "2026-01-31T12:00:00+00:00", "seconds": 12.34, "commit": None, "device": "cpu"}
    return make_report(rows, **about, environment={"torch": "2.11.0"}, stopped=stopped)


PASSED = Row("tests", "one", "passed", 0.5)
SKIPPED = Row("recipe", "amp_fp16", "skipped", note="no CUDA device")
FAILED = Row("recipe", "fp32", "failed", 3.0, "ended with status 1", ["Traceback", "ValueError: no"])


# --- the report ----------------------------------------------------------------------------------------------------


def test_a_report_follows_its_schema_and_survives_json(tmp_path: Path) -> None:
    made = report(PASSED, SKIPPED, FAILED)
    made_json, made_table = write_report(made, tmp_path / "new" / "folder")
    assert json.loads(made_json.read_text()) == made
    assert problems(made) == []
    assert made_table.read_text() == table(made)
    assert sorted(path.name for path in made_json.parent.iterdir()) == ["gpu_check.json", "gpu_check.txt"]


def test_numbers_that_json_lacks_are_null() -> None:
    made = report(Row("recipe", "fp32", "passed", figures={"rate": math.nan, "list": (1, math.inf)}))
    assert made["rows"][0]["figures"] == {"rate": None, "list": [1, None]}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda made: made.pop("seconds"), "report.seconds is missing"),
        (lambda made: made.update(more=1), "report.more is unknown"),
        (lambda made: made.update(seconds=True), "report.seconds is True, of another type"),
        (lambda made: made.update(schema=2), "report.schema is 2, not 1"),
        (lambda made: made["rows"][0].update(status="good"), "rows[0].status is 'good'; known: passed"),
        (lambda made: made["rows"][0].update(part="lunch"), "rows[0].part is 'lunch'; known: environment"),
        (lambda made: made["rows"][1].update(note=""), "rows[1] is skipped without a reason"),
        (lambda made: made["rows"][2].update(note="", error=[]), "rows[2] failed without a note"),
        (lambda made: made["rows"].append(3), "rows[3] is not a mapping"),
    ],
)
def test_what_does_not_follow_the_schema_is_told(change: Any, told: str) -> None:
    made = copy.deepcopy(report(PASSED, SKIPPED, FAILED))
    change(made)
    assert any(told in problem for problem in problems(made)), problems(made)


def test_the_exit_status() -> None:
    assert exit_status(report(PASSED, SKIPPED)) == 0
    assert exit_status(report(PASSED, FAILED)) == 1
    assert exit_status(report(PASSED, stopped=True)) == 130


def test_the_table() -> None:
    long = Row("environment", "packages", "passed", note="torch 2.11.0, " * 20)
    lines = table(report(long, SKIPPED, FAILED, stopped=True)).splitlines()
    assert lines[0].split() == ["part", "item", "result", "seconds", "note"]
    assert lines[1].endswith("...")
    assert lines[2].split(maxsplit=3)[3] == "no CUDA device"
    assert lines[3].split()[:4] == ["recipe", "fp32", "failed", "3.0"]
    assert lines[4:6] == ["    | Traceback", "    | ValueError: no"]
    several = [Row("tests", name, "skipped", note="no CUDA device") for name in "abc"]
    lines_of_tests = table(report(PASSED, *several, FAILED)).splitlines()[1:4]
    assert [line.split()[:4] for line in lines_of_tests] == [
        ["tests", "one", "passed", "0.5"], ["tests", "3", "tests", "skipped"], ["recipe", "fp32", "failed", "3.0"],
    ]  # fmt: skip
    assert lines[-1] == "1 passed, 1 failed, 1 skipped in 12 s on cpu; stopped before its end"


# --- the parts -----------------------------------------------------------------------------------------------------


def a_check(tmp_path: Path) -> check.Check:
    return check.Check(kit=tmp_path, scratch=tmp_path, deadline=time.monotonic() + 60)


def test_a_part_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    def fails(given: check.Check) -> Iterator[Row]:
        yield PASSED
        raise RuntimeError("CUDA is gone")

    parts = [("tests", fails), ("benchmark", lambda given: iter(())), ("recipe", lambda given: iter([SKIPPED]))]
    rows, stopped = check.collect(parts, a_check(tmp_path))
    assert not stopped
    assert [(row.part, row.status) for row in rows] == [
        ("tests", "passed"), ("tests", "failed"), ("benchmark", "failed"), ("recipe", "skipped"),
    ]  # fmt: skip
    assert "CUDA is gone" in rows[1].note
    assert problems(report(*rows)) == []


def test_an_interrupt_keeps_what_there_is(tmp_path: Path) -> None:
    def interrupted(given: check.Check) -> Iterator[Row]:
        yield PASSED
        raise KeyboardInterrupt

    rows, stopped = check.collect([("tests", interrupted), ("recipe", interrupted)], a_check(tmp_path))
    assert stopped
    assert [(row.part, row.status) for row in rows] == [("tests", "passed"), ("tests", "failed"), ("recipe", "skipped")]
    assert problems(report(*rows, stopped=True)) == []


def test_a_test_that_ends_pytest_fails_and_the_rest_is_run_anew() -> None:
    lines = [{"test": f"tests/gpu/test_a.py::{name}", "outcome": "selected"} for name in "abcd"]
    lines += [{"test": "tests/gpu/test_a.py::a", "outcome": "skipped", "seconds": 0.0, "reason": "no CUDA device"}]
    lines += [
        {"test": "tests/gpu/test_a.py::b", "outcome": "failed", "seconds": 1.0, "reason": "x\nE   ValueError: no\ny"}
    ]
    rows, rest = check.test_rows(lines, Ended(-6, "ended with status -6", 2.0, ["Aborted"]))
    assert [(row.item, row.status) for row in rows] == [
        ("a: a", "skipped"), ("a: b", "failed"), ("a: c", "failed"),
    ]  # fmt: skip
    assert rows[0].note == "no CUDA device"
    assert rows[1].note == "ValueError: no"
    assert rows[2].error == ["Aborted"]
    assert rest == ["tests/gpu/test_a.py::d"]
    rows, rest = check.test_rows(lines, Ended(124, "did not end within 2 s", 2.0, [], timed_out=True))
    assert [row.status for row in rows] == ["skipped", "failed", "failed", "failed"]
    assert rest == []


def test_outcomes_are_written_as_they_come(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import os, pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip('no CUDA device')\ndef test_left_out(): pass\n"
        "def test_deadly(): os._exit(7)\n"
        "def test_after(): pass\n"
    )
    (tmp_path / "test_broken.py").write_text("import no_such_module\n")
    lines = tmp_path / "lines"
    command = [sys.executable, "-m", "pytest", str(tmp_path), "-p", "benchmarks.gpu_machine.outcomes"]
    command += ["-p", "no:cacheprovider", "--continue-on-collection-errors", "--rootdir", str(tmp_path)]
    ended = run(command, limit_seconds=50, environment={VARIABLE: str(lines)})
    rows, rest = check.test_rows([json.loads(line) for line in lines.read_text().splitlines()], ended)
    notes = {row.item.rpartition(": ")[2]: (row.status, row.note) for row in rows}
    (broken,) = [name for name in notes if name.endswith("test_broken")]
    assert notes.pop(broken) == ("failed", "ModuleNotFoundError: No module named 'no_such_module'")
    assert notes == {
        "good": ("passed", ""),
        "bad": ("failed", "assert 1 == 2"),
        "left_out": ("skipped", "no CUDA device"),
        "deadly": ("failed", "no outcome: pytest ended with status 7"),
    }
    assert [name.rpartition("::")[2] for name in rest] == ["test_after"]


def test_a_process_is_ended_at_its_limit_and_its_last_lines_are_kept() -> None:
    ended = run([sys.executable, "-c", "print('begun', flush=True); import time; time.sleep(60)"], limit_seconds=2)
    assert (ended.status, ended.timed_out, ended.lines) == (124, True, ["begun"])
    ended = run([sys.executable, "-c", "raise SystemExit('no such luck')"], limit_seconds=30)
    assert (ended.status, ended.told, ended.lines) == (1, "ended with status 1", ["no such luck"])


def test_phases_leave_out_the_first_epoch_of_a_size() -> None:
    def epoch(size: int, seconds: float, peak: int | None = None) -> dict[str, Any]:
        about = {"image_size": size, "batch_size": 4, "images": 100, "steps": 25, "wait_seconds": seconds / 4}
        return {**about, "train_seconds": seconds, "peak_bytes": peak}

    small, large = phases([epoch(8, 10.0, 3 * 10**9), epoch(8, 1.0, 10**9), epoch(16, 2.0)])
    assert (small["image_size"], small["images_per_second"], small["loader_share"]) == (8, 100.0, 0.25)
    assert (small["peak_memory_gb"], small["train_seconds"], small["with_first_epoch"]) == (3.0, 11.0, False)
    assert (large["images_per_second"], large["peak_memory_gb"], large["with_first_epoch"]) == (50.0, None, True)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_small_recipe_is_a_recipe(device: str, tmp_path: Path) -> None:
    from training.recipe import load_recipe

    given = check.overrides(
        device, train=tmp_path / "t.beton", val=tmp_path / "v.beton", num_train=160, scratch=tmp_path, cores=16
    )
    made = load_recipe(check.ROOT / check.RECIPE, ["precision=amp_bf16", *given])
    stages = made.algorithms["progressive_resizing"]["stages"]
    whole = load_recipe(check.ROOT / check.RECIPE, [])
    assert made.algorithms.keys() == whole.algorithms.keys()
    assert len(stages) == len(whole.algorithms["progressive_resizing"]["stages"])
    assert made.epochs == sum(stage.epochs for stage in stages)
    assert made.device == ("gpu" if device == "cuda" else "cpu")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--parts", "tests,lunch"], "no part 'lunch'; known: environment, tests, benchmark, recipe"),
        (["--kit", "/nowhere"], "no kit there; scripts/gpu_kit.sh makes one"),
    ],
)
def test_a_mistake_in_the_call_gives_one_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check.main(arguments) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1


# --- the kit -------------------------------------------------------------------------------------------------------


def test_pins_are_those_of_the_machines_python() -> None:
    lines = [
        "arrow==1.4.0",
        "numpy==2.2.6 ; python_full_version < '3.11'",
        "numpy==2.5.5 ; python_full_version >= '3.12'",
    ]
    lines += ["colorama==0.4.6 ; sys_platform == 'win32'"]
    assert kit.pinned(lines, python="3.12") == {"arrow": "1.4.0", "numpy": "2.5.5"}
    assert kit.pinned(lines, python="3.10")["numpy"] == "2.2.6"


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_wheel_of_the_kit_is_pinned(python: str) -> None:
    assert set(kit.WHEELS) <= kit.pinned(kit.CONSTRAINTS.read_text().splitlines(), python=python).keys()
    assert not kit.HAS & set(kit.WHEELS)


def test_a_wheel_that_needs_what_is_not_there_is_told(tmp_path: Path) -> None:
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    needs = ["torch>=2", "Lunch.Break (>=1)", "extra-thing; extra == 'all'", "old; python_version < '3.11'"]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(
            "tiny-1.0.dist-info/METADATA", "\n".join(["Name: tiny", *(f"Requires-Dist: {n}" for n in needs)])
        )
    assert kit.unmet([wheel], python="3.12") == {f"lunch-break (for {wheel.name})"}
    assert kit.unmet([wheel], python="3.10") == {f"lunch-break (for {wheel.name})", f"old (for {wheel.name})"}


def test_repeated_entries_are_the_same_images(tmp_path: Path) -> None:
    from data import write_beton
    from data.beton.format import Beton
    from data.sources import synthetic

    path = write_beton(synthetic(num_samples=6, num_classes=3, image_size=16), tmp_path / "six.beton", progress=False)
    kit.repeat_entries(path, tmp_path / "many.beton", times=5)
    once, many = Beton(path), Beton(tmp_path / "many.beton")
    assert len(many) == 30
    assert many.described
    for index in range(30):
        assert np.array_equal(many.image_bytes(index), once.image_bytes(index % 6))
        assert many.labels[index] == once.labels[index % 6]
    assert many.path.stat().st_size < once.path.stat().st_size


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--python", "3"], "--python 3: give a version of two numbers, like 3.12"),
        (["--out", "docs"], "--out docs: the folder holds something else than a kit"),
    ],
)
def test_a_mistake_about_the_kit_gives_one_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kit.main(arguments) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1
