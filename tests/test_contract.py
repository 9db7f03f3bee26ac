"""The contract of DESIGN.md: every method on every host."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.pytorch_utils import Conv1D

from helpers import (
    CHECKPOINTING,
    DROPOUT,
    EXACT_START,
    FORMS,
    UPDATES,
    OneLayer,
    adapt,
    assert_gradients_are_right,
    assert_unchanged,
    checkpointed,
    down_of,
    form_of,
    layers_of,
    merged_matrix,
    only,
    randomize,
    reference_complement,
    reference_restarting,
    reference_shared,
    relative_error,
    rotated,
    snapshot,
    tiny_llama,
    tiny_opt,
    trainable,
    up_of,
    with_basis,
)
from isotune import get_peft_model
from isotune.adapter.kernels import subspace_update
from isotune.adapter.lowrank import ComplementAdapter, LowRankAdapter
from isotune.adapter.operator import Adapter, Operator
from isotune.adapter.restarting import RestartingAdapter
from isotune.adapter.rotation import RotationAdapter
from isotune.adapter.shared import SharedAdapter
from isotune.adapter.subspace import SubspaceAdapter
from isotune.algebra.factors import LowRank, apply_chain
from isotune.diagnostics.turn import turned_weights
from isotune.errors import IsotuneWarning
from isotune.experiments.measure import Kept
from isotune.internals.operations import Operations
from isotune.methods import METHODS
from isotune.tuner.layer import Layer
from isotune.tuner.placing import place_adapter
from quantisers import QUANTISERS, quantise

RANK = 5
ADDITIVE = ("psoft", "lora_xs", "svfit", "cersa", "oplora", "rosa", "peso", "uora")
"""Methods that update W; the others rotate its inputs, or its outputs."""
OF_OUTPUTS = [form for form in FORMS if form not in METHODS]


@dataclass(frozen=True)
class Case:
    """One host: how to build it, and the shapes that go through it."""

    build: Callable[[], nn.Module]
    in_features: int
    """Columns of W."""
    out_features: int
    """Rows of W."""
    sample: Callable[[int], Tensor] | None = None
    """Makes that many inputs, for a host that does not take (..., in_features)."""


def conv1d(out_features: int, in_features: int) -> nn.Module:
    layer = Conv1D(out_features, in_features)
    nn.init.normal_(layer.weight, std=0.3)
    nn.init.normal_(layer.bias)
    return layer


HOSTS = {
    "square": Case(lambda: nn.Linear(16, 16), 16, 16),
    "square-no-bias": Case(lambda: nn.Linear(16, 16, bias=False), 16, 16),
    "wide": Case(lambda: nn.Linear(23, 9), 23, 9),
    "tall": Case(lambda: nn.Linear(7, 31), 7, 31),
    "tall-no-bias": Case(lambda: nn.Linear(7, 31, bias=False), 7, 31),
    "full-rank": Case(lambda: nn.Linear(RANK, 11), RANK, 11),
    "conv1d-wide": Case(lambda: conv1d(9, 23), 23, 9),
    "conv1d-tall": Case(lambda: conv1d(31, 7), 7, 31),
}


def tokens(count: int) -> Tensor:
    """Token numbers with repeated ones and the padding."""
    return torch.randint(0, 19, (count, 7)).index_fill(1, torch.tensor([3]), 4)


FOLDED = {
    "conv1d": Case(lambda: nn.Conv1d(3, 8, 4, stride=3, padding=2), 12, 8, lambda n: torch.randn(n, 3, 11)),
    "conv2d": Case(
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2), groups=2),
        12,
        6,
        lambda n: torch.randn(n, 4, 7, 6),
    ),
    "conv2d-1x1-no-bias": Case(lambda: nn.Conv2d(16, 5, 1, bias=False), 16, 5, lambda n: torch.randn(n, 16, 3, 2)),
    "conv2d-circular": Case(
        lambda: nn.Conv2d(2, 7, 3, padding=1, padding_mode="circular"), 18, 7, lambda n: torch.randn(n, 2, 5, 4)
    ),
    "conv3d": Case(lambda: nn.Conv3d(2, 6, 2, padding="same"), 16, 6, lambda n: torch.randn(n, 2, 3, 4, 2)),
    "embedding": Case(lambda: nn.Embedding(19, 16), 16, 19, tokens),
    "embedding-padding": Case(lambda: nn.Embedding(19, 12, padding_idx=4), 12, 19, tokens),
}
"""Hosts that take no matrix of inputs: the methods act on their weight. What only makes sense where W multiplies the
input itself (inputs of any dimension, fused and hooked path, kept bytes, operations) is tested on HOSTS alone."""

EVERY = {**HOSTS, **FOLDED}
EVEN = {
    "wide": Case(lambda: nn.Linear(24, 12), 24, 12),
    "tall": Case(lambda: nn.Linear(8, 30), 8, 30),
    "tall-no-bias": Case(lambda: nn.Linear(8, 30, bias=False), 8, 30),
    "full-rank": Case(lambda: nn.Linear(6, 12), 6, 12),
    "conv1d-wide": Case(lambda: conv1d(12, 24), 24, 12),
    "conv1d-tall": Case(lambda: conv1d(30, 8), 8, 30),
    "conv2d-1x1-no-bias": Case(lambda: nn.Conv2d(16, 6, 1, bias=False), 16, 6, lambda n: torch.randn(n, 16, 3, 2)),
    "conv2d-circular": Case(
        lambda: nn.Conv2d(2, 8, 3, padding=1, padding_mode="circular"), 18, 8, lambda n: torch.randn(n, 2, 5, 4)
    ),
}
"""In place of hosts with an odd side, for a method of pairs."""

PACKED = ("bitsandbytes-nf4", "bitsandbytes-int8", "torchao-int8")
"""Quantised hosts, by the names in tests/quantisers.py; the others that are supported in hosts/test_quantised.py."""


def fitted(name: str, method: str) -> Case:
    """The host of this name, or the one in its place that fits the method."""
    return EVEN.get(name, EVERY[name]) if form_of(method)[0] == "road" else EVERY[name]


@pytest.fixture(params=list(EVERY))
def host(request: pytest.FixtureRequest, method: str) -> Case:
    return fitted(request.param, method)


pytestmark = [
    pytest.mark.parametrize("method", FORMS),
    pytest.mark.covered(host=("wide", "conv2d", "embedding-padding"), case=("wide",)),
]


@pytest.fixture(params=PACKED)
def packed(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=list(HOSTS))
def case(request: pytest.FixtureRequest, method: str) -> Case:
    return fitted(request.param, method)


def fitting(method: str, width: int, *, other: bool = False) -> dict[str, Any]:
    """Options with which a method fits that many inputs or outputs; `other` gives an adapter of another size."""
    block = max(d for d in range(1, 9) if width % d == 0)
    block = width if block == 1 or other else block
    if method in UPDATES:
        return {"r": RANK - 1 if other else RANK, **({"preserved_rank": 2} if method == "oplora" else {})}
    if method == "oft":
        return {"oft_block_size": block}
    if method == "boft":
        return {"boft_block_size": block, "boft_n_butterfly_factor": 1 if block % 2 or width % (2 * block) else 2}
    if method == "hra":
        return {"r": 2 if other else 4}
    if method == "road":
        if width % 2:
            pytest.skip("an odd number of inputs or outputs has no pairs; that is refused (methods/test_road.py)")
        return {"group_size": 2 if other else max(d for d in (2, 4, 6, 8) if width % d == 0), "side": "input"}
    return {}


def config(method: str, case: Case, *, other: bool = False, **options: Any) -> Any:
    name, form = form_of(method)
    fits = fitting(name, case.out_features if form else case.in_features, other=other)
    return METHODS[name](**{"target_modules": ["layer"], "init_weights": False, **fits, **form, **options})


def build(method: str, case: Case, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """An adapted layer whose host has requires_grad off, with random operators unless asked otherwise."""
    return get_peft_model(OneLayer(case.build().to(dtype)), config(method, case, **options)).eval()


def inputs(case: Case, *leading: int, dtype: torch.dtype = torch.float32) -> Tensor:
    if case.sample is not None:
        sample = case.sample(leading[0])
        return sample.to(dtype) if sample.is_floating_point() else sample
    return torch.randn(*leading, case.in_features, dtype=dtype)


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]


# -- start -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_identity_at_the_start(method: str, host: Case, dtype: torch.dtype, training: bool) -> None:
    """Bit for bit but for HRA, whose reflections cancel in pairs up to rounding.

    LoRA-XS starts so with init_std=0 (by default at a change of that size; tests/methods/test_lora_xs.py).
    """
    base = OneLayer(host.build().to(dtype))
    x = inputs(host, 3, 4, dtype=dtype)
    with torch.no_grad():
        expected = base(x)
    hra = form_of(method)[0] == "hra"
    limit = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-6}[dtype] if hra else 0.0
    options = config(method, host, init_weights=True, **EXACT_START.get(form_of(method)[0], {}))
    model = get_peft_model(base, options).train(training)
    assert relative_error(model(x), expected) <= limit
    if x.is_floating_point():
        assert relative_error(model(x.clone().requires_grad_()), expected) <= limit
    with torch.no_grad():
        assert relative_error(model(x), expected) <= limit
    weight = only(model).host.weight.detach().clone()
    model.merge_adapter()
    assert relative_error(only(model).host.weight, weight) <= limit


def test_a_random_start_is_no_identity(method: str, host: Case) -> None:
    base = OneLayer(host.build())
    x = inputs(host, 3)
    expected = base(x).detach()
    assert relative_error(get_peft_model(base, config(method, host))(x), expected) > 1e-3


# -- merging -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("safe_merge", [True, False])
def test_merged_equals_unmerged_and_unmerge_restores_the_bits(
    method: str, host: Case, dtype: torch.dtype, safe_merge: bool
) -> None:
    model = build(method, host, dtype)
    x = inputs(host, 3, 4, dtype=dtype)
    before, expected = only(model).host.weight.clone(), model(x).detach()
    parameter = only(model).host.weight
    model.merge_adapter(safe_merge=safe_merge)
    assert only(model).merged
    assert not torch.equal(only(model).host.weight, before)
    assert relative_error(model(x), expected) < 10 * tolerance(dtype)
    model.unmerge_adapter()
    assert only(model).host.weight is parameter
    assert torch.equal(parameter, before)
    assert torch.equal(model(x), expected)


def test_merge_and_unload_and_unload(method: str, host: Case) -> None:
    model = build(method, host)
    x = inputs(host, 5)
    expected, host = model(x).detach(), only(model).get_base_layer()
    merged = copy.deepcopy(model).merge_and_unload()
    assert type(merged.layer) is type(host)
    assert relative_error(merged(x), expected) < 1e-5
    assert not [p for name, p in merged.named_parameters() if "isotune" in name]
    unloaded = model.unload()
    assert unloaded.layer is host


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_merge_in_half_precision_rounds_once(method: str, host: Case, dtype: torch.dtype) -> None:
    model = build(method, host, dtype)
    for name in ("second", "third"):
        model.add_adapter(name, config(method, host))
    layer = only(model)
    weight = layer.host.weight.detach().clone()
    names = ["default", "second", "third"]
    expected = layer.host.stored(merged(layer, names)).to(dtype)
    model.merge_adapter(adapter_names=names)
    assert layer.host.weight.dtype == dtype
    # The order of a sum in float32 may tip a tie; anything more would be a second rounding.
    different = layer.host.weight != expected
    assert different.sum() <= max(1, 0.01 * different.numel())
    for name in reversed(names):
        model.unmerge_adapter() if layer.merged else None
        assert torch.equal(layer.host.weight, weight), name
    for name in names:  # one after the other is the same as at once
        model.merge_adapter(adapter_names=[name])
    assert (layer.host.weight != expected).sum() <= max(1, 0.01 * expected.numel())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_safe_merge_refuses_what_is_not_finite_and_changes_nothing(method: str, host: Case, bad: float) -> None:
    model = build(method, host)
    with torch.no_grad():
        next(iter(only(model).adapter("default").parameters())).view(-1)[0] = bad
    before = snapshot(model)
    with pytest.raises(ValueError, match="layer"):
        model.merge_adapter(safe_merge=True)
    assert_unchanged(model, before)
    assert not only(model).merged
    with pytest.raises(ValueError, match="NaN or infinit"):
        model.merge_and_unload(safe_merge=True)
    assert_unchanged(model, before)


def with_matrix(layer: Layer, matrix: Tensor, x: Tensor) -> Tensor:
    """The base layer with another W, by torch itself."""
    result: Tensor = torch.func.functional_call(layer.get_base_layer(), {"weight": layer.host.stored(matrix)}, (x,))
    return result


def merged(layer: Layer, names: Sequence[str]) -> Tensor:
    """W with these adapters in this order; updates as the layer itself gives them, in the precision of merging."""
    return merged_matrix(layer, names, lambda layer, name: layer.get_delta_weight(name))


@pytest.mark.parametrize("order", [["default", "other"], ["other", "default"]])
def test_several_adapters_merged_at_once(method: str, host: Case, order: list[str]) -> None:
    model = build(method, host)
    model.add_adapter("other", config(method, host, other=True))
    layer, x = only(model), inputs(host, 6)
    weight = layer.host.weight.detach().clone()
    expected = with_matrix(layer, merged(layer, order), x)
    model.base_model.set_adapter(order)
    assert relative_error(model(x), expected) < 1e-5
    model.merge_adapter(adapter_names=order)
    assert relative_error(model(x), expected) < 1e-5
    model.unmerge_adapter()
    assert torch.equal(layer.host.weight, weight)


def test_merging_twice_warns_or_does_nothing(method: str, case: Case) -> None:
    model = build(method, case)
    model.merge_adapter()
    once = only(model).host.weight.clone()
    model.merge_adapter()
    assert torch.equal(only(model).host.weight, once)
    model.unmerge_adapter()
    with pytest.warns(IsotuneWarning, match="[Nn]othing"):
        model.unmerge_adapter()


def test_an_adapter_added_while_another_is_merged_is_of_the_base(method: str, host: Case) -> None:
    model = build(method, host)
    model.merge_adapter()
    torch.manual_seed(9)
    model.add_adapter("late", config(method, host))
    found = only(model).get_delta_weight("late")
    if only(model).merged:  # PEFT unmerges when it sets the active adapters again
        model.unmerge_adapter()
    torch.manual_seed(9)
    model.add_adapter("early", config(method, host))
    assert torch.equal(found, only(model).get_delta_weight("late"))
    assert torch.equal(found, only(model).get_delta_weight("early"))


def test_delta_weight_is_what_the_forward_adds(method: str, host: Case) -> None:
    model = build(method, host, torch.float64)
    layer, x = only(model), inputs(host, 4, dtype=torch.float64)
    delta = layer.get_delta_weight("default")
    assert delta.shape == layer.host.weight.shape
    weights = {"weight": layer.host.weight + delta}
    expected = torch.func.functional_call(layer.get_base_layer(), weights, (x,))
    torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-12)
    if layer.supports_lora_conversion("default"):
        up, down = layer.low_rank("default")
        torch.testing.assert_close(layer.host.stored(up @ down), delta)
    else:
        with pytest.raises(ValueError, match="full rank"):
            layer.low_rank("default")


# -- inputs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 2, 3), (0,), (0, 4), (2, 0)], ids=str)
@pytest.mark.parametrize("grad", [True, False])
def test_inputs_of_any_dimension(method: str, case: Case, leading: tuple[int, ...], grad: bool) -> None:
    model = build(method, case)
    if not leading and isinstance(only(model).get_base_layer(), Conv1D):
        leading = (1,)  # Conv1D itself takes no vectors
    x = inputs(case, *leading).requires_grad_(grad)
    y = model(x)
    assert y.shape == (*leading, case.out_features)
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    torch.testing.assert_close(y, merged(x.detach()), rtol=1e-4, atol=1e-5)
    y.square().sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in trainable(model).values())


@pytest.mark.parametrize("grad", [True, False])
def test_integers_are_refused_as_the_layer_itself_refuses_them(method: str, case: Case, grad: bool) -> None:
    model = build(method, case)
    with torch.set_grad_enabled(grad), pytest.raises(TypeError, match=r"was given torch\.int64"):
        model(torch.ones(2, case.in_features, dtype=torch.int64))


def test_inputs_that_are_not_contiguous(method: str, case: Case) -> None:
    # In float64, since the order of a sum depends on the strides.
    model = build(method, case).double()
    dense = torch.randn(case.in_features, 4, 3, dtype=torch.float64)
    for x in (dense.permute(1, 2, 0), dense.permute(2, 1, 0), dense[:1, 0, 0].expand(6, case.in_features)):
        assert not x.is_contiguous()
        if only(model).host.transposed and x.ndim > 2:
            continue  # Conv1D itself takes no such input
        views = [v.detach().requires_grad_() for v in (x, x.contiguous())]
        grads = []
        for view in views:
            model.zero_grad()
            y = model(view)
            # The gradient that comes back is not contiguous either.
            y.transpose(0, -1).square().sum().backward()
            grads.append([p.grad.clone() for p in trainable(model).values()])
        torch.testing.assert_close(views[0].grad, views[1].grad)
        for first, second in zip(*grads, strict=True):
            torch.testing.assert_close(first, second)
        model.zero_grad()
        model(x.detach()).sum().backward()  # an expanded gradient
        torch.testing.assert_close(model(x), model(x.contiguous()))


def test_the_input_and_the_output_may_be_changed_in_place(method: str, case: Case) -> None:
    model = build(method, case)
    x = inputs(case, 4)
    kept = x.clone()
    y = model(x)
    assert torch.equal(x, kept)
    expected = copy.deepcopy(model)
    (2 * expected(kept)).sin().sum().backward()
    y.mul_(2).sin().sum().backward()
    for found, right in zip(trainable(model).values(), trainable(expected).values(), strict=True):
        torch.testing.assert_close(found.grad, right.grad)


# -- dtypes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0.3, 1e-4])
def test_half_precision_applies_the_update_that_is_merged(
    method: str, case: Case, dtype: torch.dtype, size: float
) -> None:
    model = build(method, case, dtype, init_weights=True)
    randomize(model, std=size)
    layer, x = only(model), inputs(case, 64, dtype=dtype)
    assert all(p.dtype == torch.float32 for p in layer.adapter("default").parameters())
    operator = layer.adapter("default")
    if isinstance(operator, SubspaceAdapter):
        expected = x.float() @ layer.host.stored(layer.get_delta_weight("default")).T.float()
        zero = torch.zeros(64, case.out_features, dtype=dtype)
        # Each of the three factors and two products is rounded once.
        factors = operator.factors(dtype, x.device)
        found = subspace_update(x, operator.difference(dtype), zero, factors)
        assert relative_error(found, expected) < 4 * torch.finfo(dtype).eps
    # And what the layer gives is the output of the layer merged in float32, rounded.
    weight = layer.host.matrix().float() + layer.host.stored(layer.get_delta_weight("default"))
    bias = layer.get_base_layer().bias
    exact = nn.functional.linear(x.float(), weight, None if bias is None else bias.float())
    assert relative_error(model(x), exact) < 2 * torch.finfo(dtype).eps
    assert model(x).dtype == dtype


@pytest.mark.parametrize("size", [0.3, 1e-4])
def test_the_operator_keeps_its_precision_under_a_half_precision_base(method: str, case: Case, size: float) -> None:
    """M − I is computed in float32 and rounded once: no cancellation, whatever its size."""
    model = build(method, case, torch.bfloat16, init_weights=True)
    randomize(model, std=size)
    operator = only(model).adapter("default")
    wide = copy.deepcopy(operator).double()
    exact = change(wide, torch.float64)
    assert relative_error(change(operator, torch.bfloat16), exact) < 2**-7
    assert relative_error(change(operator, torch.float32), exact) < (1e-2 if form_of(method)[0] == "hra" else 1e-4)


def change(operator: Adapter, dtype: torch.dtype) -> Tensor:
    """M − I, (n, n), or ΔW, float64, from the tensors in a dtype, without ever adding them to an identity."""
    if isinstance(operator, RotationAdapter):
        tensors = [tensor.double() for tensor in operator.chain_tensors(dtype)]
        if [type(factor) for factor in operator.chain] == [LowRank]:
            return tensors[0] @ tensors[1]
        eye = torch.eye(operator.size, dtype=torch.float64)
        return apply_chain(eye, operator.chain, tensors) - eye
    if isinstance(operator, SharedAdapter):
        d, b = (tensor.double() for tensor in operator.tensors(dtype))
        down, up = operator.matrices(torch.float64, d.device)
        return torch.diag(b) @ up @ torch.diag(d) @ down
    if isinstance(operator, LowRankAdapter):
        down, up = (tensor.double() for tensor in operator.tensors(dtype))
        return up @ down
    return operator.tensors(dtype)[0].double()


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_autocast(method: str, case: Case, base: torch.dtype, given: torch.dtype) -> None:
    model = build(method, case, base)
    x = inputs(case, 6, dtype=given).requires_grad_()
    wide = copy.deepcopy(model).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        assert y.dtype == torch.bfloat16
    y.float().sin().sum().backward()
    expected = wide(x.detach().float())
    assert relative_error(y, expected) < 2e-2
    expected.sin().sum().backward()  # a sum of squares would not change under a rotation of outputs
    for found, right in zip(trainable(model).values(), trainable(wide).values(), strict=True):
        assert found.grad.dtype == torch.float32
        # Outputs are rounded to half precision before they are rotated.
        assert relative_error(found.grad, right.grad) < (8e-2 if method in OF_OUTPUTS else 6e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_model_goes_on(method: str, host: Case, dtype: torch.dtype) -> None:
    model = build(method, host)
    x = inputs(host, 6)
    expected = model(x).detach()
    pins = [basis.stored.clone() for basis in only(model).bases("default")]
    model.to(dtype)
    for basis, pin in zip(only(model).bases("default"), pins, strict=True):
        assert torch.equal(basis.stored, pin)  # what the file holds is not rounded
    assert relative_error(model(x.to(dtype) if x.is_floating_point() else x), expected) < max(tolerance(dtype), 1e-5)
    model.float()
    assert relative_error(model(x), expected) < max(tolerance(dtype), 1e-5)


# -- gradients ---------------------------------------------------------------------------------------------------


def hook_host(model: nn.Module) -> None:
    """Make the host one whose own forward must be called."""
    only(model).get_base_layer().register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("hooked", [True, False])
@pytest.mark.parametrize("needs_input_grad", [True, False])
def test_gradcheck_of_the_whole_layer(method: str, case: Case, hooked: bool, needs_input_grad: bool) -> None:
    model = build(method, case, torch.float64)
    if hooked:
        hook_host(model)
    x = inputs(case, 2, 2, dtype=torch.float64).requires_grad_(needs_input_grad)
    parameters = trainable(model)

    def function(*values: Tensor) -> Tensor:
        named = dict(zip(parameters, values[1:], strict=True))
        return torch.func.functional_call(model, named, (values[0],))

    values = [p.detach().clone().requires_grad_() for p in parameters.values()]
    assert_gradients_are_right(function, x, *values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_fused_and_the_hooked_path_are_equal(method: str, case: Case, dtype: torch.dtype) -> None:
    fused = build(method, case, dtype)
    hooked = copy.deepcopy(fused)
    hook_host(hooked)
    results = []
    for model in (fused, hooked):
        x = torch.linspace(-1, 1, 3 * case.in_features, dtype=dtype).view(3, -1).requires_grad_()
        y = model(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in trainable(model).values())])
    for first, second in zip(*results, strict=True):
        assert relative_error(first, second) < 10 * tolerance(dtype)


@pytest.mark.parametrize("needs_input_grad", [True, False])
def test_gradients_equal_a_plain_torch_twin(method: str, host: Case, needs_input_grad: bool) -> None:
    """The merged weight as a plain function of the parameters, differentiated by torch."""
    model = build(method, host, torch.float64)
    layer = only(model)
    x = inputs(host, 3, 2, dtype=torch.float64)
    needs_input_grad = needs_input_grad and x.is_floating_point()
    x.requires_grad_(needs_input_grad)
    same = x.detach().clone().requires_grad_(needs_input_grad)
    ours = model(x)
    weight, operator = layer.host.matrix(), copy.deepcopy(layer.adapter("default"))
    if isinstance(operator, ComplementAdapter):
        weight = weight + reference_complement(operator, weight, down_of(layer))
    elif isinstance(operator, RestartingAdapter):
        weight = weight + reference_restarting(operator, weight, down_of(layer))
    elif isinstance(operator, SharedAdapter):
        weight = weight + reference_shared(operator, weight)
    elif operator.additive:
        weight = weight + up_of(layer) @ operator.difference().T @ down_of(layer)
    else:
        weight = rotated(operator, weight)
    theirs = with_matrix(layer, weight, same)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    cotangent = torch.randn_like(ours)
    ours.backward(cotangent)
    theirs.backward(cotangent)
    if needs_input_grad:
        torch.testing.assert_close(x.grad, same.grad, rtol=1e-10, atol=1e-11)
    for found, expected in zip(layer.adapter("default").parameters(), operator.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-10)


def test_a_trained_bias_or_weight_of_the_host_gets_its_gradient(method: str, case: Case) -> None:
    model = build(method, case, torch.float64)
    host = only(model).get_base_layer()
    for name in ("bias", "weight"):
        parameter = getattr(host, name)
        if parameter is None:
            continue
        parameter.requires_grad_(True)
        x = inputs(case, 4, dtype=torch.float64).requires_grad_()
        model(x).square().sum().backward()
        assert parameter.grad is not None
        step = torch.zeros_like(parameter)
        step.view(-1)[0] = 1e-6
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                parameter.data += sign * step
                values.append(float(model(x).square().sum()))
                parameter.data -= sign * step
        numeric = (values[0] - values[1]) / 2e-6
        if name == "bias":  # the writer, W Vᵀ, is a constant, so only the bias is a plain sum
            assert float(parameter.grad.view(-1)[0]) == pytest.approx(numeric, rel=1e-4, abs=1e-5)
        parameter.requires_grad_(False)
        parameter.grad = None


# -- several adapters --------------------------------------------------------------------------------------------


def test_two_adapters_active_at_once(method: str, host: Case) -> None:
    model = build(method, host)
    model.add_adapter("other", config(method, host, other=True))
    x, layer = inputs(host, 4), only(model)
    model.base_model.set_adapter(["default", "other"])
    both = model(x)
    expected = with_matrix(layer, merged(layer, ["default", "other"]), x)
    assert relative_error(both, expected) < 1e-5
    both.square().sum().backward()
    assert all(p.grad is not None for name in ("default", "other") for p in layer.adapter(name).parameters())


@pytest.mark.parametrize("second", FORMS)
@pytest.mark.parametrize("hooked", [True, False])
def test_adapters_of_different_methods_compose_in_their_order(
    method: str, host: Case, second: str, hooked: bool
) -> None:
    """A layer holds adapters of several methods; together they are what merging one after the other gives."""
    model = build(method, host, torch.float64)
    layer = only(model)
    layer.update_layer("other", config(second, host, other=True))
    place_adapter("other", [layer])
    layer.eval()
    if hooked:
        hook_host(model)
    x = inputs(host, 2, 4, dtype=torch.float64)
    outputs = []
    for order in (["default", "other"], ["other", "default"]):
        layer._active_adapter = order
        expected = with_matrix(layer, merged_matrix(layer, order), x)
        outputs.append(expected.detach())
        torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-11)
        layer.merge(adapter_names=order)
        torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-11)
        layer.unmerge()
    # Two updates of the same base are a sum, and rotations of different sides meet only in a gain before the outputs'.
    commute = method in UPDATES and second in UPDATES
    sides = {layer.adapter(name).side: layer.adapter(name) for name in ("default", "other")}
    commute = commute or (sides.keys() == {"input", "output"} and sides["input"].gain is None)
    assert (relative_error(outputs[0], outputs[1]) < 1e-10) is commute


def test_switching_disabling_and_deleting(method: str, host: Case) -> None:
    base = OneLayer(host.build())
    x = inputs(host, 4)
    expected = base(x).detach()
    model = get_peft_model(base, config(method, host)).eval()
    first = model(x).detach()
    model.add_adapter("other", config(method, host))
    assert torch.equal(model(x), first)  # adding does not activate
    model.set_adapter("other")
    second = model(x).detach()
    assert relative_error(second, first) > 1e-3
    assert set(trainable(model)) == {n for n, _ in model.named_parameters() if ".other." in n}
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), second)
    model.set_adapter("default")
    assert torch.equal(model(x), first)
    model.delete_adapter("other")
    assert torch.equal(model(x), first)
    assert not [name for name in model.state_dict() if "other" in name]
    assert not [name for name, _ in model.named_modules() if "other" in name.split(".")]
    assert "other" not in repr(only(model))


def test_disabling_while_merged(method: str, host: Case) -> None:
    base = OneLayer(host.build())
    x = inputs(host, 4)
    expected = base(x).detach()
    model = get_peft_model(base, config(method, host)).eval()
    adapted = model(x).detach()
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    assert relative_error(model(x), adapted) < 1e-5


def test_deleting_a_merged_adapter_does_not_break_the_layer(method: str, host: Case) -> None:
    """Whatever deleting does to the merged weight, the base weight and the other adapter must be reachable after."""
    model = build(method, host)
    weight = only(model).host.weight.detach().clone()
    model.add_adapter("other", config(method, host))
    model.set_adapter("other")
    x = inputs(host, 4)
    other = model(x).detach()
    model.merge_adapter(adapter_names=["default"])
    try:
        model.delete_adapter("default")
    except ValueError:
        return  # refusing is as good
    model.merge_adapter(adapter_names=["other"])
    model.unmerge_adapter()
    assert torch.equal(only(model).host.weight, weight)
    assert torch.equal(model(x), other)


# -- mixed batches -----------------------------------------------------------------------------------------------


def one_by_one(model: Any, x: Tensor, names: Sequence[str]) -> list[Tensor]:
    """The output of each sample alone with the adapter named for it, "__base__" for none."""
    outputs = []
    for sample, name in zip(x, names, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                outputs.append(model(sample[None]))
        else:
            model.set_adapter(name)
            outputs.append(model(sample[None]))
    return outputs


@pytest.mark.parametrize("names", [["default", "other", "__base__", "other"], ["__base__"] * 4, ["other"] * 4])
def test_each_sample_of_a_mixed_batch_is_as_if_alone(method: str, host: Case, names: list[str]) -> None:
    model = build(method, host)
    model.add_adapter("other", config(method, host, other=True))
    x = inputs(host, 4, 3)
    expected = one_by_one(model, x, names)
    model.set_adapter("default")
    found = model(x, adapter_names=names)
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x)[:1], model(x[:1]))  # and nothing of it is left


def test_mixed_batches_that_cannot_be_are_refused(method: str, host: Case) -> None:
    model = build(method, host)
    x = inputs(host, 2)
    with pytest.raises(ValueError, match="'unknown'"):
        model(x, adapter_names=["default", "unknown"])
    with pytest.raises(ValueError, match=r"3 entries .* 2"):
        model(x, adapter_names=["default"] * 3)
    with pytest.raises(ValueError, match="eval"):
        model.train()(x, adapter_names=["default"] * 2)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="unmerge"):
        model(x, adapter_names=["default"] * 2)
    model.unmerge_adapter()
    model(x, adapter_names=["default"] * 2)


# -- cost --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"])
@pytest.mark.parametrize("host", ["wide", "tall", "square", "conv1d-wide"])
def test_kept_for_backward_is_one_tokens_times_rank_or_side(method: str, host: str, dtype: Any) -> None:
    """Beyond what the frozen layer keeps: tokens × r for an update, tokens × n for a rotation, and the operator."""
    case, tokens = HOSTS[host], 200
    autocast = dtype == "autocast"
    kind = torch.float32 if autocast else dtype
    width = 4 if kind == torch.float32 and not autocast else 2
    base = OneLayer(case.build().to(kind)).requires_grad_(False)
    x = inputs(case, tokens, dtype=kind)

    def kept(model: nn.Module) -> int:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            hidden = torch.ones_like(x).requires_grad_() * x
            with Kept(model) as saved:
                model(hidden)
        return saved.nbytes

    frozen = kept(base)
    model = get_peft_model(base, config(method, case)).eval()
    extra = kept(model) - frozen
    layer = only(model)
    # What M is made of, and a copy of it in another dtype; a gain, and a copy of it.
    operator = sum(8 * t.numel() for t in layer.adapter("default").tensors()) + 8 * case.out_features
    if isinstance(layer.adapter("default"), SubspaceAdapter):
        assert tokens * RANK * width <= extra <= tokens * RANK * width + operator
    else:
        assert extra <= layer.adapter("default").kept(case.in_features) * tokens * width + operator


@pytest.mark.parametrize("build_model", [tiny_opt, tiny_llama])
def test_kept_for_backward_in_a_whole_model(method: str, build_model: Callable[..., nn.Module]) -> None:
    tokens = torch.randint(4, 90, (4, 32))
    frozen = build_model(layers=3).requires_grad_(False)
    embedded = frozen.get_input_embeddings()(tokens)

    def kept(model: nn.Module) -> int:
        with Kept(model) as saved:
            model(inputs_embeds=embedded.clone().requires_grad_())
        return saved.nbytes

    before = kept(frozen)
    model = adapt(frozen, config(method, Case(nn.Identity, 8, 8), target_modules="all-linear"))
    layers = layers_of(model)
    extra = kept(model) - before
    shared: dict[str, int] = {}
    for layer in layers:
        for tensor in layer.adapter("default").tensors():
            extra -= 2 * 4 * tensor.numel()
        extra -= 2 * 4 * layer.out_features
        block, _, name = layer.key.rpartition(".")
        own = layer.adapter("default").kept(layer.in_features)
        if layer.adapter("default").additive:
            products = layer.adapter("default").kept(0)  # all but the input
            shared[layer.key], own = products, own - products
        elif layer.adapter("default").side == "output":
            shared[layer.key], own = own, 0
        if own:  # q, k and v read the same input, and so do gate and up
            together = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "mlp", "up_proj": "mlp"}
            shared[f"{block}.{together.get(name, name)} reads"] = own
    assert extra <= tokens.numel() * sum(shared.values()) * 4


@pytest.mark.parametrize("grad", [True, False])
def test_at_most_ten_operations_a_layer(method: str, case: Case, grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(method, case)
    layer, x = only(model), inputs(case, 8).requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        tensors = layer.adapter("default").tensors()  # the one evaluation belongs to the model, not to the layer
        monkeypatch.setattr(layer.adapter("default"), "tensors", lambda dtype: tensors)
        with Operations() as operations:
            layer(x)
    assert len(operations.names) <= 10, operations.names


def test_a_training_step_under_fake_tensors(method: str, host: Case) -> None:
    with FakeTensorMode():
        model = get_peft_model(OneLayer(host.build()), config(method, host, init_weights=True)).train()
        optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.1)
        for _ in range(2):
            y = model(inputs(host, 4))
            assert y.shape[0] == 4
            y.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()


# -- at run time -------------------------------------------------------------------------------------------------


def dropping(method: str, host: Case) -> dict[str, Any]:
    """Options with which a method drops at random on a host, if it can."""
    folds = host.sample is not None  # there the update's input is not seen, so that nothing of it can be dropped
    return {} if method in ("psoft", "oplora", "uora") and folds else DROPOUT.get(form_of(method)[0], {})


def test_who_reads_an_adapter_in_train_mode_drops_nothing(method: str, host: Case) -> None:
    """A trainer leaves a model in train mode."""
    model = build(method, host, **dropping(method, host))
    layer, x = only(model), inputs(host, 5)
    adapter, expected = layer.adapter("default"), model(x).detach()

    def read() -> dict[str, Tensor]:
        found = {"delta": layer.get_delta_weight("default")}
        if isinstance(adapter, Operator):
            found["M"] = adapter.matrix().detach()
        if layer.supports_lora_conversion("default"):
            found["low rank"] = torch.cat([factor.flatten() for factor in layer.low_rank("default")])
        before, after = turned_weights(layer, "default")
        return {**found, "before": before, "after": after}

    right = read()
    model.train()
    for _ in range(4):
        for name, found in read().items():
            assert torch.equal(found, right[name]), name
    if form_of(method)[0] not in ("hra", "qgoft", "oplora", "rosa", "peso", "uora"):  # which have no mean
        model.add_adapter("other", config(method, host, **dropping(method, host)))
        model.base_model.add_weighted_adapter(["default", "other"], [1.0, 0.0], "mean")
        torch.testing.assert_close(layer.get_delta_weight("mean"), right["delta"], rtol=1e-4, atol=1e-5)
        model.set_adapter("default")
    model.train().merge_adapter()
    assert relative_error(model(x).detach(), expected) < 1e-5
    model.unmerge_adapter()
    assert relative_error(model.train().merge_and_unload().eval()(x).detach(), expected) < 1e-5


def nothing(model: Any, x: Tensor) -> None:
    """Between a forward pass and its backward."""


def another_pass(model: Any, x: Tensor) -> None:
    model(x)


def a_pass_without_gradients(model: Any, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


def an_evaluation(model: Any, x: Tensor) -> None:
    with torch.inference_mode():
        model.eval()(x)
    model.train()


def the_base_as_reference(model: Any, x: Tensor) -> None:
    with torch.no_grad(), model.disable_adapter():
        model.eval()(x)
    model.train()


def another_adapter(model: Any, x: Tensor) -> None:
    model.set_adapter("other")
    model(x).sin().sum().backward()
    model.set_adapter("default")


def averaged_parameters(model: Any, x: Tensor) -> None:
    """An evaluation of an exponential moving average, swapped in and out through `data`."""
    own = {name: p.data.clone() for name, p in trainable(model).items()}
    for parameter in trainable(model).values():
        parameter.data.mul_(0.5)
    a_pass_without_gradients(model, x)
    for name, parameter in trainable(model).items():
        parameter.data.copy_(own[name])


BETWEEN = [nothing, another_pass, a_pass_without_gradients, an_evaluation, the_base_as_reference]
BETWEEN += [another_adapter, averaged_parameters]


@pytest.mark.parametrize("mode", CHECKPOINTING[1:])
@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("passes", [1, 2])
def test_checkpointing_with_dropout_changes_no_gradient(
    method: str, host: Case, mode: str, between: Callable[[Any, Tensor], None], passes: int
) -> None:
    """Whatever runs before backward, and with accumulated passes."""
    plain = build(method, host, **dropping(method, host))
    plain.add_adapter("other", config(method, host))
    x, found = inputs(host, 5), []
    anchor = torch.zeros(1, requires_grad=True)  # re-entrant checkpointing asks for an input with a gradient
    for each, how in ((copy.deepcopy(plain).train(), mode), (plain.train(), None)):
        torch.manual_seed(3)
        for _ in range(passes):
            y = checkpointed(how, lambda x, anchor, each=each: each.get_base_model()(x) + anchor, x, anchor)
            between(each, x)
            y.sin().sum().backward()
        found.append(dict(each.named_parameters()))
    for name, parameter in found[1].items():
        if ".default." in name:
            torch.testing.assert_close(found[0][name].grad, parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_first_under_inference_mode_then_differentiated(method: str, host: Case, frozen: bool) -> None:
    model, x = build(method, host), inputs(host, 4)
    twin = copy.deepcopy(model)
    model.requires_grad_(not frozen)
    with torch.inference_mode():
        model(x)
    if x.is_floating_point():
        x.requires_grad_()
        model(x).sin().sum().backward()
        found = x.grad.clone()
        x.grad = None
        twin(x).sin().sum().backward()
        assert relative_error(found, x.grad) < 1e-5
    model.set_adapter("default")
    model(x).sin().sum().backward()
    assert all(p.grad is not None for p in trainable(model).values())


# -- quantised hosts ---------------------------------------------------------------------------------------------

WIDE = Case(lambda: nn.Linear(64, 40), 64, 40)


def build_packed(method: str, packed: str, **options: Any) -> Any:
    """As `build`, on a quantised layer."""
    base = quantise(OneLayer(WIDE.build()), packed)
    return get_peft_model(base, config(method, WIDE, **options)).eval()


def twin_of(model: Any, method: str, **options: Any) -> Any:
    """The same adapter on the dequantised layer."""
    layer = only(model)
    plain = nn.Linear(64, 40)
    plain.load_state_dict({"weight": layer.unmerged_matrix(), "bias": layer.get_base_layer().bias})
    twin = get_peft_model(OneLayer(plain), config(method, WIDE, **options))
    twin.load_state_dict({name: t for name, t in model.state_dict().items() if "isotune" in name}, strict=False)
    return twin.train(model.training)


def bits(model: Any) -> dict[str, bytes]:
    """Every byte that the base layer holds, those inside of tensor subclasses too."""
    found: dict[str, bytes] = {}
    for name, tensor in only(model).get_base_layer().state_dict().items():
        flatten = getattr(tensor, "__tensor_flatten__", None)
        inner = {name: tensor} if flatten is None else {f"{name}.{n}": getattr(tensor, n) for n in flatten()[0]}
        for key, value in inner.items():
            found[key] = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return found


def requantising() -> Any:
    """Merging must say what quantising again has changed."""
    return pytest.warns(IsotuneWarning, match="quantised again")


@pytest.mark.parametrize("training", [True, False])
def test_quantised_identity_at_the_start(method: str, packed: str, training: bool) -> None:
    base = quantise(OneLayer(WIDE.build()), packed).train(training)
    x = inputs(WIDE, 3, 4)
    expected = base(x).detach()
    options = config(method, WIDE, init_weights=True, **EXACT_START.get(form_of(method)[0], {}))
    model = get_peft_model(base, options).train(training)
    # HRA's reflections cancel up to rounding, which may tip the rounding of an input to 8 bits.
    limit = 0.0 if form_of(method)[0] != "hra" else 1e-6 if training or packed != "bitsandbytes-int8" else 1e-2
    assert relative_error(model(x).detach(), expected) <= limit
    with torch.no_grad():
        assert relative_error(model(x), expected) <= limit


def test_quantised_equals_the_dequantised_twin_with_its_gradients(method: str, packed: str) -> None:
    model = build_packed(method, packed).train()
    twin = twin_of(model, method)
    cotangent = torch.randn(3, 2, 40)
    results = []
    for one in (model, twin):
        torch.manual_seed(1)
        x = inputs(WIDE, 3, 2).requires_grad_()
        y = one(x)
        y.backward(cotangent)
        results.append([y, x.grad, *(p.grad for p in trainable(one).values())])
    for found, expected in zip(*results, strict=True):
        assert relative_error(found.detach(), expected.detach()) < 1e-5
    model.zero_grad()
    model(inputs(WIDE, 3)).sum().backward()  # a first layer, whose input needs no gradient
    assert all(p.grad is not None for p in trainable(model).values())


def test_quantised_weights_are_not_dequantised_by_a_forward(
    method: str, packed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_packed(method, packed)
    model(inputs(WIDE, 3))
    backend = type(only(model).host.backend)
    monkeypatch.setattr(backend, "get_base_weight", lambda *_: pytest.fail("dequantised"))
    for training in (True, False):
        model.train(training)
        model(inputs(WIDE, 3).requires_grad_()).sum().backward()
        with torch.no_grad():
            model(inputs(WIDE, 3))


@pytest.mark.parametrize("safe_merge", [True, False])
def test_quantised_merge_is_reported_and_unmerge_restores_the_bits(method: str, packed: str, safe_merge: bool) -> None:
    model = build_packed(method, packed)
    layer, x = only(model), inputs(WIDE, 5, 4)
    before, weight, expected = bits(model), layer.host.weight, model(x).detach()
    wanted = merged(layer, ["default"])
    with requantising():
        model.merge_adapter(safe_merge=safe_merge)
    assert layer.merged
    assert bits(model) != before
    error = relative_error(layer.host.matrix(), wanted)
    assert error == pytest.approx(layer.requantised.of_weight, rel=1e-3)
    update = relative_error(layer.host.matrix() - wanted + layer.unmerged_matrix(), layer.unmerged_matrix())
    assert layer.requantised.of_update == pytest.approx(
        update * float(layer.unmerged_matrix().norm() / (wanted - layer.unmerged_matrix()).norm()), rel=1e-3
    )
    assert 0 < error < QUANTISERS[packed].residue
    assert relative_error(model(x).detach(), expected) < 1.5 * QUANTISERS[packed].residue
    model.unmerge_adapter()
    assert layer.requantised is None
    assert layer.host.weight is weight
    assert bits(model) == before
    assert torch.equal(model(x), expected)


def test_quantised_layers_given_back(method: str, packed: str) -> None:
    model = build_packed(method, packed)
    x, layer = inputs(WIDE, 5), only(model).get_base_layer()
    expected, before = model(x).detach(), bits(model)
    with requantising():
        merged = copy.deepcopy(model).merge_and_unload()
    assert type(merged.layer) is type(layer)
    assert not [name for name, _ in merged.named_parameters() if "isotune" in name]
    assert relative_error(merged(x).detach(), expected) < 1.5 * QUANTISERS[packed].residue
    assert bits(model) == before  # the copy has its own
    assert model.unload().layer is layer


def test_quantised_disabling_and_switching(method: str, packed: str) -> None:
    base = quantise(OneLayer(WIDE.build()), packed).eval()
    x = inputs(WIDE, 4)
    expected = base(x).detach()
    model = get_peft_model(base, config(method, WIDE)).eval()
    first = model(x).detach()
    model.add_adapter("other", config(method, WIDE, other=True))
    model.set_adapter("other")
    second = model(x).detach()
    assert relative_error(second, first) > 1e-3
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    model.set_adapter("default")
    assert torch.equal(model(x), first)
    with requantising():
        model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    model.delete_adapter("other")
    model.unmerge_adapter() if only(model).merged else None
    assert torch.equal(model(x), first)


@pytest.mark.parametrize("second", FORMS)
def test_quantised_two_adapters_at_once(method: str, packed: str, second: str) -> None:
    model = build_packed(method, packed)
    layer = only(model)
    layer.update_layer("other", config(second, WIDE, other=True))
    place_adapter("other", [layer])
    layer.train()
    x = inputs(WIDE, 4)
    for order in (["default", "other"], ["other", "default"]):
        layer._active_adapter = order
        expected = nn.functional.linear(x, merged_matrix(layer, order), layer.get_base_layer().bias)
        assert relative_error(layer(x).detach(), expected.detach()) < 1e-5
        layer.merge(adapter_names=order)
        assert relative_error(layer(x).detach(), expected.detach()) < 1.5 * QUANTISERS[packed].residue
        layer.unmerge()


def test_quantised_an_adapter_added_while_another_is_merged_is_of_the_base(method: str, packed: str) -> None:
    model = build_packed(method, packed)
    with requantising():
        model.merge_adapter()
    torch.manual_seed(9)
    model.add_adapter("late", config(method, WIDE))
    found = only(model).get_delta_weight("late")
    model.unmerge_adapter() if only(model).merged else None
    torch.manual_seed(9)
    model.add_adapter("early", config(method, WIDE))
    assert torch.equal(found, only(model).get_delta_weight("early"))


def test_quantised_each_sample_of_a_mixed_batch_is_as_if_alone(method: str, packed: str) -> None:
    model = build_packed(method, packed)
    model.add_adapter("other", config(method, WIDE, other=True))
    x, names = inputs(WIDE, 4, 3), ["default", "other", "__base__", "other"]
    expected = one_by_one(model, x, names)
    found = model(x, adapter_names=names)
    # Where inputs are rounded to 8 bits, the last bit of a rotation may tip one of them.
    limit = 1e-2 if QUANTISERS[packed].rounds_inputs else 1e-5
    assert relative_error(found.detach(), torch.cat(expected).detach()) < limit


@pytest.mark.parametrize("basis", ["pinned", "embedded"])
def test_quantised_save_and_load(method: str, packed: str, basis: str, tmp_path: Path) -> None:
    options = with_basis(method, basis)
    base = quantise(OneLayer(WIDE.build()), packed)
    again = copy.deepcopy(base).eval()
    model = get_peft_model(base, config(method, WIDE, **options)).eval()
    model.save_pretrained(tmp_path)
    x = inputs(WIDE, 6)
    loaded = PeftModel.from_pretrained(again, tmp_path).eval()
    assert relative_error(loaded(x).detach(), model(x).detach()) < 1e-4
