"""No training step, evaluation or decoded token waits for the device, seen without one.

A GPU is waited for where the CPU must know what it has computed, or where numbers go from the one to the other. Two
modes look for what `torch.cuda.set_sync_debug_mode("error")` would report, and a test of them says what they find:

- Everything is on the meta device. It has no values, so that what needs one cannot run at all; the library takes the
  way of a device that must not be waited for, since `device.type` is not "cpu"; and a tensor that comes from the CPU,
  or goes there, has another device than the rest. That such tensors are symbolic is hidden from the library, which
  would compare and keep less there than on a GPU. The meta device does not autocast, so that this is tested on the CPU.
- What becomes a tensor on the CPU first is never seen by the dispatcher, and is looked for where Python calls torch:
  `torch.tensor(…, device=…)`, an index that is a list, and `x[i] = 1` where x[i] has no dimensions, which copies a
  number that is on the CPU, where one with dimensions would be filled.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers import (
    CHECKPOINTING,
    DROPOUT,
    EVERY_METHOD,
    FEW,
    HOSTS_OF_12,
    LORA,
    WITH_LORA,
    Chain,
    OneLayer,
    configured,
    counted,
)
from isotune.tuner.adapted_model import AdaptedModel

pytestmark = pytest.mark.covered(method=(*FEW, "goft"), host=("linear", "conv2d", "embedding"))
METHOD = pytest.mark.parametrize("method", WITH_LORA)


class Wait(AssertionError):
    """Something waits for the device."""


class Operations(TorchDispatchMode):
    """Raises at operations whose result depends on values, and at those between two devices."""

    VALUES = frozenset({"data_dependent_output", "dynamic_output_shape"})
    """What torch itself says of such an operation, in `Tag`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        masked = any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors[1:])
        depends = any(tag.name in self.VALUES for tag in func.tags)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            depends = masked  # whole numbers of indices say how many there are
        if depends or name == "_linalg_check_errors":
            raise Wait(f"{name} needs values")
        # A number on the CPU is given to the kernel as an argument.
        devices = {tensor.device for tensor in tensors if tensor.ndim or name in ("copy_", "_to_copy")}
        devices |= {torch.device(kwargs["device"])} if tensors and kwargs.get("device") is not None else set()
        if len(devices) > 1:
            raise Wait(f"{name} between {devices}")
        return func(*args, **kwargs)


class Calls(TorchFunctionMode):
    """Raises where Python makes a tensor of numbers of its own on a device."""

    MADE = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.MADE and not isinstance(args[0], Tensor) and kwargs.get("device") is not None:
            raise Wait(f"{func.__name__} on a device")
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(one, list) for one in index):
                raise Wait("an index that is a list")
        if func is Tensor.__setitem__ and not isinstance(args[2], Tensor) and args[0][args[1]].ndim == 0:
            raise Wait("a number written to one place")
        if func is Tensor.new_tensor:
            raise Wait("new_tensor")
        return func(*args, **kwargs)


@contextlib.contextmanager
def refusing_waits() -> Iterator[None]:
    """Raise `Wait` at what would wait for a GPU."""
    with Calls(), Operations():
        yield


