"""torch.compile: one graph of ResNet-50 per image size with all algorithms on; kernels of any mode train alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]


class Graphs:
    """A backend that runs what was captured without compiling it, and keeps what every graph is given."""

    def __init__(self) -> None:
        self.found: list[tuple[int, int, bool]] = []  # images, their size, whether gradients are taken

    def __call__(self, graph: Any, inputs: Any) -> Any:
        images = [one for one in inputs if isinstance(one, torch.Tensor) and one.ndim == 4 and one.shape[1] == 3]
        self.found.append((int(images[-1].shape[0]), int(images[-1].shape[-1]), torch.is_grad_enabled()))
        return graph.forward


def test_resnet50_with_all_algorithms_is_one_graph_per_size_and_phase(device: torch.device) -> None:
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
    # The stages of the example settings, the second one with steps that select half of a batch by its losses; and
    # FixRes's last epoch, which freezes most of the network and begins with such a step. The teacher is not compiled.
    selecting = [(4, 16, False), (2, 16, True), (4, 16, True)]
    assert graphs.found == [(8, 12, True), *selecting, *selecting]


@pytest.mark.usefixtures("no_tf32")
def test_compiled_kernels_train_as_others_do(device: torch.device, digits: Any) -> None:
    from resumed_runs import quiet

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
    from resumed_runs import quiet

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
