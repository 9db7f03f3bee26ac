"""The mean of adapter folders is that of the loaded adapters; what has none is refused before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import isotune_cli as cli
from helpers import Stack, randomize, relative_error
from isotune import get_peft_model
from isotune.errors import IsotuneWarning
from isotune.files.adapter import CONFIG_FILE, WEIGHTS_FILE
from isotune.methods import METHODS
from isotune.moving import MovingSchedule
from isotune.tools.merging import merge_adapters

TARGETS = ["first", "second", "third"]
CASES: dict[str, dict[str, Any]] = {
    "psoft": {"r": 8},
    "lora_xs": {"r": 8, "basis": "embedded"},
    "oft": {"oft_block_size": 8, "side": "output"},
    "boft": {"boft_block_size": 4, "boft_n_butterfly_factor": 2},
    "goft": {},
    "hra": {"r": 4},
}


def stack() -> Stack:
    torch.manual_seed(0)
    return Stack()


def folders(place: Path, method: str = "psoft", **options: Any) -> list[str]:
    """Two adapters as if trained, on one base."""
    for seed, name in enumerate(("a", "b")):
        model = get_peft_model(stack(), METHODS[method](**{"target_modules": TARGETS, **options}))
        randomize(model, std=0.2, seed=seed)
        model.save_pretrained(str(place / name))
    return [str(place / "a"), str(place / "b")]


def output(model: PeftModel) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(torch.linspace(-2, 2, 5 * 24).reshape(5, 24))
    return result


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["merge", *arguments])


@pytest.mark.parametrize("how", ["rotation", "orthomerge"])
@pytest.mark.parametrize("method", CASES)
@pytest.mark.filterwarnings("ignore::isotune.errors.IsotuneWarning")
def test_the_files_give_what_the_loaded_adapters_give(tmp_path: Path, method: str, how: Any) -> None:
    torch.manual_seed(5)
    given = folders(tmp_path, method, **CASES[method])
    found = merge_adapters(given, tmp_path / "new", [0.7, 0.4], how)
    assert (found.layers, found.weights) == (3, (0.7, 0.4))
    assert (found.error > 0) == (method == "hra")
    merged = PeftModel.from_pretrained(stack(), str(tmp_path / "new"))
    live = PeftModel.from_pretrained(stack(), given[0], "a")
    live.load_adapter(given[1], "b")
    live.add_weighted_adapter(["a", "b"], [0.7, 0.4], "mean", combination_type=how)
    live.set_adapter("mean")
    assert relative_error(output(merged), output(live)) < 1e-6
    live.set_adapter("a")
    assert relative_error(output(merged), output(live)) > 1e-2


def test_the_command_line_takes_numbers_apart_or_together(tmp_path: Path) -> None:
    a, b = folders(tmp_path, r=8)
    said = run(a, b, "--weights", "0.25", "0.75", "-o", str(tmp_path / "apart"))
    assert said.exit_code == 0, said.output
    assert said.stdout == f"wrote {tmp_path}/apart: ISOTUNE_PSOFT, 3 layers, weights 0.25, 0.75, exact\n"
    assert run(a, b, "--weights=0.25,0.75", "-o", str(tmp_path / "together")).exit_code == 0
    assert run(a, b, "-o", str(tmp_path / "equal"), "--how", "orthomerge").exit_code == 0
    said = run(a, b, "--weights=0.5,0.5", "-o", str(tmp_path / "half"), "--how", "orthomerge", "--json")
    assert json.loads(said.stdout) == {
        "wrote": str(tmp_path / "half"),
        "method": "ISOTUNE_PSOFT",
        "layers": 3,
        "weights": [0.5, 0.5],
        "error": 0.0,
    }
    weights = {name: (tmp_path / name / WEIGHTS_FILE).read_bytes() for name in ("apart", "together", "equal", "half")}
    assert weights["apart"] == weights["together"] != weights["equal"] == weights["half"]


def test_the_command_line_takes_the_folders_of_runs_and_says_where_it_cannot_write(tmp_path: Path) -> None:
    a, b = folders(tmp_path / "run", r=8)
    for name in (a, b):
        Path(name).rename(f"{name}_")
        Path(name, "psoft").mkdir(parents=True)
        Path(f"{name}_").rename(Path(name, "psoft", "adapter"))
    assert run(a, b, "-o", str(tmp_path / "new")).exit_code == 0
    assert set(PeftModel.from_pretrained(stack(), str(tmp_path / "new")).peft_config) == {"default"}
    (tmp_path / "file").touch()
    said = run(a, b, "-o", str(tmp_path / "file" / "new"))
    assert said.exit_code == 2
    assert said.stderr == f"error: cannot read or write {tmp_path}/file: File exists\n"


def test_a_large_error_is_said(tmp_path: Path) -> None:
    given = folders(tmp_path, "hra", r=4)
    with pytest.warns(IsotuneWarning, match=r"differs from it by \d\d\.\d% of all that it changes"):
        assert merge_adapters(given, tmp_path / "new").error > 0.1


def changed(folder: str, **fields: Any) -> None:
    file = Path(folder) / CONFIG_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    a, b = folders(tmp_path, r=8)
    out = str(tmp_path / "new")
    for others, said in (
        (folders(tmp_path / "oft", "oft", oft_block_size=8)[:1], "Adapters of different methods have no weighted mean"),
        (folders(tmp_path / "rank", r=4)[:1], "different sizes (r = 8 and r = 4)"),
        (folders(tmp_path / "seed", r=8, basis_seed=3)[:1], "different bases of the principal subspace"),
        (folders(tmp_path / "where", r=8, target_modules=TARGETS[:2])[:1], "adapt different modules, such as 'third'"),
        (folders(tmp_path / "head", r=8, target_modules=TARGETS[:2], modules_to_save=["third"])[:1], "modules_to_save"),
        ([a], f"{a} is given twice"),
        ([str(tmp_path / "absent")], "is not a folder"),
        ([b, "--weights", "1"], "must be one finite number for each of the 2 adapters"),
        ([b, "--weights", "1", "x"], "x is not a folder"),
        ([b, "--weights", "1;2"], "must be one number for each adapter, such as --weights 0.7 0.3"),
        ([b, "0.5"], "'0.5' is no folder; numbers follow --weights"),
        ([b, "--how", "svd"], "combination_type='svd' is not one of 'rotation', 'orthomerge'"),
        ([b, "--weights=1,-1", "--how", "orthomerge"], "weights below 0"),
    ):
        done = run(a, *others, "-o", out)
        assert (done.exit_code, done.stdout) == (2, ""), done.output
        assert said in done.stderr
        assert not Path(out).exists()
    extra = load_file(Path(b) / WEIGHTS_FILE)
    save_file({**extra, "base_model.model.embed.weight": torch.zeros(2)}, Path(b) / WEIGHTS_FILE)
    assert "also holds 'base_model.model.embed.weight'" in run(a, b, "-o", out).stderr


def test_adapters_of_two_bases_need_to_be_told_which(tmp_path: Path) -> None:
    a, b = folders(tmp_path, "oft", oft_block_size=8)
    changed(a, base_model_name_or_path="models/one")
    changed(b, base_model_name_or_path="copies/one")
    done = run(a, b, "-o", str(tmp_path / "new"))
    assert "name different base models" in done.stderr
    assert "copies/one" in done.stderr
    assert run(a, b, "-o", str(tmp_path / "new"), "--base", "models/one").exit_code == 0
    assert json.loads((tmp_path / "new" / CONFIG_FILE).read_text())["base_model_name_or_path"] == "models/one"
    assert "exists already" in run(a, b, "-o", str(tmp_path / "new"), "--base", "models/one").stderr


def test_what_has_moved_is_kept_whole_or_refused(tmp_path: Path) -> None:
    model = get_peft_model(stack(), METHODS["psoft"](r=8, target_modules=TARGETS))
    randomize(model, std=0.2)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.0)
    MovingSchedule(1, select="bottom").step(model, optimizer)
    randomize(model, std=0.2)
    model.save_pretrained(str(tmp_path / "moved"))
    model.save_pretrained(str(tmp_path / "same"))
    with pytest.raises(ValueError, match=r"The subspace of 'default' in .*first' has moved"):
        model.add_weighted_adapter(["default"], [0.5], "half")
    both = [str(tmp_path / "moved"), str(tmp_path / "same")]
    done = run(both[0], "--weights", "0.5", "-o", str(tmp_path / "new"))
    assert "in 'first' has moved, and the mean keeps all of what is accumulated" in done.stderr
    assert not (tmp_path / "new").exists()
    merge_adapters(both, tmp_path / "new", [0.3, 0.7])
    merged = PeftModel.from_pretrained(stack(), str(tmp_path / "new"))
    assert relative_error(output(merged), output(model)) < 1e-5
    randomize(model, std=0.2)
    MovingSchedule(1, select="bottom").step(model, optimizer)
    model.save_pretrained(str(tmp_path / "farther"))
    done = run(both[0], str(tmp_path / "farther"), "-o", str(tmp_path / "other"))
    assert "hence no mean" in done.stderr, done.output
