"""Compiled decoding: the operators are evaluated before the first token, and what is compiled reads the result."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from packaging.version import Version
from peft import inject_adapter_in_model
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import CompileConfig

from helpers import (
    OPTIONS_FOR_TINY,
    adapt,
    adapted_stack,
    counted,
    layers_of,
    psoft,
    randomize,
    some_tokens,
    tiny_llama,
)
from isotune import evaluated_once, get_peft_model
from isotune.methods import METHODS

pytestmark = [
    pytest.mark.covered(method=("psoft",)),
    pytest.mark.skipif(
        Version(torch.__version__).release < (2, 9), reason="before torch 2.9 PEFT's own hooks break every graph"
    ),
]
CAYLEY = "isotune.algebra.cayley._CayleyOfEntries.forward"
OTHERS = ("oft", "boft", "goft", "hra", "lora_xs", "oplora")
SOME = ["psoft", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]


class Graphs:
    """A backend that runs what it is given as it is and keeps it."""

    def __init__(self) -> None:
        self.seen: list[torch.fx.GraphModule] = []

    def __deepcopy__(self, memo: Any) -> Graphs:
        return self  # transformers copies the options of generate

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        self.seen.append(graph)
        return graph.forward

    def evaluating(self, model: nn.Module) -> list[bool]:
        """Of each graph, whether it takes a parameter that is evaluated, or has a factorisation or inverse in it."""
        parameters = {name for layer in layers_of(model) for name in layer.adapter("default").evaluated}
        found = []
        for graph in self.seen:
            parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
            nodes = [node for part in parts for node in part.graph.nodes]
            takes = (node.name for node in nodes if node.op == "placeholder")
            does = (str(node.target) for node in nodes if node.op != "placeholder")
            found.append(
                any(name.endswith(f"parameters_{one}_") for name in takes for one in parameters)
                or any(
                    word in name for name in does for word in ("linalg", "lu_factor", "lu_solve", "solve_triangular")
                )
            )
        return found


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    """What is compiled in the test, from nothing and forgotten after it."""
    torch._dynamo.reset()
    counters.clear()
    yield Graphs()
    torch._dynamo.reset()


def nothing_new() -> Any:
    """A block in which another compilation of the same code is an error."""
    return torch._dynamo.config.patch(error_on_recompile=True)


def causal(method: str = "psoft", std: float = 0.3) -> Any:
    config = METHODS[method](target_modules="all-linear", **OPTIONS_FOR_TINY[method])
    model = get_peft_model(tiny_llama(layers=1), config).eval()
    randomize(model, std=std)
    return model


def generate(model: Any, backend: Graphs | None = None) -> Tensor:
    """Ten tokens; with a backend, those after the first by code that transformers has compiled with it."""
    length = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    tokens = some_tokens(2, 4)
    if backend is not None:
        how = CompileConfig(fullgraph=True, backend=backend, mode=None, dynamic=False)
        how._compile_all_devices = True  # transformers would not on a CPU
        length |= {"cache_implementation": "static", "compile_config": how}
    return model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **length)


def train(model: Any) -> None:
    """A step that is long enough for other tokens."""
    model.train()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0)
    tokens = some_tokens()
    model(input_ids=tokens, labels=tokens).loss.backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(0.5 * parameter.numel() ** 0.5 / parameter.grad.norm().clamp_min(1e-30))
    optimizer.step()
    model.eval()


def given_in(model: nn.Module) -> int:
    return sum(layer.adapter("default").given.tensors is not None for layer in layers_of(model))


@pytest.mark.parametrize("method", SOME)
def test_no_token_after_the_first_is_evaluated(method: str, graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next call follows an optimiser's step without compiling anything."""
    model = causal(method)
    first = generate(model, graphs)
    assert torch.equal(first, generate(model))
    assert len(graphs.seen) == 1
    assert graphs.evaluating(model) == [False]
    train(model)
    with nothing_new():
        owner = next(cls for cls in type(layers_of(model)[0].adapter("default")).__mro__ if "evaluate" in vars(cls))
        groups = {id(layer.adapter("default").shared) for layer in layers_of(model)}
        with counted(monkeypatch, f"{owner.__module__}.{owner.__name__}.evaluate") as evaluations:
            second = generate(model, graphs)
        assert len(evaluations) == len(groups)
    assert torch.equal(second, generate(copy.deepcopy(model)))
    assert not torch.equal(second, first)
    assert len(graphs.seen) == 1


