"""A machine that loses its disks: a run goes on elsewhere from the checkpoints at another place, to the same end."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import needs_fsdp, run_ranks
from remote_servers import Place, place_of

from training.checkpoints.remote.index import INDEX, Index, read_index
from training.checkpoints.remote.store import Store

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow, pytest.mark.xdist_group("faults")]
_OFTEN = ("autoresume=true", "checkpoints.every_steps=10")
_A_STATE_BYTES = 670_000


@pytest.fixture(params=["sftp", pytest.param("s3", marks=pytest.mark.exhaustive)])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with place_of(request.param, tmp_path / "home", monkeypatch) as made:
        yield made


def index_at(url: str, name: str) -> Index:
    content = Store(url, name).read(INDEX)
    assert content is not None, f"nothing was uploaded to {url}"
    return read_index(content)


def newest_step(url: str, name: str) -> int:
    return index_at(url, name).in_order()[0].step


def test_a_killed_run_goes_on_from_the_remote_on_an_empty_disk(runs: Any, place: Place) -> None:
    """The line breaks in the middle of the second checkpoint."""
    name, remote = f"lost_disk_{place.kind}", f"checkpoints.remote={place.url}"
    place.line.cut_after(_A_STATE_BYTES * 3 // 2)
    killed = runs.start(name, *_OFTEN, remote, fault="epoch_start:3:uploaded+SIGKILL")
    assert killed.returncode == -signal.SIGKILL
    assert place.line.drops == 1
    told = [killed.stderr.count(text) for text in ("cannot be written to: ", "can be written to again")]
    assert told == ([1, 1] if place.kind == "sftp" else [0, 0])  # botocore tries again by itself
    assert "Traceback" not in killed.stderr
    assert newest_step(place.url, name) == 44
    shutil.rmtree(runs.folder / name)
    again = runs.start(name, *_OFTEN, remote)
    assert again.returncode == 0, again.stderr
    assert f"downloaded the checkpoint of epoch 2, step 44 from {place.url}" in again.stdout
    assert "step 44" in again.stdout
    runs.assert_same_end(name, "whole")
    index = index_at(place.url, name)
    steps = {other: index.states[key].step for other, key in index.names.items()}
    assert steps.pop("previous.pt") in (44, 50, 60)  # those that the line was too slow for are left out
    assert steps == {"latest.pt": 66, "best.pt": 66}
    assert sorted([INDEX, *index.states]) == Store(place.url, name).names()


@pytest.mark.exhaustive
def test_a_signal_waits_for_the_last_upload_while_there_is_time(runs: Any, place: Place) -> None:
    name, remote = f"told_to_stop_{place.kind}", f"checkpoints.remote={place.url}"
    stopped = runs.start(name, *_OFTEN, remote, fault="batch_end:37:SIGTERM")
    assert stopped.returncode == 143, stopped.stderr
    assert newest_step(place.url, name) == 37
    place.line.down = True
    stopped = runs.start(name, *_OFTEN, remote, "checkpoints.stop_seconds=9", fault="batch_end:5:SIGTERM")
    assert stopped.returncode == 143, stopped.stderr
    assert f"the checkpoint of step 42 could not be uploaded to {place.url}/{name} within 8 s (" in stopped.stderr
    assert "is whole in" in stopped.stderr
    assert "no checkpoint could be written" not in stopped.stderr
    refused = runs.start(f"{name}_elsewhere", *_OFTEN, remote)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"run.py: checkpoints.remote: is {place.url}/{name}_elsewhere, which cannot be")
    assert refused.stderr.count("\n") == 1
    assert not (runs.folder / f"{name}_elsewhere").exists()
    place.line.down = False
    shutil.rmtree(runs.folder / name)
    again = runs.start(name, *_OFTEN, remote)
    assert again.returncode == 0, again.stderr
    assert "step 37" in again.stdout
    runs.assert_same_end(name, "whole")
    store = Store(place.url, name)
    for left in store.names():
        store.remove(left)
    complete = runs.start(name, *_OFTEN, remote)  # had its last upload not made it, this would be how to repeat it
    assert "is complete already" in complete.stdout
    assert newest_step(place.url, name) == 66


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "settings",
    [
        ("parallelism.strategy=ddp",),
        pytest.param(
            ("parallelism.strategy=fsdp", "checkpoints.sharded=true", "algorithms.sam=null"), marks=needs_fsdp
        ),
    ],
    ids=["ddp", "shards"],
)
def test_two_ranks_go_on_from_the_remote(runs: Any, tmp_path: Path, settings: tuple[str, ...], request: Any) -> None:
    name, kind = f"ranks_{request.node.callspec.id}", request.node.callspec.id
    remote = [*_OFTEN, *settings, f"checkpoints.remote={tmp_path / 'there'}"]
    run_ranks(2, "run.py", *runs.arguments(f"{name}_whole", *settings), timeout=200)
    script = ["tests/faults/faulty_run.py", "batch_end:50:SIGKILL"]
    run_ranks(2, *script, *runs.arguments(name, *remote), timeout=200, statuses=[-9, -9])
    step = newest_step(str(tmp_path / "there"), name)
    assert step >= 30
    shutil.rmtree(runs.folder / name)
    said = run_ranks(2, "run.py", *runs.arguments(name, *remote), timeout=200)
    assert f"step {step} from {tmp_path / 'there' / name}" in said
    assert runs._metrics(name) == runs._metrics(f"{name}_whole")
    if kind == "ddp":
        runs.assert_same_end(name, f"{name}_whole")
    links = [path for path in (runs.folder / name / "checkpoints").iterdir() if path.is_symlink()]
    assert len(links) == (3 if kind == "shards" else 0)
    assert len(list((runs.folder / name / "checkpoints").glob("shards-*"))) == len({link.resolve() for link in links})
