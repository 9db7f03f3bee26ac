"""The model cards that PEFT and transformers write after, or instead of, those of a model's adapters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from peft import PeftModel


def install_cards(write: Callable[[Path, Any, Iterable[str]], None], tags_of: Callable[[Path], set[str]]) -> None:
    """Have `write(folder, peft_config, tags)` called after PEFT writes a card and before an upload; idempotent.

    The tags are those that `tags_of(folder)` finds beforehand, since PEFT drops tags that are not its own.
    `PeftModel.push_to_hub` saves the model and then overwrites its card with transformers' empty template or the card
    of the repository; a Trainer's `push_to_hub` replaces the card and lets PEFT add to it.
    """
    if hasattr(PeftModel.create_or_update_model_card, "__wrapped__"):
        return
    create, upload = PeftModel.create_or_update_model_card, PeftModel._upload_modified_files

    @functools.wraps(create)
    def create_or_update_model_card(self: Any, output_dir: str) -> None:
        tags = tags_of(Path(output_dir))
        create(self, output_dir)
        write(Path(output_dir), self.peft_config, tags)

    @functools.wraps(upload)
    def upload_modified_files(self: Any, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        write(Path(working_dir), self.peft_config, ())
        return upload(self, working_dir, *args, **kwargs)

    own: Any = PeftModel
    own.create_or_update_model_card = create_or_update_model_card
    own._upload_modified_files = upload_modified_files
