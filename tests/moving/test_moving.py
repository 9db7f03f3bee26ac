"""Subspaces that move: what a boundary changes and what it does not, on every host, in files and in the optimiser."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quantisers
from helpers import (
    HOSTS_OF_12,
    Chain,
    OneLayer,
    Stack,
    assert_unchanged,
    down_of,
    layers_of,
    only,
    seeded_host,
    snapshot,
)
from isotune import (
    CersaConfig,
    HRAConfig,
    LoraXsConfig,
    OploraConfig,
    PesoConfig,
    PsoftConfig,
    RosaConfig,
    SvfitConfig,
    get_peft_model,
    hotswap_adapter,
    load_adapter,
)
from isotune.adapter.subspace import SubspaceBasis
from isotune.diagnostics.inspect import inspect
from isotune.errors import AdapterFileError, IsotuneWarning
from isotune.files.adapter import describe
from isotune.files.export_lora import export_lora
from isotune.moving import MovingSchedule
from isotune.moving.boundary import adapted

KINDS: dict[str, Any] = {
    "psoft": lambda **o: PsoftConfig(r=4, **o),
    "psoft_so": lambda **o: PsoftConfig(r=4, psoft_mag_a=False, psoft_mag_b=False, **o),
    "scaled": lambda **o: PsoftConfig(r=4, scaled_generator=True, **o),
    "pissa": lambda **o: PsoftConfig(r=3, ab_svd_init="pissa_init", **o),
    "free": lambda **o: PsoftConfig(r=4, psoft_orth=False, psoft_alpha=2.0, **o),
    "lora_xs": lambda **o: LoraXsConfig(r=4, **o),
    "cersa": lambda **o: CersaConfig(r=4, **o),
    "svfit": lambda **o: SvfitConfig(r=4, selection="mixed", **o),
    "rosa": lambda **o: RosaConfig(r=4, **o),
    "peso": lambda **o: PesoConfig(r=4, lora_alpha=8.0, **o),
}
"""The methods on subspaces, with both splits of the singular values and a scale other than 1."""
SELECT = ("top", "bottom", "band", "gradient", "warm")


def optimiser_of(model: nn.Module, kind: str = "adamw") -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if kind == "adamw":
        return torch.optim.AdamW(parameters, lr=0.05)
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def squares(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return (y - torch.linspace(-1, 1, y.numel()).view(y.shape)).square().mean()


def given_for(select: str, *batches: Tensor) -> dict[str, Any]:
    return {"batches": batches, "loss": squares} if select == "gradient" else {}


def train(model: nn.Module, schedule: MovingSchedule, x: Tensor, steps: int, kind: str = "adamw") -> float:
    """The largest change of the output at a boundary."""
    optimizer, largest = optimiser_of(model, kind), 0.0
    for _ in range(steps):
        squares(model, x).backward()
        optimizer.step()
        with torch.no_grad():
            before = model(x)
            if schedule.step(model, optimizer) is not None:
                largest = max(largest, float((model(x) - before).abs().max()))
        optimizer.zero_grad()
    return largest


def moved_stack(kind: str = "psoft", steps: int = 4, every: int = 2, **options: Any) -> Any:
    torch.manual_seed(1)
    model = get_peft_model(Stack(), KINDS[kind](target_modules=["first", "second"]))
    train(model, MovingSchedule(every, select="band", **options), torch.randn(8, 24), steps)
    return model


def fresh_stack() -> Stack:
    torch.manual_seed(1)
    return Stack()


@pytest.mark.parametrize(
    ("kind", "host", "select"),
    [
        (kind, host, SELECT[(row + column) % len(SELECT)])
        for row, kind in enumerate(KINDS)
        for column, host in enumerate(HOSTS_OF_12)
    ],
)
def test_a_boundary_keeps_the_function_and_the_base(kind: str, host: str, select: str, tmp_path: Path) -> None:
    x = HOSTS_OF_12[host][1]()
    model = get_peft_model(seeded_host(host), KINDS[kind](target_modules=["layer"]))
    layer = only(model)
    base = layer.base_weight.detach().clone()
    schedule = MovingSchedule(3, select=select, **given_for(select, x))
    assert train(model, schedule, x, 8) <= 1e-5
    assert [move.done for move in schedule.history] == [3, 6]
    assert layer.base_weight.equal(base)
    down = down_of(layer)
    down = down / down.norm(dim=1, keepdim=True)
    torch.testing.assert_close(down @ down.T, torch.eye(len(down)), rtol=0, atol=1e-5)
    expected = model(x).detach()

    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert layer.base_weight.equal(base)
    assert layer.host.weight.equal(base)

    up, down = layer.low_rank("default")
    parts = 2 if kind == "rosa" else 1  # what was put in, and what was taken out
    assert len(down) == parts * layer.subspace("default").size + schedule.history[-1].ranks["layer"]
    change = layer.host.seen(layer.get_delta_weight("default"))
    torch.testing.assert_close(up @ down, change, rtol=1e-5, atol=1e-6)

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(seeded_host(host), tmp_path)
    assert torch.equal(loaded(x), expected)


@pytest.mark.parametrize("select", SELECT[:3])
def test_two_moves_are_those_of_plain_torch(select: str) -> None:
    """LoRA-XS by SGD with momentum, against a weight that really changes at a boundary."""
    x, rank, every = torch.randn(9, 12, dtype=torch.float64), 4, 3
    model = get_peft_model(seeded_host("linear").double(), LoraXsConfig(r=rank, init_std=0.0, target_modules=["layer"]))
    weight, bias = only(model).base_weight.detach().clone(), only(model).base_layer.bias.detach()
    schedule = MovingSchedule(every, select=select, seed=3)
    optimizer = optimiser_of(model, "sgd")
    firsts: list[int] = []

    def factors() -> tuple[Tensor, Tensor]:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        # Which band is drawn is the schedule's own matter; everything else is computed here.
        overlap = (down_of(only(model)).double() @ right.T).abs()
        chosen = slice(first := int(overlap.sum(0).topk(rank).indices.min()), first + rank)
        firsts.append(first)
        signs = torch.sign((right[chosen] * down_of(only(model)).double()).sum(1))
        return left[:, chosen] * signs, (values[chosen] * signs)[:, None] * right[chosen]

    up, down = factors()
    core = torch.zeros(rank, rank, dtype=torch.float64, requires_grad=True)
    twin = torch.optim.SGD([core], lr=0.05, momentum=0.9)
    for step in range(1, 9):
        squares(model, x).backward()
        optimizer.step()
        schedule.step(model, optimizer)
        optimizer.zero_grad()
        twin.zero_grad()
        y = nn.functional.linear(x, weight + up @ core @ down, bias)
        squares(lambda _, y=y: y, x).backward()
        twin.step()
        if step % every == 0:
            with torch.no_grad():
                weight = weight + up @ core @ down
                core.zero_()
            twin.state.clear()
            up, down = factors()
        found = only(model).subspace("default").coefficients.detach().double()
        torch.testing.assert_close(found, core.detach(), rtol=1e-5, atol=1e-6)
        whole = weight + up @ core.detach() @ down
        torch.testing.assert_close(
            only(model).base_weight + only(model).get_delta_weight("default"), whole, rtol=1e-5, atol=1e-6
        )
    assert len(firsts) == 3
    assert firsts[-1] == {"top": 0, "bottom": 8}.get(select, firsts[-1])


def test_the_rotation_goes_on_from_the_current_weight() -> None:
    """A PSOFT that has moved rotates the strongest directions of W + U D, not those of W."""
    model = moved_stack("psoft", steps=4)
    train(model, MovingSchedule(1, select="top"), torch.randn(8, 24), 2)
    layer = layers_of(model)[0]
    up, down = layer.accumulated("default")
    current = layer.base_weight + up @ down
    right = torch.linalg.svd(current.detach().double()).Vh[:4].float()
    cosines = torch.linalg.svdvals(right @ down_of(layer).T)
    torch.testing.assert_close(cosines, torch.ones(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        layer.subspace("default").placement.up[:, :4], current @ down_of(layer).T, rtol=1e-5, atol=1e-6
    )


def test_the_gradient_is_the_full_one() -> None:
    """Of the weight itself, summed over the batches, in groups of layers as the memory allows."""
    model = moved_stack("lora_xs")
    batches = [torch.randn(6, 24), torch.randn(3, 24)]
    twin = copy.deepcopy(model).merge_and_unload().requires_grad_()
    sum(squares(twin, batch) for batch in batches).backward()
    for memory in (1, 2**30):
        other = copy.deepcopy(model)
        MovingSchedule(1, select="gradient", batches=batches, loss=squares, gradient_memory=memory).step(
            other, optimiser_of(other), done=9
        )
        for layer, name in zip(layers_of(other), ("first", "second"), strict=True):
            expected = torch.linalg.svd(getattr(twin, name).weight.grad.double()).Vh[:4].float()
            own = layer.bases("default")[0].basis
            torch.testing.assert_close(torch.linalg.svdvals(own @ expected.T), torch.ones(4), rtol=0, atol=1e-4)


def test_processes_sum_gradients_that_only_one_of_them_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """One has no batch, or batches that use other layers; what is refused is refused after all sums."""
    x, sent = torch.randn(6, 24), []
    monkeypatch.setattr("isotune.moving.choosing.several", lambda: True)
    monkeypatch.setattr("isotune.moving.choosing.dist.all_reduce", lambda total: sent.append(total.clone()))

    def bases(batches: list[Any], memory: int = 2**30) -> list[Tensor]:
        model = get_peft_model(fresh_stack(), KINDS["lora_xs"](target_modules=["first", "second"]))
        loss = lambda m, b: squares(m, b) if len(b) > 1 else m.first(b).sum()  # noqa: E731
        schedule = MovingSchedule(1, select="gradient", batches=batches, loss=loss, gradient_memory=memory)
        schedule.step(model, optimiser_of(model))
        return [layer.bases("default")[0].basis for layer in layers_of(model)]

    expected, others = bases([x]), list(sent)
    assert [tuple(total.shape) for total in others] == [(), *((len(t), t.shape[1]) for t in others[1:])]
    for batches in ([], [x[:1]]):
        for memory in (1, 2**30):
            rest = iter(others)
            monkeypatch.setattr("isotune.moving.choosing.dist.all_reduce", lambda total, r=rest: total.add_(next(r)))
            found = bases(batches, memory)
            assert next(rest, None) is None
            torch.testing.assert_close(found[1].abs(), expected[1].abs(), rtol=1e-4, atol=1e-5)

    sent.clear()
    monkeypatch.setattr("isotune.moving.choosing.dist.all_reduce", lambda total: sent.append(total.clone()))
    with pytest.raises(ValueError, match="does not depend on 'second'"):
        bases([x[:1]])
    assert len(sent) == 3
    with pytest.raises(ValueError, match="batches is empty"):
        bases([])
    assert len(sent) == 4


class Scaled(nn.Embedding):
    """As Gemma has it: a look-up that multiplies the rows."""

    def forward(self, x: Tensor) -> Tensor:
        return 2.5 * super().forward(x)


@pytest.mark.parametrize("host", ["conv2d", "embedding", "scaled", "transposed"])
def test_the_gradient_of_other_hosts(host: str) -> None:
    x = HOSTS_OF_12["embedding" if host == "scaled" else host][1]()
    base = OneLayer(Scaled(19, 12)) if host == "scaled" else seeded_host(host)
    model = get_peft_model(base, PsoftConfig(r=3, target_modules=["layer"]))
    assert train(model, MovingSchedule(2, select="band"), x, 4) <= 1e-5
    twin = copy.deepcopy(model).merge_and_unload().requires_grad_()
    torch.testing.assert_close(model(x), twin(x), rtol=1e-5, atol=1e-5)
    squares(twin, x).backward()
    layer = only(model)
    full = layer.host.seen(twin.layer.weight.grad)
    MovingSchedule(1, select="gradient", batches=[x], loss=squares).step(model, optimiser_of(model), done=9)
    expected = torch.linalg.svd(full.double()).Vh[:3].float()
    cosines = torch.linalg.svdvals(layer.bases("default")[0].basis @ expected.T)
    torch.testing.assert_close(cosines, torch.ones(3), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_warm_start_stays_in_its_subspace(kind: str) -> None:
    """On the weight so far."""
    model = moved_stack(kind)
    layer = layers_of(model)[0]
    adapter = layer.subspace("default")
    rows = adapter.lora_A.detach().clone() if kind in ("rosa", "peso") else layer.bases("default")[0].basis.clone()
    whole = layer.base_weight + layer.get_delta_weight("default")
    MovingSchedule(1, select="warm").step(model, optimiser_of(model), done=9)
    basis = layer.bases("default")[0].basis
    torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis)), rtol=0, atol=1e-5)
    torch.testing.assert_close(rows @ basis.T @ basis, rows, rtol=1e-4, atol=1e-5)
    assert (torch.linalg.eigvalsh(rows @ basis.T) > 0).all()  # the nearest one, so that no direction is turned round
    torch.testing.assert_close(layer.base_weight + layer.get_delta_weight("default"), whole, rtol=1e-5, atol=1e-5)


def test_a_pass_for_the_gradient_leaves_no_trace() -> None:
    model = get_peft_model(Stack(), PsoftConfig(r=4, psoft_dropout=0.3, target_modules=["first"])).train()
    before, optimizer = torch.get_rng_state(), optimiser_of(model)
    MovingSchedule(1, select="gradient", batches=[torch.randn(4, 24)], loss=squares).step(model, optimizer)
    assert model.training
    assert layers_of(model)[0].training
    assert all(p.grad is None for p in model.parameters())
    assert not layers_of(model)[0]._forward_hooks
    torch.randn(4, 24)
    torch.set_rng_state(before)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_accumulated_has_been_learnt(kind: str) -> None:
    """Right after a move M is the identity, but the layer is not the base's, and its subspace not to be replaced."""
    model = moved_stack(kind, steps=2)
    assert not any(layer.adapter("default").is_identity() for layer in layers_of(model))
    layer = layers_of(model)[0]
    before = layer.bases("default")[0].basis.clone()
    with torch.no_grad():
        layer.base_layer.weight.normal_()
    model(torch.randn(8, 24))
    assert torch.equal(layer.bases("default")[0].basis, before)


