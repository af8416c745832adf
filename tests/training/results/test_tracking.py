"""Trackers: what TensorBoard's files, W&B's and MLflow's hold, and that a resumed run goes on in them."""

from __future__ import annotations

import importlib.util
import json
import logging
import struct
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from composer import Trainer
from composer.loggers import LoggerDestination
from composer.utils import dist
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tiny_model import Interrupt, TinyModel
from torch.utils.data import DataLoader, TensorDataset

from training.checkpoints.saving import Checkpoints
from training.recipe import RecipeError
from training.recipe.watching import parse_trackers
from training.results.meter import Work
from training.results.recorder import Recorder
from training.results.tracking import Tracking, check_wandb_login, open_trackers

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore:.* is not in the state_dict"),  # Interrupt and Tracking have no state
]

BATCH_SIZE, STEPS_PER_EPOCH, EPOCHS = 8, 4, 3
RUN = "tiny"
INTERVAL = 2


def train(run_dir: Path, trackers: dict, *, stop_after: int | None = None, load_path: Path | None = None) -> Recorder:
    generator = torch.Generator().manual_seed(3)
    data = TensorDataset(
        torch.randn(STEPS_PER_EPOCH * BATCH_SIZE, 6, generator=generator),
        torch.randint(0, 3, (STEPS_PER_EPOCH * BATCH_SIZE,), generator=generator),
    )
    model, recorder = TinyModel(), Recorder(run_dir)
    tracking = Tracking(
        trackers if callable(next(iter(trackers.values()))) else open_trackers(trackers, run_dir=run_dir),
        recorder=recorder,
        run_dir=run_dir,
        interval_steps=INTERVAL,
        work=Work([1e6] * EPOCHS),
        settings={"optimizer": {"name": "sgd"}},
    )
    stop = [] if stop_after is None else [Interrupt(after_step=stop_after)]
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(data, batch_size=BATCH_SIZE, sampler=dist.get_sampler(data, shuffle=True)),
        eval_dataloader=DataLoader(data, batch_size=16, sampler=dist.get_sampler(data)),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        max_duration=f"{EPOCHS}ep",
        device="cpu",
        seed=1,
        run_name=RUN,
        callbacks=[recorder, Checkpoints(run_dir / "checkpoints", every_steps=3), tracking, *stop],
        load_path=None if load_path is None else str(load_path),
        progress_bar=False,
        log_to_console=False,
    )
    try:
        trainer.fit()
    finally:
        trainer.engine.close()
    return recorder


