"""The benchmark for a GPU on a GPU: memory, kernels and out of memory, which a CPU cannot show."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(170)]


def measured(device: torch.device, *cases: Any) -> Any:
    """The runner that measured `cases` in one group, and holds their steps."""
    from benchmarks.gpu_step.plan import Group
    from benchmarks.gpu_step.running import Budget, Runner

    runner = Runner(device, Budget(None), lambda line: None, backend="aot_eager", rounds=2)
    runner.run([Group("a test", cases, 2), Group("the same", cases[:1], 1)])
    return runner


def case(device: torch.device, **changes: Any) -> Any:
    """A step of ResNet-50; on the CPU one of a small network in 32 bits, since 16 take minutes there."""
    from benchmarks.gpu_step.plan import Case

    if device.type == "cpu":
        changes |= {"network": "resnet_digits", "image_size": 8, "precision": "fp32"}
    return Case(**{"network": "resnet50", "image_size": 64, "batch_size": 8, "precision": "bf16", **changes})


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_step_is_measured(precision: str, device: torch.device) -> None:
    runner = measured(device, case(device, precision=precision), case(device, precision=precision, compiled=True))
    for result in runner.results[0]:
        assert (result.status, result.note) == ("measured", "")
        assert len(result.times_ms) == 2
        assert min(result.times_ms) > 0
        if device.type == "cuda":
            # ResNet-50's weights and their momentum in fp32, and not the other variant's beside them.
            assert 2 * 4 * 25e6 < result.peak_bytes < 2e9


def test_the_profile_has_convolutions_and_norms(device: torch.device) -> None:
    from benchmarks.gpu_step.plan import Group
    from benchmarks.gpu_step.profiling import profile_step
    from benchmarks.gpu_step.running import Budget, Runner

    runner = Runner(device, Budget(None), lambda line: None, rounds=1)
    profiles = []

    def after_group(index: int) -> None:
        step = runner.step(case(device))
        assert step is not None
        profiles.append(profile_step(step, device))

    runner.run([Group("a test", (case(device),), 1)], after_group=after_group)
    found = {row["group"]: row for row in profiles[0]["groups"]}
    for group in ("convolution", "norm", "optimizer"):
        assert found[group]["us"] > 0, [row["name"] for row in profiles[0]["top"]]
    assert found["others"]["share"] < 0.3, [row["name"] for row in profiles[0]["top"]]
    assert len(profiles[0]["top"]) == 10


@pytest.mark.usefixtures("only_on_gpu")
def test_a_step_without_memory_leaves_the_others_theirs(device: torch.device) -> None:
    memory = torch.cuda.get_device_properties(device).total_memory
    images = memory // (3 * 64 * 64 * 4) // 2  # half of it for the batch, which the activations then exceed
    runner = measured(device, case(device), case(device, batch_size=images))
    assert [result.status for result in runner.results[0]] == ["measured", "out of memory"]
    assert runner.results[1][0].status == "measured"
    assert torch.cuda.memory_allocated(device) < memory // 4


def test_the_peaks_of_the_machine(device: torch.device) -> None:
    from benchmarks.gpu_step.machine import measure_machine

    found = measure_machine(device, ["bf16", "fp16"] if device.type == "cuda" else ["fp32"], seconds=0.02)
    assert all(flops > 1e9 for flops in found["flops"].values())
    assert found["bytes_per_second"] > 1e8