def test_an_accumulated_update_is_cut_with_its_error_said() -> None:
    model = moved_stack(steps=4)
    layers = layers_of(model)
    exact = [up @ down for up, down in (layer.low_rank("default") for layer in layers)]
    schedule = MovingSchedule(1, select="bottom", max_rank=2)
    with pytest.warns(IsotuneWarning, match="cut to rank 2"):
        schedule.step(model, optimiser_of(model), done=9)
    (move,) = schedule.history
    assert set(move.ranks.values()) == {2}
    for layer, whole in zip(layers, exact, strict=True):
        up, down = layer.accumulated("default")
        values = torch.linalg.svdvals(whole.double())
        expected = float(values[2:].norm() / values.norm())
        assert float((up @ down - whole).norm() / whole.norm()) == pytest.approx(expected, rel=1e-3)
        assert move.errors[layer.key] == pytest.approx(expected, rel=1e-3)
    assert move.error == max(move.errors.values()) == move.errors[move.worst]


def test_nothing_is_accumulated_where_nothing_was_learnt() -> None:
    model = get_peft_model(fresh_stack(), KINDS["psoft"](target_modules=["first"]))
    x = torch.randn(8, 24)
    expected = model(x)
    schedule = MovingSchedule(1, select="bottom")
    schedule.step(model, optimiser_of(model))
    assert schedule.history[0].ranks == {"first": 0}
    assert torch.equal(model(x), expected)
    train(model, schedule, x, 1)
    assert schedule.history[-1].number == 2
    assert schedule.history[-1].ranks["first"] > 0


