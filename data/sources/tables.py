"""Encoded images and labels in Parquet and Arrow files, read with pyarrow.

An Arrow file is mapped, and an image is a few pages of it. Parquet is compressed by groups of rows: to read one image
its group is decoded, and the groups that were used last are kept, so that reading in order decodes each once.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from .base import MOST_FILE_BYTES, file_stamp
from .image_file import UnusableImage

SUFFIXES = (".parquet", ".arrow")
_MOST_GROUP_BYTES = 2 << 30
_KEPT_BYTES = 256 << 20  # of decoded groups, in each process; the two used last in any case


class Tables:
    """Rows of files with the same columns, as a `Store`: row i is the i-th of all.

    Raises:
        ValueError: no table, a damaged one, or columns that are missing or of other types.
        ModuleNotFoundError: pyarrow is not installed.
    """

    def __init__(self, paths: Sequence[Path], image: str, label: str) -> None:
        self.name = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
        self._paths = list(paths)
        self._image, self._label = image, label
        self._open()
        self._groups = [(file, group) for file, table in enumerate(self._files) for group in range(len(table.rows))]
        self._ends = np.cumsum([rows for table in self._files for rows in table.rows], dtype=np.int64)
        self._firsts = np.cumsum([0, *(sum(table.rows) for table in self._files)])

    def __getstate__(self) -> dict[str, Any]:
        opened = ("_files", "_kept", "_lock", "_process")
        return {key: value for key, value in self.__dict__.items() if key not in opened}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._process = -1

    def read(self, row: int) -> bytes:
        group = int(np.searchsorted(self._ends, row, side="right"))
        start = int(self._ends[group - 1]) if group else 0
        value = self._column(group)[row - start].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None:
            has_path = isinstance(value, dict) and value.get("path")
            raise UnusableImage("it is a path without bytes, which is not followed" if has_path else "it has no bytes")
        if len(content) > MOST_FILE_BYTES:
            raise UnusableImage(f"it has {len(content)} bytes, and {MOST_FILE_BYTES} are the most")
        return content

    def where(self, row: int) -> str:
        file = int(np.searchsorted(self._firsts, row, side="right")) - 1
        return f"{self._paths[file]}: row {row - int(self._firsts[file])}"

    def key(self, row: int) -> str:
        file = int(np.searchsorted(self._firsts, row, side="right")) - 1
        return f"{self._paths[file].name}:{row - int(self._firsts[file])}"

    def stamps(self) -> Iterable[str]:
        return (f"{path} {file_stamp(path)} {self._image} {self._label}" for path in self._paths)

    def descriptions(self) -> Iterator[bytes | None]:
        """What `datasets` wrote into the schema of each file."""
        return ((table.schema.metadata or {}).get(b"huggingface") for table in self._files)

    def labels(self) -> Iterator[int | str | None]:
        """The label of each row."""
        for table in self._files:
            for group in range(len(table.rows)):
                yield from table.column(group, self._label).to_pylist()

    def _open(self) -> None:
        self._process = os.getpid()
        self._files = [_open_table(path, self._image, self._label) for path in self._paths]
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def _column(self, group: int) -> Any:
        """The images of a group of rows."""
        if self._process != os.getpid():  # forked: no lock or file of the other process
            self._open()
        with self._lock:
            if group not in self._kept:
                file, number = self._groups[group]
                self._kept[group] = self._files[file].column(number, self._image)
                while len(self._kept) > 2 and sum(one.nbytes for one in self._kept.values()) > _KEPT_BYTES:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(group)
            return self._kept[group]


class _Parquet:
    """A Parquet file. rows: of each group."""

    def __init__(self, path: Path) -> None:
        from pyarrow import parquet

        self._path = path
        self._file = parquet.ParquetFile(path)
        self.schema = self._file.schema_arrow
        self.rows = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
        for group in range(len(self.rows)):
            num_bytes = self._file.metadata.row_group(group).total_byte_size
            if num_bytes > _MOST_GROUP_BYTES:
                raise ValueError(
                    f"{path}: its row group {group} has {num_bytes / 1e9:.1f} GB, which would have to be decoded for "
                    "each image of it: write the file with smaller ones, as row_group_size=100"
                )

    def column(self, group: int, name: str) -> Any:
        with _damage_named(self._path):
            found = self._file.read_row_group(group, columns=[name], use_threads=False).column(name)
            if len(found) != self.rows[group]:
                raise ValueError(f"{len(found)} rows in a group of {self.rows[group]}")
            return found


class _Arrow:
    """An Arrow file, or a stream as `datasets` writes it. rows: of each batch."""

    def __init__(self, path: Path) -> None:
        import pyarrow
        from pyarrow import ipc

        self._path = path
        mapped = pyarrow.memory_map(str(path))
        if mapped.size() >= 6 and mapped.read(6) == b"ARROW1":
            reader = ipc.open_file(mapped)
            self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        else:
            mapped.seek(0)
            reader = ipc.open_stream(mapped)
            self._batches = list(reader)
        self.schema = reader.schema
        self.rows = [batch.num_rows for batch in self._batches]

    def column(self, group: int, name: str) -> Any:
        with _damage_named(self._path):
            found = self._batches[group].column(name)
            found.validate(full=True)  # offsets of a hostile file may lead anywhere in memory
            return found


class _damage_named:
    """Turns what pyarrow raises within the block into a ValueError of one line that names the file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, FileNotFoundError | ModuleNotFoundError):
            text = " ".join(str(error).split())
            if text.startswith(f"{self._path}"):
                return
            raise ValueError(
                f"{self._path} cannot be read as a table ({text[:200] or type(error).__name__}): copy or write it anew"
            ) from error


def _open_table(path: Path, image: str, label: str) -> _Parquet | _Arrow:
    if find_spec("pyarrow") is None:
        raise ModuleNotFoundError(f"{path} needs a package: pip install 'brisk-vision[parquet]'", name="pyarrow")
    with _damage_named(path):
        with path.open("rb") as file:
            start = file.read(4)
        table = _Parquet(path) if start == b"PAR1" else _Arrow(path)
    _check_column(path, table.schema, image, "image", _is_image, "{bytes, path} or bytes")
    _check_column(path, table.schema, label, "label", _is_label, "numbers or words")
    return table


def _check_column(path: Path, schema: Any, name: str, setting: str, fits: Any, wanted: str) -> None:
    names = schema.names
    if names.count(name) != 1:
        there = ", ".join(map(repr, names))[:200]
        raise ValueError(
            f"{path} has {names.count(name)} columns {name!r} among {there}; say which it is: {setting}=..."
        )
    kind = schema.field(name).type
    if not fits(kind):
        raise ValueError(f"{path}: column {name!r} is of type {str(kind)[:100]}; it must be {wanted}: {setting}=...")


def _is_image(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return any(field.name == "bytes" and _is_image(field.type) for field in kind) and not any(
            types.is_struct(field.type) for field in kind
        )
    return types.is_binary(kind) or types.is_large_binary(kind)


def _is_label(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_label(kind.value_type)
    return types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)
