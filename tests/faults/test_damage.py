"""A checkpoint that is not as it was written is never loaded: the one before is, or the run is refused."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import needs_fsdp, run_ranks

from training.checkpoints.choosing import choose_checkpoint
from training.recipe import RecipeError, load_recipe

pytestmark = [pytest.mark.timeout(200), pytest.mark.slow, pytest.mark.xdist_group("faults")]


def cut(share: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return damage


def flip(member: str, bit: int = 6) -> Callable[[Path], None]:
    """One bit in the middle of a member of the archive."""

    def damage(path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            largest = max((one for one in archive.infolist() if member in one.filename), key=lambda one: one.file_size)
            content = archive.read(largest)
        whole = bytearray(path.read_bytes())
        whole[whole.index(content) + len(content) // 2] ^= 1 << bit
        path.write_bytes(whole)

    return damage


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "a tensor's bit": flip("/data/"),
    "the pickle's bit": flip("data.pkl", 0),
    "cut to 10 %": cut(0.1),
    "cut to 50 %": cut(0.5),
    "cut to 99.9 %": cut(0.999),
    "empty": cut(0),
    "garbage": lambda path: path.write_bytes(b"\x93garbage" * 5000),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "text": lambda path: path.write_text("epoch: 3\n"),
    "deleted": Path.unlink,
}


@pytest.fixture(scope="session")
def cut_run(runs: Any) -> Path:
    """A run that stopped after step 50: latest.pt there, previous.pt at 40, best.pt and ep1.pt before."""
    settings = ["checkpoints.every_steps=10", "checkpoints.keep_every_epochs=1"]
    stopped = runs.start("cut", *settings, fault="batch_end:50:SIGKILL")
    assert stopped.returncode == -9
    assert [runs.step("cut", file) for file in ("latest.pt", "previous.pt", "ep1.pt")] == [44, 40, 22]
    return runs.folder / "cut"


def copy_of(cut_run: Path, name: str) -> Path:
    """Links would share the damage."""
    copy = cut_run.with_name(name)
    shutil.copytree(cut_run, copy)
    recipe = copy / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("run_name: cut", f"run_name: {name}"))
    return copy


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_one_before_is_taken(runs: Any, cut_run: Path, damage: str) -> None:
    name = "damage " + damage.replace(" %", "").replace("'", "")
    folder = copy_of(cut_run, name) / "checkpoints"
    DAMAGES[damage](folder / "latest.pt")
    for how in ("load=latest", "autoresume=true"):
        said: list[str] = []
        recipe = load_recipe("yamls/digits_medium.yaml", runs.arguments(name, how)[2:])
        assert choose_checkpoint(recipe, said.append) == str(folder / "previous.pt")
        if damage != "deleted":
            (text,) = said
            assert text.startswith(f"is {folder / 'latest.pt'}, which is no whole checkpoint (")
            assert text.endswith(f"Continuing from {folder / 'previous.pt'}")
    if damage != "deleted":
        recipe = load_recipe("yamls/digits_medium.yaml", runs.arguments(name, f"load={folder / 'latest.pt'}")[2:])
        with pytest.raises(RecipeError, match=r"no whole checkpoint .*beside it: .*best\.pt, ep1\.pt.* previous\.pt"):
            choose_checkpoint(recipe, said.append)


def test_a_run_goes_on_from_the_one_before_to_the_same_end(runs: Any, cut_run: Path) -> None:
    copy_of(cut_run, "goes on")
    DAMAGES["a tensor's bit"](runs.checkpoint("goes on"))
    again = runs.start("goes on", "autoresume=true")
    assert again.returncode == 0, again.stderr
    assert "the checksum of" in again.stdout
    assert "step 40" in again.stdout
    runs.assert_same_end("goes on", "whole")


def test_best_is_taken_if_all_others_are_gone(runs: Any, cut_run: Path) -> None:
    folder = copy_of(cut_run, "best only") / "checkpoints"
    for path in folder.glob("*.pt"):
        if path.name != "best.pt":
            path.unlink()
    recipe = load_recipe("yamls/digits_medium.yaml", runs.arguments("best only", "autoresume=true")[2:])
    assert choose_checkpoint(recipe, print) == str(folder / "best.pt")


def test_nothing_whole_is_one_line(runs: Any, cut_run: Path) -> None:
    folder = copy_of(cut_run, "none") / "checkpoints"
    for path in folder.glob("*.pt"):
        path.write_bytes(b"")
    refused = runs.start("none", "autoresume=true")
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"run.py: load: is {folder / 'latest.pt'}, which is no whole checkpoint (")
    assert refused.stderr.count("\n") == 1
    assert all(path.stat().st_size == 0 for path in folder.glob("*.pt"))


@needs_fsdp
@pytest.mark.parametrize("file", ["__0_0.distcp", "__1_0.distcp", "state.pt", ".metadata", "sums-rank0.json"])
def test_of_shards_every_file_has_a_checksum(runs: Any, file: str) -> None:
    name = "shards"
    if not (runs.folder / name).exists():
        settings = ["parallelism.strategy=fsdp", "checkpoints.sharded=true", "checkpoints.every_steps=10"]
        arguments = runs.arguments(name, *settings, "algorithms.sam=null")
        script = "tests/faults/faulty_run.py"
        run_ranks(2, script, "batch_end:25:SIGKILL", *arguments, timeout=150, statuses=[-9, -9])
    copy = runs.folder / f"shards {file}"
    shutil.copytree(runs.folder / name, copy, symlinks=True)
    path = copy / "checkpoints" / "latest.pt" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    said: list[str] = []
    recipe = load_recipe("yamls/digits_medium.yaml", runs.arguments(copy.name, "load=latest")[2:])
    assert choose_checkpoint(recipe, said.append) == str(copy / "checkpoints" / "previous.pt")
    assert len(said) == 1
