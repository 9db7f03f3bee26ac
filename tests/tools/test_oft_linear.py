"""OFT on one layer, by `isotune.tools.oft_linear.Linear`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from isotune.tools.oft_linear import Linear as OFTLinear


@pytest.mark.parametrize("shared", [False, True])
def test_the_numbers_of_a_layer(shared: bool) -> None:
    layer = OFTLinear(
        nn.Linear(768, 768),
        adapter_name="default",
        r=8,
        oft_block_size=0,
        module_dropout=0.0,
        coft=False,
        block_share=shared,
        init_weights=True,
    )
    assert layer.oft_R["default"].weight.numel() == (1 if shared else 8) * 96 * 95 // 2
    assert list(layer.oft_R) == ["default"]
    assert len(layer.oft_R) == 1
    with pytest.raises(KeyError):
        layer.oft_R["other"]
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["isotune_operator.default.generator"]


def test_call_train_merge_and_unmerge() -> None:
    base = nn.Linear(24, 10)
    layer = OFTLinear(base, "default", oft_block_size=4)
    x = torch.randn(2, 3, 24)
    assert torch.equal(layer(x), base(x))
    optimizer = torch.optim.SGD([layer.oft_R["default"].weight], lr=1.0)
    layer(x).square().mean().backward()
    optimizer.step()
    expected, weight = layer(x).detach(), base.weight.clone()
    assert not torch.allclose(expected, base(x))
    layer.merge(safe_merge=True, adapter_names=["default"])
    assert layer.merged
    torch.testing.assert_close(layer(x), expected)
    layer.unmerge()
    assert not layer.merged
    assert torch.equal(base.weight, weight)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"r=5 .* 24 inputs .* 4 or 6"):
        OFTLinear(nn.Linear(24, 10), r=5)
    with pytest.raises(ValueError, match="cannot be adapted"):
        OFTLinear(nn.LayerNorm(4))
