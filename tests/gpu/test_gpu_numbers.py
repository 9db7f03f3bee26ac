"""Every method on the GPU computes what it does in float64 on the CPU, in each precision of products."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from gpu_device import DEVICE, HOST, METHOD, PRECISIONS, at_start, gradients, trained
from peft import PeftModel, get_peft_model
from torch import nn

from helpers import EVERY_METHOD, SUBSPACES, as_trained, configured, layers_of, move, only, relative_error, trainable
from isotune.subspace.pinning import pin, recover
from quantisers import QUANTISERS, quantise

PRECISION = pytest.mark.parametrize("precision", PRECISIONS)


@METHOD
@HOST
@PRECISION
def test_identity_at_the_start(method: str, host: str, precision: str) -> None:
    """To the rounding of one product: the same sums may be added up in another order."""
    base, model, x = at_start(method, host)
    with PRECISIONS[precision].set():
        found, expected = model(x), base(x)
        assert found.dtype == expected.dtype
        limit = max(4 * PRECISIONS[precision].epsilon, 1e-6)
        assert relative_error(found, expected) <= limit
        model.merge_adapter()
        assert relative_error(model(x), expected) <= limit


@METHOD
@HOST
@PRECISION
def test_output_and_gradients_against_float64_on_the_cpu(method: str, host: str, precision: str) -> None:
    model, x = trained(method, host)
    how = PRECISIONS[precision]
    limit = max(8 * how.epsilon, 1e-5)
    wide = copy.deepcopy(model).cpu().double()
    same = x.cpu().double() if x.is_floating_point() else x.cpu()
    with how.set():
        found = model(x)
    assert relative_error(found.cpu(), wide(same)) < limit
    cotangent = torch.randn(found.shape, dtype=torch.float64)  # of a norm alone a rotation may have no gradient at all
    expected = gradients(wide, lambda: (wide(same) * cotangent).sum())
    with how.set():
        ours = gradients(model, lambda: (model(x).float() * cotangent.to(DEVICE, torch.float32)).sum())
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert ours[name].dtype == torch.float32
        assert relative_error(ours[name].cpu(), gradient) < limit, name


@METHOD
@HOST
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_merge_and_unmerge_bit_for_bit(method: str, host: str, dtype: torch.dtype, precision: str) -> None:
    model, x = trained(method, host)
    model, x = model.to(dtype), x.to(dtype) if x.is_floating_point() else x
    how, layer = PRECISIONS[precision], only(model)
    with how.set(), torch.no_grad():
        before, expected = layer.host.weight.clone(), model(x)
        model.merge_adapter()
        assert not torch.equal(layer.host.weight, before)
        limit = max(8 * max(how.epsilon, torch.finfo(dtype).eps), 1e-5)
        assert relative_error(model(x), expected) < limit
        model.unmerge_adapter()
        assert torch.equal(layer.host.weight, before)
        assert torch.equal(model(x), expected)


def wide_base() -> nn.Module:
    """Two layers of which no subspace is trivial; always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(21)
        return nn.Sequential(nn.Linear(48, 36), nn.Tanh(), nn.Linear(36, 48))


@METHOD
@pytest.mark.parametrize("tf32", [True, False])
def test_an_adapter_goes_from_the_gpu_to_the_cpu_and_back(method: str, tf32: bool, tmp_path: Path) -> None:
    """Its subspace is solved on the one and found again on the other, to 1e-3 of the update."""
    with PRECISIONS["tf32" if tf32 else "fp32"].set():
        options = {"regularizer_weight": 0.0} if method == "qgoft" else {}
        model = move(get_peft_model(wide_base().to(DEVICE), configured(method, ["0", "2"], **options))).eval()
        x = torch.randn(5, 48)
        model(x.to(DEVICE)).sin().sum().backward()
        torch.optim.SGD(trainable(model).values(), lr=0.01).step()
        updates = [layer.get_delta_weight("default").cpu() for layer in layers_of(model)]
        output = model(x.to(DEVICE)).detach().cpu()
        for step, device in enumerate(("cpu", DEVICE, "cpu")):
            model.save_pretrained(tmp_path / str(step))
            model = PeftModel.from_pretrained(wide_base().to(device), tmp_path / str(step)).eval()
            assert relative_error(model(x.to(device)).detach().cpu(), output) < 1e-3 + 8 * (2**-10 if tf32 else 0)
            for layer, update in zip(layers_of(model), updates, strict=True):
                found = layer.get_delta_weight("default")
                assert found.device.type == torch.device(device).type
                # Rotations may have been multiplied in TF32, a subspace must not have been found in it.
                limit = 1e-3 if not tf32 or method in SUBSPACES else 8 * 2**-10
                assert relative_error(found.cpu(), update) < limit