# -- files -----------------------------------------------------------------------------------------------------------


def test_the_file_says_what_it_holds(tmp_path: Path) -> None:
    model = moved_stack(steps=6)
    model.save_pretrained(tmp_path)
    config, tensors = (
        json.loads((tmp_path / "adapter_config.json").read_text()),
        load_file(tmp_path / "adapter_model.safetensors"),
    )
    assert (config["isotune_format"], config["basis"]) == (3, "embedded")
    own = {key.removeprefix("base_model.model.first."): t.shape for key, t in tensors.items() if ".first." in key}
    rank = config["accumulated_ranks"]["first"]
    assert own["isotune_form.up"] == (40, rank)
    assert own["isotune_form.down"] == (rank, 24)
    assert own["isotune_form.basis"] == (4, 24)
    assert "isotune_form.pin" not in own
    report = inspect(tmp_path, fresh_stack())
    assert report.moves == 3
    assert [layer.accumulated_rank for layer in report.layers] == list(config["accumulated_ranks"].values())
    assert "moved up to boundary 3" in report.summary()
    assert "rank 4," in repr(model)

    never = get_peft_model(fresh_stack(), KINDS["psoft"](target_modules=["first"]))
    never.save_pretrained(tmp_path / "never")
    config = json.loads((tmp_path / "never" / "adapter_config.json").read_text())
    assert config["isotune_format"] == 1
    assert "accumulated_ranks" not in config


