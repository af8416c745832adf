"""WebDataset: images and their labels in tar archives, shards, read where they are in the archive."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..prefetch import PrefetchIterator
from .base import MOST_FILE_BYTES, EncodedSource, Odd, file_stamp
from .fetching import fetched, is_there
from .image_file import UnusableImage
from .labels import BadLabel, Label, checked, number_labels, read_class_names, read_label, shown, tell_of_lacking
from .listing import Parts, expanded, is_url, list_files, stamp_of
from .tar_index import Member, members

IMAGES = ("jpg", "jpeg", "png", "webp")
CLASSES = "classes.txt"
_SUFFIXES = (".tar",)
_MOST_LABEL_BYTES = 1 << 20
_AT_ONCE = 4  # shards whose headers are read


def webdataset(
    path: str,
    *,
    split: str | None = None,
    eval_path: str | None = None,
    test_path: str | None = None,
    eval_fraction: float | None = None,
    test_fraction: float = 0.0,
    split_seed: int = 0,
    label: str = "label",
    classes: str | None = None,
    cache_dir: str = ".cache/brisk/shards",
    download: bool = True,
) -> EncodedSource:
    """Tar archives in which KEY.jpg (jpeg, png, webp) stands beside KEY.cls, a number as text, or KEY.json.

    The key is the name up to the first dot behind its last slash. Images are in the order of the shards, and in these
    in that of the archive. Nothing is unpacked. What cannot be used (an image without a label, a key given twice, a
    link) is in the source's `odd`; an archive that is not whole is refused.

    Args:
        path: of the training images: a file, a pattern as `shards/train-{000000..000012}.tar` or `shards/train-*.tar`,
            or a folder whose shards are named after their split, as train-000000.tar and val-000000.tar. A URL (http,
            https, s3, gs), with braces, is downloaded to `cache_dir` whole, and read there.
        split: None reads all of `path`, "train", "eval" and "test" their part.
        eval_path, test_path: the same for the other splits.
        eval_fraction, test_fraction, split_seed: divide the images of `path` instead, as `folder` does.
        label: which field of KEY.json has the label, a number or the name of a class.
        classes: a file of class names, one a line in the order of the labels. None takes `classes.txt` beside the
            first shard, if there is one; else the names are the labels' words, or their numbers.
        cache_dir: where shards of a URL are kept; they are downloaded again when they change there.
        download: False uses the shards in `cache_dir` alone.

    Raises:
        FileNotFoundError: no such shards, or they cannot be downloaded.
        ValueError: a damaged shard, no image, labels that do not fit the classes, settings that exclude each other.
        ModuleNotFoundError: the package that a URL needs is not installed.
    """
    fetch = _Fetch(Path(cache_dir), download)
    parts = Parts(path, eval_path, test_path, eval_fraction, test_fraction, split_seed)
    by_name = Path(path).is_dir()
    own, part, shares = parts.of(split, by_name=by_name)
    shards = fetch.shards(own, part)
    names = fetch.class_names(classes, shards, own)

    def trained_on() -> Sequence[Label]:
        training, its_part, _ = parts.of("train" if by_name and split is not None else None, by_name=by_name)
        return _labels(_indexed(fetch.shards(training, its_part), label))

    indices = _indexed(shards, label)
    store = Shards(shards, indices)
    odd = tuple(one for index in indices for one in index.odd)
    if not len(store):
        reason = f"; the first of {len(odd)} that cannot be used is {odd[0].where}: {odd[0].reason}" if odd else ""
        raise ValueError(
            f"{own} has no image with a label: shards hold KEY.jpg (or {', '.join(IMAGES[1:])}) beside KEY.cls or "
            f"KEY.json{reason}"
        )
    name = f"webdataset {own}" + (f" {part}" if part else "")
    labels, names = number_labels(_labels(indices), names, trained_on, name)
    tell_of_lacking(labels, names, name)
    source = EncodedSource(store, np.arange(len(store)), labels, class_names=names, name=name, odd=odd)
    return source if shares is None or split is None else source.divided(split, shares)


def webdataset_stamp(path: str, *, split: str | None = None, **settings: object) -> str:
    """Sizes and times of the local shards of every split, and of the class names; "" for those at a URL."""
    found: list[Path] = []
    for one in (path, settings.get("eval_path"), settings.get("test_path")):
        if isinstance(one, str) and not is_url(one):
            found += list_files(one, None, suffixes=_SUFFIXES)
    names = settings.get("classes") or (found[0].with_name(CLASSES) if found else None)
    return stamp_of([*found, *([names] if isinstance(names, str | Path) else [])])


class Shards:
    """The images in tar archives, as a `Store`: row i is the i-th image of all."""

    def __init__(self, paths: Sequence[Path], indices: Sequence[Index]) -> None:
        self._paths = list(paths)
        self._names = [name for index in indices for name in index.names]
        counts = [len(index.names) for index in indices]
        self._shards = np.repeat(np.arange(len(counts)), counts)
        self._starts = np.concatenate([index.starts for index in indices])
        self._sizes = np.concatenate([index.sizes for index in indices])

    def __len__(self) -> int:
        return len(self._names)

    def read(self, row: int) -> bytes:
        # Opened anew each time: no descriptors that threads and forked processes would share or run out of.
        with self._paths[self._shards[row]].open("rb", buffering=0) as file:
            file.seek(int(self._starts[row]))
            size = int(self._sizes[row])
            content = bytearray()
            while len(content) < size and (more := file.read(size - len(content))):
                content += more
        if len(content) < size:
            raise UnusableImage("its archive was cut short since it was opened")
        return bytes(content)

    def where(self, row: int) -> str:
        return _where(self._paths[self._shards[row]], self._names[row])

    def key(self, row: int) -> str:
        return self._names[row]

    def stamps(self) -> Iterable[str]:
        return (f"{path} {file_stamp(path)}" for path in self._paths)


class Index(NamedTuple):
    """The images of a shard: their names, where their bytes are, their labels; and what cannot be used."""

    names: list[str]
    starts: np.ndarray
    sizes: np.ndarray
    labels: list[Label]
    odd: list[Odd]


class _Sample:
    """What a shard holds under one key."""

    def __init__(self) -> None:
        self.images: list[Member] = []
        self.labels: dict[str, list[Member]] = {"cls": [], "json": []}


class _Fetch:
    """Shards and class names, wherever they are."""

    def __init__(self, cache_dir: Path, download: bool) -> None:
        self._cache_dir, self._download = cache_dir, download

    def shards(self, path: str, split: str | None) -> list[Path]:
        if is_url(path):
            return fetched(expanded(path), self._cache_dir, download=self._download)
        return list_files(path, split, suffixes=_SUFFIXES)

    def class_names(self, given: str | None, shards: Sequence[Path], path: str) -> tuple[str, ...] | None:
        if given is not None:
            return read_class_names(self._one(given) if is_url(given) else Path(given))
        if not is_url(path):
            beside = shards[0].with_name(CLASSES)
            return read_class_names(beside) if beside.is_file() else None
        beside = f"{expanded(path)[0].rpartition('/')[0]}/{CLASSES}"
        there = is_there(beside, self._cache_dir, download=self._download)
        return read_class_names(self._one(beside)) if there else None

    def _one(self, url: str) -> Path:
        return fetched([url], self._cache_dir, download=self._download)[0]


def _indexed(shards: Sequence[Path], field: str) -> list[Index]:
    tasks = (partial(_index, path, file_stamp(path), field) for path in shards)
    return list(PrefetchIterator(tasks, num_workers=min(_AT_ONCE, len(shards))))


@lru_cache(maxsize=1 << 14)  # every split of a run, and its loaders, ask for the same
def _index(path: Path, stamp: str, field: str) -> Index:
    """The images of the shard at `path`, which has this `stamp`, with labels from the JSON's `field`."""
    samples: dict[str, _Sample] = {}
    odd: list[Odd] = []
    for member in members(path):
        key, dot, extension = _split_name(member.name)
        extension = extension.lower()
        inner, _, last = extension.rpartition(".")
        if not dot or last not in (*IMAGES, "cls", "json") or (inner and last not in IMAGES):
            continue
        reason = _refusal(member, extension)
        if reason:
            odd.append(Odd(_where(path, member.name), reason))
            continue
        sample = samples.setdefault(key, _Sample())
        (sample.images if extension in IMAGES else sample.labels[extension]).append(member)
    index = Index([], np.array([], np.int64), np.array([], np.int64), [], odd)
    starts, sizes = [], []
    with path.open("rb", buffering=0) as file:
        for key, sample in samples.items():
            if not sample.images:
                odd.append(Odd(_where(path, key), "it has a label and no image"))
                continue
            image = sample.images[0]
            try:
                number = _label(file, sample, field)
            except BadLabel as error:
                odd.append(Odd(_where(path, image.name), str(error)))
                continue
            index.names.append(image.name)
            index.labels.append(number)
            starts.append(image.start)
            sizes.append(image.size)
    return index._replace(starts=np.array(starts, np.int64), sizes=np.array(sizes, np.int64))


