"""Checkpoints: complete at any moment, the right ones kept, and a resumed run equal to one that never stopped."""

from __future__ import annotations

import operator
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from composer import Evaluator, Trainer
from composer.core import Callback
from composer.utils import checkpoint, dist
from ranks import run_python
from tiny_model import Interrupt, TinyModel
from torch.utils.data import DataLoader, TensorDataset

from training.checkpoints import saving
from training.checkpoints.names import newest_first
from training.checkpoints.saving import Checkpoints
from training.results.recorder import Recorder

pytestmark = pytest.mark.timeout(120)

BATCHES_PER_EPOCH = 4


class FakedTop1(Callback):
    """Overwrites the evaluated top-1 by a given sequence, listed before the callbacks that read it."""

    def __init__(self, values: list[float]) -> None:
        self.values = list(values)

    def eval_end(self, state, logger):
        state.eval_metrics["eval"]["top1"]._computed = torch.tensor(self.values.pop(0))


def make_trainer(*, callbacks, epochs: int = 3, load_path=None, eval_interval: str = "1ep") -> Trainer:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(BATCHES_PER_EPOCH * 8, 6, generator=generator)
    targets = torch.randint(0, 3, (len(images),), generator=generator)
    data = TensorDataset(images, targets)
    model = TinyModel()
    return Trainer(
        model=model,
        train_dataloader=DataLoader(data, batch_size=8, sampler=dist.get_sampler(data, shuffle=True)),
        eval_dataloader=Evaluator(
            label="eval",
            dataloader=DataLoader(data, batch_size=16, sampler=dist.get_sampler(data)),
            eval_interval=eval_interval,
        ),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        max_duration=f"{epochs}ep",
        device="cpu",
        seed=1,
        callbacks=callbacks,
        load_path=None if load_path is None else str(load_path),
        progress_bar=False,
        log_to_console=False,
    )


def train(**settings) -> Trainer:
    trainer = make_trainer(**settings)
    trainer.fit()
    trainer.close()
    return trainer


def load(path: Path) -> dict:
    return torch.load(path, weights_only=False)["state"]


def saved_step(path: Path) -> int:
    return int(load(path)["timestamp"]["Timestamp"]["batch"])


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.state.model.parameters()])


class TestResume:
    @pytest.mark.parametrize("stop_after", [6, 8, 11])  # within an epoch, at its end, before its last step
    def test_a_resumed_run_ends_where_an_uninterrupted_one_does(self, tmp_path, stop_after):
        whole = Recorder()
        expected = train(callbacks=[whole, Checkpoints(tmp_path / "whole", every_steps=1)])

        folder = tmp_path / "resumed"
        with pytest.raises(KeyboardInterrupt):
            train(callbacks=[Recorder(), Checkpoints(folder, every_steps=1), Interrupt(after_step=stop_after)])
        assert saved_step(folder / "latest.pt") == stop_after
        recorder = Recorder()
        resumed = train(callbacks=[recorder, Checkpoints(folder, every_steps=1)], load_path=newest_first(folder)[0])

        assert torch.equal(weights(resumed), weights(expected))
        assert recorder.history.steps == whole.history.steps

    def test_the_best_value_survives(self, tmp_path):
        train(callbacks=[FakedTop1([0.9]), Checkpoints(tmp_path)], epochs=1)
        checkpoints = Checkpoints(tmp_path)
        callbacks = [FakedTop1([0.5, 0.8]), checkpoints]
        train(callbacks=callbacks, epochs=3, load_path=newest_first(tmp_path)[0])
        assert checkpoints.best == pytest.approx(0.9)
        assert saved_step(tmp_path / "best.pt") == BATCHES_PER_EPOCH

    def test_the_best_value_of_another_metric_is_not_taken_over(self):
        before, after = Checkpoints("nowhere", best_metric="top1"), Checkpoints("nowhere", best_metric="loss")
        before.load_state_dict({"best": 0.9, "best_metric": "top1"})
        after.load_state_dict(before.state_dict())
        assert (before.best, after.best) == (0.9, None)


