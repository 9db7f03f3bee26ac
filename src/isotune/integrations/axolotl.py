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
"""Settings that axolotl names after LoRA or PEFT but applies to every adapter."""
_TASKS = {"SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS"}


class IsotuneArgs(BaseModel):
    """The block `isotune:` of an axolotl file, checked before a model is loaded."""

    isotune: dict[str, Any] | None = Field(
        default=None, description="`method`, such as psoft or oft, and the options of its configuration."
    )

    @model_validator(mode="before")
    @classmethod
    def check_isotune(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Refuse settings that isotune would not read or axolotl would not apply.

        Args:
            data: the content of the whole file.

        Raises:
            ValueError: names the setting and says what to write instead.
        """
        block = data.get("isotune")
        if data.get("adapter") != ADAPTER:
            if block:
                raise ValueError(
                    f"the block isotune: only has an effect with adapter: {ADAPTER}; set that, or remove the block."
                )
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
                f"axolotl quantises the base model only for its own adapters: with adapter: {ADAPTER}, load_in_4bit "
                "and load_in_8bit would have no effect. Remove both and set base_model to a model that is stored "
                "quantised; isotune's page 'isotune in other tools' says how to store one."
            )
        if data.get("merge_lora") and data.get("merge_method") != "legacy":
            raise ValueError(
                "axolotl's default merge reads LoRA's two factors, which this adapter does not have: set "
                "merge_method: legacy, or use `isotune export … --to merged`."
            )
        return data


class IsotunePlugin(BasePlugin):  # type: ignore[misc]
    """The axolotl plugin that adds isotune's adapters."""

    def get_input_args(self) -> str:
        """The path of the class that describes the block in axolotl's file."""
        return f"{__name__}.{IsotuneArgs.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """One adapter, without LoRA's factors and ReLoRA's restarts."""
        return [AdapterCapabilities(name=ADAPTER, lora_like=False, relora=False)]

    def load_adapter(
        self, model: PreTrainedModel, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[PreTrainedModel | PeftModel | None, IsotuneConfig | None] | None:
        """Put a new adapter, or the one in `lora_model_dir`, on the model.

        Args:
            model: the base model.
            cfg: the whole file, as checked by axolotl.
            inference: whether to load the adapter frozen.
            config_only: whether a trainer, such as DPO's, adds the adapter itself and only needs its configuration.

        Returns:
            The model (None with `config_only`) and the configuration; None for another plugin's adapter.

        Raises:
            ValueError: lora_model_dir is set, but the trainer adds a new adapter of its own.
        """
        if cfg.adapter != ADAPTER:
            return None
        if cfg.lora_model_dir and config_only:
            raise ValueError(
                f"lora_model_dir={cfg.lora_model_dir!r} has no effect with rl: {cfg.rl}, whose trainer adds a new "
                "adapter. Merge that adapter first (isotune export … --to merged), and set base_model to the result."
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
        """Add isotune's part to the card of the output folder, which TRL's trainers have just rewritten."""
        folder = Path(cfg.output_dir)
        if cfg.adapter == ADAPTER and not cfg.local_rank and (folder / WEIGHTS).is_file():
            write_card(folder, PeftConfig.from_pretrained(str(folder)))


def _task_of(model: PreTrainedModel) -> str:
    name = type(model).__name__
    return next((task for ending, task in _TASKS.items() if ending in name), "CAUSAL_LM")
