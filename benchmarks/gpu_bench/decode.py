"""Decoding: the time a new token takes by `generate`, and by a CUDA graph of one step with a static cache."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache

from gpu_bench.journal import Note
from gpu_bench.models import FROZEN, Settings, adapted, llama, usual
from gpu_bench.timing import attempt, compared, interleaved
from isotune import evaluated_once
from isotune.adapter.operator import Adapter

PROMPT = 32
ROUNDS = 3
WARMUP = 3


@contextlib.contextmanager
def counted_evaluations(model: nn.Module) -> Iterator[list[str]]:
    """Note each evaluation of isotune's operators, of one layer or of many at once, by its class."""
    found: list[str] = []
    classes = {type(module) for module in model.modules() if isinstance(module, Adapter)}
    own = {cls: cls.__dict__.get("evaluate") for cls in classes}
    for cls in classes:

        def evaluate(self: Any, *args: Any, wrapped: Any = cls.evaluate, **kwargs: Any) -> Any:
            found.append(type(self).__name__)
            return wrapped(self, *args, **kwargs)

        cls.evaluate = evaluate  # type: ignore[method-assign]
    try:
        yield found
    finally:
        for cls, method in own.items():
            if method is None:
                del cls.evaluate
            else:
                cls.evaluate = method  # type: ignore[method-assign]


def models(settings: Settings, shape: str, layers: int, errors: dict[str, str]) -> dict[str, Any]:
    """The usual variants as causal language models, and the first of isotune's merged."""
    base = llama(settings, settings.shapes[shape], layers, causal=True)
    found: dict[str, Any] = {}
    for name, make in usual(settings).items():
        model = attempt(name, errors, lambda make=make: adapted(base, make).eval())
        if model is not None:
            found[name] = model
    name = f"isotune PSOFT r={settings.ranks[0]}"

    def merged() -> Any:
        # On memory of its own: merging writes to the weights.
        return adapted(copy.deepcopy(base), usual(settings)[name]).eval().merge_and_unload()

    model = attempt(f"{name} merged", errors, merged)
    return found if model is None else {**found, f"{name} merged": model}


def _prompt(settings: Settings, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 1024, (batch, PROMPT), generator=generator).to(settings.device)


def _generate(model: Any, ids: Tensor, count: int, **options: Any) -> Any:
    length = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **length, **options)


@torch.no_grad()
def eager(settings: Settings, note: Note, shape: str, layers: int, batch: int) -> None:
    """`generate` with its usual cache: ms a token after the first, and evaluations after the first token.

    The time of the first token, with the prompt, is the same call's for one token and taken off.
    """
    errors: dict[str, str] = {}
    found, ids, count = models(settings, shape, layers, errors), _prompt(settings, batch), settings.new_tokens
    note(shape=shape, layers=layers, batch=batch, prompt=PROMPT, tokens=count, how="generate, eager, dynamic cache")
    evaluations: dict[str, int] = {}

    def counted(name: str, model: Any) -> bool:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        after: list[int] = []
        with counted_evaluations(model) as seen:
            hook = base.register_forward_hook(lambda *_: after.append(len(seen)))
            _generate(model, ids, count)
            hook.remove()
        evaluations[name] = after[-1] - after[0]
        return True

    working = {n: m for n, m in found.items() if attempt(n, errors, lambda n=n, m=m: counted(n, m))}
    # Both lengths are in one race, so that a slow moment falls on both.
    first = "{}, first token"
    actions = {n: lambda m=m: _generate(m, ids, count) for n, m in working.items()}
    actions |= {first.format(n): lambda m=m: _generate(m, ids, 1) for n, m in working.items()}
    times = interleaved(settings, actions, errors, ROUNDS, 30)
    later = {
        n: [(a - c, b - d) for (a, b), (c, d) in zip(times[n], times[first.format(n)], strict=True)]
        for n in working
        if n in times and first.format(n) in times
    }
    rows = compared(later, FROZEN, per=count - 1)
    for name, row in rows.items():
        row["evaluations_after_first_token"] = evaluations[name]
    note(variants=rows, errors=errors)


