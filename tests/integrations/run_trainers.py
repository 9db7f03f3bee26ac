"""Real trainings by the command lines of other trainers, and what comes of their adapters; a check a line.

    python tests/integrations/run_trainers.py axolotl|ms-swift|llamafactory [FOLDER]

Runs on a CPU, without a network, in an environment made from requirements/trainers-TOOL.txt. The files are written to
FOLDER, which stays, or to a temporary one. Ends with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tiny
import torch
import yaml

from isotune.methods import METHODS  # PEFT then knows isotune's adapters

ROOT = Path(__file__).parents[2]
STEPS = 6
EXACT = 1e-4
"""The largest difference of logits, which are up to about 4, that float32 explains."""
failures: list[str] = []


def check(name: str, good: bool, found: str) -> None:
    """Print one line, and remember a failure."""
    print(f"{'ok    ' if good else 'FAILED'} {name}: {found}", flush=True)
    if not good:
        failures.append(name)


def command(
    name: str, *words: str | Path, log: Path, answers: str = "", terminal: bool = False, fails: bool = False
) -> str:
    """What a command printed; it must end with 0, or with something else where it `fails`.

    `answers` are what it reads: from a pipe, or from a terminal where it asks for one.
    """
    program = [sys.executable, "-m", "isotune"] if name == "isotune" else [str(Path(sys.executable).parent / name)]
    path = os.pathsep.join([str(ROOT / "src"), str(log.parent), os.environ.get("PYTHONPATH", "")])
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "PYTHONPATH": path}
    with log.open("a", encoding="utf-8") as file, contextlib.ExitStack() as ends:
        given: dict[str, Any] = {"input": answers}
        if terminal:
            keyboard, given = (pair := os.openpty())[0], {"stdin": pair[1]}
            for end in pair:
                ends.callback(os.close, end)
            os.write(keyboard, answers.encode())
        done = subprocess.run(
            [*program, *map(str, words)],
            **given,
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            env={**os.environ, **offline},
            cwd=log.parent,
        )
    printed = log.read_text(encoding="utf-8")
    if (done.returncode == 0) == fails:
        raise RuntimeError(f"{name} {words[0]} ended with {done.returncode}:\n{printed[-3000:]}")
    return printed


@torch.no_grad()
def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    """The model's answer to forty tokens, with an adapter of PEFT's or isotune's."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    return model.eval()(torch.arange(6, 46).reshape(2, 20)).logits


def check_trained(name: str, folder: Path, base: Path, start: float | None = None) -> torch.Tensor:
    """That all steps were done, lowered the loss, from `start` if known, and moved the model; its adapted logits."""
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    losses = [float(entry["loss"]) for entry in state["log_history"] if "loss" in entry]
    good = len(losses) == STEPS and losses[-1] < losses[0] - 0.5
    good &= start is None or math.isclose(losses[0], start, rel_tol=1e-3)
    check(f"{name} trained", good, f"{len(losses)} steps, loss {losses[0]:.4g} to {losses[-1]:.4g}")
    adapted = logits(base, folder)
    moved = float((adapted - logits(base)).abs().max())
    check(f"{name} read on its base", moved > 0.05, f"adapted - base {moved:.2g} of {float(adapted.abs().max()):.2g}")
    return adapted


def without(package: str, folder: Path) -> None:
    """Have an empty module stand for a package that is imported and not used, if it is not installed."""
    if importlib.util.find_spec(package) is None:
        (folder / f"{package}.py").touch()


def check_asked(name: str, adapted: list[str], merged: list[str], base: list[str]) -> None:
    """That the adapted model gives the answers of the merged one, and not those of the base."""
    same = sum(a == b for a, b in zip(adapted, merged, strict=True))
    changed = sum(a != b for a, b in zip(adapted, base, strict=True))
    good = same == len(adapted) > 0 and changed > 0
    check(name, good, f"{same} of {len(adapted)} answers as the merged model's, {changed} not as the base's")


