"""What embeddings alone can get wrong: their options, the tokens' shapes, half precision, what shares their weight.

The contract of every method on them is in test_contract.py.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from helpers import (
    ONE_OF_EACH_FORM,
    OPTIONS_FOR_12,
    OneLayer,
    assert_gradients_are_right,
    assert_unchanged,
    layers_of,
    merged_matrix,
    only,
    randomize,
    relative_error,
    snapshot,
    trainable,
)
from isotune import get_peft_model
from isotune.hosts import EmbeddingHost, host_for
from isotune.methods import METHODS
from isotune.moving import MovingSchedule

ROWS, WIDTH, PADDING = 14, 12, 3
TOKENS = torch.tensor([[1, 5, 5, PADDING, 0], [PADDING, 13, 5, 1, 7]])
"""Some of them repeated, the padding among them."""


pytestmark = pytest.mark.covered


@pytest.fixture(params=list(METHODS))
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def config(method: str, **options: Any) -> Any:
    return METHODS[method](**{"target_modules": ["layer"], "init_weights": False, **OPTIONS_FOR_12[method], **options})


def embedding(dtype: torch.dtype = torch.float32, **options: Any) -> nn.Embedding:
    module = nn.Embedding(ROWS, WIDTH, dtype=dtype, **options)
    nn.init.normal_(module.weight)  # the row of the padding too: nothing may rest on its being zero
    return module


def build(method: str, module: nn.Module | None = None, **options: Any) -> Any:
    return get_peft_model(OneLayer(module or embedding()), config(method, **options)).eval()


# -- the host ------------------------------------------------------------------------------------------------------


def test_matrix_is_a_view_with_a_row_for_each_token() -> None:
    module = embedding()
    host = host_for(module, "x")
    assert isinstance(host, EmbeddingHost)
    assert (host.out_features, host.in_features) == (ROWS, WIDTH)
    assert host.matrix().data_ptr() == module.weight.data_ptr()
    assert not host.matrix().requires_grad
    torch.testing.assert_close(module(TOKENS), host.matrix()[TOKENS], rtol=0, atol=0)
    assert torch.equal(host.stored(host.matrix()), module.weight)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_set_and_restore(requires_grad: bool) -> None:
    module = embedding().requires_grad_(requires_grad)
    host, original = host_for(module), module.weight
    kept = host.keep()
    values, other = original.detach().clone(), torch.randn(ROWS, WIDTH, dtype=torch.float64)
    host.set_matrix(other)
    assert module.weight is not original
    assert torch.equal(original, values)
    assert torch.equal(host.matrix(), other.float())
    assert module.weight.requires_grad is requires_grad
    host.restore(kept)
    assert module.weight is original


@pytest.mark.parametrize("options", [{}, {"padding_idx": PADDING}, {"scale_grad_by_freq": True}], ids=str)
@pytest.mark.parametrize("tokens", [TOKENS, TOKENS[0]], ids=["batch", "text"])
def test_the_model_may_write_into_the_vectors(method: str, options: dict[str, Any], tokens: Tensor) -> None:
    """As BLIP and GIT do, which add the positions in place."""
    model = build(method, embedding(**options))
    found = []
    for add in (Tensor.add, Tensor.add_):
        model.zero_grad()
        y = add(model(tokens), 1.0)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad for p in trainable(model).values())])
    torch.testing.assert_close(found[1], found[0])


class Positions(nn.Embedding):
    """Returns more than the vectors, as ProphetNet's positions do."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


def test_an_embedding_that_returns_several_tensors_is_refused(method: str) -> None:
    model = build(method, Positions(ROWS, WIDTH))
    with pytest.raises(ValueError, match=r"'layer', a Positions, returns a tuple.*exclude_modules"):
        model(TOKENS)


def test_max_norm_is_refused_and_the_model_is_left_alone(method: str) -> None:
    model = OneLayer(embedding(max_norm=1.0))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'layer' has max_norm=1\.0.*Set max_norm to None.*exclude_modules"):
        get_peft_model(model, config(method))
    assert_unchanged(model, before)


@pytest.mark.parametrize("module", [nn.EmbeddingBag(ROWS, WIDTH), nn.LSTM(WIDTH, 4)], ids=lambda m: type(m).__name__)
def test_others_are_refused(module: nn.Module) -> None:
    with pytest.raises(ValueError, match=rf"'some\.name'.*{type(module).__name__}.*Supported: .*Embedding"):
        host_for(module, "some.name")


