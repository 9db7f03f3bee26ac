"""The page as text, and as a real browser shows it."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import isotune
import isotune_cli as cli
from comparisons import METHODS, ablation_methods, write_comparison
from isotune.report.figures import PALETTES
from isotune.report.page import render
from isotune.report.results import read

pytest.importorskip("plotly")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class Outline(HTMLParser):
    """What the tests want to know of a page's elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("results")
    few = {
        label: about for label, about in METHODS.items() if label.partition(":")[0] in ("psoft", "oft", "lora", "head")
    }
    return [
        write_comparison(root / "demo"),
        write_comparison(root / "cola", recipe="glue/cola", metric="matthews_correlation", methods=few),
        write_comparison(root / "ranks", methods=ablation_methods()),
    ]


@pytest.fixture(scope="module")
def page(folders: list[Path]) -> Path:
    """Written by the command itself."""
    path = folders[0].parent / "report.html"
    done = CliRunner().invoke(cli.app, ["report", *map(str, folders), "-o", str(path)])
    assert done.exit_code == 0, done.output
    return path


def test_the_page_is_whole_and_its_outline_sound(page: Path, folders: list[Path]) -> None:
    tags = Outline(page.read_text()).tags
    identifiers = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    for tag, attributes in tags:
        for name in ("src", "href"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:")), (tag, value)  # nothing from elsewhere
            assert value[1:] in (*identifiers, "") or value.startswith("data:")
        for name in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(name, identifiers[0]) in identifiers
        if attributes.get("role") == "img":
            assert len(attributes["aria-label"] or "") > 20
    levels = [int(tag[1]) for tag, _ in tags if len(tag) == 2 and tag[0] == "h" and tag[1].isdigit()]
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert sum(tag == "table" for tag, _ in tags) == sum(tag == "caption" for tag, _ in tags)
    assert sum(tag == "figure" for tag, _ in tags) == sum(tag == "h4" for tag, _ in tags) > 30
    # Our own numbers and the paper's are in columns of their own, and only for a task that the paper has.
    assert page.read_text().count("The paper’s (DeBERTaV3-base)") == 1


def test_all_tasks_of_a_suite_have_their_mean(tmp_path: Path) -> None:
    methods = {label: METHODS[label] for label in ("psoft:r=46", "lora:r=8")}
    found = []
    for number, task in enumerate(("cola", "stsb", "rte", "mrpc", "sst2", "qnli")):
        shifted = {label: {**about, "score": 0.5 + 0.05 * number} for label, about in methods.items()}
        found.append(read(write_comparison(tmp_path / task, recipe=f"glue/{task}", methods=shifted, rates=[1e-3])))
    mean = sum(comparison.variants[0].mean or 0 for comparison in found) / 6
    table = render(found).split("</table>")[0]
    assert "glue mean" in table
    assert f'<span class="value">{100 * mean:.1f}</span>' in table
    assert "glue mean" not in render(found[:5]).split("</table>")[0]


def test_its_version_needs_no_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sources may be run as they are: then isotune has no metadata."""

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    text = render([read(write_comparison(tmp_path / "a", methods={"head": METHODS["head"]}))])
    assert f"Made by isotune {isotune.__version__}." in text


def test_names_from_files_cannot_become_markup(tmp_path: Path) -> None:
    hostile = 'x</script><evil-tag onload="1">&amp;'
    folder = write_comparison(
        tmp_path / "a", recipe=hostile, methods={"head": METHODS["head"], "hra:r=8": METHODS["hra:r=8"]}
    )
    for path in (folder / "runs" / "head").iterdir():
        path.write_text(json.dumps({**json.loads(path.read_text()), "method": {"name": hostile}, "label": hostile}))
    text = render([read(folder)])
    assert "<evil-tag" not in text
    assert "&lt;evil-tag" in text
    assert not any(tag == "evil-tag" for tag, _ in Outline(text).tags)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    program = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no browser found: install chromium and chromium-driver to have the page looked at")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (
        *("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking"),
        *("disable-component-update", "disable-sync", "force-prefers-reduced-motion"),
        *("hide-scrollbars", f"user-data-dir={tmp_path_factory.mktemp('browser')}"),
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(driver))
    yield found
    found.quit()


def visit(browser: Any, page: Path, *, width: int = 1280, scheme: str = "light") -> None:
    """Open the page and wait until all its plots are drawn."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(page.as_uri())
    deadline = time.monotonic() + 240
    while not browser.execute_script("return document.documentElement.dataset.drawn"):
        assert time.monotonic() < deadline, browser.get_log("browser")
        time.sleep(0.1)


# Of every plot with names beside its points: those on the front, and boxes that overlap another or stick out.
NAMES = """
return [...document.querySelectorAll(".plot")].filter((plot) => plot.layout.meta).map((plot) => {
  const box = (one) => one.getBoundingClientRect();
  const area = box(plot.querySelector(".nsewdrag"));
  const names = [...plot.querySelectorAll(".annotation-text")].map((one) => [box(one), one.textContent]);
  const marks = [...plot.querySelectorAll(".points .point")].map((one) => [box(one), "a mark"]);
  const cover = ([a], [b]) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
  return {
    id: plot.id,
    names: names.map(([, text]) => text),
    front: plot.layout.meta.labels.filter((one) => one.front).map((one) => one.method),
    covered: names.filter((one) => [...names, ...marks].some((other) => other !== one && cover(one, other))),
    out: names.filter(([own]) => own.left < area.left - 2 || own.right > area.right + 2 || own.top < area.top - 2),
  };
});
"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [1600, 400])
def test_the_front_is_named_beside_its_points(browser: Any, small_page: Path, width: int) -> None:
    visit(browser, small_page, width=width)
    plots = browser.execute_script(NAMES)
    assert [plot["id"].rpartition("-")[2] for plot in plots] == ["parameters", "memory", "kept", "time"]
    for plot in plots:
        assert plot["covered"] == plot["out"] == [], plot
        assert len(plot["front"]) >= 1
        if width > 1000:
            assert set(plot["front"]) <= set(plot["names"]), plot
    # The legend stays in sight, also where there is little of it.
    top = "document.getElementById('glue-cola-curves').scrollIntoView(); return document.querySelector('.legend')"
    assert browser.execute_script(f"{top}.getBoundingClientRect().top") == 0
    # A plot alone in its row is as wide as the table.
    widths = "return [...document.querySelectorAll('figure.wide .plot, .scroll')].map((one) => one.clientWidth)"
    if width > 1000:
        assert len(set(browser.execute_script(widths))) == 1


# Of every plot: how many traces it has, how many marks were drawn, labels that stick out, ticks of x that overlap.
LOOK = """
return [...document.querySelectorAll(".plot")].map((plot) => {
  const own = plot.getBoundingClientRect();
  const texts = (what) => [...plot.querySelectorAll(what)].map((one) => [one.getBoundingClientRect(), one.textContent]);
  const out = ([box]) => box.left < own.left - 1 || box.right > own.right + 1 || box.bottom > own.bottom + 1;
  const ticks = texts(".xtick text").sort((a, b) => a[0].left - b[0].left);
  return {
    id: plot.id,
    traces: plot.data.length,
    marks: plot.querySelectorAll(".point, .points path, .js-line, .hm image").length,
    cut: texts(".xtick text, .ytick text, .xtitle, .ytitle, .legendtext, .cbaxis text").filter(out),
    overlapping: ticks.filter(([box], i) => i > 0 && box.left < ticks[i - 1][0].right),
    ink: plot.layout.font.color,
  };
});
"""


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_every_plot_is_drawn_and_no_label_is_cut(browser: Any, page: Path, width: int, scheme: str) -> None:
    visit(browser, page, width=width, scheme=scheme)
    plots = browser.execute_script(LOOK)
    assert len(plots) == sum(attributes.get("class") == "plot" for _, attributes in Outline(page.read_text()).tags)
    palette: Any = PALETTES[scheme]
    for plot in plots:
        assert plot["traces"] > 0
        assert plot["marks"] > 0, plot
        assert plot["cut"] == plot["overlapping"] == [], plot
        assert plot["ink"] == palette["ink"]
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert ground == "rgb({}, {}, {})".format(*(int(palette["paper"][i : i + 2], 16) for i in (1, 3, 5)))
    # A wide table scrolls in itself; the page does not.
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.get_log("browser") == []


def column(browser: Any, number: int) -> list[str]:
    rows = "[...document.querySelectorAll('.sortable tbody tr')]"
    script = f"return {rows}.map((row) => row.cells[arguments[0]].dataset.value)"
    found: list[str] = browser.execute_script(script, number)
    return found


@pytest.fixture(scope="module")
def small_page(folders: list[Path]) -> Path:
    """Of one comparison."""
    path = folders[0].parent / "small.html"
    path.write_text(render([read(folders[1])]))
    return path


@pytest.mark.slow
def test_the_table_sorts_by_click_and_by_key(browser: Any, small_page: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    visit(browser, small_page)
    heads = browser.find_elements(By.CSS_SELECTOR, "#glue-cola-table thead th")
    titles = [head.text.replace("\n", " ").rstrip(" ↕↓↑") for head in heads]
    assert heads[1].get_attribute("aria-sort") == "descending"
    scores = [float(value) for value in column(browser, 1)]
    assert scores == sorted(scores, reverse=True)
    number = titles.index("Forgetting")
    heads[number].find_element(By.TAG_NAME, "button").click()
    values = column(browser, number)
    assert values[-1] == ""  # head alone forgets nothing; what is missing stays last
    assert [float(v) for v in values[:-1]] == sorted(float(v) for v in values[:-1])
    assert heads[number].get_attribute("aria-sort") == "ascending"
    assert heads[1].get_attribute("aria-sort") is None
    heads[number].find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    assert column(browser, number) == [*reversed(values[:-1]), ""]
    heads[0].find_element(By.TAG_NAME, "button").send_keys(Keys.SPACE)
    names = column(browser, 0)
    assert names == sorted(names, key=str.casefold)
    status = browser.find_element(By.ID, "glue-cola-table-status").get_attribute("textContent")
    assert status == "sorted by Method, ascending"
    assert browser.get_log("browser") == []


@pytest.mark.slow
def test_a_method_can_be_hidden_and_the_page_printed(browser: Any, small_page: Path) -> None:
    from selenium.webdriver.common.by import By

    visit(browser, small_page, scheme="dark")
    button = browser.find_element(By.CSS_SELECTOR, "#glue-cola .legend button")
    name = button.get_attribute("data-method")
    script = """
      return [...document.querySelectorAll('#glue-cola .plot')].flatMap((plot) => plot.data)
        .filter((trace) => trace.meta === arguments[0]).map((trace) => trace.visible !== false)
    """
    assert set(browser.execute_script(script, name)) == {True}
    assert any(name in plot["names"] for plot in browser.execute_script(NAMES))
    button.click()
    time.sleep(0.5)
    assert set(browser.execute_script(script, name)) == {False}
    assert not any(name in plot["names"] for plot in browser.execute_script(NAMES))
    assert button.get_attribute("aria-pressed") == "false"
    # Print is on white, and the screen's colours are back afterwards.
    browser.execute_script(
        "window.seen = []; window.addEventListener('beforeprint', () =>"
        "window.seen.push(document.querySelector('.plot').layout.font.color))"
    )
    made = browser.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})
    assert base64.b64decode(made["data"]).startswith(b"%PDF")
    light, dark = (PALETTES[scheme]["ink"] for scheme in ("light", "dark"))
    assert browser.execute_script("return window.seen") == [light]
    assert browser.execute_script("return document.querySelector('.plot').layout.font.color") == dark
    assert browser.get_log("browser") == []