def check_same(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """That two answers are the same function's."""
    difference = float((found - expected).abs().max())
    check(name, difference < EXACT, f"differs by {difference:.1e}")


def axolotl(folder: Path) -> None:
    """PSOFT trained, merged both ways and asked; PSOFT by DPO; OFT trained on a base in NF4."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    base, nf4 = folder / "base", folder / "nf4"

    def write(example: str, base: Path, out: Path, more: Mapping[str, Any] | None = None, **block: Any) -> Path:
        given = yaml.safe_load((ROOT / "examples/axolotl" / example).read_text(encoding="utf-8"))
        given["isotune"].update(block)
        given["datasets"] = [{"path": str(folder / "data.json"), "ds_type": "json", "type": "alpaca"}]
        given.update(
            base_model=str(base),
            dataset_prepared_path=str(out / "prepared"),
            output_dir=str(out),
            seed=0,
            sequence_len=500,
            gradient_accumulation_steps=1,
            max_steps=STEPS,
            save_steps=STEPS,
            logging_steps=1,
            learning_rate=0.01,
            lr_scheduler="constant",
            bf16=False,
            tf32=False,
            **(more or {}),
        )
        path = folder / f"{out.name}.yml"
        path.write_text(yaml.safe_dump(given), encoding="utf-8")
        return path

    out, log = folder / "psoft", folder / "psoft.log"
    file = write("psoft.yml", base, out, r=8)
    command("axolotl", "train", file, "--launcher", "python", log=log)
    adapted = check_trained("PSOFT", out / f"checkpoint-{STEPS}", base)
    command("axolotl", "merge-lora", file, log=log)
    check_same("PSOFT merged by axolotl merge-lora", logits(out / "merged"), adapted)
    command("isotune", "export", out, "--to", "merged", "-o", folder / "psoft-merged", log=log)
    check_same("PSOFT merged by isotune export", logits(folder / "psoft-merged"), adapted)

    without("gradio", folder)  # imported for every inference, used for a page in a browser alone
    talks = []
    alone = {"adapter": None, "isotune": None, "plugins": None}
    which = {"adapted": (base, {"lora_model_dir": str(out)}), "merged": (out / "merged", alone), "bare": (base, alone)}
    for name, (model, more) in which.items():
        file, talk = write("psoft.yml", model, folder / f"chat-{name}", more), folder / f"chat-{name}.jsonl"
        asked = [f"{row['instruction']}\n/save {talk}\n/new\n" for row in tiny.rows()[:4]]
        answers = "".join(["/set temperature 0\n", "/set max_new_tokens 8\n", *asked, "/quit\n"])
        words = ("inference", file, "--launcher", "python", "--chat")
        command("axolotl", *words, log=folder / f"chat-{name}.log", answers=answers, terminal=True)
        messages = [json.loads(line)["messages"] for line in talk.read_text(encoding="utf-8").splitlines()]
        talks.append([own[-1]["content"][0]["text"] for own in messages])
    check_asked("PSOFT asked by axolotl inference", *talks)

    out, log = folder / "dpo", folder / "dpo.log"
    pairs = {"path": str(folder / "pairs.json"), "ds_type": "json", "split": "train", "type": "chatml"}
    file = write("psoft.yml", base, out, {"rl": "dpo", "datasets": [pairs]}, r=8)
    command("axolotl", "train", file, "--launcher", "python", log=log)
    adapted = check_trained("PSOFT by DPO", out / f"checkpoint-{STEPS}", base, start=math.log(2))
    page = (out / "README.md").read_text(encoding="utf-8")
    check("the card after DPO", "[TRL]" in page and "ISOTUNE_PSOFT" in page, "TRL's and isotune's part")
    command("isotune", "export", out, "--to", "merged", "-o", folder / "dpo-merged", log=log)
    check_same("PSOFT by DPO merged by isotune export", logits(folder / "dpo-merged"), adapted)

    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(base, quantization_config=four_bits, device_map="cpu").save_pretrained(nf4)
    AutoTokenizer.from_pretrained(base).save_pretrained(nf4)
    out, log = folder / "oft", folder / "oft.log"
    file = write("oft-nf4.yml", nf4, out, oft_block_size=8)
    command("axolotl", "train", file, "--launcher", "python", log=log)
    checkpoint = out / f"checkpoint-{STEPS}"
    check_trained("OFT on NF4", checkpoint, nf4)
    whole = folder / "oft-merged"
    command("isotune", "export", checkpoint, "--base", base, "--to", "merged", "-o", whole, log=log)
    check_same("OFT merged into the base as it was before NF4", logits(whole), logits(base, checkpoint))


def ms_swift(folder: Path) -> None:
    """Every method trained; PSOFT merged and asked by ms-swift itself."""
    base = folder / "base"
    plugin = ROOT / "src/isotune/integrations/ms_swift.py"
    sizes = {"oft": {"oft_block_size": 8}, "boft": {"boft_block_size": 4}, "goft": {}, "qgoft": {}}
    for method in METHODS:
        given = sizes.get(method, {"r": 8})
        out, log = folder / method, folder / f"{method}.log"
        words = {
            "model": base,
            "model_type": "llama",
            "template": "chatml",
            "external_plugins": plugin,
            "tuner_type": f"isotune_{method}",
            "model_kwargs": json.dumps({"isotune": given}),
            "dataset": folder / "chat.jsonl",
            "max_steps": STEPS,
            "save_steps": STEPS,
            "logging_steps": 1,
            "learning_rate": 0.01,
            "torch_dtype": "float32",
            "output_dir": out,
            "split_dataset_ratio": 0,
            "add_version": "false",
            "per_device_train_batch_size": 2,
        }
        command("swift", "sft", *(word for name, value in words.items() for word in (f"--{name}", str(value))), log=log)
        adapted = check_trained(method.upper(), out / f"checkpoint-{STEPS}", base)
        if method == "psoft":
            expected, checkpoint = adapted, out / f"checkpoint-{STEPS}"
    merged, log = folder / "merged", folder / "merged.log"
    command("swift", "export", "--adapters", checkpoint, "--merge_lora", "true", "--output_dir", merged, log=log)
    check_same("PSOFT merged by swift export", logits(merged), expected)
    said = []
    which = {"adapted": ("--adapters", checkpoint), "merged": ("--model", merged), "base": ("--model", base)}
    for name, words_of_model in which.items():
        result = folder / f"{name}.jsonl"
        kind = () if name == "adapted" else ("--model_type", "llama", "--template", "chatml")
        asked = ("--val_dataset", f"{folder / 'chat.jsonl'}#4", "--max_new_tokens", "8", "--temperature", "0")
        command("swift", "infer", *words_of_model, *kind, *asked, "--result_path", result, log=folder / f"{name}.log")
        said.append([json.loads(line)["response"] for line in result.read_text(encoding="utf-8").splitlines()])
    check_asked("PSOFT asked by swift infer", *said)


def llamafactory(folder: Path) -> None:
    """PEFT's OFT trained, imported and merged; what LLaMA-Factory itself refuses of it."""
    without("torchaudio", folder)  # imported for every model, used for sound alone
    base, out, log = folder / "base", folder / "oft", folder / "oft.log"
    (folder / "dataset_info.json").write_text(json.dumps({"sums": {"file_name": "data.json"}}), encoding="utf-8")
    model = {"model_name_or_path": str(base), "template": "alpaca", "finetuning_type": "oft"}
    training = {
        "stage": "sft",
        "do_train": True,
        "oft_block_size": 8,
        "lora_target": "all",
        "dataset": "sums",
        "dataset_dir": str(folder),
        "cutoff_len": 128,
        "output_dir": str(out),
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_steps": STEPS,
        "report_to": "none",
        "use_cpu": True,
    }

    def write(name: str, **given: Any) -> Path:
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**model, **given}), encoding="utf-8")
        return path

    command("llamafactory-cli", "train", write("train", **training), log=log)
    expected = check_trained("PEFT's OFT", out, base)
    imported, merged = folder / "imported", folder / "merged"
    command("isotune", "import", out, "--base", base, "-o", imported, log=log)
    check_same("OFT imported by isotune import", logits(base, imported), expected)
    command("isotune", "export", imported, "--to", "merged", "-o", merged, log=log)
    check_same("OFT merged by isotune export", logits(merged), expected)
    adapter = {"adapter_name_or_path": str(out)}
    own = {
        "export": {"export_dir": str(folder / "own"), "export_device": "cpu"},
        "chat": {"infer_backend": "huggingface"},
    }
    for verb, given in own.items():
        file = write(verb, **adapter, **given)
        said = command("llamafactory-cli", verb, file, log=folder / f"{verb}.log", answers="exit\n", fails=True)
        last = said.strip().splitlines()[-1]
        check(f"llamafactory-cli {verb} refuses it", "only valid for the LoRA method" in last, last)


TOOLS: dict[str, Callable[[Path], None]] = {"axolotl": axolotl, "ms-swift": ms_swift, "llamafactory": llamafactory}


def main() -> int:
    """Run one tool's checks; 0 if all hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("folder", type=Path, nargs="?")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.folder or Path(temporary)).resolve()
        tiny.write(folder)
        TOOLS[given.tool](folder)
    print(f"{given.tool}: {len(failures)} failed")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