@pytest.mark.parametrize("damage", ["sizes", "moves", "missing", "unsaid"])
def test_a_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    moved_stack().save_pretrained(tmp_path)
    file, settings = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, config = load_file(file), json.loads(settings.read_text())
    prefix = "base_model.model.first.isotune_form."
    if damage == "sizes":
        config["accumulated_ranks"]["first"] += 1
    elif damage == "moves":
        tensors[prefix + "moves"] = torch.tensor(1.5)
    elif damage == "missing":
        del tensors[prefix + "down"]
    else:
        del config["accumulated_ranks"]
    save_file(tensors, file)
    settings.write_text(json.dumps(config))
    base = fresh_stack()
    with pytest.raises(AdapterFileError, match="first"):
        PeftModel.from_pretrained(base, tmp_path)
    with pytest.raises(AdapterFileError, match="first"):
        describe(tmp_path).place(fresh_stack())


def test_an_earlier_release_refuses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved_stack().save_pretrained(tmp_path)
    monkeypatch.setattr("isotune.methods.config.FORMAT_VERSION", 2)
    with pytest.raises(AdapterFileError, match="format version 3"):
        PeftModel.from_pretrained(fresh_stack(), tmp_path)


@pytest.mark.parametrize("basis", ["pinned", "embedded"])
@pytest.mark.parametrize("way", ["peft", "state_dict"])
def test_a_checkpoint_of_other_sizes_is_loaded_into_an_adapter_in_use(basis: Any, way: str, tmp_path: Path) -> None:
    """Forward, as a resumed training does it, and back, as when the best checkpoint is taken in the end."""
    x, models = torch.randn(5, 24), {}
    for name, steps in (("none", 1), ("two", 4), ("three", 6)):
        torch.manual_seed(1)
        model = get_peft_model(Stack(), KINDS["psoft"](target_modules=["first", "second"], basis=basis))
        train(model, MovingSchedule(2, select="band"), x, steps)
        model.save_pretrained(tmp_path / name)
        models[name] = model
    model = get_peft_model(fresh_stack(), KINDS["psoft"](target_modules=["first", "second"], basis=basis))
    for name in ("two", "three", "two", "none", "three", "none"):
        if way == "peft":
            model.load_adapter(tmp_path / name, "default", is_trainable=True)
        else:
            model.load_state_dict(models[name].state_dict())
        assert torch.equal(model(x), models[name](x))
        model.save_pretrained(tmp_path / "again")
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            expected = (tmp_path / name / file).read_bytes()
            if file.endswith("json"):
                now, then = json.loads((tmp_path / "again" / file).read_text()), json.loads(expected)
                assert (now["basis"], now.get("accumulated_ranks")) == (then["basis"], then.get("accumulated_ranks"))
            else:
                assert (tmp_path / "again" / file).read_bytes() == expected


