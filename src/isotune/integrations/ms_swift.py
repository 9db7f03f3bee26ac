"""isotune's methods in ms-swift: pass this file to `--external_plugins`; `python -m` of it prints its path."""

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
"""The key of `--model_kwargs` that holds the method's options; ms-swift keeps them in args.json with the adapter."""
_OTHERS = ("lora", "boft_", "adalora_", "vera_", "fourier_", "reft_", "llamapro_", "use_rslora", "use_dora")
_TASKS = {"CAUSAL_LM", "SEQ_CLS"}


class IsotuneTuner(PeftTuner):  # type: ignore[misc]
    """One of isotune's methods as an ms-swift tuner, saved and loaded as PEFT's are."""

    method = ""

    @classmethod
    def prepare_model(cls, args: Any, model: nn.Module) -> PeftModel:
        """Put a new adapter on the model.

        Args:
            args: ms-swift's arguments; `args.model_kwargs["isotune"]` holds the options of the method.
            model: the base model.

        Raises:
            ValueError: the method does not have an option, or a setting of another tuner is set.
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
    """The settings of other tuners that differ from their defaults."""
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
