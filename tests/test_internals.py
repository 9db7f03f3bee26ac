"""What isotune touches of other libraries is still there, listed in docs/internals.md, and nothing else is touched."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import io
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import isotune
import isotune.internals
from helpers import has_pefts_psoft
from isotune.internals import (
    ddp,
    offloading,
    peft_state,
    progress_bars,
    quantised_state,
    torch_state,
    transformers_state,
)
from isotune.internals.peft_hooks import HAS_HOOKS
from isotune.internals.peft_quantisation import get_quantization_kwargs, is_forward_only, resolve_quantization_backend
from isotune.tuner.layer import Layer
from isotune.tuner.model import IsotuneModel

SOURCE = Path(isotune.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "internals.md"
TEXT = PAGE.read_text()

# -- the page ----------------------------------------------------------------------------------------------------------


def functions() -> Iterator[str]:
    for module in pkgutil.iter_modules(isotune.internals.__path__):
        loaded = importlib.import_module(f"isotune.internals.{module.name}")
        for name, value in vars(loaded).items():
            if inspect.isfunction(value) and value.__module__ == loaded.__name__ and not name.startswith("_"):
                yield f"{module.name}.{name}"


VALUES = {"torch_state.FakeTensorMode", "torch_state.GROUPED_PRODUCT", "torch_state.transform_level"}
TOUCHES = {*functions(), *VALUES, "operations.Operations"}


def test_the_page_lists_all_functions_and_no_others() -> None:
    table = TEXT.split("## Methods of other classes")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+\.\w+)`", row)} == TOUCHES


def overridden() -> Iterator[tuple[type, str]]:
    pytest.importorskip("trl", reason="the library's modules are looked through, those of recipes too")
    """Private methods of isotune's classes that a class of another library has too."""
    for module in pkgutil.walk_packages(isotune.__path__, "isotune."):
        if module.name.startswith(("isotune.report", "isotune.__main__", "isotune.integrations.")):
            continue
        if module.name.endswith(("_kernels", ".launching")) and importlib.util.find_spec("triton") is None:
            continue
        for own in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(own) and own.__module__ == module.name:
                for base in own.__mro__[1:]:
                    if base.__module__.split(".")[0] in ("peft", "torch", "transformers"):
                        both = vars(own).keys() & vars(base).keys()
                        yield from ((own, name) for name in both if is_private(name) and is_method(vars(own)[name]))


def is_private(name: str) -> bool:
    return re.match(r"_(?!_)", name) is not None


def is_method(value: Any) -> bool:
    return inspect.isfunction(getattr(value, "__func__", value))


def test_the_page_lists_every_method_that_is_overridden() -> None:
    names = {name for _, name in overridden()}
    assert {"_create_and_replace", "_apply", "_save_checkpoint"} <= names
    assert {name for name in names if f"`{name}`" not in TEXT} == set()


@pytest.mark.parametrize("package", ["torch", "peft", "transformers", "accelerate", "diffusers", "bitsandbytes"])
def test_the_page_says_on_which_version_it_was_checked(package: str) -> None:
    """Raising a version in constraints.txt means going through the page again."""
    constraints = (PAGE.parents[1] / "constraints.txt").read_text()
    versions = re.findall(rf"^{package}==([\d.]+)", constraints, re.MULTILINE)
    title = {"torch": "PyTorch", "peft": "PEFT"}.get(package, package)
    assert f"{title} {versions[-1]}" in TEXT.split("## Functions")[0].replace("\n", " ")


# -- nothing else ------------------------------------------------------------------------------------------------------

EXCEPTIONS = {
    "hosts/computed_weight.py": {"_C"},
    "tuner/adapted_weight.py": {"_C", "_pytree"},
    "tuner/adapted_model.py": {"_hf_peft_config_loaded", "_parameters"},
    "tuner/layer.py": {"_modules"},
    "tuner/refusals.py": {"_tp_size"},
    "tuner/merging.py": {"_parameters"},
    "tuner/quantisation.py": {"_parameters"},
    "files/base_model.py": {"_class_name"},
    "experiments/engines.py": {"_exit"},
}
"""Private names outside of internals/: those of the page's third table, a key of diffusers' config.json, and os._exit,
which Python documents."""
FILES = {str(path.relative_to(SOURCE)): ast.parse(path.read_text()) for path in sorted(SOURCE.rglob("*.py"))}


