"""An unmerged model is recorded by torch.jit.trace, torch.export and ONNX, as PEFT's LoRA is."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from helpers import FEW, HOSTS_OF_12, LORA, WITH_LORA, as_trained, relative_error, seeded_host

pytestmark = [
    pytest.mark.parametrize("method", WITH_LORA),
    pytest.mark.covered(method=FEW, host=("linear", "conv2d", "embedding")),
]


@pytest.mark.parametrize("host", ["linear", "transposed", "conv1d", "conv2d", "conv3d", "embedding"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("used", [True, False])
def test_a_trace_gives_the_models_numbers(method: str, host: str, grad: bool, used: bool) -> None:
    if method == LORA and host in ("transposed", "conv3d"):
        pytest.skip("needs other options")
    model, x = as_trained(method, seeded_host(host), "layer"), HOSTS_OF_12[host][1]()
    if used:
        model(x)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, (x,))
        other = HOSTS_OF_12[host][1]()
        assert relative_error(traced(other).detach(), model(other).detach()) < 1e-5
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    assert relative_error(torch.jit.load(file)(x).detach(), model(x).detach()) < 1e-5
    model(x).sum().backward() if x.is_floating_point() else None  # and it trains on


def test_a_chain_is_traced(method: str) -> None:
    model, x = as_trained(method), torch.randn(3, 12)
    traced = torch.jit.trace(model, (x,), check_trace=False)
    y = torch.randn(5, 12)
    assert relative_error(traced(y).detach(), model(y).detach()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("merged", [False, True])
def test_onnx(method: str, merged: bool) -> None:
    if merged and method != "psoft":
        pytest.skip("merged, it is a plain model whatever the method")
    if method not in (*FEW, "goft", "oplora"):
        pytest.skip("the operations of another method")
    pytest.importorskip("onnxscript")
    reference: Any = pytest.importorskip("onnx.reference")
    model, x = as_trained(method), torch.randn(3, 12)
    if merged:
        model.merge_adapter()
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    session = reference.ReferenceEvaluator(program.model_proto)
    (found,) = session.run(None, {session.input_names[0]: x.numpy()})
    assert relative_error(torch.tensor(found), model(x).detach()) < 1e-4
