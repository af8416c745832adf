"""The images of a folder in the other forms in which people keep them: tar shards, Parquet, Arrow, a CSV."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data.sources import FolderSource, folder

CLASSES = ("ant", "bee", "cat")


def many_images(root: Path, number: int) -> Path:
    """A folder of `number` small images in three classes: JPEGs, some gray, turned, PNG, large, damaged or empty."""
    random = np.random.default_rng(0)
    for index in range(number):
        where = root / CLASSES[index % 3]
        where.mkdir(parents=True, exist_ok=True)
        height, width = (int(side) for side in random.integers(24, 72, 2))
        rows, columns = np.mgrid[:height, :width] / 40
        image = Image.fromarray(
            np.stack([128 + 100 * np.sin(rows * a + columns * b) for a, b in random.uniform(0.3, 3, (3, 2))], axis=-1)
            .round()
            .astype(np.uint8)
        )
        buffer, kind = io.BytesIO(), index % 20
        turned = Image.Exif()
        turned[0x0112] = 6
        (image.convert("L") if kind == 3 else image).save(
            buffer, "PNG" if kind == 5 else "JPEG", **({"exif": turned} if kind == 7 else {})
        )
        content = {11: buffer.getvalue()[:200], 13: b""}.get(kind, buffer.getvalue())
        (where / f"{index:05}.{'png' if kind == 5 else 'jpg'}").write_bytes(content)
    return root


def write_shards(images: Path, where: Path, *, shards: int = 3, form: tarfile._TarFormat = tarfile.PAX_FORMAT) -> Path:
    """As WebDataset: the folder's images in its order, labels in .cls and .json in turn, classes.txt beside them."""
    where.mkdir(parents=True, exist_ok=True)
    source = folder(images)
    for shard, part in enumerate(np.array_split(np.arange(len(source)), shards)):
        with tarfile.open(where / f"train-{shard:06}.tar", "w", format=form) as tar:
            for index in map(int, part):
                name = source.path(index).relative_to(images)
                add(tar, str(name), source.read(index))
                label = source.label(index)
                as_json = index % 2
                text = json.dumps({"label": label, "more": [1]}) if as_json else f"{label}\n"
                add(tar, str(name.with_suffix(".json" if as_json else ".cls")), text.encode())
    (where / "classes.txt").write_text("\n".join(source.class_names))
    return where


def add(tar: tarfile.TarFile, name: str, content: bytes, **fields: object) -> None:
    """A member with this name and content; fields: of its TarInfo."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(content))


def write_parquet(images: Path, path: Path, *, rows_of_group: int = 16, files: int = 1) -> Path:
    """As the library `datasets` writes it, ClassLabel included, in `files` files beside each other."""
    import pyarrow.parquet

    source = folder(images)
    parts = np.array_split(np.arange(len(source)), files)
    for number, part in enumerate(parts):
        name = path if files == 1 else path.with_name(f"{path.stem}-{number:05}-of-{files:05}.parquet")
        pyarrow.parquet.write_table(table_of(source, part), name, row_group_size=rows_of_group)
    return path


def write_arrow(images: Path, path: Path, *, stream: bool = True) -> Path:
    """As `save_to_disk` writes it (a stream), or as an Arrow file."""
    import pyarrow

    source = folder(images)
    table = table_of(source, range(len(source)))
    make = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with make(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=16)
    return path


def table_of(source: FolderSource, part: Iterable[int], **columns: Sequence[object]):
    """The images as {bytes, path} and their labels; columns: further ones."""
    import pyarrow

    part = list(map(int, part))
    label = {"names": list(source.class_names), "_type": "ClassLabel"}
    told = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
    image = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    return pyarrow.table(
        {
            "image": pyarrow.array([{"bytes": source.read(i), "path": source.path(i).name} for i in part], image),
            "label": pyarrow.array([source.label(i) for i in part], pyarrow.int64()),
            **columns,
        }
    ).replace_schema_metadata({b"huggingface": json.dumps(told).encode()})


def write_csv(images: Path, path: Path) -> Path:
    """path,label with words as labels, relative to the folder."""
    source = folder(images)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label"])
        for index in range(len(source)):
            writer.writerow([source.path(index).relative_to(path.parent), source.class_names[source.label(index)]])
    return path
