"""BOFT: the butterfly by the definition, that every m is real, the gain, refusals, and dropout over factors."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import TensorWeakRef

from helpers import adapt, assert_same_gradients, layers_of, trainable
from isotune.algebra.butterfly import butterfly_blocks
from isotune.algebra.cayley import CayleyMap
from isotune.algebra.factors import apply_chain
from isotune.experiments.measure import kept_bytes
from isotune.methods import BOFTConfig
from isotune.methods.boft import BOFTOperator
from isotune.methods.oft import OFTOperator
from rotation_checks import (
    assert_is,
    assert_orthogonal,
    bare,
    cayley,
    diagonal_blocks,
    fill,
    fillings,
    maps_of,
    orthogonality_error,
)

# -- the operator --------------------------------------------------------------------------------------------------


def definition(operator: BOFTOperator, kept: Tensor | None = None) -> Tensor:
    """B_m ⋯ B₂ B₁, each as a whole matrix; blocks that `kept` (m, n / b) has as 0 are the identity."""
    size, n, generator = operator.block_size, operator.size, operator.generator
    product = torch.eye(n, dtype=generator.dtype)
    for stage in range(len(generator)):
        if stage == 0:
            places = [list(range(start, start + size)) for start in range(0, n, size)]
        else:
            # Chunks of b / 2 that lie 2^(m − 1) chunks apart make one block.
            half, apart = size // 2, 2**stage
            firsts = [chunk for chunk in range(n // half) if chunk // apart % 2 == 0]
            places = [[c * half + k for c in (first, first + apart) for k in range(half)] for first in firsts]
        factor = torch.eye(n, dtype=generator.dtype)
        for block, place in enumerate(places):
            if size == 1 or (kept is not None and not kept[stage, block]):
                continue
            index = torch.tensor(place)
            factor = factor.index_put((index[:, None], index[None, :]), cayley(generator[stage, block], size))
        product = factor @ product
    return product


SHAPES = [
    (12, 4, 1),
    (9, 3, 1),
    (24, 4, 2),
    (8, 2, 3),
    (24, 6, 3),
    (16, 4, 3),
    (16, 2, 4),
    (10, 10, 1),
    (128, 4, 6),
]  # the last is folded into two


@pytest.mark.parametrize(("n", "size", "stages"), SHAPES)
def test_operator_is_the_definition(n: int, size: int, stages: int) -> None:
    operator = BOFTOperator(n, 5, CayleyMap(size), stages).double()
    assert torch.equal(operator.matrix(), torch.eye(n).double())
    assert operator.is_identity()
    fill(operator, "uniform", 0.6, seed=1)
    assert not operator.is_identity()
    assert_is(operator, lambda: definition(operator))


@given(
    filling=fillings(), shape=st.sampled_from([(24, 3, 1), (48, 8, 2), (64, 8, 4), (64, 4, 5), (32, 2, 5), (64, 16, 3)])
)
def test_exactly_orthogonal(filling: tuple[str, float, int], shape: tuple[int, int, int]) -> None:
    n, size, stages = shape
    operator = BOFTOperator(n, 5, CayleyMap(size), stages)
    fill(operator, *filling)
    assert_orthogonal(operator)


def test_a_gain_alone_is_no_identity() -> None:
    operator = BOFTOperator(8, 3, CayleyMap(4), 2)
    with torch.no_grad():
        operator.output_gain[1] = 0.5
    assert not operator.is_identity()
    assert torch.equal(operator.matrix(), torch.eye(8))


# -- the number of factors -----------------------------------------------------------------------------------------


def test_one_factor_is_oft_with_a_gain() -> None:
    layer = nn.Linear(12, 7)
    model = adapt(nn.Sequential(layer), BOFTConfig(boft_block_size=4, target_modules=["0"], init_weights=False))
    ours = layers_of(model)[0].adapter("default")
    oft = OFTOperator(4, 3)
    with torch.no_grad():
        oft.generator.copy_(ours.generator[0])
    torch.testing.assert_close(ours.matrix(), oft.matrix(), rtol=0, atol=1e-7)
    x = torch.randn(5, 12)
    # The gain scales what W gives, and not the bias.
    expected = nn.functional.linear(x @ oft.matrix(), ours.output_gain[:, None] * layer.weight, layer.bias)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("n", "size"), [(32, 4), (32, 8), (32, 16), (16, 2)])
def test_every_factor_is_real(n: int, size: int) -> None:
    """Each reaches twice as many inputs, each differs from the one before, and log₂(2n/b) of them reach all."""
    dense, before = round(math.log2(2 * n / size)), None
    for stages in range(1, dense + 1):
        torch.manual_seed(0)
        config = BOFTConfig(boft_block_size=size, boft_n_butterfly_factor=stages)
        model = bare(config, n, dtype=torch.float64)
        operator = layers_of(model)[0].adapter("default")
        assert operator.generator.shape == (stages, n // size, size * (size - 1) // 2)
        fill(operator, "uniform", 1.0, seed=4)  # the same first stages for every m
        matrix = maps_of(model, n, torch.float64)[0].detach()
        reached = (matrix.abs() > 1e-9).sum(1)
        assert torch.equal(reached, torch.full_like(reached, size * 2 ** (stages - 1)))
        assert before is None or float((matrix - before).abs().max()) > 1e-2
        before = matrix
    assert before is not None
    assert bool((before.abs() > 1e-9).all())


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_factor_is_trained(stage: int) -> None:
    model = bare(BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=3, init_weights=False), 32)
    maps = maps_of(model, 32)
    (maps * torch.randn_like(maps)).sum().backward()
    gradient = layers_of(model)[0].adapter("default").generator.grad
    assert bool((gradient[stage] != 0).all())


# -- the gain ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_the_gain_is_trained(bias: bool) -> None:
    layer = nn.Linear(8, 5, bias=bias)
    x, weight = torch.randn(6, 8), layer.weight.detach().clone()
    model = adapt(nn.Sequential(layer), BOFTConfig(target_modules=["0"]))
    (name,) = (name for name in trainable(model) if name.endswith("output_gain"))
    gain = trainable(model)[name]
    assert torch.equal(gain, torch.ones(5))
    cotangent = torch.randn(6, 5)
    (model(x) * cotangent).sum().backward()
    torch.testing.assert_close(gain.grad, (cotangent * (x @ weight.T)).sum(0), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        gain.copy_(torch.tensor([2.0, -1.0, 0.0, 1.0, 0.5]))
    expected = gain * (x @ weight.T) + (layer.bias if bias else 0)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


# -- sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_input_has_its_gradient_where_the_gain_is_frozen(dtype: torch.dtype) -> None:
    """The gain is float32, and the layer's product stays in the dtype of the layer."""
    torch.manual_seed(0)
    model = adapt(
        nn.Sequential(nn.Linear(16, 24, bias=False)).to(dtype), BOFTConfig(boft_block_size=4, target_modules=["0"])
    )
    (layer,) = layers_of(model)
    layer.adapter("default").randomize_parameters()
    x = torch.randn(5, 16, dtype=dtype, requires_grad=True)
    seen = []
    for train_gain in (True, False):
        layer.adapter("default").output_gain.requires_grad_(train_gain)
        (gradient,) = torch.autograd.grad(model(x).float().square().sum(), x)
        seen.append(gradient)
    assert seen[0].dtype == dtype
    assert torch.equal(*seen)