class TestWhatIsKept:
    def test_best_and_kept_epochs(self, tmp_path):
        checkpoints = Checkpoints(tmp_path, keep_every_epochs=2)
        train(callbacks=[FakedTop1([0.3, 0.7, 0.5, 0.7]), checkpoints], epochs=4)
        assert names(tmp_path) == {"latest.pt", "previous.pt", "best.pt", "ep2.pt", "ep4.pt"}
        assert saved_step(tmp_path / "best.pt") == 2 * BATCHES_PER_EPOCH  # 0.7 again is no improvement
        assert saved_step(tmp_path / "ep2.pt") == 2 * BATCHES_PER_EPOCH
        assert saved_step(tmp_path / "ep4.pt") == saved_step(tmp_path / "latest.pt") == 4 * BATCHES_PER_EPOCH
        assert load(tmp_path / "best.pt")["callbacks"]["Checkpoints"]["best"] == pytest.approx(0.7)

    def test_the_lowest_loss_is_the_best(self, tmp_path):
        checkpoints = Checkpoints(tmp_path, best_metric="loss")
        train(callbacks=[recorder := Recorder(), checkpoints])
        losses = [row["eval_loss"] for row in recorder.history.epochs]
        assert checkpoints.best == min(losses)

    def test_nan_is_never_the_best(self, tmp_path):
        checkpoints = Checkpoints(tmp_path)
        train(callbacks=[FakedTop1([float("nan"), 0.2, float("nan")]), checkpoints])
        assert saved_step(tmp_path / "best.pt") == 2 * BATCHES_PER_EPOCH

    def test_without_best(self, tmp_path):
        train(callbacks=[Checkpoints(tmp_path, keep_best=False)], epochs=1)
        assert names(tmp_path) == {"latest.pt"}

    def test_one_serialization_an_epoch(self, tmp_path, monkeypatch):
        steps = count_saves(monkeypatch)
        train(callbacks=[FakedTop1([0.1, 0.2]), Checkpoints(tmp_path, every_steps=2, keep_every_epochs=1)], epochs=2)
        assert steps == [2, 4, 6, 8]  # step 4 ends epoch 1: saved once, with the evaluation
        assert os.stat(tmp_path / "latest.pt").st_ino == os.stat(tmp_path / "ep2.pt").st_ino

    def test_copies_where_the_file_system_has_no_links(self, tmp_path, monkeypatch):
        def refuse(source, target):
            raise OSError("links are not supported")

        monkeypatch.setattr(os, "link", refuse)
        train(callbacks=[Checkpoints(tmp_path, keep_every_epochs=1)], epochs=1)
        assert names(tmp_path) == {"latest.pt", "best.pt", "ep1.pt"}
        assert saved_step(tmp_path / "best.pt") == saved_step(tmp_path / "ep1.pt") == BATCHES_PER_EPOCH

    def test_the_end_is_saved_whatever_the_interval(self, tmp_path):
        train(callbacks=[Checkpoints(tmp_path, every_epochs=None, keep_best=False)], epochs=3)
        assert saved_step(tmp_path / "latest.pt") == 3 * BATCHES_PER_EPOCH

    def test_the_evaluation_at_the_very_end_counts(self, tmp_path):
        recorder, checkpoints = Recorder(), Checkpoints(tmp_path)
        train(callbacks=[FakedTop1([0.4, 0.6]), recorder, checkpoints], epochs=3, eval_interval="2ep")
        assert checkpoints.best == pytest.approx(0.6)
        for name in ("best.pt", "latest.pt"):
            rows = load(tmp_path / name)["callbacks"]["Recorder"]["epochs"]
            assert [row["eval_top1"] for row in rows] == [None, pytest.approx(0.4), pytest.approx(0.6)]

    def test_an_evaluation_within_an_epoch_can_be_the_best(self, tmp_path):
        train(callbacks=[FakedTop1([0.9, 0.1]), Checkpoints(tmp_path)], epochs=1, eval_interval="2ba")
        assert saved_step(tmp_path / "best.pt") == 2

    def test_braces_in_the_folder_are_no_placeholders(self, tmp_path):
        train(callbacks=[Checkpoints(tmp_path / "run{epoch}.pt")], epochs=1)
        assert names(tmp_path) == {"run{epoch}.pt"}
        assert saved_step(tmp_path / "run{epoch}.pt" / "latest.pt") == BATCHES_PER_EPOCH