@pytest.mark.parametrize(
    ("method_name", "options", "message"),
    [
        ("psoft", {"psoft_dropout": 0.1}, "psoft_dropout=0.1.*Embedding.*0"),
        ("psoft", {"r": 13}, "r=13.*14 × 12.*at most 12"),
        ("oft", {"oft_block_size": 5}, "oft_block_size=5.*12.*4 or 6"),
    ],
)
def test_options_that_do_not_fit_are_refused(method_name: str, options: dict[str, Any], message: str) -> None:
    model = OneLayer(embedding())
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config(method_name, **options))
    assert_unchanged(model, before)


# -- forward -------------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"padding_idx": PADDING},
    "frequency": {"scale_grad_by_freq": True},
    "both": {"padding_idx": PADDING, "scale_grad_by_freq": True},
    "last": {"padding_idx": -1},
    "sparse": {"sparse": True, "padding_idx": PADDING},
}


@pytest.mark.parametrize("method", ONE_OF_EACH_FORM)
@pytest.mark.parametrize(("kind", "dtype"), [*((kind, torch.long) for kind in KINDS), ("both", torch.int32)])
def test_forward_is_the_look_up_in_the_merged_weight(method: str, kind: str, dtype: torch.dtype) -> None:
    model, tokens = build(method, embedding(**KINDS[kind])), TOKENS.to(dtype)
    matrix = merged_matrix(only(model)).detach()
    found = model(tokens)
    assert relative_error(only(model).get_base_layer()(tokens), found.detach()) > 1e-2
    torch.testing.assert_close(found, functional.embedding(tokens, matrix), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("method", ONE_OF_EACH_FORM)
@pytest.mark.parametrize("shape", [(), (4,), (0,), (2, 0), (2, 3, 2)])
@pytest.mark.parametrize("kind", ["plain", "both"])
def test_tokens_of_any_shape(method: str, kind: str, shape: tuple[int, ...]) -> None:
    model, tokens = build(method, embedding(**KINDS[kind])), torch.randint(ROWS, shape)
    matrix = merged_matrix(only(model)).detach()
    found = model(tokens)
    assert found.shape == (*shape, WIDTH)
    torch.testing.assert_close(found, functional.embedding(tokens, matrix), rtol=1e-5, atol=2e-6)
    found.sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in trainable(model).values())