def block(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """A block in which isotune's operators are evaluated once, or nothing where a model has none."""
    has_own = any(isinstance(module, Adapter) for module in model.modules())
    return evaluated_once(model) if has_own else contextlib.nullcontext()


def _one_step(settings: Settings, model: Any, ids: Tensor, length: int, evaluations: list[int]) -> Callable[[], Any]:
    """One decoded token with a static cache, its own input the last one's output; on a GPU a captured graph.

    How often operators are evaluated in one step, as it is captured, is appended to `evaluations`.
    """
    cache = StaticCache(config=model.config, max_cache_len=length)
    places = torch.arange(length, device=settings.device)
    position = torch.full((ids.shape[0], 1), PROMPT, device=settings.device)

    def forward(tokens: Tensor, positions: Tensor) -> Tensor:
        # Its own mask, (batch, 1, tokens, length): one that is made within looks into the cache.
        mask = (places[None, None, None] <= positions[:, None, :, None]).expand(ids.shape[0], 1, -1, -1)
        made = model(
            input_ids=tokens, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
        )
        best: Tensor = made.logits[:, -1:].argmax(-1)
        return best

    token = forward(ids, places[None, :PROMPT].expand(ids.shape[0], -1))

    def step() -> None:
        token.copy_(forward(token, position))
        position.add_(1)

    def noted() -> None:
        with counted_evaluations(model) as seen:
            step()
        evaluations.append(len(seen))

    if settings.dry:
        noted()
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        noted()

    def replay(read: Any = (model, cache, places, position, token)) -> None:
        # A graph knows the memory that it reads by address only, so this keeps it.
        graph.replay()

    return replay


@torch.no_grad()
def captured(settings: Settings, note: Note, shape: str, layers: int, batch: int) -> None:
    """A CUDA graph of one decoded token with a static cache, replayed: ms a token, and evaluations in the graph.

    Captured and replayed in a block of `isotune.evaluated_once`, so that there should be none.
    """
    errors: dict[str, str] = {}
    found, ids, count = models(settings, shape, layers, errors), _prompt(settings, batch), settings.new_tokens
    how = "a CUDA graph of one token with a static cache, replayed; operators are evaluated once, before it"
    note(shape=shape, layers=layers, batch=batch, prompt=PROMPT, tokens=count, how=how)
    # Room for all that is decoded: writing beyond the cache would end the process's use of the device.
    length = PROMPT + WARMUP + count * ROUNDS + 1
    steps: dict[str, Callable[[], Any]] = {}
    evaluations: dict[str, list[int]] = {name: [] for name in found}
    with contextlib.ExitStack() as blocks:
        for name, model in found.items():
            blocks.enter_context(block(model))
            one = attempt(name, errors, lambda m=model, n=name: _one_step(settings, m, ids, length, evaluations[n]))
            if one is not None:
                steps[name] = lambda one=one: [one() for _ in range(count)]
        rows = compared(interleaved(settings, steps, errors, ROUNDS, 20), FROZEN, per=count)
    for name, row in rows.items():
        (row["evaluations_per_token"],) = evaluations[name]
    note(variants=rows, errors=errors)


@torch.no_grad()
def compiled(settings: Settings, note: Note, shape: str, layers: int, batch: int) -> None:
    """`generate` with a static cache, whose decoding transformers compiles by itself (reduce-overhead) on a GPU.

    Milliseconds a token over the whole call, the prompt included; and evaluations after the first token.
    """
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = 64
    errors: dict[str, str] = {}
    everything, ids, count = models(settings, shape, layers, errors), _prompt(settings, batch), settings.new_tokens
    small = f"isotune PSOFT r={settings.ranks[0]}"
    found = {name: everything[name] for name in (FROZEN, small, f"{small} merged") if name in everything}
    del everything
    how = "generate with a static cache, compiled by transformers itself"
    note(shape=shape, layers=layers, batch=batch, prompt=PROMPT, tokens=count, how=how)
    static = {"cache_implementation": "static"}

    def warmed(model: Any) -> bool:
        for length in (1, count):
            _generate(model, ids, length, **static)
        return True

    working = {n: m for n, m in found.items() if attempt(n, errors, lambda m=m: warmed(m))}
    actions = {n: lambda m=m: _generate(m, ids, count, **static) for n, m in working.items()}
    rows = compared(interleaved(settings, actions, errors, ROUNDS, 20), FROZEN, per=count)

    def counted(name: str) -> None:
        # After the race: code that evaluates operators within is compiled again for being counted.
        with counted_evaluations(working[name]) as seen:
            _generate(working[name], ids, 1, **static)
            first = len(seen)
            _generate(working[name], ids, count, **static)
        rows[name]["evaluations_after_first_token"] = len(seen) - 2 * first

    for name in rows:
        attempt(name, errors, lambda name=name: counted(name))
    note(variants=rows, errors=errors)
    torch.compiler.reset()
