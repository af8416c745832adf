"""The benchmark for a GPU, run on the CPU: its plan, time budget, failures, command line, report and files."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from algos.framework.registry import names as algorithm_names
from benchmarks.algorithm_variants import DTYPES, OURS, Bench, baseline
from benchmarks.gpu_machine import check
from benchmarks.gpu_machine.benchmark_rows import arguments, benchmark_rows
from benchmarks.gpu_machine.processes import Ended
from benchmarks.gpu_machine.report import make_report as make_check_report
from benchmarks.gpu_machine.report import problems
from benchmarks.gpu_step import command, running
from benchmarks.gpu_step.figure import lines_of
from benchmarks.gpu_step.plan import SCALES, Case, Group, chosen, plan
from benchmarks.gpu_step.report import described, flops_per_image, goals, make_report, text, trained_px
from benchmarks.gpu_step.running import FAILED, LEFT_OUT, MEASURED, NO_MEMORY, Budget, Result, Runner, is_out_of_memory

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SMALL = Case("resnet_digits", 8, 2, "fp32")
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def _torch_as_it_was() -> Iterator[None]:
    """The benchmark sets the number of threads of its process, and how cuDNN chooses."""
    threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = benchmark


def runner(seconds: float | None = None, **settings: Any) -> Runner:
    return Runner(CPU, Budget(seconds), lambda line: None, **{"backend": "eager", "rounds": 2, **settings})


def group(*cases: Case) -> Group:
    return Group("a test", cases, 2)


def statuses(made: Runner) -> list[list[str]]:
    return [[result.status for result in results] for results in made.results]


# --- what is measured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", sorted(SCALES))
def test_the_plan_begins_with_the_goals_and_has_everything(scale: str) -> None:
    groups = plan(SCALES[scale])
    first = groups[0].cases
    assert [case.compiled for case in first] == [False, True]
    assert all(case.plain and case.channels_last for case in first)
    assert {case.algorithm for one in groups[1:3] for case in one.cases} == {"", "blurpool"}
    for one in groups:
        assert len({case.name for case in one.cases}) == len(one.cases)
        assert not one.cases[0].algorithm
    cases = {case for one in groups for case in one.cases}
    ours = {case.algorithm for case in cases if case.library == OURS}
    # RandAugment works on the loader's side, and FixRes makes a step cheaper.
    assert ours - {"", "blurpool_after"} == {*algorithm_names()} - {"randaugment", "fixres"}
    assert {case.precision for case in cases} == {*SCALES[scale].precisions}
    assert {case.channels_last for case in cases} == {True, False}


def test_a_gpu_measures_what_it_is_for() -> None:
    cases = [case for one in plan(SCALES["cuda"]) for case in one.cases]
    assert cases[1].name == "resnet50 224px b256 bf16 nhwc compiled"
    for network in ("resnet50", "vit_b16"):
        assert {case.image_size for case in cases if case.network == network} == {128, 160, 176, 224, 288}
    assert {case.library for case in cases} >= {OURS, "composer", "timm", "antialiased_cnns"}
    assert {case.network for case in cases} == {"resnet50", "vit_b16", "timm.resnet50", "timm.vit_base_patch16_224"}


def test_a_pattern_keeps_what_its_cases_are_compared_with() -> None:
    groups = plan(SCALES["cuda"])
    (one, other) = chosen(groups, "EAGER blurpool composer"), chosen(groups, "resnet50*b256*sam timm")
    assert [case.label for case in one[0].cases] == ["b256 bf16 nhwc eager", "b256 bf16 nhwc eager blurpool composer"]
    assert len(one) == 1
    assert other == []
    assert chosen(groups, None) == groups


def test_the_work_of_an_image_is_counted_as_recipes_count_it() -> None:
    assert flops_per_image("resnet50", 224) == pytest.approx(24.535e9, rel=1e-3)
    assert flops_per_image("resnet50", 128) == pytest.approx(6 * 1.34e9, rel=1e-2)
    assert trained_px(Case("resnet50", 224, 4, "bf16", algorithm="progressive_resizing")) == 112


# --- steps -----------------------------------------------------------------------------------------------------------


def bench(precision: str = "fp32", **settings: Any) -> Bench:
    build = running.build_network
    return Bench("", 8, 4, CPU, torch.channels_last, precision=precision, **{
        "compiled": False, "build": lambda num_classes: build("resnet_digits", image_size=8), **settings
    })  # fmt: skip


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_step_in_16_bits_goes_where_one_in_32_does(precision: str) -> None:
    """A loss that is scaled, and gradients that are not scaled back, would go 65,536 times as far."""

    def moved(made: Bench) -> torch.Tensor:
        baseline(made)()
        # They begin at zero, so that the small learning rate's steps are not rounded away.
        return torch.cat([one.bias.detach() for one in made.plain_model.modules() if isinstance(one, nn.BatchNorm2d)])

    whole, half = moved(bench()), moved(bench(precision))
    assert whole.norm() > 0
    assert (half - whole).norm() < 0.1 * whole.norm()
    assert set(DTYPES) == {"fp32", "bf16", "fp16"}


def test_the_tenth_compiled_model_is_compiled_too() -> None:
    """torch's compiler gives up at the ninth graph of one function, without a word unless one asks."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()

    class Net(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images * 2

    for side in range(1, 11):
        bench(backend=counter, compiled=True).compile(Net())(torch.ones(side, side))
    assert counter.frame_count == 10


# --- time ------------------------------------------------------------------------------------------------------------


def test_the_first_case_is_measured_in_whatever_time_and_the_rest_says_why_not() -> None:
    made = runner(seconds=0.0)
    done: list[int] = []
    made.run([group(SMALL, Case("resnet_digits", 8, 4, "fp32")), group(SMALL)], after_group=done.append)
    assert statuses(made) == [[MEASURED, LEFT_OUT], [LEFT_OUT]]
    assert made.results[0][0].first_ms is not None
    assert made.results[0][0].step_ms == [made.results[0][0].first_ms]
    assert made.results[0][1].note == "no time: 0 s left"
    assert made.results[1][0].note.startswith("no time: needs some ")
    assert done == [0, 1]


def test_a_cheaper_group_follows_one_that_does_not_fit() -> None:
    made = runner(seconds=60.0, compile_seconds=1000.0)
    compiled = Case("resnet_digits", 8, 2, "fp32", compiled=True)
    made.run([group(SMALL), group(compiled), group(Case("resnet_digits", 8, 4, "fp32"))])
    assert statuses(made) == [[MEASURED], [LEFT_OUT], [MEASURED]]
    assert [len(results[0].times_ms) for results in made.results] == [2, 0, 2]


def test_what_is_ready_or_shares_a_model_needs_less_time() -> None:
    made = runner(compile_seconds=1000.0)
    compiled = Case("resnet_digits", 8, 2, "fp32", compiled=True)
    smoothed = Case("resnet_digits", 8, 2, "fp32", compiled=True, algorithm="label_smoothing")
    blurred = Case("resnet_digits", 8, 2, "fp32", compiled=True, algorithm="blurpool")
    assert 1000 < made.expected_seconds([compiled, compiled, smoothed]) < 1100
    assert made.expected_seconds([compiled, blurred]) > 2000
    made.run([group(compiled), group(compiled)])
    assert made.expected_seconds([compiled]) == 0.0 or made.step(compiled) is None  # the last group lets go of it
    assert made.results[1][0].ready_seconds == made.results[0][0].ready_seconds


def test_the_budget_counts_from_its_start() -> None:
    now = [100.0]
    budget = Budget(60, clock=lambda: now[0])
    now[0] += 45
    assert (budget.used, budget.left) == (45.0, 15.0)
    assert Budget(None).left == float("inf")


# --- what fails ------------------------------------------------------------------------------------------------------


def raising(error: BaseException, *, after: int = 0) -> Callable[[Bench], Callable[[], None]]:
    """In the place of a step: steps of 3 images that raise after some calls; others do nothing."""

    def make(given: Bench) -> Callable[[], None]:
        left = [after]

        def step() -> None:
            if given.batch_size == 3:
                left[0] -= 1
                if left[0] < 0:
                    raise error

        return step

    return make


THREE = Case("resnet_digits", 8, 3, "fp32")


@pytest.mark.parametrize("after", [0, 5])  # while it is prepared, and in its second round
def test_a_step_without_memory_is_a_row_and_not_the_end(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    monkeypatch.setattr(running, "baseline", raising(error, after=after))
    made = runner()
    made.run([group(SMALL, THREE), group(SMALL)])
    assert statuses(made) == [[MEASURED, NO_MEMORY], [MEASURED]]
    assert len(made.results[0][0].times_ms) == 2
    assert made.results[0][1].step_ms == []
    assert made.step(THREE) is None


def test_another_failure_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "baseline", raising(ValueError("no\nkernel " * 40)))
    made = runner()
    made.run([group(SMALL, THREE)])
    assert statuses(made) == [[MEASURED, FAILED]]
    assert made.results[0][1].note.startswith("ValueError: no kernel no kernel")
    assert len(made.results[0][1].note) <= 100


def test_what_counts_as_a_lack_of_memory() -> None:
    assert is_out_of_memory(
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")
    )
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    wrapped = RuntimeError("backend failed")  # as the compiler does
    wrapped.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    assert is_out_of_memory(wrapped)
    assert not is_out_of_memory(ValueError("out of memory, says a user's message"))
    assert not is_out_of_memory(RuntimeError("illegal memory access"))


def test_a_missing_library_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    absent = ("composer", "timm")
    monkeypatch.setattr(running.importlib.util, "find_spec", lambda name: None if name in absent else found(name))
    made = runner()
    made.run(
        [group(SMALL, *(Case("resnet_digits", 8, 2, "fp32", algorithm="ema", who=who) for who in (OURS, *absent)))]
    )
    assert statuses(made) == [[MEASURED, MEASURED, LEFT_OUT, LEFT_OUT]]
    assert made.results[0][2].note == "mosaicml is not installed"
    assert made.results[0][3].note == "timm is not installed"


def test_of_a_round_that_is_cut_short_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "baseline", raising(KeyboardInterrupt(), after=6))
    made = runner(rounds=9)
    with pytest.raises(KeyboardInterrupt):
        made.run([group(SMALL, THREE), group(SMALL)])
    one, three = made.results[0]
    assert len(one.times_ms) == len(three.times_ms) == 2  # three calls to warm up, one by itself, two rounds
    assert made.results[1][0].note == "stopped before it"


