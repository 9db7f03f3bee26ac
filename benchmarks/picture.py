"""A picture of the report of some comparisons, for the documentation.

    python benchmarks/picture.py runs/compare/demo -o docs/images/report.png

Needs Chromium or Chrome, and isotune's extra `report`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

from isotune.report.page import render
from isotune.report.results import read

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def browse(html: str, *flags: str, width: int, height: int) -> str:
    """Open a page without a window and return what the browser writes to its output."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        raise SystemExit(f"no browser found: install one of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch) / "page.html"
        page.write_text(html, encoding="utf-8")
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
        command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        command += [f"--user-data-dir={scratch}/user", f"--window-size={width},{height}"]
        command += ["--virtual-time-budget=20000", *flags, page.as_uri()]
        return subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout


def picture(folders: list[Path], output: Path, width: int, height: int) -> None:
    """Render the page of some comparisons and write the top of it as a PNG of few colours."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        shot = Path(scratch) / "shot.png"
        browse(render([read(folder) for folder in folders]), f"--screenshot={shot}", width=width, height=height)
        few = Image.open(shot).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        few.save(output, optimize=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="folders that isotune compare wrote")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=2198)
    given = parser.parse_args()
    picture(given.results, given.output, given.width, given.height)
    print(f"wrote {given.output}, {given.output.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
