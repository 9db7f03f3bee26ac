"""Training steps with Cayley transforms of usual sizes, held in a CUDA graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from gpu_device import CUDA_ALONE, DEVICE, PRECISIONS
from torch import Tensor, nn

from helpers import Chain, as_trained, trainable

SIZES = {
    "psoft r=46": ("psoft", {"r": 46, "psoft_alpha": 46}),
    "psoft r=128": ("psoft", {"r": 128, "psoft_alpha": 128}),
    "oft b=32": ("oft", {"oft_block_size": 32}),
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    """A training step, and its loss."""
    optimizer.zero_grad(set_to_none=True)
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


@CUDA_ALONE
@pytest.mark.parametrize("case", SIZES)
def test_a_training_step_in_a_cuda_graph(case: str) -> None:
    """Recorded once and replayed on other inputs: the losses of an eager model."""
    method, options = SIZES[case]
    base = Chain(192, 256, 160, 192).to(DEVICE)
    model: Any = as_trained(method, base, **options).to(DEVICE).train()
    eager = copy.deepcopy(model)
    inputs = torch.randn(9, 32, 192, device=DEVICE)
    x = inputs[0].clone()
    with PRECISIONS["fp32"].set():
        mine, theirs = (torch.optim.Adam(trainable(m).values(), lr=1e-3, capturable=True) for m in (model, eager))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            found = [step(model, mine, each) for each in inputs[:3]]
        torch.cuda.current_stream().wait_stream(side)
        mine.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = step(model, mine, x)
        for each in inputs[3:]:
            x.copy_(each)
            graph.replay()
            found.append(loss.clone())
        expected = [step(eager, theirs, each) for each in inputs]
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-4, atol=1e-7)