# --- the command -----------------------------------------------------------------------------------------------------

NO_PEAKS: dict[str, Any] = {"flops": {}, "bytes_per_second": None}
ONLY = "resnet_digits 32px b16 fp32 nhwc * blurpool brisk"


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any], str, Path]:
    """(status, what the JSON file says, stdout, the folder) of a run of two groups, of which one is compiled."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("gpu") / "deep"
    said = io.StringIO()
    arguments = ["--quick", "--device", "cpu", "--rounds", "2", "--only", ONLY, "--backend", "eager"]
    with contextlib.redirect_stdout(said):
        status = command.main([*arguments, "--json", str(folder / "gpu.json"), "--figure", str(folder / "gpu.svg")])
    return status, json.loads((folder / "gpu.json").read_text()), said.getvalue(), folder


def test_a_run_measures_and_writes(ended: tuple[int, dict[str, Any], str, Path]) -> None:
    status, report, said, folder = ended
    assert status == 0
    assert report["schema"] == 1
    assert not report["stopped"]
    assert [one["title"] for one in report["groups"]] == [
        "resnet_digits 32 px: blurpool", "resnet_digits 32 px: blurpool, compiled",
    ]  # fmt: skip
    for row in (row for one in report["groups"] for row in one["rows"]):
        assert (row["status"], row["n"], row["peak_bytes"], row["graph_breaks"]) == (MEASURED, 2, None, 0)
        assert row["images_per_second"] > 0
        assert row["of_peak"] > 0
    assert report["machine"]["flops"]["fp32"] > 0
    assert report["machine"]["bytes_per_second"] > 0
    assert report["versions"]["torch"] == torch.__version__.partition("+")[0]
    for line in said.splitlines():
        assert len(line) <= 120, line
    assert "b16 fp32 nhwc compiled blurpool brisk" in said
    assert "compiled means torch.compile(backend='eager')" in said
    assert sorted(path.name for path in folder.iterdir()) == ["gpu.json", "gpu.svg"]
    assert (folder / "gpu.svg").read_text().startswith("<?xml")


def test_the_profile_is_that_of_the_first_groups_fastest_step(ended: tuple[int, dict[str, Any], str, Path]) -> None:
    _, report, said, _ = ended
    profile = report["profile"]
    rows = report["groups"][0]["rows"]
    assert profile["name"] == max(rows, key=lambda row: row["images_per_second"])["name"]
    found = {row["group"]: row["share"] for row in profile["groups"]}
    assert found["convolution"] > 0
    assert sum(found.values()) == pytest.approx(1.0)
    assert len(profile["top"]) == 10
    assert "aten::convolution_backward" in said


def test_the_picture_has_a_line_for_each_way_to_train() -> None:
    def row(network: str, px: int, label: str, **more: Any) -> dict[str, Any]:
        about = {"network": network, "image_size": px, "label": label, "algorithm": "", "library": OURS}
        return {**about, "step_ms": {}, "images_per_second": 10.0 * px, **more}

    rows = [row("a", 224, "eager"), row("a", 128, "eager"), row("a", 224, "compiled")]
    rows += [row("a", 224, "timm", library="timm"), row("a", 224, "sam", algorithm="sam")]
    left_out = {key: value for key, value in row("a", 288, "eager").items() if key != "step_ms"}
    lines = lines_of({"groups": [{"rows": rows}, {"rows": [left_out]}]})
    assert lines == {"a eager": {128: 1280.0, 224: 2240.0}, "a compiled": {224: 2240.0}}


def test_ctrl_c_leaves_what_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(step: Any, device: torch.device) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "profile_step", interrupt)
    monkeypatch.setattr(command, "measure_machine", lambda *given, **settings: NO_PEAKS)
    written = tmp_path / "gpu.json"
    arguments = ["--quick", "--device", "cpu", "--only", ONLY, "--rounds", "1", "--backend", "eager"]
    assert command.main([*arguments, "--json", str(written)]) == 130
    report = json.loads(written.read_text())
    assert report["stopped"]
    first, second = report["groups"]
    assert [row["status"] for row in first["rows"]] == [MEASURED, MEASURED]
    assert {(row["status"], row["note"]) for row in second["rows"]} == {(LEFT_OUT, "stopped before it")}
    said = " ".join(capsys.readouterr().out.split())  # lines break where the processor's name leaves room
    assert "stopped before its end" in said
    assert "left out: stopped before it" in said
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]


def test_a_failed_step_of_ours_is_an_exit_status(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def make(given: Bench) -> Callable[[], None]:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(running, "baseline", make)
    monkeypatch.setattr(command, "measure_machine", lambda *given, **settings: NO_PEAKS)
    assert command.main(["--quick", "--device", "cpu", "--only", "resnet_digits 16px*eager"]) == 1
    assert "failed: RuntimeError: no such kernel" in capsys.readouterr().out


def test_the_names_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--device", "cpu", "--list", "--only", "288px"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "resnet50 288px b8 fp32 nhwc eager", "resnet50 288px b8 fp32 nhwc compiled",
        "vit_b16 288px b8 fp32 nhwc eager", "vit_b16 288px b8 fp32 nhwc compiled",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--only", "resnet999"], "--only resnet999: no variant has that in its name; --list shows them all"),
        (["--minutes", "0"], "--minutes 0.0 must be above 0"),
        (["--minutes", "nan"], "--minutes nan must be above 0"),
        (["--rounds", "-1"], "--rounds -1 must be above 0"),
        (["--figure", "gpu.txt"], "--figure gpu.txt: the file's name must end in .svg, .png, .pdf"),
        (["--json", "tests"], "--json tests: no file can be written there; give another one"),
        (["--json", "README.md/gpu.json"], "--json README.md/gpu.json: no file can be written there"),
    ],
)
def test_a_mistake_in_the_call_gives_one_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert command.main(["--device", "cpu", "--quick", *arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"gpu: {told}")
    assert said.err.count("\n") == 1
    assert said.out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--device", "cuda"]) == 2
    assert "--device cuda: torch finds no CUDA device here" in capsys.readouterr().err


@pytest.mark.exhaustive
@pytest.mark.timeout(300)
def test_the_quick_run_needs_torch_and_torchvision_alone(tmp_path: Path) -> None:
    written = tmp_path / "gpu.json"
    code = f"""
