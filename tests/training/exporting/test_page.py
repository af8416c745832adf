"""The page: what it sees of a picture and of its shifts, what it refuses, and that a real browser can use it."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from data.sources import digits
from training import demo
from training.exporting.page import MOST_BYTES, Classifier, look_at, read_picture
from training.trained import load_trained

ROOT = Path(__file__).parents[3]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_gradio = pytest.mark.skipif(
    not any((Path(path) / "gradio").is_dir() for path in sys.path), reason="the page needs gradio"
)
pytestmark = [pytest.mark.timeout(280), pytest.mark.xdist_group("exports")]


def where_it_is_bright(*, image_size: int = 20, crop_ratio: float = 1.0) -> Classifier:
    """A network whose answer is the column, of four, in which the picture is brightest."""

    def network(images: np.ndarray) -> np.ndarray:
        return 10 * images.mean(axis=(1, 2)).reshape(len(images), 4, -1).mean(axis=2)

    names = ("first", "second", "third", "fourth")
    return Classifier("bright", names, image_size, crop_ratio, (0.0,) * 3, (255.0,) * 3, network)


def column(left: int, right: int, *, side: int = 20) -> np.ndarray:
    """A dark square with a white column."""
    image = np.zeros((side, side, 3), dtype=np.uint8)
    image[:, left:right] = 255
    return image


def test_a_picture_shifted_to_the_right_is_seen_further_right() -> None:
    seen = look_at(column(5, 10), where_it_is_bright())
    assert seen.label == "second"
    assert seen.shifts_px == [-4, -3, -2, -1, 0, 1, 2, 3, 4]
    assert seen.same == 5  # a column of 5 px in bins of 5: up to 2 px to either side
    assert seen.confidences[4] == max(seen.confidences) == seen.best["second"]
    left = look_at(column(0, 5), where_it_is_bright())
    # Shifted right by 4 px, the edge repeats: the first bin is all white, 4 px of 5 of the second.
    assert left.confidences[8] == pytest.approx(np.exp(10) / (np.exp(10) + np.exp(8) + 2), rel=1e-4)


def test_a_shift_brings_in_what_lies_beyond_the_crop() -> None:
    # The central half of 40 px at 20 px: the column lies outside of it, until the picture moves to the left.
    image = column(31, 35, side=40)
    seen = look_at(image, where_it_is_bright(crop_ratio=0.5))
    still = look_at(np.zeros_like(image), where_it_is_bright(crop_ratio=0.5))
    assert seen.confidences[4] == pytest.approx(still.confidences[4], abs=1e-6)
    assert seen.confidences[0] != pytest.approx(still.confidences[0], abs=1e-2)


@pytest.mark.parametrize(("height", "width", "crop_ratio"), [(60, 80, 1.0), (97, 64, 0.875), (8, 8, 1.0)])
def test_unshifted_it_sees_what_the_loaders_give(height: int, width: int, crop_ratio: float, made_run: Any) -> None:
    trained = load_trained(made_run("plain", crop_ratio=crop_ratio))
    given: list[np.ndarray] = []

    def network(images: np.ndarray) -> np.ndarray:
        given.append(images)
        return np.zeros((len(images), 10))

    about = trained.preprocessing
    one = Classifier("x", trained.class_names, about.image_size, about.crop_ratio, about.mean, about.std, network)
    picture = Image.fromarray(digits(split="eval").image(5)).resize((width, height), Image.Resampling.BICUBIC)
    look_at(np.array(picture), one)  # first at a shift, to warm up, then as it is
    expected = about.normalized(about.pixels(np.array(picture))[None]).numpy()
    levels = np.rint(np.abs(given[1] - expected) * np.array(about.std)[:, None, None])  # of 255
    assert levels[..., 2:-2].max() <= 4  # 4 with torchvision 0.22, whose rounding differs from exact in 9 % of values
    # A canvas goes on beyond the crop, and antialiasing mixes in some of that at its left and right border.
    assert levels.max() <= 8


def bomb() -> bytes:
    """A PNG of a few kB with 400 million pixels."""
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"not a picture", "it is not an image file of these kinds"),
        (b"", "it has no bytes"),
        (b"\x89PNG" + bytes(MOST_BYTES), "the file has 20.0 MB, and 20 MB is the limit"),
        (bomb, "could be decompression bomb"),
    ],
    ids=["text", "empty", "large", "bomb"],  # not their contents, which pytest would pass around
)
def test_what_is_no_picture_is_refused_in_words(content: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(content() if callable(content) else content)
    with pytest.raises(ValueError, match=re.escape(said)):
        read_picture(path)


@needs_gradio
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere is not there; give results/RUN"),
        (["RUN", "--against", "OTHER"], "has other classes (2) than"),
        (["RUN", "--export", "THERE"], "is there already; remove it"),
    ],
)
def test_a_mistake_gets_one_line(arguments, said, made_run: Any, tmp_path: Path, capsys) -> None:
    run, other = made_run("one"), made_run("two")
    if "OTHER" in arguments:  # a network of so many classes
        names = '["a", "b"]'
        text = re.sub(
            r'"class_names": \[.*?\]', f'"class_names": {names}', (run / "model.json").read_text(), flags=re.S
        )
        (other / "model.json").write_text(text)
        state = torch.load(other / "checkpoints" / "best.pt")
        for name in ("module.fc.weight", "module.fc.bias"):
            state["state"]["model"][name] = state["state"]["model"][name][:2]
        torch.save(state, other / "checkpoints" / "best.pt")
    (tmp_path / "there").mkdir()
    names = {"RUN": str(run), "OTHER": str(other), "THERE": str(tmp_path / "there")}
    assert demo.main([names.get(one, one) for one in arguments]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.startswith("demo.py: ")
    assert err.count("\n") == 1


@contextlib.contextmanager
def served(*command: str, cwd: Path, environment: dict[str, str]) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of a page that `command` serves, and its process."""
    with subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:\d+", line)
            assert found, line + process.stdout.read()
            yield found[0], process
        finally:
            if process.poll() is None:
                process.kill()


