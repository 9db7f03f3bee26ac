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


def picture(folders: list[Path], output: Path, width: int, height: int) -> None:
    """Render the page of some comparisons and write the top of it as a PNG of few colours."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        raise SystemExit(f"no browser found: install one of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as scratch:
        page, shot = Path(scratch) / "report.html", Path(scratch) / "shot.png"
        page.write_text(render([read(folder) for folder in folders]), encoding="utf-8")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        flags += [
            "--disable-component-update",
            "--disable-sync",
            "--hide-scrollbars",
            f"--user-data-dir={scratch}/user",
        ]
        flags += [f"--window-size={width},{height}", "--virtual-time-budget=20000", f"--screenshot={shot}"]
        subprocess.run([browser, *flags, page.as_uri()], check=True, capture_output=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        Image.open(shot).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
            output, optimize=True
        )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="folders that isotune compare wrote")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=2150)
    given = parser.parse_args()
    picture(given.results, given.output, given.width, given.height)
    print(f"wrote {given.output}, {given.output.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
