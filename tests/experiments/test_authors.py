"""`variant=authors`: what reaches model, optimiser and generation is what the PSOFT authors' scripts send there."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from helpers import WORDS, tiny_llama
from isotune.experiments import loop, tasks
from isotune.experiments.loading import load
from isotune.experiments.tables import DataError
from isotune.experiments.tasks import causal
from isotune.experiments.tasks.commonsense import first_choice, first_named
from trainings import run

IGNORED = -100
OPERATOR = "isotune_operator"
MEASURED = 1
"""A pass after training, for the bytes that are kept. With checkpointing a batch would have two."""


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama and a tokeniser of bytes that joins ":" and "T", begins with <s> and, as Llama 3's, has no padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bytes")
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {word: len(vocabulary) + i for i, word in enumerate([":T", "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(":", "T")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    tiny_llama(layers=1, vocab_size=len(vocabulary), max_position_embeddings=1024).save_pretrained(folder)
    return folder


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What goes into the model, the trainer and generation while something is trained."""
    from transformers import GenerationMixin, LlamaModel

    seen = SimpleNamespace(batches=[], passes=[], generations=[], answering=[])

    def watch(owner: type, name: str, note: Any) -> None:
        original = getattr(owner, name)

        def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
            note(self, *args, **kwargs)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    def batch(trainer: Any, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> None:
        if model.training:
            seen.batches.append({name: value.clone() for name, value in inputs.items()})

    def forward(model: Any, *_: Any, **__: Any) -> None:
        weights = {parameter.dtype for name, parameter in model.named_parameters() if OPERATOR not in name}
        found = weights, torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
        (seen.passes if model.training else seen.answering).append(found)

    def optimizer(trainer: Any, *_: Any) -> None:
        seen.trainer = trainer

    def generate(model: Any, *_: Any, **kwargs: Any) -> None:
        seen.generations.append({**kwargs, "model": type(model).__name__})

    watch(causal.SftLoop, "compute_loss", batch)
    watch(LlamaModel, "forward", forward)
    watch(loop.Loop, "create_optimizer", optimizer)
    watch(GenerationMixin, "generate", generate)
    return seen


def trained(name: str, model: Path, data: Path, output: Path, *overrides: str) -> dict[str, Any]:
    given = [f"model={model}", f"data.path={data}", f"output={output}", "method.r=4", "train.max_steps=1"]
    # The untrained model would be asked as well.
    return run(load(name, ["variant=authors", "score_untrained=false", *given, *overrides]))


def rows_of(batches: Sequence[dict[str, Any]], name: str) -> list[list[int]]:
    return [row for batch in batches for row in batch[name].tolist()]


def adapted_layers(model: Any) -> set[str]:
    return {name.split(".")[-4] for name, _ in model.named_parameters() if OPERATOR in name}


# What the authors' two scripts make of a row; the texts are those of Alpaca and of LLM-Adapters.
GIVEN = "Below is an instruction that describes a task"
PAIRED = f"{GIVEN}, paired with an input that provides further context."
WANTED = "Write a response that appropriately completes the request."


def maths_prompt(query: str) -> str:
    first, *rest = query.split("\n")
    if "\n".join(rest):
        return f"{PAIRED} {WANTED}\n\n### Instruction:\n{first}\n\n### Input:\n" + "\n".join(rest) + "\n\n### Response:"
    return f"{GIVEN}. {WANTED}\n\n### Instruction:\n{first}\n\n### Response:"


def commonsense_prompt(instruction: str, blanks_after: int) -> str:
    lines = [f"### Instruction:\n{' ' * 16}{instruction}\n\n", "### Response:\n", ""]
    return f"{GIVEN}. {WANTED}{' ' * blanks_after}\n\n" + "".join(" " * 16 + line for line in lines)


@pytest.mark.slow
def test_maths(llama: Path, seen: SimpleNamespace, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    queries = ["w1?", "w2\nw3\nw4?", "w5\n", "w6 {input}\nw7", *(f"w{n} w8" for n in range(12))]
    rows = [{"query": query, "response": f"Then w{n}. The answer is: {n}"} for n, query in enumerate(queries)]
    rows[4]["response"] = "w9 " * 200  # too long
    (tmp_path / "MetaMathQA-40K.json").write_text(json.dumps(rows))
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text(json.dumps({"question": "w1\nw2?", "answer": "#### 3"}))
    trained("math/gsm8k", llama, tmp_path, tmp_path / "run", "max_new_tokens=2")

    tokenizer = AutoTokenizer.from_pretrained(llama)
    expected = []
    for row in rows:
        prompt = maths_prompt(row["query"])
        ids = tokenizer(f"{prompt}{row['response']}</s>")["input_ids"][:512]
        alone = len(tokenizer(prompt)["input_ids"])
        expected.append((ids, [IGNORED] * alone + ids[alone:]))
    assert any(tokenizer.convert_tokens_to_ids(":T") in ids for ids, _ in expected)  # the prompt's last, not learnt
    masks = rows_of(seen.batches, "attention_mask")
    cut = [sum(mask) for mask in masks]
    assert all(mask == [1] * count + [0] * (len(mask) - count) for mask, count in zip(masks, cut, strict=True))
    ids, labels = (rows_of(seen.batches, name) for name in ("input_ids", "labels"))
    found = [(a[:n], b[:n]) for a, b, n in zip(ids, labels, cut, strict=True)]
    assert sorted(found) == sorted(expected)
    assert all(label == [IGNORED] * len(label) for label in (b[n:] for b, n in zip(labels, cut, strict=True)))

    assert {len(batch["input_ids"]) for batch in seen.batches} == {4}
    assert seen.trainer.args.gradient_accumulation_steps == 16
    assert all(one == ({torch.float32}, torch.bfloat16) for one in seen.passes)
    assert len(seen.passes) == len(seen.batches) + MEASURED == 5
    assert not any(autocast for _, autocast in seen.answering)
    config = seen.trainer.model.peft_config["default"]
    assert (config.use_cayley_neumann, config.num_cayley_neumann_terms) == (True, 5)
    assert adapted_layers(seen.trainer.model) == {"q_proj", "v_proj"}
    assert {p.dtype for p in seen.trainer.model.parameters()} == {torch.float32}
    (asked,) = seen.generations
    assert tokenizer.decode(asked["input_ids"][0]) == f"<s>{maths_prompt(f'w1{chr(10)}w2?')}"
    assert load("math/gsm8k", ["variant=authors"]).method.options["r"] == 352


@pytest.fixture(scope="session")
def commonsense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """126 questions to learn and five to judge."""
    folder, chance = tmp_path_factory.mktemp("commonsense"), random.Random(0)

    def question(number: int) -> dict[str, str]:
        answer = chance.choice(["solution1", "solution2"])
        said = f"w{number} {' '.join(chance.choices(WORDS, k=chance.randint(0, 3)))}?"
        text = f"{said}\n\nAnswer format: solution1/solution2"
        return {"instruction": text, "input": "", "output": f"the correct answer is {answer}", "answer": answer}

    (folder / "commonsense_15k.json").write_text(json.dumps([question(n) for n in range(126)]))
    (folder / "piqa").mkdir()
    (folder / "piqa" / "test.json").write_text(json.dumps([question(n) for n in range(5)]))
    return folder


@pytest.mark.slow
def test_commonsense(llama: Path, commonsense: Path, seen: SimpleNamespace, tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer

    trained("commonsense/piqa", llama, commonsense, tmp_path / "run", "max_new_tokens=3")
    tokenizer = AutoTokenizer.from_pretrained(llama)
    rows = json.loads((commonsense / "commonsense_15k.json").read_text())
    split = Dataset.from_list(rows).train_test_split(test_size=120, shuffle=True, seed=42)

    def encoded(row: dict[str, str]) -> list[int]:
        found: list[int] = tokenizer(commonsense_prompt(row["instruction"], 2) + row["output"])["input_ids"]
        return [*found, tokenizer.eos_token_id]

    ids, masks, labels = (rows_of(seen.batches, name) for name in ("input_ids", "attention_mask", "labels"))
    counts = [sum(mask) for mask in masks]
    assert sorted(row[-n:] for row, n in zip(ids, counts, strict=True)) == sorted(map(encoded, split["train"]))
    for row, mask, label, n in zip(ids, masks, labels, counts, strict=True):
        assert len(row) % 8 == 0
        assert row[:-n] == [0] * (len(row) - n)
        assert mask == [0] * (len(row) - n) + [1] * n
        assert label == [IGNORED] * (len(row) - n) + row[-n:]
    validation = [row["input_ids"] for row in seen.trainer.eval_dataset]
    assert validation == list(map(encoded, split["test"]))

    arguments = seen.trainer.args
    assert {len(batch["input_ids"]) for batch in seen.batches} == {2}
    assert arguments.gradient_accumulation_steps == 32
    assert (arguments.eval_steps, arguments.save_steps, arguments.eval_strategy) == (80, 80, "steps")
    assert (arguments.load_best_model_at_end, arguments.metric_for_best_model) == (True, "loss")
    assert arguments.greater_is_better is False
    assert arguments.seed == 42
    assert all(one == ({torch.float32}, torch.bfloat16) for one in seen.passes)
    assert len(seen.passes) == len(seen.batches) + MEASURED == 4
    config = seen.trainer.model.peft_config["default"]
    assert (config.use_cayley_neumann, config.num_cayley_neumann_terms) == (True, 5)
    assert adapted_layers(seen.trainer.model) == {"q_proj", "v_proj"}
    assert {p.dtype for p in seen.trainer.model.parameters()} == {torch.float32}

    (asked,) = seen.generations  # all five fit into a batch of 64
    assert asked["model"] == "LlamaForCausalLM"  # merged
    assert [weights for weights, _ in seen.answering].count({torch.float16}) == 3  # a pass a token
    assert {key: asked[key] for key in ("num_beams", "temperature", "top_p", "top_k", "max_new_tokens")} == {
        "num_beams": 4,
        "temperature": 0.1,
        "top_p": 0.75,
        "top_k": 40,
        "max_new_tokens": 3,
    }
    assert (asked["do_sample"], asked["pad_token_id"], asked["eos_token_id"]) == (False, 0, tokenizer.eos_token_id)
    tests = json.loads((commonsense / "piqa" / "test.json").read_text())
    prompts = [tokenizer(commonsense_prompt(row["instruction"], 1))["input_ids"] for row in tests]
    given = zip(asked["input_ids"].tolist(), asked["attention_mask"].tolist(), strict=True)
    assert sorted(row[-sum(mask) :] for row, mask in given) == sorted(prompts)
    recipe = load("commonsense/piqa", ["variant=authors"])
    assert (recipe.method.options["r"], recipe.max_new_tokens, recipe.train.eval_batch_size) == (424, 32, 64)


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("the correct answer is answer2", "answer2"),
        ("Answer1 or answer3", "answer3"),
        ("answer5, not answer1", "answer5"),  # the script knows answer5 whatever was asked
        ("none ### Response: answer1", None),
        ("", None),
    ],
)
def test_an_answer_is_the_first_hit_as_in_llm_adapters(said: str, found: str | None) -> None:
    assert first_named(said, ("answer1", "answer2", "answer3")) == found
    assert first_choice("Answer1 or answer3", ("answer1", "answer3")) == "answer1"  # what recipes do otherwise
    assert first_named("False, true", ("true", "false")) == "true"


def cola(folder: Path) -> list[str]:
    """The files of CoLA, and the sentences of its development set in order."""
    sentences = [f"w{number} w{number // 3}" for number in range(31)]
    for name, texts in (("in_domain_train", sentences), ("in_domain_dev", sentences[:16]), ("out_of_domain_dev", [])):
        lines = [f"gj04\t{number % 2}\t\t{text}" for number, text in enumerate(texts or sentences[16:])]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return sentences


def test_the_halves_of_glue_change_with_the_seed_of_the_training(tmp_path: Path) -> None:
    sentences = cola(tmp_path)
    halves = []
    for seed in (42, 7):
        recipe = load("glue/cola", ["variant=authors", f"data.path={tmp_path}", f"train.seed={seed}"])
        task: Any = tasks.make(recipe)
        np.random.seed(seed)
        indices = np.arange(31)
        np.random.shuffle(indices)
        assert [e.text for e in task.examples.validation] == [sentences[i] for i in indices[:15]]
        assert [e.text for e in task.examples.test] == [sentences[i] for i in indices[15:]]
        halves.append(task.fingerprint())
    assert halves[0] != halves[1]
    assert tasks.make(load("glue/cola", ["variant=authors", f"data.path={tmp_path}"])).fingerprint() == halves[0]
    for seed in (42, 7):  # otherwise the halves are the same for all seeds
        recipe = load("glue/cola", [f"data.path={tmp_path}", f"train.seed={seed}"])
        halves.append(tasks.make(recipe).fingerprint())
    assert halves[2] == halves[3]


def groups_of(trainer: Any) -> dict[str, tuple[float, float]]:
    """The rate and the decay of each trained parameter."""
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    return {
        names[id(parameter)].removeprefix("base_model.model."): (group["initial_lr"], group["weight_decay"])
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.slow
def test_glue(deberta: Path, seen: SimpleNamespace, tmp_path: Path) -> None:
    from safetensors import safe_open

    cola(tmp_path)
    trained("glue/cola", deberta, tmp_path, tmp_path / "run")
    groups = groups_of(seen.trainer)
    head = {name for name in groups if OPERATOR not in name}
    assert {name.split(".")[0] for name in head} == {"pooler", "classifier"}
    assert {groups[name] for name in head} == {(5e-4, 0.0)}
    assert {groups[name] for name in groups.keys() - head} == {(6e-4, 0.0)}
    config = seen.trainer.model.peft_config["default"]
    assert (config.use_cayley_neumann, config.num_cayley_neumann_terms) == (True, 5)
    assert seen.trainer.args.metric_for_best_model == "matthews_correlation"
    with safe_open(tmp_path / "run" / "psoft" / "adapter" / "adapter_model.safetensors", "pt") as saved:
        stored = {part for name in saved.keys() for part in ("pooler", "classifier") if part in name}  # noqa: SIM118
    assert stored == {"pooler", "classifier"}
    assert load("glue/cola", ["variant=authors"]).method.options["r"] == 46


# The names of the authors' sets on the Hub, by ours.
SAME = ("caltech101", "dtd", "flowers102", "pets", "svhn", "sun397", "patch_camelyon", "eurosat", "resisc45")
HUB = {
    "cifar100": "cifar",
    "diabetic_retinopathy": "retinopathy",
    "clevr_dist": "clevr_distance",
    "kitti_dist": "kitti_distance",
    "dsprites_loc": "dsprites_location",
    "dsprites_ori": "dsprites_orientation",
    "smallnorb_azi": "smallnorb_azimuth",
    "smallnorb_ele": "smallnorb_elevation",
    **{name: name for name in (*SAME, "clevr_count", "dmlab")},
}
COLOURS = [(n, 3 * n, 255 - n) for n in range(0, 60, 10)]


def pictures(colours: Sequence[Any] = COLOURS) -> list[Any]:
    image = pytest.importorskip("PIL.Image")
    return [image.new("RGB" if n else "L", (20, 24), colour if n else 9) for n, colour in enumerate(colours)]


def test_the_sets_of_vtab_have_the_authors_names_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    stored = datasets.Dataset.from_dict({"img": pictures()}, datasets.Features({"img": datasets.Image()}))
    asked = []

    def stand_in(name: str, config: str | None, split: str, revision: str | None) -> Any:
        asked.append((name, split))
        last = load(recipe).data.classes - 1  # type: ignore[operator]
        return stored.add_column("label", [0, last] * 3)

    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    for task, name in HUB.items():
        recipe = f"vtab/{task}"
        made = tasks.make(load(recipe))
        assert made.sizes == {"train": 6, "validation": 6, "test": 6}
        assert asked[-3:] == [(f"fw407/vtab-1k_{name}", split) for split in ("train", "validation", "test")]
    assert len(asked) == 3 * 19


@pytest.fixture
def eurosat(tmp_path: Path) -> Path:
    """A folder that `datasets` reads as it does a set on the Hub, and the same images with list files."""
    import datasets

    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    (tmp_path / "lists" / "eurosat").mkdir(parents=True)
    for split, file in (("train", "train800"), ("validation", "val200"), ("test", "test")):
        table = datasets.Dataset.from_dict({"img": pictures(), "label": [0, 9] * 3}, features)
        table.to_parquet(str(tmp_path / "hub" / f"{split}.parquet"))
        for number, picture in enumerate(pictures()):
            picture.save(tmp_path / "lists" / "eurosat" / f"{number}.png")
        lines = [f"{number}.png {number % 2 * 9}\n" for number in range(6)]
        (tmp_path / "lists" / "eurosat" / f"{file}.txt").write_text("".join(lines))
    return tmp_path


@pytest.mark.slow
def test_vtab(vit: Path, eurosat: Path, seen: SimpleNamespace) -> None:
    given = ["variant=authors", f"model={vit}", "method.r=4", "train.max_steps=1", "train.lr=1e-3"]
    recipe = load("vtab/eurosat", [*given, f"data.hub.name={eurosat / 'hub'}", f"output={eurosat / 'run'}"])
    from_lists = load("vtab/eurosat", [*given, f"data.path={eurosat / 'lists'}"])
    found, listed = (tasks.make(one).training_batch() for one in (recipe, from_lists))
    for name in ("pixel_values", "labels"):
        assert torch.equal(found[name], listed[name])
    result = run(recipe)
    assert result["data"]["test"] == 6
    groups = groups_of(seen.trainer)
    assert {name: groups[name] for name in groups if OPERATOR not in name} == {
        f"classifier.modules_to_save.default.{kind}": (5e-3, 1e-3) for kind in ("weight", "bias")
    }
    assert {value for name, value in groups.items() if OPERATOR in name} == {(1e-3, 1e-3)}
    assert seen.trainer.model.peft_config["default"].use_cayley_neumann is False


def test_an_image_of_the_hub_that_cannot_be_decoded_is_named(vit: Path, tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    broken = [{"bytes": b"no image", "path": None}] * 4
    for split in ("train", "validation", "test"):
        table = datasets.Dataset.from_dict({"img": broken, "label": [0, 9] * 2}, features)
        table.to_parquet(str(tmp_path / f"{split}.parquet"))
    task = tasks.make(load("vtab/eurosat", [f"model={vit}", f"data.hub.name={tmp_path}"]))
    with pytest.raises(DataError, match=r"cannot read the image .* train, row 1: "):
        task.training_batch()


def test_a_set_that_cannot_be_reached_names_the_way_out() -> None:
    with pytest.raises(DataError, match=r"split 'train' of fw407/vtab-1k_cifar .*to use local files instead"):
        tasks.make(load("vtab/cifar100"))
