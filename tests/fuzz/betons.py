"""Damaged .beton files through the loader and data.inspect: betons.py EXAMPLES FOLDER PART.

PART is fields (every field of the frame at its extremes, every block cut off), flips, or sidecars.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bounds import arguments, limit_memory, limited_seconds, report, run
from hypothesis import given
from hypothesis import strategies as st

from data import FFCVLoader, write_beton
from data.beton.format import ALLOCATION, FIELD, FIELD_METADATA, HEADER, Beton, sidecar_path
from data.decoding.decode import present_decoders
from data.inspect import main as inspect
from data.sources import ArraySource

OUTCOMES: Counter[str] = Counter()
EXTREMES = [0, 1, 2, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
RIGHT, REFUSED, UNKNOWN = "right pixels", "a clear error", "other pixels, and no sidecar to tell by"
NUM_IMAGES, SIDE_PX = 6, 16
ROW = np.dtype([("", FIELD_METADATA[2]), ("", FIELD_METADATA[1])], align=True)
ROWS_START = HEADER.itemsize + 2 * FIELD.itemsize
PATH, BARE = Path("described.beton"), Path("bare.beton")  # the same file, with a sidecar and without
DECODERS = present_decoders()


def write_files() -> None:
    """JPEGs and pixels of 24x32 px in two classes."""
    random = np.random.default_rng(0)
    smooth = np.kron(random.integers(0, 256, (NUM_IMAGES, 6, 8, 3)), np.ones((1, 4, 4, 1))).astype(np.uint8)
    source = ArraySource(smooth, np.arange(NUM_IMAGES) % 2, class_names=("0", "1"), name="noise")
    write_beton(source, PATH, write_mode="proportion", jpeg_share=0.5, progress=False, num_workers=0)
    assert 0 < Beton(PATH).is_jpeg(np.arange(NUM_IMAGES)).sum() < NUM_IMAGES
    shutil.copy(PATH, BARE)


def look(path: Path, decoder: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and labels as the loader gives them."""
    loader = FFCVLoader(
        path, decoder=decoder, per_device_batch_size=NUM_IMAGES, image_size=SIDE_PX, train=False, num_workers=0
    )
    ((images, labels),) = list(loader)
    return images.numpy(), labels.numpy()


def outcome(path: Path, decoder: str, right: dict[str, Any]) -> str:
    """Raises AssertionError for other pixels or labels than the sidecar tells of, and for anything else."""
    try:
        with limited_seconds():
            images, labels = look(path, decoder)
    except (ValueError, FileNotFoundError) as error:
        if str(path) not in str(error) or "\n" in str(error):
            raise AssertionError(f"no line that names the file: {error}") from error
        return REFUSED
    if np.array_equal(images, right[decoder][0]) and np.array_equal(labels, right[decoder][1]):
        return RIGHT
    assert path == BARE, "other pixels or labels than were written"
    return UNKNOWN


