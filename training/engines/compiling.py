"""torch.compile for a run: few graphs, all of them before the first step, and their kernels kept for the next start.

See docs/compile.md for what is compiled when, and what it costs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer import Trainer
from composer.utils import dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from algos.fixres import FixRes, briefly_frozen, hold_frozen_statistics
from algos.framework.base import precision_context
from algos.framework.randomness import microbatch_draws
from algos.patch_dropout import keeping_patches
from training.planning import Plan
from training.planning.graphs import Graph, graphs_of, images_of_evaluation, shapes_of_selection
from training.recipe.compiling import CUDA_GRAPH_MODES

log = logging.getLogger(__name__)

_CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
_AUTOGRAD_CACHE = "enable_autograd_cache"
_OTHERS_MAY_WRITE = 0o022
_RECORDING_PASSES = 3  # CUDA graphs are recorded in the second pass of a graph, and replayed from the third
_MOST_GRAPHS = 64


def compile_network(network: nn.Module, plan: Plan) -> None:
    """Have `network` run compiled, in training and evaluation; names in its state dict stay. In place."""
    assert plan.recipe.compile is not None
    # Stages, an epoch's last batch and evaluation make more graphs than the default limit of eight, beyond which torch
    # runs uncompiled.
    torch._dynamo.config.cache_size_limit = _MOST_GRAPHS
    on_gpu = plan.place.device == "gpu"
    network.forward = _CompiledForward(  # pyright: ignore[reportAttributeAccessIssue]
        network,
        torch.compile(_with_key(network.forward), **torch_settings(plan)),
        original=network.forward,
        evaluation_images=images_of_evaluation(plan),
        as_they_are=shapes_of_selection(plan, rank=dist.get_global_rank()),
        keeps_outputs=on_gpu and plan.recipe.compile.mode in CUDA_GRAPH_MODES,
    )


def torch_settings(plan: Plan) -> dict[str, Any]:
    """The arguments of torch.compile."""
    assert plan.recipe.compile is not None
    # One set of kernels per shape: dynamic shapes give slower kernels, and can fail at the second image size.
    return {"dynamic": False, "mode": plan.recipe.compile.mode}


def compile_ahead(trainer: Trainer, plan: Plan, say: Callable[[str], None]) -> None:
    """Compile every graph that the rest of the run takes, on all ranks together; call this before fitting `trainer`.

    Each takes a forward and, in training, a backward pass over images of zeros. Weights, buffers, gradients and random
    states are as before afterwards, and nothing else of the run has moved: what is trained is the same, to the bit.
    """
    settings = plan.recipe.compile
    if settings is None or not settings.ahead or plan.recipe.data.train.per_device_microbatch_size == "auto":
        return
    graphs = graphs_of(plan, rank=dist.get_global_rank(), first_epoch=trainer.state.timestamp.epoch.value)
    passes = _RECORDING_PASSES if plan.place.device == "gpu" and settings.mode in CUDA_GRAPH_MODES else 1
    started, loaded = time.monotonic(), 0
    with _unchanged(trainer):
        for index, graph in enumerate(graphs):
            say(f"compiling {index + 1} of {len(graphs)}: {graph}{_time_left(started, index, len(graphs))}")
            before = _cache_hits_and_misses()
            for _ in range(passes):
                _run(trainer, graph)
            hits, misses = (now - then for now, then in zip(_cache_hits_and_misses(), before, strict=True))
            loaded += hits > 0 and not misses
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # of shapes that are far from the first stage's
    say(
        f"compiled {len(graphs)} graphs in {time.monotonic() - started:.0f} s, "
        f"{loaded} from the cache{_size_of_cache()}"
    )


def keep_kernels(folder: Path) -> None:
    """Have torch's compiler keep its kernels in `folder`, unless the environment names another; see docs/compile.md.

    The next run loads and executes what lies there, so a folder that others can write to is not used.
    """
    given = os.environ.get(_CACHE_VARIABLE)
    if given is not None and not _is_torchs_own(given):
        return
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        log.warning("compiled kernels are not kept: %s: %s; choose data.cache_dir=DIR", folder, error.strerror)
        return
    if status.st_uid != os.getuid() or status.st_mode & _OTHERS_MAY_WRITE:
        log.warning(
            "compiled kernels are not kept: %s holds code that a run executes, and other users can write there; remove "
            "it, or choose data.cache_dir=DIR",
            folder,
        )
        return
    os.environ[_CACHE_VARIABLE] = str(folder.resolve())  # for this process's children too
    for module, name in (("torch._inductor.config", "fx_graph_cache"), ("torch._functorch.config", _AUTOGRAD_CACHE)):
        config = import_module(module)
        if hasattr(config, name):
            setattr(config, name, True)  # off by default in torch 2.6


def _with_key(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor, str], Tensor]:
    # torch takes a graph only if all arguments that are no tensors are as when it was made.
    def forward_with_key(images: Tensor, key: str) -> Tensor:
        return forward(images)

    return forward_with_key


class _CompiledForward:
    """Calls the compiled forward pass of a network so that there are few graphs.

    Training: there is a graph for each set of trained parameters, whose backward pass leaves out the others. torch 2.7
    does not notice every change of requires_grad, so the key of a graph has it.
    Evaluation: a smaller last batch is filled up with zeros, and frozen parameters pass for trained ones, of which
    torch would make another graph. Without gradients that changes no result. Passes that find the losses of samples
    are of the shapes `as_they_are`, (images, px), which are not filled up.
    Everywhere: images are channels-last in memory, as the loaders deliver them, whatever algorithms made of them.
    """

    def __init__(
        self,
        network: nn.Module,
        compiled: Callable[[Tensor, str], Tensor],
        *,
        original: Callable[[Tensor], Tensor],
        evaluation_images: int,
        as_they_are: frozenset[tuple[int, int]],
        keeps_outputs: bool,
    ) -> None:
        self._network, self._compiled = network, compiled
        self.original = original  # for passes of which there is no graph
        self._parameters = list(network.parameters())
        self._evaluation_images, self._as_they_are = evaluation_images, as_they_are
        self._keeps_outputs = keeps_outputs  # CUDA graphs write the next outputs over them

    def __call__(self, images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)
        if self._keeps_outputs:
            torch.compiler.cudagraph_mark_step_begin()
        evaluates = not self._network.training and not torch.is_grad_enabled()
        outputs = self._evaluate(images) if evaluates else self._train(images)
        return outputs.clone() if self._keeps_outputs else outputs

    def _train(self, images: Tensor) -> Tensor:
        trained = "".join("01"[one.requires_grad] for one in self._parameters)
        if "0" in trained:
            hold_frozen_statistics(self._network)
        return self._compiled(images, trained)

    def _evaluate(self, images: Tensor) -> Tensor:
        missing = self._evaluation_images - len(images)
        if missing > 0 and (len(images), images.shape[-1]) not in self._as_they_are:
            padded = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
            padded = padded.contiguous(memory_format=torch.channels_last)
            return self._evaluate(padded)[: len(images)]
        with _all_trained(self._network):
            return self._compiled(images, "evaluation")


@contextlib.contextmanager
def _all_trained(network: nn.Module) -> Iterator[None]:
    frozen = [one for one in network.parameters() if not one.requires_grad and one.is_floating_point()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


# --- ahead of the run ----------------------------------------------------------------------------------------------


def _run(trainer: Trainer, graph: Graph) -> None:
    model, state = trainer._original_model, trainer.state
    device = next(state.model.parameters()).device
    shape = (graph.images, 3, graph.image_size, graph.image_size)
    images = torch.zeros(shape, device=device).contiguous(memory_format=torch.channels_last)
    batch = (images, torch.zeros(graph.images, dtype=torch.long, device=device))
    if not graph.training:
        state.model.eval()
        with torch.no_grad(), precision_context(state):
            model.eval_forward(batch)
        return
    fixres = next((one for one in state.algorithms if isinstance(one, FixRes)), None)
    frozen = briefly_frozen(model, train=fixres.train) if graph.frozen and fixres else contextlib.nullcontext()
    keeping = keeping_patches(model, graph.keep_rate)
    with frozen, keeping, _draws(model, images), _no_sync(state.model):
        state.model.train()
        with precision_context(state):
            loss: Any = model.loss(state.model(batch), batch)
        loss.backward()
    state.model.zero_grad(set_to_none=True)


@contextlib.contextmanager
def _unchanged(trainer: Trainer) -> Iterator[None]:
    """On exit, restores buffers, random states, gradients and training mode from entry."""
    model = trainer.state.model
    buffers, training = list(model.buffers()), model.training
    before = [buffer.detach().clone() for buffer in buffers]
    states, device = _random_states(), next(model.parameters()).device
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
        model.zero_grad(set_to_none=True)
        model.train(training)
        _restore_random_states(states, device)


def _random_states() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def _restore_random_states(states: dict[str, Any], device: torch.device) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"], device if device.type == "cuda" else "cuda")
    if states["mps"] is not None:
        torch.mps.set_rng_state(states["mps"])


@contextlib.contextmanager
def _draws(model: nn.Module, images: Tensor) -> Iterator[None]:
    """Draws for random layers of the kind that the algorithms give them."""
    found = microbatch_draws(model)
    for draws in found:
        draws.of_rows = draws.example(images)
    try:
        yield
    finally:
        for draws in found:
            draws.of_rows = None


def _no_sync(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    # DDP arranges its buckets by the first gradients that it averages; these are to be the run's own.
    return model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()


# --- what is told --------------------------------------------------------------------------------------------------


def _time_left(started: float, done: int, total: int) -> str:
    if not done:
        return ""
    seconds = (time.monotonic() - started) / done * (total - done)
    return f", about {seconds / 60:.0f} min left" if seconds >= 90 else f", about {seconds:.0f} s left"


def _cache_hits_and_misses() -> tuple[int, int]:
    """Forward and backward passes that this process has loaded, and those that it has compiled."""
    from torch._dynamo.utils import counters

    found = counters["inductor"]
    return found["fxgraph_cache_hit"], found["fxgraph_cache_miss"] + found["fxgraph_cache_bypass"]


def _size_of_cache() -> str:
    folder = os.environ.get(_CACHE_VARIABLE)
    if folder is None or _is_torchs_own(folder):  # which holds kernels of everything that this user compiles
        return ""
    return f"; kernels are kept in {folder}, {_bytes(Path(folder)) / 1e6:.0f} MB"


def _is_torchs_own(folder: str) -> bool:
    """Whether `folder` is torch's default, to which it sets the variable when it is first asked."""
    path = Path(folder)
    return path.name.startswith("torchinductor_") and path.parent == Path(tempfile.gettempdir()).absolute()


def _bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # replaced meanwhile
            total += path.stat().st_size
    return total
