"""A page on which one drops a picture and sees what one network, or two, make of it and of its shifts.

It knows nothing of how the networks are run, so that a Hugging Face Space holds this very file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.sources.image_file import open_image, rgb_pixels

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

MOST_BYTES = 20_000_000
_BEST = 5
_LEAST_REACH_PX, _MOST_REACH_PX = 4, 16
_COLORS = ("#2a6fbb", "#c2571a")
_KEPT_SECONDS = 600  # pictures that were dropped are removed after this


@dataclass(frozen=True)
class Classifier:
    """A network with all that a picture needs on its way into it.

    image_size: of the square that it sees, in px. crop_ratio: side of the central square over the shorter side.
    mean, std: per channel, on the 0..255 scale.
    network: normalized images, float32 [N, 3, S, S] -> logits [N, K].
    """

    name: str
    class_names: Sequence[str]
    image_size: int
    crop_ratio: float
    mean: Sequence[float]
    std: Sequence[float]
    network: Callable[[np.ndarray], np.ndarray]

    @property
    def reach_px(self) -> int:
        """How far pictures are shifted."""
        return min(_MOST_REACH_PX, max(_LEAST_REACH_PX, self.image_size // 5))

    def probabilities(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [N, S, S, 3] -> [N, K]."""
        normalized = (pixels - np.asarray(self.mean)) / np.asarray(self.std)
        logits = np.asarray(self.network(np.ascontiguousarray(normalized.transpose(0, 3, 1, 2), dtype=np.float32)))
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class Seen:
    """What a network makes of a picture.

    best: class name -> probability, the five best. shifts_px, confidences: probability of the best class of the picture
    as it is, at each shift to the right. same: at how many shifts that class stays the best. seconds: for one image.
    """

    label: str
    best: dict[str, float]
    shifts_px: list[int]
    confidences: list[float]
    same: int
    seconds: float


def read_picture(path: str | Path) -> np.ndarray:
    """The file as uint8 [height, width, 3]. Raises ValueError for one that is too large or no picture."""
    path = Path(path)
    if path.stat().st_size > MOST_BYTES:
        size = path.stat().st_size / 1e6
        raise ValueError(f"the file has {size:.1f} MB, and {MOST_BYTES / 1e6:.0f} MB is the limit; make it smaller")
    return rgb_pixels(open_image(path.read_bytes()))


def look_at(image: np.ndarray, classifier: Classifier) -> Seen:
    """Classify a picture, and the same picture shifted by every number of px up to `reach_px` in both directions."""
    reach, size = classifier.reach_px, classifier.image_size
    canvas = _canvas(image, image_size=size, crop_ratio=classifier.crop_ratio, reach_px=reach)
    shifts = list(range(-reach, reach + 1))
    # To shift the picture to the right is to look at it from further left.
    views = np.stack([canvas[:, reach - shift : reach - shift + size] for shift in shifts])
    classifier.probabilities(views[:1])  # the first call of a network is slow
    start = time.perf_counter()
    (still,) = classifier.probabilities(views[reach : reach + 1])
    seconds = time.perf_counter() - start
    shifted = classifier.probabilities(views)
    order: list[int] = np.argsort(-still)[:_BEST].tolist()
    return Seen(
        label=classifier.class_names[order[0]],
        best={classifier.class_names[index]: float(still[index]) for index in order},
        shifts_px=shifts,
        confidences=[float(value) for value in shifted[:, order[0]]],
        same=int((shifted.argmax(axis=1) == order[0]).sum()),
        seconds=seconds,
    )


