"""The cost of each engine: bytes against those counted here, files written, engines left out, nothing left running."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib.image
import psutil
import pytest
import torch
from torch import nn

from models.vit import vit_digits
from training.engines.compare import main
from training.engines.memory import PARTS, expected_bytes, state_bytes_per_parameter
from training.engines.torch_trials import fsdp2_runs_on_cpu

ROOT = Path(__file__).parents[3]
COMMAND = [sys.executable, "-m", "training.engines.compare"]
BATCH, PIXELS = 32, 20
FLOAT32 = 4
TINY = [
    "-f", str(ROOT / "yamls" / "digits_medium.yaml"), "--ranks", "2", "--steps", "2", "--timeout", "200",
    "model=null", "model.name=vit_digits", "algorithms=null", "parallelism.sync_batchnorm=false",
    "data.train.global_batch_size=64",
]  # fmt: skip


def arguments(folder: Path, engines: str, *overrides: str) -> list[str]:
    files = [f"results_dir={folder}", f"data.cache_dir={folder.parent / 'cache'}"]
    return [*TINY, *files, *overrides, "--engines", engines, "--output", str(folder / "costs")]


pytestmark = pytest.mark.xdist_group("compare_engines")  # one worker of pytest-xdist has the runs that these share


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return vit_digits(num_classes=10)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the files of one comparison."""
    if not fsdp2_runs_on_cpu():
        pytest.skip("this torch runs FSDP2 on GPUs alone")
    folder = tmp_path_factory.mktemp("costs")
    assert main(arguments(folder, "none,ddp,fsdp,zero2,zero3")) == 0
    return folder


@pytest.fixture(scope="module")
def costs(written: Path) -> dict[str, Any]:
    return {cost["engine"]: cost for cost in json.loads((written / "costs.json").read_text())["engines"]}


