"""A checkpoint that would run a command: refused wherever one is read, and nothing ran."""

from __future__ import annotations

import os
import pickle
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_saver import save

from models.data_only import data_only
from models.weights import load_weights, read_weights
from training import cli, session
from training.checkpoints.export import export_checkpoint
from training.checkpoints.export import main as export
from training.checkpoints.reading import DamagedCheckpoint, check_checkpoint, reading
from training.recipe import RecipeError

STATE = {"step": 3, "weight": torch.ones(2)}


class Payload:
    """Touches a file when an unrestricted unpickler reads it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trace}",)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "it_ran"


def hostile(path: Path, trace: Path, *, how: str = "torch.save") -> Path:
    if how == "torch.save":
        torch.save({**STATE, "callbacks": Payload(trace)}, path)
    else:
        path.write_bytes(pickle.dumps({"callbacks": Payload(trace)}, protocol=int(how.removeprefix("protocol "))))
    return path


def hostile_folder(kind: str, folder: Path, trace: Path) -> Path:
    """A checkpoint in a folder, one of whose files would run a command."""
    if kind.startswith("zero"):
        (folder / "zero").mkdir(parents=True)
        (folder / "deepspeed.json").write_text('{"world_size": 1, "zero_stage": 0}')
        torch.save(STATE, folder / "state.pt")
        torch.save({"module": STATE}, folder / "zero" / "mp_rank_00_model_states.pt")
        hostile(folder / ("state.pt" if kind == "zero, state" else "zero/mp_rank_00_model_states.pt"), trace)
        return folder
    save({"model": {"w": torch.ones(2)}}, checkpoint_id=folder, no_dist=True)
    torch.save(STATE, folder / "state.pt")
    if kind == "shards, metadata":
        hostile(folder / ".metadata", trace, how="protocol 4")
    else:
        hostile(folder / "state.pt", trace)
    return folder


FOLDERS = ("shards, state", "shards, metadata", "zero, state", "zero, DeepSpeed's")
NAMED = r"names (posix|nt)\.system, which could run code; nothing was run\. .*trust_checkpoint=true"


@pytest.mark.parametrize("how", ["torch.save", "protocol 2", "protocol 4", "protocol 5"])
def test_a_file_that_runs_a_command_is_refused_by_its_name(tmp_path: Path, trace: Path, how: str) -> None:
    with pytest.raises(RecipeError, match=NAMED) as refused:
        check_checkpoint(hostile(tmp_path / "latest.pt", trace, how=how))
    assert "\n" not in str(refused.value)
    assert not trace.exists()


def test_a_pickle_that_names_nothing_is_refused_for_what_it_has(tmp_path: Path) -> None:
    torch.save({"seen": {1, 2}}, tmp_path / "latest.pt", pickle_protocol=4)  # which torch's reader of data lacks
    with pytest.raises(RecipeError, match=r"latest\.pt cannot be read as data \(Unsupported operand 149\); nothing"):
        check_checkpoint(tmp_path / "latest.pt")
    with pytest.raises(ValueError, match=r"holds more than tensors \(Unsupported operand 149\), which"):
        read_weights(str(tmp_path / "latest.pt"))


def test_an_archive_that_says_to_be_a_part_of_several_is_damaged(tmp_path: Path) -> None:
    """Python's zipfile raises where it is asked whether this is an archive."""
    file = tmp_path / "latest.pt"
    torch.save(STATE, file)
    content = bytearray(file.read_bytes())
    locator = content.rindex(b"PK\x06\x07")  # of the end of a ZIP64's directory
    content[locator + 16] = 2  # disks in all
    file.write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=r"which is no whole checkpoint \(.*multidisk"):
        check_checkpoint(file)
    with pytest.raises(ValueError, match="cannot be read as weights"):
        read_weights(str(file))


@pytest.mark.parametrize("kind", FOLDERS)
def test_so_is_a_folder_with_one(tmp_path: Path, trace: Path, kind: str) -> None:
    if kind.startswith("zero"):
        pytest.importorskip("deepspeed")
    folder = hostile_folder(kind, tmp_path / "shards", trace)
    with pytest.raises(RecipeError, match=NAMED):
        check_checkpoint(folder)
    assert export([str(folder), str(tmp_path / "w.safetensors")]) == 2
    assert not trace.exists()