def build_page(classifiers: Sequence[Classifier], *, title: str) -> Any:
    """The page, as gradio's Blocks, for one network or two."""
    import gradio as gr  # pyright: ignore[reportMissingImports]

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(_KEPT_SECONDS, _KEPT_SECONDS)) as page:
        gr.Markdown(f"# {title}\n\nDrop a picture. It stays on the machine that runs this page.")
        with gr.Row():
            with gr.Column():
                dropped = gr.File(label="Picture, up to 20 MB", elem_id="picture", height=140)
                shown = gr.Image(label="What was dropped", interactive=False, format="png", buttons=[], elem_id="shown")
            with gr.Column():
                labels = [
                    gr.Label(label=one.name, num_top_classes=_BEST, elem_id=f"label-{index}")
                    for index, one in enumerate(classifiers)
                ]
                said = gr.Markdown(elem_id="said")
        chart = gr.LinePlot(
            x="shift",
            y="confidence",
            color="network",
            x_title="shift to the right, px",
            y_title="confidence",
            y_lim=[0, 1],
            color_map={one.name: color for one, color in zip(classifiers, _COLORS, strict=False)},
            elem_id="chart",
            height=260,
        )
        # The file is put down again at once: the field takes the next one, and only a drop starts the work.
        dropped.upload(
            lambda path: _answer(path, classifiers),
            dropped,
            [dropped, shown, *labels, said, chart],
            api_name="classify",
        )
    return page


def launch(page: Any, *, host: str | None = None, port: int | None = None, wait: bool = True) -> str:
    """Serve the page; returns its address. Nothing is sent to anybody else.

    host: None: gradio's, which is this machine alone unless GRADIO_SERVER_NAME says otherwise, as in a Space.
    port: None: the first free one from 7860. wait: until the process is stopped.

    Raises OSError for a port that is taken.
    """
    from gradio.themes import Default  # pyright: ignore[reportMissingImports]

    _, local, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        ssr_mode=False,
        prevent_thread_lock=not wait,
        max_file_size=MOST_BYTES,
        theme=Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        footer_links=[],
    )
    return local


def _answer(path: str | None, classifiers: Sequence[Classifier]) -> list[Any]:
    """What the page shows of the file: the field emptied, the picture, labels, text and chart."""
    import gradio as gr  # pyright: ignore[reportMissingImports]
    import pandas as pd

    if path is None:
        raise gr.Error("no file was dropped", print_exception=False)
    try:
        image = read_picture(path)
    except (ValueError, OSError) as error:
        raise gr.Error(f"{Path(path).name} cannot be used: {error}", print_exception=False) from None
    seen = [look_at(image, one) for one in classifiers]
    rows = [
        {"shift": shift, "confidence": confidence, "network": one.name}
        for one, found in zip(classifiers, seen, strict=True)
        for shift, confidence in zip(found.shifts_px, found.confidences, strict=True)
    ]
    texts = [_in_words(one, found) for one, found in zip(classifiers, seen, strict=True)]
    return [None, image, *[found.best for found in seen], "\n\n".join(texts), pd.DataFrame(rows)]


def _in_words(classifier: Classifier, seen: Seen) -> str:
    least, most = min(seen.confidences), max(seen.confidences)
    return (
        f"**{classifier.name}**: {seen.label}, in {1000 * seen.seconds:.1f} ms. Shifted by up to {classifier.reach_px} "
        f"px it stays the answer at {seen.same} of {len(seen.shifts_px)} shifts, with a confidence of {least:.2f} to "
        f"{most:.2f}."
    )


def _canvas(image: np.ndarray, *, image_size: int, crop_ratio: float, reach_px: int) -> np.ndarray:
    """The central square of an image with `reach_px` more on both sides, [S, S + 2 reach, 3]; edges are repeated.

    Bilinear with antialiasing, as the loaders resize. The square in its middle is what the network sees unshifted.
    """
    from PIL import Image

    height, width = image.shape[:2]
    side = max(1, round(crop_ratio * min(height, width)))
    left, top = round((width - side) / 2), round((height - side) / 2)
    more = side / image_size * reach_px
    edge = int(np.ceil(more)) + 1
    wide = np.pad(image, ((0, 0), (edge, edge), (0, 0)), mode="edge")
    box = (left + edge - more, top, left + edge + side + more, top + side)
    resized = Image.fromarray(wide).resize((image_size + 2 * reach_px, image_size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(resized)