def free_port() -> int:
    """A port that nobody listens on."""
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@needs_gradio
@pytest.mark.skipif(CHROMIUM is None, reason="a browser test needs Chromium: apt-get install chromium")
def test_a_browser_drops_a_digit_and_reads_its_label(trained_run: Path, made_run: Any, tmp_path: Path) -> None:
    pytest.importorskip("playwright", reason="a browser test needs playwright")
    source = digits(split="eval")
    picture, wrong = tmp_path / "digit.png", tmp_path / "wrong.png"
    Image.fromarray(source.image(3)).resize((80, 80)).save(picture)
    wrong.write_bytes(b"no picture")
    trained = load_trained(trained_run)
    pixels = trained.preprocessing.pixels(np.array(Image.open(picture)))
    with torch.no_grad():
        answer = trained.class_names[int(trained.network(trained.preprocessing.normalized(pixels[None])).argmax())]

    latest = str(trained_run / "checkpoints" / "latest.pt")
    command = [sys.executable, "demo.py", str(trained_run), "--against", latest, "--port", str(free_port())]
    with served(*command, cwd=ROOT, environment=dict(os.environ)) as (address, process):
        found, refused, requests = _browse(address, [picture, wrong])
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    assert found.splitlines()[:2] == [f"{trained_run.name} best.pt", answer]  # the label's title and its answer
    assert "wrong.png cannot be used: it is not an image file" in refused
    assert not [one for one in requests if not one.startswith((address, "data:", "blob:"))]


def _browse(address: str, pictures: Sequence[Path]) -> tuple[str, str, list[str]]:
    """What the page shows for the first picture, its message for the second, and all addresses that it asked for."""
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]

    requests: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        field = "#picture input[type=file]"
        page.wait_for_selector(field, state="attached", timeout=60_000)
        page.set_input_files(field, pictures[0])
        page.wait_for_selector("#said strong", timeout=60_000)
        label = page.inner_text("#label-0")
        assert "stays the answer at" in page.inner_text("#said")
        page.wait_for_selector("#chart canvas, #chart svg", timeout=60_000)
        page.wait_for_selector(field, state="attached", timeout=60_000)
        page.set_input_files(field, pictures[1])
        page.wait_for_selector("text=cannot be used", timeout=60_000)
        refused = page.inner_text("body")
        browser.close()
    return label, refused, requests


@needs_gradio
def test_a_space_runs_without_this_project(trained_run: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "space"
    assert demo.main([str(trained_run), "--export", str(folder)]) == 0
    assert f"huggingface-cli upload OWNER/NAME {folder} . --repo-type space" in capsys.readouterr().out
    matter = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    assert (matter["sdk"], matter["app_file"]) == ("gradio", "app.py")

    picture = tmp_path / "digit.png"
    Image.fromarray(digits(split="eval").image(3)).save(picture)
    script = tmp_path / "stranger.py"
    script.write_text(_SPACES_USER)
    # -I leaves the folder of the script out, too; the Space's modules lie beside app.py.
    command = [sys.executable, "-I", str(script), str(folder), str(picture)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    trained = load_trained(trained_run)
    pixels = trained.preprocessing.pixels(digits(split="eval").image(3))
    with torch.no_grad():
        expected = trained.network(trained.preprocessing.normalized(pixels[None])).softmax(1)[0]
    answer, confidence = done.stdout.split()
    assert answer == trained.class_names[int(expected.argmax())]
    assert float(confidence) == pytest.approx(float(expected.max()), abs=0.03)


# Serves app.py as a Space does, and asks it through its API; no package of this project can be imported.
_SPACES_USER = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("algos", "brisk", "models", "data", "training", "composer", "torch"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
sys.path.insert(0, sys.argv[1])
import app
from gradio_client import Client, handle_file
address = app.launch(app.demo, wait=False)
answer = Client(address, verbose=False).predict(handle_file(sys.argv[2]), api_name="/classify")
label = answer[2]
print(label["label"], label["confidences"][0]["confidence"])
app.demo.close(verbose=False)
"""


def test_demos_help_needs_no_library() -> None:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "demo.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert "--against" in done.stdout
    assert time.perf_counter() - start < 10
