"""What the command lines beside run.py share: options, one line for a mistake, ranks."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from training.composer_shim import describe_missing, quiet_composer

_JOIN_TIMEOUT_SECONDS = 1800.0  # torch's own for gloo


def add_judging_options(parser: argparse.ArgumentParser) -> None:
    """The options of the commands that ask a network for its answers."""
    add_run(parser)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "gpu", "mps"), help="default: auto")
    parser.add_argument("--flip", action="store_true", help="average the logits of each image and its mirror image")


def add_run(parser: argparse.ArgumentParser) -> None:
    """The run that a command is about, and whether its checkpoint is trusted."""
    parser.add_argument("run", metavar="RUN", help="a run's folder, or one of its checkpoints")
    parser.add_argument(
        "--trust-checkpoint", action="store_true", help="read a checkpoint that names code, and run what it says"
    )


def positive(text: str) -> int:
    """An argument that must be a whole number, 1 or more."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"is {text!r}; it must be a whole number, 1 or more")
    return value


def carry_out(program: str, work: Callable[[], int]) -> int:
    """The exit status of `work`: 2 and one line on stderr for a user's mistake, 130 for Ctrl-C."""
    quiet_composer()
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")  # Pillow's; such an image is refused
    try:
        return work()
    except KeyboardInterrupt:
        return complain(program, "stopped; files that were complete are kept", status=130)
    except ModuleNotFoundError as error:
        return complain(program, describe_missing(error))
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:  # a RecipeError is a ValueError
        return complain(program, " ".join(str(error).split()))


@contextmanager
def joined_ranks(world_size: int, device: str) -> Iterator[None]:
    """Joins the ranks that a launcher started, for the exchange of results through the CPU."""
    if world_size == 1:
        yield
        return
    import torch

    from training.loopback import join_ranks  # imports torch

    if "OMP_NUM_THREADS" not in os.environ:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks_here))
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    join_ranks("gloo", timeout_seconds=_JOIN_TIMEOUT_SECONDS)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def device_here(asked: str) -> str:
    """torch's name of the device. asked: auto, cpu, gpu or mps. Raises ValueError if this machine lacks it."""
    import torch

    present = {"gpu": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked == "auto":
        asked = next(name for name, there in present.items() if there)
    if not present[asked]:
        here = ", ".join(name for name, there in present.items() if there)
        raise ValueError(f"--device is {asked}, which this machine does not have; here: {here}, or auto")
    return {"gpu": "cuda", "mps": "mps", "cpu": "cpu"}[asked]


def complain(program: str, text: str, *, status: int = 2) -> int:
    """Say on stderr, once for all ranks, what went wrong; returns `status`."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{program}: {text}", file=sys.stderr, flush=True)
    return status