@pytest.mark.parametrize("kind", ["psoft", "lora_xs", "rosa", "peso"])
@pytest.mark.parametrize("loaded", [True, False])
def test_a_reference_by_copied_parameters_has_what_is_accumulated(kind: str, loaded: bool, tmp_path: Path) -> None:
    """As TRL's trainers make it: add_adapter with the configuration of an adapter, and a copy of its parameters."""
    model, x = moved_stack(kind), torch.randn(8, 24)
    if loaded:
        model.save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(fresh_stack(), tmp_path, is_trainable=True)
    model.add_adapter("other", KINDS[kind](target_modules=["first", "second"]))  # which moves as often
    model.set_adapter("other")
    train(model, MovingSchedule(2, select="bottom", adapter="other"), torch.randn(8, 24), 4)
    for name in ("default", "other"):
        model.set_adapter(name)
        expected = model(x).detach()
        model.add_adapter(f"{name}-copy", model.peft_config[name])
        for layer in layers_of(model):
            layer.adapter(f"{name}-copy").load_state_dict(layer.adapter(name).state_dict())
        model.set_adapter(f"{name}-copy")
        assert torch.equal(model(x), expected), name
        model.set_adapter(name)
        train(model, MovingSchedule(2, select="band", adapter=name), torch.randn(8, 24), 4)
        model.set_adapter(f"{name}-copy")
        assert torch.equal(model(x), expected), name
    model.add_adapter("unmoved", KINDS[kind](target_modules=["first", "second"]))
    model.set_adapter("unmoved")
    torch.testing.assert_close(model(x), fresh_stack()(x), rtol=0, atol=1e-3)


def test_export_to_lora_is_exact_at_the_summed_rank(tmp_path: Path) -> None:
    model, x = moved_stack("free", steps=5), torch.randn(5, 24)
    expected = model(x).detach()
    report = export_lora(model, tmp_path / "lora")
    assert report.error == 0.0
    accumulated = model.peft_config["default"].accumulated_ranks
    assert {layer.name: layer.rank for layer in report.layers} == {name: 4 + rank for name, rank in accumulated.items()}
    plain = PeftModel.from_pretrained(fresh_stack(), tmp_path / "lora")
    torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-6)


