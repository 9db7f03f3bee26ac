"""What a training and a decoding do on a GPU: several passes, checkpointing, graphs, compilation, waits and memory."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from gpu_device import CUDA_ALONE, DEVICE, METHOD, PRECISIONS, gradients, live_memory, waits_refused, why_not_compiled
from torch import Tensor, nn

from helpers import (
    CHECKPOINTING,
    OPTIONS_FOR_TINY,
    WITH_LORA,
    Chain,
    as_trained,
    configured,
    move,
    relative_error,
    some_tokens,
    tiny_llama,
    trainable,
)
from isotune import evaluated_once, get_peft_model
from isotune.algebra import acceleration

WITH_ADAPTERS = pytest.mark.parametrize("method", WITH_LORA)


@pytest.fixture(autouse=True)
def in_float32() -> Any:
    """Products are not rounded to TF32."""
    with PRECISIONS["fp32"].set():
        yield


def chain(method: str, **options: Any) -> Any:
    """A few layers with an adapter off the identity, in training mode."""
    return as_trained(method, Chain(**options).to(DEVICE)).to(DEVICE).train()


@functools.cache
def llama() -> nn.Module:
    """A small random model, of which each test takes a copy."""
    return tiny_llama().to(DEVICE)


def decoder(method: str | None) -> Any:
    """The same with an adapter on all its linear layers, off the identity; None adapts nothing."""
    model = copy.deepcopy(llama())
    if method is None:
        return model
    name, own = ("oft", {"coft": True, "eps": 0.5}) if method == "coft" else (method, {})
    options = {**OPTIONS_FOR_TINY.get(name, {}), **own}
    targets = [n for n, module in model.named_modules() if isinstance(module, nn.Linear) and n != "lm_head"]
    return move(get_peft_model(model, configured(method, targets, **options)), size=0.05).to(DEVICE).eval()


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], limit: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    assert found
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) < limit, name


@METHOD
def test_two_passes_before_a_backward(method: str) -> None:
    model = chain(method)
    x, other = torch.randn(2, 5, 12, device=DEVICE)
    both = gradients(model, lambda: (model(x).sin() + model(other).sin()).sum())
    first, second = (gradients(model, lambda each=each: model(each).sin().sum()) for each in (x, other))
    assert_close(both, {name: first[name] + second[name] for name in first})


@METHOD
@pytest.mark.parametrize("mode", CHECKPOINTING[1:])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointing_changes_no_gradient(method: str, mode: str, precision: str) -> None:
    plain, checkpointing = chain(method), chain(method, checkpointing=mode)
    x = torch.randn(5, 12, device=DEVICE, requires_grad=True)
    with PRECISIONS[precision].set():
        found, expected = (gradients(m, lambda m=m: m(x).float().sin().sum()) for m in (checkpointing, plain))
    assert_close(found, expected)


@METHOD
def test_data_parallel_on_one_device(method: str) -> None:
    model, x = chain(method), torch.randn(6, 12, device=DEVICE)
    parallel = nn.DataParallel(model, device_ids=[0] if DEVICE.type == "cuda" else None)
    assert relative_error(parallel(x).detach(), model(x).detach()) < 1e-6
    assert_close(
        gradients(model, lambda: parallel(x).sin().sum()), gradients(model, lambda: model(x).sin().sum()), 1e-6
    )


@CUDA_ALONE
@WITH_ADAPTERS
def test_a_training_step_in_a_cuda_graph(method: str) -> None:
    """Forward, backward and the optimizer's step, recorded once and replayed: the losses of an eager twin."""
    model, x = chain(method), torch.randn(5, 12, device=DEVICE)
    eager = copy.deepcopy(model)

    def step(each: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = each(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    mine, theirs = (torch.optim.Adam(trainable(m).values(), lr=1e-2, capturable=True) for m in (model, eager))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        warm = [step(model, mine) for _ in range(3)]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    mine.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        loss = step(model, mine)
    found = list(warm)
    for _ in range(6):
        graph.replay()
        found.append(loss.clone())
    expected = [step(eager, theirs) for _ in range(9)]
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-4, atol=1e-7)
    assert float(expected[-1]) < 0.999 * float(expected[0])
    # An eager pass sees what the graph has written to the parameters.
    with torch.no_grad():
        assert relative_error(model.eval()(x), eager.eval()(x)) < 1e-3


@METHOD
def test_decoding_with_a_static_cache(method: str) -> None:
    """The tokens of a cache of fixed size are those of a growing one, and of the merged model."""
    model = decoder(method)
    options: dict[str, Any] = {
        "input_ids": some_tokens(2, 4).to(DEVICE),
        "attention_mask": torch.ones(2, 4, device=DEVICE, dtype=torch.long),
        "max_new_tokens": 8,
        "min_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    expected = model.generate(**options)
    found = [model.generate(cache_implementation="static", disable_compile=True, **options)]
    model.merge_adapter()
    found.append(model.generate(**options))
    for each in found:
        assert torch.equal(each.sequences, expected.sequences)
        assert relative_error(torch.stack(each.logits), torch.stack(expected.logits)) < 1e-4


@CUDA_ALONE
@pytest.mark.parametrize("method", ["psoft", "lora_xs", "oplora"])
def test_one_token_by_its_kernels(method: str) -> None:
    """Decoded in bfloat16 in a call, the logits of each token are those of plain products, to rounding."""
    model = decoder(method).bfloat16()
    tokens = some_tokens(1, 12).to(DEVICE)

    @torch.no_grad()
    def logits() -> Tensor:
        cache, found = model(input_ids=tokens[:, :4], use_cache=True).past_key_values, []
        for index in range(4, 12):
            state = model(input_ids=tokens[:, index : index + 1], past_key_values=cache, use_cache=True)
            cache = state.past_key_values
            found.append(state.logits)
        return torch.cat(found).float()

    with evaluated_once(model):
        found = logits()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(acceleration, "DEVICE", "none")
        expected = logits()
    assert not torch.equal(found, expected)
    assert relative_error(found, expected) < 3e-2


@CUDA_ALONE
@WITH_ADAPTERS
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_a_training_step_waits_for_nothing(method: str, precision: str) -> None:
    model, x = chain(method), torch.randn(5, 12, device=DEVICE)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(x).float().square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            model(x)

    with PRECISIONS[precision].set():
        step()
        with waits_refused():
            step()
            step()


@CUDA_ALONE
@WITH_ADAPTERS
@pytest.mark.parametrize("generating", [True, False])
def test_ten_decoded_tokens_wait_for_nothing(method: str, generating: bool) -> None:
    """Of a small Llama, each token by the cache of those before it; where transformers itself does not wait."""
    frozen, model = decoder(None), decoder(method)

    @torch.no_grad()
    def decode(one: Any) -> None:
        state, token = None, some_tokens(2, 1).to(DEVICE)
        cache = one(input_ids=some_tokens(2, 4).to(DEVICE), use_cache=True).past_key_values
        with waits_refused():
            for _ in range(10):
                state = one(input_ids=token, past_key_values=cache, use_cache=True)
                cache, token = state.past_key_values, state.logits[:, -1:].argmax(-1)

    try:
        decode(frozen)
    except RuntimeError as error:
        pytest.skip(f"the model without an adapter waits: {error}")
    if generating:
        with model.base_model._enable_peft_forward_hooks():
            decode(model.get_base_model())
    else:
        decode(model)


@METHOD
def test_memory_does_not_grow_with_the_steps(method: str) -> None:
    """After 200 steps as much is allocated as after 20, passes without gradients among them."""
    model, x = chain(method), torch.randn(5, 12, device=DEVICE)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-3)

    def steps(count: int) -> int:
        for _ in range(count):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            model(x)
        return live_memory()

    after_twenty = steps(20)
    assert steps(180) <= after_twenty  # less where garbage of another test went


@pytest.mark.parametrize(("method", "mode"), [("psoft", "default"), ("oft", "reduce-overhead")])
def test_compiled_by_inductor(method: str, mode: str) -> None:
    """Outputs and gradients of a few steps are those of an eager twin."""
    reason = why_not_compiled()
    if reason is not None:
        pytest.skip(reason)
    torch._dynamo.reset()
    # Of two layers, since each of their kernels takes a slow host most of a second to compile.
    model = as_trained(method, Chain(12, 24, 12).to(DEVICE)).to(DEVICE).train()
    eager = copy.deepcopy(model)
    fast = torch.compile(model, mode=mode)
    optimizers = [torch.optim.SGD(trainable(each).values(), lr=0.05) for each in (model, eager)]
    for _ in range(4):
        x = torch.randn(5, 12, device=DEVICE)
        torch.compiler.cudagraph_mark_step_begin()
        found, expected = (gradients(m, lambda m=m, x=x: m(x).sin().sum()) for m in (fast, eager))
        assert_close({name.removeprefix("_orig_mod."): g for name, g in found.items()}, expected, 1e-4)
        for optimizer in optimizers:
            optimizer.step()
    with torch.no_grad():
        assert relative_error(fast(x), eager(x)) < 1e-5
    torch._dynamo.reset()
