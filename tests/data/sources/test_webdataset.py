"""Tar shards: labels, damaged and hostile archives, and shards at a URL."""

from __future__ import annotations

import io
import os
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from kept_elsewhere import add, many_images, write_shards
from PIL import Image

from data import build_source
from data.sources import fetching, webdataset
from data.sources.listing import expanded
from data.sources.tar_index import BLOCK_BYTES, DamagedTar, members

pytestmark = pytest.mark.timeout(60)
JPEG = io.BytesIO()
Image.new("RGB", (9, 9)).save(JPEG, "JPEG")
IMAGE = JPEG.getvalue()


def shard(path: Path, *files: tuple[str, bytes], form: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in files:
            add(tar, name, content)
    return path


def pair(key: str, label: bytes = b"1", extension: str = "cls") -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", IMAGE), (f"{key}.{extension}", label)]


def test_keys_and_labels(tmp_path: Path):
    path = shard(
        tmp_path / "x.tar",
        ("./a/1.cls", b" 2\n"), ("./a/1.jpg", IMAGE), ("b/1.jpeg", IMAGE), ("b/1.json", b'{"label": 0, "x": {}}'),
        ("c.PNG", IMAGE), ("c.cls", b"1"), ("c.json", b'{"label": 2}'), ("c.txt", b"of no use"), ("d.webp", IMAGE),
        ("d.json", b'{"label": "1"}'),
    )  # fmt: skip
    source = webdataset(str(path))
    assert [source.label(i) for i in range(len(source))] == [2, 0, 1, 1]
    assert source.class_names == ("0", "1", "2")
    assert source.where(1) == f"{path}:b/1.jpeg"
    assert source.odd == ()
    other = shard(tmp_path / "y.tar", *pair("a", b'{"kind": "cow"}', "json"), *pair("b", b'{"kind": "ant"}', "json"))
    named = webdataset(str(other), label="kind")
    assert (named.class_names, [named.label(i) for i in range(2)]) == (("ant", "cow"), [1, 0])


def test_class_names(tmp_path: Path):
    train, evaluation = shard(tmp_path / "t.tar", *pair("a", b"3")), shard(tmp_path / "e.tar", *pair("a", b"1"))
    settings = {"path": str(train), "eval_path": str(evaluation)}
    assert webdataset(**settings, split="eval").class_names == ("0", "1", "2", "3")
    with pytest.raises(ValueError, match=r"t\.tar has the label 3, and there are 2 classes, numbered from 0"):
        webdataset(str(evaluation), eval_path=str(train), split="eval")
    (tmp_path / "classes.txt").write_text("w\nx\ny\nz\n", encoding="utf-8-sig")
    assert webdataset(**settings, split="eval").class_names == ("w", "x", "y", "z")
    (tmp_path / "other.txt").write_text("w\nx\n")
    with pytest.raises(ValueError, match="has the label 3, and there are 2 classes"):
        webdataset(**settings, classes=str(tmp_path / "other.txt"))
    (tmp_path / "other.txt").write_text("w\nx\nw")
    with pytest.raises(ValueError, match=r"other\.txt has the class name 'w' twice"):
        webdataset(**settings, classes=str(tmp_path / "other.txt"))


ODD = {
    "no label": ([("k.jpg", IMAGE)], "k.jpg", "it has no label: neither a .cls nor a .json of its key"),
    "no image": ([("k.cls", b"1")], "k", "it has a label and no image"),
    "two images": ([*pair("k"), ("k.png", IMAGE)], "k.jpg", "its key is there twice"),
    "two labels": ([*pair("k"), ("k.cls", b"2")], "k.jpg", "its key is there twice"),
    "empty label": (pair("k", b" \n"), "k.jpg", "its label is empty"),
    "negative": (pair("k", b"-1"), "k.jpg", "its label is -1; labels count from 0"),
    "huge label": (pair("k", b"9" * 9999), "k.jpg", "and 1,000,000 classes are the most"),
    "no text": (pair("k", b"\xff\xfe"), "k.jpg", "its label is not in UTF-8"),
    "no name": (pair("k", b"a\x00b"), "k.jpg", "is no name of a class"),
    "no JSON": (pair("k", b"{", "json"), "k.jpg", "its .json cannot be read (JSONDecodeError)"),
    "deep JSON": (pair("k", b"[" * 100_000, "json"), "k.jpg", "its .json cannot be read (RecursionError)"),
    "long number": (pair("k", b'{"label": ' + b"9" * 9999 + b"}", "json"), "k.jpg", "has a number that is too long"),
    "other field": (pair("k", b'{"cls": 1}', "json"), "k.jpg", "no number or name as 'label'; name the field"),
    "true": (pair("k", b'{"label": true}', "json"), "k.jpg", "no number or name as 'label'"),
    "large label": (pair("k", b" " * (2 << 20)), "k.cls", "it has 2097152 bytes, and 1048576 are the most"),
    "absolute": ([("/etc/k.jpg", IMAGE)], "/etc/k.jpg", "its name leads out of the archive"),
    "parent": ([("a/../../k.jpg", IMAGE)], "a/../../k.jpg", "its name leads out of the archive"),
    "two dots": (pair("k.v2"), "k.v2.jpg", "its key ends at its first dot, and .v2.jpg is no image"),
}  # fmt: skip


@pytest.mark.parametrize("what", ODD)
def test_what_cannot_be_used_is_a_line_each(tmp_path: Path, what: str):
    files, name, reason = ODD[what]
    path = shard(tmp_path / "x.tar", *pair("good", b"0"), *files)
    source = webdataset(str(path))
    assert [source.where(i) for i in range(len(source))] == [f"{path}:good.jpg"]
    assert [odd.where for odd in source.odd][:1] == [f"{path}:{name}"]
    assert reason in source.odd[0].reason
    assert "\n" not in source.odd[0].reason


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, b"S", b"q"])
def test_what_is_no_plain_file(tmp_path: Path, kind: bytes):
    path = shard(tmp_path / "x.tar", *pair("good"))
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("k.jpg")
        info.type, info.linkname, info.size = kind, "/etc/passwd", 0
        tar.addfile(info)
    (odd,) = webdataset(str(path)).odd
    assert odd.where == f"{path}:k.jpg"
    assert "only plain files are read" in odd.reason