def _split_name(name: str) -> tuple[str, str, str]:
    """As WebDataset does: the extension begins at the first dot behind the last slash."""
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    return folder + slash + stem, dot, extension


def _refusal(member: Member, extension: str) -> str:
    if member.odd:
        return f"it is {member.odd}, and only plain files are read"
    if "." in extension:
        return f"its key ends at its first dot, and .{extension} is no image: give it a name without dots"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "its name leads out of the archive"
    most = MOST_FILE_BYTES if extension in IMAGES else _MOST_LABEL_BYTES
    return f"it has {member.size} bytes, and {most} are the most" if member.size > most else ""


def _label(file: FileIO, sample: _Sample, field: str) -> Label:
    kind = "cls" if sample.labels["cls"] else "json"
    given = sample.labels[kind]
    if len(sample.images) > 1 or len(given) > 1:
        raise BadLabel("its key is there twice, and which of both counts cannot be told")
    if not given:
        raise BadLabel("it has no label: neither a .cls nor a .json of its key")
    file.seek(given[0].start)
    content = file.read(given[0].size)
    try:
        text = content.decode()
        return read_label(text) if kind == "cls" else _field(json.loads(text), field)
    except UnicodeDecodeError:
        raise BadLabel("its label is not in UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadLabel(f"its .json cannot be read ({type(error).__name__})") from None
    except BadLabel:
        raise
    except ValueError:  # a number of thousands of digits
        raise BadLabel("its .json has a number that is too long") from None


def _field(found: object, field: str) -> Label:
    value = found.get(field) if isinstance(found, dict) else None
    if isinstance(value, int) and not isinstance(value, bool):
        return checked(value)
    if isinstance(value, str):
        return read_label(value)
    raise BadLabel(f"its .json has no number or name as {shown(field)}; name the field: label=FIELD")


def _labels(indices: Sequence[Index]) -> list[Label]:
    return [label for index in indices for label in index.labels]


def _where(path: Path, name: str) -> str:
    return f"{path}:{name}"
