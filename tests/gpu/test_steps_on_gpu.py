"""A training step in mid-epoch does nothing for which CUDA would make the host wait: torch itself raises if it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(180)]
# Everything that acts in the steps of a run, without the algorithms that `digits` has on already.
MORE = ("algorithms.ema={half_life_steps: 4}", "algorithms.cutmix={alpha: 1.0}", "algorithms.randaugment={num_ops: 2}")


@pytest.mark.parametrize("more", [(), MORE, ("precision=amp_bf16",), ("optimizer.clip_norm=1.0",)])
def test_steps_do_not_wait(more: tuple[str, ...], digits: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from composer.core import Callback
    from resumed_runs import quiet

    from training import session
    from training.engines import composer as engine

    on_gpu = torch.cuda.is_available()

    class Strict(Callback):
        """Has torch raise for a wait in the steps that do not begin an epoch. List it before all others."""

        steps = 0

        def before_dataloader(self, state: Any, logger: Any) -> None:
            if int(state.timestamp.batch_in_epoch) >= 2:
                self.steps += 1
                _set_mode("error")

        def epoch_end(self, state: Any, logger: Any) -> None:
            _set_mode("default")

        def close(self, state: Any, logger: Any) -> None:
            _set_mode("default")

    def _set_mode(mode: str) -> None:
        if on_gpu:
            torch.cuda.set_sync_debug_mode(mode)

    strict = Strict()
    build = engine.build_callbacks
    monkeypatch.setattr(engine, "build_callbacks", lambda *given, **named: [strict, *build(*given, **named)])
    given_here = more if on_gpu else tuple(one for one in more if not one.startswith("precision"))
    result = session.train(digits("run_name=strict", *given_here), say=quiet)
    assert strict.steps > 20
    assert all(loss is not None for loss in result.history.steps["loss"])
