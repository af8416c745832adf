"""Losses and top-1 that are read two steps late: the history, the checkpoints and the messages are what they were."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import Callback, State
from tiny_model import Interrupt, TinyModel
from torch.utils.data import DataLoader, TensorDataset

from training import late
from training.checkpoints import saving
from training.checkpoints.saving import Checkpoints
from training.engines.trainer import StepTrainer
from training.late import STEPS_LATE, LateQueue, LateValue
from training.results.meter import Meter
from training.results.progress import ProgressBar
from training.results.recorder import Recorder

pytestmark = pytest.mark.filterwarnings("ignore:Cannot split tensor of length:UserWarning")

STEPS_PER_EPOCH, EPOCHS = 5, 2


class _Event:
    """In place of a CUDA event."""

    waited = 0

    def synchronize(self) -> None:
        _Event.waited += 1


@pytest.fixture
def all_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of the CPU are late too, as those of a GPU are."""
    monkeypatch.setattr(late, "_LATE_DEVICES", {"cpu"})
    monkeypatch.setattr(late, "_end_of_work", lambda device: _Event())


class StateAtEverySave(Callback):
    """The recorder's state whenever a checkpoint would hold it: at the given steps, and at epochs' ends."""

    def __init__(self, recorder: Recorder, steps: Iterable[int]) -> None:
        self.recorder, self.steps = recorder, set(steps)
        self.found: list[dict[str, Any]] = []

    def batch_checkpoint(self, state: State, logger: Any) -> None:
        if int(state.timestamp.batch) in self.steps:
            self.found.append(self.recorder.state_dict())

    def epoch_checkpoint(self, state: State, logger: Any) -> None:
        self.found.append(self.recorder.state_dict())


def make_trainer(callbacks: list[Callback], *, load_path: Path | None = None) -> StepTrainer:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(8 * STEPS_PER_EPOCH - 4, 6, generator=generator)  # the last batch is half of one
    data = TensorDataset(images, torch.randint(0, 3, (len(images),), generator=generator))
    model = TinyModel()
    return StepTrainer(
        drop_last=False,
        model=model,
        train_dataloader=DataLoader(data, batch_size=8),
        eval_dataloader=DataLoader(data, batch_size=16),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        max_duration=f"{EPOCHS}ep",
        device="cpu",
        seed=1,
        callbacks=callbacks,
        load_path=None if load_path is None else str(load_path),
        progress_bar=False,
        log_to_console=False,
    )


def a_tick_a_question() -> Callable[[], float]:
    """A clock that advances by a second each time it is asked."""
    ticks = itertools.count()
    return lambda: float(next(ticks))


def run(folder: Path, steps: Iterable[int]) -> tuple[list[dict[str, Any]], str]:
    """The recorder's states, and metrics.csv, of a run whose clock ticks a second at each question."""
    recorder = Recorder(folder, clock=a_tick_a_question())
    states = StateAtEverySave(recorder, steps)
    folder.mkdir()
    trainer = make_trainer([recorder, states])
    trainer.fit()
    trainer.close()
    return states.found, (folder / "metrics.csv").read_text()


