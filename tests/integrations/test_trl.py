"""TRL's trainers with adapters of both forms: what is the reference, what moves, and what the saved folder holds."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn

from chats import chat_tokenizer, conversations, judged, preferences
from helpers import OPTIONS_FOR_TINY, layers_of, randomize, relative_error, tiny_llama
from isotune import get_peft_model
from isotune.errors import IsotuneWarning
from isotune.methods import METHODS
from isotune.model_card import write_cards

trl = pytest.importorskip("trl")
pytest.importorskip("datasets")

pytestmark = [pytest.mark.parametrize("method", ["psoft", "oft", "hra"]), pytest.mark.slow]

LN2 = math.log(2)


@pytest.fixture(scope="module")
def chat() -> Any:
    """A tokenizer of words with a chat template."""
    return chat_tokenizer()


def config(method: str, **options: Any) -> PeftConfig:
    build = METHODS[method]
    return build(
        target_modules=["q_proj", "v_proj", "down_proj"],
        task_type="CAUSAL_LM",
        **OPTIONS_FOR_TINY[method],
        **options,
    )


def arguments(kind: Any, folder: Path, **options: Any) -> Any:
    """Two batches of four examples an epoch in their order, in float32, without dropout or schedule."""
    return kind(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "learning_rate": 0.02,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "save_strategy": "no",
            "disable_tqdm": True,
            "seed": 3,
            **options,
        }
    )


def logged(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


TOKENS = torch.arange(4, 24).reshape(2, 10)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=TOKENS).logits


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the base's parameters by their names in it."""
    return {
        name.replace(".base_layer", "").removeprefix("base_model.model."): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if "isotune" not in name and "modules_to_save" not in name
    }


def assert_only_the_adapter_moved(model: nn.Module, base: nn.Module) -> None:
    before, after = weights_of(base), weights_of(model)
    assert {name.replace(".original_module", "") for name in after} == set(before)
    for name, weight in after.items():
        assert torch.equal(weight, before[name.replace(".original_module", "")]), name
    assert all(not layer.adapter("default").is_untrained() for layer in layers_of(model))


def assert_saved_and_loaded(trainer: Any, folder: Path, build: Callable[[], nn.Module] = tiny_llama) -> None:
    """What the trainer saves is the function that it has trained."""
    trainer.save_model(str(folder))
    loaded = PeftModel.from_pretrained(build(), folder)
    assert relative_error(logits(loaded), logits(trainer.model)) < 1e-5
    assert relative_error(logits(loaded), logits(build())) > 1e-3


def continued(method: str, folder: Path, **options: Any) -> Any:
    """An adapter that was trained and saved, on a basis that its file alone can tell, loaded to be trained further."""
    model = get_peft_model(tiny_llama(), config(method, **options))
    randomize(model, std=0.2)
    for layer in layers_of(model):
        if "default" in layer.isotune_form:
            for basis in layer.bases("default"):
                basis.stored[::2] *= -1  # another solver's signs: the file's basis, and no longer what is found here
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(tiny_llama(), folder, is_trainable=True)


# -- supervised fine-tuning ----------------------------------------------------------------------------------------


def test_sft(method: str, chat: Any, tmp_path: Path) -> None:
    trainer = trl.SFTTrainer(
        model=tiny_llama(),
        args=arguments(trl.SFTConfig, tmp_path),
        train_dataset=conversations(),
        processing_class=chat,
        peft_config=config(method),
    )
    trainer.train()
    losses = logged(trainer)
    assert losses[-1] < losses[0]
    assert_only_the_adapter_moved(trainer.model, tiny_llama())
    assert_saved_and_loaded(trainer, tmp_path / "saved")


# -- preferences ---------------------------------------------------------------------------------------------------