def test_swapping_deleting_averaging_and_scaling(tmp_path: Path) -> None:
    model, x = moved_stack(), torch.randn(5, 24)
    expected = model(x).detach()
    model.save_pretrained(tmp_path / "two")
    longer = moved_stack(steps=6)
    longer.save_pretrained(tmp_path / "three")
    with pytest.raises(ValueError, match="accumulated updates of other ranks"):
        hotswap_adapter(model, tmp_path / "three")
    train(model, MovingSchedule(99), x, 2)
    assert not torch.equal(model(x), expected)
    hotswap_adapter(model, tmp_path / "two")
    assert torch.equal(model(x), expected)

    load_adapter(model, tmp_path / "three", "other")
    load_adapter(model, tmp_path / "two", "same")
    with pytest.raises(ValueError, match="accumulated on earlier subspaces"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mean")
    model.add_weighted_adapter(["default", "same"], [0.5, 0.5], "mean")
    model.set_adapter("mean")
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    model.set_adapter("other")
    torch.testing.assert_close(model(x), longer(x), rtol=1e-5, atol=1e-5)
    model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(model(x), expected)

    model.eval()
    mixed = torch.cat([model(x[:2]), fresh_stack()(x[2:])])
    torch.testing.assert_close(model(x, adapter_names=["default"] * 2 + ["__base__"] * 3), mixed, rtol=1e-5, atol=1e-6)
    for layer in layers_of(model):
        whole = layer.get_delta_weight("default")
        layer.set_scale("default", 0.5)
        torch.testing.assert_close(layer.get_delta_weight("default"), 0.5 * whole)
        layer.set_scale("default", 0.0)
    torch.testing.assert_close(model(x), fresh_stack()(x), rtol=1e-6, atol=1e-7)


def test_moved_adapters_under_half_precision_and_another_device() -> None:
    model, x = moved_stack(steps=6).eval(), torch.randn(5, 24)
    expected = model(x).detach()
    model.to(torch.bfloat16)
    layer = layers_of(model)[0]
    assert {tensor.dtype for tensor in layer.stored_of("default")} == {torch.float32}
    assert float((model(x.bfloat16()).float() - expected).norm() / expected.norm()) < 0.02
    meta = copy.deepcopy(layer.isotune_form["default"]).to("meta")
    assert isinstance(meta, SubspaceBasis)
    assert meta.up.is_meta


# -- the optimiser ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["psoft", "free", "lora_xs", "pissa"])
@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_projecting_the_state_onto_the_same_subspace_changes_nothing(kind: str, optimiser: str) -> None:
    """Where nothing was accumulated, the strongest directions are the former ones, up to their signs."""
    torch.manual_seed(2)
    model = get_peft_model(OneLayer(nn.Linear(12, 20)), KINDS[kind](target_modules=["layer"]))
    x, optimizer = torch.randn(6, 12), optimiser_of(model, optimiser)
    squares(model, x).backward()
    optimizer.step()
    adapter = only(model).subspace("default")
    with torch.no_grad():
        for name, value in adapter.identity().items():
            adapter.get_parameter(name).copy_(value)
    before = {p: {key: v.clone() for key, v in s.items() if isinstance(v, Tensor)} for p, s in optimizer.state.items()}
    signs = down_of(only(model)).clone()
    MovingSchedule(1, optimizer_state="project").step(model, optimizer)
    flipped = torch.sign((signs * down_of(only(model))).sum(1))
    assert before
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                if key.endswith("_sq"):
                    expected = before[parameter][key]
                elif value.shape == (4, 4) or value.shape == (3, 3):
                    expected = flipped[:, None] * before[parameter][key] * flipped
                elif len(value) == len(flipped) and parameter is not getattr(adapter, "generator", None):
                    expected = before[parameter][key]
                else:
                    rows, columns = torch.triu_indices(len(flipped), len(flipped), 1)
                    expected = before[parameter][key] * flipped[rows] * flipped[columns]
                torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_what_becomes_of_the_state(kind: str) -> None:
    for treatment in ("reset", "keep", "project"):
        torch.manual_seed(2)
        model = get_peft_model(OneLayer(nn.Linear(12, 20)), KINDS[kind](target_modules=["layer"]))
        x, optimizer = torch.randn(6, 12), optimiser_of(model)
        for _ in range(3):
            optimizer.zero_grad()
            squares(model, x).backward()
            optimizer.step()
        before = {p: dict(state) for p, state in optimizer.state.items()}
        MovingSchedule(1, select="bottom", optimizer_state=treatment).step(model, optimizer)
        if treatment == "reset":
            assert not optimizer.state
        for parameter, state in optimizer.state.items():
            assert state["step"] == 3
            same = torch.equal(state["exp_avg"], before[parameter]["exp_avg"])
            assert same == (treatment == "keep")
            assert (state["exp_avg_sq"] >= 0).all()
            # In a wholly new subspace nothing is known but the size of its gradients; factors have left the former one.
            if treatment == "project" and kind not in ("svfit", "rosa", "peso"):
                assert float(state["exp_avg"].abs().max()) < 1e-3 * float(before[parameter]["exp_avg"].abs().max())
                mean = before[parameter]["exp_avg_sq"].mean()
                torch.testing.assert_close(state["exp_avg_sq"], mean.expand_as(state["exp_avg_sq"]), rtol=1e-3, atol=0)
        squares(model, x).backward()
        optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters())


