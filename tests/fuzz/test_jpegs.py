"""Mutated JPEGs through the native decoder under AddressSanitizer and UBSan; what it decodes, Pillow decodes alike, and
so does libjpeg's entropy decoding in place of ours."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

HERE = Path(__file__).parent
NATIVE = HERE.parents[1] / "data" / "decoding" / "native"
BUILD = ("g++", "-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{NATIVE}")
KINDS = 12  # of JPEG, in mutants.cpp
SIDE_PX = 80

pytestmark = pytest.mark.timeout(600)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the build with sanitizers needs g++")
@pytest.mark.examples(1200, 20_000)
def test_mutants_neither_read_nor_write_beyond_their_memory(
    examples: int, tmp_path: Path, note: Callable[[Counter[str]], None]
) -> None:
    program, folder = tmp_path / "mutants", tmp_path / "decoded"
    made = subprocess.run(
        [*BUILD, "-o", str(program), str(HERE / "mutants.cpp"), "-ljpeg"], capture_output=True, text=True, timeout=250
    )
    if "jpeglib.h: No such file" in made.stderr:
        pytest.skip("the build with sanitizers needs libjpeg's headers")
    assert made.returncode == 0, made.stderr
    folder.mkdir()
    done = subprocess.run([str(program), str(examples), str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = Counter(json.loads(done.stdout))
    one_way = outcomes.pop("taken by one way only")  # ours does not read beside the crop, libjpeg reads ahead
    assert one_way < examples / 100
    assert outcomes.total() == examples
    assert outcomes["decoded"] > examples / 20  # what libjpeg does not notice, so that the code behind it is reached
    assert outcomes["refused with a reason"] > examples / 4
    compared = [compare_with_pillow(path) for path in sorted(folder.glob("*.jpg"))]
    assert compared.count(True) > 2 * KINDS
    of_these = {"with Pillow's pixels": compared.count(True), "taken by one of two ways of entropy decoding": one_way}
    note(outcomes + Counter({f"of these {what}": number for what, number in of_these.items()}))


def compare_with_pillow(path: Path) -> bool:
    """Whether Pillow decodes it as well. Raises AssertionError if it sees other pixels."""
    pixels = np.fromfile(path.with_suffix(".rgb"), dtype=np.uint8).reshape(SIDE_PX, SIDE_PX, 3)
    try:
        theirs = np.array(Image.open(io.BytesIO(path.read_bytes())).convert("RGB"))
    except Exception as error:  # Pillow is stricter about what stands before the data and after
        if int(path.name.partition("-")[0]) < KINDS:
            raise AssertionError(f"{path.name} is as it was encoded") from error
        return False
    assert np.array_equal(pixels, theirs), f"{path.name}: {np.abs(pixels.astype(int) - theirs).max()} of 255"
    return True