@pytest.mark.parametrize(
    ("options", "width", "size"),
    [({}, 24, 4), ({"boft_block_size": 6}, 24, 6), ({"boft_block_num": 6}, 24, 4), ({"boft_block_num": 1}, 7, 7)],
    ids=str,
)
def test_the_block_size_follows_from_what_is_given(options: dict[str, Any], width: int, size: int) -> None:
    operator = layers_of(bare(BOFTConfig(**options), width))[0].adapter("default")
    assert operator.generator.shape == (1, width // size, size * (size - 1) // 2)


@pytest.mark.parametrize(
    ("options", "width", "message"),
    [
        ({"boft_n_butterfly_factor": 4}, 48, r"=4 is too large for 'layers\.0' with 48 inputs .* 4: .* at most 3\."),
        ({"boft_block_size": 8, "boft_n_butterfly_factor": 9}, 64, r"=9 is too large .* m may be at most 4\."),
        ({"boft_block_size": 2, "boft_n_butterfly_factor": 2}, 6, r"m may be at most 1\."),
        ({"boft_block_size": 3, "boft_n_butterfly_factor": 2}, 48, r"blocks of 3: the size must be even .*at most 1\."),
        ({"boft_block_num": 16, "boft_n_butterfly_factor": 2}, 48, r"blocks of 3: the size must be even"),
        ({"boft_block_size": 5}, 24, r"boft_block_size=5 does not divide the 24 inputs .* 4 or 6\."),
        ({"boft_block_num": 7}, 24, r"boft_block_num=7 does not divide the 24 inputs .* 6 or 8\."),
        ({}, 10, r"boft_block_size=4 does not divide the 10 inputs .* 2 or 5\."),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, Any], width: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bare(BOFTConfig(**options), width)


@pytest.mark.parametrize(("size", "width"), [(4, 48), (8, 64), (2, 6), (3, 48), (6, 36), (12, 12)])
def test_the_largest_number_of_factors_that_is_named_fits(size: int, width: int) -> None:
    with pytest.raises(ValueError, match="at most") as refused:
        bare(BOFTConfig(boft_block_size=size, boft_n_butterfly_factor=30), width)
    most = int(str(refused.value).split("at most ")[1].split(".")[0])
    model = bare(BOFTConfig(boft_block_size=size, boft_n_butterfly_factor=most, init_weights=False), width)
    assert orthogonality_error(maps_of(model, width)[0] / layers_of(model)[0].adapter("default").gain) < 1e-5
    with pytest.raises(ValueError, match=f"={most + 1} is too large"):
        bare(BOFTConfig(boft_block_size=size, boft_n_butterfly_factor=most + 1), width)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"boft_block_size": 4, "boft_block_num": 6}, "boft_block_size=4 and boft_block_num=6 are both given"),
        ({"boft_block_size": -4}, "boft_block_size=-4 .*at least 1"),
        ({"boft_block_num": 2.5}, r"boft_block_num=2\.5 .*integer"),
        ({"boft_n_butterfly_factor": 0}, "boft_n_butterfly_factor=0 .*at least 1"),
        ({"boft_n_butterfly_factor": True}, "boft_n_butterfly_factor=True"),
        ({"boft_dropout": 1.0}, r"boft_dropout=1\.0 .*\[0, 1\)"),
        ({"boft_dropout": -0.5}, r"boft_dropout=-0\.5 .*\[0, 1\)"),
        ({"boft_dropout": 0.1, "boft_dropout_factors": 0.0}, r"boft_dropout_factors=0\.0 .*\(0, 1\]"),
        ({"boft_dropout": 0.1, "boft_dropout_factors": 1.5}, r"boft_dropout_factors=1\.5 .*\(0, 1\]"),
        ({"boft_dropout_factors": 0.5}, "boft_dropout_factors has no effect with boft_dropout=0"),
    ],
    ids=str,
)
def test_values_without_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BOFTConfig(**options)


