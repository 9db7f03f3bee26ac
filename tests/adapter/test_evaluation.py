"""One evaluation for all layers: how often it is made, and that it is never stale."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from helpers import (
    CHECKPOINTING,
    WITH_LORA,
    Chain,
    Stack,
    adapt,
    adapted_stack,
    assert_same_gradients,
    configured,
    counted,
    layers_of,
    one_by_one,
    randomize,
    some_tokens,
    tiny_llama,
    tiny_opt,
    trainable,
)
from isotune import get_peft_model
from isotune.adapter.evaluation import share_evaluations
from isotune.methods.psoft import PsoftOperator

CAYLEY = "isotune.algebra.cayley._CayleyOfEntries.forward"


@pytest.fixture
def model() -> Any:
    """Three adapted layers of one rank, so that one evaluation serves them all."""
    return adapted_stack()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 24)


def compare(model: nn.Module, reference: nn.Module, x: Tensor) -> None:
    """Equal outputs and gradients; leaves no gradients behind."""
    for each in (model, reference):
        each.zero_grad(set_to_none=True)
    ours, theirs = model(x), reference(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    assert_same_gradients(model, reference)
    for each in (model, reference):
        each.zero_grad(set_to_none=True)
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x), rtol=1e-5, atol=1e-6)


# -- batches -------------------------------------------------------------------------------------------------------


def test_batches_are_by_size_kind_dtype_and_device() -> None:
    operators = [
        PsoftOperator(4),
        PsoftOperator(4),
        PsoftOperator(5),
        PsoftOperator(4, orthogonal=False),
        PsoftOperator(4, neumann_terms=3),
        PsoftOperator(4, neumann_terms=4),
        PsoftOperator(4, neumann_terms=4, generator_bound=0.5),
        PsoftOperator(4, output_scale=False),
        PsoftOperator(4).double(),
    ]
    assert [len(shared.members) for shared in share_evaluations(operators)] == [2, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("neumann", [None, 3])
@pytest.mark.parametrize("bound", [None, 0.3])
def test_a_batch_gives_what_each_operator_alone_gives(neumann: int | None, bound: float | None) -> None:
    bound = bound if neumann else None
    operators = [PsoftOperator(6, neumann_terms=neumann, generator_bound=bound) for _ in range(3)]
    alone = []
    for operator in operators:
        operator.randomize_parameters()
        alone.append(operator.difference().detach())
    (shared,) = share_evaluations(operators)
    assert shared.members == tuple(operators)
    for slot, operator in enumerate(operators):
        operator.shared, operator.slot = shared, slot
    shared.begin()
    for operator, expected in zip(operators, alone, strict=True):
        torch.testing.assert_close(operator.difference(), expected, rtol=1e-5, atol=1e-6)
    shared.end()


def test_half_precision_parameters_are_computed_in_single() -> None:
    operator = PsoftOperator(16)
    operator.randomize_parameters()
    operator = operator.bfloat16()
    wide = copy.deepcopy(operator).float()
    assert operator.difference().dtype == torch.float32
    assert torch.equal(operator.difference(), wide.difference())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(operator.difference(), wide.difference())
    assert torch.equal(operator.difference(torch.bfloat16), wide.difference().bfloat16())


# -- how often -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [tiny_opt, tiny_llama])
def test_one_cayley_for_each_rank_and_forward_in_training(build: Callable[..., nn.Module], monkeypatch: Any) -> None:
    model = adapt(build(layers=3), target_modules=["q_proj", "k_proj", "v_proj"], rank_pattern={"k_proj": 5}).train()
    tokens = some_tokens()
    with counted(monkeypatch, CAYLEY) as calls:
        for step in range(1, 4):
            model(tokens, labels=tokens).loss.backward()
            assert len(calls) == 2 * step


def test_no_cayley_in_generation_after_the_first_token(monkeypatch: Any) -> None:
    model = adapt(tiny_llama(layers=3), target_modules=["q_proj", "v_proj"])
    with counted(monkeypatch, CAYLEY) as calls:
        model.generate(input_ids=some_tokens(1, 4), max_new_tokens=1, min_new_tokens=1, do_sample=False)
        assert len(calls) == 1
        model.generate(input_ids=some_tokens(1, 4), max_new_tokens=9, min_new_tokens=9, do_sample=False)
        with torch.no_grad():
            model(some_tokens())
        assert len(calls) == 1


# -- never stale ---------------------------------------------------------------------------------------------------


def write_in_place(model: nn.Module) -> None:
    randomize(model, seed=11)


def write_data(model: nn.Module) -> None:
    for parameter in trainable(model).values():
        parameter.data.copy_(parameter.data + 0.1 * torch.randn_like(parameter))


def write_vector(model: nn.Module) -> None:
    parameters = list(trainable(model).values())
    vector = torch.nn.utils.parameters_to_vector(parameters).detach()
    torch.nn.utils.vector_to_parameters(vector + 0.1 * torch.randn_like(vector), parameters)


def write_optimizer(model: nn.Module) -> None:
    for parameter in trainable(model).values():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(trainable(model).values(), lr=0.05).step()


def write_foreach(model: nn.Module) -> None:
    for parameter in trainable(model).values():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.SGD(trainable(model).values(), lr=0.05, foreach=True).step()


def write_state_dict(model: nn.Module) -> None:
    state = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in trainable(model).items()}
    model.load_state_dict(state, strict=False)


def write_assigned_state_dict(model: nn.Module) -> None:
    state = {name: (tensor + 0.1 * torch.randn_like(tensor)).detach() for name, tensor in trainable(model).items()}
    model.load_state_dict(state, strict=False, assign=True)


def write_new_parameter(model: nn.Module) -> None:
    for layer in layers_of(model):
        operator = layer.adapter("default")
        operator.generator = nn.Parameter(operator.generator.detach() + 0.1)


def write_numpy(model: nn.Module) -> None:
    for parameter in trainable(model).values():
        parameter.detach().numpy()[...] += 0.05


WRITES = [
    write_in_place,
    write_data,
    write_vector,
    write_optimizer,
    write_foreach,
    write_state_dict,
    write_assigned_state_dict,
    write_new_parameter,
    write_numpy,
]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("write", WRITES)
def test_parameters_written_between_forwards_are_seen(write: Callable[[Any], None], grad: bool, x: Tensor) -> None:
    model = adapted_stack()
    with torch.set_grad_enabled(grad):
        before = model(x)
        write(model)
        after = model(x)
        assert (after - before).abs().max() > 1e-3
        torch.testing.assert_close(after, one_by_one(model)(x), rtol=1e-5, atol=1e-6)
    compare(model, one_by_one(model), x)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("write", [write_in_place, write_data, write_vector, write_numpy, write_state_dict])
def test_a_layer_that_the_last_forward_skipped_is_not_stale(
    write: Callable[[Any], None], grad: bool, x: Tensor
) -> None:
    """The encoder alone has run, the parameters are written, then the decoder alone runs."""
    model = adapted_stack()
    inner = model.get_base_model()
    hidden = torch.randn(5, 40)
    with torch.set_grad_enabled(grad):
        inner.first(x)
        write(model)
        found = inner.second(hidden)
        reference = one_by_one(model).get_base_model()
        torch.testing.assert_close(found, reference.second(hidden), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("skip", [{"first"}, {"second"}, {"first", "third"}])
@pytest.mark.parametrize("write", [write_in_place, write_data])
def test_a_layer_skipped_in_one_forward(skip: set[str], write: Callable[[Any], None], model: Any, x: Tensor) -> None:
    for current in (set(), skip, set(), skip, skip, set()):
        model.get_base_model().skip = current
        compare(model, one_by_one(model), x)
        write(model)


def test_a_skipped_layer_trains_as_if_it_were_alone(model: Any, x: Tensor) -> None:
    """A layer without a part in the loss has no gradient: a zero would move it by momentum and weight decay."""
    reference = one_by_one(model)
    optimizers = [torch.optim.AdamW(trainable(m).values(), lr=0.05, weight_decay=0.5) for m in (model, reference)]
    for skip in (set(), {"second"}, {"second"}):
        for each, optimizer in zip((model, reference), optimizers, strict=True):
            each.get_base_model().skip = skip
            optimizer.zero_grad()
            each(x).square().sum().backward()
            optimizer.step()
    for (name, found), expected in zip(trainable(model).items(), trainable(reference).values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_a_layer_called_twice(model: Any, x: Tensor) -> None:
    model.get_base_model().repeat = {"first", "third"}
    compare(model, one_by_one(model), x)
    write_data(model)
    compare(model, one_by_one(model), x)


def test_two_forwards_then_two_separate_backwards(model: Any, x: Tensor) -> None:
    reference = one_by_one(model)
    for each in (model, reference):
        first, second = each(x), each(2 * x)
        second.square().sum().backward()
        first.sum().backward()
    assert_same_gradients(model, reference)


def test_one_forward_with_two_losses(model: Any, x: Tensor) -> None:
    reference = one_by_one(model)
    for each in (model, reference):
        y = each(x)
        y.square().sum().backward(retain_graph=True)
        y.sum().backward()
    assert_same_gradients(model, reference)


def test_a_backward_after_the_step_of_another(model: Any, x: Tensor) -> None:
    """The graph of an earlier forward keeps the values that it was made with."""
    reference = one_by_one(model)
    for each in (model, reference):
        optimizer = torch.optim.SGD(trainable(each).values(), lr=0.01)
        first, second = each(x), each(2 * x)
        second.square().mean().backward()
        expected = [p.grad.clone() for p in trainable(each).values()]
        optimizer.zero_grad()
        first.square().mean().backward()
        optimizer.step()
        assert len(expected) > 0
    assert_same_gradients(model, reference)
    compare(model, one_by_one(model), x)


def test_gradient_accumulation(model: Any) -> None:
    reference = one_by_one(model)
    for each in (model, reference):
        optimizer = torch.optim.AdamW(trainable(each).values(), lr=0.01)
        torch.manual_seed(3)
        for _ in range(3):
            for _ in range(4):
                each(torch.randn(5, 24)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for found, expected in zip(trainable(model).values(), trainable(reference).values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_no_grad_and_grad_forwards_alternate(model: Any, x: Tensor) -> None:
    for _ in range(3):
        with torch.no_grad():
            model(x)
        write_data(model)
        reference = one_by_one(model)
        compare(model, reference, x)
        with torch.inference_mode():
            expected = reference(x)
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)


def test_inference_mode_first_then_training(model: Any, x: Tensor) -> None:
    with torch.inference_mode():
        model(x)
    compare(model, one_by_one(model), x)


def test_some_operators_frozen(model: Any, x: Tensor) -> None:
    layers_of(model)[1].adapter("default").requires_grad_(False)
    layers_of(model)[2].adapter("default").generator.requires_grad_(False)
    compare(model, one_by_one(model), x)


def test_swapping_adapters(model: Any, x: Tensor) -> None:
    from helpers import psoft

    model.add_adapter("other", psoft(target_modules=["first", "second"]))
    randomize(model, "other")
    for _ in range(2):
        for name in ("other", "default"):
            model.set_adapter(name)
            reference = one_by_one(model)
            compare(model, reference, x)
            write_data(model)
    model.delete_adapter("other")
    compare(model, one_by_one(model), x)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("build", [tiny_opt, tiny_llama])
def test_gradient_checkpointing(build: Callable[..., nn.Module], reentrant: bool) -> None:
    model = adapt(build(layers=3), target_modules=["q_proj", "v_proj", "k_proj"], rank_pattern={"k_proj": 5}).train()
    reference = one_by_one(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    tokens = some_tokens()
    for _ in range(2):
        for each in (model, reference):
            each(input_ids=tokens, labels=tokens).loss.backward()
        assert_same_gradients(model, reference, 1e-4)
        for each in (model, reference):
            each.zero_grad()
            randomize(each, seed=2)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("layers", [("first",), ("second",), ("first", "third")])
def test_checkpointing_of_some_layers(reentrant: bool, layers: tuple[str, ...], model: Any, x: Tensor) -> None:
    reference = one_by_one(model)
    for name in layers:
        layer = getattr(model.get_base_model(), name)
        original = layer.forward
        layer.forward = lambda value, f=original: checkpoint(f, value, use_reentrant=reentrant)
    for _ in range(2):
        outputs = []
        for each in (model, reference):
            each.zero_grad()
            outputs.append(each(x.clone().requires_grad_()))
            outputs[-1].square().sum().backward()
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
        assert_same_gradients(model, reference)
        for each in (model, reference):
            randomize(each, seed=3)


@pytest.mark.parametrize("mode", CHECKPOINTING)
@pytest.mark.parametrize("method", WITH_LORA)
def test_hooks_on_parameters_run_once_and_with_a_gradient(method: str, mode: str | None) -> None:
    """DDP averages, and optimisers within backward step, when such a hook runs."""
    model = get_peft_model(Chain(12, 12, 12, 12, checkpointing=mode), configured(method)).train()
    called = []
    for name, parameter in trainable(model).items():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: called.append((name, p.grad is not None)))
    model(torch.randn(3, 12, requires_grad=True)).square().sum().backward()
    assert sorted(called) == sorted((name, True) for name in trainable(model))


# -- copies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forward_first", [True, False])
def test_a_deepcopy_is_independent(forward_first: bool, model: Any, x: Tensor) -> None:
    if forward_first:
        model(x)
    twin = copy.deepcopy(model)
    before = model(x).detach()
    randomize(twin, std=0.5)
    assert torch.equal(model(x), before)
    compare(twin, one_by_one(twin), x)
    assert (twin(x) - before).abs().max() > 1e-3
    del model
    compare(twin, one_by_one(twin), x)


def test_a_pickled_model_is_the_same_and_independent(model: Any, x: Tensor) -> None:
    expected = model(x)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(x), expected)
    randomize(twin, std=0.5)
    assert torch.equal(model(x), expected)
    compare(twin, one_by_one(twin), x)


def test_torch_save_of_a_whole_model(model: Any, x: Tensor) -> None:
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)


def test_a_copied_layer_brings_nothing_of_the_rest_of_the_model() -> None:
    """Copying or pickling one block of a model must not copy all its other layers."""
    big = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 2000), nn.Linear(2000, 24))
    big = adapt(big, target_modules=["0", "1", "2"])
    layer = big.get_base_model()[0]
    own = sum(t.nbytes for t in [*layer.parameters(), *layer.buffers()])
    assert len(pickle.dumps(layer)) < 2 * own + 20_000
    twin = copy.deepcopy(layer)
    y = torch.randn(3, 24)
    torch.testing.assert_close(twin(y), layer(y))


def test_functional_call(model: Any, x: Tensor) -> None:
    reference = one_by_one(model)
    model(x)
    values = {name: (p + 0.1 * torch.randn_like(p)).detach().requires_grad_() for name, p in trainable(model).items()}
    outputs, grads = [], []
    for each in (model, reference):
        y = torch.func.functional_call(each, values, (x,))
        outputs.append(y)
        grads.append(torch.autograd.grad(y.square().sum(), list(values.values())))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    compare(model, reference, x)  # and nothing of it is left
    with torch.no_grad():
        found = torch.func.functional_call(model, values, (x,))
        torch.testing.assert_close(found, outputs[0], rtol=1e-5, atol=1e-6)


def test_a_batch_outlives_a_deleted_layer(model: Any, x: Tensor) -> None:
    """Pruning: the layers that remain go on as before."""
    model.get_base_model().second = nn.Linear(40, 32).requires_grad_(False)
    compare(model, one_by_one(model), x)


def test_casting_the_model(model: Any, x: Tensor) -> None:
    model(x)
    model.double()
    compare(model, one_by_one(model), x.double())


def test_the_reference_shares_nothing(model: Any, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above compare with computes every operator at every call."""
    reference = one_by_one(model)
    with counted(monkeypatch, "isotune.methods.psoft.PsoftOperator.evaluate") as calls:
        for count in (3, 6):
            reference(x)
            assert len(calls) == count


@pytest.mark.parametrize("grad", [True, False])
def test_a_forward_that_failed_leaves_nothing_behind(grad: bool, model: Any, x: Tensor) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    inner = model.get_base_model()
    hidden = torch.randn(5, 40)
    with torch.set_grad_enabled(grad):
        handle = inner.third.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(x)
        handle.remove()
        write_data(model)
        reference = one_by_one(model)
        torch.testing.assert_close(
            inner.second(hidden), reference.get_base_model().second(hidden), rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(model(x), reference(x), rtol=1e-5, atol=1e-6)


def test_stack_helper_really_skips() -> None:
    stack, x = Stack(), torch.randn(2, 24)
    model = adapt(stack, target_modules=["second"])
    adapted = model(x)
    stack.skip = {"second"}
    assert (model(x) - adapted).abs().max() > 1e-3