def reference_log_probabilities(model: nn.Module, tokenizer: Any, row: dict[str, Any], answer: str) -> float:
    """log p(answer | prompt) of a chat, summed over its tokens, by plain torch."""
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(row["prompt"] + row[answer], return_dict=False)
    tokens = torch.tensor([whole])
    with torch.no_grad():
        found = model.eval()(input_ids=tokens).logits[0, :-1].log_softmax(-1)
    return float(found.gather(1, tokens[0, 1:, None])[len(prompt) - 1 :].sum())


def dpo(model: nn.Module, folder: Path, tokenizer: Any, peft: PeftConfig | None, **options: Any) -> Any:
    reference = options.pop("ref_model", None)
    torch.manual_seed(3)  # HRA starts at random directions, and not every TRL sets the seed before it adds the adapter
    return trl.DPOTrainer(
        model=model,
        ref_model=reference,
        args=arguments(trl.DPOConfig, folder, **options),
        train_dataset=preferences(),
        processing_class=tokenizer,
        peft_config=peft,
    )


def test_dpo_starts_at_ln2_against_the_frozen_model(method: str, chat: Any, tmp_path: Path) -> None:
    trainer = dpo(tiny_llama(), tmp_path, chat, config(method), precompute_ref_log_probs=True)
    assert trainer.ref_model is None
    plain = tiny_llama()
    for row, found in zip(preferences(), trainer.train_dataset, strict=True):
        for answer in ("chosen", "rejected"):
            expected = reference_log_probabilities(plain, chat, row, answer)
            assert found[f"ref_{answer}_logps"] == pytest.approx(expected, rel=1e-5)
    trainer.train()
    expected_losses = logged(trainer)
    assert expected_losses[0] == pytest.approx(LN2, abs=1e-6)
    assert expected_losses[-1] < LN2 - 0.01
    assert_only_the_adapter_moved(trainer.model, tiny_llama())
    # The adapter switched off, and a second model, are the same reference: the same run.
    for reference in (None, tiny_llama()):
        again = dpo(tiny_llama(), tmp_path, chat, config(method), ref_model=reference)
        again.train()
        assert logged(again) == pytest.approx(expected_losses, abs=1e-4)
    assert_saved_and_loaded(again, tmp_path / "saved")


def test_dpo_of_a_continued_adapter_starts_at_ln2_against_its_copy(method: str, chat: Any, tmp_path: Path) -> None:
    model = continued(method, tmp_path / "first")
    start = copy.deepcopy(model)
    trainer = dpo(model, tmp_path, chat, None)
    assert set(trainer.model.peft_config) == {"default", "ref"}
    trainer.train()
    losses = logged(trainer)
    assert losses[0] == pytest.approx(LN2, abs=1e-5)
    assert losses[-1] < LN2 - 0.01
    adapted = logits(trainer.model)
    assert relative_error(adapted, logits(start)) > 1e-3
    trainer.model.set_adapter("ref")
    assert relative_error(logits(trainer.model), logits(start)) < 1e-5
    trainer.model.set_adapter("default")
    assert_only_the_adapter_moved(trainer.model, tiny_llama())
    trainer.save_model(str(tmp_path / "second"))
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "second")
    assert relative_error(logits(again), adapted) < 1e-5
    again.load_adapter(str(tmp_path / "second" / "ref"), adapter_name="ref")
    again.set_adapter("ref")
    assert relative_error(logits(again), logits(start)) < 1e-5


def test_kto(method: str, chat: Any, tmp_path: Path) -> None:
    runs = []
    for reference in (None, tiny_llama()):
        torch.manual_seed(3)  # as in dpo()
        trainer = trl.KTOTrainer(
            model=tiny_llama(),
            ref_model=reference,
            args=arguments(trl.KTOConfig, tmp_path),
            train_dataset=judged(),
            processing_class=chat,
            peft_config=config(method),
        )
        trainer.train()
        runs.append((logged(trainer), logged(trainer, "kl")))
    losses, divergences = runs[0]
    assert losses[0] == pytest.approx(0.5, abs=1e-6)  # 1 − σ(0) for the good and for the bad
    assert divergences[0] == pytest.approx(0.0, abs=1e-4)
    assert losses[-1] < 0.499
    assert max(divergences) > 1e-3
    assert losses == pytest.approx(runs[1][0], abs=1e-4)
    assert divergences == pytest.approx(runs[1][1], abs=1e-3)
    assert_only_the_adapter_moved(trainer.model, tiny_llama())
    assert_saved_and_loaded(trainer, tmp_path / "saved")