class Reached(Callback):
    """Sets `event` at the end of training step `step`."""

    def __init__(self, step: int) -> None:
        self.event, self.step = threading.Event(), step

    def batch_end(self, state, logger):
        if int(state.timestamp.batch) == self.step:
            self.event.set()


@pytest.mark.parametrize(("sharded", "writer"), [(False, "checkpoint._write_checkpoint_file"), (True, "write_shards")])
def test_training_goes_on_while_a_thread_writes(tmp_path, monkeypatch, sharded, writer):
    write, reached, in_time = operator.attrgetter(writer)(saving), Reached(step=6), []

    def slow(*given, **named):
        in_time.append(reached.event.wait(20))
        return write(*given, **named)

    monkeypatch.setattr(f"training.checkpoints.saving.{writer}", slow)
    train(callbacks=[reached, Checkpoints(tmp_path, sharded=sharded)])
    assert in_time == [True, True, True]  # the first save, after step 4, was written after step 6


class TestFailures:
    def test_latest_is_whole_when_the_disk_fills_up(self, tmp_path, monkeypatch):
        fail_at_step(monkeypatch, 8, OSError(28, "No space left on device"))
        with pytest.raises(OSError, match="No space left on device") as caught:
            train(callbacks=[Checkpoints(tmp_path)])
        assert str(tmp_path) in str(caught.value)
        assert "Make room" in str(caught.value)
        assert saved_step(tmp_path / "latest.pt") == saved_step(tmp_path / "best.pt") == 4
        assert names(tmp_path) == {"latest.pt", "best.pt"}  # the half-written file is gone

    def test_the_disk_behind_torchs_own_error_is_found(self, tmp_path, monkeypatch):
        error = RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 64 vs 0")
        error.__context__ = OSError(28, "No space left on device")
        fail_at_step(monkeypatch, 4, error)
        with pytest.raises(OSError, match="No space left on device"):
            train(callbacks=[Checkpoints(tmp_path)])

    def test_other_errors_pass_unchanged(self, tmp_path, monkeypatch):
        fail_at_step(monkeypatch, 4, TypeError("cannot pickle"))
        with pytest.raises(TypeError, match=r"^cannot pickle$"):
            train(callbacks=[Checkpoints(tmp_path)])
        assert names(tmp_path) == set()

    def test_latest_is_whole_after_a_kill_and_the_next_start_cleans_up(self, tmp_path):
        here = Path(__file__)
        code = f"import sys; sys.path.insert(0, {str(here.parent)!r})\n"
        code += f"import {here.stem} as tests; tests.train_and_die({str(tmp_path)!r}, step=8)"
        killed = run_python("-c", code, timeout=100)
        assert killed.returncode == -signal.SIGKILL
        assert names(tmp_path) == {"latest.pt", "best.pt", ".checkpoint-latest.tmp"}
        assert saved_step(tmp_path / "latest.pt") == 4
        trainer = train(callbacks=[Checkpoints(tmp_path)], load_path=newest_first(tmp_path)[0])
        assert int(trainer.state.timestamp.batch) == 12
        assert names(tmp_path) == {"latest.pt", "previous.pt", "best.pt"}


