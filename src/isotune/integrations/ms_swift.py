"""isotune's methods in ms-swift: `--external_plugins` takes this file, whose path `python -m` of it prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from peft import PeftModel, get_peft_model
from swift.arguments.tuner_args import TunerArguments
from swift.pipelines.train.tuner import get_modules_to_save, get_target_modules
from swift.tuner_plugin import PeftTuner, tuners_map
from torch import nn

from isotune.integrations import config_from, require_unset
from isotune.methods import METHODS

OPTIONS = "isotune"
"""The key of `--model_kwargs` below which the options of the method stand; args.json keeps them with the adapter."""
_OTHERS = ("lora", "boft_", "adalora_", "vera_", "fourier_", "reft_", "llamapro_", "use_rslora", "use_dora")
_TASKS = {"CAUSAL_LM", "SEQ_CLS"}


class IsotuneTuner(PeftTuner):  # type: ignore[misc]
    """One method of isotune as a tuner of ms-swift, which saves and loads it as it does PEFT's."""

    method = ""

    @classmethod
    def prepare_model(cls, args: Any, model: nn.Module) -> PeftModel:
        """The model with a new adapter.

        Args:
            args: ms-swift's arguments; `args.model_kwargs["isotune"]` holds the options of the method.
            model: the base.

        Raises:
            ValueError: an option that the method does not have, or a setting of another tuner.
        """
        options = dict((args.model_kwargs or {}).get(OPTIONS, {}))
        require_unset(_changed(args), f"write --model_kwargs '{{\"{OPTIONS}\": {{…}}}}'")
        task = (args.task_type or "causal_lm").upper()
        shared = {
            "target_modules": get_target_modules(args, model),
            "modules_to_save": get_modules_to_save(args, model, task) or None,
            "target_parameters": args.target_parameters,
            "task_type": task if task in _TASKS else None,
        }
        return get_peft_model(model, config_from({"method": cls.method, **shared, **options}))


def _changed(args: Any) -> Mapping[str, Any]:
    """The settings of other tuners that are not at their defaults."""
    found = {}
    for field in fields(TunerArguments):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.name.startswith(_OTHERS) and getattr(args, field.name, default) != default:
            found[field.name] = getattr(args, field.name)
    return found


for _method in METHODS:
    tuners_map[f"isotune_{_method}"] = type(f"{METHODS[_method].__name__}Tuner", (IsotuneTuner,), {"method": _method})

if __name__ == "__main__":
    print(__file__)
