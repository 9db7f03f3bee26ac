"""All checkpoints of a directory become LoRA folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

import isotune_cli as cli
from helpers import counted, randomize, some_tokens, tiny_llama
from isotune import OFTConfig, PsoftConfig, get_peft_model
from isotune.files.export_merged import export_merged
from isotune.files.export_runs import adapter_folders, export_lora_runs, only_adapter


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Four checkpoints of one training, one of them damaged, and an adapter of another method further down."""
    tiny_llama().save_pretrained(tmp_path / "base")
    for step in (2, 10, 30, 40):
        model = get_peft_model(base_of(tmp_path), PsoftConfig(r=4, target_modules=["q_proj"]))
        randomize(model, seed=step)
        model.save_pretrained(tmp_path / f"runs/checkpoint-{step}")
    model = get_peft_model(base_of(tmp_path), OFTConfig(oft_block_size=8, target_modules=["v_proj"]))
    randomize(model)
    model.save_pretrained(tmp_path / "runs/other/final")
    (tmp_path / "runs/checkpoint-10/adapter_model.safetensors").write_bytes(b"damaged")
    (tmp_path / "runs/logs").mkdir()
    return tmp_path / "runs"


def base_of(folder: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(folder / "base")


def tree(folder: Path) -> list[str]:
    return sorted(p.parent.relative_to(folder).as_posix() for p in folder.rglob("adapter_config.json"))


def test_all_are_exported_and_one_bad_one_is_reported(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = runs.parent / "out"
    assert [p.as_posix() for p in adapter_folders(runs)] == [
        "checkpoint-2", "checkpoint-10", "checkpoint-30", "checkpoint-40", "other/final",
    ]  # fmt: skip
    with counted(monkeypatch, "isotune.files.export_runs.named_base") as loads:
        result = export_lora_runs(runs, out, rank=3)
    assert len(loads) == 1
    good = ["checkpoint-2", "checkpoint-30", "checkpoint-40", "other/final"]
    assert list(result.written) == good
    assert list(result.failed) == ["checkpoint-10"]
    assert "damaged" in result.failed["checkpoint-10"]
    assert tree(out) == sorted(good)
    assert all(report.rank == 3 for report in result.written.values())
    # Each is what its own checkpoint gives alone.
    for name in ("checkpoint-30", "other/final"):
        single = export_lora_runs(runs / name / "..", runs.parent / "single" / name, rank=3).written[Path(name).name]
        assert single.error == result.written[name].error


def test_it_goes_on_where_it_was(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = runs.parent / "out"
    first = export_lora_runs(runs, out, rank=3)
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    shutil.rmtree(out / "checkpoint-30")
    shutil.copyfile(runs / "checkpoint-2/adapter_model.safetensors", runs / "checkpoint-10/adapter_model.safetensors")
    second = export_lora_runs(runs, out, rank=3)
    assert list(second.written) == ["checkpoint-10", "checkpoint-30"]
    assert second.skipped == ["checkpoint-2", "checkpoint-40", "other/final"]
    assert not second.failed
    assert second.written["checkpoint-30"] == first.written["checkpoint-30"]
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items() if "checkpoint-30" not in str(p))
    with counted(monkeypatch, "isotune.files.export_runs.named_base") as loads:
        assert len(export_lora_runs(runs, out, rank=3).skipped) == 5
    assert not loads
    # Other options are another export, and nothing is overwritten.
    third = export_lora_runs(runs, out, rank=2)
    assert len(third.failed) == 5
    assert "remove it" in third.failed["checkpoint-2"]


def test_the_command(runs: Path) -> None:
    out = runs.parent / "out"
    command = ["export", str(runs), "--to", "lora", "-o", str(out), "--energy", "0.9", "--uniform-rank"]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 1
    assert f"failed {runs}/checkpoint-10: " in done.stderr
    assert done.stdout.count("wrote ") == 4
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 1
    assert done.stdout.count("was there already") == 4
    loaded = peft.PeftModel.from_pretrained(base_of(runs.parent), out / "checkpoint-40")
    with torch.no_grad():
        assert loaded(input_ids=some_tokens()).logits.isfinite().all()
    config = json.loads((out / "other/final/adapter_config.json").read_text())
    assert config["rank_pattern"] == {}
    done = CliRunner().invoke(cli.app, ["export", str(runs / "logs"), "--to", "lora", "-o", str(out)])
    assert done.exit_code == 2
    assert "no adapter here" in done.output


def test_a_base_that_cannot_be_loaded_is_reported_for_each(runs: Path) -> None:
    result = export_lora_runs(runs, runs.parent / "out", base=str(runs.parent / "missing"), rank=3)
    assert not result.written
    assert len(result.failed) == 5
    with pytest.raises(ValueError, match="is not a folder"):
        export_lora_runs(runs.parent / "nothing", runs.parent / "out")


def test_an_adapter_with_checkpoints_in_its_folder_is_itself(runs: Path) -> None:
    shutil.copytree(runs / "checkpoint-40", runs / "checkpoint-30", dirs_exist_ok=True)
    for file in (runs / "checkpoint-40").iterdir():
        shutil.copy(file, runs)
    assert only_adapter(runs) == str(runs)
    assert only_adapter(runs / "other") == str(runs / "other/final")
    (runs / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"holds 5 adapters; give the folder of one"):
        only_adapter(runs)


def test_a_model_that_transformers_cannot_save_names_the_way_out(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", refuse)
    with pytest.raises(ValueError, match="--base FULL"):
        export_merged(runs / "checkpoint-40", runs.parent / "merged")
    assert not (runs.parent / "merged").exists()
