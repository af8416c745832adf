"""Checkpoints at another place: what is there at any moment, what is told, and what is brought back."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from training.checkpoints.names import LATEST, newest_first
from training.checkpoints.remote import fetching
from training.checkpoints.remote.fetching import bring_newest, newest_step
from training.checkpoints.remote.index import INDEX, Index, Stored, describe, read_index
from training.checkpoints.remote.store import PARTIAL, Store, reason_of
from training.checkpoints.remote.uploads import Uploads
from training.recipe import Recipe, RecipeError, load_recipe
from training.recipe.remote import mask

pytestmark = pytest.mark.timeout(60)
RECIPE = "yamls/digits_medium.yaml"


def recipe_of(folder: Path, *more: str, run_name: str = "run") -> Recipe:
    given = [f"results_dir={folder / 'results'}", f"run_name={run_name}", f"checkpoints.remote={folder / 'there'}"]
    return load_recipe(RECIPE, [*given, *more])


class TestTheKey:
    @pytest.mark.parametrize(
        ("url", "told"),
        [
            ("ftp://host/folder", "ftp is no protocol that is known here; give s3://BUCKET"),
            ("sftp://someone:secret@host/folder", r"is sftp://someone:\*\*\*@host/folder, which holds a password"),
            ("s3://key:secret@bucket", r"is s3://key:\*\*\*@bucket, which holds a password"),
            ("s3://", "names no folder"),
            ("sftp://host", "names no folder"),
            ("s3://bucket/prefix?versionId=3", "mean something else"),
            ('""', "or null for none"),
            ("results", "where the run's own results are"),
            ("file://results", "where the run's own results are"),
        ],
    )
    def test_what_cannot_be_is_one_line(self, url: str, told: str) -> None:
        with pytest.raises(RecipeError, match=told) as refused:
            load_recipe(RECIPE, [f"checkpoints.remote={url}"])
        assert "secret" not in str(refused.value)
        assert "\n" not in str(refused.value)

    @pytest.mark.parametrize(
        ("url", "package"), [("s3://bucket", "s3fs"), ("gs://bucket/a", "gcsfs"), ("sftp://host:22/folder", "paramiko")]
    )
    def test_a_missing_package_is_one_line(self, url: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
        with pytest.raises(RecipeError, match=f"needs {package}, and that is missing: pip install {package}, or set"):
            load_recipe(RECIPE, [f"checkpoints.remote={url}"])

    def test_errors_of_libraries_are_told_without_passwords(self) -> None:
        assert (
            reason_of(OSError("no way\nto http://someone:secret@proxy:80.")) == "no way to http://someone:***@proxy:80"
        )
        assert reason_of(TimeoutError()) == "TimeoutError"
        assert mask("sftp://host:22/folder") == "sftp://host:22/folder"


def stored(step: int, content: str = "0" * 16) -> Stored:
    return Stored(f"ep1-ba{step}-{content}.pt", 1, step, {"": (3, "0" * 64)})


class TestTheIndex:
    @pytest.mark.parametrize("keep", [1, 2, 4])
    def test_as_many_are_kept_as_asked(self, keep: int) -> None:
        index = Index("someone")
        for step in range(1, 8):
            index = index.with_state(stored(step), [LATEST, *(["best.pt"] if step == 2 else [])], keep=keep)
            index = index.with_state(stored(step), [LATEST], keep=keep)  # a second time changes nothing
        names = [LATEST, "previous.pt", "previous-2.pt", "previous-3.pt"][:keep]
        assert {name: index.states[key].step for name, key in index.names.items()} == {
            **{name: 7 - age for age, name in enumerate(names)}, "best.pt": 2,
        }  # fmt: skip
        assert [state.step for state in index.in_order()] == [*range(7, 7 - keep, -1), 2]
        assert read_index(index.to_json()) == index

    @pytest.mark.parametrize(
        "change",
        [
            lambda text: text[:-20],
            lambda text: text.replace("ep1-ba1", "../../ep1-ba1"),
            lambda text: text.replace('"": [', '"../../.bashrc": ['),
            lambda text: text.replace('"": [', '"/etc/passwd": ['),
            lambda text: text.replace('"latest.pt"', '"../latest.pt"'),
            lambda text: text.replace('"recipe.yaml"', '"../.bashrc"'),
            lambda text: text.replace('"format": 1', '"format": 2'),
            lambda text: "[]",
        ],
    )
    def test_an_index_that_would_write_elsewhere_is_refused(self, change: Callable[[str], str]) -> None:
        index = Index("someone", texts={"recipe.yaml": "a: 1"}).with_state(stored(1), [LATEST], keep=2)
        changed = change(index.to_json().decode())
        assert changed != index.to_json().decode()
        with pytest.raises(ValueError, match=r"index\.json is damaged"):
            read_index(changed.encode())


class Line(Store):
    """A folder, to which the line can be away or slow. done: what was changed there, in order."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder / "there"), "run")
        self.away = False
        self.open = threading.Event()
        self.open.set()
        self.done: list[str] = []
        self.failed = 0

    def _pass(self, what: str) -> None:
        self.open.wait()
        if self.away:
            self.failed += 1
            raise ConnectionError("no route to http://me:secret@host")
        self.done.append(what)

    def put(self, source: Path, name: str) -> None:
        self._pass(f"put {name.partition('-0')[0].rpartition('-')[0]}")
        super().put(source, name)

    def write(self, name: str, content: bytes) -> None:
        self._pass(f"write {name}")
        super().write(name, content)

    def remove(self, name: str) -> None:
        self._pass(f"remove {name.rpartition('-')[0]}")
        super().remove(name)