def test_tokens_that_are_not_contiguous(method: str) -> None:
    model = build(method, embedding(**KINDS["both"]))
    torch.testing.assert_close(model(TOKENS.T), model(TOKENS).transpose(0, 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ONE_OF_EACH_FORM)
@pytest.mark.parametrize("kind", ["plain", "both", "sparse"])
def test_merge_and_unmerge(method: str, kind: str) -> None:
    model = build(method, embedding(**KINDS[kind]))
    layer = only(model)
    original, bits = layer.host.weight, layer.host.weight.detach().clone()
    expected, matrix, delta = model(TOKENS), merged_matrix(layer).detach(), layer.get_delta_weight("default")
    model.merge_adapter()
    assert layer.host.weight is not original
    torch.testing.assert_close(layer.host.matrix(), matrix, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(layer.host.matrix(), bits + delta, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-5, atol=2e-6)
    model.unmerge_adapter()
    assert layer.host.weight is original
    assert torch.equal(original, bits)
    assert torch.equal(model(TOKENS), expected)
    plain = model.merge_and_unload()
    assert type(plain.layer) is nn.Embedding
    assert plain.layer.padding_idx == (embedding(**KINDS[kind])).padding_idx
    torch.testing.assert_close(plain(TOKENS), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("method", ONE_OF_EACH_FORM)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_rows_once(method: str, dtype: torch.dtype) -> None:
    model = build(method, embedding(dtype))
    layer, wide = only(model), merged_matrix(only(model)).detach()
    if layer.adapter("default").additive:  # its reader and writer are of the weight's dtype
        up, down = layer.low_rank("default")
        wide = layer.host.matrix().float() + up @ down
    found = model(TOKENS)
    assert found.dtype == dtype
    assert {p.dtype for p in layer.adapter("default").parameters()} == {torch.float32}
    step = torch.finfo(dtype).eps
    assert relative_error(found.detach(), wide[TOKENS]) < step / 2
    layer.merge()
    assert layer.host.weight.dtype == dtype
    error = (layer.host.matrix().double() - wide.double()).abs()
    assert bool((error <= 0.51 * step * wide.abs().double() + 1e-6).all())
    assert relative_error(layer(TOKENS), found.detach()) < step / 2


def test_autocast_changes_a_look_up_as_little_as_a_merged_one(method: str) -> None:
    model = build(method)
    expected = model(TOKENS).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(TOKENS)
        model.merge_adapter()
        merged = model(TOKENS)
    assert found.dtype == merged.dtype == torch.float32
    assert relative_error(found.detach(), expected) < 1e-5
    assert relative_error(merged, expected) < 1e-5


def test_hooks_of_the_host_run(method: str) -> None:
    model, calls = build(method), []
    expected = model(TOKENS)
    only(model).get_base_layer().register_forward_hook(lambda _, given, output: calls.append(given[0]))
    assert torch.equal(model(TOKENS), expected)
    assert calls[0] is TOKENS


# -- subclasses of other libraries ---------------------------------------------------------------------------------


def scaled(family: str) -> nn.Module:
    """Word embeddings whose output is the row times a number."""
    if family == "bart":
        from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

        return BartScaledWordEmbedding(ROWS, WIDTH, PADDING, embed_scale=2.5)
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    return Gemma3TextScaledWordEmbedding(ROWS, WIDTH, PADDING, embed_scale=2.5)


@pytest.mark.parametrize("family", ["bart", "gemma3"])
def test_scaled_embeddings(method: str, family: str) -> None:
    module = scaled(family)
    nn.init.normal_(module.weight)
    model = build(method, module.double())
    layer, twin = only(model), copy.deepcopy(only(model))
    found, expected = model(TOKENS), 2.5 * functional.embedding(TOKENS, merged_matrix(twin), PADDING)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    cotangent = torch.randn_like(found)
    found.backward(cotangent)
    expected.backward(cotangent)
    for own, other in zip(layer.adapter("default").parameters(), twin.adapter("default").parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-9, atol=1e-10)
    model.merge_adapter()
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-10, atol=1e-11)


def test_embeddings_that_look_up_other_rows_than_they_are_given(method: str) -> None:
    """Those of positions, which transformers shifts by two, or reads off the length of what they are given."""
    from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding

    module = BartLearnedPositionalEmbedding(ROWS - 2, WIDTH)
    model = build(method, module)
    expected = merged_matrix(only(model)).detach()[2 : 2 + TOKENS.shape[1]].expand(2, -1, -1)
    torch.testing.assert_close(model(TOKENS).detach(), expected, rtol=1e-5, atol=2e-6)


# -- gradients -----------------------------------------------------------------------------------------------------


# fails with scale_grad_by_freq: the factor of the gradient is rounded to float32 under a float64 weight
@pytest.mark.parametrize("method", ONE_OF_EACH_FORM)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["repeated", "only padding", "one"])
def test_gradients_equal_those_of_the_look_up_in_the_merged_weight(method: str, kind: str, case: str) -> None:
    tokens = {"repeated": TOKENS, "only padding": TOKENS.new_full((2, 3), PADDING), "one": TOKENS[0, :1]}[case]
    options = KINDS[kind]
    model = build(method, embedding(torch.float64, **options))
    layer, twin = only(model), copy.deepcopy(only(model))
    padding, by_frequency = options.get("padding_idx"), options.get("scale_grad_by_freq", False)
    ours = model(tokens)
    theirs = functional.embedding(tokens, merged_matrix(twin), padding, scale_grad_by_freq=by_frequency)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    cotangent = torch.randn_like(ours)
    ours.backward(cotangent)
    theirs.backward(cotangent)
    pairs = zip(layer.adapter("default").parameters(), twin.adapter("default").parameters(), strict=True)
    for found, expected in pairs:
        assert bool(expected.grad.any()) is not (padding == PADDING and case == "only padding")
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-10)
    assert layer.host.weight.grad is None


@pytest.mark.parametrize("method", ONE_OF_EACH_FORM)
@pytest.mark.parametrize("option", ["padding_idx", "scale_grad_by_freq"])
def test_the_option_matters(method: str, option: str) -> None:
    """Without it the gradients differ, so that the test above would see if it were ignored."""
    with_option = build(method, embedding(torch.float64, **{option: KINDS["both"][option]}))
    without = copy.deepcopy(with_option)
    setattr(only(without).get_base_layer(), option, nn.Embedding(1, 1).__dict__[option])
    cotangent = torch.randn(*TOKENS.shape, WIDTH, dtype=torch.float64)
    for model in (with_option, without):
        model(TOKENS).backward(cotangent)
    for first, second in zip(trainable(with_option).values(), trainable(without).values(), strict=True):
        assert relative_error(first.grad, second.grad) > 1e-3