# -- dropout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factors", [1.0, 0.5])
def test_dropout_is_over_factors_and_over_their_blocks(factors: float, monkeypatch: pytest.MonkeyPatch) -> None:
    operator = BOFTOperator(64, 3, CayleyMap(4), 5, (0.4, factors))
    drawn: list[Tensor] = []
    monkeypatch.setattr("isotune.methods.boft.butterfly_blocks", lambda blocks, size: drawn.append(blocks))
    for _ in range(600):
        operator.complete((torch.ones(5, 16, 4, 4),), drop=True)
    assert {len(blocks.flatten(-2).unique(dim=-1).T) for blocks in drawn} <= {1, 2}  # whole blocks
    noise = torch.stack(drawn)[..., 0, 0]
    assert noise.unique().tolist() == [0, 1]
    # Of 3000 factors a share has blocks dropped (0.6^16 is none), and in those 0.4 of the blocks.
    touched = (noise == 0).any(-1)
    assert abs(float(touched.float().mean()) - factors) < 0.03
    assert abs(float((noise[touched] == 0).float().mean()) - 0.4) < 0.02
    # Each factor is chosen for itself: at one half, all five alike in 1 of 16 evaluations.
    assert factors == 1.0 or float((touched.any(1) & ~touched.all(1)).float().mean()) > 0.85


