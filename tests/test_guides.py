"""All Python of the documentation runs as it stands, on tiny models in folders named like those on the Hub."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chats import chat_tokenizer, conversations, judged, preferences
from helpers import make_tokenizer, tiny_bert, tiny_llama, tiny_unet
from pages import PAGES, blocks, text_of

WRITTEN = {page: [block.text for block in blocks(page, "python")] for page in PAGES}
ALONE = [
    f"docs/methods/{name}.md"
    for name in (
        "psoft",
        "oft",
        "boft",
        "goft",
        "hra",
        "road",
        "lora-xs",
        "svfit",
        "cersa",
        "oplora",
        "rosa",
        "peso",
        "uora",
    )
] + [f"docs/guides/{name}.md" for name in ("layers", "many-adapters", "from-peft", "ranks", "moving", "merging")]
"""Pages that need nothing but a folder to write to."""
NOT_RUN = {
    "docs/guides/several-gpus.md": "several processes; tests/distributed runs such programs",
    "vllm": "a server of its own; tests/files runs the reading of the folder",
    "unsloth": "a package that changes other libraries when it is imported; it was tried by hand",
}
"""What a page, or a block that imports this package, would need to run, and what was done in its place."""
ELSEWHERE = {
    "README.md": "tests/pythons/readme.py",
}
"""Pages whose Python another test runs."""


def run(page: str, **names: Any) -> dict[str, Any]:
    """All Python of a page from top to bottom, in one namespace that may begin with some names."""
    assert WRITTEN[page]
    names["__name__"] = "__main__"
    for block in WRITTEN[page]:
        code = compile(block, page, "exec")
        if not any(f"from {package} import" in block for package in NOT_RUN):
            exec(code, names)
    return names


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, where a folder of a repository's name is taken before the Hub."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def store(hub: Path, name: str, rows: Any) -> None:
    (hub / name).mkdir(parents=True)
    rows.to_json(str(hub / name / "train.jsonl"))


def store_language_model(hub: Path, name: str = "Qwen/Qwen3-0.6B") -> None:
    tiny_llama(pad_token_id=0, num_key_value_heads=4).save_pretrained(hub / name)  # wide enough for r = 64
    chat_tokenizer().save_pretrained(hub / name)


@pytest.fixture
def trl(monkeypatch: pytest.MonkeyPatch) -> Any:
    """TRL, whose default of bfloat16 is refused without a GPU."""
    module = pytest.importorskip("trl")
    for name in ("SFTConfig", "DPOConfig", "KTOConfig", "GRPOConfig", "RewardConfig"):
        here = functools.partial(getattr(module, name), use_cpu=True, bf16=False, report_to=[])
        monkeypatch.setattr(module, name, here)
    return module


@pytest.mark.parametrize("page", [page for page in PAGES if WRITTEN[page]])
def test_every_page_is_run_or_says_why_not(page: str, request: pytest.FixtureRequest) -> None:
    tests = Path(__file__).read_text(encoding="utf-8")
    for block in WRITTEN[page]:
        compile(block, page, "exec")
    if page in ELSEWHERE:
        other = (Path(__file__).parents[1] / ELSEWHERE[page]).read_text(encoding="utf-8")
        assert page.rpartition("/")[2] in other
    elif page not in NOT_RUN and page not in ALONE:
        assert f'run("{page}"' in tests


@pytest.mark.filterwarnings("ignore:truncate_base has changed:isotune.errors.IsotuneWarning")
@pytest.mark.parametrize("page", ALONE)
def test_pages_that_need_nothing(page: str, hub: Path) -> None:
    run(page)


@pytest.mark.slow
def test_chat_then_preferences(hub: Path, trl: Any) -> None:
    store_language_model(hub)
    store(hub, "trl-lib/Capybara", conversations())
    store(hub, "trl-lib/ultrafeedback_binarized", preferences())
    store(hub, "trl-lib/kto-mix-14k", judged())
    store(hub, "trl-lib/ultrafeedback-prompt", preferences().remove_columns(["chosen", "rejected"]))
    trained = run("docs/guides/chat.md")["trainer"].model
    assert {p.dtype for p in trained.parameters() if p.requires_grad} == {torch.float32}
    run("docs/guides/preferences.md")
    assert {folder.name for folder in (hub / "runs").iterdir()} >= {"chat", "dpo", "chat-dpo"}
    assert (hub / "runs/chat-dpo/ref/adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_quickstart_and_home(hub: Path, trl: Any) -> None:
    store_language_model(hub)
    store(hub, "trl-lib/Capybara", conversations())
    model = run("docs/quickstart.md")["trainer"].model
    run("docs/guides/troubleshooting.md", model=model)
    assert run("docs/index.md")["model"].peft_config["default"].r == 64


def test_embeddings(hub: Path) -> None:
    pytest.importorskip("sentence_transformers")
    from datasets import Dataset

    name = "sentence-transformers/all-MiniLM-L6-v2"
    tiny_bert().bert.save_pretrained(hub / name)
    make_tokenizer().save_pretrained(hub / name)
    rows = [{"anchor": f"w{i} w{i + 1}", "positive": f"w{i + 1} w{i + 2}"} for i in range(8)]
    store(hub, "sentence-transformers/all-nli", Dataset.from_list(rows))
    card = "---\nconfigs:\n- config_name: pair\n  data_files: train.jsonl\n---\n"
    (hub / "sentence-transformers/all-nli/README.md").write_text(card)
    assert run("docs/guides/embeddings.md")["vectors"].shape == (2, 64)


def test_lightning(hub: Path) -> None:
    pytest.importorskip("lightning")
    store_language_model(hub)
    run("docs/guides/lightning.md")
    assert (hub / "runs/lightning/adapter_model.safetensors").is_file()


def test_diffusion(hub: Path) -> None:
    pytest.importorskip("diffusers")
    tiny_unet().save_pretrained(hub / "stable-diffusion-v1-5/stable-diffusion-v1-5/unet")
    assert run("docs/guides/diffusion.md")["half"].shape == (2, 4, 8, 8)


def test_vision(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision", reason="timm needs torchvision", exc_type=(ImportError, RuntimeError))
    timm = pytest.importorskip("timm")
    create: Callable[..., Any] = timm.create_model

    def tiny(name: str, pretrained: bool, **options: Any) -> Any:
        assert timm.is_model(name)
        torch.manual_seed(0)
        return create("test_vit", pretrained=False, img_size=224, **options)

    monkeypatch.setattr(timm, "create_model", tiny)
    assert run("docs/guides/vision.md")["plain"].num_classes == 10


def test_quantised_bases(hub: Path) -> None:
    pytest.importorskip("bitsandbytes")
    store_language_model(hub, "my-model")
    store_language_model(hub, "meta-llama/Llama-3.2-1B")
    assert run("docs/guides/quantised.md")["model"].peft_config["default"].r == 46
    run("docs/guides/other-tools.md")
    assert (hub / "llama-3.2-1b-nf4/tokenizer.json").is_file()


def test_serving(hub: Path) -> None:
    from isotune import PsoftConfig, get_peft_model
    from isotune.files.export_lora import export_lora

    store_language_model(hub)
    base = tiny_llama()
    base.config._name_or_path = base.name_or_path = "Qwen/Qwen3-0.6B"
    config = PsoftConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    export_lora(get_peft_model(base, config), "runs/psoft-lora")
    assert run("docs/guides/serving.md")["model"].peft_config["default"].peft_type == "LORA"


@pytest.mark.parametrize("pooling", ["native", "mean"])
def test_own_classes_are_predicted(pooling: str, hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from isotune import PsoftConfig, get_peft_model
    from isotune.experiments.models import load_classifier
    from isotune.files.adapter import LABELS_FILE

    tiny_bert().bert.save_pretrained(hub / "base")
    model, head = load_classifier("./base", pooling, ["complaint", "praise"])
    config = PsoftConfig(r=4, target_modules=["query"], task_type="SEQ_CLS", modules_to_save=head)
    folder = hub / "runs/my-recipe/psoft/adapter"
    get_peft_model(model, config).save_pretrained(folder)
    (folder / LABELS_FILE).write_text('{"id2label": {"0": "complaint", "1": "praise"}}')
    make_tokenizer().save_pretrained(folder)
    kind = type(run("docs/guides/own-data.md")["model"].get_base_model()).__name__
    assert kind == {"native": "BertForSequenceClassification", "mean": "MeanPooledEncoder"}[pooling]
    assert re.fullmatch(r"\['(complaint|praise)', '(complaint|praise)'\]\n", capsys.readouterr().out)


def test_what_is_not_run_is_there() -> None:
    for name in NOT_RUN:
        assert name in PAGES or any(f"from {name} import" in text_of(page) for page in PAGES), name