def test_gradcheck(method: str) -> None:
    model = build(method, embedding(torch.float64, sparse=True))
    parameters = trainable(model)

    def function(*values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(parameters, values, strict=True)), (TOKENS[:1, :3],))

    values = [p.detach().clone().requires_grad_() for p in parameters.values()]
    assert_gradients_are_right(function, *values)


# -- in a model ----------------------------------------------------------------------------------------------------


class Reader(nn.Module):
    """Words and positions, and a head that shares the words' weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(ROWS, WIDTH, padding_idx=PADDING)
        self.positions = nn.Embedding(8, WIDTH)
        self.head = nn.Linear(WIDTH, ROWS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(x) + self.positions(torch.arange(x.shape[1]))))


def reader() -> nn.Module:
    torch.manual_seed(3)
    return Reader()


@pytest.mark.parametrize(
    ("kind", "options"), [*((name, {}) for name in METHODS), ("psoft", {"basis": "embedded"})], ids=str
)
def test_save_and_load(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    targets = ["words", "positions"]
    model = get_peft_model(reader(), config(kind, target_modules=targets, init_weights=True, **options)).eval()
    base = model(TOKENS).detach()
    randomize(model, std=0.3)
    expected = model(TOKENS).detach()
    assert relative_error(base, expected) > 1e-2
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(reader(), tmp_path).eval()
    assert len(layers_of(loaded)) == 2
    torch.testing.assert_close(loaded(TOKENS), expected, rtol=1e-4, atol=1e-5)


def test_a_merge_leaves_what_shares_the_weight_alone(method: str) -> None:
    model = get_peft_model(reader(), config(method, target_modules=["words"])).eval()
    base, head = reader(), model.base_model.model.head
    expected = model(TOKENS).detach()
    model.merge_adapter()
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(head.weight, base.head.weight)
    model.unmerge_adapter()
    assert head.weight is only(model).host.weight


@pytest.mark.slow
def test_training_finds_a_teacher(method: str) -> None:
    """The loss to a model with a random adapter of the same method falls, and nothing frozen moves."""
    options = config(method, target_modules=["words", "positions"], init_weights=True)
    torch.manual_seed(0)
    teacher = get_peft_model(reader(), copy.deepcopy(options))
    randomize(teacher, std=0.5)
    torch.manual_seed(0)  # so that random parts of the start are the same
    model = get_peft_model(reader(), options)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    tokens = torch.randint(ROWS, (16, 6))
    with torch.no_grad():
        target = teacher(tokens)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.05, weight_decay=0.0)
    losses = []
    for _ in range(30):
        loss = functional.mse_loss(model(tokens), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for name, parameter in model.named_parameters():
        assert name not in frozen or torch.equal(parameter, frozen[name]), name


class Doubled(nn.Embedding):
    def forward(self, tokens: Tensor) -> Tensor:
        return 2 * super().forward(tokens)


def test_a_moved_adapter_is_refused_where_a_process_may_not_see_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is accumulated does not follow from the rows: it needs to know by what the forward multiplies them."""

    def adapted() -> Any:
        torch.manual_seed(0)
        return get_peft_model(OneLayer(Doubled(ROWS, WIDTH)), METHODS["psoft"](r=3, target_modules=["layer"]))

    model = adapted()
    randomize(model)
    MovingSchedule(1).step(model, torch.optim.SGD(trainable(model).values(), lr=0.1))
    model.save_pretrained(str(tmp_path))
    unmoved = adapted()
    monkeypatch.setattr(EmbeddingHost, "gives_rows", False)  # as if split by tensor parallelism
    assert adapted()(TOKENS).shape == (*TOKENS.shape, WIDTH)
    with pytest.raises(ValueError, match="PsoftConfig whose subspaces have moved cannot be used on 'layer'"):
        PeftModel.from_pretrained(OneLayer(Doubled(ROWS, WIDTH)), str(tmp_path))
    state = load_file(tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="PsoftConfig whose subspaces have moved cannot be used on 'layer'"):
        set_peft_model_state_dict(unmoved, state)