def interrupted_and_resumed(run_dir: Path, trackers: dict) -> Recorder:
    """Stopped after step 8 of 12, two steps after its last checkpoint and an epoch's end later; then to the end."""
    with pytest.raises(KeyboardInterrupt):
        train(run_dir, trackers, stop_after=8)
    return train(run_dir, trackers, load_path=run_dir / "checkpoints" / "latest.pt")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every value of every event file in `folder`, in the order in which it was written."""
    found = defaultdict(list)
    for file in sorted(folder.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                found[value.tag].append((event.step, float(value.tensor.float_val[0])))
    return dict(found)


TENSORBOARD = {"tensorboard": {"folder": None}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[tuple[int, float]]], Recorder]:
    run_dir = tmp_path_factory.mktemp("whole") / RUN
    recorder = train(run_dir, TENSORBOARD)
    return scalars(run_dir), recorder


class TestTensorBoard:
    def test_steps_are_means_over_the_interval(self, whole):
        found, recorder = whole
        losses = recorder.history.steps["loss"]
        means = [(step, (losses[step - 2] + losses[step - 1]) / 2) for step in range(2, 13, 2)]
        assert [step for step, _ in found["train/loss"]] == [step for step, _ in means]
        assert [value for _, value in found["train/loss"]] == pytest.approx([value for _, value in means], rel=1e-5)
        assert [value for _, value in found["train/learning_rate"]] == pytest.approx([0.1] * 6)
        for name in ("images_per_second", "data_wait_share", "gmacs_per_second"):
            assert [step for step, _ in found[f"time/{name}"]] == [2, 4, 6, 8, 10, 12]
        assert all(0 <= share <= 1 for _, share in found["time/data_wait_share"])
        speeds = zip(found["time/images_per_second"], found["time/gmacs_per_second"], strict=True)
        assert all(gmacs == pytest.approx(rate * 1e6 / 1e9, rel=1e-5) for (_, rate), (_, gmacs) in speeds)
        assert all(value > 0.05 for _, value in found["memory/resident_gib"])

    def test_epochs_and_evaluations_are_those_of_metrics_csv(self, whole):
        found, recorder = whole
        rows = recorder.history.epochs
        for tag, name in (
            ("eval/top1", "eval_top1"),
            ("eval/loss", "eval_loss"),
            ("epoch/train_loss", "train_loss"),
            ("epoch/train_top1", "train_top1"),
            ("epoch/data_wait_share", "data_wait_share"),
            ("epoch/images_per_second", "images_per_second"),
        ):
            assert [step for step, _ in found[tag]] == [4, 8, 12]
            assert [value for _, value in found[tag]] == pytest.approx([row[name] for row in rows], rel=1e-5)

    def test_there_is_one_file_a_session_in_the_runs_folder(self, tmp_path):
        interrupted_and_resumed(tmp_path / RUN, TENSORBOARD)
        assert len(list(tmp_path.rglob("events.out.tfevents.*"))) == 2
        assert len(list((tmp_path / RUN).glob("events.out.tfevents.*"))) == 2

    def test_a_resumed_run_never_goes_back_in_steps(self, tmp_path, whole):
        interrupted_and_resumed(tmp_path / RUN, TENSORBOARD)
        found = scalars(tmp_path / RUN)
        for tag, values in whole[0].items():
            assert [step for step, _ in found[tag]] == [step for step, _ in values], tag
        for tag in ("train/learning_rate", "eval/top1", "eval/loss", "epoch/train_loss", "epoch/train_top1"):
            assert [value for _, value in found[tag]] == [value for _, value in whole[0][tag]], tag

    def test_another_folder(self, tmp_path):
        train(tmp_path / "results" / RUN, {"tensorboard": {"folder": str(tmp_path / "boards")}})
        assert scalars(tmp_path / "boards" / RUN)["eval/top1"]
        assert not scalars(tmp_path / "results" / RUN)


class Broken(LoggerDestination):
    def __init__(self) -> None:
        self.calls = 0

    def log_metrics(self, metrics, step=None):
        self.calls += 1
        raise ConnectionError("the server\nis gone")


class TestFailures:
    def test_a_tracker_that_fails_does_not_end_the_run(self, tmp_path, caplog):
        broken = Broken()
        with caplog.at_level(logging.WARNING):
            recorder = train(tmp_path / RUN, {"mine": lambda position: broken})
        assert len(recorder.history.epochs) == EPOCHS
        assert broken.calls == 1
        said = [record.getMessage() for record in caplog.records if "logging.trackers" in record.getMessage()]
        assert said == ["logging.trackers.mine failed and is no longer written: the server is gone"]

    def test_one_that_cannot_be_opened_is_found_before_the_first_step(self, tmp_path):
        def make(position):
            raise RuntimeError("no such project")

        with pytest.raises(
            ValueError, match=r"logging\.trackers\.mine: no such project; set logging\.trackers\.mine=null"
        ):
            train(tmp_path / RUN, {"mine": make})
        assert not (tmp_path / RUN / "metrics.csv").exists()

    def test_a_position_that_is_no_json(self, tmp_path):
        (tmp_path / "trackers.json").write_text("{")
        with pytest.raises(ValueError, match=r"trackers\.json cannot be read .* remove it"):
            Tracking({}, recorder=Recorder(), run_dir=tmp_path)


WANDB = {
    "wandb": {"project": "tests", "entity": None, "group": None, "name": None, "tags": ["tiny"], "mode": "offline"}
}


@pytest.mark.slow
def test_wandb_offline_goes_on_with_its_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_dir = tmp_path / RUN
    interrupted_and_resumed(run_dir, WANDB)
    position = json.loads((run_dir / "trackers.json").read_text())
    folders = sorted((run_dir / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert all(folder.name.endswith(f"-{position['wandb_id']}") for folder in folders)
    # Its own process writes the file, and on a busy machine ends after the run.
    for _ in range(60):
        steps = [step for folder in folders for step in wandb_steps(folder, "train/loss")]
        if len(steps) >= 6:
            break
        time.sleep(0.5)
    assert steps == [2, 4, 6, 8, 10, 12]


def wandb_steps(folder: Path, name: str) -> list[int]:
    """The steps at which an offline run has a value of `name`."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("*.wandb")
    steps = []
    for data in wandb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        if name in items:
            steps.append(int(items["_step"]) if "_step" in items else record.history.step.num)
    return steps


