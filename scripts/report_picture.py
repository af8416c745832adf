#!/usr/bin/env python
"""The README's picture of the demo's report: make demo && .venv/bin/python scripts/report_picture.py

It needs Chromium, as does the report's own test.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "results" / "digits_medium" / "report.html"
PICTURE = ROOT / "docs" / "report.png"
WIDTH_PX = 1120  # three charts in a row
FIRST, LAST = "#curves h2", "#phases .charts"
MARGIN_PX = 16


def main() -> int:
    """Returns the exit status."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None or not REPORT.is_file():
        print("report_picture: needs Chromium (apt-get install chromium), and make demo before it", file=sys.stderr)
        return 2
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        page = browser.new_page(viewport={"width": WIDTH_PX, "height": 900}, color_scheme="light")
        page.goto(REPORT.as_uri())
        first, last = (page.locator(place).bounding_box() for place in (FIRST, LAST))
        assert first is not None
        assert last is not None
        top, bottom = first["y"] - MARGIN_PX, last["y"] + last["height"] + MARGIN_PX
        clip = {"x": 0, "y": top, "width": WIDTH_PX, "height": bottom - top}
        page.screenshot(path=PICTURE, full_page=True, clip=clip)
        browser.close()
    print(f"{PICTURE}: {PICTURE.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