def inspected(path: Path) -> str:
    """What python -m data.inspect --verify says of it."""
    said, complained = io.StringIO(), io.StringIO()
    with limited_seconds(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
        status = inspect([str(path), "--verify", "--workers", "1"])
    assert status in (0, 2)
    assert complained.getvalue().count("\n") == (status == 2)
    return {0: "inspected: whole", 2: "inspected: a clear error"}[status]


def judge(right: dict[str, Any]) -> None:
    """Count what comes of both files."""
    for path in (PATH, BARE):
        for decoder in DECODERS:
            OUTCOMES[outcome(path, decoder, right)] += 1
        OUTCOMES[inspected(path)] += 1


@contextlib.contextmanager
def written_over(place: int, content: bytes) -> Iterator[None]:
    """Both files with other bytes at `place`."""
    before = []
    for path in (PATH, BARE):
        with path.open("r+b") as file:
            file.seek(place)
            before.append(file.read(len(content)))
            file.seek(place)
            file.write(content)
    try:
        yield
    finally:
        for path, content_before in zip((PATH, BARE), before, strict=True):
            with path.open("r+b") as file:
                file.seek(place)
                file.write(content_before)


def fields() -> Iterator[tuple[int, int]]:
    """Place and size of every number in the frame."""
    for kind, offset in (value[:2] for value in (HEADER.fields or {}).values()):
        yield offset, kind.itemsize
    for index in range(2):
        start = HEADER.itemsize + index * FIELD.itemsize
        yield from ((start, 1), (start + 1, 8), (start + 17, 8))
    kinds = [(offset, kind) for kind, offset in (ROW.fields or {}).values()]
    numbers = [
        (offset + inner, one.itemsize)
        for offset, kind in kinds
        for one, inner in ((v[0], v[1]) for v in (kind.fields or {"": (kind, 0)}).values())
    ]
    for index in range(NUM_IMAGES):
        yield from ((ROWS_START + index * ROW.itemsize + offset, size) for offset, size in numbers)
    table = table_start()
    for index in range(NUM_IMAGES):
        for kind, offset in (v[:2] for v in (ALLOCATION.fields or {}).values()):
            yield table + index * ALLOCATION.itemsize + offset, kind.itemsize


def table_start() -> int:
    """Where the allocation table begins."""
    return PATH.stat().st_size - NUM_IMAGES * ALLOCATION.itemsize


def every_field(right: dict[str, Any]) -> None:
    """Each number of the frame at each extreme, and each block cut off."""
    for place, size in fields():
        for value in EXTREMES:
            if value < 2 ** (8 * size):
                with written_over(place, value.to_bytes(size, "little")):
                    judge(right)
    starts = Beton(PATH)._starts.tolist()
    ends = [start + size for start, size in zip(starts, Beton(PATH)._sizes.tolist(), strict=True)]
    table, whole = table_start(), PATH.stat().st_size
    rows_end = ROWS_START + NUM_IMAGES * ROW.itemsize
    blocks = [HEADER.itemsize, HEADER.itemsize + FIELD.itemsize, ROWS_START, rows_end, *starts, *ends, table, whole]
    for length in sorted({max(0, block + by) for block in blocks for by in (-24, -1, 0, 1)} - {whole}):
        for path in (PATH, BARE):
            cut = path.with_name(f"cut-{path.name}")
            shutil.copy(path, cut)
            if path == PATH:
                shutil.copy(sidecar_path(path), sidecar_path(cut))
            os.truncate(cut, length)
            if length > whole:  # longer, by zeros
                assert cut.stat().st_size == length
            for decoder in DECODERS:
                found = outcome(cut, decoder, right)
                assert found == REFUSED, f"cut to {length} of {whole}"
                OUTCOMES[found] += 1
            OUTCOMES[inspected(cut)] += 1


def flips(right: dict[str, Any]) -> Any:
    """A bit or some, half of them in an image."""
    starts, sizes = Beton(PATH)._starts.tolist(), Beton(PATH)._sizes.tolist()
    table = table_start()
    in_images = st.sampled_from(range(NUM_IMAGES)).flatmap(lambda i: st.integers(starts[i], starts[i] + sizes[i] - 1))
    rows_end = ROWS_START + NUM_IMAGES * ROW.itemsize
    in_frame = st.integers(0, rows_end - 1) | st.integers(table, table + NUM_IMAGES * ALLOCATION.itemsize - 1)
    where = in_images | in_frame

    def flip(place: int, bits: int, path: Path, decoder: str) -> None:
        with path.open("rb") as file:
            file.seek(place)
            byte = file.read(1)[0]
        with written_over(place, bytes([byte ^ bits])):
            OUTCOMES[outcome(path, decoder, right)] += 1

    one_bit = st.sampled_from([1 << bit for bit in range(8)])
    return flip, given(where, one_bit | st.integers(1, 255), st.sampled_from([PATH, BARE]), st.sampled_from(DECODERS))


def sidecars(right: dict[str, Any]) -> Any:
    """Values of any type at any key of the sidecar, and its text cut or changed."""
    whole = sidecar_path(PATH).read_text()
    keys = sorted(json.loads(whole))
    value = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just("AAAA"),
        lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    )
    texts = st.one_of(
        st.tuples(st.sampled_from(keys), value).map(lambda one: json.dumps(json.loads(whole) | {one[0]: one[1]})),
        st.integers(0, len(whole)).map(lambda at: whole[:at]),
        st.tuples(st.integers(0, len(whole) - 1), st.characters(codec="utf-8")).map(
            lambda one: whole[: one[0]] + one[1] + whole[one[0] + 1 :]
        ),
        st.sampled_from(["[" * 20_000, '{"a":' * 20_000, "1" * 5000, "\x00" * 9, "null", "{}", "NaN"]),
    )

    def change(text: str, decoder: str) -> None:
        sidecar_path(PATH).write_text(text, encoding="utf-8")
        OUTCOMES[outcome(PATH, decoder, right)] += 1
        OUTCOMES[inspected(PATH)] += 1

    return change, given(texts, st.sampled_from(DECODERS))


if __name__ == "__main__":
    count, (folder, part) = arguments()
    os.chdir(folder)
    write_files()
    whole = {decoder: look(PATH, decoder) for decoder in DECODERS}
    if part == "fields":
        limit_memory()
        every_field(whole)
        report(OUTCOMES)
    else:
        fuzz, strategies = {"flips": flips, "sidecars": sidecars}[part](whole)
        run(count, fuzz, strategies, OUTCOMES)
