"""The model card of a saved adapter: the README.md in its folder, which the Hub shows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from yaml import YAMLError

from isotune.json_files import json_object
from isotune.package_models import package_of
from isotune.whole_files import written_whole

REQUIRES = "pip install isotune, and `import isotune` before the adapter is loaded"
"""What to do where PEFT alone fails with KeyError: 'ISOTUNE_…'."""

CARD = "README.md"
WEIGHTS = "adapter_model.safetensors"
_LIST = "# Adapters in folders"
_COUNTERS = ("running_mean", "running_var", "num_batches_tracked")
_TEMPLATE = "[More Information Needed]"
_BEGIN, _END = "<!-- isotune: this part is written anew at every save -->", "<!-- /isotune -->"
_BLOCK = re.compile(re.escape(_BEGIN) + ".*?" + re.escape(_END) + "\n?", re.DOTALL)
_FRAMEWORK = re.compile(r"\n*### Framework versions\n+(- PEFT [^\n]*(\n|\Z))+(?!- )")
"""The section of PEFT's card that lists only PEFT's own version."""
_KIND = re.compile(r"\bISOTUNE_(\w+)")
_HEADER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_HUB_NAME = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?")
_TASKS = {
    "CAUSAL_LM": ("text-generation", "AutoModelForCausalLM"),
    "SEQ_2_SEQ_LM": ("text2text-generation", "AutoModelForSeq2SeqLM"),
    "SEQ_CLS": ("text-classification", "AutoModelForSequenceClassification"),
    "TOKEN_CLS": ("token-classification", "AutoModelForTokenClassification"),
    "QUESTION_ANS": ("question-answering", "AutoModelForQuestionAnswering"),
    "FEATURE_EXTRACTION": ("feature-extraction", "AutoModel"),
}
"""PEFT's task type -> the Hub's name of the task, and transformers' class for it."""


def write_card(folder: Path, config: Any, figures: Mapping[str, float] | None = None, tags: Iterable[str] = ()) -> None:
    """Describe an adapter in the README.md of its folder, leaving the user's own text as it is.

    PEFT's template of empty headings is replaced, and so is the text of an earlier call, except for its figures, which
    stay until new ones are given.

    Args:
        folder: the folder with adapter_model.safetensors.
        config: the adapter's configuration, an IsotuneConfig.
        figures: measured results, such as {"test accuracy": 0.81}.
        tags: tags to add to those of the card.
    """
    table = _table(figures) if figures else None
    _write(folder, lambda text: _block(folder, config, table or _kept_table(text)), config, tags=tags)


def write_cards(folder: Path, configs: Mapping[str, Any], tags: Iterable[str] = ()) -> None:
    """Add isotune's part to the card that PEFT, transformers or TRL wrote for a saved model.

    TRL's trainers rewrite their card between saving and uploading. A trainer that is to keep isotune's part calls this
    in its `create_model_card`, after TRL's, with `self.args.output_dir` and `self.model.peft_config`.

    Args:
        folder: the model's folder, which holds the adapter called "default" and one folder for each other adapter.
        configs: configurations of all adapters by name, `model.peft_config`; if the one called "default" belongs to
            another library, nothing is written.
        tags: tags to add to those of the card.
    """
    own = {name: config for name, config in configs.items() if hasattr(config, "isotune_format")}
    if "default" in own and (folder / WEIGHTS).is_file():
        write_card(folder, own["default"], tags=tags)
    elif own and ("default" in own or "default" not in configs):
        _write(folder, lambda _: _list(folder), *own.values(), tags=tags)


def tags_of(folder: Path) -> set[str]:
    """The tags of a folder's card, without those that name its base model and method."""
    card = _read(folder / CARD)
    stale = {kind.lower().replace("_", "") for kind in _KIND.findall(card.text)}
    return {tag for tag in card.data.get("tags") or () if not tag.startswith("base_model:")} - stale


def update_list(folder: Path) -> None:
    """Update the list of adapters in a folder's card, if `write_cards` has put one there."""
    path = folder / CARD
    if path.is_file() and _LIST in (text := path.read_text(encoding="utf-8")):
        with written_whole(path) as partial:
            partial.write_text(_BLOCK.sub(lambda _: _list(folder), text), encoding="utf-8")


def auto_class(task: Any) -> str:
    """The name of transformers' class for a PEFT task type; AutoModel for any other and for None."""
    return _TASKS.get(_name_of(task), ("", "AutoModel"))[1]


def _name_of(task: Any) -> str:
    return str(getattr(task, "value", task))


def _read(path: Path) -> Any:
    """Read a card; a missing file gives an empty one."""
    from huggingface_hub import ModelCard

    card = ModelCard("---\nlibrary_name: peft\n---\n")  # without a header, huggingface_hub would warn
    if path.is_file():
        try:
            card = ModelCard.load(path)
        except (YAMLError, ValueError):  # PEFT writes a base given as a Path as a Python object
            card.text = _HEADER.sub("", path.read_text(encoding="utf-8"))
    return card


