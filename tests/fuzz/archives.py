"""Damaged and hostile tar shards, tables and lists: archives.py EXAMPLES FOLDER PART.

PART is tars, parquets, arrows or csvs. Each example is read to its end: images and labels, or a line that says why not.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from bounds import arguments, limited_seconds, run
from hypothesis import given
from hypothesis import strategies as st
from kept_elsewhere import many_images, write_arrow, write_csv, write_parquet, write_shards

from data import build_source

OUTCOMES: Counter[str] = Counter()
PARTS: dict[str, tuple[str, str]] = {
    "tars": ("webdataset", "x.tar"),
    "parquets": ("hf", "x.parquet"),
    "arrows": ("hf", "x.arrow"),
    "csvs": ("csv", "x.csv"),
}


def judge(part: str) -> Callable[[bytes], None]:
    """Raises AssertionError for anything but images or a line, and for a file that appears."""
    kind, name = PARTS[part]
    before = set(os.listdir())

    def judged(content: bytes) -> None:
        Path(name).write_bytes(content)
        with limited_seconds():
            OUTCOMES[_read(kind, name)] += 1
        assert set(os.listdir()) <= before | {name}

    return judged


def _read(kind: str, name: str) -> str:
    try:
        source = build_source(kind, path=name)
    except ValueError as error:
        _check_line(str(error), name)
        return "refused"
    assert len(source) > 0
    for one in source.odd:
        _check_line(f"{one.where} {one.reason}".encode(errors="backslashreplace").decode(), "")
    for index in range(len(source)):
        assert 0 <= source.label(index) < len(source.class_names)
        try:
            source.image(index)
        except ValueError as error:
            _check_line(str(error).removeprefix(source.where(index)), "")
    return "read, with odd ones" if source.odd else "read"


def _check_line(text: str, name: str) -> None:
    if name not in text or "Traceback" in text or not text.strip():
        raise AssertionError(f"no line that names the file: {text!r}")


def seeds(part: str) -> list[bytes]:
    """Whole files of six images."""
    images = many_images(Path("images"), 6)
    if part == "tars":
        return [
            (write_shards(images, Path("shards"), shards=1, form=form) / "train-000000.tar").read_bytes()
            for form in (0, 1, 2)
        ]
    write = {"parquets": write_parquet, "arrows": write_arrow, "csvs": write_csv}[part]
    return [write(images, Path(f"seed{Path(PARTS[part][1]).suffix}")).read_bytes()]


def mutants(whole: list[bytes]) -> st.SearchStrategy[bytes]:
    """A seed with bytes changed, cut or put in, near its beginning, its end or anywhere."""
    edit = st.tuples(
        st.floats(0, 1), st.sampled_from(["start", "end", "any"]), st.binary(max_size=8), st.integers(0, 8)
    )

    def changed(seed: bytes, edits: list[tuple[float, str, bytes, int]]) -> bytes:
        content = bytearray(seed)
        for place, near, piece, length in edits:
            span = len(content) if near == "any" else min(600, len(content))
            at = int(place * span) + (len(content) - span if near == "end" else 0)
            content[at : at + length] = piece
        return bytes(content)

    seed = st.sampled_from(whole)
    cut = st.builds(lambda one, share: one[: int(len(one) * share)], seed, st.floats(0, 1))
    return st.builds(changed, seed, st.lists(edit, min_size=1, max_size=4)) | cut | st.binary(max_size=600)


if __name__ == "__main__":
    count, (room, part) = arguments()
    os.chdir(room)
    good = seeds(part)
    check = judge(part)
    for one in good:
        check(one)
    assert set(OUTCOMES) == {"read"}, OUTCOMES
    run(count, check, given(mutants(good)), OUTCOMES)
