"""A resumed run on a GPU is the run that was not interrupted, bit for bit, with deterministic algorithms on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(180)]


def flat_state(run_dir: Any) -> dict[str, Any]:
    """Weights and optimizer state of a run's last checkpoint."""
    state = torch.load(run_dir / "checkpoints" / "latest.pt", weights_only=False, map_location="cpu")["state"]
    return dict(_flatten({"model": state["model"], "optimizers": state["optimizers"]}))


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flatten(item, f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _flatten(item, f"{path}/{index}")
    else:
        yield path, value


def train(recipe: Any, *, stop_after: int | None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Train; stopped after so many steps, if given. Returns the run's folder."""
    from gpu_runs import quiet
    from tiny_model import Interrupt

    from training import session
    from training.engines import composer as engine

    with monkeypatch.context() as patched:
        if stop_after is not None:
            build = engine.build_callbacks
            interrupt = Interrupt(after_step=stop_after)
            patched.setattr(engine, "build_callbacks", lambda *given, **named: [*build(*given, **named), interrupt])
            with pytest.raises(KeyboardInterrupt):
                session.train(recipe, say=quiet)
        else:
            session.train(recipe, say=quiet)
    return recipe.run_dir


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("precision", ["fp32", "amp_fp16"])
def test_resuming_is_exact(precision: str, device: Any, digits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    precision = precision if device.type == "cuda" else "fp32"
    common = (f"precision={precision}", "checkpoints.every_steps=1")
    whole = train(digits("run_name=whole", *common), stop_after=None, monkeypatch=monkeypatch)
    again = train(digits("run_name=again", *common), stop_after=None, monkeypatch=monkeypatch)
    _assert_same(flat_state(again), flat_state(whole))  # otherwise there is nothing that a resumed run could equal
    train(digits("run_name=resumed", *common), stop_after=29, monkeypatch=monkeypatch)  # within the second epoch
    torch.manual_seed(99)
    resumed = train(digits("run_name=resumed", "load=latest", *common), stop_after=None, monkeypatch=monkeypatch)
    _assert_same(flat_state(resumed), flat_state(whole))


def _assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for path, value in one.items():
        equal = torch.equal(value, other[path]) if isinstance(value, torch.Tensor) else value == other[path]
        assert equal, f"{path} differs"