class TestRefusals:
    def test_a_file_in_the_way(self, tmp_path):
        (tmp_path / "runs").write_text("")
        with pytest.raises(ValueError, match=r"runs is a file, not a folder; give another folder"):
            Checkpoints(tmp_path / "runs" / "checkpoints")

    def test_no_permission(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
        with pytest.raises(ValueError, match=r"no permission to write to .*; give another folder"):
            Checkpoints(tmp_path / "checkpoints")

    def test_a_file_system_that_takes_no_files(self):
        with pytest.raises(ValueError, match=r"/proc/checkpoints cannot be written to: .*give another folder"):
            make_trainer(callbacks=[Checkpoints("/proc/checkpoints")])

    @pytest.mark.parametrize("name", ["every_epochs", "every_steps", "keep_every_epochs"])
    def test_an_interval_below_one(self, tmp_path, name):
        with pytest.raises(ValueError, match=f"{name}=0: an interval is at least 1"):
            Checkpoints(tmp_path, **{name: 0})

    def test_construction_leaves_nothing_behind(self, tmp_path):
        Checkpoints(tmp_path / "a" / "b")
        assert names(tmp_path) == set()


@pytest.mark.parametrize(("keep", "steps"), [(1, [12]), (2, [12, 8]), (3, [12, 8, 4]), (9, [12, 8, 4])])
def test_so_many_are_kept(tmp_path, keep, steps):
    train(callbacks=[Checkpoints(tmp_path, keep=keep, keep_best=False)])
    assert [saved_step(path) for path in newest_first(tmp_path)] == steps
    assert len({path.stat().st_ino for path in tmp_path.iterdir()}) == len(steps)


def test_by_the_clock(tmp_path, monkeypatch):
    steps = count_saves(monkeypatch)
    now = iter(range(0, 10_000, 25))  # each look at the clock is 25 seconds later
    monkeypatch.setattr("training.checkpoints.saving.time.monotonic", lambda: float(next(now)))
    train(callbacks=[Checkpoints(tmp_path, every_epochs=None, every_minutes=1, keep_best=False)], epochs=2)
    assert steps[0] in (2, 3)
    assert len(steps) in (3, 4)


def test_newest_first(tmp_path):
    assert newest_first(tmp_path / "missing") == []
    for age, name in enumerate(("ep4.pt", "best.pt", "previous-2.pt", "latest.pt", "previous.pt")):
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (1000 - age, 1000 - age))  # a clock says little of what is newest
    assert [path.name for path in newest_first(tmp_path)] == [
        "latest.pt", "previous.pt", "previous-2.pt", "ep4.pt", "best.pt",
    ]  # fmt: skip


def count_saves(monkeypatch) -> list[int]:
    steps: list[int] = []
    write = checkpoint._write_checkpoint_file

    def counting(state_dict, filename):
        steps.append(step_of(state_dict))
        write(state_dict, filename)

    monkeypatch.setattr(checkpoint, "_write_checkpoint_file", counting)
    return steps


def fail_at_step(monkeypatch, step: int, error: Exception) -> None:
    write = checkpoint._write_checkpoint_file

    def failing(state_dict, filename):
        write(state_dict, filename)
        if step_of(state_dict) == step:
            os.truncate(filename, os.path.getsize(filename) // 2)
            raise error

    monkeypatch.setattr(checkpoint, "_write_checkpoint_file", failing)


def train_and_die(folder: str, *, step: int) -> None:
    """Kill this process in the middle of the save of `step`."""
    write = checkpoint._write_checkpoint_file

    def write_and_die(state_dict, filename):
        write(state_dict, filename)
        if step_of(state_dict) == step:
            os.truncate(filename, os.path.getsize(filename) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint._write_checkpoint_file = write_and_die
    train(callbacks=[Checkpoints(folder)])


def step_of(state_dict: dict) -> int:
    return int(state_dict["state"]["timestamp"]["Timestamp"]["batch"])