def wandb_records(data: bytes) -> Iterator[bytes]:
    """Records of W&B's file: LevelDB's log format, blocks of 32 KiB after a header of 7 bytes that counts as theirs."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:  # no room for another header in this block
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@pytest.mark.slow
def test_mlflow_in_a_database_file_goes_on_with_its_run(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run_dir = tmp_path / RUN
    settings = {"tracking_uri": None, "experiment_name": "tests", "run_name": None, "synchronous": False}
    recorder = interrupted_and_resumed(run_dir, {"mlflow": settings})
    assert not logging.getLogger("training.results.tracking").disabled, "MLflow's database turned off other logs"
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = [one for one in client.search_experiments() if one.name == "tests"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == (RUN, "FINISHED")
    assert run.data.params["optimizer.name"] == "sgd"
    history = {
        name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
        for name in ("train/learning_rate", "eval/top1")
    }
    assert [step for step, _ in history["train/learning_rate"]] == [2, 4, 6, 8, 10, 12]
    assert history["eval/top1"] == [(4 * row["epoch"], row["eval_top1"]) for row in recorder.history.epochs]


class TestRecipe:
    @pytest.mark.parametrize(
        ("given", "says"),
        [
            ({"tensorbord": {}}, r"trackers\.tensorbord: 'tensorbord' is no tracker; .*did you mean tensorboard"),
            ({"tensorboard": {"foldr": "x"}}, r"tensorboard\.foldr: unknown key .*did you mean folder"),
            ({"wandb": {"mode": "ofline"}}, r"wandb\.mode: is 'ofline'; it must be one of .*did you mean offline"),
            ({"wandb": {"tags": "a"}}, r"wandb\.tags: is 'a'; it must be a list"),
            ("tensorboard", r"logging\.trackers: is 'tensorboard'; it must be a mapping"),
        ],
    )  # fmt: skip
    def test_mistakes(self, given, says):
        with pytest.raises(RecipeError, match=says):
            parse_trackers(given)

    def test_a_package_that_is_missing_is_named(self, monkeypatch):
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
        with pytest.raises(RecipeError, match=r"trackers\.wandb: needs wandb, .*pip install wandb.*wandb=null"):
            parse_trackers({"wandb": {}})
        assert parse_trackers({"wandb": None}) == {"wandb": None}

    def test_nobody_logged_in(self, monkeypatch):
        for name in ("WANDB_API_KEY", "WANDB_MODE"):
            monkeypatch.delenv(name, raising=False)
        module = type(sys)("wandb")
        module.login = lambda *, prompt: False  # pyright: ignore
        monkeypatch.setitem(sys.modules, "wandb", module)
        with pytest.raises(ValueError, match=r"nobody is logged in .*wandb login.*mode=offline"):
            check_wandb_login({"mode": "online"})
        check_wandb_login({"mode": "offline"})
        monkeypatch.setenv("WANDB_MODE", "offline")
        check_wandb_login({"mode": "online"})
