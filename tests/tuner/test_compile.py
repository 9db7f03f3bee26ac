"""torch.compile: one graph without a break, the function of the eager model, nothing compiled twice."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn
from torch._dynamo.utils import counters

from helpers import (
    ALIKE,
    OPTIONS_FOR_12,
    OPTIONS_FOR_TINY,
    adapt,
    adapted_stack,
    assert_same_gradients,
    form_of,
    layers_of,
    one_by_one,
    randomize,
    some_tokens,
    tiny_llama,
    trainable,
)
from isotune import get_peft_model
from isotune.methods import METHODS

pytestmark = [
    pytest.mark.covered(method=("psoft",), state=("merged",)),  # compiling takes seconds
    pytest.mark.skipif(
        Version(torch.__version__).release < (2, 9), reason="before torch 2.9 PEFT's own hooks break every graph"
    ),
]


@pytest.fixture(autouse=True)
def nothing_twice() -> Iterator[None]:
    """A second compilation of anything is an error, and what was compiled is forgotten after the test."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def compiled(model: nn.Module, backend: str = "aot_eager", **options: Any) -> Any:
    return torch.compile(model, fullgraph=True, backend=backend, **options)


class EveryHost(nn.Module):
    """An embedding, a convolution and two linear layers, one of them wider than it is long."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(19, 12)
        self.filter = nn.Conv1d(12, 12, 3, padding=1, groups=3)
        self.up = nn.Linear(12, 36)
        self.down = nn.Linear(36, 12, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.filter(self.words(tokens).mT).mT)
        return self.down(torch.tanh(self.up(x)))


def on_every_host(method: str) -> Any:
    targets = ["words", "filter", "up", "down"]
    return get_peft_model(EveryHost(), METHODS[method](target_modules=targets, **OPTIONS_FOR_12[method])).train()


def on_llama(method: str) -> Any:
    """One block with all its layers adapted: more of them are more to trace, and nothing new."""
    model = tiny_llama(layers=1)
    name, form = form_of(method)
    config = METHODS[name](target_modules="all-linear", **{**OPTIONS_FOR_TINY[name], **form})
    return get_peft_model(model, config).train()


def train_beside_eager(model: Any, backend: str, steps: int, dynamic: bool = True) -> None:
    """Outputs and gradients of every step are those of an eager copy, whatever the size of the batch."""
    randomize(model)
    eager, fast = copy.deepcopy(model), compiled(model, backend)
    optimizers = [torch.optim.SGD(trainable(each).values(), lr=1e-3) for each in (model, eager)]
    for step in range(steps):
        # A batch of a size that is also a rank or a width here would be taken for that.
        tokens = torch.randint(4, 19, (5 + 2 * (step % 4) if dynamic else 3, 7))
        torch._dynamo.mark_dynamic(tokens, 0)
        found, expected = fast(tokens), eager(tokens)
        if not isinstance(found, Tensor):
            found, expected = found.logits, expected.logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        for output in (found, expected):
            output.square().mean().backward()
        assert_same_gradients(model, eager, 1e-5)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


# RoAd compiles as GOFT does.
@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in METHODS if name not in (*ALIKE, "road")])
def test_steps_with_changing_batches(method: str) -> None:
    train_beside_eager(on_every_host(method), "aot_eager", 8)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["psoft", "oft-output"])
def test_steps_of_a_llama_with_changing_batches(method: str) -> None:
    train_beside_eager(on_llama(method), "aot_eager", 8)


@pytest.mark.slow
def test_the_code_that_inductor_makes() -> None:
    train_beside_eager(on_every_host("psoft"), "inductor", 8)


@pytest.mark.parametrize(
    "method", ["psoft", *(pytest.param(name, marks=pytest.mark.slow) for name in ("oft", "goft", "hra"))]
)
@pytest.mark.matrix
def test_generation_with_a_static_cache(method: str) -> None:
    """As transformers compiles it: the prompt by one graph, every token after it by another."""
    from transformers import CompileConfig

    model = on_llama(method).eval()
    randomize(model)
    options = {
        "input_ids": some_tokens(2, 4),
        "attention_mask": torch.ones(2, 4),
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
    }
    expected = model.generate(**options)
    how = CompileConfig(fullgraph=True, backend="aot_eager", mode=None, dynamic=False)
    how._compile_all_devices = True  # transformers would not on a CPU
    with torch._dynamo.config.patch(error_on_recompile=False):
        found = model.generate(cache_implementation="static", compile_config=how, **options)
    assert torch.equal(found, expected)
    assert counters["stats"]["unique_graphs"] <= 2
    assert not counters["graph_break"]


@pytest.mark.slow
def test_a_dynamic_cache_and_no_gradients() -> None:
    """Token by token as generate does, with the batch and the length of what is cached left open."""
    model = on_llama("psoft").eval()
    randomize(model)
    fast = compiled(model, "eager", dynamic=True)
    tokens = some_tokens(3, 9)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=False):
        cache = fast(tokens[:, :4], use_cache=True).past_key_values
        for at in range(4, 9):
            found = fast(tokens[:, at : at + 1], past_key_values=cache, use_cache=True)
            torch.testing.assert_close(
                found.logits[:, 0], model(tokens[:, : at + 1]).logits[:, -1], rtol=1e-4, atol=1e-4
            )
    assert counters["stats"]["unique_graphs"] <= 3
    assert not counters["graph_break"]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.slow
def test_a_trace_holds_one_evaluation_for_all_layers(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph of a model does not grow by a factorisation with each layer."""
    model = adapted_stack(r=16)
    x = torch.randn(5, 24)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(compiled(model, keep)(x), model(x), rtol=1e-5, atol=1e-6)
    (graph,) = graphs
    parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
    solves = [node for part in parts for node in part.graph.nodes if "lu_factor" in str(node.target)]
    assert len(layers_of(model)) == 3
    assert len(solves) == 1