@functools.cache
def own_names() -> set[str]:
    """What isotune's own classes and modules call private: defined there, or assigned to self."""
    found: set[str] = set()
    for node in (node for tree in FILES.values() for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                found.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found - set(dir(nn.Module())) - set(dir(torch.Tensor))


READS_BY_TEXT = ("getattr", "setattr", "hasattr", "delattr", "get", "pop", "setdefault")


def foreign_names(tree: ast.AST, own: set[str]) -> Iterator[str]:
    """Private names of other libraries that a module reads as attributes, by text, or in imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if node.attr not in own and ast.unparse(node.value) not in ("self", "cls", "super()"):
                yield node.attr
        elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith(("isotune", "__")):
            yield from filter(is_private, [*str(node.module).split("."), *(alias.name for alias in node.names)])
        elif isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
            called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            texts = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            if called in READS_BY_TEXT:
                yield from (text for text in texts if isinstance(text, str) and is_private(text) and text not in own)


@pytest.mark.parametrize("folder", sorted({name.split("/")[0] for name in FILES} - {"internals"}))
def test_no_other_private_name_is_touched(folder: str) -> None:
    own = own_names()
    files = [name for name in FILES if name.split("/")[0] == folder]
    found = {name: set(foreign_names(FILES[name], own)) for name in files}
    assert {name: touched for name, touched in found.items() if touched} == {
        name: touched for name, touched in EXCEPTIONS.items() if name in files
    }


def test_the_scan_sees_private_names() -> None:
    text = "from torch._a import b\ntorch._C.f(getattr(x, '_c'), y.__dict__.get('_d'), x._e.f, self.__g)"
    assert set(foreign_names(ast.parse(text), set())) == {"_a", "_C", "_c", "_d", "_e"}


@pytest.mark.parametrize("file", [name for name in EXCEPTIONS if name.startswith("tuner")])
def test_the_page_lists_an_exception(file: str) -> None:
    row = next(line for line in TEXT.splitlines() if line.startswith(f"| `{file}`"))
    assert all(name in row for name in EXCEPTIONS[file])


# -- PEFT --------------------------------------------------------------------------------------------------------------

RELIED_ON = {
    "_create_and_replace": "peft_config adapter_name target target_name parent current_key parameter_name",
    "_replace_module": "parent child_name new_module child",
    "_inject_parameters": "peft_config model adapter_name low_cpu_mem_usage",
    "_prepare_adapter_config": "peft_config model_config",
    "_cast_adapter_dtype": "adapter_name autocast_adapter_dtype",
    "_unload_and_optionally_merge": "merge progressbar safe_merge adapter_names",
    "_get_adapter_state_dict": "model config adapter_name state_dict unwanted_adapter_names",
    "_remove_adapter_name_from_key": "key adapter_name",
    "_remap_adapter_state_dict_for_load": "model config adapter_name state_dict",
}
"""Method of PEFT's BaseTuner that is overridden -> its parameters."""
SINCE_0_21 = {"_get_adapter_state_dict", "_remove_adapter_name_from_key", "_remap_adapter_state_dict_for_load"}


def parameters_of(method: Any) -> list[str]:
    return [name for name in inspect.signature(method).parameters if name != "self"]


@pytest.mark.parametrize("name", RELIED_ON)
def test_a_tuner_method_has_the_parameters_that_the_override_relies_on(name: str) -> None:
    if name in SINCE_0_21 and not HAS_HOOKS:
        pytest.skip("PEFT asks the tuner about its file from 0.21 on")
    assert hasattr(BaseTuner, name), f"PEFT calls BaseTuner.{name} no more"
    assert parameters_of(getattr(BaseTuner, name)) == RELIED_ON[name].split()
    assert parameters_of(getattr(IsotuneModel, name)) == RELIED_ON[name].split()


def test_all_overridden_tuner_methods_are_relied_on() -> None:
    assert {name for own, name in overridden() if own is IsotuneModel} == set(RELIED_ON) - (
        set() if HAS_HOOKS else SINCE_0_21
    )


@pytest.mark.skipif(HAS_HOOKS, reason="PEFT 0.21 asks the tuner itself about its file")
def test_an_older_peft_saves_and_loads_by_the_functions_that_are_exchanged() -> None:
    names = ("get_peft_model_state_dict", "set_peft_model_state_dict")
    for module in (peft, peft.utils, peft.utils.save_and_load, peft.peft_model):
        for name in names:
            assert getattr(module, name).func.__module__ == "isotune.internals.peft_hooks"
    loads = inspect.getsource(getattr(peft.utils.save_and_load, names[1]).__wrapped__)
    assert "_insert_adapter_name_into_state_dict(\n" in loads


def test_peft_says_how_a_model_is_quantised() -> None:
    """Under 0.18 and 0.19 it cannot, and refuses a module by naming the version that can."""
    assert get_quantization_kwargs(nn.Linear(2, 2)).keys() <= {"get_apply_tensor_subclass"}
    assert not is_forward_only(None)
    assert resolve_quantization_backend(nn.Linear(2, 2)) is None
    if not hasattr(peft.utils, "resolve_quantization_backend"):
        packed = type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})(2, 2)
        with pytest.raises(ValueError, match=r"peft>=0\.20"):
            resolve_quantization_backend(packed)


