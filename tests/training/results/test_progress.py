"""The progress bar: what it shows, how it estimates, and that it always leaves the terminal in order."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import pytest
import torch
from composer import Trainer
from composer.core import Callback
from composer.utils import dist
from tiny_model import Interrupt, TinyModel
from torch.utils.data import DataLoader, TensorDataset

from training.checkpoints.saving import Checkpoints
from training.results.meter import Work
from training.results.progress import ProgressBar, _fitted

pytestmark = pytest.mark.timeout(120)

STEPS_PER_EPOCH, BATCH_SIZE = 4, 8


class SizedLoader(DataLoader):
    image_size = 24


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Spend(Callback):
    """Each step of epoch n takes as many seconds as the n-th number says."""

    def __init__(self, clock: FakeClock, seconds: list[float]) -> None:
        self.clock, self.seconds = clock, seconds

    def batch_start(self, state, logger):
        self.clock.now += self.seconds[int(state.timestamp.epoch)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def train(*, callbacks, epochs: int = 3, load_path=None) -> None:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(STEPS_PER_EPOCH * BATCH_SIZE, 6, generator=generator)
    data = TensorDataset(images, torch.randint(0, 3, (len(images),), generator=generator))
    model = TinyModel()
    trainer = Trainer(
        model=model,
        train_dataloader=SizedLoader(data, batch_size=BATCH_SIZE, sampler=dist.get_sampler(data, shuffle=True)),
        eval_dataloader=DataLoader(data, batch_size=16, sampler=dist.get_sampler(data)),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        max_duration=f"{epochs}ep",
        device="cpu",
        seed=1,
        callbacks=callbacks,
        load_path=None if load_path is None else str(load_path),
        progress_bar=False,
        log_to_console=False,
    )
    try:
        trainer.fit()
    finally:
        trainer.close()


def etas(text: str) -> list[str]:
    return re.findall(r"ETA (\S+)", text)


def frames(stream: io.StringIO) -> list[str]:
    return [frame for frame in re.split(r"[\r\n]", stream.getvalue()) if frame.strip()]


class TestLines:
    def test_one_line_an_epoch(self):
        stream, clock = io.StringIO(), FakeClock()
        bar = ProgressBar(total_epochs=3, stream=stream, clock=clock)
        train(callbacks=[Spend(clock, [2, 2, 2]), bar])
        lines = stream.getvalue().splitlines()
        assert len(lines) == 3
        known = r"epoch 2/3  24 px  loss \d\.\d{3}  top-1 \d+\.\d %  4 images/s"
        pattern = rf"{known}  wait 0 %  \d+\.\d+ GiB  lr 0\.1  ETA 0:08"
        assert re.fullmatch(pattern, lines[1])
        assert etas(stream.getvalue()) == ["0:16", "0:08", "0:00"]
        assert "\r" not in stream.getvalue()

    def test_the_estimate_follows_the_costs(self):
        # Epochs of 4, 8 and 24 seconds: with their costs known the estimate is exact from the first epoch on.
        stream, clock = io.StringIO(), FakeClock()
        bar = ProgressBar(total_epochs=3, epoch_costs=[100, 200, 600], stream=stream, clock=clock)
        train(callbacks=[Spend(clock, [1, 2, 6]), bar])
        assert etas(stream.getvalue()) == ["0:32", "0:24", "0:00"]

    def test_resumed_it_goes_on_and_measures_this_session_only(self, tmp_path):
        clock, stream = FakeClock(), io.StringIO()
        with pytest.raises(KeyboardInterrupt):
            train(callbacks=[Checkpoints(tmp_path, every_steps=1), Interrupt(after_step=6)])
        bar = ProgressBar(total_epochs=3, stream=stream, clock=clock)
        with pytest.warns(UserWarning, match=r"(ProgressBar|Spend) is not in the state_dict"):  # neither saves anything
            train(callbacks=[Spend(clock, [1, 1, 1]), bar], load_path=tmp_path / "latest.pt")
        lines = stream.getvalue().splitlines()
        assert [line.split("  ")[0] for line in lines] == ["epoch 2/3", "epoch 3/3"]
        assert etas(stream.getvalue()) == ["0:04", "0:00"]
        assert "8 images/s" in lines[0]

    def test_silent(self, capfd):
        train(callbacks=[ProgressBar(total_epochs=1, enabled=False)], epochs=1)
        assert capfd.readouterr() == ("", "")

    def test_ranks_other_than_the_first_are_silent(self, monkeypatch):
        stream = io.StringIO()
        bar = ProgressBar(total_epochs=1, stream=stream)
        monkeypatch.setattr("training.results.progress.dist", SimpleNamespace(get_global_rank=lambda: 1))
        train(callbacks=[bar], epochs=1)
        assert stream.getvalue() == ""


class TestBar:
    def test_on_a_terminal(self):
        stream, clock = Terminal(), FakeClock()
        bar = ProgressBar(total_epochs=2, epoch_costs=[1, 3], stream=stream, clock=clock)
        train(callbacks=[Spend(clock, [1, 3]), bar], epochs=2)
        shown = frames(stream)
        assert shown[0].startswith("  0% |")
        first_epoch = next(frame for frame in shown if frame.startswith(" 25% |"))
        assert re.search(r"0:04<0:12  epoch \d/2  24 px  loss \d\.\d{3}  .*8 images/s", first_epoch)
        assert shown[-1].startswith("100% |")
        assert re.search(r"0:16<0:00  epoch 2/2  .*top-1 \d+\.\d %", shown[-1])
        assert stream.getvalue().endswith("\n")

    def test_resumed_it_starts_where_the_run_stands(self, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            train(callbacks=[Checkpoints(tmp_path, every_steps=1), Interrupt(after_step=6)], epochs=2)
        stream = Terminal()
        with pytest.warns(UserWarning, match="ProgressBar is not in the state_dict"):
            train(callbacks=[ProgressBar(total_epochs=2, stream=stream)], epochs=2, load_path=tmp_path / "latest.pt")
        assert frames(stream)[0].startswith(" 75% |")
        assert "epoch 2/2" in frames(stream)[0]

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    def test_an_interrupted_run_leaves_a_fresh_line(self, error):
        stream = Terminal()
        bar = ProgressBar(total_epochs=2, stream=stream)
        with pytest.raises(error):
            train(callbacks=[bar, Interrupt(after_step=6, error=error)], epochs=2)
        assert stream.getvalue().endswith("\n")
        written = stream.getvalue()
        bar.close(None, None)  # again: nothing happens
        assert stream.getvalue() == written

    def test_asked_for_without_a_terminal(self):
        stream = io.StringIO()
        train(callbacks=[ProgressBar(total_epochs=1, enabled=True, stream=stream)], epochs=1)
        assert frames(stream)[-1].startswith("100% |")


class TestWhatFits:
    PARTS = {  # noqa: RUF012
        "time": "12:34:56<23:45:01", "epoch": "epoch 88/100", "image_size": "224 px", "loss": "loss 2.345",
        "top1": "top-1 76.1 %", "rate": "12,345 images/s", "wait": "wait 3 %", "speed": "MFU 45 %",
        "memory": "12.3 GiB", "learning_rate": "lr 0.00123",
    }  # fmt: skip

    def test_what_matters_least_goes_first(self):
        whole = _fitted(self.PARTS, columns=200)
        assert whole.split("  ") == list(self.PARTS.values())
        assert "lr" not in _fitted(self.PARTS, columns=len(whole) - 1)
        assert _fitted(self.PARTS, columns=45) == "12:34:56<23:45:01  epoch 88/100  loss 2.345"
        assert _fitted(self.PARTS, columns=5) == "12:34:56<23:45:01"

    def test_a_bar_fits_its_terminal(self, monkeypatch):
        for columns in (54, 80, 120):
            monkeypatch.setattr("training.results.progress.os.get_terminal_size", lambda _, c=columns: _Size(c))
            stream = Terminal()
            stream.fileno = lambda: 2
            train(callbacks=[ProgressBar(total_epochs=1, stream=stream)], epochs=1)
            last = frames(stream)[-1].rstrip()
            assert len(last) < columns
            assert ("loss" in last, "top-1" in last, "wait" in last) == (True, columns > 54, columns > 80), last


class _Size:
    def __init__(self, columns: int) -> None:
        self.columns = columns


class TestSpeed:
    @pytest.mark.parametrize(
        ("work", "shown"),
        [(Work([3e9, 6e9]), "24 GMAC/s"), (Work([1e9, 6e9], peak_flops=96e9), "MFU 50 %")],
    )
    def test_of_the_epoch(self, work, shown):
        stream, clock = io.StringIO(), FakeClock()
        bar = ProgressBar(total_epochs=2, work=work, stream=stream, clock=clock)
        train(callbacks=[Spend(clock, [2, 2]), bar], epochs=2)
        assert f"4 images/s  wait 0 %  {shown}" in stream.getvalue().splitlines()[1]

    def test_waiting_for_data_is_seen(self):
        stream, clock = io.StringIO(), FakeClock()

        class SlowData(Callback):
            def before_dataloader(self, state, logger):
                clock.now += 3

        # Of each epoch's five requests the last finds the loader's end: 15 s of waiting, 4 of steps.
        train(
            callbacks=[Spend(clock, [1]), ProgressBar(total_epochs=1, stream=stream, clock=clock), SlowData()], epochs=1
        )
        assert "2 images/s  wait 79 %" in stream.getvalue()


class TestRefusals:
    def test_no_epochs(self):
        with pytest.raises(ValueError, match=r"total_epochs=0: .* set it to 1 or more"):
            ProgressBar(total_epochs=0)

    def test_costs_of_other_length(self):
        with pytest.raises(ValueError, match=r"2 costs for total_epochs=3: give one an epoch"):
            ProgressBar(total_epochs=3, epoch_costs=[1, 2])

    @pytest.mark.parametrize("cost", [0, -1, float("nan"), float("inf")])
    def test_costs_that_are_not_positive(self, cost):
        with pytest.raises(ValueError, match=r"for epoch 2: a cost is a positive number"):
            ProgressBar(total_epochs=2, epoch_costs=[1, cost])