# -- reinforcement learning ----------------------------------------------------------------------------------------


class Judge:
    """Rewards, not by content alone, and keeps what it was shown with the adapter that was there at the time."""

    __name__ = "judge"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trainer: Any = None
        self.seen: list[tuple[list[Any], list[list[int]], Any]] = []

    def __call__(self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **_: Any) -> Any:
        folder = self.folder / str(len(self.seen))
        self.trainer.model.save_pretrained(folder)
        self.seen.append((prompts, completion_ids, PeftModel.from_pretrained(tiny_llama(), folder)))
        return [float(len(set(ids)) + i % 2) for i, ids in enumerate(completion_ids)]


def divergence(
    policy: nn.Module, reference: nn.Module, tokenizer: Any, prompts: list[Any], answers: list[list[int]]
) -> float:
    """The mean over the sampled tokens of exp(d) − d − 1 with d = log p_ref − log p, by plain torch."""
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        tokens = torch.tensor([start + answer])
        with torch.no_grad():
            mine, theirs = (
                model.eval()(input_ids=tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])
                for model in (policy, reference)
            )
        difference = (theirs - mine)[len(start) - 1 :, 0]
        found.append(difference.exp() - difference - 1)
    return float(torch.cat(found).mean())


@pytest.mark.parametrize("start", ["new", "continued"])
def test_grpo_generates_with_the_adapter_and_keeps_to_its_reference(
    method: str, start: str, chat: Any, tmp_path: Path
) -> None:
    judge, options = Judge(tmp_path / "judged"), {}
    if start == "new":
        model, reference, options = tiny_llama(), tiny_llama(), {"peft_config": config(method)}
    else:
        model = continued(method, tmp_path / "first")
        reference = copy.deepcopy(model)
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=judge,
        args=arguments(
            trl.GRPOConfig,
            tmp_path,
            beta=0.1,
            num_generations=2,
            max_completion_length=6,
            generation_kwargs={"do_sample": False},
            max_steps=3,
        ),
        train_dataset=preferences().remove_columns(["chosen", "rejected"]),
        processing_class=chat,
        **options,
    )
    judge.trainer = trainer
    trainer.train()
    divergences = logged(trainer, "kl")
    assert divergences[0] == pytest.approx(0.0, abs=1e-6)
    assert divergences[-1] > 1e-4
    assert len(judge.seen) == 3
    for (prompts, answers, policy), logged_divergence in zip(judge.seen, divergences, strict=True):
        expected = divergence(policy, reference, chat, prompts, answers)
        assert logged_divergence == pytest.approx(expected, rel=1e-3, abs=1e-6)
        plain = policy.merge_and_unload()
        for prompt, answer in zip(prompts, answers, strict=True):
            tokens = chat.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
            whole = plain.generate(**tokens, do_sample=False, max_new_tokens=6, pad_token_id=0)
            assert whole[0, tokens["input_ids"].shape[1] :].tolist() == answer
    assert_only_the_adapter_moved(trainer.model, tiny_llama())
    assert_saved_and_loaded(trainer, tmp_path / "saved")


# -- reward models -------------------------------------------------------------------------------------------------


def judge_model() -> nn.Module:
    """A Llama that scores a text with one number."""
    from transformers import LlamaForSequenceClassification

    base = tiny_llama()
    base.config.num_labels, base.config.pad_token_id = 1, 0
    torch.manual_seed(5)
    model = LlamaForSequenceClassification(base.config)
    model.model.load_state_dict(base.model.state_dict())
    return model.eval()


