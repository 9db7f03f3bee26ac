"""Whatever is done to an adapted model, and in whatever order, it computes what its parameters say."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from peft import PeftModel
from torch import Tensor, nn

from helpers import (
    QUICK,
    SUBSPACES,
    Chain,
    assert_same_gradients,
    configured,
    gradients,
    layers_of,
    move,
    reference_update,
    trainable,
)
from isotune import add_adapter, get_peft_model, load_adapter
from isotune.tools.decoding import evaluated_once
from isotune.tuner.layer import Layer

METHODS = ("psoft", "lora_xs", "oft", "oft-output", "boft", "goft", "qgoft", "hra", "oplora")
NAMES = ("default", "second", "third")
SEEDS = st.integers(0, 10**6)


def weight_of(layer: Layer, names: Sequence[str]) -> Tensor:
    """W as these adapters change it in this order, by the definition of the two forms, at the scales in use."""
    matrix = layer.unmerged_matrix().detach()
    for name in names:
        adapter = layer.adapter(name)
        if adapter.additive:
            matrix = matrix + reference_update(layer, name) * adapter.relative_scale
            continue
        own = adapter.matrix().to(matrix)
        matrix = own @ matrix if adapter.side == "output" else matrix @ own.T
        if adapter.gain is not None:
            matrix = (1 + adapter.relative_scale * (adapter.gain.to(matrix) - 1))[:, None] * matrix
    return matrix


def by_definition(model: nn.Module, names: Sequence[str], x: Tensor) -> Tensor:
    """The output of a Chain whose weights these adapters have changed, by plain torch; `model` should be a copy.

    A copy has no evaluation of its adapters yet, so whatever is kept of earlier ones cannot be looked at.
    """
    for layer in layers_of(model):
        x = torch.tanh(nn.functional.linear(x, weight_of(layer, names), layer.get_base_layer().bias))
    return x


class Sequences(RuleBasedStateMachine):
    """A Chain in float64 with up to three adapters, and beside it what must be true of it."""

    @initialize(method=st.sampled_from(METHODS), seed=SEEDS)
    def adapt(self, method: str, seed: int) -> None:
        self.base = Chain().double().eval()
        torch.manual_seed(seed)
        self.model: Any = get_peft_model(copy.deepcopy(self.base), configured(method)).eval()
        self.methods = {"default": method}
        self.active = ["default"]
        self.merged: list[str] = []
        self.bits: list[Tensor] = []
        self.x = torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        move(self.model, seed)

    # -- what is done

    @rule(method=st.sampled_from(METHODS), seed=SEEDS)
    def add(self, method: str, seed: int) -> None:
        name = next((name for name in NAMES if name not in self.methods), None)
        if name is None or self.merged:
            return
        torch.manual_seed(seed)
        add_adapter(self.model, name, configured(method))
        self.model.base_model.set_adapter(name)
        move(self.model, seed, only=f".{name}.")
        self.methods[name] = method
        self.model.base_model.set_adapter(self.active)
        self.model.eval()

    @precondition(lambda self: not self.merged)
    @rule(data=st.data())
    def activate(self, data: Any) -> None:
        names = data.draw(st.permutations(sorted(self.methods)))
        self.active = names[: data.draw(st.integers(1, len(names)))]
        self.model.base_model.set_adapter(self.active)

    @precondition(lambda self: len(self.methods) > 1 and not self.merged)
    @rule(data=st.data())
    def delete(self, data: Any) -> None:
        name = data.draw(st.sampled_from(sorted(self.methods)))
        left = [other for other in self.active if other != name]
        if not left:
            return
        self.model.set_adapter(left[0])  # PEFT forgets which is active when several are left, LoRA's too
        self.model.delete_adapter(name)
        self.model.base_model.set_adapter(left)
        del self.methods[name]
        self.active = left

    @precondition(lambda self: not self.merged)
    @rule(seed=SEEDS, how=st.sampled_from(["in place", "data", "no_grad copy"]))
    def change_parameters(self, seed: int, how: str) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in trainable(self.model).values():
            noise = 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
            if how == "data":
                parameter.data = parameter.data + noise
            else:
                with torch.no_grad():
                    parameter.add_(noise) if how == "in place" else parameter.copy_(parameter + noise)

    @precondition(lambda self: not self.merged)
    @rule(steps=st.integers(1, 2))
    def train(self, steps: int) -> None:
        self.model.train()
        optimizer = torch.optim.Adam(trainable(self.model).values(), lr=0.02)
        for _ in range(steps):
            optimizer.zero_grad()
            self.model(self.x).square().sum().backward()
            optimizer.step()
        self.model.eval()

    @precondition(lambda self: not self.merged)
    @rule(data=st.data(), scale=st.sampled_from([0.0, 0.5, 1.0]))
    def rescale(self, data: Any, scale: float) -> None:
        name = data.draw(st.sampled_from(sorted(self.methods)))
        if self.methods[name] == "hra" and scale == 0.5:
            return
        for layer in layers_of(self.model):
            layer.set_scale(name, scale)

    @precondition(lambda self: not self.merged)
    @rule(data=st.data(), safe=st.booleans())
    def merge(self, data: Any, safe: bool) -> None:
        names = data.draw(st.sampled_from([None, *[[name] for name in self.methods]]))
        self.bits = [layer.base_weight.detach().clone() for layer in layers_of(self.model)]
        self.model.merge_adapter(adapter_names=names, safe_merge=safe)
        self.merged = list(self.active if names is None else names)

    @precondition(lambda self: self.merged)
    @rule()
    def unmerge(self) -> None:
        self.model.unmerge_adapter()
        self.merged = []
        for layer, before in zip(layers_of(self.model), self.bits, strict=True):
            assert torch.equal(layer.get_base_layer().weight, before)

    @rule()
    def copy(self) -> None:
        self.model = copy.deepcopy(self.model)

    @precondition(lambda self: not self.merged)
    @rule()
    def reload(self) -> None:
        if any(
            adapter.relative_scale != 1
            for layer in layers_of(self.model)
            for adapter in layer.isotune_operator.values()
        ):
            return  # a scale that is set is no part of the file
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            where = {name: folder if name == "default" else f"{folder}/{name}" for name in self.methods}
            first, *others = self.methods
            base = copy.deepcopy(self.base)
            model: Any = PeftModel.from_pretrained(base, where[first], first, is_trainable=True)
            for name in others:
                load_adapter(model, where[name], name, is_trainable=True)
        self.model = model.eval()
        self.model.base_model.set_adapter(self.active)

    @precondition(lambda self: not self.merged)
    @rule()
    def load_state(self) -> None:
        state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        for name, parameter in trainable(self.model).items():
            state[name] = parameter.detach() * 1.1
        self.model.load_state_dict(state)

    @rule(mode=st.sampled_from(["grad", "no_grad", "inference", "disabled", "layer alone", "interrupted", "train"]))
    def look(self, mode: str) -> None:
        if mode == "grad":
            self.model(self.x)
        elif mode == "no_grad":
            with torch.no_grad():
                self.model(self.x)
        elif mode == "inference":
            with torch.inference_mode():
                self.model(self.x)
        elif mode == "train":
            self.model.train()(self.x)
            self.model.eval()
        elif mode == "layer alone":
            layers_of(self.model)[0](self.x)
        elif mode == "interrupted":
            handle = layers_of(self.model)[1].register_forward_pre_hook(_interrupt)
            with pytest.raises(KeyboardInterrupt):
                self.model(self.x)
            handle.remove()
        elif mode == "disabled":
            with self.model.disable_adapter():
                assert torch.equal(self.model(self.x), self.base(self.x))
            self.merged = []  # as PEFT's own layers do, a disabled one unmerges

    @precondition(lambda self: not self.merged)
    @rule(other=st.sampled_from(["nothing", "no_grad", "a second pass", "a change of what is not active"]))
    def gradients(self, other: str) -> None:
        twin = copy.deepcopy(self.model)
        for model in (self.model, twin):
            model.zero_grad()
        by_definition(twin, self.active, self.x).square().sum().backward()
        loss = self.model(self.x).square().sum()
        self._do_between(other)
        loss.backward()
        if any(bool(g.any()) for g in gradients(twin).values() if g is not None):  # none at scale 0
            assert_same_gradients(self.model, twin, 1e-7)
        self.model.zero_grad()

    def _do_between(self, other: str) -> None:
        if other == "no_grad":
            with torch.no_grad():
                self.model(self.x[:1])
        elif other == "a second pass":
            self.model(self.x * 2)
        elif other == "a change of what is not active":
            for name, parameter in self.model.named_parameters():
                if "isotune_operator" in name and not any(f".{own}." in name for own in self.active):
                    parameter.data.mul_(1.01)

    @rule(seed=SEEDS)
    def change_biases_of_the_base(self, seed: int) -> None:
        torch.manual_seed(seed)
        with torch.no_grad():
            for own, layer in zip(self.base.layers, layers_of(self.model), strict=True):
                own.bias.add_(0.1 * torch.randn_like(own.bias))
                layer.get_base_layer().bias.copy_(own.bias)

    @precondition(lambda self: not any(method in SUBSPACES for method in self.methods.values()) and not self.merged)
    @rule(factor=st.sampled_from([0.9, 1.2]), how=st.sampled_from(["in place", "data", "load_state_dict"]))
    def change_weights_of_the_base(self, factor: float, how: str) -> None:
        """Which rotations follow; what pins a subspace of them refuses it (test_changed_bases.py)."""
        for own, layer in zip(self.base.layers, layers_of(self.model), strict=True):
            module = layer.get_base_layer()
            if how == "data":
                module.weight.data = module.weight.data * factor
            elif how == "in place":
                with torch.no_grad():
                    module.weight.mul_(factor)
            else:
                module.load_state_dict({"weight": module.weight.detach() * factor, "bias": module.bias.detach()})
            own.weight.data = module.weight.detach().clone()

    @precondition(lambda self: not self.merged)
    @rule()
    def decode(self) -> None:
        with torch.no_grad():
            expected = by_definition(copy.deepcopy(self.model), self.active, self.x)
        with torch.no_grad(), evaluated_once(self.model):
            for _ in range(3):
                torch.testing.assert_close(self.model(self.x), expected, rtol=1e-7, atol=1e-8)

    @precondition(lambda self: not self.merged)
    @rule(data=st.data())
    def mixed(self, data: Any) -> None:
        names = data.draw(st.lists(st.sampled_from([*self.methods, "__base__"]), min_size=3, max_size=3))
        with torch.no_grad():
            found, twin = self.model(self.x, adapter_names=names), copy.deepcopy(self.model)
        for row, name, x in zip(found, names, self.x, strict=True):
            expected = by_definition(twin, [] if name == "__base__" else [name], x[None])[0]
            torch.testing.assert_close(row, expected, rtol=1e-7, atol=1e-8)

    @rule(data=st.data())
    def delta(self, data: Any) -> None:
        name = data.draw(st.sampled_from(sorted(self.methods)))
        for layer, twin in zip(layers_of(self.model), layers_of(copy.deepcopy(self.model)), strict=True):
            expected = weight_of(twin, [name]) - layer.unmerged_matrix()
            torch.testing.assert_close(layer.get_delta_weight(name), expected, rtol=1e-6, atol=1e-7)

    # -- what must be true then

    @invariant()
    def computes_what_its_parameters_say(self) -> None:
        if not hasattr(self, "model"):
            return
        with torch.no_grad():
            expected = by_definition(copy.deepcopy(self.model), self.merged or self.active, self.x)
        torch.testing.assert_close(self.model(self.x), expected, rtol=1e-7, atol=1e-8)

    @invariant()
    def trains_what_is_active(self) -> None:
        if not hasattr(self, "model"):
            return
        expected = {
            name
            for name, _ in self.model.named_parameters()
            if any(f".{own}." in name for own in self.active) and "isotune_operator" in name
        }
        assert set(trainable(self.model)) == expected


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


Sequences.TestCase.settings = settings(
    max_examples=4 if QUICK else 25,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestSequences = Sequences.TestCase