@pytest.mark.parametrize("steps", [range(1, 11), [3], []])
def test_history_and_checkpoints_are_those_of_reading_at_once(
    steps: Iterable[int], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    at_once = run(tmp_path / "at_once", steps)
    request.getfixturevalue("all_late")
    assert run(tmp_path / "late", steps) == at_once
    assert len(at_once[0][-1]["steps"]["loss"]) == STEPS_PER_EPOCH * EPOCHS


def test_a_run_killed_between_two_readings_resumes_its_history(tmp_path: Path, all_late: None) -> None:
    whole = Recorder()
    make_trainer([whole]).fit()
    stopped = make_trainer([Recorder(), Checkpoints(tmp_path, every_steps=4, keep_best=False), Interrupt(after_step=4)])
    with pytest.raises(KeyboardInterrupt):
        stopped.fit()
    stopped.close()
    resumed = Recorder()
    make_trainer([resumed], load_path=tmp_path / "latest.pt").fit()
    assert resumed.history.steps == whole.history.steps
    times = ("images_per_second", "train_seconds", "data_wait_share")
    for row, expected in zip(resumed.history.epochs, whole.history.epochs, strict=True):
        assert {k: v for k, v in row.items() if k not in times} == {k: v for k, v in expected.items() if k not in times}


def test_nothing_is_read_before_its_time(all_late: None) -> None:
    queue: LateQueue[int] = LateQueue()
    _Event.waited = 0
    values = [LateValue(torch.tensor(float(step))) for step in range(5)]
    due = []
    for step, value in enumerate(values):
        queue.put(step, value)
        due.append(list(queue.take_due()))
    assert due == [[], [], [0], [1], [2]]
    assert STEPS_LATE == 2
    assert not any(value.is_known for value in values)
    assert _Event.waited == 0
    assert [float(value) for value in values] == [0, 1, 2, 3, 4]
    assert _Event.waited == 5
    assert float(values[0]) == 0
    assert _Event.waited == 5, "a value is waited for once"
    assert list(queue.take_all()) == [3, 4]


def test_a_value_that_another_has_read_stays_in_the_queue(all_late: None) -> None:
    queue: LateQueue[int] = LateQueue()
    value = LateValue(torch.tensor(1.0))
    queue.put(1, value)
    float(value)
    assert list(queue.take_due()) == [], "on another rank nobody has read it"


def test_a_value_is_that_of_its_moment(all_late: None) -> None:
    tensor = torch.tensor([1.0, 2.0])
    value = LateValue(tensor, divisor=2)
    tensor.zero_()
    assert value.values == [0.5, 1.0]


def test_on_a_cpu_nothing_is_late() -> None:
    queue: LateQueue[int] = LateQueue()
    queue.put(1, LateValue(torch.tensor(1.0)), 2.0, None)
    assert list(queue.take_due()) == [1]


def test_the_meters_mean_is_over_all_images(all_late: None) -> None:
    class Loss(Callback):
        def __init__(self) -> None:
            self.meter, self.expected = Meter(), 0.0

        def fit_start(self, state: State, logger: Any) -> None:
            self.meter.fit_start(state)

        def batch_end(self, state: State, logger: Any) -> None:
            self.meter.batch_end(state)
            self.expected += float(state.total_loss_dict["loss/train/total"]) * len(state.batch[1])

    loss = Loss()
    trainer = make_trainer([loss])
    trainer.fit()
    assert loss.meter.mean_loss() == loss.expected / (36 * EPOCHS)
    assert loss.meter.take().images == 36 * EPOCHS
    assert loss.meter.mean_loss() is None


def test_ranks_hear_of_a_signal_two_steps_late_and_save_once(
    all_late: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class State_:
        class device:
            tensor_to_device = staticmethod(lambda tensor: tensor)

    monkeypatch.setattr(saving.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(saving.dist, "all_reduce", lambda tensor, reduce_operation: None)
    checkpoints = Checkpoints(tmp_path, every_minutes=1e-9)
    checkpoints._signals.received = 0
    state: Any = State_()
    asked = [checkpoints._ask_all_ranks(state) for _ in range(2)]
    checkpoints._signals.received = 15
    asked += [checkpoints._ask_all_ranks(state) for _ in range(3)]
    assert asked == [(0, False), (0, False), (0, True), (0, True), (15, True)]


def test_the_progress_bar_draws_without_waiting(all_late: None) -> None:
    screen = io.StringIO()
    _Event.waited = 0
    drawn: list[tuple[str, int]] = []

    class Watch(Callback):
        def batch_end(self, state: State, logger: Any) -> None:
            drawn.append((screen.getvalue(), _Event.waited))

    bar = ProgressBar(total_epochs=EPOCHS, enabled=True, stream=screen, clock=a_tick_a_question())
    make_trainer([bar, Watch()]).fit()
    assert [waited for _, waited in drawn[:4]] == [0, 0, 1, 2], "those that are two steps old"
    assert "loss" not in drawn[1][0]
    assert "loss" in drawn[2][0]
