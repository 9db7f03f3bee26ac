"""OFT and COFT: the operator by the definition, block sizes, dropout of blocks, the bound, and the Neumann series."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

import isotune.methods.checks
from helpers import adapt, assert_same_gradients, gradients, layers_of, randomize, some_tokens, tiny_opt, trainable
from isotune import get_peft_model
from isotune.errors import IsotuneWarning
from isotune.methods import OFTConfig
from isotune.methods.oft import OFTOperator
from rotation_checks import (
    KINDS,
    assert_is,
    assert_orthogonal,
    bare,
    diagonal_blocks,
    fill,
    fillings,
    maps_of,
    orthogonality_error,
    skew,
)


@pytest.fixture
def forgetful() -> Iterator[None]:
    """What has been said once is said again."""
    isotune.methods.checks._say_once.cache_clear()
    yield
    isotune.methods.checks._say_once.cache_clear()


# -- the operator --------------------------------------------------------------------------------------------------


def definition(operator: OFTOperator) -> Tensor:
    """blockdiag(R₁, R₂, …), one block after the other."""
    size, blocks = operator.block_size, []
    eye = torch.eye(size, dtype=operator.generator.dtype)
    for place in range(operator.blocks):
        if size == 1:
            blocks.append(eye)
            continue
        generator = skew(operator.generator[0 if len(operator.generator) == 1 else place], size)
        if operator.cayley.generator_bound is not None:
            norm = generator.square().sum().sqrt()
            generator = generator * (
                operator.cayley.generator_bound / norm if norm > operator.cayley.generator_bound else 1.0
            )
        if operator.cayley.neumann_terms is None:
            blocks.append((eye + generator) @ torch.linalg.inv(eye - generator))
        else:
            powers = [torch.linalg.matrix_power(generator, k) for k in range(operator.cayley.neumann_terms + 1)]
            blocks.append((eye + generator) @ torch.stack(powers).sum(0))
    return torch.block_diag(*blocks)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"shared": True},
    {"generator_bound": 0.3},
    {"generator_bound": 100.0},
    {"shared": True, "generator_bound": 0.3},
    {"neumann_terms": 1},
    {"neumann_terms": 4},
    {"neumann_terms": 5, "generator_bound": 0.3},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(("size", "blocks"), [(2, 5), (3, 4), (8, 1), (5, 3)])
def test_operator_is_the_definition(size: int, blocks: int, variant: dict[str, Any]) -> None:
    operator = OFTOperator(size, blocks, **variant).double()
    assert torch.equal(operator.matrix(), torch.eye(size * blocks).double())
    assert operator.is_identity()
    fill(operator, "uniform", 0.4, seed=1)
    assert not operator.is_identity()
    assert_is(operator, lambda: definition(operator))


def test_blocks_of_one_input_are_the_identity() -> None:
    assert torch.equal(OFTOperator(1, 6).matrix(), torch.eye(6))


@pytest.mark.parametrize("coft", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@given(filling=fillings(), size=st.sampled_from([2, 3, 5, 8, 16]), blocks=st.integers(1, 4))
def test_exactly_orthogonal(coft: bool, shared: bool, filling: tuple[str, float, int], size: int, blocks: int) -> None:
    operator = OFTOperator(size, blocks, shared=shared, generator_bound=0.5 if coft else None)
    fill(operator, *filling)
    assert_orthogonal(operator)


@pytest.mark.parametrize("magnitude", [10.0, 1e3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_default_block_size_is_orthogonal_for_large_generators(kind: str, magnitude: float) -> None:
    """Blocks of 32 with entries up to 10 have ‖Q‖₂ of about 100, where a plain solve in fp32 is at its limit."""
    worst = 0.0
    for seed in range(40):
        operator = OFTOperator(32, 4)
        fill(operator, kind, magnitude, seed)
        worst = max(worst, orthogonality_error(operator.matrix()))
    assert worst <= 1e-5


def test_the_series_is_not_orthogonal_and_says_so() -> None:
    """The checks above can fail: on a truncated series they do."""
    operator = OFTOperator(8, 2, neumann_terms=3)
    fill(operator, "uniform", 0.3, seed=0)
    assert not operator.orthogonal
    assert orthogonality_error(operator.matrix()) > 1e-3
    operator.orthogonal = True
    with pytest.raises(AssertionError):
        assert_orthogonal(operator)


# -- the size of the blocks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "width", "size"),
    [
        ({}, 64, 32),
        ({"r": 0, "oft_block_size": 0}, 96, 32),
        ({"r": None, "oft_block_size": None}, 32, 32),
        ({"r": 4}, 64, 16),
        ({"r": 4, "oft_block_size": 0}, 20, 5),
        ({"oft_block_size": 8}, 64, 8),
        ({"r": 0, "oft_block_size": 8}, 24, 8),
        ({"r": None, "oft_block_size": 6}, 24, 6),
        ({"r": 3, "oft_block_size": 8}, 24, 8),
        ({"r": 1}, 7, 7),
        ({"oft_block_size": 1}, 7, 1),
        ({"r": 5, "adjust": "nearest"}, 20, 4),
    ],
    ids=str,
)
def test_the_block_size_follows_from_what_is_given(options: dict[str, Any], width: int, size: int) -> None:
    assert OFTConfig(**options).block_size_for("m", width) == size
    operator = layers_of(bare(OFTConfig(**options), width))[0].adapter("default")
    assert operator.generator.shape == (width // size, size * (size - 1) // 2)


@pytest.mark.parametrize(
    ("options", "width", "message"),
    [
        ({}, 40, r"oft_block_size=32 does not divide the 40 inputs of 'layers\.0'; .* are 20 or 40\."),
        ({}, 24, r"oft_block_size=32 .* are 24\."),
        ({"oft_block_size": 12}, 40, r"oft_block_size=12 .* are 10 or 20\."),
        ({"oft_block_size": 3}, 7, r"oft_block_size=3 .* are 1 or 7\."),
        ({"r": 5}, 24, r"r=5 does not divide the 24 inputs .* are 4 or 6\."),
        ({"r": 100}, 24, r"r=100 .* are 24\."),
        ({"r": 4, "oft_block_size": 8}, 24, r"r=4 .*oft_block_size=8 .*24 inputs .*'layers\.0'.* to 6\."),
        ({"r": 4, "oft_block_size": 6}, 48, r"oft_block_size to 12\."),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, Any], width: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bare(OFTConfig(**options), width)


@pytest.mark.parametrize(
    ("options", "width", "size"),
    [
        ({"oft_block_size": 5}, 12, 4),  # 4 and 6 are as near: the lower
        ({"oft_block_size": 9}, 26, 13),
        ({"oft_block_size": 32}, 24, 24),
        ({"r": 5}, 24, 6),  # 4 blocks, the lower of 4 and 6
        ({"r": 7}, 24, 4),  # 6 blocks, the lower of 6 and 8
        ({"r": 11}, 24, 2),
        ({}, 40, 40),
    ],
    ids=str,
)
@pytest.mark.usefixtures("forgetful")
def test_the_nearest_size_on_request(options: dict[str, Any], width: int, size: int) -> None:
    with pytest.warns(IsotuneWarning, match=rf"does not divide the {width} inputs") as said:
        model = bare(OFTConfig(**options, adjust="nearest"), width, layers=3)
    assert len(said) == 1
    for layer in layers_of(model):
        assert layer.adapter("default").block_size == size


@pytest.mark.usefixtures("forgetful")
def test_each_adjustment_is_said_once() -> None:
    """One message for each width, and none again for a second adapter or where nothing is adjusted."""
    model = nn.Sequential(nn.Linear(24, 20), nn.Linear(20, 24), nn.Linear(24, 32), nn.Linear(32, 3))
    options: dict[str, Any] = {"oft_block_size": 16, "adjust": "nearest", "target_modules": ["0", "1", "2", "3"]}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        adapted = get_peft_model(model, OFTConfig(**options))
        adapted.add_adapter("other", OFTConfig(**options))
    texts = [str(w.message) for w in said if issubclass(w.category, IsotuneWarning)]
    assert len(texts) == 2
    assert "24 inputs" in texts[0]
    assert "12 is used" in texts[0]
    assert "20 inputs" in texts[1]
    assert "20 is used" in texts[1]


# -- one block for all ---------------------------------------------------------------------------------------------


def test_block_share_is_one_block_everywhere_for_a_share_of_the_parameters() -> None:
    counts, maps = {}, {}
    for share in (True, False):
        model = bare(OFTConfig(r=6, block_share=share, init_weights=False), 24)
        counts[share] = sum(p.numel() for p in trainable(model).values())
        maps[share] = diagonal_blocks(maps_of(model, 24)[0], 4)
    assert counts[True] == 4 * 3 // 2
    assert counts[False] == 6 * counts[True]
    assert float((maps[True][0] - torch.eye(4)).detach().abs().max()) > 0.1
    for block in maps[True][1:]:
        torch.testing.assert_close(block, maps[True][0], rtol=0, atol=1e-6)
    assert float((maps[False][1] - maps[False][0]).detach().abs().max()) > 0.1


# -- dropout of blocks ---------------------------------------------------------------------------------------------

RATE, WIDTH, SIZE, LAYERS = 0.3, 128, 4, 12


def dropping(**options: Any) -> Any:
    defaults: dict[str, Any] = {"oft_block_size": SIZE, "module_dropout": RATE, "init_weights": False}
    return bare(OFTConfig(**{**defaults, **options}), WIDTH, LAYERS)


def dropped(model: Any) -> Tensor:
    """(layers, blocks): which blocks are the identity in one forward pass."""
    blocks = diagonal_blocks(maps_of(model, WIDTH).detach(), SIZE)
    return (blocks == torch.eye(SIZE)).flatten(-2).all(-1)


@pytest.mark.parametrize("grad", [True, False])
def test_dropout_turns_a_share_of_the_blocks_off_and_leaves_the_others(grad: bool) -> None:
    model = dropping()
    whole = diagonal_blocks(maps_of(model, WIDTH), SIZE)
    assert not dropped(model).any()
    model.train()
    with torch.set_grad_enabled(grad):
        blocks = diagonal_blocks(maps_of(model, WIDTH), SIZE)
    off = (blocks == torch.eye(SIZE)).flatten(-2).all(-1)
    # 384 blocks: three standard deviations of the share are 0.07.
    assert abs(float(off.float().mean()) - RATE) < 0.07
    torch.testing.assert_close(blocks[~off], whole[~off], rtol=0, atol=1e-6)  # kept as they are, not scaled


def test_every_layer_and_every_step_has_its_own_mask() -> None:
    model = dropping().train()
    first, second = dropped(model), dropped(model)
    assert len({tuple(row.tolist()) for row in first}) == LAYERS
    assert len({tuple(row.tolist()) for row in torch.cat([first, second])}) == 2 * LAYERS


def test_masks_follow_from_the_seed() -> None:
    model, results = dropping().train(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(maps_of(model, WIDTH).detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_a_layer_called_alone_drops_too() -> None:
    layer = layers_of(dropping())[0]
    x = torch.eye(WIDTH)
    whole = layer(x).detach()
    layer.train()
    first, second = layer(x).detach(), layer(x).detach()
    assert not torch.equal(first, whole)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("grad", [True, False])
def test_evaluation_after_training_is_clean(grad: bool) -> None:
    """A pass without gradients may keep its result for the next one; never across a mask."""
    model = dropping()
    with torch.no_grad():
        whole = maps_of(model, WIDTH)
        for _ in range(2):
            model.train()
            assert not torch.equal(maps_of(model, WIDTH), whole)
            model.eval()
            with torch.set_grad_enabled(grad):
                assert torch.equal(maps_of(model, WIDTH).detach(), whole)


def test_dropped_blocks_get_no_gradient() -> None:
    model = dropping().train()
    result = maps_of(model, WIDTH)
    off = (diagonal_blocks(result, SIZE).detach() == torch.eye(SIZE)).flatten(-2).all(-1)
    (result * torch.randn_like(result)).sum().backward()
    for layer, mask in zip(layers_of(model), off, strict=True):
        gradient = layer.adapter("default").generator.grad
        assert gradient is not None
        assert torch.equal(gradient.any(1), ~mask)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_repeats_the_masks(reentrant: bool) -> None:
    model = adapt(tiny_opt(), OFTConfig(oft_block_size=4, module_dropout=0.4, target_modules=["q_proj", "v_proj"]))
    randomize(model)
    plain = copy.deepcopy(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    losses = []
    for one in (model, plain):
        one.train()
        torch.manual_seed(3)
        loss = one(some_tokens(), labels=some_tokens()).loss
        loss.backward()
        losses.append(loss.detach())
    assert torch.equal(losses[0], losses[1])
    assert_same_gradients(model, plain)
    # And the masks matter: another seed gives other gradients.
    before = gradients(plain)
    plain.zero_grad()
    torch.manual_seed(4)
    plain(some_tokens(), labels=some_tokens()).loss.backward()
    after = gradients(plain)
    assert any(not torch.equal(before[name], after[name]) for name in before)  # type: ignore[arg-type]


# -- COFT ----------------------------------------------------------------------------------------------------------


def generators_in_use(matrix: Tensor, size: int) -> Tensor:
    """Q = (R + I)⁻¹ (R − I) of each block, read back from M."""
    blocks, eye = diagonal_blocks(matrix.double(), size), torch.eye(size, dtype=torch.float64)
    return torch.linalg.solve(blocks + eye, blocks - eye)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("neumann", [True, False])
def test_coft_bounds_the_generator_and_keeps_the_gradient(share: bool, neumann: bool) -> None:
    eps = 0.05
    options: dict[str, Any] = {"r": 6, "coft": True, "eps": eps, "block_share": share, "use_cayley_neumann": neumann}
    operator = OFTConfig(**options).build_operator("m", 24, 24).double()
    fill(operator, "uniform", 3.0, seed=2)
    used = generators_in_use(operator.matrix().detach(), 4)
    norms = used.flatten(1).norm(dim=1)
    # The series has the exact generator only up to the bound to its power.
    torch.testing.assert_close(norms, torch.full_like(norms, eps / math.sqrt(6)), rtol=1e-6, atol=0)
    assert float(used.norm()) <= eps * (1 + 1e-6)
    (gradient,) = torch.autograd.grad(
        (torch.randn(3, 24).double() @ operator.matrix()).square()[:, :7].sum(), operator.generator
    )
    assert bool(gradient[0].any())
    # The norm is fixed there, so what is left of the gradient is across the generator.
    inner = (gradient * operator.generator).sum(1)
    assert float(inner.detach().abs().max()) < 1e-9


def test_coft_leaves_generators_within_the_bound_alone() -> None:
    inside, free = OFTOperator(4, 3, generator_bound=0.5), OFTOperator(4, 3)
    for operator in (inside, free):
        fill(operator, "uniform", 0.05, seed=0)
    torch.testing.assert_close(inside.matrix(), free.matrix(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_a_forward_never_changes_parameters(training: bool, grad: bool) -> None:
    model = bare(OFTConfig(r=6, coft=True, eps=1e-3, init_weights=False), 24, layers=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    versions = {name: p._version for name, p in model.named_parameters()}
    model.train(training)
    with torch.set_grad_enabled(grad):
        model(torch.randn(4, 24))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter._version == versions[name]


def test_eps_scales_the_rotation() -> None:
    angles = {}
    for eps in (6e-5, 1e-3, 2e-3):
        torch.manual_seed(1)
        model = bare(OFTConfig(r=6, coft=True, eps=eps, init_weights=False), 24, dtype=torch.float64)
        angles[eps] = float((maps_of(model, 24, torch.float64)[0] - torch.eye(24)).norm())
    # R − I is 2Q to first order.
    assert angles[1e-3] == pytest.approx(2e-3, rel=1e-3)
    assert angles[2e-3] == pytest.approx(4e-3, rel=1e-3)
    assert angles[6e-5] == pytest.approx(1.2e-4, rel=1e-3)


# -- the Neumann series --------------------------------------------------------------------------------------------


def with_norm(operator: OFTOperator, norm: float) -> OFTOperator:
    """The operator with random generators of this spectral norm, block by block."""
    fill(operator, "uniform", 1.0, seed=3)
    with torch.no_grad():
        for row in operator.generator:
            row.mul_(norm / torch.linalg.matrix_norm(skew(row, operator.block_size), 2))
    return operator


def test_many_terms_are_the_exact_transform() -> None:
    exact = with_norm(OFTOperator(6, 3).double(), 0.5).matrix()
    errors = []
    for terms in (1, 2, 3, 4, 5, 10, 20, 60):
        series = with_norm(OFTOperator(6, 3, neumann_terms=terms).double(), 0.5).matrix()
        errors.append(float(torch.linalg.matrix_norm(series - exact, 2).detach()))
        # (I + Q)(I + … + Qᵏ) = R (I − Qᵏ⁺¹), so the error is that power of the norm, no more and no less.
        assert errors[-1] == pytest.approx(0.5 ** (terms + 1), rel=1e-6, abs=1e-13)
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("terms", [1, 3, 5])
@pytest.mark.parametrize("trained_exact", [True, False])
@pytest.mark.parametrize("norm", [0.1, 0.4])
def test_switching_the_transform_of_a_trained_adapter(terms: int, trained_exact: bool, norm: float) -> None:
    """The same file under the other setting is the same function up to the truncation, and not its inverse."""
    width, options = 24, {"oft_block_size": 6}
    exact = OFTConfig(**options)
    series = OFTConfig(**options, use_cayley_neumann=True, num_cayley_neumann_terms=terms)
    first, second = (exact, series) if trained_exact else (series, exact)
    trained = bare(first, width, dtype=torch.float64)
    with_norm(layers_of(trained)[0].adapter("default"), norm)
    other = bare(second, width, dtype=torch.float64)
    set_peft_model_state_dict(other, get_peft_model_state_dict(trained))
    one, two = (maps_of(m, width, torch.float64)[0] for m in (trained, other))
    change = float(torch.linalg.matrix_norm(one - two, 2))
    assert 0 < change <= norm ** (terms + 1) * (1 + 1e-5)
    assert float(torch.linalg.matrix_norm(one - two.T, 2)) > norm  # its inverse is that far away


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"module_dropout": 0.1, "block_share": True}, "module_dropout has no effect with block_share=True"),
        ({"module_dropout": 1.0}, r"module_dropout=1\.0 .*\[0, 1\)"),
        ({"module_dropout": -0.1}, r"module_dropout=-0\.1 .*\[0, 1\)"),
        ({"module_dropout": float("nan")}, r"module_dropout=nan .*\[0, 1\)"),
        ({"adjust": "nearset"}, "adjust='nearset' .*Did you mean 'nearest'"),
        ({"r": -1}, "r=-1 is not allowed; .* at least 1, or 0"),
        ({"r": 2.0}, r"r=2\.0 is not allowed"),
        ({"r": True}, "r=True is not allowed"),
        ({"oft_block_size": -4}, "oft_block_size=-4 is not allowed"),
        ({"oft_block_size": "4"}, "oft_block_size='4' is not allowed"),
        ({"coft": True, "eps": 0.0}, r"eps=0\.0 is not allowed; .*above 0"),
        ({"coft": True, "eps": -1e-3}, "eps=-0.001 is not allowed"),
        ({"coft": True, "eps": float("inf")}, "eps=inf is not allowed"),
        ({"coft": True, "eps": float("nan")}, "eps=nan is not allowed"),
        ({"use_cayley_neumann": True, "num_cayley_neumann_terms": 0}, "num_cayley_neumann_terms=0 .*at least 1"),
        ({"use_cayley_neumann": True, "num_cayley_neumann_terms": 2.5}, r"num_cayley_neumann_terms=2\.5 .*integer"),
        ({"bias": "lora_only"}, "bias='lora_only' is not one of"),
    ],
    ids=str,
)
def test_values_without_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OFTConfig(**options)
