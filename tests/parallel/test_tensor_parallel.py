"""Tensor parallelism of transformers, by processes that gloo connects, gives what one process gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from distributed import tensor_worker, worker
from helpers import PROCESSES, Stack, layers_of, tiny_llama, trainable
from isotune import get_peft_model
from isotune.methods import METHODS
from scripts import torchrun

pytest.importorskip("transformers", minversion="5.17")
CASES = [
    *tensor_worker.METHODS_APART,
    *tensor_worker.OF_OUTPUTS,
    *(f"{method} split" for method in tensor_worker.SPLIT),
    *(f"{method} uneven" for method in tensor_worker.UNEVEN),
    "psoft on oft",
    "oft on psoft",
    "hra on boft",
]


@pytest.fixture(scope="module", params=[pytest.param(count, marks=pytest.mark.slow) for count in PROCESSES])
def processes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """The folder that a run has written, and what each of its processes found."""
    folder = tmp_path_factory.mktemp(f"tensor-parallel-{request.param}")
    for kind in tensor_worker.WIDTHS:
        tensor_worker.base(kind).save_pretrained(folder / kind)
    return folder, torchrun(request.param, tensor_worker.__file__, folder)


@pytest.fixture(scope="module")
def steps() -> dict[str, dict[str, Tensor]]:
    """Loss and gradients of everything that is compared, in one process."""
    return tensor_worker.steps_of_all(tensor_worker.base)


@pytest.fixture(scope="module")
def curves() -> dict[str, list[float]]:
    """The loss of every step in one process, by method."""
    found = {}
    for method in tensor_worker.CURVES:
        model = tensor_worker.adapted(tensor_worker.base(), method)
        found[method] = worker.train(model, trainable(model).values())
    return found


def test_the_loss_curve_is_that_of_one_process(processes: Any, curves: dict[str, list[float]]) -> None:
    for name, expected in {**curves, "checkpointed": curves["psoft"]}.items():
        assert len(expected) == worker.STEPS
        assert expected[-1] < expected[0]
        for found in processes[1]:
            assert found[f"curve {name}"] == pytest.approx(expected, abs=1e-4), name


@pytest.mark.parametrize("case", CASES)
def test_every_gradient_is_that_of_one_process_and_alike_in_all(processes: Any, steps: Any, case: str) -> None:
    """On layers divided by rows, by columns, with a gathered output or a whole input, and an embedding."""
    folder, ranks = processes
    first, *others = (torch.load(folder / f"steps-{rank}.pt", weights_only=True)[case] for rank in range(len(ranks)))
    expected = steps[case]
    assert first.keys() == expected.keys()
    assert len(expected) > 2 * len(tensor_worker.PROJECTIONS)
    for name, value in expected.items():
        assert float(value.abs().max()) > 0, name
        limit = 1e-4 * max(float(value.abs().max()), 1e-3)
        assert float((first[name] - value).abs().max()) <= limit, name
        assert all(torch.equal(other[name], first[name]) for other in others), name


def test_the_first_process_finds_the_subspaces_for_all(processes: Any) -> None:
    first, *others = processes[1]
    assert first["solved psoft"] == 2 * len(tensor_worker.PROJECTIONS)
    assert all(found["solved psoft"] == 0 for found in others)


def test_random_starts_are_those_of_the_first_process(processes: Any) -> None:
    first, *others = processes[1]
    for method in ("hra", "lora_xs"):
        assert len(set(first[f"start {method}"])) > 1
        assert all(found[f"start {method}"] == first[f"start {method}"] for found in others)


def test_the_copies_of_a_trained_adapter_are_equal(processes: Any) -> None:
    first, *others = processes[1]
    for method in tensor_worker.CURVES:
        assert all(found[f"end {method}"] == first[f"end {method}"] for found in others)


@pytest.mark.parametrize("method", tensor_worker.CURVES)
def test_the_saved_file_is_that_of_one_process_and_does_the_same_in_it(
    processes: Any, method: str, tmp_path: Path
) -> None:
    folder, ranks = processes
    saved = load_file(folder / method / "adapter_model.safetensors")
    model = tensor_worker.adapted(tensor_worker.base(), method)
    model.save_pretrained(tmp_path)
    alone = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: tensor.shape for name, tensor in saved.items()} == {name: t.shape for name, t in alone.items()}
    pins = [name for name in alone if name.endswith("pin")]
    assert bool(pins) == (method == "psoft")
    assert all(torch.equal(saved[name], alone[name]) for name in pins)
    loaded = PeftModel.from_pretrained(tensor_worker.base(), folder / method)
    expected = torch.load(folder / f"{method}.pt", weights_only=True)
    given = tensor_worker.answers(loaded)
    assert torch.equal(given["tokens"], expected["tokens"])
    torch.testing.assert_close(given["logits"], expected["logits"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(given["mixed"], expected["mixed"], rtol=1e-4, atol=1e-4)
    assert all(found[f"loaded {method}"] < 1e-4 for found in ranks)


@pytest.mark.parametrize("method", tensor_worker.CURVES)
def test_merging_into_divided_weights(processes: Any, method: str) -> None:
    for found in processes[1]:
        assert found[f"moved {method}"] > 1e-2
        assert found[f"merged {method}"] < 1e-4
        assert found[f"unloaded {method}"] < 1e-4
        assert found[f"disabled {method}"] == 0
        assert found[f"unmerged {method}"] is True


def test_dropout_in_training_is_refused(processes: Any) -> None:
    for method in tensor_worker.DROPOUTS:
        for found in processes[1]:
            assert "diverge in training. Set its dropout to 0" in found[f"dropout {method}"]


def test_weights_that_only_hooks_know_to_be_divided_are_refused() -> None:
    """As transformers before 5.17 divided them."""
    model = tiny_llama()
    model._tp_size = 2
    with pytest.raises(ValueError, match=r"tensor parallelism.*5\.17.*FSDP2"):
        get_peft_model(model, METHODS["psoft"](r=8))
    assert not layers_of(model)


def test_a_layer_whose_division_is_not_followed_is_refused() -> None:
    """Such as one that is whole while its output counts as a part of a sum."""
    model = Stack()
    model.second._is_hooked = True
    with pytest.raises(ValueError, match=r"'second'.*its weight is whole.*exclude_modules.*FSDP2"):
        get_peft_model(model, METHODS["psoft"](r=8, target_modules=["first", "second"]))
    assert not layers_of(model)
    assert layers_of(get_peft_model(model, METHODS["psoft"](r=8, target_modules=["first"])))


def test_experts_that_are_divided_are_refused() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_local_experts=2,
        )
    )
    experts: nn.Module = model.model.layers[0].mlp.experts
    experts._is_hooked = True  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"quantised or holds experts"):
        get_peft_model(model, METHODS["psoft"](r=4, target_parameters=["mlp.experts.down_proj"]))
    assert not layers_of(model)
