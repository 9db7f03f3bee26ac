"""Training steps: forward, a loss of all outputs, backward; eager, compiled, and captured in a CUDA graph.

No optimiser's step, which depends on the optimiser. The loss and the step are those of `benchmarks/step.py`: the input
embeddings have a gradient, as below a model's first adapted layer, and no language-model head takes time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gpu_bench.journal import Note
from gpu_bench.models import REFERENCE, Settings, adapted, llama
from gpu_bench.timing import attempt, compared, free, interleaved, seconds_of
from step import loss, step

STEP = "forward, loss and backward, without an optimiser's step; no language-model head"
CAPTURE_WARMUP = 3


def embeddings_of(settings: Settings, width: int, batch: int) -> Tensor:
    """Input embeddings, (batch, tokens / batch, width), with a gradient."""
    shape = (batch, settings.tokens // batch, width)
    return torch.randn(shape, device=settings.device, dtype=settings.dtype, requires_grad=True)


def race(
    settings: Settings,
    note: Note,
    shape: str,
    variants: dict[str, Callable[[], Any]],
    *,
    seconds: float,
    layers: int,
    batch: int = 1,
    checkpointing: bool = False,
    rounds: int | None = None,
) -> None:
    """Eager steps of variants in one race.

    Args:
        shape: which of `settings.shapes`.
        seconds: for the rounds.
        layers: blocks of each model.
        batch: sequences that share `settings.tokens`.
        checkpointing: whether blocks are run again in backward.
        rounds: at most; None for those of the settings.
    """
    errors: dict[str, str] = {}
    width = settings.shapes[shape].width
    base, embeddings = llama(settings, settings.shapes[shape], layers), embeddings_of(settings, width, batch)
    about = {"shape": shape, "layers": layers, "batch": batch, "tokens": settings.tokens, "step": STEP}
    note(**about, checkpointing=checkpointing, dtype=str(settings.dtype).removeprefix("torch."))
    models: dict[str, nn.Module] = {}
    alone: dict[str, dict[str, Any]] = {}
    for name, make in variants.items():

        def prepare(name: str = name, make: Callable[[], Any] = make) -> bool:
            def build() -> None:
                models[name] = adapted(base, make)

            alone[name] = {"init_s": round(seconds_of(settings, build), 3)}
            if checkpointing:
                inner = getattr(models[name], "base_model", models[name])
                getattr(inner, "model", inner).gradient_checkpointing_enable({"use_reentrant": False})
            for _ in range(2):
                step(models[name], embeddings)
            with settings.peak(alone[name], "peak_gib"):
                step(models[name], embeddings)
            return True

        if attempt(name, errors, prepare) is None:
            models.pop(name, None)
            free()
    note(variants=alone, errors=errors)
    actions = {name: functools.partial(step, model, embeddings) for name, model in models.items()}
    found = compared(interleaved(settings, actions, errors, rounds or settings.rounds, seconds), REFERENCE)
    for name, row in found.items():
        row |= {"tokens_per_s": round(1e3 * settings.tokens / row["ms"]), **alone[name]}
    note(variants=found, errors=errors)


def captured_step(settings: Settings, model: nn.Module, embeddings: Tensor) -> Callable[[], Any]:
    """A whole training step as one CUDA graph; on a CPU the step itself."""
    if settings.dry:
        return functools.partial(step, model, embeddings)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(CAPTURE_WARMUP):
            step(model, embeddings)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss(model, embeddings).backward()

    def replay(read: tuple[nn.Module, Tensor] = (model, embeddings)) -> None:
        # A graph knows the memory that it reads by address only, so this keeps it.
        graph.replay()

    return replay


def captured(settings: Settings, note: Note, shape: str, variants: dict[str, Callable[[], Any]], layers: int) -> None:
    """Replays of whole steps, in which the host has no part: what is compared is the GPU's time alone."""
    errors: dict[str, str] = {}
    base = llama(settings, settings.shapes[shape], layers)
    note(shape=shape, layers=layers, tokens=settings.tokens, step=STEP, how="a CUDA graph of the step, replayed")
    # All are made before the first is captured: a capture that fails leaves the random numbers unusable. Each has
    # embeddings of its own, whose gradient is part of the graph's memory.
    made = {}
    for name, make in variants.items():
        model = attempt(name, errors, lambda make=make: adapted(base, make))
        if model is not None:
            made[name] = (model, embeddings_of(settings, settings.shapes[shape].width, 1))
    actions: dict[str, Callable[[], Any]] = {}
    for name, (model, embeddings) in made.items():
        action = attempt(name, errors, lambda m=model, e=embeddings: captured_step(settings, m, e))
        if action is not None:
            actions[name] = action
    found = compared(interleaved(settings, actions, errors, settings.rounds, 20), REFERENCE)
    note(variants=found, errors=errors)


def compiled(
    settings: Settings, note: Note, shape: str, variants: dict[str, Callable[[], Any]], layers: int, mode: str
) -> None:
    """Steps of models compiled by torch, beside LoRA's eager one.

    Args:
        mode: of `torch.compile`, with the backend inductor; in a dry run the graphs that torch has traced run eagerly.
    """
    torch.compiler.reset()
    # Every variant is another trace of the same code, and none is to fall back to eager.
    torch._dynamo.config.recompile_limit = 64
    errors: dict[str, str] = {}
    base = llama(settings, settings.shapes[shape], layers, distinct=True)
    embeddings = embeddings_of(settings, settings.shapes[shape].width, 1)
    note(shape=shape, layers=layers, tokens=settings.tokens, step=STEP, mode=mode)
    actions: dict[str, Callable[[], Any]] = {}
    alone: dict[str, dict[str, Any]] = {}

    def prepare(name: str, model: nn.Module) -> bool:
        def run() -> None:
            if mode == "reduce-overhead":
                torch.compiler.cudagraph_mark_step_begin()
            step(model, embeddings)

        alone[name] = {"first_steps_s": round(seconds_of(settings, lambda: [run() for _ in range(4)]), 2)}
        with settings.peak(alone[name], "peak_gib"):
            run()
        actions[name] = run
        return True

    eager = f"{REFERENCE} eager"
    attempt(eager, errors, lambda: prepare(eager, adapted(base, variants[REFERENCE])))
    how: dict[str, Any] = {"backend": "eager"} if settings.dry else {"mode": mode}
    for name, make in variants.items():
        attempt(name, errors, lambda name=name, make=make: prepare(name, torch.compile(adapted(base, make), **how)))
        note(variants=alone, errors=errors)
    times = interleaved(settings, actions, errors, settings.rounds, 20)
    found, beside_eager = compared(times, REFERENCE), compared(times, eager)
    for name, row in found.items():
        row |= {"ratio_to_eager": beside_eager[name]["ratio"], **alone[name]}
    note(variants=found, errors=errors)
    torch.compiler.reset()