@pytest.mark.slow
def test_each_of_two_adapters_has_its_own(graphs: Graphs) -> None:
    model = causal()
    model.add_adapter("other", psoft(r=3, target_modules=["q_proj", "down_proj"]))
    randomize(model, "other", std=0.5, seed=3)
    found = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        found[name] = generate(model, graphs)
        assert torch.equal(found[name], generate(model))
    assert not torch.equal(found["default"], found["other"])
    with nothing_new():
        for name in ("default", "other", "default"):
            model.set_adapter(name)
            assert torch.equal(generate(model, graphs), found[name])
    assert graphs.evaluating(model) == [False, False]


@pytest.mark.slow
def test_a_bare_model_in_a_block(graphs: Graphs) -> None:
    """Nothing of PEFT's tells that a call begins; outside of a block all is as it was."""
    model: Any = inject_adapter_in_model(psoft(target_modules=["q_proj", "v_proj"]), tiny_llama(layers=1)).eval()
    randomize(model, std=0.5)
    with evaluated_once(model):
        found = generate(model, graphs)
    assert graphs.evaluating(model) == [False]
    assert torch.equal(found, generate(model))
    assert torch.equal(generate(model, graphs), found)
    within, *outside = graphs.evaluating(model)
    assert not within
    assert outside
    assert all(outside)
    randomize(model, std=0.5, seed=9)
    with nothing_new():
        without = generate(model, graphs)
        with evaluated_once(model):
            inside = generate(model, graphs)
    assert torch.equal(inside, without)
    assert torch.equal(inside, generate(model))
    assert not torch.equal(inside, found)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_pass_of_a_block_may_be_compiled(dtype: torch.dtype, graphs: Graphs) -> None:
    """Training between blocks neither sees what they were given nor is compiled again for it."""
    model = adapted_stack(dtype)
    fast, x = torch.compile(model, backend=graphs, fullgraph=True), torch.randn(5, 24, dtype=dtype)
    for step in range(3):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            with torch.no_grad(), evaluated_once(fast):
                assert torch.equal(fast(x), fast(x))
                torch.testing.assert_close(fast(x), model(x))
            assert given_in(model) == 0
            found = fast(x)
        torch.testing.assert_close(found, model(x))
        found.square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.data -= 0.5 * parameter.grad.sign()
    assert graphs.evaluating(model) == [False, True]


def test_blocks_compiled_one_by_one_are_given_theirs(graphs: Graphs) -> None:
    blocks = [nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24)) for _ in range(4)]
    model = adapt(nn.Sequential(*blocks), target_modules=r"\d\.[02]").eval()
    x = torch.randn(5, 24)
    with torch.no_grad():
        expected = model(x)
        for block in model.get_base_model():
            block.compile(fullgraph=True, backend=graphs)
        with nothing_new(), evaluated_once(model):
            torch.testing.assert_close(model(x), expected)
    assert graphs.evaluating(model) == [False]


def test_passes_of_a_block_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where values are not compared, as on a GPU: a loop of PeftModel's forward in a block evaluates before it."""
    model, x = adapted_stack(), torch.randn(5, 24)
    model(x)
    model.to("meta")
    monkeypatch.setattr("isotune.adapter.evaluation.is_symbolic", lambda tensor: False)
    with torch.no_grad(), counted(monkeypatch, CAYLEY) as calls:
        for _ in range(3):
            model(x.to("meta"))
        assert len(calls) == 3
        with evaluated_once(model):
            assert len(calls) == 4
            for _ in range(3):
                model(x.to("meta"))
        assert len(calls) == 4
        with evaluated_once(model):
            assert len(calls) == 5


def test_nothing_is_given_after_a_block_or_in_another_thread() -> None:
    model = adapted_stack()
    elsewhere = []

    def interrupted() -> None:
        with evaluated_once(model):
            assert given_in(model) == 3
            thread = threading.Thread(target=lambda: elsewhere.append(given_in(model)))
            thread.start()
            thread.join()
            with torch.no_grad(), evaluated_once(model.get_base_model()):  # within another it ends nothing
                model(torch.randn(5, 24))
            assert given_in(model) == 3
            assert given_in(copy.deepcopy(model)) == 0
            model.add_adapter("other", psoft(target_modules=["first"]))  # finds all layers anew
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert elsewhere == [0]
    assert given_in(model) == 0


def test_a_model_without_an_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="no isotune adapter"), evaluated_once(nn.Linear(3, 3)):
        pass