def spoiled(change: Callable[[bytearray], object]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        whole = bytearray(path.read_bytes())
        result = change(whole)
        path.write_bytes(result if isinstance(result, bytes) else whole)

    return spoil


def header_of(size: bytes, kind: bytes = b"0") -> bytes:
    """A header with a right checksum for a member of any size."""
    block = bytearray(tarfile.TarInfo("k.jpg").tobuf(tarfile.GNU_FORMAT))
    block[124 : 124 + len(size)], block[156:157] = size, kind
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 256)
    return bytes(block)


def record(content: bytes) -> bytes:
    """What comes before a member with a long name."""
    return header_of(b"%011o\0" % len(content), b"x") + content.ljust(BLOCK_BYTES, b"\0")


LESS = 512 + -(-len(IMAGE) // 512) * 512  # the first member of a pair
DAMAGE = {
    "empty": (spoiled(lambda whole: b""), "at byte 0, it is cut short"),
    "in a member": (spoiled(lambda whole: bytes(whole[:700])), "bytes is announced, and 188 follow"),
    "between members": (spoiled(lambda whole: bytes(whole[:LESS])), "its end mark is not"),
    "a flipped bit": (spoiled(lambda whole: whole.__setitem__(3, whole[3] ^ 1)), "a header's checksum is wrong"),
    "text": (spoiled(lambda whole: b"<html>not found</html>" * 99), "a number in a header is none"),
    "gzip": (spoiled(lambda whole: b"\x1f\x8b" + bytes(whole)), "is compressed with gzip"),
    "two in one": (spoiled(lambda whole: bytes(whole) * 2), "more follows its end mark"),
    "8 EiB": (spoiled(lambda whole: header_of(b"\x80\0\0\0\x7f" + b"\xff" * 7) + whole), "bytes is announced, and"),
    "8 GiB": (spoiled(lambda whole: header_of(b"77777777777\0") + whole), "a member of 8589934591 bytes is announced"),
    "negative": (spoiled(lambda whole: header_of(b"\xff" * 12) + whole), "bytes is announced, and"),
    "a long name of 1 GiB": (spoiled(lambda whole: header_of(b"10000000000\0", b"L") + whole), "1048576 are the most"),
    "a record without end": (spoiled(lambda whole: record(b"99 ") + whole), "malformed"),
    "a record of 0": (spoiled(lambda whole: record(b"0 a=b") + whole), "malformed"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_and_hostile_archives_are_refused_in_a_line(tmp_path: Path, what: str):
    path = shard(tmp_path / "x.tar", *pair("a"))
    spoil, message = DAMAGE[what]
    spoil(path)
    with pytest.raises(DamagedTar) as told:
        webdataset(str(path))
    assert message in str(told.value)
    assert str(path) in str(told.value)
    assert "\n" not in str(told.value)
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_the_index_is_that_of_tarfile(tmp_path: Path, form: int):
    """Long names, names that are no ASCII, folders, empty and large files."""
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=form) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for number in range(20):
            long = "/".join(["n" * 40] * (number % 5)) + f"/é{number}"
            add(tar, long if form != tarfile.USTAR_FORMAT else long.replace("é", "e"), os.urandom(number * 300))
    with tarfile.open(path) as tar:
        expected = [(one.name, one.offset_data, one.size, "") for one in tar if one.isfile()]
    assert [tuple(one) for one in members(path)] == expected


def test_the_shard_is_cut_short_after_it_was_opened(tmp_path: Path):
    path = shard(tmp_path / "x.tar", *pair("a"))
    source = webdataset(str(path))
    os.truncate(path, BLOCK_BYTES + 100)
    with pytest.raises(ValueError, match=r"x\.tar:a\.jpg cannot be read as an image \(its archive was cut short"):
        source.image(0)


def test_patterns(tmp_path: Path):
    assert expanded("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expanded("{x,y}/{0..1}") == ["x/0", "x/1", "y/0", "y/1"]
    assert expanded("plain") == ["plain"]
    for pattern, message in [
        ("a-{5..2}.tar", "runs backwards; write {2..5}"),
        ("a-{0..99999999999}.tar", "more than 1,000,000 files"),
        ("{0..999}{0..999}{0..999}", "more than 1,000,000 files"),
        ("a-{}.tar", "neither a range nor a choice"),
        ("a-{0..1", "a brace is not closed"),
        (f"{tmp_path}/no-*.tar", "no file .*correct the path or the pattern"),
        (f"{tmp_path}/no.tar", "no file"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            webdataset(pattern)


def test_settings_that_exclude_each_other(tmp_path: Path):
    path = str(shard(tmp_path / "x.tar", *pair("a"), *pair("b")))
    for settings, message in [
        ({"split": "eval"}, "says nothing of the split eval: give eval_path, or eval_fraction"),
        ({"eval_path": path, "eval_fraction": 0.1}, "eval_path .* beside eval_fraction 0.1: give one"),
        ({"test_fraction": 0.1}, "test_fraction 0.1 without an eval_fraction"),
        ({"split": "eval", "eval_fraction": 1.0}, "eval_fraction 1.0: give a number between 0 and 1"),
        ({"split": "eval", "eval_fraction": 0.1}, "class 1 of .* has 2 images, too few"),
        ({"split": "valid", "eval_fraction": 0.1}, "split 'valid': give one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            webdataset(path, **settings)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """The URL of a folder, the folder, and the paths of the files that were asked for."""
    root, asked = tmp_path / "served", []
    root.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(root))

        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}", root, asked
        http.shutdown()


class Unreachable:
    def info(self, url: str) -> dict[str, object]:
        raise OSError("no route")


class BreaksOff:
    def info(self, url: str) -> dict[str, object]:
        return {"size": 10240}

    def get_file(self, url: str, path: str) -> None:
        Path(path).write_bytes(b"0" * 5000)


def test_shards_at_a_url(tmp_path: Path, server: tuple[str, Path, list[str]]):
    url, root, asked = server
    write_shards(many_images(tmp_path / "images", 10), root, shards=2)
    settings = {"path": f"{url}/train-{{000000..000001}}.tar", "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(FileNotFoundError, match=r"no copy of http.* and download is off: download it first"):
        webdataset(**settings, download=False)
    source, local = webdataset(**settings), webdataset(f"{root}/train-*.tar")
    assert source.class_names == ("ant", "bee", "cat")
    assert [source.read(i) for i in range(10)] == [local.read(i) for i in range(10)]
    asked.clear()
    assert len(webdataset(**settings)) == len(webdataset(**settings, download=False)) == 10
    assert not [path for path in asked if path.endswith(".tar")]
    (root / "train-000001.tar").write_bytes((root / "train-000000.tar").read_bytes())  # of the same size
    os.utime(root / "train-000001.tar", (9, 9))
    assert [webdataset(**settings).read(i) for i in (0, 5)] == [local.read(0)] * 2
    assert len(list((tmp_path / "cache").iterdir())) == 6
    with pytest.raises(FileNotFoundError, match=r"no file http.*none\.tar: correct the URL"):
        webdataset(f"{url}/none.tar", cache_dir=settings["cache_dir"])


def test_a_url_that_cannot_be_reached(
    tmp_path: Path, server: tuple[str, Path, list[str]], caplog: pytest.LogCaptureFixture
):
    url, root, _ = server
    shard(root / "x.tar", *pair("a"))
    settings = {"cache_dir": str(tmp_path / "cache"), "classes": str(tmp_path / "names.txt")}
    (tmp_path / "names.txt").write_text("a\nb\n")
    assert len(webdataset(f"{url}/x.tar", **settings)) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetching, "_file_system", lambda url: Unreachable())
        assert len(webdataset(f"{url}/x.tar", **settings)) == 1
        assert "cannot be reached (OSError: no route): its copy" in caplog.text
        with pytest.raises(FileNotFoundError, match=r"y\.tar cannot be read \(OSError: no route\): check the network"):
            webdataset(f"{url}/y.tar", **settings)
    for wrong, message in [
        ("ftp://host/x.tar", "give a local path, or a URL that begins with http://, https://"),
        ("https://me:secret@host/x.tar", "https://host/x.tar has credentials in it"),
        ("github://owner:repo@/x.tar", "give a local path"),
    ]:
        with pytest.raises(ValueError, match=message) as told:
            webdataset(wrong, **settings)
        assert "secret" not in str(told.value)


def test_a_download_that_breaks_off_leaves_nothing(
    tmp_path: Path, server: tuple[str, Path, list[str]], monkeypatch: pytest.MonkeyPatch
):
    url, _, _ = server
    monkeypatch.setattr(fetching, "_file_system", lambda url: BreaksOff())
    with pytest.raises(FileNotFoundError, match=r"5000 bytes of 10240 came"):
        build_source("webdataset", path=f"{url}/x.tar", cache_dir=str(tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == []
