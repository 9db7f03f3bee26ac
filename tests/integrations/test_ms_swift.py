"""The plug-in file against ms-swift's own classes; docs/guides/other-tools.md has the runs of its command line."""

from __future__ import annotations

from dataclasses import MISSING, fields
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("swift.tuner_plugin", reason="ms-swift is not installed: pip install ms-swift")

from swift.arguments.tuner_args import TunerArguments
from swift.tuner_plugin import tuners_map
from swift.utils import import_external_file

import isotune.integrations.ms_swift as plugin
from helpers import tiny_llama
from isotune.methods import METHODS


def arguments(options: dict[str, Any], **given: Any) -> Any:
    defaults = {
        f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(TunerArguments)
    }
    tuner = {**defaults, "target_modules": ["q_proj", "v_proj"], **given}
    return SimpleNamespace(**tuner, model_kwargs={"isotune": options}, task_type="causal_lm")


def test_the_file_registers_every_method() -> None:
    for method in METHODS:
        tuners_map.pop(f"isotune_{method}")
    import_external_file(plugin.__file__)
    assert {f"isotune_{method}" for method in METHODS} <= set(tuners_map)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_adapts(method: str) -> None:
    model = tuners_map[f"isotune_{method}"].prepare_model(arguments({}), tiny_llama())
    assert type(model.peft_config["default"]) is METHODS[method]
    assert all("isotune" in name for name, p in model.named_parameters() if p.requires_grad)


def test_refusals() -> None:
    tuner = tuners_map["isotune_oft"]
    with pytest.raises(ValueError, match="Did you mean 'oft_block_size'"):
        tuner.prepare_model(arguments({"oft_blok_size": 8}), tiny_llama())
    with pytest.raises(ValueError, match="lora_rank=64 is not allowed"):
        tuner.prepare_model(arguments({}, lora_rank=64), tiny_llama())
