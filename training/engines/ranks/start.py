"""Joins the ranks of a run, and divides the CPU's threads among them."""

from __future__ import annotations

import os
import warnings

import torch
from composer.utils import dist, get_device
from torch import distributed

from training.engines.parallel import check_parallelism
from training.loopback import join_ranks
from training.planning import Place
from training.recipe import Recipe

_DIST_TIMEOUT_SECONDS = 600.0


def start_distributed(recipe: Recipe, place: Place) -> None:
    """Join the ranks of the run. Raises RecipeError if the recipe's engine cannot run on them."""
    check_parallelism(recipe, place)
    device = get_device(place.device)
    if dist.get_world_size() > 1 and not distributed.is_initialized():
        join_ranks(device.dist_backend, timeout_seconds=_DIST_TIMEOUT_SECONDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Composer warns about a single process's default settings
        dist.initialize_dist(device, timeout=_DIST_TIMEOUT_SECONDS)
    if place.device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # Otherwise every rank starts one thread per core, and the ranks' threads contend: measured 50 times slower.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // dist.get_local_world_size()))