@pytest.mark.parametrize("method", SUBSPACES)
def test_a_subspace_is_the_same_whatever_the_setting_of_tf32(method: str) -> None:
    """By the newer of torch's two settings, which forbids reading the older one."""
    backends = torch.backends
    if not hasattr(backends, "fp32_precision"):
        pytest.skip("before torch 2.9 there is one setting")
    expected = as_trained(method, wide_base().to(DEVICE), "0", "2")
    before = backends.fp32_precision
    backends.fp32_precision = "tf32"
    try:
        found = as_trained(method, wide_base().to(DEVICE), "0", "2")
    finally:
        backends.fp32_precision = before
    for one, other in zip(layers_of(found), layers_of(expected), strict=True):
        assert relative_error(one.get_delta_weight("default"), other.get_delta_weight("default")) < 1e-3


def test_a_basis_is_pinned_where_it_is() -> None:
    basis = torch.linalg.qr(torch.randn(200, 24)).Q.T
    found, expected = pin(basis.to(DEVICE)), pin(basis)
    assert found.device.type == DEVICE.type
    assert relative_error(found.cpu(), expected) < 1e-7
    for candidates in (basis.flip(0), -basis):
        again, residual = recover(found, candidates.to(DEVICE))
        assert again.device.type == DEVICE.type
        assert relative_error(again.cpu(), basis) < 1e-5
        assert residual < 1e-5


@pytest.mark.parametrize("method", EVERY_METHOD)
@pytest.mark.parametrize("packed", ["bitsandbytes-nf4", "bitsandbytes-int8"])
def test_quantised_hosts(method: str, packed: str) -> None:
    """Output and gradients are those of the dequantised weight; unmerging restores the packed bits."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    # Packed there: of 8 bits packed on the CPU, bitsandbytes 0.50 leaves numbers and scales behind when a model moves.
    base = quantise(nn.Sequential(nn.Linear(96, 64)).to(DEVICE), packed)
    model = as_trained(method, base, "0").to(DEVICE)
    layer = only(model)
    plain = nn.Linear(96, 64).to(DEVICE)
    plain.load_state_dict({"weight": layer.unmerged_matrix(), "bias": layer.get_base_layer().bias})
    twin = get_peft_model(nn.Sequential(plain), model.peft_config["default"]).to(DEVICE).eval()
    twin.load_state_dict({n: t for n, t in model.state_dict().items() if "isotune" in n}, strict=False)
    x = torch.randn(16, 96, device=DEVICE)
    limit = 2e-2 if QUANTISERS[packed].rounds_inputs else 1e-4
    with PRECISIONS["fp32"].set():
        assert relative_error(model(x), twin(x)) < limit
        expected = gradients(twin, lambda: twin(x).square().sum())
        for name, gradient in gradients(model, lambda: model(x).square().sum()).items():
            assert relative_error(gradient, expected[name]) < 2 * limit, name
        before, output = layer.host.weight.clone(), model(x).detach()
        with pytest.warns(match="quantised again"):
            model.merge_adapter()
        model.unmerge_adapter()
        assert torch.equal(layer.host.weight, before)
        assert torch.equal(model(x), output)
