"""Short runs that are compiled, with a note of every graph: for test_compiling.py, and as ranks of it.

`python compiled_runs.py FOLDER OVERRIDE ...` trains ahead=false and then ahead=true, as one of the ranks that RANK,
WORLD_SIZE ... say, and writes FOLDER/RANK.json: the graphs, and the reasons of graph breaks.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from torch._dynamo.utils import counters

from training import session
from training.engines import compiling, composer
from training.recipe import load_recipe

DIGITS = Path(__file__).parents[3] / "yamls" / "digits_medium.yaml"
# Every speed-up but a teacher. Two sizes, in two microbatches a step, of which some steps select from the second epoch
# on; then the last layers alone. Evaluation is in batches that are not all of one size.
EVERYTHING = (
    "duration.epochs=4", "schedule.warmup_epochs=0", "logging.progress_bar=false",
    "data.train.loader=torch", "data.train.num_workers=0", "data.eval.loader=torch", "data.eval.num_workers=0",
    "data.eval.image_size=12", "data.eval.per_device_batch_size=200",
    "data.train.global_batch_size=480",
    "algorithms.progressive_resizing.stages=[{epochs: 1, image_size: 8}, {epochs: 3, image_size: 12}]",
    "algorithms.fixres={epochs: 2, image_size: 12, learning_rate: 0.02}", "algorithms.ema={half_life_steps: 4}",
    "algorithms.selective_backprop={start: 0.3, end: 1.0, interval: 3}",
    "algorithms.stochastic_depth={drop_rate: 0.2}", "algorithms.randaugment={}", "algorithms.sam.interval=2",
    "algorithms.blurpool.min_channels=3", "model.width=4",
)  # fmt: skip


class Graphs(Callback):
    """A backend that runs what was captured as it is, and notes the images of every graph and when it was captured."""

    def __init__(self) -> None:
        self.found: list[list[Any]] = []
        self._now = "ahead"

    def __call__(self, graph: Any, inputs: Any) -> Any:
        shapes = [list(one.shape) for one in inputs if isinstance(one, torch.Tensor)]
        self.found.append(
            [self._now, *(shape for shape in shapes if len(shape) == 4 and shape[1] == 3 and shape[-1] >= 8)]
        )
        return graph.forward

    def epoch_start(self, state: State, logger: Logger) -> None:
        self._now = f"epoch {state.timestamp.epoch.value}"

    def eval_start(self, state: State, logger: Logger) -> None:
        self._now = "evaluation"


def train_noting_graphs(folder: Path, run_name: str, *overrides: str) -> tuple[list[list[Any]], list[str]]:
    """Train the digits with `overrides`, compiled by torch's front alone. Returns the graphs, and what broke them."""
    torch._dynamo.reset()
    counters.clear()
    graphs, build_callbacks = Graphs(), composer.build_callbacks
    common = ("compile=true", f"run_name={run_name}", f"results_dir={folder}", f"data.cache_dir={folder / 'cache'}")
    given = {one.partition("=")[0]: one for one in (*EVERYTHING, *common, *overrides)}
    recipe = load_recipe(DIGITS, list(given.values()))

    def with_graphs(*arguments: Any, **settings: Any) -> list[Callback]:
        return [graphs, *build_callbacks(*arguments, **settings)]

    with (
        mock.patch.object(compiling, "torch_settings", return_value={"dynamic": False, "backend": graphs}),
        mock.patch.object(composer, "build_callbacks", with_graphs),
    ):
        session.train(recipe, say=lambda text: None)
    return graphs.found, [str(reason) for reason in counters["graph_break"]]


if __name__ == "__main__":
    given, results = Path(sys.argv[1]), {}
    for name, ahead in (("lazily", "false"), ("ahead", "true")):
        results[name] = train_noting_graphs(given, name, f"compile.ahead={ahead}", *sys.argv[2:])
    (given / f"{os.environ['RANK']}.json").write_text(json.dumps(results))
