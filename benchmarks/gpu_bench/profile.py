"""Where the time of a step goes: kernels, their number, the GPU's time and the host's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gpu_bench.journal import Note
from gpu_bench.models import Settings, adapted, llama
from gpu_bench.timing import attempt, free
from gpu_bench.training import STEP, embeddings_of
from step import step

TOP = 10


def profiled(settings: Settings, note: Note, shape: str, variants: dict[str, Callable[[], Any]], layers: int) -> None:
    """One step of each variant under torch's profiler, by itself.

    Nothing may be timed in a process after this: once CUPTI has been loaded, launches take longer.
    """
    errors: dict[str, str] = {}
    rows: dict[str, dict[str, Any]] = {}
    base = llama(settings, settings.shapes[shape], layers)
    embeddings = embeddings_of(settings, settings.shapes[shape].width, 1)
    kind = "aten operations of the CPU" if settings.dry else "kernels"
    note(shape=shape, layers=layers, tokens=settings.tokens, step=STEP, counted=kind)
    wanted = DeviceType.CPU if settings.dry else DeviceType.CUDA
    activities = [ProfilerActivity.CPU] if settings.dry else [ProfilerActivity.CPU, ProfilerActivity.CUDA]

    def one(name: str, make: Callable[[], Any]) -> bool:
        model = adapted(base, make)
        for _ in range(2):
            step(model, embeddings)
        settings.wait()
        with profile(activities=activities) as found:
            step(model, embeddings)
            settings.wait()
        count: Counter[str] = Counter()
        total: Counter[str] = Counter()
        for event in found.events():
            if event.device_type == wanted:
                count[event.name] += 1
                total[event.name] += event.self_cpu_time_total if settings.dry else event.device_time
        whole = sum(total.values()) or 1
        rows[name] = {
            "kernels": sum(count.values()),
            "gpu_ms": round(whole / 1e3, 4),
            "top": [
                {"name": key[:160], "count": count[key], "ms": round(t / 1e3, 4), "share": round(t / whole, 4)}
                for key, t in total.most_common(TOP)
            ],
        }
        return True

    for name, make in variants.items():
        attempt(name, errors, lambda name=name, make=make: one(name, make))
        note(variants=rows, errors=errors)
        free()
