"""An adapted language model with its tokenizer, and what it answers beside its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from isotune.files.adapter import named_base, read_config
from isotune.files.base_model import gguf_of, quiet, resolve_base


def language_model(directory: str, base: str | None = None, *, trust_remote_code: bool = False) -> tuple[Any, Any, str]:
    """Load an adapter on its base model, and the tokenizer of either.

    Args:
        directory: an adapter's folder, of any of PEFT's or isotune's methods for causal language models.
        base: the base model, as `isotune.files.base_model.resolve_base`; by default what the adapter names.
        trust_remote_code: run code that the base model's repository carries.

    Returns:
        The model in evaluation mode on the GPU where there is one, its tokenizer, and the base's folder or Hub name.

    Raises:
        ValueError: it is an adapter for something else, or does not fit.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer

    raw = read_config(directory)
    kind = raw.get("task_type")
    if kind not in (None, "CAUSAL_LM"):
        raise ValueError(f"{directory} is an adapter for {kind}; one of a language model (CAUSAL_LM) is needed.")
    name = resolve_base(str(base or raw.get("base_model_name_or_path")))
    with quiet():
        loaded: Any = named_base(directory, base, trust_remote_code=trust_remote_code)
        if not (hasattr(loaded, "can_generate") and loaded.can_generate()):
            raise ValueError(f"{name}, a {type(loaded).__name__}, generates no text; a language model is needed.")
        model = PeftModel.from_pretrained(loaded, directory)
        source = directory if (Path(directory) / "tokenizer_config.json").exists() else name
        tokenizer = AutoTokenizer.from_pretrained(source, **gguf_of(source))
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer, name


class Chat:
    """Two conversations with the same questions: with the base model, and with the adapter on it.

    Where the tokenizer has no chat template, each question is continued by itself.

    Args:
        model, tokenizer: as `language_model` gives them.
        new_tokens: the most of an answer.
    """

    def __init__(self, model: Any, tokenizer: Any, new_tokens: int = 256) -> None:
        self.model, self.tokenizer, self.new_tokens = model, tokenizer, new_tokens
        self.turns: dict[str, list[dict[str, str]]] = {"base": [], "adapter": []}

    def ask(self, question: str) -> dict[str, str]:
        """The likeliest answer of each, which becomes a part of its conversation."""
        with self.model.disable_adapter():
            found = {"base": self._answer("base", question)}
        return found | {"adapter": self._answer("adapter", question)}

    def _answer(self, side: str, question: str) -> str:
        import torch

        turns = [*self.turns[side], {"role": "user", "content": question}]
        if self.tokenizer.chat_template:
            options: dict[str, Any] = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
            given = self.tokenizer.apply_chat_template(turns, **options)
        else:
            given = self.tokenizer(question, return_tensors="pt")
        room = getattr(self.model.config, "max_position_embeddings", None)
        length = given["input_ids"].shape[1]
        if not length:
            raise ValueError("The question has no words; ask something.")
        if room is not None and length + self.new_tokens > room:
            raise ValueError(
                f"The conversation has {length} tokens, and with {self.new_tokens} more for an answer it would exceed "
                f"the {room} that the model reads; begin anew, or allow fewer with --new-tokens."
            )
        given = given.to(self.model.device)
        given.pop("token_type_ids", None)
        with quiet(), torch.inference_mode():
            made = self.model.generate(**given, max_new_tokens=self.new_tokens, do_sample=False)
        answer: str = self.tokenizer.decode(made[0, given["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        self.turns[side] = [*turns, {"role": "assistant", "content": answer}]
        return answer
