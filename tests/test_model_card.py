"""The README.md of a saved adapter: whoever saves, it says what the folder is, and nothing of the machine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from peft import LoraConfig
from torch import nn
from transformers import Trainer, TrainingArguments

from elsewhere import printed_elsewhere
from helpers import METHODS, configured, some_tokens, tiny_bert, tiny_llama
from isotune import OFTConfig, PsoftConfig, get_peft_model
from isotune.errors import AdapterFileError
from isotune.model_card import write_card
from isotune.package_models import KEPT, package_of

TARGETS = ["q_proj", "v_proj"]


@pytest.fixture
def base(saved_base: dict[str, Path]) -> nn.Module:
    """A model that was loaded from a folder of this machine."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(saved_base["llama"])


def adapted(base: nn.Module, **options: Any) -> Any:
    return get_peft_model(base, PsoftConfig(**{"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}))


def assert_ours(text: str, method: str = "PSOFT") -> None:
    assert f"ISOTUNE_{method}" in text
    assert "import isotune" in text
    assert "More Information Needed" not in text
    assert not re.search(r"/(tmp|home|work|root|var|private)\b", text), text
    card = ModelCard(text)
    assert card.data.library_name == "peft"
    assert {"isotune", method.lower().replace("_", "")} <= set(card.data.tags)


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_adapter(method: str, base: nn.Module, tmp_path: Path) -> None:
    sizes = {"oft_block_size": 8} if method == "oft" else {}
    model = get_peft_model(base, configured(method, TARGETS, **sizes))
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert_ours(text, model.peft_config["default"].peft_type.value.removeprefix("ISOTUNE_"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"| trainable parameters | {trained:,} |" in text
    assert "4 adapted layers" in text


def test_a_base_of_the_hub_is_named(base: Any, tmp_path: Path) -> None:
    base.name_or_path = "someone/model"
    adapted(base).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "someone/model"
    assert "base_model:adapter:someone/model" in card.data.tags
    assert "https://huggingface.co/someone/model" in card.text


@pytest.mark.parametrize("made", [False, True])
def test_a_base_in_a_package_is_named_as_recipes_name_it(
    made: bool, base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some_models").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert package_of(str(tmp_path / "other" / "model")) is None
    (tmp_path / "some_models/__init__.py").touch()
    base.name_or_path = str(KEPT.expanduser() / "some_models" if made else tmp_path / "some_models/model")
    adapted(base).save_pretrained(tmp_path / "adapter")
    text = (tmp_path / "adapter/README.md").read_text()
    assert_ours(text)
    assert "# PSOFT adapter of package:some_models\n" in text
    assert "| base model | `package:some_models`, an installed package |" in text
    assert 'named_base("THIS_FOLDER", "package:some_models")' in text


def test_only_what_is_trained_is_counted(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(12, 8)
            self.norm = nn.BatchNorm1d(8)
            self.head = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> Any:
            return self.head(self.norm(self.first(x)))

    options: dict[str, Any] = {"r": 4, "target_modules": ["first"], "modules_to_save": ["norm", "head"]}
    model = get_peft_model(Net(), PsoftConfig(**options, bias="isotune_only", basis="embedded"))
    model.save_pretrained(tmp_path)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 4 * 3 // 2 + 4 + 4 + 8 + 16 + 27
    assert f"| {trained:,} |" in (tmp_path / "README.md").read_text()


def test_embeddings_of_a_grown_vocabulary_are_saved_and_not_counted(base: Any, tmp_path: Path) -> None:
    base.resize_token_embeddings(100)
    model = adapted(base)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size > 100 * 64 * 4
    assert f"| {trained:,} |" in (tmp_path / "README.md").read_text()


def test_a_users_own_text_and_figures_stay(base: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nWhat I did.\n")
    model = adapted(base)
    for _ in range(2):
        model.save_pretrained(tmp_path)
        card = ModelCard.load(tmp_path / "README.md")
        assert_ours(str(card))
        assert card.text.count("What I did.") == card.text.count("# PSOFT adapter") == 1
        assert card.data.license == "mit"
        write_card(tmp_path, model.peft_config["default"], {"accuracy": 0.8125})
        (tmp_path / "README.md").write_text((tmp_path / "README.md").read_text() + "\nBelow.\n")
    text = (tmp_path / "README.md").read_text()
    assert "| accuracy | 0.8125 |" in text
    assert text.index("What I did.") < text.index("# PSOFT adapter") < text.index("Below.")


def test_a_users_own_tags_stay_and_those_of_another_method_go(base: nn.Module, tmp_path: Path) -> None:
    def tags() -> set[str]:
        return set(ModelCard.load(tmp_path / "README.md").data.tags)

    (tmp_path / "README.md").write_text("---\ntags:\n- legal\n- base_model:adapter:x/y\n---\nWhat I did.\n")
    adapted(base).save_pretrained(tmp_path)
    assert tags() == {"legal", "isotune", "psoft", "transformers"}
    get_peft_model(tiny_llama(), OFTConfig(oft_block_size=8, target_modules=TARGETS)).save_pretrained(tmp_path)
    assert tags() == {"legal", "isotune", "oft", "transformers"}


def test_the_versions_of_other_libraries_stay_beside_peft_s(base: nn.Module, tmp_path: Path) -> None:
    versions = "### Framework versions\n\n- Transformers 5.0\n- Tokenizers 0.22\n"
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\n---\nWhat I did.\n\n{versions}")
    adapted(base).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.index("### Framework versions") < text.index("- PEFT") < text.index("- Transformers 5.0")


def test_named_adapters_have_cards_of_their_own_and_a_list(base: nn.Module, tmp_path: Path) -> None:
    model = get_peft_model(base, PsoftConfig(r=4, target_modules=TARGETS), adapter_name="one")
    model.add_adapter("two", PsoftConfig(r=2, target_modules=TARGETS))
    model.save_pretrained(tmp_path)
    assert_ours((tmp_path / "one/README.md").read_text())
    assert_ours((tmp_path / "two/README.md").read_text())
    whole = (tmp_path / "README.md").read_text()
    assert_ours(whole)
    assert "| [one](one/README.md) | ISOTUNE_PSOFT |\n| [two](two/README.md) | ISOTUNE_PSOFT |" in whole


def test_named_adapters_beside_the_default(base: nn.Module, tmp_path: Path) -> None:
    model = adapted(base)
    model.add_adapter("two", PsoftConfig(r=2, target_modules=TARGETS))
    model.save_pretrained(tmp_path)
    assert_ours((tmp_path / "two/README.md").read_text())
    assert "# PSOFT adapter" in (tmp_path / "README.md").read_text()
    assert_ours((tmp_path / "README.md").read_text())


def test_the_card_of_another_librarys_adapter_is_left_alone(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "isotune" not in text
    assert "More Information Needed" in text


def trainer(model: Any, folder: Path) -> Trainer:
    rows = [{"input_ids": ids, "labels": ids} for ids in some_tokens(4)]
    arguments = TrainingArguments(str(folder), max_steps=1, save_steps=1, report_to=[], use_cpu=True)
    return Trainer(model, arguments, train_dataset=rows)


def test_a_trainers_folders(base: nn.Module, tmp_path: Path) -> None:
    own = trainer(adapted(base), tmp_path)
    own.train()
    own.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        assert_ours((folder / "README.md").read_text())
    own.create_model_card(model_name="mine")  # as its push_to_hub does; it replaces the page, and PEFT adds to it
    text = (tmp_path / "README.md").read_text()
    assert "# PSOFT adapter" in text
    assert "Training procedure" in text


@pytest.fixture
def uploaded(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Name in the repository -> text, of what huggingface_hub is asked to upload; the repository is new."""
    from huggingface_hub.errors import EntryNotFoundError
    from transformers.utils import hub

    sent: dict[str, str] = {}

    class Created:
        repo_id = "me/adapter"

    def commit(self: Any, repo_id: str, operations: list[CommitOperationAdd], **_: Any) -> str:
        for operation in operations:
            content = Path(str(operation.path_or_fileobj)).read_bytes()
            sent[operation.path_in_repo] = content.decode(errors="replace")
        return "done"

    from_file = ModelCard.load

    def load(source: Any, *arguments: Any, **options: Any) -> ModelCard:
        if source != "me/adapter":
            return from_file(source, *arguments, **options)
        if "README.md" in sent:
            return ModelCard(sent["README.md"])
        raise EntryNotFoundError("README.md")

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: Created())
    monkeypatch.setattr(HfApi, "create_commit", commit)
    for name in ("create_repo", "create_commit"):  # an older transformers has those of an HfApi of its own
        monkeypatch.setattr(hub, name, getattr(HfApi(), name), raising=False)
    monkeypatch.setattr(ModelCard, "load", load)
    return sent


def test_push_to_hub_uploads_the_card(base: nn.Module, uploaded: dict[str, str]) -> None:
    model = adapted(base)
    assert model.push_to_hub("me/adapter") == "done"
    assert set(uploaded) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert_ours(uploaded["README.md"])
    uploaded["README.md"] = uploaded["README.md"] + "\nAdded on the Hub.\n"
    model.push_to_hub("me/adapter")
    assert_ours(uploaded["README.md"])
    assert uploaded["README.md"].count("# PSOFT adapter") == 1
    assert "Added on the Hub." in uploaded["README.md"]


def test_push_to_hub_of_named_adapters(base: nn.Module, uploaded: dict[str, str]) -> None:
    get_peft_model(base, PsoftConfig(r=4, target_modules=TARGETS), adapter_name="one").push_to_hub("me/adapter")
    assert_ours(uploaded["README.md"])
    assert_ours(uploaded["one/README.md"])
    assert "[one](one/README.md)" in uploaded["README.md"]


def test_push_to_hub_of_another_librarys_adapter(uploaded: dict[str, str]) -> None:
    get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])).push_to_hub("me/adapter")
    assert "isotune" not in uploaded["README.md"]


def test_the_code_on_the_card_loads_a_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base: Any = tiny_bert(num_labels=3)
    base.save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    classifier: Callable[..., Any] = type(base).from_pretrained
    model = get_peft_model(
        classifier("base", num_labels=3), PsoftConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")
    )
    model.save_pretrained("adapter")
    code = re.search(r"```python\n(.*?)```", Path("adapter/README.md").read_text(), re.DOTALL)
    assert code
    found: dict[str, Any] = {}
    exec(code.group(1).replace("THIS_FOLDER", "adapter"), found)
    ids = some_tokens()
    torch.testing.assert_close(found["model"](ids).logits, model.eval()(ids).logits)


WITHOUT = """
import json
from peft import PeftConfig
try:
    PeftConfig.from_pretrained("adapter")
except KeyError as error:
    print(error, json.load(open("adapter/adapter_config.json"))["requires"], sep="|")
"""


@pytest.mark.slow
def test_without_isotune_the_folder_names_what_is_missing(base: nn.Module, tmp_path: Path) -> None:
    adapted(base).save_pretrained(tmp_path / "adapter")
    assert printed_elsewhere(WITHOUT, tmp_path) == ["'ISOTUNE_PSOFT'|import isotune"]
    assert "pip install isotune, and `import isotune`" in (tmp_path / "adapter/README.md").read_text()


def test_a_file_of_before_loads_and_another_requirement_is_refused(tmp_path: Path) -> None:
    PsoftConfig(r=4).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    stored = json.loads(file.read_text())
    assert stored.pop("requires") == "import isotune"
    file.write_text(json.dumps(stored))
    assert PsoftConfig.from_pretrained(str(tmp_path)).to_dict() == PsoftConfig(r=4).to_dict()
    file.write_text(json.dumps({**stored, "requires": "something_else"}))
    with pytest.raises(AdapterFileError, match="requires='something_else'"):
        PsoftConfig.from_pretrained(str(tmp_path))
