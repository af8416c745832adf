"""The index of a run's checkpoints at the remote: what there is, and under which names."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

from training.checkpoints.names import LATEST, previous_name

INDEX = "index.json"
TEXTS = ("recipe.yaml", "trackers.json")  # of the run's folder: what continuing needs beside a checkpoint
_STATE = re.compile(r"ep\d+-ba\d+-[0-9a-f]{16}(\.pt)?")
_NAME = re.compile(r"[\w-]+\.pt")


@dataclass(frozen=True)
class Stored:
    """A checkpoint. files: path within it -> size and SHA-256; the path is empty if it is a file itself."""

    key: str
    epoch: int
    step: int
    files: dict[str, tuple[int, str]]

    def path_of(self, file: str) -> str:
        """Where one of its files is in the run's folder."""
        return f"{self.key}/{file}" if file else self.key

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of shards."""
        return "" not in self.files

    def __str__(self) -> str:
        return f"the checkpoint of epoch {self.epoch}, step {self.step}"


@dataclass(frozen=True)
class Index:
    """writer: the process that uploads to this folder. names: latest.pt and so on -> a key. texts: small files."""

    writer: str
    names: dict[str, str] = field(default_factory=dict)
    states: dict[str, Stored] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

    def with_state(self, state: Stored, names: Sequence[str], *, keep: int) -> Index:
        """The index with `state` under `names`; what was latest.pt gets its next name, of `keep` in all."""
        given = dict(self.names)
        if LATEST in names and given.get(LATEST) not in (None, state.key):
            for number in range(keep - 1, 0, -1):
                older = LATEST if number == 1 else previous_name(number - 1)
                if older in given:
                    given[previous_name(number)] = given[older]
            numbers = range(keep, len(given) + keep)
            given = {name: key for name, key in given.items() if name not in map(previous_name, numbers)}
        given |= dict.fromkeys(names, state.key)
        states = {**self.states, state.key: state}
        return replace(self, names=given, states={key: states[key] for key in dict.fromkeys(given.values())})

    def in_order(self) -> list[Stored]:
        """The checkpoints in the order in which a run should try to resume from them."""
        first = [LATEST, *(previous_name(number) for number in range(1, len(self.names) + 1))]
        others = sorted(self.states.values(), key=lambda state: state.step, reverse=True)
        keys = [self.names[name] for name in first if name in self.names] + [state.key for state in others]
        return [self.states[key] for key in dict.fromkeys(keys)]

    def to_json(self) -> bytes:
        """For `read_index`."""
        return json.dumps({"format": 1, **asdict(self)}, indent=1).encode()


def new_writer() -> str:
    """A name of this process, unlike any other's."""
    return f"{socket.gethostname()}, process {os.getpid()}, {uuid4().hex[:8]}"


def read_index(content: bytes) -> Index:
    """Raises ValueError if `content` is no index, or has names that are not ours: they become paths here."""
    try:
        found = json.loads(content)
        states = {key: _stored(key, state) for key, state in found["states"].items()}
        index = Index(str(found["writer"]), dict(found["names"]), states, dict(found["texts"]))
        known = all(_NAME.fullmatch(name) and key in states for name, key in index.names.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{INDEX} is damaged ({type(error).__name__})") from None
    if found["format"] != 1 or not known or not set(index.texts) <= set(TEXTS):
        raise ValueError(f"{INDEX} is damaged, or of another version")
    return index


def _stored(key: str, state: Mapping[str, Any]) -> Stored:
    files = {str(path): (int(size), str(sha)) for path, (size, sha) in state["files"].items()}
    inside = all(".." not in PurePosixPath(path).parts and not path.startswith("/") for path in files)
    if not _STATE.fullmatch(key) or not inside:
        raise ValueError(key)
    return Stored(key, int(state["epoch"]), int(state["step"]), files)


def describe(checkpoint: Path, stamp: tuple[int, int]) -> Stored:
    """What the index says of a local checkpoint of epoch and step `stamp`. Reads all of it."""
    if checkpoint.is_file():
        files = {"": _size_and_sum(checkpoint)}
    else:
        paths = sorted(path for path in checkpoint.rglob("*") if path.is_file())
        files = {path.relative_to(checkpoint).as_posix(): _size_and_sum(path) for path in paths}
    content = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]
    key = f"ep{stamp[0]}-ba{stamp[1]}-{content}{'.pt' if '' in files else ''}"
    return Stored(key, *stamp, files)


def difference(checkpoint: Path, state: Stored) -> str | None:
    """What of a copy of `state` is not as it was uploaded; None if nothing is."""
    for name, (size, sha) in state.files.items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != size or _size_and_sum(path)[1] != sha:
            return f"{name or 'it'} is not as it was uploaded"
    return None


def _size_and_sum(path: Path) -> tuple[int, str]:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return file.tell(), digest.hexdigest()
