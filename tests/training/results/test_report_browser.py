"""The report page in a browser: nothing overflows, every picture and label is there, in both themes and both widths."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_runs import add_evaluation, make_history, make_run

from training.results.report import write_report

pytestmark = pytest.mark.timeout(120)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VISIBLE_LABELS = """() => [...document.querySelectorAll('svg text')].map(text => {
    const box = text.getBoundingClientRect(), around = text.closest('figure').getBoundingClientRect();
    return {text: text.textContent, px: box.height, outside: box.right > around.right || box.left < around.left};
})"""
CONTRAST = """() => [...document.querySelectorAll('svg text, td, th, p, dd, a')].map(element => {
    const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const light = color => {
        canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const style = getComputedStyle(element), svg = element.closest('svg');
    const ink = light(svg ? style.fill : style.color), page = light(getComputedStyle(document.body).backgroundColor);
    return (Math.max(ink, page) + 0.05) / (Math.min(ink, page) + 0.05);
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox does not run as root
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page on one run, and one on four with long names and with classes that have them."""
    folder = tmp_path_factory.mktemp("runs")
    long = "a_run_name_that_is_a_good_deal_longer_than_any_phone_is_wide_" + "x" * 40
    runs = [make_run(folder / "digits_medium"), make_run(folder / long, "algorithms.sam=null", "seed=5")]
    runs += [make_run(folder / f"run_{top1}", history=make_history(epochs=90, top1=top1)) for top1 in (0.7, 0.91)]
    add_evaluation(runs[0])
    add_evaluation(runs[1], worst_classes=[{"class": "w" * 80, "mistaken_for": "many words " * 9, "recall": 0.5}])
    return {"one": write_report(runs[:1]), "four": write_report(runs, folder / "four.html")}


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["one", "four"])
def test_is_legible(browser, pages, name, scheme, width):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
    page.goto(pages[name].as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    loaded = page.evaluate("[...document.images].map(image => image.complete && image.naturalWidth)")
    assert loaded == [640] * (4 if name == "one" else 8)
    labels = page.evaluate(VISIBLE_LABELS)
    texts = {label["text"] for label in labels}
    assert {"epoch", "training time (s)"} <= texts
    assert {"eval 85.00 %", "train 60.00 %"} <= texts if name == "one" else {"A 85.00 %", "D 90.67 %"} <= texts
    assert not [label for label in labels if label["outside"]]
    assert min(label["px"] for label in labels) >= 9
    assert min(page.evaluate(CONTRAST)) >= 4.5
    assert said == []
    page.close()
