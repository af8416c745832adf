"""Parquet, Arrow and CSV: columns, labels, damaged and hostile files, and data sets on the Hub."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from kept_elsewhere import many_images, table_of, write_arrow, write_csv, write_parquet

from data import build_source
from data.sources import csv, folder, hf

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return many_images(tmp_path_factory.mktemp("listed") / "images", 9)


def parquet(path: Path, **columns: Any) -> str:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def test_columns_of_other_names_and_types(images: Path, tmp_path: Path):
    plain = folder(images)
    contents = [plain.read(i) for i in range(9)]
    words = ["cow", "ant", "bee"] * 3
    for number, kind in enumerate((pyarrow.binary(), pyarrow.large_binary())):
        path = parquet(
            tmp_path / f"{number}.parquet",
            jpg=pyarrow.array(contents, kind),
            kind=["cow", "ant", "bee"] * 3,
            more=range(9),
        )
        source = hf(path, image="jpg", label="kind")
        assert source.class_names == ("ant", "bee", "cow")
        assert [source.read(i) for i in range(9)] == contents
        assert [source.label(i) for i in range(3)] == [2, 0, 1]
    path = parquet(tmp_path / "x.parquet", image=contents, label=pyarrow.array([2, 0, 1] * 3, pyarrow.uint8()))
    assert hf(path).class_names == ("0", "1", "2")
    encoded = pyarrow.array(words).dictionary_encode()
    assert hf(parquet(tmp_path / "y.parquet", image=contents, label=encoded)).class_names == ("ant", "bee", "cow")
    (tmp_path / "names.txt").write_text("x\ny\nz\n")
    assert hf(path, classes=str(tmp_path / "names.txt")).class_names == ("x", "y", "z")


def test_rows_that_cannot_be_used(tmp_path: Path):
    struct = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    rows = [{"bytes": b"x", "path": None}, {"bytes": None, "path": "/etc/passwd"}, None, {"bytes": b"y", "path": None}]
    path = parquet(tmp_path / "x.parquet", image=pyarrow.array(rows, struct), label=pyarrow.array([0, 0, 1, None]))
    source = hf(path)
    assert [tuple(odd) for odd in source.odd] == [(f"{path}: row 3", "it has no label")]
    with pytest.raises(ValueError, match=r"row 1 cannot be read as an image \(it is a path without bytes, w"):
        source.image(1)
    with pytest.raises(ValueError, match=r"row 2 cannot be read as an image \(it has no bytes\)"):
        source.image(2)
    odd = hf(parquet(tmp_path / "y.parquet", image=[b"x"] * 3, label=[0, -1, 10**15])).odd
    assert [one.reason for one in odd] == [
        "its label is -1; labels count from 0",
        "its label is 1000000000000000, and 1,000,000 classes are the most",
    ]


def whole_or_refused(path: Path) -> str:
    """Why the table is refused; "" if all of it can be read."""
    try:
        source = hf(str(path))
        for index in range(len(source)):
            source.read(index)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("write", [write_parquet, write_arrow])
def test_damaged_tables_are_refused_in_a_line(images: Path, tmp_path: Path, write: Callable[..., Path]):
    path = write(images, tmp_path / "x")
    whole = path.read_bytes()
    changes: dict[str, bytes] = {
        "empty": b"", "half": whole[: len(whole) // 2], "text": b"<html>" * 99, "start": whole[:9], "end": whole[:-9],
        "zeros": whole[:100] + bytes(len(whole) - 100), "other end": whole[:-200] + os.urandom(200),
    }  # fmt: skip
    path = path.rename(path.with_suffix(".parquet"))
    for name, content in changes.items():
        path.write_bytes(content)
        refused = whole_or_refused(path)
        assert refused.count("\n") == 0, name
        # The end of a stream has no image in it.
        assert str(path) in refused or (write is write_arrow and name in ("end", "other end")), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image": "img"}, r"has 0 columns 'img' among 'image', 'label'; say which it is: image=\.\.\."),
        ({"label": "image"}, r"column 'image' is of type struct<.*>; it must be numbers or words: label="),
        ({"image": "label"}, r"column 'label' is of type int64; it must be {bytes, path} or bytes: image="),
        ({"revision": "main"}, "revision main beside .*, which is on this disk"),
        ({"split": "eval"}, "says nothing of the split eval: give eval_path"),
    ],
)
def test_settings_of_tables(images: Path, tmp_path: Path, settings: dict[str, Any], message: str):
    path = write_parquet(images, tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=message):
        hf(str(path), **settings)


def test_a_row_group_that_is_too_large_and_names_that_differ(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = write_parquet(images, tmp_path / "x.parquet", rows_of_group=9)
    other = table_of(folder(images), range(9))
    told = json.loads(other.schema.metadata[b"huggingface"])
    told["info"]["features"]["label"]["names"] = ["a", "b", "c"]
    other = other.replace_schema_metadata({b"huggingface": json.dumps(told).encode()})
    pyarrow.parquet.write_table(other, tmp_path / "y.parquet")
    with pytest.raises(ValueError, match="has files whose class names differ"):
        hf(f"{tmp_path}/*.parquet")
    monkeypatch.setattr("data.sources.tables._MOST_GROUP_BYTES", 1000)
    with pytest.raises(ValueError, match=r"its row group 0 has 0\.0 GB.*row_group_size=100"):
        hf(str(path))


def test_groups_are_decoded_once_in_order(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_parquet(images, tmp_path / "x.parquet", rows_of_group=3)
    source, read = hf(str(path)), []
    group = pyarrow.parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile, "read_row_group", lambda self, i, **k: read.append(i) or group(self, i, **k)
    )
    for index in range(9):
        source.read(index)
    assert read == [0, 1, 2]


def test_data_sets_on_the_hub(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The Hub itself cannot be reached here: its library's download is replaced by a folder as it makes one."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: list[dict[str, Any]] = []
    (tmp_path / "plain").mkdir()
    write_parquet(images, tmp_path / "plain" / "train-00000-of-00001.parquet")
    write_parquet(images, tmp_path / "plain" / "test-00000-of-00001.parquet")

    def download(name: str, **settings: Any) -> str:
        asked.append({"name": name, **settings})
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = build_source("hf", path="me/images", split="eval", config="plain", revision="v1")
    assert len(source) == 9
    assert source.where(0).startswith(str(tmp_path / "plain" / "test-"))
    assert asked[0] == {
        "name": "me/images", "revision": "v1", "repo_type": "dataset", "local_files_only": False,
        "allow_patterns": ["plain/*.parquet", "plain/*.arrow"],
    }  # fmt: skip

    def refuse(name: str, **settings: Any) -> str:
        raise LocalEntryNotFoundError("nothing")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match="no copy of the data set me/images in the Hub's cache, and"):
        build_source("hf", path="me/images", download=False)
    with pytest.raises(FileNotFoundError, match=r"'images v2' is neither a file here nor an id of a data set"):
        build_source("hf", path="images v2")


def listing(path: Path, text: str, encoding: str = "utf-8") -> str:
    path.write_bytes(text.encode(encoding))
    return str(path)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_forms_of_lists(tmp_path: Path, delimiter: str, encoding: str):
    for text, places in [("path,label\nä.jpg,b\nc/d.jpg,a\n", "header"), ("ä.jpg,b\r\nc/d.jpg,a", "no header")]:
        path = listing(tmp_path / "x.csv", text.replace(",", delimiter), encoding)
        source = csv(path)
        assert source.class_names == ("a", "b"), places
        assert [(source.where(i), source.label(i)) for i in range(2)] == [
            (f"{tmp_path}/ä.jpg", 1),
            (f"{tmp_path}/c/d.jpg", 0),
        ]


def test_lists_with_splits_and_other_columns(tmp_path: Path):
    text = 'id,File,Species,part\n1,a.jpg,3,train\n2,"b, c.jpg",0,Validation\n3,d.jpg,1,test\n4,e.jpg,1,train\n'
    path = listing(tmp_path / "x.csv", text)
    settings = {"path_column": "file", "label_column": "species", "split_column": "part", "root": "/data"}
    found = {split: csv(path, split=split, **settings) for split in (None, "train", "eval", "test")}
    assert {split: len(source) for split, source in found.items()} == {None: 4, "train": 2, "eval": 1, "test": 1}
    assert found["eval"].where(0) == "/data/b, c.jpg"
    assert found["eval"].class_names == found["train"].class_names == ("0", "1", "2", "3")
    with pytest.raises(ValueError, match=r"x\.csv:3 is of the split 'dev': give train, val or test"):
        csv(listing(tmp_path / "x.csv", "a.jpg,0,train\n\nb.jpg,0,dev\n"), split="train")
    with pytest.raises(ValueError, match=r"has no images of the split test, and some of train, val: add some"):
        csv(listing(tmp_path / "x.csv", "a.jpg,0,train\nb.jpg,0,val\n"), split="test")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no columns"),
        ("path,label\n", "lists no images"),
        (
            "file,class\na.jpg,0\n",
            "the first line 'file, class' has no columns path and label, and does not",
        ),
        ("just words\n", "has no columns: separate path and label by a tab"),
        ("a.jpg,0\n/etc/b.jpg,0\n", r":2: '/etc/b.jpg' leads out of .*absolute=True"),
        ("a.jpg,0\nb/../../c.jpg,0\n", r":2: 'b/../../c.jpg' leads out of"),
        ("a.jpg,0\nb.jpg\n", ":2 has no path, or fewer columns"),
        ("a.jpg,0\n,0\n", ":2 has no path, or fewer columns"),
        ("a.jpg,0\nb\0.jpg,0\n", ":2 "),
        ("a.jpg,0\nb.jpg,cat\n", "has numbers and words as labels, as 0 and 'cat'"),
        ("a.jpg,0\nb.jpg,1\na.jpg,1\n", r":3: 'a.jpg' is 1 here and 0 in line 1: an image has one label"),
        ('a.jpg,0\n"b.jpg,0\n', ":2 is no line of a CSV"),
        ("a.jpg,0\n" + "b" * 200_000 + ".jpg,0\n", ":2 is no line of a CSV .field larger than field limit"),
        ("a.jpg,\n", "has no image with a label"),
    ],
)
def test_lists_that_are_refused_in_a_line(tmp_path: Path, text: str, message: str):
    path = listing(tmp_path / "x.csv", text)
    with pytest.raises(ValueError, match=message) as told:
        csv(path)
    assert str(path) in str(told.value)
    assert "\n" not in str(told.value)


def test_more_of_lists(images: Path, tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"x\.csv is not in UTF-8 \(invalid continuation byte at byte 5\): save it as UTF-8"
    ):
        csv(listing(tmp_path / "x.csv", "a.jpgÄ,0\n", "latin-1"))
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.csv"):
        csv(str(tmp_path / "none.csv"))
    with pytest.raises(ValueError, match="delimiter ';;': give one character"):
        csv(listing(tmp_path / "x.csv", "a.jpg,0\n"), delimiter=";;")
    path = listing(tmp_path / "x.csv", "a.jpg,0\n/b.jpg,\n../c.jpg,1\na.jpg,0\n")
    source = csv(path, absolute=True)
    assert [source.where(i) for i in range(3)] == [f"{tmp_path}/a.jpg", f"{tmp_path}/../c.jpg", f"{tmp_path}/a.jpg"]
    assert [tuple(odd) for odd in source.odd] == [(f"{path}:2", "its label is empty")]
    with pytest.raises(ValueError, match=r"a\.jpg cannot be read as an image \(.*No such file"):
        source.image(0)
    whole = csv(str(write_csv(images, images.parent / "all.csv")))
    assert np.array_equal(whole.image(0), folder(images).image(0))
