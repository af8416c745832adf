"""run.py with a fault: python tests/faults/faulty_run.py EVENT:COUNT:WHAT[:RANK] -f RECIPE ...

At the COUNT-th EVENT of Composer's, on rank RANK or on each. WHAT: a signal's name sends it to this process, `hang`
sleeps for a minute, `nan` makes a weight's gradient nan, `uploaded` waits until all checkpoints are at the remote;
several are joined by +.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from composer.core import Callback
from composer.utils import dist

from training import callbacks, cli
from training.checkpoints.saving import Checkpoints
from training.engines import composer

EVENT, COUNT, WHAT, *RANK = sys.argv[1].split(":")
HANG_SECONDS = 60


class Fault(Callback):
    """Listed first, so that the fault is there before any other callback sees the event."""

    def __init__(self) -> None:
        self.count = 0
        setattr(self, EVENT, self.at_event)

    def at_event(self, state: Any, logger: Any) -> None:
        self.count += 1
        if self.count != int(COUNT) or (RANK and int(RANK[0]) != dist.get_global_rank()):
            return
        for one in WHAT.split("+"):
            if one == "hang":
                time.sleep(HANG_SECONDS)
            elif one == "nan":
                gradient = next(p.grad for p in state.model.parameters() if p.grad is not None)
                gradient[(0,) * gradient.dim()] = float("nan")
            elif one == "uploaded":
                wait_for_uploads(state)
            else:
                os.kill(os.getpid(), getattr(signal, one))


def wait_for_uploads(state: Any) -> None:
    checkpoints = next(one for one in state.callbacks if isinstance(one, Checkpoints))
    checkpoints._background.wait()
    checkpoints._finish_uploads(60)


if __name__ == "__main__":
    build = callbacks.build_callbacks
    composer.build_callbacks = lambda *given, **named: [Fault(), *build(*given, **named)]
    sys.exit(cli.main(sys.argv[2:]))