def test_a_gradient_in_the_overlap_keeps_its_direction() -> None:
    """In a subspace that is a rotation of the former one, the first moment is that of the same gradient there."""
    from isotune.moving.optimiser import Overlap, project

    torch.manual_seed(3)
    basis, turn = torch.linalg.qr(torch.randn(12, 4)).Q.T, torch.linalg.qr(torch.randn(4, 4)).Q
    for kind in ("free", "lora_xs", "psoft"):
        model = get_peft_model(OneLayer(nn.Linear(12, 20)), KINDS[kind](target_modules=["layer"]))
        adapter = only(model).subspace("default")
        name = adapter.evaluated[0]
        gradient = torch.randn(12, 12)
        values, next_values = torch.rand(4) + 1, torch.rand(4) + 1
        if kind == "psoft":
            values = next_values = torch.ones(4)

        def moment(v: Tensor, s: Tensor, kind: str = kind, gradient: Tensor = gradient) -> Tensor:
            found = s[:, None] * (v @ gradient @ v.T) / s
            if kind == "psoft":
                return (found - found.T)[tuple(torch.triu_indices(4, 4, 1))]
            return found.T.contiguous() if kind == "lora_xs" else found

        overlap = Overlap.of(values[:, None] * basis, next_values[:, None] * (turn @ basis))
        state = project(adapter, name, {"momentum_buffer": moment(basis, values)}, overlap)
        torch.testing.assert_close(state["momentum_buffer"], moment(turn @ basis, next_values), rtol=1e-4, atol=1e-5)


# -- refusals and interruptions --------------------------------------------------------------------------------------


def refusal(model: nn.Module, match: str, optimizer: Any = None, **options: Any) -> None:
    optimizer, before = optimizer or optimiser_of(model), snapshot(model)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    with pytest.raises(ValueError, match=match):
        MovingSchedule(1, **options).step(model, optimizer)
    assert_unchanged(model, before)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())


def test_what_cannot_move_is_refused() -> None:
    for config in (HRAConfig(r=4, target_modules=["0"]), OploraConfig(r=4, preserved_rank=4, target_modules=["0"])):
        refusal(get_peft_model(Chain(), config), "its method has (no|one) subspace")
    refusal(moved_stack(), "no isotune adapter 'other'", adapter="other")
    refusal(nn.Linear(2, 2), "no isotune adapter whose subspaces")
    model = moved_stack()
    model.merge_adapter()
    refusal(model, "unmerge_adapter")
    model = moved_stack()
    layers_of(model)[1].set_scale("default", 0.5)
    refusal(model, "has the scale 0.5")
    model = moved_stack()
    refusal(model, "does not have first.generator", torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0))
    model.requires_grad_(False)
    refusal(model, "is not trained", torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0))

    model = moved_stack()
    with torch.no_grad():
        layers_of(model)[1].subspace("default").generator.fill_(float("nan"))
    refusal(model, "NaN")
    model = moved_stack()
    refusal(
        model,
        "does not depend on 'second'",
        select="gradient",
        batches=[1],
        loss=lambda m, b: m.first(torch.ones(1, 24)).sum(),
    )
    refusal(model, "gives no loss", select="gradient", batches=[torch.ones(1, 24)])
    refusal(model, "batches is empty", select="gradient", batches=list)


