"""Image folders: a folder for each class, with the images in it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from .base import (
    IMAGE_SUFFIXES,
    SPLIT_NAMES,
    Shares,
    check_split,
    decoded,
    file_stamp,
    hashed,
    refuse_undivided,
    say_once,
    some,
)

# Created by macOS archives, Synology, Windows and ext4: they are not classes.
_NO_CLASSES = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")


class FolderSource:
    """Image files, one folder per class; classes and files in alphabetical order. `image_file` decodes them.

    Attributes:
        passed_over: number of files in the class folders without an image suffix.
    """

    def __init__(
        self, path: Path, *, class_names: tuple[str, ...], files: list[tuple[Path, int]], passed_over: int = 0
    ) -> None:
        self.name = f"folder {path}"
        self.class_names = class_names
        self.passed_over = passed_over
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def path(self, index: int) -> Path:
        return self._files[index][0]

    def read(self, index: int) -> bytes:
        return self.path(index).read_bytes()

    def where(self, index: int) -> str:
        return str(self.path(index))

    def image(self, index: int) -> np.ndarray:
        return decoded(self, index)

    def label(self, index: int) -> int:
        return self._files[index][1]

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr((self.name, self.class_names)).encode(errors="surrogateescape"))
        for path, label in self._files:
            digest.update(f"{path} {label} {file_stamp(path)}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


def folder(
    path: str | Path,
    *,
    split: str | None = None,
    eval_fraction: float | None = None,
    test_fraction: float = 0.0,
    split_seed: int = 0,
) -> FolderSource:
    """Image files, one folder per class: `path/<class>/<anything>.jpg`, at any depth below the class.

    Args:
        split: None reads `path` itself; "train" reads `path/train`; "eval" reads the first that exists of `path/val`,
            `valid`, `validation`, `eval` and `test`; "test" reads `path/test`.
        eval_fraction: divide one set of images instead: "eval" gets this share of every class of `path/train` (`path`
            if there is no such folder), and "train" the rest.
        test_fraction: the same for "test"; 0 reads `path/test`.
        split_seed: changes the division, which depends on the file names, so that adding a file moves at most one
            other.

    The classes are those of the training split. An evaluation split may lack some, for example rare ones; one that
    has others is refused. Folders that operating systems and editors create are not classes. Both cause a warning.

    Raises:
        FileNotFoundError: no such folder, no classes in it, or no images in a training class.
        ValueError: evaluation classes that are not training classes, or a class too small to be divided.
    """
    path = Path(path)
    root = _split_folder(path, split, eval_fraction, test_fraction)
    classes = [folder.name for folder in _class_folders(root)]
    if not classes:
        raise FileNotFoundError(f"{root} has no folders in it: put the images of each class into a folder of its own")
    trained = classes
    if split is not None and root != path:
        trained = _classes_to_train_on(root, classes, path, split)
    source = _list_images(root, trained, may_lack=trained is not classes)
    if split is None or eval_fraction is None or (split == "test" and not test_fraction):
        return source
    return _divided(source, root, split, Shares(eval_fraction, test_fraction, split_seed))


def folder_stamp(
    path: str | Path,
    *,
    split: str | None = None,
    eval_fraction: float | None = None,
    test_fraction: float = 0.0,
    split_seed: int = 0,
) -> str:
    """The times at which the class folders last gained or lost a file."""
    root = _split_folder(Path(path), split, eval_fraction, test_fraction)
    if not root.is_dir():
        return ""
    return ",".join(f"{p.name}:{p.stat().st_mtime_ns}" for p in sorted(root.iterdir()) if p.is_dir())


def _split_folder(path: Path, split: str | None, eval_fraction: float | None, test_fraction: float) -> Path:
    if split is None:
        return path
    check_split(split)
    if eval_fraction is not None and (split != "test" or test_fraction):
        return path / "train" if (path / "train").is_dir() else path
    names = SPLIT_NAMES[split]
    present = [path / name for name in names if (path / name).is_dir()]
    return present[0] if present else path / names[0]


def _class_folders(root: Path) -> list[Path]:
    if not root.is_dir():
        raise FileNotFoundError(
            f"no folder {root}: an image folder holds one folder a class with the images in it, as {root}/cat/1.jpg; "
            "correct the path, or unpack the data there"
        )
    folders = sorted(p for p in root.iterdir() if p.is_dir())
    left_out = [p.name for p in folders if _is_no_class(p.name)]
    if left_out:
        say_once(f"{root}: left out, for they hold no class: {some(left_out)}")
    return [p for p in folders if not _is_no_class(p.name)]


def _is_no_class(name: str) -> bool:
    return name.startswith(".") or name in _NO_CLASSES


def _classes_to_train_on(root: Path, classes: list[str], path: Path, split: str) -> list[str]:
    """The classes of the training split, `classes` if that is this split or there is no other.

    Raises ValueError if an evaluation split has a class that is not among them.
    """
    other = _split_folder(path, "eval" if split == "train" else "train", None, 0.0)
    others = [folder.name for folder in _class_folders(other)] if other.is_dir() and other != root else []
    if not others:
        return classes
    trained, evaluated = (classes, others) if split == "train" else (others, classes)
    unknown = sorted(set(evaluated) - set(trained))
    if unknown:
        train, evaluation = (root, other) if split == "train" else (other, root)
        raise ValueError(
            f"the classes of {train} and {evaluation} differ: {evaluation} alone has {some(unknown)}, which no image "
            f"is there to learn from; add images to {train}, or remove the folders from {evaluation}"
        )
    return classes if split == "train" else others


def _list_images(root: Path, classes: list[str], *, may_lack: bool) -> FolderSource:
    """may_lack: whether a class may have no image here."""
    files: list[tuple[Path, int]] = []
    passed_over, lacking = 0, []
    for label, name in enumerate(classes):
        found = _visible_files(root / name)
        own = sorted(p for p in found if p.suffix.lower() in IMAGE_SUFFIXES)
        passed_over += len(found) - len(own)
        files += [(p, label) for p in own]
        if not own:
            lacking.append(name)
    if lacking and (not may_lack or not files):
        raise FileNotFoundError(
            f"no images in {root / lacking[0]}: looked for {', '.join(IMAGE_SUFFIXES)}; add some or remove the folder"
        )
    if lacking:
        say_once(f"{root}: no images of {some(lacking)}; the other {len(classes) - len(lacking)} classes are there")
    return FolderSource(root, class_names=tuple(classes), files=files, passed_over=passed_over)


def _visible_files(folder: Path) -> list[Path]:
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _is_no_class(name)]  # editors keep copies of images there
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return found


def _divided(source: FolderSource, root: Path, split: str, shares: Shares) -> FolderSource:
    files = [(source.path(i), source.label(i)) for i in range(len(source))]
    labels = np.array([label for _, label in files])
    chosen = shares.members(hashed(p.relative_to(root).as_posix() for p, _ in files), labels, split)
    refuse_undivided(str(root), source.class_names, labels, chosen, split)
    kept = [file for file, is_in in zip(files, chosen.tolist(), strict=True) if is_in]
    return FolderSource(root, class_names=source.class_names, files=kept, passed_over=source.passed_over)
