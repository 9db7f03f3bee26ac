"""An experiment under torchrun or `accelerate launch`: all processes train, the main one writes and speaks."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

from tqdm.auto import tqdm

from isotune import progress
from isotune.experiments.recipe import RecipeError
from isotune.experiments.text import printable

T = TypeVar("T")
_PREFIXES = ("TORCHELASTIC_", "ACCELERATE_", "GROUP_", "ROLE_")
_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def count() -> int:
    """How many processes a launcher has started for this experiment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join() -> None:
    """Join the other processes, before anything is built: they share the search for subspaces too."""
    if count() == 1:
        return
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise RecipeError(
            "isotune train gives every process the whole model and a part of each batch; "
            "launch it without FSDP or DeepSpeed, or train by a script of your own (docs/guides/several-gpus.md)"
        )
    from accelerate import PartialState

    PartialState(cpu=on_cpu())


def require_alone(command: str) -> None:
    """Check that no launcher has started several processes of a command that starts its own."""
    if count() > 1:
        raise RecipeError(
            f"{command} starts the processes of its runs itself, and a launcher has started it {count()} times; run it "
            "once, without torchrun or accelerate launch, with --jobs or on a cluster with --engine ray"
        )


def on_cpu() -> bool:
    """Whether there is no accelerator; unasked, accelerate leaves such processes each to itself."""
    import torch

    return not torch.accelerator.is_available()


def is_main() -> bool:
    """Whether this process writes the results."""
    return int(os.environ.get("RANK", "0")) == 0


def wait_for_all() -> None:
    """Wait until every process is here."""
    if count() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def share_of(batch_size: int) -> int:
    """The rows of a batch for each process."""
    rows, rest = divmod(batch_size, count())
    if rest:
        raise RecipeError(
            f"a batch of {batch_size} is that of all processes together, and {count()} of them cannot share it "
            "equally; give another train.batch_size, or start another number of processes"
        )
    return rows


def environment_alone() -> Mapping[str, str]:
    """The environment for a process that belongs to no others."""
    return {name: v for name, v in os.environ.items() if name not in _NAMES and not name.startswith(_PREFIXES)}


def say(text: str) -> None:
    """Log a line about the progress of the experiment, in the main process alone."""
    if is_main():
        logging.getLogger("isotune").info(printable(text))


def bar(total: int, done: int, title: str, unit: str, *, hidden: bool = False) -> Any:
    """A progress bar of the main process, renewed seldom where the output is a file, which it would fill."""
    often = 0.2 if sys.stderr.isatty() else 15
    hidden = hidden or not is_main()
    return tqdm(total=total, initial=done, desc=title, unit=unit, disable=hidden, dynamic_ncols=True, mininterval=often)


def with_bar(items: Sequence[T], title: str, unit: str, *, once: bool = False) -> Iterable[T]:
    """The items, with a progress bar of the main process as they are taken, which goes away at the end.

    With `once` it is one line at most where progress is shown in lines.
    """
    taken: Any = progress.bar(items, desc=title, unit=unit, leave=False, shown=None if is_main() else False)
    taken.isotune_once = once
    return cast("Iterable[T]", taken)
