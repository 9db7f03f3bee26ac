"""`benchmarks/peft_comparison`: experiments that PEFT's benchmark can run, and the command that runs its run.py.

PEFT's scripts are in its repository alone; a stand-in with the same contract takes their place here.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import tiny_llama
from isotune.experiments.registry import entry
from isotune.report.reading import comparisons
from scripts import ROOT

FOLDER = ROOT / "benchmarks" / "peft_comparison"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the scripts of the repository")

OFT = Path("experiments/isotune-oft/llama-3.2-3B-block32")
RUN = """
import argparse, json, os
import torch
from transformers import AutoModelForCausalLM
from utils import FILE_NAME_TRAIN_PARAMS, get_train_config, log_results, validate_experiment_path
from data import get_batches
from peft import PeftConfig, get_peft_model
from peft.utils import CONFIG_NAME

def main(path, name):
    settings = get_train_config(os.path.join(path, FILE_NAME_TRAIN_PARAMS))
    config = PeftConfig.from_pretrained(path)
    assert os.path.exists(os.path.join(path, CONFIG_NAME))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(settings["model_id"]), config)
    optimizer = torch.optim.AdamW(model.parameters(), **settings["optimizer_kwargs"])
    losses = []
    for ids in get_batches(settings["max_steps"]):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        losses.append(loss.item())
    log_results(name, settings, config, losses, model.get_nb_trainable_parameters()[0])

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.add_argument("path_experiment", type=str)
    args = parser.parse_args()
    assert args.verbose
    main(args.path_experiment, validate_experiment_path(args.path_experiment))
"""
UTILS = """
import json, os
HERE = os.path.dirname(__file__)
FILE_NAME_TRAIN_PARAMS = "training_params.json"

def get_train_config(path):
    found = json.load(open(os.path.join(HERE, "default_training_params.json")))
    return {**found, **(json.load(open(path)) if os.path.exists(path) else {})}

def validate_experiment_path(path):
    first, *names = path.rstrip("/").split("/")
    assert first == "experiments" and len(names) == 2, path
    return "/".join(names)

def log_results(name, settings, config, losses, parameters):
    metrics = [{"step": 2, "test accuracy": 0.25, "forgetting": losses[-1] - losses[0]}]
    found = {
        "run_info": {
            "experiment_name": name, "created_at": "2026-11-27", "train_config": settings, "error_msg": "",
            "peft_config": {key: list(v) if isinstance(v, set) else v for key, v in config.to_dict().items()},
        },
        "train_info": {"status": "success", "num_trainable_params": parameters, "metrics": metrics},
        "meta_info": {},
    }
    with open(os.path.join(HERE, "temporary_results", name.replace("/", "--") + "--now.json"), "w") as file:
        json.dump(found, file)
"""
DATA = """
import torch

def get_batches(number):
    return [torch.arange(20).reshape(2, 10) + step for step in range(number)]
"""


def script(name: str) -> ModuleType:
    """One of the scripts, imported."""
    spec = importlib.util.spec_from_file_location(f"peft_comparison_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where its dataclasses look it up
    spec.loader.exec_module(module)
    return module


experiments, runner = (script(name) for name in ("experiments", "run")) if FOLDER.is_dir() else (None, None)


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with the stand-in, isotune's experiments, and a tiny model."""
    checkout = tmp_path_factory.mktemp("checkout")
    folder = checkout / "method_comparison" / "MetaMathQA"
    folder.mkdir(parents=True)
    for name, text in (("run", RUN), ("utils", UTILS), ("data", DATA)):
        (folder / f"{name}.py").write_text(text)
    tiny_llama().save_pretrained(checkout / "model")
    settings: dict[str, Any] = {"model_id": str(checkout / "model"), "seed": 0, "max_steps": 2, "batch_size": 2}
    settings["optimizer_kwargs"] = {"lr": 1e-4, "weight_decay": 0.1}
    (folder / "default_training_params.json").write_text(json.dumps(settings))
    experiments.write(folder, "MetaMathQA")
    return folder