def test_an_optimiser_of_another_kind_cannot_be_projected() -> None:
    model, x = moved_stack(), torch.randn(5, 24)
    optimizer = torch.optim.Adagrad([p for p in model.parameters() if p.requires_grad], lr=0.1)
    squares(model, x).backward()
    optimizer.step()
    model.zero_grad()
    refusal(model, "has 'sum'", optimizer, optimizer_state="project")
    MovingSchedule(1, optimizer_state="keep").step(model, optimizer, done=9)
    assert optimizer.state


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"every": 0}, "every=0"),
        ({"select": "tops"}, "Did you mean 'top'"),
        ({"unit": "steps"}, "unit='steps'"),
        ({"optimizer_state": "drop"}, "optimizer_state='drop'"),
        ({"max_rank": 0}, "max_rank=0"),
        ({"largest_error": -1.0}, "largest_error"),
        ({"select": "gradient"}, "needs batches"),
        ({"batches": []}, "does not use batches"),
        ({"at_start": 1}, "at_start=1"),
    ],
)
def test_a_schedule_checks_its_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        MovingSchedule(**options)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_exchange_is_undone(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = moved_stack(), torch.randn(5, 24)
    optimizer = optimiser_of(model)
    squares(model, x).backward()
    optimizer.step()
    model.zero_grad()
    expected, before = model(x).detach(), snapshot(model)
    state = {p: dict(s) for p, s in optimizer.state.items()}
    buffers, config = dict(model.named_buffers()), model.peft_config["default"]

    original, calls = SubspaceBasis.hold, []

    def hold(self: SubspaceBasis, values: Any) -> None:
        calls.append(self)
        original(self, values)
        if len(calls) == 2:
            raise error

    monkeypatch.setattr(SubspaceBasis, "hold", hold)
    schedule = MovingSchedule(1, select="bottom")
    with pytest.raises(error):
        schedule.step(model, optimizer, done=9)
    assert len(calls) == 4
    assert_unchanged(model, before)
    assert all(b is buffers[name] for name, b in model.named_buffers())
    assert {p: dict(s) for p, s in optimizer.state.items()} == state
    assert model.peft_config["default"] is config
    assert torch.equal(model(x), expected)
    assert not schedule.history
    schedule.step(model, optimizer, done=9)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    assert schedule.history[0].number == 9


def test_a_resumed_loop_goes_on_where_the_file_says() -> None:
    model = moved_stack(steps=4, every=2)
    again = MovingSchedule(2, select="band")
    assert [again.step(model, optimiser_of(model)) is not None for _ in range(4)] == [False, True, False, True]
    assert [move.number for move in again.history] == [3, 4]
    assert [MovingSchedule(2).step(model, optimiser_of(model), done=done) is None for done in (8, 9)] == [True, True]
    own = adapted(model)
    assert own.model.peft_config is model.peft_config


def test_a_subspace_chosen_before_the_first_step() -> None:
    """Once, whoever goes on; and the boundaries are where they are without it."""
    model, x = get_peft_model(fresh_stack(), KINDS["peso"](target_modules=["first"])), torch.randn(8, 24)
    schedule = MovingSchedule(2, select="gradient", batches=[x], loss=squares, at_start=True)
    optimizer, expected = optimiser_of(model), model(x).detach()
    with pytest.raises(ValueError, match=r"have never moved. Call step\(model, optimizer, done=0\)"):
        schedule.step(model, optimizer)
    assert schedule.step(model, optimizer, done=0).number == 0
    assert schedule.step(model, optimizer, done=0) is None
    assert torch.equal(model(x), expected)
    assert layers_of(model)[0].adapter("default").is_identity()
    train(model, schedule, x, 3)
    assert [(move.number, move.done) for move in schedule.history] == [(0, 0), (1, 2)]
    again = MovingSchedule(2, select="band", at_start=True)
    assert again.step(model, optimizer, done=0) is None
    assert again.step(model, optimizer, done=4).number == 2


def test_a_schedule_counts_each_model_anew() -> None:
    schedule = MovingSchedule(4, select="band")
    for _ in range(2):
        schedule.history.clear()
        train(get_peft_model(fresh_stack(), KINDS["psoft"](target_modules=["first"])), schedule, torch.randn(8, 24), 5)
        assert [move.done for move in schedule.history] == [4]


@pytest.mark.parametrize("kind", ["psoft", "rosa"])
@pytest.mark.parametrize("name", quantisers.parameters("bitsandbytes-nf4", "torchao-int8"))
def test_a_quantised_base(name: str, kind: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        quantisers.quantise(nn.Sequential(nn.Linear(64, 64)), name), KINDS[kind](target_modules=["0"])
    )
    x = torch.randn(6, 64)
    schedule = MovingSchedule(2, select="band")
    model.eval()  # some round their inputs in training alone
    scale = float(model(x).abs().max())
    assert train(model, schedule, x, 4) <= 1e-3 * scale
    assert len(schedule.history) == 2
