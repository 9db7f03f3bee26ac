"""What a run is measured by: against sizes known beforehand, and against models that have not changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import tiny_llama
from isotune import PsoftConfig, get_peft_model
from isotune.experiments import measure
from scripts import printed_by


def test_kept_bytes_are_those_of_the_inputs_and_each_storage_counts_once() -> None:
    linear = nn.Linear(8, 4)
    x = torch.randn(3, 8)
    assert measure.kept_bytes(linear, lambda: linear(x).sum()) == 3 * 8 * 4
    # Of the parameters nothing counts, and of one storage seen in two shapes the bytes once.
    assert measure.kept_bytes(linear, lambda: (linear(x) + linear(x.view(3, 8))).sum()) == 3 * 8 * 4
    linear.requires_grad_(False)
    assert measure.kept_bytes(linear, lambda: linear(x).sum()) == 0


def test_a_frozen_layer_keeps_less_than_a_trained_one_and_psoft_little_more() -> None:
    batch = {"input_ids": torch.randint(4, 90, (2, 12))}
    batch["labels"] = batch["input_ids"]
    adapted = get_peft_model(tiny_llama(), PsoftConfig(r=4, target_modules=["q_proj", "v_proj"]))
    whole = tiny_llama()
    state = torch.get_rng_state()
    training = whole.training

    def loss(model: Any, inputs: Mapping[str, Any]) -> Tensor:
        found: Tensor = model(**inputs).loss
        return found

    kept = measure.kept_by_batch(whole, batch, loss)
    assert 0 < measure.kept_by_batch(adapted, batch, loss) < kept
    assert torch.equal(torch.get_rng_state(), state)
    assert whole.training is training
    assert not any(p.grad is not None for p in whole.parameters())


HOLDING = """
import torch
from isotune.experiments import measure

before = measure.peak_memory()
held = torch.ones(40_000_000)
after = measure.peak_memory()
del held
measure.reset_peak_memory()
print(before, after, measure.peak_memory())
"""


@pytest.mark.slow
def test_peak_memory_grows_with_what_is_held(tmp_path: Path) -> None:
    """In a process of its own: what other tests have left on the heap moves the peak too."""
    before, after, later = map(int, printed_by(HOLDING, folder=tmp_path).split())
    peak = 4 * 40_000_000
    assert before > 100 * 2**20
    assert after > before + peak * 3 // 4
    # What is let go no longer counts once the mark is set anew; this test needs Linux, as CI has.
    assert later < after - peak // 2