def test_reward_model(method: str, chat: Any, tmp_path: Path) -> None:
    peft = config(method, modules_to_save=["score"])
    peft.task_type = "SEQ_CLS"
    trainer = trl.RewardTrainer(
        model=judge_model(),
        args=arguments(trl.RewardConfig, tmp_path),
        train_dataset=preferences(),
        processing_class=chat,
        peft_config=peft,
    )
    trainer.train()
    losses = logged(trainer)
    assert losses[-1] < losses[0] - 0.01
    assert_only_the_adapter_moved(trainer.model, judge_model())
    assert_saved_and_loaded(trainer, tmp_path / "saved", judge_model)


# -- cards ---------------------------------------------------------------------------------------------------------


def test_the_card_of_a_saved_folder_is_trl_s_with_isotune_s_part(method: str, chat: Any, tmp_path: Path) -> None:
    """TRL's push_to_hub writes its card again after saving, without our part; the guide's class puts it back."""

    class Trainer(trl.SFTTrainer):
        def create_model_card(self, *given: Any, **options: Any) -> None:
            super().create_model_card(*given, **options)
            write_cards(Path(self.args.output_dir), self.model.peft_config)

    def of_trl_and_ours() -> tuple[bool, bool]:
        text = (tmp_path / "README.md").read_text()
        return "trained using [TRL]" in text, f"ISOTUNE_{method.upper()}" in text

    for kind, kept in ((trl.SFTTrainer, False), (Trainer, True)):
        trainer = kind(
            model=tiny_llama(),
            args=arguments(trl.SFTConfig, tmp_path, max_steps=1, save_strategy="steps", save_steps=1),
            train_dataset=conversations(),
            processing_class=chat,
            peft_config=config(method),
        )
        trainer.train()
        trainer.save_model()
        assert of_trl_and_ours() == (True, True)
        trainer.create_model_card(model_name="mine")  # as push_to_hub does between saving and uploading
        assert of_trl_and_ours() == (True, kept)


# -- what else TRL does to a model ---------------------------------------------------------------------------------


def test_what_grpo_sends_to_vllm_is_the_merged_model(method: str) -> None:
    """TRL merges, sends what is not the adapter's under the base's names, and unmerges."""
    model = get_peft_model(tiny_llama(), config(method))
    randomize(model, std=0.2)
    plain = copy.deepcopy(model).merge_and_unload()
    before = weights_of(model)
    model.merge_adapter()
    sent = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter.data.clone()
        for name, parameter in model.named_parameters()
        if model.prefix not in name
    }
    model.unmerge_adapter()
    expected = dict(plain.named_parameters())
    assert sent.keys() == expected.keys()
    assert all(torch.equal(sent[name], expected[name]) for name in expected)
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(model).items())


def test_parameters_that_trl_rounds_on_a_quantised_base_are_made_float32_again(
    method: str, chat: Any, tmp_path: Path
) -> None:
    """As the guide says: PSOFT's magnitudes lie near 1, where bfloat16 is too coarse for a usual step."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_llama().save_pretrained(tmp_path / "base")
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    moved = []
    for again_float32 in (False, True):
        trainer = trl.SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(
                tmp_path / "base", quantization_config=four_bits, device_map={"": "cpu"}
            ),
            args=arguments(trl.SFTConfig, tmp_path, learning_rate=5e-4),
            train_dataset=conversations(),
            processing_class=chat,
            peft_config=config(method),
        )
        trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        assert {p.dtype for p in trained.values()} == {torch.bfloat16}
        if again_float32:
            for parameter in trained.values():
                parameter.data = parameter.data.float()
        before = {name: p.detach().clone() for name, p in trained.items()}
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            trainer.train()
        said = [str(one.message) for one in seen if issubclass(one.category, IsotuneWarning)]
        assert len(said) == (method == "psoft" and not again_float32)
        assert all("input_scale and output_scale" in text and "p.data.float()" in text for text in said)
        moved.append({name: not torch.equal(p, before[name]) for name, p in trained.items()})
    assert not any(stepped for name, stepped in moved[0].items() if "input_scale" in name)
    assert all(moved[1].values())