@pytest.mark.slow
def test_eager_and_compiled_passes_alternate() -> None:
    """Neither finds what the other has left; parameters written without a trace are seen."""
    model = adapted_stack()
    fast, x = compiled(model), torch.randn(5, 24)
    for step in range(3):
        reference = one_by_one(model)
        with torch.no_grad():
            torch.testing.assert_close(model(x), reference(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(fast(x), reference(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model(x), reference(x), rtol=1e-5, atol=1e-6)
        for parameter in trainable(model).values():
            parameter.data.add_(0.1 * (step + 1))


@pytest.mark.matrix
def test_blocks_compiled_one_by_one_share_their_code() -> None:
    """Regional compilation: the second of equal blocks costs nothing."""
    blocks = [nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24)) for _ in range(4)]
    model = adapt(nn.Sequential(*blocks), target_modules=r"\d\.[02]")
    eager, x = copy.deepcopy(model), torch.randn(5, 24, requires_grad=True)
    for block in model.get_base_model():
        block.compile(fullgraph=True, backend="aot_eager")
    for each in (model, eager):
        each(x).square().sum().backward()
    assert_same_gradients(model, eager, 1e-5)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.matrix
@pytest.mark.parametrize("method", ["psoft", "oft"])
def test_a_trace_with_checkpointing(method: str) -> None:
    model = on_llama(method)
    randomize(model)
    eager = copy.deepcopy(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.get_base_model().disable_input_require_grads()  # PEFT's hook for re-entrant checkpointing cannot be traced
    model.config.use_cache = False
    tokens = some_tokens()
    compiled(model)(input_ids=tokens, labels=tokens).loss.backward()
    eager(input_ids=tokens, labels=tokens).loss.backward()
    assert_same_gradients(model, eager, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["psoft", "oft"])
def test_a_trace_under_autocast(method: str) -> None:
    model = on_every_host(method)
    randomize(model)
    eager = copy.deepcopy(model)
    tokens = torch.randint(4, 19, (3, 7))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = compiled(model)(tokens), eager(tokens)
    torch.testing.assert_close(found, expected)
    for output in (found, expected):
        output.float().square().mean().backward()
    assert_same_gradients(model, eager, 2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("state", ["disabled", "merged", "two adapters"])
def test_other_states_of_a_model(state: str) -> None:
    model = on_every_host("psoft").eval()
    randomize(model)
    if state == "two adapters":
        model.add_adapter("other", METHODS["psoft"](target_modules=["up", "down"], r=3))
        randomize(model, "other")
        model.base_model.set_adapter(["default", "other"])
    elif state == "merged":
        model.merge_adapter()
    tokens = torch.randint(4, 19, (3, 7))
    if state == "disabled":
        with model.disable_adapter():
            torch.testing.assert_close(compiled(model)(tokens), model(tokens), rtol=1e-5, atol=1e-6)
    else:
        torch.testing.assert_close(compiled(model)(tokens), model(tokens), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(Version(torch.__version__).release < (2, 10), reason="torch 2.9 breaks the graph here")
def test_dropout_of_operators_in_a_trace() -> None:
    """What is dropped is drawn at each call, not at the compilation."""
    model = get_peft_model(
        EveryHost(), METHODS["oft"](target_modules=["up", "down"], oft_block_size=3, module_dropout=0.5)
    )
    randomize(model)
    fast, tokens = compiled(model.train()), torch.randint(4, 19, (3, 7))
    assert len({float(fast(tokens).sum().detach()) for _ in range(8)}) > 2