def test_dropped_blocks_are_the_identity_and_the_others_what_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = BOFTOperator(16, 3, CayleyMap(4), 3, (0.4, 0.7)).double().train()
    fill(operator, "uniform", 1.0, seed=0)
    (blocks,) = operator.evaluate(dict(operator.named_parameters()))
    drawn: list[Tensor] = []

    def fold(stages: Tensor, size: int) -> tuple[Tensor, ...]:
        drawn.append(stages)
        return butterfly_blocks(stages, size)

    monkeypatch.setattr("isotune.methods.boft.butterfly_blocks", fold)
    for _ in range(6):
        tensors = operator.complete((blocks,), drop=True)
        kept = drawn[-1].flatten(-2).any(-1).double()
        assert torch.equal(drawn[-1], blocks * kept[..., None, None])
        found = apply_chain(torch.eye(16).double(), operator.chain, tensors)
        torch.testing.assert_close(found, definition(operator, kept), rtol=1e-10, atol=1e-11)
    assert len({tuple(stages.flatten().tolist()) for stages in drawn}) > 1


def test_dropout_in_training_only() -> None:
    config = BOFTConfig(boft_block_size=4, boft_dropout=0.3, init_weights=False)
    model, off = bare(config, 128, layers=8), None
    with torch.no_grad():  # so that a dropped block is exactly the identity
        for layer in layers_of(model):
            layer.adapter("default").output_gain.fill_(1.0)
    whole = maps_of(model, 128).detach()
    assert not (diagonal_blocks(whole, 4) == torch.eye(4)).flatten(-2).all(-1).any()
    for grad in (True, False):
        model.train()
        with torch.set_grad_enabled(grad):
            blocks = diagonal_blocks(maps_of(model, 128).detach(), 4)
            off = (blocks == torch.eye(4)).flatten(-2).all(-1)
            assert abs(float(off.float().mean()) - 0.3) < 0.09  # 256 blocks: three standard deviations
            assert len({tuple(row.tolist()) for row in off}) == 8
            assert torch.equal(maps_of(model.eval(), 128).detach(), whole)