@pytest.fixture
def with_values(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Have the library take tensors on the meta device for such as have values, from the call of this on."""

    def hide() -> None:
        for name, module in list(sys.modules.items()):
            if name.startswith("isotune.") and hasattr(module, "is_symbolic"):
                monkeypatch.setattr(module, "is_symbolic", lambda tensor: False)

    return hide


def on_device(model: nn.Module, *inputs: Tensor, device: str = "meta") -> nn.Module:
    """A model there, with its subspaces placed by a first pass."""
    model.to(device)
    model(*inputs)
    return model


def step(model: nn.Module, *inputs: Tensor) -> None:
    """Forward and backward, with gradients dropped as an optimizer's zero_grad does."""
    model(*inputs).sum().backward()
    for parameter in model.parameters():
        parameter.grad = None


# -- the test itself ------------------------------------------------------------------------------------------------

X = torch.empty(3, 3, device="meta")
WAITS: dict[str, Callable[[], Any]] = {
    "item": lambda: X.sum().item(),
    "bool": lambda: bool((X > 0).all()),
    "equal": lambda: torch.equal(X, X),
    "allclose": lambda: torch.allclose(X, X),
    "nonzero": lambda: X.nonzero(),
    "masked_select": lambda: X.masked_select(X > 0),
    "unique": lambda: X.unique(),
    "repeat_interleave": lambda: torch.repeat_interleave(X.new_ones(3, dtype=torch.long)),
    "read by a mask": lambda: X[X > 0],
    "written by a mask": lambda: X.clone().__setitem__(X > 0, X.new_ones(9)),
    "a list of numbers": lambda: torch.tensor([1.0, 2.0], device="meta"),
    "a list as a tensor": lambda: torch.as_tensor([1.0, 2.0], device="meta"),
    "a new tensor": lambda: X.new_tensor([1.0]),
    "an index from the CPU": lambda: X[torch.tensor([0, 1])],
    "an index that is a list": lambda: X[[0, 1]],
    "to the device": lambda: torch.arange(3).to("meta"),
    "to the CPU": lambda: X.cpu(),
    "copied from the CPU": lambda: X.clone().copy_(torch.ones(3, 3)),
    "one number": lambda: X.new_zeros(4).__setitem__(0, 1),
    "an inverse with its check": lambda: torch.linalg.inv(X),
    "a solution with its check": lambda: torch.linalg.solve(X, X),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_is_found(name: str) -> None:
    with refusing_waits(), pytest.raises(Wait):
        WAITS[name]()


def test_what_does_not_wait_is_left_alone() -> None:
    with refusing_waits():
        X.clone()[0] = 1
        X.clone()[:, 0] = X[0]
        X.clone()[0, 0].fill_(1)
        X * torch.tensor(2.0)
        X[torch.arange(2, device="meta")]
        torch.where(X > 0, X, 0.0)
        torch.linalg.inv_ex(X)
        torch.eye(3, device="meta") @ X


# -- the library ----------------------------------------------------------------------------------------------------


@METHOD
@pytest.mark.parametrize("host", HOSTS_OF_12)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_and_an_evaluation(
    method: str, host: str, dtype: torch.dtype, with_values: Callable[[], None]
) -> None:
    build, sample = HOSTS_OF_12[host]
    x = sample().to("meta")
    x = x.to(dtype) if x.is_floating_point() else x
    model = on_device(get_peft_model(OneLayer(build().to(dtype)), configured(method, ["layer"])), x)
    with_values()
    with refusing_waits():
        for _ in range(2):
            step(model.train(), x)
            with torch.no_grad():
                model.eval()(x)
            with torch.inference_mode():
                model(x)


@pytest.mark.parametrize("method", DROPOUT)
def test_dropout(method: str, with_values: Callable[[], None]) -> None:
    x = torch.randn(3, 12, device="meta")
    model = on_device(get_peft_model(Chain(), configured(method, **DROPOUT[method])), x).train()
    with_values()
    with refusing_waits():
        step(model, x)


@METHOD
@pytest.mark.parametrize("mode", CHECKPOINTING[1:])
def test_checkpointing(method: str, mode: str, with_values: Callable[[], None]) -> None:
    x = torch.randn(3, 12, device="meta", requires_grad=True)
    options = DROPOUT.get(method, {})
    model = on_device(get_peft_model(Chain(checkpointing=mode), configured(method, **options)), x).train()
    with_values()
    with refusing_waits():
        step(model, x)


@METHOD
def test_several_adapters(method: str, with_values: Callable[[], None]) -> None:
    """One after the other, and both at once."""
    x = torch.randn(4, 12, device="meta")
    model: Any = get_peft_model(Chain(), configured(method))
    model.add_adapter("other", configured(method))
    on_device(model, x)
    with_values()
    for names in ("other", ["default", "other"], "default"):
        model.base_model.set_adapter(names)
        with refusing_waits():
            step(model.train(), x)
            with torch.no_grad():
                model.eval()(x)


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_each_sample_with_its_own_adapter(method: str, with_values: Callable[[], None]) -> None:
    x = torch.randn(4, 12, device="meta")
    model: Any = get_peft_model(Chain(), configured(method))
    model.add_adapter("other", configured(method))
    on_device(model, x).eval()
    with_values()
    with refusing_waits():
        model(x, adapter_names=["default", "other", "other", "__base__"])


@METHOD
def test_autocast(method: str) -> None:
    """On the CPU, which has values: operations that need them raise here too, those between devices do not."""
    x = torch.randn(4, 12)
    model = get_peft_model(Chain(), configured(method)).train()
    model(x)
    with refusing_waits(), torch.autocast("cpu", dtype=torch.bfloat16):
        step(model, x)


@METHOD
def test_ten_decoded_tokens_evaluate_once(
    method: str, with_values: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token by token within one call of `generate`: no wait, and the operators are evaluated for the first alone."""
    x = torch.randn(1, 12, device="meta")

    class Decoder(Chain):
        def generate(self, x: Tensor, count: int) -> Tensor:
            for _ in range(count):
                x = self(x)
            return x

    model: Any = on_device(get_peft_model(Decoder(), configured(method)), x).eval()
    with_values()
    with torch.no_grad(), counted(monkeypatch, "isotune.adapter.evaluation.SharedEvaluation._untracked") as calls:
        with refusing_waits(), model.base_model._enable_peft_forward_hooks():
            model.get_base_model().generate(x, 10)
        evaluations = [] if method == LORA else AdaptedModel.of(model.get_base_model()).evaluations
        assert len(calls) == len(evaluations)