class Machine:
    """A run's folder, and what uploads from it."""

    def __init__(self, folder: Path, *, keep: int = 2, fresh: bool = True) -> None:
        self.folder = folder / "results" / "run" / "checkpoints"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.line = Line(folder)
        self.uploads = Uploads(self.line, self.folder, keep=keep, waits_seconds=(0.01, 0.02))
        self.uploads.start(fresh=fresh)

    def save(self, step: int, *names: str) -> None:
        """As Checkpoints does: a new file under its names."""
        beside = self.folder / "new"
        checkpoint_at(beside, step)
        for name in [*names, LATEST]:
            (self.folder / name).unlink(missing_ok=True)
            (self.folder / name).hardlink_to(beside)
        beside.unlink()
        self.uploads.offer(self.folder / LATEST, [LATEST, *names], (1, step))

    def settle(self) -> None:
        self.uploads.finish(seconds=20)

    def index(self) -> Index:
        content = self.line.read(INDEX)
        assert content is not None
        return read_index(content)

    def steps(self) -> dict[str, int]:
        index = self.index()
        return {name: index.states[key].step for name, key in index.names.items()}

    def there(self) -> list[str]:
        return [name.rpartition("-")[0] or name for name in self.line.names()]


def checkpoint_at(path: Path, step: int) -> Path:
    state = {"timestamp": {"Timestamp": {"epoch": 1, "batch": step}}, "model": torch.full((50,), step)}
    torch.save({"state": state}, path)
    return path


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    made.line.away = False
    made.line.open.set()
    made.uploads.close(seconds=5)