def test_tensors_of_shards_that_hide_a_pickle_are_read_as_data(tmp_path: Path, trace: Path) -> None:
    """DCP keeps what is no tensor as bytes, which it unpickles when it loads them."""
    folder = tmp_path / "shards"
    save({"model": {"w": torch.ones(2)}, "other": Payload(trace)}, checkpoint_id=folder, no_dist=True)
    torch.save(STATE, folder / "state.pt")
    check_checkpoint(folder)  # its records are in order; the bytes are read with the tensors
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    with reading(folder), pytest.raises(CheckpointException, match="system"):
        load({"other": None}, storage_reader=FileSystemReader(folder), no_dist=True)
    assert not trace.exists()


@pytest.mark.parametrize("place", ["load", "latest", "autoresume"])
def test_a_run_refuses_it_before_it_writes_anything(short_recipe, trace: Path, tmp_path: Path, place: str) -> None:
    recipe = short_recipe("run_name=hostile", "algorithms=null")
    checkpoints = recipe.run_dir / "checkpoints"
    checkpoints.mkdir(parents=True)
    path = hostile(checkpoints / "latest.pt" if place != "load" else tmp_path / "given.pt", trace)
    asked = {"load": f"load={path}", "latest": "load=latest", "autoresume": "autoresume=true"}[place]
    before = sorted(recipe.results_dir.rglob("*"))
    with pytest.raises(RecipeError, match=NAMED):
        session.train(short_recipe("run_name=hostile", "algorithms=null", asked), say=lambda text: None)
    assert not trace.exists()
    assert sorted(recipe.results_dir.rglob("*")) == before


def test_the_command_line_says_so_in_one_line(overrides, trace: Path, tmp_path: Path, capsys) -> None:
    path = hostile(tmp_path / "given.pt", trace)
    status = cli.main(["-f", "yamls/digits_medium.yaml", *overrides, "run_name=hostile", f"load={path}"])
    assert status == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not trace.exists()


def test_a_checkpoint_that_is_trusted_is_read_as_its_writer_wished(tmp_path: Path, trace: Path) -> None:
    path = hostile(tmp_path / "given.pt", trace)
    with reading(path, trust=True):
        assert torch.load(path, weights_only=False)["step"] == 3
    assert trace.exists()


def test_an_export_of_one_is_refused_unless_it_is_trusted(tmp_path: Path, trace: Path, capsys) -> None:
    path, target = tmp_path / "best.pt", tmp_path / "w.safetensors"
    torch.save({"state": {"model": {"module.w": torch.ones(2)}}, "more": Payload(trace)}, path)
    assert export([str(path), str(target)]) == 2
    assert "posix.system" in capsys.readouterr().err
    assert not target.exists()
    assert not trace.exists()
    assert export_checkpoint(path, target, trust_checkpoint=True) == 1
    assert trace.exists()


def test_weights_of_one_are_refused_by_its_name(tmp_path: Path, trace: Path) -> None:
    path = hostile(tmp_path / "w.pt", trace)
    with pytest.raises(ValueError, match=r"holds more than tensors \(posix\.system\)"):
        load_weights(torch.nn.Linear(2, 2), str(path))
    assert not trace.exists()


def test_reading_is_for_data_whatever_a_library_asks_torch_for(tmp_path: Path, trace: Path, monkeypatch) -> None:
    path = hostile(tmp_path / "w.pt", trace)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with data_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=False)
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    assert not trace.exists()


def test_reading_within_reading_forgets_nothing_that_was_allowed(tmp_path: Path) -> None:
    torch.save(timedelta(1), tmp_path / "time.pt")
    with data_only():
        with data_only():
            pass
        assert torch.load(tmp_path / "time.pt") == timedelta(1)


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", 0.5, 0.999])
def test_a_file_that_is_no_whole_checkpoint_is_refused_with_those_beside_it(tmp_path: Path, content) -> None:
    path = tmp_path / "latest.pt"
    torch.save({"weight": torch.rand(1000)}, path)
    shutil.copy(path, tmp_path / "best.pt")
    whole = path.read_bytes()
    path.write_bytes(content if isinstance(content, bytes) else whole[: int(len(whole) * content)])
    with pytest.raises(RecipeError, match=r"latest.pt, which is no whole checkpoint \(.*beside it: best.pt") as refused:
        check_checkpoint(path)
    assert "\n" not in str(refused.value)
