"""isotune's methods in axolotl: `plugins: [isotune.integrations.axolotl.IsotunePlugin]` and `adapter: isotune`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftConfig, PeftModel, get_peft_model
from pydantic import BaseModel, Field, model_validator
from transformers import PreTrainedModel

from isotune.integrations import config_from, require_unset
from isotune.methods.config import IsotuneConfig
from isotune.model_card import WEIGHTS, write_card

ADAPTER = "isotune"
_READ = ("lora_model_dir", "lora_on_cpu", "lora_modules_to_save", "peft_autocast_adapter_dtype")
"""Settings that axolotl names after LoRA or PEFT and means for every adapter."""
_TASKS = {"SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS"}


class IsotuneArgs(BaseModel):
    """The block `isotune:` of an axolotl file, checked before a model is loaded."""

    isotune: dict[str, Any] | None = Field(
        default=None, description="`method`, such as psoft or oft, and the options of its configuration."
    )

    @model_validator(mode="before")
    @classmethod
    def check_isotune(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Refuse what isotune would not read or axolotl would not do.

        Args:
            data: the whole file.

        Raises:
            ValueError: names the setting and says what to write instead.
        """
        block = data.get("isotune")
        if data.get("adapter") != ADAPTER:
            if block:
                raise ValueError(f"the block isotune: has an effect with adapter: {ADAPTER} alone; set that.")
            return data
        if not block:
            raise ValueError(f"adapter: {ADAPTER} needs a block isotune: with at least method: psoft (or oft, hra, …).")
        config_from(block)
        require_unset(
            {
                name: value
                for name, value in data.items()
                if value and name not in _READ and name.startswith(("lora_", "peft_", "loraplus_lr_ratio"))
            },
            "write the options of the method into the block isotune:",
        )
        if data.get("load_in_4bit") or data.get("load_in_8bit"):
            raise ValueError(
                f"axolotl quantises a base for its own adapters alone: with adapter: {ADAPTER}, load_in_4bit and "
                "load_in_8bit would leave it as it is. Name a base that is stored quantised as base_model, and "
                "leave both out; isotune's page 'isotune in other tools' says how to store one."
            )
        if data.get("merge_lora") and data.get("merge_method") != "legacy":
            raise ValueError(
                "axolotl's default merge reads the two factors of LoRA, which this adapter has not: set "
                "merge_method: legacy, or use `isotune export … --to merged`."
            )
        return data


class IsotunePlugin(BasePlugin):  # type: ignore[misc]
    """What axolotl asks of a plugin that brings an adapter."""

    def get_input_args(self) -> str:
        """Where axolotl finds the block of its file."""
        return f"{__name__}.{IsotuneArgs.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """One adapter, which has no factors as LoRA has, and no restarts as ReLoRA has."""
        return [AdapterCapabilities(name=ADAPTER, lora_like=False, relora=False)]

    def load_adapter(
        self, model: PreTrainedModel, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[PreTrainedModel | PeftModel | None, IsotuneConfig | None] | None:
        """The model with a new adapter, or with that of `lora_model_dir`.

        Args:
            model: the base.
            cfg: the whole file, as axolotl checked it.
            inference: whether the adapter is loaded frozen.
            config_only: whether a trainer, such as DPO's, adds the adapter by itself and wants its configuration.

        Returns:
            The model, None with `config_only`, and the configuration; None for another plugin's adapter.

        Raises:
            ValueError: a stored adapter is to be trained on by a trainer that makes its own.
        """
        if cfg.adapter != ADAPTER:
            return None
        if cfg.lora_model_dir and config_only:
            raise ValueError(
                f"lora_model_dir={cfg.lora_model_dir!r} is not read with rl: {cfg.rl}, whose trainer adds a new one. "
                "Merge that adapter first (isotune export … --to merged), and name the result as base_model."
            )
        options = {"task_type": _task_of(model), **cfg.isotune.to_dict()}
        if cfg.lora_modules_to_save:
            options.setdefault("modules_to_save", list(cfg.lora_modules_to_save))
        config = config_from(options)
        if config_only:
            return None, config
        casting = cfg.peft_autocast_adapter_dtype
        kwargs = {} if casting is None else {"autocast_adapter_dtype": casting}
        if cfg.lora_model_dir:
            adapted = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference, **kwargs)
        else:
            adapted = get_peft_model(model, config, **kwargs)
        adapted.print_trainable_parameters()
        return adapted, config

    def post_train(self, cfg: Any, model: PreTrainedModel | PeftModel) -> None:
        """Put isotune's part into the card of the output folder, which TRL's trainers have just written anew."""
        folder = Path(cfg.output_dir)
        if cfg.adapter == ADAPTER and not cfg.local_rank and (folder / WEIGHTS).is_file():
            write_card(folder, PeftConfig.from_pretrained(str(folder)))


def _task_of(model: PreTrainedModel) -> str:
    name = type(model).__name__
    return next((task for ending, task in _TASKS.items() if ending in name), "CAUSAL_LM")