def test_peft_moves_an_adapter_by_the_method_that_is_overridden() -> None:
    for own in (BaseTunerLayer, Layer):
        assert parameters_of(own._move_adapter_to_device_of_base_layer) == ["adapter_name", "device"]


def peft_model() -> Any:
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    options = {"oft_block_size": 4, "target_modules": ["0"], "modules_to_save": ["1"]}
    return isotune.get_peft_model(base, isotune.OFTConfig(**options))


def test_a_call_of_a_peft_model_enters_the_tuners_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []
    original = IsotuneModel._enable_peft_forward_hooks

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        entered.append(kwargs)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(IsotuneModel, "_enable_peft_forward_hooks", counted)
    peft_model()(torch.ones(1, 8))
    assert len(entered) == 1


def test_active_and_disabled_adapters() -> None:
    model = peft_model()
    layer = next(module for module in model.modules() if isinstance(module, Layer))
    wrapper = next(module for module in model.modules() if isinstance(module, ModulesToSaveWrapper))
    for own in (layer, wrapper):
        active = own.active_adapter
        assert ([active] if isinstance(active, str) else active) == list(own.active_adapters) == ["default"]
    peft_state.set_active_of(wrapper, [])
    assert list(wrapper.active_adapters) == []
    assert layer.disable_adapters is False
    with model.disable_adapter():
        assert layer.disable_adapters is True


def test_the_enumeration_has_the_methods() -> None:
    assert {"ISOTUNE_PSOFT", "ISOTUNE_OFT"} <= {kind.value for kind in peft.PeftType}
    assert peft.PeftType("ISOTUNE_PSOFT") is peft.PeftType.ISOTUNE_PSOFT  # type: ignore[attr-defined]


@has_pefts_psoft
def test_the_basis_of_pefts_psoft() -> None:
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 6)), peft.PsoftConfig(r=2, target_modules=["0"]))
    down, up = peft_state.psoft_basis(model.base_model.model[0], "default")
    assert (down.shape, up.shape) == ((2, 8), (6, 2))


SINCE = {
    "utils.resolve_quantization_backend": "0.20",
    "utils.get_quantization_kwargs": "0.20",
    "utils.quantization_utils.ForwardOnlyQuantizationBackend": "0.20",
    "tuners.psoft.layer.Linear": "0.19",
}
"""Those that PEFT has not always had -> the version from which on it has."""


