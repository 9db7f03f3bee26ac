"""A plot of the report of a comparison, of its adapters alone, light and dark, for the README and the pages.

    python benchmarks/front.py benchmarks/results/docstrings -o docs/images/front
    python benchmarks/front.py benchmarks/results/word-order-search --plot trade --legend -o docs/images/trade

writes front-light.svg and front-dark.svg: the score of each over its trainable parameters; and what each forgot for
what it learnt. Needs Chromium or Chrome, and isotune's extra `report`.
"""

from __future__ import annotations

import argparse
import dataclasses
import html
import re
from pathlib import Path

from isotune.experiments.registry import is_plain
from isotune.report.figures import PALETTES
from isotune.report.page import render
from isotune.report.results import read
from picture import browse

SCHEMES = {"dark": 0, "light": 1}
"""Chromium's numbers of the colour schemes."""
WIDTH = 640
"""Of the page in pixels: the widest at which a plot has a row for itself."""
EXPORT = """
<script>
(async () => {
  while (!document.documentElement.dataset.drawn) await new Promise((resolve) => setTimeout(resolve, 50));
  const plot = document.querySelector("[id$=-plot-PLOT]");
  if (LEGEND) {
    await Plotly.relayout(plot, { showlegend: true, legend: { orientation: "h", y: -0.25 }, annotations: [] });
  }
  const image = await Plotly.toImage(plot, { format: "svg", width: null, height: null });
  document.documentElement.innerHTML = "<body><pre></pre></body>";
  document.querySelector("pre").textContent = decodeURIComponent(image.slice(image.indexOf(",") + 1));
})();
</script>
"""


def picture(folder: Path, plot: str, output: Path, scheme: str, *, legend: bool) -> None:
    """Write a plot of one comparison in one colour scheme."""
    comparison = read(folder)
    adapters = [variant for variant in comparison.variants if not is_plain(variant.name)]
    page = render([dataclasses.replace(comparison, variants=adapters)])
    if f'-plot-{plot}"' not in page:
        raise SystemExit(f"the report of {folder} has no plot {plot!r}")
    page = page.replace("</body>", EXPORT.replace("PLOT", plot).replace("LEGEND", str(legend).lower()) + "</body>")
    chosen = f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}"
    found = browse(page, chosen, "--dump-dom", width=WIDTH, height=900)
    svg = html.unescape(found[found.index("<pre>") + len("<pre>") : found.index("</pre>")])
    ink = str(PALETTES[scheme]["ink"])
    if "rgb({}, {}, {})".format(*(int(ink[i : i + 2], 16) for i in (1, 3, 5))) not in svg:
        raise SystemExit(f"the browser did not draw the plot in {scheme} colours")
    # What plotly draws lots for goes, so that two files of one plot do not differ: classes, which nothing here reads,
    # and a part of each identifier.
    svg = re.sub(r' class="[^"]*"', "", svg)
    if lot := re.search(r'id="clip([0-9a-f]{6})', svg):
        svg = svg.replace(lot[1], "fixed")
    path = output.with_name(f"{output.name}-{scheme}.svg")
    path.write_text(svg + "\n", encoding="utf-8")
    print(f"wrote {path}, {path.stat().st_size / 1024:.0f} KiB")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a folder that isotune compare wrote")
    parser.add_argument("--plot", default="parameters", help="the last part of its identifier in the report's page")
    parser.add_argument("--legend", action="store_true", help="name the methods below, and not at their points")
    parser.add_argument("-o", "--output", type=Path, required=True, help="without -light.svg")
    given = parser.parse_args()
    for scheme in SCHEMES:
        picture(given.results, given.plot, given.output, scheme, legend=given.legend)


if __name__ == "__main__":
    main()