def test_experiments_are_what_pefts_own_are_where_they_have_its_settings(benchmark: Path) -> None:
    """The published numbers of parameters, counted on a layer of Llama-3.2-3B's shape; all fit it."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=3072, intermediate_size=8192, num_hidden_layers=1, num_attention_heads=24,
        num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
    counted = {}
    for path in sorted(benchmark.glob("experiments/*/*")):
        with torch.device("meta"):
            model = get_peft_model(LlamaForCausalLM(config), PeftConfig.from_pretrained(str(path)))
        counted[f"{path.parent.name}/{path.name}"] = 28 * model.get_nb_trainable_parameters()[0]
    assert len(counted) == len(experiments.METAMATH)
    published = json.loads((ROOT / "benchmarks/results/peft/metamathqa.json").read_text())["results"]
    sizes = {one["run_info"]["experiment_name"]: one["train_info"]["num_trainable_params"] for one in published}
    for ours, theirs in (
        ("psoft/llama-3.2-3B-rank256-lr1e-4", "psoft/llama-3.2-3B-default"),
        ("psoft/llama-3.2-3B-rank256-fast-lr1e-4", "psoft/llama-3.2-3B-fast"),
        ("oft/llama-3.2-3B-rank32-lr1e-4", "oft/llama-3.2-3B-rank32"),
    ):
        assert counted[f"isotune-{ours}"] == sizes[theirs], ours
    # PEFT's BOFT keeps all 16 numbers of a block of 4, of which its skew part, 6 numbers, makes the rotation.
    blocks = 28 * 2 * 3072 // 4
    assert counted["isotune-boft/llama-3.2-3B-block4-lr1e-4"] + 10 * blocks == sizes["boft/llama-3.2-3B-default"]


def test_rates_are_the_usual_ones_the_authors_or_pefts(benchmark: Path) -> None:
    def settings(name: str) -> Any:
        path = benchmark / "experiments" / name / "training_params.json"
        return json.loads(path.read_text())["optimizer_kwargs"] if path.exists() else None

    usual = entry("psoft").usual_learning_rate
    assert settings("isotune-psoft/llama-3.2-3B-rank46") == {"lr": usual, "weight_decay": 0.0}
    assert settings("isotune-psoft/llama-3.2-3B-rank352")["lr"] == 2e-4
    assert settings("isotune-psoft/llama-3.2-3B-rank256-lr1e-4") is None
    assert all(one.lr in (experiments.USUAL, experiments.PEFT) or one.source for one in experiments.METAMATH)


def test_image_experiments_are_read_as_peft_reads_them(tmp_path: Path) -> None:
    lines = experiments.write(tmp_path, "image-gen")
    found = [PeftConfig.from_pretrained(str(path)) for path in tmp_path.glob("experiments/*/*")]
    assert len(found) == len(lines) == len(experiments.IMAGES)
    assert all("to_qkv_mlp_proj" in config.target_modules for config in found)


def test_the_unchanged_run_of_a_checkout_trains_our_method_and_the_report_reads_it(
    benchmark: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("path", "argv"):
        monkeypatch.setattr(sys, name, [*getattr(sys, name)])
    try:
        written = runner.run(benchmark, OFT, ["-v"])
    finally:  # what the scripts of a checkout are called
        for name in ("utils", "data"):
            sys.modules.pop(name, None)
    assert written is not None
    assert written.parent == benchmark / "temporary_results"
    assert re.match(rf"isotune \S+, PEFT \S+: {OFT}$", capsys.readouterr().out.splitlines()[0])
    (found,) = comparisons([written.parent])
    assert [(v.title, v.mean, v.lr) for v in found.variants] == [("OFT llama-3.2-3B-block32", 0.25, 8e-4)]
    assert found.variants[0].average("trainable_parameters") == 4 * 2 * 496


def test_a_training_that_came_to_nothing_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PEFT's run.py ends with 0 then."""
    written = tmp_path / "oft--tiny.json"
    content = {"run_info": {"error_msg": "out of memory"}, "train_info": {"status": "canceled"}}
    written.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="the training came to nothing: out of memory"):
        runner.conclude(written)
    content["train_info"]["status"] = "success"
    written.write_text(json.dumps(content))
    runner.conclude(written)
    assert capsys.readouterr().out.count(f"isotune report {tmp_path} shows it") == 2
    with pytest.raises(SystemExit, match="wrote no result"):
        runner.conclude(None)


def test_what_is_missing_is_said_before_anything_is_trained(
    benchmark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(said: str, check: Any, *arguments: Any) -> None:
        with pytest.raises(runner.Missing, match=said):
            check(*arguments)

    copy = tmp_path / "MetaMathQA"
    refused(r"no run\.py, utils\.py, data\.py.*clone https://github.com/huggingface/peft", runner.check_benchmark, copy)
    copy.mkdir()
    for name in (*runner.SCRIPTS, runner.DEFAULTS):
        (copy / name).write_text((benchmark / name).read_text())
    runner.check_benchmark(copy)
    (copy / "utils.py").write_text(UTILS.replace("def log_results", "def log_result"))
    refused(r"imports log_results from utils\.py, which has no such name", runner.check_benchmark, copy)
    (copy / "run.py").write_text(RUN.replace("path_experiment", "experiment"))
    refused("takes no folder of an experiment.*another version", runner.check_benchmark, copy)
    (copy / "run.py").write_text(RUN.replace("PeftConfig, get_peft_model", "PeftConfig, FutureConfig"))
    refused(r"imports FutureConfig from peft, which PEFT \S+ does not have", runner.check_library, copy, None)
    refused("was imported from .* before", runner.check_library, benchmark, tmp_path)
    (copy / "run.py").write_text(RUN + "\nget_peft_branch = None\n")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")  # without git, as outside of a repository
        refused("asks git for the branch .*clone PEFT", runner.check_library, copy, None)

    refused(r"there is no experiment .*experiments\.py", runner.check_experiment, benchmark, Path("experiments/a/b"))
    wrong = tmp_path / "a" / "b"
    wrong.mkdir(parents=True)
    refused("is not named experiments/METHOD/NAME", runner.check_experiment, benchmark, wrong)
    root, found = runner.check_experiment(benchmark, OFT)
    assert (root, found) == (benchmark, OFT)
    damaged = tmp_path / "experiments" / "a" / "b"
    damaged.mkdir(parents=True)
    (damaged / "adapter_config.json").write_text(json.dumps({"peft_type": "ISOTUNE_HRA", "r": 3}))
    refused(r"adapter_config\.json cannot be read: r=3 is not allowed", runner.check_experiment, benchmark, damaged)

    runner.check_model(benchmark, damaged)
    (damaged / "training_params.json").write_text(json.dumps({"model_id": "meta-llama/Llama-3.2-3B"}))
    refused(
        "the model 'meta-llama/Llama-3.2-3B' cannot be loaded: .*hf auth login", runner.check_model, benchmark, damaged
    )
    (damaged / "training_params.json").write_text("[]")
    refused(r"training_params\.json: it holds \[\], and should hold an object", runner.check_model, benchmark, damaged)