@pytest.mark.parametrize(
    "name",
    [
        "mapping.PEFT_TYPE_TO_CONFIG_MAPPING",
        "mapping.PEFT_TYPE_TO_PREFIX_MAPPING",
        "mapping.PEFT_TYPE_TO_TUNER_MAPPING",
        "utils.other.get_pattern_key",
        "utils.other.AuxiliaryTrainingWrapper",
        "utils.resolve_quantization_backend",
        "utils.get_quantization_kwargs",
        "utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
        "utils.quantization_utils.ForwardOnlyQuantizationBackend",
        "tuners.tuners_utils.check_adapters_to_merge",
        "tuners.psoft.layer.Linear",
    ],
)
def test_undocumented_names_of_peft(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert attribute in TEXT
    if Version(peft.__version__) >= Version(SINCE.get(name, "0")):
        assert hasattr(importlib.import_module(f"peft.{module}"), attribute)


# -- torch -------------------------------------------------------------------------------------------------------------


def test_lines_tell_a_new_title_and_of_some_bars_no_second_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_bars, "_SECONDS", 0)
    log = tmp_path / "log.txt"
    assert progress_bars.last_title(log) == ""
    progress_bars.show_progress("lines")
    try:
        with log.open("w") as file:
            shown = {"file": file, "disable": False, "mininterval": 0, "leave": False}
            with tqdm(total=4, desc="measuring", **shown) as once, tqdm(total=4, desc="a lr 1e-3", **shown) as bar:
                once.isotune_once = True
                for one in (bar, once, once, once):
                    one.update()
                file.flush()
                assert progress_bars.last_title(log) == "a lr 1e-3"
                for title in ("b", "b", "c: d"):
                    bar.set_description_str(title)
    finally:
        progress_bars.show_progress("bars")
    lines = [line.partition(" [")[0] for line in log.read_text().splitlines()]
    assert [line for line in lines if "measuring" in line] == ["measuring: 0% 0/4"]
    assert lines[-2:] == ["b: 25% 1/4", "c: d: 25% 1/4"]
    assert progress_bars.last_title(log) == "c: d"


@pytest.mark.parametrize("how", ["bars", "lines", "none"])
@pytest.mark.parametrize("leave", [True, False])
def test_bars_are_shown_as_bars_lines_or_not_at_all(how: Any, leave: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_bars, "_SECONDS", 0)
    file = io.StringIO()
    progress_bars.show_progress(how)
    try:
        with tqdm(total=1000, desc="steps", file=file, leave=leave, disable=False, mininterval=0) as bar:
            for _ in range(1000):
                bar.update()
            tqdm.write("between", file=file)
        with tqdm(desc="unknown", file=file, leave=leave, disable=False, delay=1e9):
            pass
    finally:
        progress_bars.show_progress("bars")
    said = file.getvalue()
    assert said.count("between\n") == 1
    if how == "bars":
        assert "\r" in said
        return
    assert "\r" not in said
    lines = said.replace("between\n", "").splitlines()
    assert all(re.match(r"steps: \d+% \d+/1000 \[", line) for line in lines)
    shares = [int(line.split()[1].rstrip("%")) for line in lines]
    assert shares == sorted(set(shares))
    assert len(shares) > 50 if how == "lines" else not shares
    assert ("100% 1000/1000" in said) == (how == "lines")


def test_a_backward_pass_has_a_number() -> None:
    seen = []
    y = torch.ones(2, requires_grad=True) * 2
    y.register_hook(lambda gradient: seen.append(torch_state.backward_pass()))
    assert torch_state.backward_pass() is None
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    assert len(set(seen)) == 2
    assert None not in seen
    assert torch_state.backward_pass() is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_part_is_rerun_within_its_graph_by_non_reentrant_checkpointing(reentrant: bool) -> None:
    told = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")  # torch 2.6 cannot be asked
    seen = []

    def part(x: Tensor) -> Tensor:
        seen.append((torch_state.backward_pass() is not None, torch_state.is_rerun_within_its_graph()))
        with torch.autograd.graph.saved_tensors_hooks(functools.partial(torch.clone), lambda x: x):
            assert not torch_state.is_rerun_within_its_graph()
        return x.exp()

    checkpoint(part, torch.ones(2, requires_grad=True), use_reentrant=reentrant).sum().backward()
    assert seen == [(False, False), (True, told and not reentrant)]


def test_a_tensor_counts_what_is_written_to_it() -> None:
    tensor = torch.zeros(2)
    before = torch_state.version_of(tensor)
    tensor.add_(1)
    assert torch_state.version_of(tensor) == before + 1
    with torch.inference_mode():
        assert torch_state.version_of(torch.zeros(2)) == 0


def test_tensors_without_numbers() -> None:
    assert not torch_state.is_symbolic(torch.zeros(1))
    assert torch_state.is_symbolic(torch.zeros(1, device="meta"))
    with FakeTensorMode():
        assert torch_state.is_symbolic(torch.zeros(1))


def nothing(*_: Any) -> None:
    return None


def failing(*_: Any) -> None:
    raise AssertionError("this hook was removed")


