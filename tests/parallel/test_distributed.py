"""Several processes give what one gives: DDP, FSDP2, subspaces found once, adapters saved from shards."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import distributed as dist
from torch import nn

from distributed import worker
from helpers import PROCESSES, adapted_stack, layers_of, tiny_llama, trainable
from isotune.moving import MovingSchedule
from isotune.parallel.processes import average_gradients, one_for_all
from scripts import torchrun


@pytest.fixture(scope="module", params=[pytest.param(count, marks=pytest.mark.slow) for count in PROCESSES])
def processes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """The folder that a run of the worker has written, and what each of its processes found."""
    folder = tmp_path_factory.mktemp(f"processes-{request.param}")
    return folder, torchrun(request.param, worker.__file__, folder)


@pytest.fixture(scope="module")
def alone() -> dict[str, list[float]]:
    """The loss of every step in one process, by method."""
    curves = {}
    for method, options in {"psoft": {}, "oft": {}, "hra": {"regularizer_weight": 0.3}}.items():
        model = worker.adapted(method, **options)
        curves[method] = worker.train(model, trainable(model).values())
    return curves


def test_the_loss_curve_is_that_of_one_process(processes: Any, alone: dict[str, list[float]]) -> None:
    curves = {
        "ddp psoft": "psoft",
        "ddp oft": "oft",
        "ddp checkpointed": "psoft",
        "fsdp psoft": "psoft",
        "fsdp oft": "oft",
        "fsdp ignored": "psoft",
        "fsdp checkpointed": "psoft",
        "fsdp evaluated": "psoft",
        "fsdp hra": "hra",
    }
    for name, method in curves.items():
        assert len(alone[method]) == worker.STEPS
        assert alone[method][-1] < alone[method][0]
        for found in processes[1]:
            assert found[name] == pytest.approx(alone[method], abs=1e-4), name


def test_the_first_process_finds_the_subspaces_for_all(processes: Any) -> None:
    first, *others = processes[1]
    assert first["solved psoft"] == 4
    assert all(found["solved psoft"] == 0 for found in others)


def test_processes_meet_again_after_the_first_was_alone(processes: Any) -> None:
    first, *others = processes[1]
    assert first["solved together again"] == 4
    assert all(found["solved together again"] == 0 for found in others)


def test_an_adapter_added_to_spread_weights(processes: Any) -> None:
    """Every weight is gathered once, and its subspace found once."""
    first, *others = processes[1]
    assert first["solved late"] == 2
    assert all(found["solved late"] == 0 for found in others)
    assert all(found["late reader"] == pytest.approx(6.0, abs=1e-5) for found in processes[1])


def test_a_process_alone_does_not_wait_for_ever(processes: Any) -> None:
    assert processes[1][0]["alone"] is True


def test_the_buffers_of_an_adapter_are_not_sent_at_every_step(processes: Any) -> None:
    for found in processes[1]:
        assert not [name for name in found["sent buffers"] if "isotune" in name]


def test_merging_into_shards_is_refused(processes: Any) -> None:
    for found in processes[1]:
        assert "spread over several processes" in found["merge refused"]


@pytest.mark.parametrize("method", ["psoft", "oft"])
def test_an_adapter_saved_from_shards_loads_in_one_process(processes: Any, method: str) -> None:
    folder = processes[0]
    loaded = PeftModel.from_pretrained(tiny_llama(), folder / f"fsdp-{method}")
    expected = torch.load(folder / f"fsdp-{method}.pt", weights_only=True)
    torch.testing.assert_close(worker.logits(loaded), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def group_of_one() -> Iterator[None]:
    """A group of this process alone, in which FSDP2 does all but talk."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.slow
def test_one_process_shards_like_several(alone: dict[str, list[float]]) -> None:
    model = worker.sharded(worker.adapted("psoft"))
    assert worker.train(model, trainable(model).values()) == pytest.approx(alone["psoft"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("group_of_one")
def test_the_whole_weights_are_given_up_when_their_shards_take_their_place() -> None:
    model = worker.adapted("psoft")
    whole = [weakref.ref(parameter) for parameter in model.parameters()]
    worker.sharded(model)
    gc.collect()
    assert not [parameter for parameter in whole if parameter() is not None]


def test_one_process_needs_nobody() -> None:
    assert one_for_all("anything", lambda: [torch.ones(2)])[0].tolist() == [1.0, 1.0]
    model = adapted_stack()
    model(torch.randn(3, 24)).sum().backward()
    before = [p.grad.clone() for p in trainable(model).values()]
    average_gradients(model)
    assert all(map(torch.equal, before, [p.grad for p in trainable(model).values()]))


def test_what_ddp_is_told_goes_with_the_adapter() -> None:
    model = adapted_stack()
    base: nn.Module = model.get_base_model()
    names = set(base._ddp_params_and_buffers_to_ignore)
    own = {name for name, _ in model.named_buffers() if "isotune" in name}
    assert own
    assert own <= names
    MovingSchedule(1).step(model, torch.optim.SGD(trainable(model).values(), lr=0.1))
    moved = {name for name, _ in model.named_buffers() if "isotune" in name}
    assert moved - own
    assert moved <= names, "DDP reads the list once, before any subspace moves"
    assert not names & {name for name, _ in model.named_parameters()}
    plain = model.unload()
    assert not layers_of(plain)
    assert "_ddp_params_and_buffers_to_ignore" not in vars(plain)
