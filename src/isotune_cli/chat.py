"""Talking to a base model and to an adapter on it."""

from __future__ import annotations

from typing import Annotated

import typer

from isotune_cli.shared import Adapter, Base, Trust, say


def chat(
    directory: Adapter,
    question: Annotated[
        str | None, typer.Argument(help="One question; without it you are asked for questions.")
    ] = None,
    base: Base = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens an answer has at most.")] = 256,
    trust_remote_code: Trust = False,
) -> None:
    """Ask the base model and the adapter on it the same questions, side by side."""
    from isotune.experiments.language import Chat, language_model
    from isotune.files.export_runs import only_adapter

    model, tokenizer, _ = language_model(only_adapter(directory), base, trust_remote_code=trust_remote_code)
    talk = Chat(model, tokenizer, new_tokens)
    asked = [question] if question is not None else iter(_typed, None)
    for one in asked:
        if not one:
            continue
        for side, answer in talk.ask(one).items():
            say(f"{side + ':':8} {answer}")


def _typed() -> str | None:
    """What is asked next; None at the end of what is typed."""
    try:
        return input("you:     ").strip()
    except EOFError:
        return None
