"""An adapted language model through lm-evaluation-harness."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isotune.experiments.files import write_json
from isotune.experiments.language import language_model
from isotune.experiments.records import number
from isotune.experiments.text import aligned
from isotune.files.base_model import quiet
from isotune.versions import install


def evaluate(
    directory: str,
    tasks: Sequence[str],
    base: str | None = None,
    *,
    few_shot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    include: str | None = None,
    output: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, dict[str, float | None]]:
    """Score an adapter, on its base model, on tasks that lm-evaluation-harness knows by name.

    Args:
        directory: an adapter's folder, of any of PEFT's or isotune's methods for causal language models.
        tasks: names as `lm_eval --tasks` takes them, groups included.
        base: the base model, as `isotune.files.base_model.resolve_base`; by default what the adapter names.
        few_shot: solved examples shown before each question; by default the task's own number.
        limit: only so many questions of each task.
        batch_size: sequences a forward pass.
        include: a folder with task files of your own.
        output: a JSON file to write the scores into.
        trust_remote_code: run code that the base model's repository carries.

    Returns:
        {task: {metric: value}}, standard errors included; None where the harness has no number, as for the error of
        one question.

    Raises:
        ValueError: the harness is not installed, does not know a task, or the adapter does not fit.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(f"evaluation needs lm-evaluation-harness: {install('eval')}")
    if not tasks:
        raise ValueError("name at least one task, as --tasks gsm8k,arc_easy")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise ValueError(
            f"lm-evaluation-harness has no task {unknown[0]!r}: `lm_eval ls tasks` lists its tasks, "
            "and --include FOLDER adds your own"
        )
    model, tokenizer, name = language_model(directory, base, trust_remote_code=trust_remote_code)
    with quiet():
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=model.device.type)
        found = simple_evaluate(
            model=harness, tasks=list(tasks), num_fewshot=few_shot, limit=limit, task_manager=manager, log_samples=False
        )
    assert found is not None  # None comes from the other processes of a distributed run
    scores = {
        task: {
            key.removesuffix(",none"): number(value) if isinstance(value, float) else value
            for key, value in row.items()
            if isinstance(value, int | float)
        }
        for task, row in found["results"].items()
    }
    if output is not None:
        write_json(
            Path(output), {"adapter": directory, "base": name, "few_shot": few_shot, "limit": limit, "results": scores}
        )
    return scores


def table(scores: dict[str, dict[str, Any]]) -> str:
    """The scores as lines of text, one for each metric, with its standard error."""
    lines = []
    for task, row in scores.items():
        for key, value in row.items():
            name, comma, how = key.partition(",")
            if name in ("alias", "sample_len") or name.endswith("_stderr"):
                continue
            error = row.get(f"{name}_stderr{comma}{how}")
            spread = f" ± {error:.4f}" if isinstance(error, float) else ""
            shown = "no number" if value is None else f"{value:.4f}{spread}"
            lines.append((task, f"{name} ({how})" if how else name, shown))
    return "\n".join(line.rstrip() for line in aligned(lines, "<<<"))