def sharded_bytes(network: nn.Module) -> int:
    """What rank 0 of two holds when every weight is cut along its first axis."""
    return FLOAT32 * sum(math.ceil(len(p) / 2) * (p.numel() // len(p)) for p in network.parameters())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ["none", "ddp"])
def test_whole_replicas(costs: dict[str, Any], network: nn.Module, engine: str) -> None:
    whole = sum(parameter.nbytes for parameter in network.parameters())
    cost = costs[engine]
    assert cost["parameters"] == cost["gradients"] == cost["optimizer_state"] == whole  # SGD with momentum
    assert cost["expected"] == dict.fromkeys(PARTS, whole)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_shards_of_fsdp(costs: dict[str, Any], network: nn.Module) -> None:
    part = sharded_bytes(network)
    cost = costs["fsdp"]
    assert cost["parameters"] == cost["gradients"] == cost["optimizer_state"] == part
    # The position embedding has one row, which one rank holds whole: 2 % more than half.
    assert part * 0.97 <= cost["expected"]["parameters"] <= part


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_shards_of_zero(costs: dict[str, Any], network: nn.Module) -> None:
    sizes = [parameter.nbytes for parameter in network.parameters()]
    whole = sum(sizes)
    two, three = costs["zero2"], costs["zero3"]
    assert two["parameters"] == pytest.approx(whole, rel=0.01)
    assert whole / 2 <= two["gradients"] <= whole / 2 + 2 * max(sizes)  # the weights that lie across a boundary
    assert three["gradients"] == pytest.approx(whole / 2, rel=0.02)
    for cost in (two, three):  # momentum, and the copy that is trained
        assert cost["optimizer_state"] == pytest.approx(2 * whole / 2, rel=0.02)
    # All of this network's weights are below ZeRO-3's threshold, and stay whole beside their shards.
    assert three["parameters"] == pytest.approx(whole * 1.5, rel=0.02)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_activations_are_what_autograd_keeps(costs: dict[str, Any], network: nn.Module) -> None:
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = network.train()(torch.randn(BATCH, 3, PIXELS, PIXELS))
        loss = nn.functional.cross_entropy(outputs, torch.randint(10, (BATCH,)))
    assert loss.requires_grad
    expected = sum(kept.values())
    assert expected > 1e6
    for engine in ("none", "ddp", "zero2", "zero3"):
        assert expected * 0.95 <= costs[engine]["activations"] <= expected * 1.3


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_rates_and_shares_belong_together(costs: dict[str, Any]) -> None:
    assert costs["none"]["communication_share"] < 0.05  # with itself, over gloo all the same
    assert costs["none"]["scaling_efficiency"] == 1
    alone = costs["none"]["images_per_second"]
    for engine, cost in costs.items():
        assert cost["ranks"] == (1 if engine == "none" else 2)
        assert cost["images_per_second"] == pytest.approx(cost["ranks"] * BATCH / cost["step_seconds"])
        assert cost["scaling_efficiency"] == pytest.approx(cost["images_per_second"] / (cost["ranks"] * alone))
        assert engine == "none" or 0 < cost["communication_share"] < 1
        parts = sum(cost[part] for part in (*PARTS, "activations"))
        assert parts < cost["peak"] < psutil.virtual_memory().total


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_table_and_chart(written: Path, costs: dict[str, Any]) -> None:
    text = (written / "costs.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert [row[0].removeprefix("| ") for row in rows] == list(costs)
    assert f"{torch.__version__.partition('+')[0]}" in text
    assert "208,074 parameters" in text
    for row, cost in zip(rows, costs.values(), strict=True):
        assert row[6] == f"{cost['parameters'] / 1e6:,.1f} ({cost['expected']['parameters'] / 1e6:,.1f})"
    picture = matplotlib.image.imread(written / "costs.png")
    assert picture.shape[0] > 400
    assert picture[..., :3].std() > 0.05  # not an empty sheet


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(300)
def test_an_engine_that_is_not_installed_is_named_and_left_out(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['deepspeed'] = None\n")
    given = arguments(tmp_path / "costs", "none,zero2")
    done = subprocess.run(
        COMMAND + given, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
        timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "costs" / "costs.json").read_text())
    assert [cost["engine"] for cost in written["engines"]] == ["none"]
    assert "pip install 'brisk-vision[deepspeed]'" in written["left_out"]["zero2"]
    assert "- zero2 is left out: parallelism.strategy: is deepspeed, which is not installed" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_when_every_engine_refuses_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(tmp_path / "costs", "zero3", "algorithms.sam={}")) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("compare_engines: every engine was left out: zero3: algorithms.sam: ")
    assert not (tmp_path / "costs").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("signum", [pytest.param(signal.SIGINT, marks=pytest.mark.exhaustive), signal.SIGTERM])
def test_stopping_it_ends_all_its_processes(tmp_path: Path, signum: signal.Signals) -> None:
    command = COMMAND + arguments(tmp_path / "costs", "ddp")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        ranks = wait_for_ranks(process.pid)
        process.send_signal(signum)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 128 + signum
    assert "Traceback" not in said
    assert "its processes are ended, and nothing is written" in said
    _, alive = psutil.wait_procs(ranks, timeout=20)
    assert not alive
    assert not (tmp_path / "costs").exists()


def wait_for_ranks(pid: int) -> list[psutil.Process]:
    """The two processes that measure, once they run."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        children = psutil.Process(pid).children(recursive=True)
        ranks = [child for child in children if os.getsid(child.pid) == child.pid]
        if len(ranks) == 2:
            return ranks
        time.sleep(0.2)
    raise AssertionError("no ranks were started")


@pytest.mark.parametrize(
    ("engine", "expected"),
    [  # a million weights, AdamW, 4 ranks: by hand
        ("none", (4e6, 4e6, 8e6)),
        ("ddp", (4e6, 4e6, 8e6)),
        ("fsdp", (1e6, 1e6, 2e6)),
        ("zero0", (4e6, 4e6, 8e6)),
        ("zero1", (4e6, 4e6, 3e6)),
        ("zero2", (4e6, 1e6, 3e6)),
        ("zero3", (1e6, 1e6, 3e6)),
    ],
)
def test_formulas(engine: str, expected: tuple[float, float, float]) -> None:
    found = expected_bytes(engine, num_parameters=10**6, state_bytes=8, ranks=4)
    assert tuple(found.values()) == expected


@pytest.mark.parametrize(
    ("optimizer", "state_bytes"),
    [
        ({"name": "sgd", "momentum": 0.0}, 0),
        ({"name": "sgd", "momentum": 0.9}, 4),
        ({"name": "adamw"}, 8),
        ({"name": "decoupled_adamw"}, 8),
    ],
)
def test_state_of_optimizers(optimizer: dict[str, Any], state_bytes: float) -> None:
    from training.recipe import load_recipe

    given = [f"optimizer.{key}={value}" for key, value in optimizer.items()]
    recipe = load_recipe(TINY[1], ["optimizer=null", "optimizer.learning_rate=0.1", *given])
    assert state_bytes_per_parameter(recipe.optimizer) == state_bytes


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--engines", "ddp,zero4"], "'zero4' is none of none, ddp"),
        (["--ranks", "0"], "'0' is not a whole number of at least 1"),
        (["--steps", "two"], "'two' is not a whole number"),
    ],
)
def test_mistakes_on_the_command_line(given: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*TINY, *given])
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


def test_a_batch_that_does_not_divide_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [one.replace("batch_size=64", "batch_size=63") for one in arguments(tmp_path, "ddp")]
    assert main(given) == 2
    assert "is 63 and there are 2 ranks; make it a multiple of 2" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
