"""DeepSpeed: ZeRO-2 and ZeRO-3 give what one process gives; parameters that ZeRO-3 has divided are gathered."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from distributed import worker
from helpers import OPTIONS_FOR_TINY, adapted_stack, layers_of, tiny_llama, trainable
from isotune import get_peft_model, regularization_loss
from isotune.methods import METHODS
from isotune.parallel.sharding import shape_of
from isotune.tools.regularization import add_regularization_gradient
from scripts import torchrun


class Status(Enum):
    """As DeepSpeed's ZeroParamStatus."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2


class Zero:
    """What isotune uses of `deepspeed.zero`, in one process and without hooks."""

    def __init__(self) -> None:
        self.whole: dict[int, torch.Tensor] = {}
        self.gathered: list[int] = []

    def divide(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take the elements of parameters away, as zero.Init and deepspeed.initialize do."""
        for parameter in parameters:
            if not hasattr(parameter, "ds_id"):
                parameter.ds_id = len(self.whole)
                parameter.ds_shape = parameter.shape
                self.whole[parameter.ds_id] = parameter.data
                self._take(parameter)

    def _take(self, parameter: Any) -> None:
        parameter.data = parameter.data.new_empty(0)
        parameter.ds_status = Status.NOT_AVAILABLE

    @contextmanager
    def GatheredParameters(self, parameters: Iterable[Any]) -> Iterator[None]:
        """The parameters are whole within the block; others than divided ones are left out."""
        chosen = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
        for parameter in chosen:
            self.gathered.append(parameter.ds_id)
            parameter.data, parameter.ds_status = self.whole[parameter.ds_id], Status.AVAILABLE
        try:
            yield
        finally:
            for parameter in chosen:
                self._take(parameter)

    @staticmethod
    def register_external_parameter(module: Any, parameter: nn.Parameter) -> None:
        """Note it where DeepSpeed does."""
        module.__dict__.setdefault("_external_params", {})[id(parameter)] = parameter


@pytest.fixture
def zero(monkeypatch: pytest.MonkeyPatch) -> Zero:
    """In the place of an imported DeepSpeed."""
    found = Zero()
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=found))
    return found


@pytest.mark.parametrize("method", ["psoft", "oft"])
def test_an_adapter_on_divided_weights(zero: Zero, method: str) -> None:
    """It is that on the whole ones, and no two weights are gathered at once."""
    config = METHODS[method](target_modules=["q_proj", "v_proj"], **OPTIONS_FOR_TINY[method])
    expected = get_peft_model(tiny_llama(), config)
    base = tiny_llama()
    zero.divide(base.parameters())
    model = get_peft_model(base, config)
    assert all(p.numel() == 0 for p in model.get_base_model().parameters() if hasattr(p, "ds_id"))
    for one, other in zip(layers_of(model), layers_of(expected), strict=True):
        assert (one.in_features, one.out_features) == (other.in_features, other.out_features)
    assert set(zero.gathered) == (
        {p.ds_id for n, p in model.named_parameters() if "_proj.base" in n} if method == "psoft" else set()
    )
    with zero.GatheredParameters(base.parameters()):
        torch.testing.assert_close(worker.logits(model), worker.logits(expected), rtol=0.0, atol=1e-6)


def test_divided_convolutions_and_embeddings_have_their_shapes(zero: Zero) -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(6, 8, 3), "table": nn.Embedding(20, 12)})
    zero.divide(model.parameters())
    get_peft_model(model, METHODS["psoft"](r=4, target_modules=["conv", "table"]))
    assert [(layer.out_features, layer.in_features) for layer in layers_of(model)] == [(8, 54), (20, 12)]


def test_a_layer_asks_for_what_it_reads(zero: Zero) -> None:
    """The parameters of its operator belong to a module that is never called, and each is computed for itself."""
    model = adapted_stack()
    x = torch.randn(3, 24)
    expected = model(x).detach()
    zero.divide(model.parameters())
    with zero.GatheredParameters(model.parameters()):
        found = model(x)
        found.sum().backward()
        torch.testing.assert_close(found, expected)
    for layer in layers_of(model):
        own = [*layer.isotune_operator.parameters(), layer.get_base_layer().bias]
        assert set(layer._external_params) == {id(p) for p in own}
    assert all(p.grad is not None and p.grad.any() for p in trainable(model).values())


def test_the_change_of_a_divided_layer_is_gathered(zero: Zero) -> None:
    model = adapted_stack()
    expected = layers_of(model)[0].get_delta_weight("default")
    zero.divide(model.parameters())
    torch.testing.assert_close(layers_of(model)[0].get_delta_weight("default"), expected)
    assert all(p.numel() == 0 for p in model.parameters())


def test_a_divided_operator_outside_of_the_model_is_refused(zero: Zero) -> None:
    layer = layers_of(adapted_stack())[0]
    zero.divide(layer.isotune_operator.parameters())
    with pytest.raises(RuntimeError, match=r"ZeRO-3.*GatheredParameters"):
        layer(torch.randn(3, 24))


def test_merging_needs_gathered_weights(zero: Zero) -> None:
    model = adapted_stack()
    x = torch.randn(3, 24)
    expected = model(x).detach()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    zero.divide(model.parameters())
    with pytest.raises(ValueError, match="spread over several processes"):
        model.merge_adapter()
    with zero.GatheredParameters(model.parameters()):
        model.merge_adapter()
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        model.unmerge_adapter()
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.numel() == 0 and shape_of(p) == before[name].shape for name, p in model.named_parameters())


def test_a_divided_convolution_is_refused_when_called(zero: Zero) -> None:
    model = nn.Sequential(nn.Conv2d(6, 8, 3))
    get_peft_model(model, METHODS["psoft"](r=4, target_modules=["0"]))
    zero.divide(model.parameters())
    layers_of(model)[0].get_base_layer().register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"only gathers the original.*ZeRO-2"):
        model(torch.randn(1, 6, 5, 5))


def test_regularisers_and_zero(zero: Zero) -> None:
    model = adapted_stack()
    weighted = get_peft_model(tiny_llama(), METHODS["hra"](r=4, regularizer_weight=0.1))
    for parameter in weighted.parameters():
        parameter._hp_mapping = None  # ZeRO-2 sets it
    assert regularization_loss(weighted).requires_grad
    with pytest.raises(ValueError, match=r"regularization_loss\(model\) to the loss"):
        add_regularization_gradient(weighted)
    for each in (model, weighted):
        zero.divide(each.parameters())
    assert float(regularization_loss(model)) == 0.0
    with pytest.raises(ValueError, match=r"ZeRO-3.*ZeRO-2"):
        regularization_loss(weighted)


# -- DeepSpeed itself, by two processes -------------------------------------------------------------------------------


def run(folder: Path, engine: str) -> list[Any]:
    """What each process of the worker found; the test is skipped without DeepSpeed."""
    if find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed; see requirements/deepspeed.txt")
    return torchrun(2, str(Path(worker.__file__).with_name("zero_worker.py")), folder, engine)


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """The folder that a run of the worker has written, and what each of its processes found."""
    folder = tmp_path_factory.mktemp("zero")
    return folder, run(folder, "deepspeed")


CURVES = {
    "zero2 psoft": "psoft",
    "zero2 oft": "oft",
    "zero3 psoft": "psoft",
    "zero3 oft": "oft",
    "zero3 boft": "boft",
    "zero3 checkpointed": "psoft",
    "zero3 small whole": "psoft",
    "loaded psoft": "psoft",
    "loaded oft": "oft",
}


@pytest.mark.slow
def test_the_loss_curve_is_that_of_one_process(processes: Any) -> None:
    alone = {}
    for method in set(CURVES.values()):
        model = worker.adapted(method)
        alone[method] = worker.train(model, trainable(model).values())
        assert alone[method][-1] < alone[method][0]
    for name, method in CURVES.items():
        for found in processes[1]:
            assert found[name] == pytest.approx(alone[method], abs=1e-4), name


@pytest.mark.slow
def test_the_first_process_finds_the_subspaces_of_a_divided_base(processes: Any) -> None:
    first, other = processes[1]
    assert first["solved psoft"] == 4
    assert other["solved psoft"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["zero2-psoft", "zero2-oft", "zero3-psoft", "zero3-oft", "zero3-boft", "loaded-psoft", "loaded-oft"]
)
def test_an_adapter_saved_by_deepspeed_loads_in_one_process(processes: Any, name: str) -> None:
    folder = processes[0]
    loaded = PeftModel.from_pretrained(tiny_llama(), folder / name)
    expected = torch.load(folder / f"{name}.pt", weights_only=True)
    torch.testing.assert_close(worker.logits(loaded), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_an_adapter_file_on_a_divided_base(processes: Any) -> None:
    for found in processes[1]:
        assert found["again psoft"] < 1e-4
        assert found["again oft"] < 1e-4


@pytest.mark.slow
def test_a_checkpoint_of_deepspeed(processes: Any) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    model = worker.adapted("psoft")
    state = get_fp32_state_dict_from_zero_checkpoint(str(processes[0] / "checkpoint"))
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    expected = torch.load(processes[0] / "zero3-psoft.pt", weights_only=True)
    torch.testing.assert_close(worker.logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_merging_what_deepspeed_has_divided(processes: Any) -> None:
    for found in processes[1]:
        assert "spread over several processes" in found["merge refused"]
        assert found["merged"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_by_accelerate(tmp_path: Path, stage: int) -> None:
    model = worker.adapted("psoft")
    alone = worker.train(model, trainable(model).values())
    for found in run(tmp_path, str(stage)):
        assert found["divided"] is (stage == 3)
        assert found["losses"] == pytest.approx(alone, abs=1e-4)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    expected = torch.load(tmp_path / "adapter.pt", weights_only=True)
    torch.testing.assert_close(worker.logits(loaded), expected, rtol=1e-4, atol=1e-4)