@pytest.mark.parametrize("kind", ["forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook"])
def test_hooks_are_seen_and_removed(kind: str) -> None:
    module = nn.Linear(2, 2)
    assert torch_state.is_bare(module)
    getattr(module, f"register_{kind}")(nothing)
    assert not torch_state.is_bare(module)
    if "backward" not in kind:
        torch_state.remove_hooks(module, nothing)
        assert torch_state.is_bare(module)


def test_hooks_of_loading_and_those_always_called_are_removed() -> None:
    module = nn.Linear(2, 2)
    module.register_load_state_dict_post_hook(failing)
    module.register_forward_hook(failing, always_call=True)
    torch_state.remove_hooks(module, failing)
    module.load_state_dict(module.state_dict())
    module(torch.ones(1, 2))
    assert not module._forward_hooks_always_called


def test_a_replaced_forward_is_seen() -> None:
    module = nn.Linear(2, 2)
    module.forward = lambda x: x  # type: ignore[method-assign, assignment]
    assert not torch_state.is_bare(module)


def test_a_compiled_module_holds_the_one_inside() -> None:
    module = nn.Linear(2, 2)
    assert torch_state.uncompiled(torch.compile(module)) is module  # type: ignore[arg-type]
    assert torch_state.uncompiled(module) is module


def test_storages_are_told_from_each_other() -> None:
    one, other = torch.zeros(2, device="meta"), torch.zeros(2, device="meta")
    assert one.untyped_storage() is one.view(2, 1).untyped_storage()
    assert one.untyped_storage() is not other.untyped_storage()


def test_the_store_of_the_default_group(tmp_path: Path) -> None:
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        store = torch_state.common_store()
        store.set("isotune/test", "1")
        assert store.get("isotune/test") == b"1"
        assert store.add("isotune/count", 2) == 2
    finally:
        dist.destroy_process_group()


def test_experts_are_computed_by_the_operation_that_is_counted() -> None:
    if hasattr(nn.functional, "grouped_mm"):
        assert isinstance(torch_state.GROUPED_PRODUCT, torch._ops.OpOverloadPacket)
        assert "torch._grouped_mm" in inspect.getsource(nn.functional.grouped_mm)


def test_ddp_reads_the_list_of_what_it_leaves_alone() -> None:
    model, name = nn.BatchNorm1d(2), "_ddp_params_and_buffers_to_ignore"
    ddp.ignore_buffers(model, ["running_mean"])
    assert "running_mean" in model.__dict__[name]
    assert name in inspect.getsource(nn.parallel.DistributedDataParallel)
    ddp.ignore_buffers(model, [])
    assert name not in model.__dict__


def test_a_tensor_subclass_can_step_aside() -> None:
    with torch._C.DisableTorchFunctionSubclass():
        assert torch.utils._pytree.tree_map(lambda x: x + 1, ([1], {"a": 2})) == ([2], {"a": 3})


def test_what_a_module_keeps_its_own_in() -> None:
    module = nn.BatchNorm1d(2)
    assert set(module._parameters) == {"weight", "bias"}
    assert "running_mean" in module._buffers
    assert dict(module._modules) == {}
    assert parameters_of(nn.Module._apply) == ["fn", "recurse"]


def test_fsdp_puts_its_name_before_that_of_what_it_wraps() -> None:
    from torch.distributed.fsdp import _common_utils

    assert f"{_common_utils.FSDP_WRAPPED_MODULE}." == "_fsdp_wrapped_module."


# -- accelerate, diffusers, transformers, DeepSpeed, bitsandbytes ------------------------------------------------------


def source_of(module: str) -> str:
    return inspect.getsource(pytest.importorskip(module))


def test_accelerate_brings_an_offloaded_weight() -> None:
    accelerate = pytest.importorskip("accelerate")
    module = nn.Linear(2, 2)
    expected = module.weight.detach().clone()
    assert not offloading.is_managed(module)
    accelerate.cpu_offload(module, execution_device=torch.device("cpu"))
    assert offloading.is_managed(module)
    assert offloading.is_offloaded(module)
    assert module.weight.is_meta
    with offloading.brought(module):
        assert torch.equal(module.weight, expected)
    assert module.weight.is_meta


