"""torch.compile: one graph of ResNet-50 per image size with all algorithms on; kernels of any mode train alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]


class Graphs:
    """A backend that runs what was captured without compiling it, and keeps the image size of every graph."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, graph: Any, inputs: Any) -> Any:
        images = [one for one in inputs if isinstance(one, torch.Tensor) and one.ndim == 4 and one.shape[1] == 3]
        self.sizes.append(int(images[-1].shape[-1]))
        return graph.forward


def test_resnet50_with_all_algorithms_is_one_graph_per_size(device: torch.device) -> None:
    from gpu_runs import fit, make_trainer
    from torch._dynamo.utils import counters

    from algos.framework.registry import names
    from models import registry

    torch._dynamo.reset()
    counters.clear()
    graphs = Graphs()
    torch.manual_seed(0)
    network = registry.find("resnet50")(num_classes=4)
    config = {"backend": graphs, "dynamic": False, "fullgraph": True}  # which raises at the first graph break
    fit(make_trainer(device, network, names(), image_size=64, steps=2, compile_config=config))
    assert not counters["graph_break"], dict(counters["graph_break"])
    # The stages of the example settings, and FixRes's last epoch, which freezes most of the network.
    assert graphs.sizes == [12, 16, 16]


@pytest.mark.usefixtures("no_tf32")
def test_compiled_kernels_train_as_others_do(device: torch.device, digits: Any) -> None:
    from gpu_runs import quiet

    from training.session import train

    torch._dynamo.reset()
    one_size = ("duration.epochs=1", "schedule.warmup_epochs=0", "algorithms.progressive_resizing=null",
                "algorithms.fixres=null", "data.train.image_size=16")  # fmt: skip
    plain = train(digits("run_name=plain", *one_size), say=quiet).history
    compiled = train(digits("run_name=compiled", "compile=true", *one_size), say=quiet).history
    tolerance = 1e-3 if device.type == "cuda" else 1e-4
    np.testing.assert_allclose(compiled.steps["loss"], plain.steps["loss"], atol=tolerance, rtol=0)


@pytest.mark.usefixtures("no_tf32")
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs"])
def test_every_mode_trains_alike_over_sizes_with_two_passes_and_averages(
    device: torch.device, digits: Any, mode: str
) -> None:
    """CUDA graphs with what moves memory: SAM's second pass, EMA's evaluation, FixRes's phase, and all graphs ahead."""
    from gpu_runs import quiet

    from training.session import train

    mode = mode if device.type == "cuda" else "default"  # a CPU has no CUDA graphs, and tunes for minutes
    torch._dynamo.reset()
    stages = "[{epochs: 1, image_size: 12}, {epochs: 2, image_size: 16}]"
    short = ("duration.epochs=3", "schedule.warmup_epochs=0", "algorithms.ema={half_life_steps: 10}",
             f"algorithms.progressive_resizing.stages={stages}",
             "algorithms.fixres={epochs: 1, image_size: 16, learning_rate: 0.02}",
             "algorithms.sam.interval=2")  # fmt: skip
    plain = train(digits("run_name=plain", *short), say=quiet).history
    compiled = train(digits(f"run_name={mode}", f"compile.mode={mode}", *short), say=quiet).history
    # CUDA graphs that read or wrote memory of another pass would be far off at once.
    first = slice(0, 20)
    np.testing.assert_allclose(compiled.steps["loss"][first], plain.steps["loss"][first], atol=1e-3, rtol=0)
    np.testing.assert_allclose(compiled.steps["loss"], plain.steps["loss"], atol=0.2, rtol=0)