def _write(folder: Path, block_of: Callable[[str], str], *configs: Any, tags: Iterable[str] = ()) -> None:
    path = folder / CARD
    more, card = {*tags, *tags_of(folder)}, _read(path)
    text = "" if _TEMPLATE in card.text else card.text
    block = block_of(text)
    if _BLOCK.search(text):
        text = _BLOCK.sub(lambda _: block, text)
    else:
        text = f"{text.strip()}\n\n{block}" if text.strip() else block
    card.text = _FRAMEWORK.sub("\n", text).strip() + "\n"
    data = card.data
    data["library_name"] = "peft"
    bases = {_hub_name(config) for config in configs}
    base = bases.pop() if len(bases) == 1 else None
    more |= {"isotune", *(type(config).__name__.removesuffix("Config").lower() for config in configs)}
    data["tags"] = sorted(more | ({f"base_model:adapter:{base}"} if base else set()))
    data["base_model"] = base
    tasks = {_TASKS.get(_name_of(config.task_type)) for config in configs}
    task = tasks.pop() if len(tasks) == 1 else None
    if task and not data.get("pipeline_tag"):
        data["pipeline_tag"] = task[0]
    with written_whole(path) as partial:
        card.save(partial)


def _block(folder: Path, config: Any, table: str) -> str:
    name = type(config).title or type(config).__name__.removesuffix("Config").upper()
    sizes = ", ".join(f"{option} = {getattr(config, option)}" for option in type(config).size_names)
    base, given = _hub_name(config), str(config.base_model_name_or_path or "")
    package = given if given.startswith("package:") else package_of(given)
    local = package or Path(given).name
    shown = (
        f"[{base}](https://huggingface.co/{base})"
        if base
        else f"`{package}`, an installed package"
        if package
        else f"`{local}`, a local folder"
        if local
        else "not named"
    )
    loader = auto_class(config.task_type)
    numbers, layers = _counted(folder, config)
    source = base or local or "BASE_MODEL"
    # A new head needs one of the saved size and the class that was trained, and a package is isotune's to find.
    if loader == "AutoModelForSequenceClassification" or config.modules_to_save or package:
        imports = "import isotune, peft\nfrom isotune.files.adapter import named_base"
        load = f'named_base("THIS_FOLDER", "{source}")'
    else:
        imports, load = "import isotune, peft, transformers", f'transformers.{loader}.from_pretrained("{source}")'
    return f"""{_BEGIN}
# {name} adapter{f" of {base or local}" if base or local else ""}

| | |
|---|---|
| method | {name} ({config.peft_type.value}), by [isotune](https://pypi.org/project/isotune/) |
| size | {sizes or "set by the width of each layer"}; {layers} adapted layers |
| trainable parameters | {numbers:,} |
| base model | {shown} |
{table}
Loading it needs isotune: {REQUIRES}. Without it PEFT says `KeyError: '{config.peft_type.value}'`.

```python
{imports}

base = {load}
model = peft.PeftModel.from_pretrained(base, "THIS_FOLDER")
```

`isotune export THIS_FOLDER --to lora` or `--to merged` writes it in a form that needs no isotune.
{_END}
"""


def _table(figures: Mapping[str, float]) -> str:
    return "".join(f"| {name.replace('|', '/')} | {value:.4g} |\n" for name, value in figures.items())


def _kept_table(text: str) -> str:
    found = re.search(r"\| base model \|[^\n]*\n((?:\|[^\n]*\n)*)", text)
    return found.group(1) if found else ""


def _hub_name(config: Any) -> str | None:
    """The base model's name on the Hub; None for a path on the machine it was trained on."""
    name = str(config.base_model_name_or_path or "")
    return name if _HUB_NAME.fullmatch(name) and not Path(name).exists() else None


def _list(folder: Path) -> str:
    rows = ""
    for path in sorted(folder.glob("*/adapter_config.json")):
        kind = json_object(path).get("peft_type")
        rows += f"| [{path.parent.name}]({path.parent.name}/{CARD}) | {kind} |\n"
    return f"""{_BEGIN}
{_LIST}

| folder | method |
|---|---|
{rows}
Loading isotune's adapters needs isotune: {REQUIRES}. Without it PEFT says `KeyError: 'ISOTUNE_…'`.
{_END}
"""


def _counted(folder: Path, config: Any) -> tuple[int, int]:
    """The number of trainable parameters in the file and of the layers that it adapts.

    A file also holds tensors that are not trained: bases and pins, UORA's counts, counters of saved modules, the
    embeddings of an extended vocabulary.
    """
    layers, count = set(), 0
    if not (folder / WEIGHTS).is_file():
        return 0, 0
    saved = {f".{name}." for name in config.modules_to_save or ()}
    with safe_open(folder / WEIGHTS, framework="pt") as opened:
        for key in opened.keys():  # noqa: SIM118 (not a dictionary)
            layer, own, rest = key.partition(".isotune_")
            layers |= {layer} if own else set()
            of_operator = rest.startswith("operator.") and not rest.startswith("operator.reinit")
            trained = of_operator if own else key.endswith(".bias") and config.bias != "none"
            whole = any(name in f".{key}" for name in saved) and not key.endswith(_COUNTERS)
            count += math.prod(opened.get_slice(key).get_shape()) if trained or whole else 0
    return count, len(layers)