import runpy, sys
blocked = {("composer", "timm", "antialiased_cnns", "pytorch_optimizer", "omegaconf", "matplotlib")!r}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.partition(".")[0])
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in blocked else found(name, package)
sys.meta_path.insert(0, Block())
sys.argv = ["benchmarks/gpu.py", "--quick", "--minutes", "3", "--json", {str(written)!r}, "--figure", "gpu.svg"]
runpy.run_module("benchmarks.gpu", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "no picture, since matplotlib is not installed" in done.stderr
    report = json.loads(written.read_text())
    rows = [row for one in report["groups"] for row in one["rows"]]
    assert {row["status"] for row in rows if row["library"] == OURS} == {MEASURED}
    notes = {row["note"] for row in rows if row["status"] == LEFT_OUT}
    assert notes == {f"{name} is not installed" for name in ("mosaicml", "timm", "pytorch_optimizer")}


# --- goals -----------------------------------------------------------------------------------------------------------


def measured(step_ms: float, **changes: Any) -> Result:
    case = Case(**{"network": "resnet50", "image_size": 224, "batch_size": 256, "precision": "bf16",
                   "compiled": True, **changes})  # fmt: skip
    return Result(case, MEASURED, times_ms=[step_ms, step_ms * 1.001] * 5, ready_seconds=1.0, peak_bytes=2**30)


@pytest.mark.parametrize(
    ("step_ms", "gpu", "verdict"),
    [(79.0, "NVIDIA H100 80GB HBM3", "met"), (81.0, "NVIDIA H100", "missed"), (79.96, "NVIDIA H100", "open"),
     (50.0, "NVIDIA H200", "met here"), (99.0, "NVIDIA A100-SXM4-80GB", "missed here")],
)  # fmt: skip
def test_the_goal_of_3200_images_a_second(step_ms: float, gpu: str, verdict: str) -> None:
    others = [measured(10.0, compiled=False), measured(10.0, algorithm="ema"), measured(10.0, channels_last=False)]
    others += [
        measured(10.0, image_size=128),
        measured(10.0, precision="fp16"),
        Result(Case("resnet50", 224, 4, "bf16")),
    ]
    (goal,) = goals([[*others, measured(90.0), measured(step_ms)]], gpu=gpu)
    assert goal["verdict"] == verdict
    if step_ms < 90:
        assert goal["images_per_second"] == pytest.approx(256 / step_ms * 1e3, rel=1e-2)
    assert "goal 3,200 on one H100" in goal["text"]
    assert goals([others], gpu=gpu) == []


def test_the_goal_of_half_of_composers_overhead() -> None:
    def judged(ours: float, composers: float) -> dict[str, Any]:
        rows = [measured(100.0), measured(ours, algorithm="blurpool")]
        rows.append(measured(composers, algorithm="blurpool", who="composer"))
        (goal,) = goals([rows], gpu=None)
        return goal

    assert judged(104.0, 110.0)["verdict"] == "met"
    assert judged(106.0, 110.0)["verdict"] == "missed"
    assert "+6.00% of a step, Composer's +10.00%" in judged(106.0, 110.0)["text"]
    alone = [measured(100.0), measured(104.0, algorithm="blurpool"), Result(Case("resnet50", 224, 4, "bf16"))]
    assert goals([alone], gpu=None) == []


def a_report(*groups: list[Result], gpu: str | None = "NVIDIA H100 80GB HBM3") -> dict[str, Any]:
    about = {
        "date": "2026-01-31",
        "settings": {"threads": 1, "backend": "inductor", "cudnn_benchmark": False},
        "hardware": {"cpu": "a processor with a name that is " + "long " * 30, **({"gpu": gpu} if gpu else {})},
        "versions": {f"library{number}": "1.2.3.dev20260131+cu130" for number in range(9)},
    }
    machine = {"flops": {"bf16": 8e14, "fp16": None}, "bytes_per_second": 3e12}
    kernel = {"name": "void " + "at::native::" * 40, "group": "copies and formats", "us": 4e4, "share": 0.4, "count": 5}
    profile = {"name": groups[0][0].case.name, "steps": 5, "ms": 20.0, "groups": [kernel], "top": [kernel] * 10}
    titles = [f"group {number}" for number in range(len(groups))]
    return make_report(groups, titles=titles, about=about, machine=machine, profile=profile, seconds=3.0, stopped=False)


def test_the_table_fits_and_says_what_became_of_each() -> None:
    long = {"algorithm": "progressive_resizing", "who": "antialiased_cnns"}
    first = [measured(79.0), measured(90.0, **long), Result(measured(1.0, batch_size=512).case, NO_MEMORY)]
    rest = [
        Result(Case("vit_b16", 224, 64, "bf16", compiled=compiled), LEFT_OUT, "no time") for compiled in (False, True)
    ]
    failed = [measured(20.0), Result(measured(1.0, **long).case, FAILED, "ValueError: " + "no " * 30)]
    printed = text(a_report(first, rest, failed))
    assert max(map(len, printed.splitlines())) <= 120
    lines = {line.strip().partition("  ")[0]: line for line in printed.splitlines()}
    assert "  failed: ValueError: no no" in lines["b256 bf16 nhwc compiled progressive_resizing antialiased_cnns"]
    assert lines["b512 bf16 nhwc compiled"].endswith("  out of memory")
    assert lines["b64 bf16 nhwc eager and 1 more"].endswith("  left out: no time")
    # 3,240 images/s of 24.5 GFLOP are 10 % of 800 TFLOP/s.
    plain = next(line for line in printed.splitlines() if line.startswith("  b256 bf16 nhwc compiled  "))
    assert plain.split()[4:] == ["3,239", "0.0%", "79.0", "9.9%", "1.0", "1.000", "10", "1"]
    assert "MLPerf on a single node: A100 3,398, H100 7,160, H200 7,950" in printed
    assert "PyTorch on one A100: 2,470 to 2,600" in printed
    assert "of MLPerf's on the H100" in printed
    assert "met     " in printed


def test_ratios_are_those_of_a_round() -> None:
    base, other = measured(1.0), measured(1.0, algorithm="ema")
    base.times_ms, other.times_ms = [100.0, 200.0, 300.0], [110.0, 220.0, 330.0]
    row = described(other, [base, other], None)
    assert row["ratio"]["min"] == row["ratio"]["max"] == 1.1
    assert row["of_peak"] is None


# --- in the GPU check ------------------------------------------------------------------------------------------------


def test_the_check_takes_the_figures_into_its_rows() -> None:
    alien = Case("resnet50", 224, 256, "bf16", algorithm="ema", who="composer")
    ours = Case("resnet50", 224, 256, "bf16", algorithm="ema")
    results = [measured(79.0), Result(alien, FAILED, "ImportError: no"), Result(ours, FAILED, "RuntimeError: no")]
    results += [
        Result(measured(1.0).case, NO_MEMORY),
        Result(ours, LEFT_OUT, "no time"),
        Result(ours, LEFT_OUT, "no time"),
    ]
    rows = benchmark_rows(a_report(results))
    about = {"started": "2026-01-31T12:00:00+00:00", "seconds": 1.0, "commit": None, "device": "cuda"}
    whole = make_check_report(rows, **about, environment={}, stopped=False)
    assert problems(json.loads(json.dumps(whole))) == []
    assert [row.status for row in rows] == [
        "passed", "passed", "skipped", "failed", "skipped", "skipped", "passed", "passed",
    ]  # fmt: skip
    assert rows[1].note.startswith(
        "3,239 images/s, 9.9% of the measured peak, peak 1.0 GiB, 1.000 of its group's first"
    )
    assert rows[1].figures["images_per_second"] == pytest.approx(3239, rel=1e-3)
    assert rows[4].note == "out of memory"
    assert rows[5].note.startswith("2 variants left out, the first of them resnet50 224px")
    assert rows[6].item == "profile"
    assert rows[7].note.startswith("met: ")


@pytest.mark.parametrize("status", [0, 124])
def test_the_check_keeps_the_figures_of_a_benchmark_that_was_stopped(
    status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(given: list[str], *, limit_seconds: float) -> Ended:
        assert given[3:5] == ["--minutes", "0.85"]
        Path(given[-1]).write_text(json.dumps(a_report([measured(79.0)])))
        return Ended(status, "did not end within 65 s", 65.0, ["Aborted"])

    monkeypatch.setattr(check, "run", run)
    made = check.Check(kit=tmp_path, scratch=tmp_path, deadline=float("inf"), device="cuda")
    rows = list(check.check_benchmark(made))
    assert [row.status for row in rows] == ["passed"] * 4 + ["passed" if status == 0 else "failed"]


def test_the_benchmark_of_a_check_ends_within_its_limit() -> None:
    assert arguments("cuda", limit_seconds=65.0) == ["--minutes", "0.85"]
    assert arguments("cuda", limit_seconds=3.0) == ["--minutes", "0.08"]
    assert arguments("cpu", limit_seconds=65.0) == ["--quick"]