@pytest.mark.parametrize("factors", [1.0, 0.5])
def test_masks_follow_from_the_seed(factors: float) -> None:
    config = BOFTConfig(boft_n_butterfly_factor=3, boft_dropout=0.4, boft_dropout_factors=factors, init_weights=False)
    model, results = bare(config, 64).train(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(maps_of(model, 64).detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


# -- what a gain and a chain cost in backward ----------------------------------------------------------------------


class Followed(nn.Module):
    """Layers, each followed by what keeps its output for backward or does not, or writes to it."""

    AFTER: ClassVar[dict[str, Callable[[Tensor], Tensor]]] = {
        "kept": nn.functional.silu,
        "not kept": lambda y: 2 * y,
        "overwritten": lambda y: nn.functional.silu(y.mul_(0.5)),
        "overwritten later": lambda y: nn.functional.relu(y, inplace=True),
    }

    def __init__(self, after: str, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=bias, dtype=dtype) for _ in range(3))
        self.after = self.AFTER[after]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.after(layer(x))
        return x


class Products(TorchDispatchMode):
    """Counts products of two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("least", [0.5, 0.05, 0.0], ids="gain>={}".format)
@pytest.mark.parametrize(("bias", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)])
@pytest.mark.parametrize("after", list(Followed.AFTER))
def test_the_gradient_of_a_gain_whatever_follows_the_layer(
    after: str, bias: bool, dtype: torch.dtype, least: float
) -> None:
    config = BOFTConfig(target_modules="all-linear", boft_n_butterfly_factor=2, init_weights=False)
    model = adapt(Followed(after, bias, dtype), config)
    with torch.no_grad():
        for layer in layers_of(model):
            layer.adapter("default").output_gain.uniform_(-2, 2).clamp_(min=least)
            layer.adapter("default").output_gain[0] = least
    x = torch.randn(8, 16, dtype=dtype).requires_grad_()
    loss = model(x).float().square().sum()
    with Products() as products:
        loss.backward()
    assert products.count == 6  # of each layer the gradient of its input, the gain's, and the host's product again

    reference = copy.deepcopy(model).float()
    reference.zero_grad()
    merged = copy.deepcopy(x.detach().float())
    for layer in layers_of(reference):
        operator = layer.adapter("default")
        host = layer.get_base_layer()
        merged = operator.output_gain * (merged @ operator.matrix() @ host.weight.T) + (host.bias if bias else 0)
        merged = reference.get_base_model().after(merged)
    merged.square().sum().backward()
    assert_same_gradients(model, reference, 1e-5 if dtype == torch.float32 else 3e-2)


def test_an_output_written_to_after_the_forward_pass_is_not_read() -> None:
    model = adapt(nn.Sequential(nn.Linear(16, 16)), BOFTConfig(target_modules=["0"], init_weights=False))
    x, held = torch.randn(8, 16).requires_grad_(), []
    cotangent = torch.randn(8, 16)
    model.get_base_model()[0].register_forward_hook(lambda module, args, output: held.append(output.detach()))
    outputs = [model(x), model(x)]
    held[1].zero_()
    (gain,) = (p for name, p in model.named_parameters() if name.endswith("output_gain"))
    found = [torch.autograd.grad(output, gain, cotangent)[0] for output in outputs]
    assert bool(found[0].any())
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_what_is_kept_for_backward_does_not_grow_with_the_factors() -> None:
    x = torch.randn(32, 64).requires_grad_()

    def kept(factors: int) -> int:
        model = bare(BOFTConfig(boft_n_butterfly_factor=factors, init_weights=False), 64, layers=3)
        return kept_bytes(model, lambda: model(x))

    def fixed(factors: int) -> int:
        model = bare(BOFTConfig(boft_n_butterfly_factor=factors, init_weights=False), 64, layers=3)
        return kept_bytes(model, lambda: model(torch.empty(0, 64).requires_grad_()))

    # All three layers read one x, which is kept once, whatever the factors; what the operators keep is fixed.
    assert {kept(factors) - fixed(factors) for factors in (1, 2, 3, 4)} == {x.nbytes}


def test_gradients_are_those_of_the_forward_pass_after_a_parameter_has_changed() -> None:
    model = bare(BOFTConfig(init_weights=False), 16)
    expected = torch.autograd.grad(maps_of(model, 16).square().sum(), trainable(model).values())
    output = maps_of(model, 16)
    with torch.no_grad():
        layers_of(model)[0].adapter("default").generator.add_(0.1)
    found = torch.autograd.grad(output.square().sum(), trainable(model).values())
    assert all(map(torch.equal, found, expected))


def test_a_loss_that_is_held_holds_no_outputs() -> None:
    model = adapt(Followed("kept", False, torch.float32), BOFTConfig(target_modules="all-linear", init_weights=False))
    outputs: list[TensorWeakRef] = []
    for layer in layers_of(model):
        layer.register_forward_hook(lambda module, args, output: outputs.append(TensorWeakRef(output)))
    loss = model(torch.randn(8, 16).requires_grad_()).square().sum()
    storages = [StorageWeakRef(output().untyped_storage()) for output in outputs[:-1]]
    assert not any(storage.expired() for storage in storages)
    loss.backward()
    assert all(storage.expired() for storage in storages)
    assert loss.grad_fn is not None
