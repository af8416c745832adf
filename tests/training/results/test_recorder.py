"""The history of a run: what the rows hold, and that a resumed run continues them."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest
import torch
from composer import Evaluator, Trainer
from composer.core import Callback
from composer.optim import LinearScheduler
from composer.utils import dist
from ranks import run_ranks
from tiny_model import Interrupt, TinyModel
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from training.checkpoints.saving import Checkpoints
from training.results.history import EPOCH_COLUMNS, STEP_COLUMNS, History, read_metrics
from training.results.recorder import Ledger, Recorder, Stopwatch

pytestmark = [
    pytest.mark.timeout(120),
    # Composer's word for every batch that is smaller than the others; the last of an epoch is, on purpose.
    pytest.mark.filterwarnings("ignore:Cannot split tensor of length:UserWarning"),
]

BATCH_SIZE, IMAGES = 8, 28  # four steps an epoch, the last with half a batch
STEPS_PER_EPOCH = 4
TIMES = ("images_per_second", "train_seconds", "data_wait_share")


class ResizingLoader(DataLoader):
    image_size = 16

    def __setattr__(self, name, value):
        object.__setattr__(self, name, value)


class GrowImages(Callback):
    """A loader's size is that of the next pass: it changes before the epoch begins, and late in the epoch before."""

    def epoch_start(self, state, logger):
        state.train_dataloader.image_size = 16 + 8 * int(state.timestamp.epoch)

    def fit_start(self, state, logger):
        self.epoch_start(state, logger)


class CountSteps(Callback):
    """An independent record: losses, correct answers and images of every step, and the rate at the step."""

    def __init__(self) -> None:
        self.steps: list[dict] = []

    def before_loss(self, state, logger):
        outputs, (_, targets) = state.outputs, state.batch
        losses = F.cross_entropy(outputs, targets, reduction="none")
        self.steps.append(
            {
                "losses": losses.tolist(),
                "correct": (outputs.argmax(dim=1) == targets).tolist(),
                "learning_rate": state.optimizers[0].param_groups[0]["lr"],
            }
        )