def test_accelerates_hook_without_offloading_moves_no_weight() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    module = nn.Linear(2, 2)
    hooks.add_hook_to_module(module, hooks.ModelHook())
    assert not offloading.is_managed(module)


def test_diffusers_hook_is_seen() -> None:
    hooks = pytest.importorskip("diffusers.hooks")
    module = nn.Linear(2, 2)
    hooks.HookRegistry.check_if_exists_or_initialize(module)
    assert offloading.is_managed(module)
    assert not offloading.is_offloaded(module)


def test_accelerate_sets_the_switches_of_loading_by_one_process() -> None:
    text = source_of("accelerate.utils.launch")
    assert "FSDP_CPU_RAM_EFFICIENT_LOADING" in text
    assert "ACCELERATE_USE_FSDP" in text


def test_transformers_marks_what_it_spreads() -> None:
    assert "_is_hooked = True" in source_of("transformers.distributed.tensor_parallel")
    module = nn.Linear(2, 2)
    assert not transformers_state.is_tensor_parallel(module)
    module._is_hooked = True  # type: ignore[assignment]
    assert transformers_state.is_tensor_parallel(module)


def test_transformers_says_how_attention_is_computed() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 8}
    model = transformers.LlamaModel(transformers.LlamaConfig(num_hidden_layers=1, **sizes))
    model.set_attn_implementation("eager")
    assert transformers_state.attention_of(model.config) == "eager"
    assert hasattr(model, "_tp_size")
    assert hasattr(model, "_hf_peft_config_loaded")


def test_transformers_marks_a_quantised_model_by_these_names() -> None:
    assert "hf_quantizer" in source_of("transformers.modeling_utils")
    assert "def remove_quantization_config(self, model)" in source_of("transformers.quantizers.base")


@pytest.mark.parametrize("name", ["_save_checkpoint", "_get_train_sampler"])
def test_the_trainer_has_the_method_that_is_overridden(name: str) -> None:
    trainer = pytest.importorskip("transformers").Trainer
    loop = importlib.import_module("isotune.experiments.loop").Loop
    assert name in vars(loop)
    assert f"self.{name}" in source_of(trainer.__module__)


@pytest.mark.parametrize("name", ["_prepare_dataset", "_precompute_ref_logps"])
def test_the_trainer_of_preferences_has_the_method_that_is_overridden(name: str) -> None:
    trainer = pytest.importorskip("trl").DPOTrainer
    loop = importlib.import_module("isotune.experiments.tasks.preference").DpoLoop
    assert name in vars(loop)
    assert f"self.{name}" in source_of(trainer.__module__)


def test_deepspeed_writes_these_names() -> None:
    text = source_of("deepspeed.runtime.zero.partition_parameters")
    text += source_of("deepspeed.runtime.zero.parameter_offload") + source_of("deepspeed.utils.mixed_precision_linkage")
    names = ("ds_id", "ds_shape", "ds_status", "AVAILABLE", "register_external_parameter", "_hp_mapping")
    assert [name for name in names if name not in text] == []


def test_bitsandbytes_keeps_a_weight_under_these_names() -> None:
    text = source_of("bitsandbytes.nn.modules")
    names = ("bnb_quantized", "support_avx512bf16_for_cpu", "packing_format_for_cpu", "quant_state")
    assert [name for name in names if name not in text] == []
    layer = importlib.import_module("bitsandbytes.nn.modules").Linear4bit(64, 64, compute_dtype=torch.float32)
    layer.load_state_dict(nn.Linear(64, 64).state_dict())
    layer = layer.to("cpu")
    assert type(layer.weight).__name__ == "Params4bit"
    assert layer.weight.module is layer
    assert quantised_state.packed(layer) is layer.weight
    copied: Any = quantised_state.copy_to_write(layer)
    assert copied.weight is not layer.weight
    assert copied.weight.module is copied
    assert layer.weight.module is layer
    quantised_state.keep_readable(layer)
    assert not layer.support_avx512bf16_for_cpu


@pytest.mark.slow
def test_what_old_versions_of_peft_need_may_be_missing_in_later_ones() -> None:
    if not HAS_HOOKS:
        pytest.skip("for PEFT from 0.21 on")
    code = (
        "import peft.utils.hotswap; from peft.utils import save_and_load; "
        "del save_and_load._insert_adapter_name_into_state_dict; import isotune"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)