class TestUploads:
    def test_the_index_comes_after_what_it_names_and_what_is_old_goes_last(self, machine: Machine) -> None:
        for step in (1, 2, 3):
            machine.save(step, *(["best.pt"] if step == 2 else []))
            machine.settle()
        assert machine.steps() == {"latest.pt": 3, "previous.pt": 2, "best.pt": 2}
        write = "write index.json"
        assert machine.line.done == [
            write, "put ep1-ba1", write, "put ep1-ba2", write, "put ep1-ba3", write, "remove ep1-ba1",
        ]  # fmt: skip
        assert machine.there() == ["ep1-ba2", "ep1-ba3", INDEX]
        assert sorted(path.name for path in machine.folder.iterdir()) == ["best.pt", "latest.pt"]

    def test_after_an_outage_the_newest_alone_is_caught_up(
        self, machine: Machine, caplog: pytest.LogCaptureFixture
    ) -> None:
        machine.save(1, "best.pt")
        machine.settle()
        machine.line.away = True
        for step in range(2, 7):
            machine.save(step, *(["ep4.pt"] if step == 4 else []))
        while machine.line.failed < 5:
            threading.Event().wait(0.01)
        assert len(list(machine.folder.glob(".checkpoint-upload-*"))) <= 3
        machine.line.away = False
        machine.settle()
        assert machine.steps() == {"latest.pt": 6, "previous.pt": 1, "best.pt": 1, "ep4.pt": 4}
        away, back = (record.getMessage() for record in caplog.records)
        assert "cannot be written to: no route to http://me:***@host. Training goes on" in away
        assert back.endswith("can be written to again; the checkpoint of epoch 1, step 6 is there")

    def test_a_slow_line_does_not_starve(self, machine: Machine) -> None:
        """What is under way is completed, and kept until then; what waits gives way to what is newer."""
        machine.line.open.clear()
        machine.save(1)
        while machine.uploads._under_way is None:
            threading.Event().wait(0.01)
        for step in (2, 3, 4):
            machine.save(step)
        machine.line.open.set()
        machine.settle()
        assert machine.steps() == {"latest.pt": 4, "previous.pt": 1}

    def test_a_run_that_begins_anew_leaves_the_one_before_there(
        self, machine: Machine, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        machine.save(1)
        machine.settle()
        (tmp_path / "there" / "run" / f"{PARTIAL}1234").write_text("of a process that was killed")
        shutil.copy(machine.folder / LATEST, tmp_path / "there" / "run" / f"ep9-ba9-{'0' * 16}.pt")
        anew = Machine(tmp_path)
        anew.save(2)
        anew.settle()
        assert anew.steps() == {"latest.pt": 2}
        assert anew.there() == ["ep1-ba1", "ep1-ba2", "index.1.json", INDEX]
        assert "its checkpoints stay there, named in index.1.json" in caplog.text
        # The one before is alive all the same: it ends what it does there.
        machine.save(3)
        machine.settle()
        assert anew.steps() == {"latest.pt": 2}
        assert "another run uploads there" in caplog.text

    def test_what_no_index_came_to_name_is_removed(self, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
        machine.save(1)
        machine.settle()
        write = Line.write

        def fails(line: Line, name: str, content: bytes) -> None:
            line.failed += 1
            raise ConnectionError("after the contents")

        monkeypatch.setattr(Line, "write", fails)
        machine.save(2)
        while not machine.line.failed:
            threading.Event().wait(0.01)
        machine.save(3)
        monkeypatch.setattr(Line, "write", write)
        machine.settle()
        assert machine.there() == ["ep1-ba1", "ep1-ba3", INDEX]

    def test_a_run_that_goes_on_keeps_what_is_there(self, machine: Machine, tmp_path: Path) -> None:
        machine.save(1, "best.pt")
        machine.settle()
        goes_on = Machine(tmp_path, fresh=False)
        goes_on.save(2)
        goes_on.settle()
        assert goes_on.steps() == {"latest.pt": 2, "previous.pt": 1, "best.pt": 1}

    def test_what_did_not_make_it_is_told(self, machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
        machine.save(1)
        machine.settle()
        machine.line.away = True
        machine.save(2)
        while not machine.line.failed:
            threading.Event().wait(0.01)
        machine.uploads.finish(seconds=0)
        told = caplog.records[-1].getMessage()
        assert told.startswith("the checkpoint of step 2 could not be uploaded to ")
        assert "(no route to http://me:***@host); step 1 is there. It is whole in " in told

    def test_a_full_disk_is_told_and_stops_nothing(
        self, machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def full(*given: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("training.checkpoints.remote.uploads.give_name", full)
        machine.save(1)
        machine.settle()
        assert "step 1 is not uploaded: [Errno 28] No space left on device" in caplog.text


@pytest.fixture
def uploaded(machine: Machine, tmp_path: Path) -> Path:
    """Steps 1, the best, 2 and 3 at the remote, and nothing here."""
    (machine.folder.parent / "recipe.yaml").write_text("as it was")
    for step in (1, 2, 3):
        machine.save(step, *(["best.pt"] if step == 1 else []))
        machine.settle()
    shutil.rmtree(tmp_path / "results")
    return tmp_path


def local(folder: Path) -> dict[str, int | None]:
    here = folder / "results" / "run" / "checkpoints"
    return {path.name: step_at(path) for path in newest_first(here)}


def step_at(path: Path) -> int:
    return int(torch.load(path)["state"]["timestamp"]["Timestamp"]["batch"])


def damage(folder: Path, step: int) -> None:
    (path,) = (folder / "there" / "run").glob(f"ep1-ba{step}-*")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


class TestFetching:
    def test_an_empty_folder_gets_what_the_run_had(self, uploaded: Path) -> None:
        said: list[str] = []
        bring_newest(recipe_of(uploaded, "autoresume=true"), said.append)
        assert local(uploaded) == {"latest.pt": 3, "best.pt": 1}
        assert (uploaded / "results" / "run" / "recipe.yaml").read_text() == "as it was"
        assert said == [f"downloaded the checkpoint of epoch 1, step 3 from {uploaded / 'there' / 'run'}"]

    def test_a_damaged_one_gives_way_to_the_one_before(self, uploaded: Path) -> None:
        damage(uploaded, 3)
        damage(uploaded, 1)
        said: list[str] = []
        bring_newest(recipe_of(uploaded), said.append)
        assert local(uploaded) == {"latest.pt": 2}
        best, newest = said
        assert "the best checkpoint, is not whole (it is not as it was uploaded); it is left out" in best
        assert "is no whole checkpoint (it is not as it was uploaded); downloaded the checkpoint of epoch 1" in newest
        assert not list((uploaded / "results" / "run" / "checkpoints").glob(".*"))

    @pytest.mark.parametrize("how", ["damaged", "removed"])
    def test_none_that_is_whole_is_refused(self, uploaded: Path, how: str) -> None:
        for step in (1, 2, 3):
            damage(uploaded, step)
        if how == "removed":
            for path in (uploaded / "there" / "run").glob("ep*"):
                path.unlink()
        with pytest.raises(RecipeError, match=r"has none that is whole: .*ep1-ba3.*; .*ep1-ba2.*Begin anew with"):
            bring_newest(recipe_of(uploaded), print)

    @pytest.mark.parametrize(("here", "then"), [(2, 3), (3, 3), (4, 4)])
    def test_the_newer_one_is_taken(self, uploaded: Path, here: int, then: int) -> None:
        folder = uploaded / "results" / "run" / "checkpoints"
        folder.mkdir(parents=True)
        checkpoint_at(folder / LATEST, here)
        bring_newest(recipe_of(uploaded), print)
        found = local(uploaded)
        assert found[LATEST] == then
        assert found.get("previous.pt") == (2 if here == 2 else None)

    def test_a_damaged_one_here_counts_for_nothing(self, uploaded: Path) -> None:
        folder = uploaded / "results" / "run" / "checkpoints"
        folder.mkdir(parents=True)
        checkpoint_at(folder / LATEST, 9).write_bytes(b"cut")
        checkpoint_at(folder / "previous.pt", 2)
        assert newest_step(folder) == 2
        bring_newest(recipe_of(uploaded), print)
        assert step_at(folder / LATEST) == 3

    def test_a_remote_that_cannot_be_read_is_refused_unless_something_is_here(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def away(store: Store, name: str) -> bytes:
            raise ConnectionError("no route")

        monkeypatch.setattr(Store, "read", away)
        monkeypatch.setattr("training.checkpoints.remote.fetching._WAITS_SECONDS", (0, 0))
        with pytest.raises(RecipeError, match=r"cannot be read: no route\. .* has no whole checkpoint either"):
            bring_newest(recipe_of(tmp_path), print)
        folder = tmp_path / "results" / "run" / "checkpoints"
        folder.mkdir(parents=True)
        checkpoint_at(folder / LATEST, 1)
        said: list[str] = []
        bring_newest(recipe_of(tmp_path), said.append)
        assert said == [f"{tmp_path / 'there' / 'run'} cannot be read: no route. Continuing with what is in {folder}"]

    def test_an_empty_one_that_cannot_be_written_to_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bring_newest(recipe_of(tmp_path), print)  # which is empty
        assert not (tmp_path / "results").exists()

        def nobodys(store: Store, name: str, content: bytes) -> None:
            raise FileNotFoundError("The specified bucket does not exist")

        monkeypatch.setattr(Store, "write", nobodys)
        with pytest.raises(RecipeError, match="The specified bucket does not exist"):
            bring_newest(recipe_of(tmp_path), print)

    def test_another_machine_gets_the_same_into_a_folder_of_its_own(
        self, uploaded: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        index = read_index(Store(str(uploaded / "there"), "run").read(INDEX) or b"")
        monkeypatch.setattr(fetching.dist, "get_global_rank", lambda: 8)
        monkeypatch.setattr(fetching.dist, "get_local_rank", lambda: 0)
        chosen = index.states[index.names["previous.pt"]]  # by the first rank, for which the newest was damaged
        monkeypatch.setattr(fetching, "do_together", lambda work: [work() or (index, chosen)])
        bring_newest(recipe_of(uploaded), print)
        assert local(uploaded) == {"latest.pt": 2, "best.pt": 1}
        shutil.rmtree(uploaded / "there")
        bring_newest(recipe_of(uploaded), print)  # the folder is also the first rank's: nothing is downloaded again
        with pytest.raises(RecipeError, match="rank 8 cannot read it"):
            bring_newest(recipe_of(uploaded, run_name="another"), print)

    def test_shards_come_back_as_a_folder(self, machine: Machine, tmp_path: Path) -> None:
        shards = machine.folder / "shards-ep1-ba5"
        shards.mkdir()
        checkpoint_at(shards / "state.pt", 5)
        (shards / "__0_0.distcp").write_bytes(b"tensors")
        machine.uploads.offer(shards, [LATEST, "best.pt"], (1, 5))
        machine.settle()
        assert describe(shards, (1, 5)).key in machine.index().states
        shutil.rmtree(tmp_path / "results")
        bring_newest(recipe_of(tmp_path), print)
        latest, best = (tmp_path / "results" / "run" / "checkpoints" / name for name in (LATEST, "best.pt"))
        assert latest.resolve() == best.resolve()
        assert (latest / "__0_0.distcp").read_bytes() == b"tensors"
        assert newest_step(latest.parent) == 5


@pytest.fixture(autouse=True)
def _told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
