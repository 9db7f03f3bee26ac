"""FSDP2 as accelerate and transformers' Trainer set it up gives what one process gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from distributed import accelerated, worker
from helpers import tiny_llama, trainable
from scripts import torchrun

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("by-hand")
    return folder, torchrun(2, accelerated.__file__, folder)


@pytest.fixture(scope="module")
def by_trainer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("by-trainer")
    return folder, torchrun(2, accelerated.__file__, folder, "trainer")


@pytest.fixture(scope="module")
def alone() -> dict[str, list[float]]:
    """The loss of every step in one process, by method."""
    models = {method: worker.adapted(method) for method in ("psoft", "oft")}
    return {method: worker.train(model, trainable(model).values()) for method, model in models.items()}


def assert_loads_alone(adapter: Path, logits: Path) -> None:
    loaded = PeftModel.from_pretrained(tiny_llama(), adapter)
    expected = torch.load(logits, weights_only=True)
    torch.testing.assert_close(worker.logits(loaded), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("psoft", "psoft"),
        ("oft", "oft"),
        ("whole between", "psoft"),
        ("checkpointed", "psoft"),
        ("one group", "psoft"),
        ("oft sent", "oft"),
        ("psoft resumed", "psoft"),
        ("oft resumed", "oft"),
    ],
)
def test_the_loss_curve_is_that_of_one_process(
    by_hand: Any, alone: dict[str, list[float]], name: str, method: str
) -> None:
    steps = worker.STEPS // 2 if name.endswith("resumed") else worker.STEPS
    for found in by_hand[1]:
        assert found["sharded"]
        assert found[name] == pytest.approx(alone[method][-steps:], abs=1e-4)


def test_half_precision_follows_the_curve(by_hand: Any, alone: dict[str, list[float]]) -> None:
    for found in by_hand[1]:
        assert found["half"] == pytest.approx(alone["psoft"], abs=0.05)
        assert found["half"][-1] < found["half"][0] - 0.15


def test_the_first_process_finds_the_subspaces_for_all(by_hand: Any) -> None:
    assert [found["solved"] for found in by_hand[1]] == [4, 0]


def test_a_basis_that_accelerate_would_not_send_is_refused(by_hand: Any) -> None:
    for found in by_hand[1]:
        assert "fsdp_cpu_ram_efficient_loading: false" in found["refused"]


@pytest.mark.parametrize("method", ["psoft", "oft"])
def test_an_adapter_saved_from_shards_loads_in_one_process(by_hand: Any, method: str) -> None:
    assert_loads_alone(by_hand[0] / method, by_hand[0] / f"{method}.pt")


def test_trainer_gives_the_curve_of_one_process(by_trainer: Any, tmp_path: Path) -> None:
    trainer = accelerated.trainer_of(tmp_path, None)
    trainer.train()
    expected = {"": accelerated.losses_of(trainer), " evaluated": accelerated.losses_of(trainer, "eval_loss")}
    expected[" resumed"] = expected[""]
    assert len(expected[""]) == worker.STEPS
    for found in by_trainer[1]:
        for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
            for name, losses in expected.items():
                assert found[f"trainer {kind}{name}"] == pytest.approx(losses, abs=1e-4)


def test_trainer_saves_an_adapter_that_loads_in_one_process(by_trainer: Any) -> None:
    folder = by_trainer[0] / "trainer-FULL_STATE_DICT"
    assert_loads_alone(folder / "adapter", folder / "logits.pt")