def make_trainer(
    *, callbacks, epochs: int = 3, eval_interval: str | None = "1ep", load_path=None, measured=True
) -> Trainer:
    generator = torch.Generator().manual_seed(3)
    data = TensorDataset(
        torch.randn(IMAGES, 6, generator=generator), torch.randint(0, 3, (IMAGES,), generator=generator)
    )
    evaluator = Evaluator(
        label="eval",
        dataloader=DataLoader(data, batch_size=16, sampler=dist.get_sampler(data)),
        eval_interval=eval_interval or 1,
    )
    model = TinyModel(measured=measured)
    return Trainer(
        model=model,
        train_dataloader=ResizingLoader(
            data, batch_size=BATCH_SIZE // dist.get_world_size(), sampler=dist.get_sampler(data, shuffle=True)
        ),
        eval_dataloader=evaluator if eval_interval else None,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        schedulers=LinearScheduler(t_max="1dur"),
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


def without_times(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


class TestRows:
    def test_hold_what_an_independent_count_gives(self):
        recorder, count = Recorder(), CountSteps()
        trainer = train(callbacks=[recorder, GrowImages(), count], epochs=2)
        history = recorder.history

        assert history.steps["step"] == list(range(1, 9))
        assert history.steps["epoch"] == [1] * 4 + [2] * 4
        expected = [sum(step["losses"]) / len(step["losses"]) for step in count.steps]
        assert history.steps["loss"] == pytest.approx(expected, rel=1e-5)
        # The rates that the steps were made with, not those that the scheduler has set for the next ones.
        assert history.steps["learning_rate"] == [step["learning_rate"] for step in count.steps]
        assert history.steps["learning_rate"][0] == pytest.approx(0.1)

        for epoch, row in enumerate(history.epochs, start=1):
            steps = count.steps[(epoch - 1) * 4 : epoch * 4]
            losses = [loss for step in steps for loss in step["losses"]]
            correct = [answer for step in steps for answer in step["correct"]]
            assert tuple(row) == EPOCH_COLUMNS
            assert row["epoch"] == epoch
            assert row["train_loss"] == pytest.approx(sum(losses) / IMAGES, rel=1e-5)
            assert row["train_top1"] == pytest.approx(sum(correct) / IMAGES)
            assert row["learning_rate"] == steps[-1]["learning_rate"]
            assert row["image_size"] == 16 + 8 * (epoch - 1)
            assert row["global_batch_size"] == BATCH_SIZE
            assert row["train_seconds"] > 0
            assert row["images_per_second"] == pytest.approx(IMAGES / row["train_seconds"])
        metrics = trainer.state.eval_metrics["eval"]
        assert history.epochs[-1]["eval_top1"] == float(metrics["top1"].compute())
        assert history.epochs[-1]["eval_loss"] == float(metrics["loss"].compute())

    def test_what_is_not_measured_is_none(self):
        recorder = Recorder()
        train(callbacks=[recorder], epochs=1, measured=False)
        (row,) = recorder.history.epochs
        assert (row["train_top1"], row["eval_top1"]) == (None, None)
        assert row["eval_loss"] > 0

    def test_close_without_an_evaluator(self):
        recorder = Recorder()
        train(callbacks=[recorder], epochs=2, eval_interval=None)
        assert [(row["epoch"], row["eval_top1"]) for row in recorder.history.epochs] == [(1, None), (2, None)]

    def test_close_where_evaluation_is_rare(self):
        recorder = Recorder()
        train(callbacks=[recorder], epochs=3, eval_interval="2ep")
        measured = [row["eval_top1"] is not None for row in recorder.history.epochs]
        assert measured == [False, True, True]  # the last by the evaluation at the end of the run

    def test_evaluation_and_saving_are_not_training_time(self):
        clock = FakeClock()
        recorder = Recorder(clock=clock)
        spend = Spend(clock, batch_start=1, eval_start=100, batch_checkpoint=1000, epoch_checkpoint=10000)
        train(callbacks=[recorder, spend], epochs=2)
        assert [row["train_seconds"] for row in recorder.history.epochs] == [4, 4]
        assert [row["images_per_second"] for row in recorder.history.epochs] == [IMAGES / 4] * 2


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Spend(Callback):
    """Lets the clock run on at given events."""

    def __init__(self, clock: FakeClock, **seconds: float) -> None:
        self.clock, self.seconds = clock, seconds

    def run_event(self, event, state, logger):
        self.clock.now += self.seconds.get(event.value, 0)


class TestResume:
    @pytest.mark.parametrize("stop_after", [6, 8, 11])  # within an epoch, at its end, before its last step
    def test_continues_the_rows(self, tmp_path, stop_after):
        whole = Recorder()
        train(callbacks=[whole, GrowImages(), Checkpoints(tmp_path / "whole")])
        clock = FakeClock()
        recorders = []
        for attempt in range(2):
            recorder = Recorder(tmp_path, clock=clock)
            recorders.append(recorder)
            callbacks = [
                recorder,
                GrowImages(),
                Spend(clock, before_dataloader=1, batch_start=1),
                Checkpoints(tmp_path / "c", every_steps=1),
            ]
            if attempt == 0:
                with pytest.raises(KeyboardInterrupt):
                    train(callbacks=[*callbacks, Interrupt(after_step=stop_after)])
            else:
                train(callbacks=callbacks, load_path=tmp_path / "c" / "latest.pt")

        rows = recorders[1].history.epochs
        assert recorders[1].history.steps == whole.history.steps
        assert without_times(rows) == without_times(whole.history.epochs)
        # Four steps and five requests for a batch, over both sessions; loading what is skipped is not in it.
        assert [row["train_seconds"] for row in rows] == [9, 9, 9]
        assert [row["data_wait_share"] for row in rows] == [pytest.approx(5 / 9)] * 3
        assert read_metrics(tmp_path / "metrics.csv") == rows

    def test_drops_what_came_after_the_checkpoint(self, tmp_path):
        train(callbacks=[Recorder(tmp_path), Checkpoints(tmp_path, keep_every_epochs=1)], epochs=3)
        assert len(read_metrics(tmp_path / "metrics.csv")) == 3
        recorder = Recorder(tmp_path)
        with pytest.warns(UserWarning, match="Interrupt is not in the state_dict"):  # it had none to save
            trainer = make_trainer(callbacks=[recorder, Interrupt(after_step=4)], load_path=tmp_path / "ep1.pt")
        with pytest.raises(KeyboardInterrupt):
            trainer.fit()
        trainer.close()
        assert [row["epoch"] for row in read_metrics(tmp_path / "metrics.csv")] == [1]
        assert recorder.history.steps["step"] == [1, 2, 3, 4]


@pytest.mark.slow
def test_two_ranks_record_what_both_did(tmp_path):
    single = Recorder()
    train(callbacks=[single], epochs=2)
    script = tmp_path / "rank.py"
    here = Path(__file__)
    script.write_text(
        f"import sys; sys.path.insert(0, {str(here.parent)!r}); import {here.stem} as tests\n"
        f"tests.train_a_rank({str(tmp_path)!r})\n"
    )
    run_ranks(2, str(script), timeout=110)

    rows = torch.load(tmp_path / "latest.pt", weights_only=False)["state"]["callbacks"]["Recorder"]["epochs"]
    assert read_metrics(tmp_path / "metrics.csv") == rows
    for row, expected in zip(rows, single.history.epochs, strict=True):
        assert row["global_batch_size"] == BATCH_SIZE
        for name in ("train_loss", "train_top1", "eval_loss", "eval_top1"):
            assert row[name] == pytest.approx(expected[name], rel=1e-4)


def train_a_rank(folder: str) -> None:
    train(callbacks=[Recorder(folder), Checkpoints(folder)], epochs=2)


class TestFile:
    def test_is_readable_after_each_epoch(self, tmp_path):
        path = tmp_path / "run" / "metrics.csv"
        seen = []

        class Look(Callback):
            def epoch_start(self, state, logger):
                seen.append(len(read_metrics(path)))

        recorder = Recorder(tmp_path / "run")
        train(callbacks=[recorder, Look()])
        assert seen == [0, 1, 2]
        assert read_metrics(path) == recorder.history.epochs
        assert os.listdir(path.parent) == ["metrics.csv"]
        with open(path) as file:
            assert tuple(next(csv.reader(file))) == EPOCH_COLUMNS

    def test_a_file_from_before_the_waiting_was_measured(self, tmp_path):
        path = tmp_path / "metrics.csv"
        path.write_text("epoch,train_loss,train_seconds\n1,0.5,2.0\n")
        history = History(epochs=read_metrics(path))
        assert history.epochs == [{"epoch": 1, "train_loss": 0.5, "train_seconds": 2.0}]
        assert str(history.column("data_wait_share")) == "[nan]"

    def test_no_folder_no_file(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        train(callbacks=[Recorder()], epochs=1)
        assert list(tmp_path.iterdir()) == []


class TestLedger:
    def fill(self, ledger: Ledger, *, losses, images, top1s) -> None:
        for loss, count, top1 in zip(losses, images, top1s, strict=True):
            step = len(ledger.history.steps["step"]) + 1
            ledger.add_step(step=step, epoch=1, loss=loss, learning_rate=0.1, images=count, top1=top1)

    def test_means_are_weighted_by_images(self):
        ledger = Ledger()
        self.fill(ledger, losses=[1.0, 4.0], images=[30, 10], top1s=[0.5, 0.9])
        ledger.close_epoch(epoch=1)
        row = ledger.history.epochs[0]
        assert row["train_loss"] == pytest.approx((30 * 1 + 10 * 4) / 40)
        assert row["train_top1"] == pytest.approx((15 + 9) / 40)
        assert row["global_batch_size"] == 30
        assert (row["images_per_second"], row["image_size"]) == (None, None)

    def test_a_mean_over_part_of_the_epoch_is_none(self):
        ledger = Ledger()
        self.fill(ledger, losses=[1.0, 2.0], images=[8, 8], top1s=[0.5, None])
        ledger.close_epoch(epoch=1)
        assert ledger.history.epochs[0]["train_top1"] is None

    def test_an_evaluation_of_earlier_weights_is_not_the_epochs(self):
        ledger = Ledger()
        self.fill(ledger, losses=[1.0], images=[8], top1s=[0.5])
        ledger.add_evaluation(top1=0.9, loss=0.1)
        self.fill(ledger, losses=[1.0], images=[8], top1s=[0.5])
        ledger.close_epoch(epoch=1)
        assert ledger.history.epochs[0]["eval_top1"] is None
        assert ledger.add_evaluation(top1=0.8, loss=0.2)
        assert ledger.history.epochs[0]["eval_top1"] == 0.8
        assert not ledger.add_evaluation(top1=0.1, loss=0.9)  # a row that has its evaluation keeps it
        assert ledger.history.epochs[0]["eval_top1"] == 0.8

    def test_a_checkpoint_from_before_the_waiting_was_measured(self):
        ledger = Ledger()
        self.fill(ledger, losses=[1.0], images=[8], top1s=[0.5])
        ledger.add_seconds(4.0, waiting=1.0)
        old = ledger.state_dict()
        del old["partial"]["wait_seconds"]
        ledger.load_state_dict(old)
        for epoch in (1, 2):  # of the first, nobody knows how long its first part waited
            ledger.add_seconds(4.0, waiting=1.0)
            ledger.close_epoch(epoch=epoch)
        assert [row["data_wait_share"] for row in ledger.history.epochs] == [None, 0.25]

    def test_the_state_is_plain_and_apart(self):
        ledger, other = Ledger(), Ledger()
        self.fill(ledger, losses=[1.0], images=[8], top1s=[0.5])
        ledger.add_evaluation(top1=0.9, loss=0.1)
        state = ledger.state_dict()
        other.load_state_dict(state)
        ledger.close_epoch(epoch=1)
        assert other.history.epochs == []
        other.close_epoch(epoch=1)
        assert other.history == ledger.history
        assert set(state["steps"]) == set(STEP_COLUMNS)
        assert_plain(state)


def assert_plain(value) -> None:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            assert_plain(item)
    else:
        assert value is None or type(value) in (int, float)


def test_stopwatch():
    clock = FakeClock()
    watch = Stopwatch(clock)
    assert watch.stop() == 0
    watch.start()
    clock.now = 2
    watch.start()  # goes on
    clock.now = 5
    assert watch.stop() == 5
    assert watch.stop() == 0
