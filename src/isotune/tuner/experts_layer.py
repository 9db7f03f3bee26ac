"""The layer on the experts of a mixture: each expert its own operator, and its own subspace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from isotune.adapter.operator import DenseOperator, Operator, Rotation
from isotune.adapter.subspace import Form, SubspaceUpdate
from isotune.algebra.factors import apply_chain, transpose_chain
from isotune.hosts import ExpertsHost
from isotune.methods.config import IsotuneConfig, SubspaceConfig
from isotune.tuner.layer import Layer, MixedBatch


class ExpertForms(Form):
    """The forms of one adapter on all experts of a parameter: fold takes and gives (experts, out, in).

    Args:
        forms: one an expert for an update of the subspace, which is each expert's own; else one for all.
    """

    def __init__(self, forms: Sequence[Form]) -> None:
        super().__init__()
        self.forms = nn.ModuleList(forms)

    def __iter__(self) -> Iterator[Form]:
        return iter(self.forms)  # type: ignore[arg-type]

    @property
    def additive(self) -> bool:  # type: ignore[override]
        """As each of them."""
        return next(iter(self)).additive

    @property
    def settled(self) -> bool:  # type: ignore[override]
        """Whether each of them is."""
        return all(form.settled for form in self)

    @property
    def symbolic(self) -> bool:  # type: ignore[override]
        """Whether one of them is."""
        return any(form.symbolic for form in self)

    def fold(self, matrix: Tensor, operator: Operator, rows: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """The matrices with the adapter in them.

        Args:
            matrix: (experts, out, in), of some experts.
            operator: with all experts' parameters.
            rows: not used.
            at: (experts,), which experts these are; None for all.
        """
        tensors = operator.own_tensors(matrix.dtype, at)
        if isinstance(operator, DenseOperator):
            forms = list(self) if at is None else [self.forms[index] for index in at.tolist()]
            reader = torch.stack([form.reader for form in forms]).to(matrix.dtype)  # type: ignore[misc]
            writer = torch.stack([form.writer for form in forms]).to(matrix.dtype)  # type: ignore[misc]
            return torch.baddbmm(matrix, writer @ tensors[0].mT, reader)
        assert isinstance(operator, Rotation)
        folded = []
        for index, own in enumerate(matrix):
            chain, transposed = transpose_chain(operator.chain, [tensor[index] for tensor in tensors])
            folded.append(apply_chain(own, chain, transposed))
        return torch.stack(folded)

    def low_rank(self, matrix: Tensor, operator: Operator) -> tuple[Tensor, Tensor]:
        """None has been written for experts."""
        raise ValueError(
            "An adapter on experts is not exported to LoRA; export the merged model instead (--to merged)."
        )

    def has_low_rank(self, operator: Operator) -> bool:
        """Not that `low_rank` would give."""
        return False

    def describe(self, operator: Operator) -> str:
        """As each of them."""
        return f"{next(iter(self)).describe(operator)}, each expert"


class _Expert:
    """One expert as what `AdapterGroup` places a subspace on; what is not its own is the layer's."""

    quantised = False

    def __init__(self, layer: ExpertsLayer, index: int) -> None:
        self.layer, self.index = layer, index
        self.host = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    @property
    def weight(self) -> Tensor:
        return self.layer.host.weight

    def matrix(self) -> Tensor:
        return self.layer.host.matrix()[self.index]

    def unmerged_matrix(self) -> Tensor:
        return self.layer.unmerged_matrix()[self.index]

    def raw_form(self, adapter_name: str) -> Form:
        forms = self.layer.raw_form(adapter_name)
        assert isinstance(forms, ExpertForms)
        return forms.forms[self.index]  # type: ignore[return-value]


class ExpertsLayer(Layer):
    """Adapters on one parameter of a module of experts; layers on several of its parameters are nested.

    Args:
        base_layer: the module, or such a layer on another of its parameters.
        key: the parameter's name in the model.

    Raises:
        ValueError: the parameter cannot be a host.
    """

    host: ExpertsHost

    def __init__(self, base_layer: nn.Module, key: str) -> None:
        super().__init__(base_layer, key, parameter=key.rpartition(".")[2])

    def _new_operator(self, config: IsotuneConfig) -> Operator:
        """An operator whose parameters have the experts in front, each with a start of its own.

        Raises:
            ValueError: the configuration does not fit, or has what has not been written for experts.
        """
        operators = [super(ExpertsLayer, self)._new_operator(config) for _ in range(self.host.experts)]
        first = operators[0]
        if isinstance(first, Rotation) and first.gain is not None:
            raise ValueError(f"The gains of this method cannot be trained on experts, such as {self.key!r}; use OFT.")
        if first.train().sample_noise(1) is not None:
            raise ValueError(f"Dropout of an operator cannot be used on experts, such as {self.key!r}; set it to 0.")
        for name in first.parameter_names():
            stacked = torch.stack([operator.get_parameter(name).detach() for operator in operators])
            setattr(first, name, nn.Parameter(stacked))
        return first

    def _new_form(self, config: IsotuneConfig, device: torch.device) -> Form:
        count = self.host.experts if isinstance(config, SubspaceConfig) else 1
        return ExpertForms([super(ExpertsLayer, self)._new_form(config, device) for _ in range(count)])

    def parts(self, adapter_name: str) -> list[Any]:
        """The experts, for an adapter on their subspaces."""
        forms = self.raw_form(adapter_name)
        assert isinstance(forms, ExpertForms)
        return [_Expert(self, i) for i, form in enumerate(forms) if isinstance(form, SubspaceUpdate)]

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Refuse any scale but 1.

        Raises:
            ValueError: another scale.
        """
        if adapter_name in self.isotune_form and scale != 1.0:
            raise ValueError(f"The adapter {adapter_name!r} on the experts {self.key!r} cannot be scaled by {scale}.")

    def _scale_in_use(self, adapter_name: str) -> float:
        return 1.0

    def _mixed(self, x: Tensor, batch: MixedBatch, *args: Any, **kwargs: Any) -> Tensor:
        """A batch of one adapter; tokens of several are mixed by the router.

        Raises:
            ValueError: the batch has several.
        """
        names = {name if name in self.isotune_operator else "__base__" for name in batch.names}
        if len(names) > 1:
            raise ValueError(
                f"adapter_names cannot mix {', '.join(sorted(names))} in one batch, as {self.key!r} adapts experts; "
                "call the model once for each adapter."
            )
        return self._adapted(x, [name for name in names if name != "__base__"], *args, **kwargs)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module of experts itself, with all layers on its parameters taken off, for PEFT."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        inner = self.base_layer
        if isinstance(inner, ExpertsLayer):
            return inner.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        return inner


def layers_on(module: nn.Module) -> dict[str, ExpertsLayer]:
    """Parameter name -> layer, of a module of experts and the layers that are nested around it."""
    found: dict[str, ExpertsLayer] = {}
    while isinstance(module, ExpertsLayer):
        found[module.host.parameter] = module
        module = module.base_layer
    return found


def inject(model: nn.Module, config: IsotuneConfig, adapter_name: str) -> list[str]:
    """Put an adapter on the parameters that `target_parameters` names, as PEFT matches them.

    Args:
        model: the model.
        config: of the adapter.
        adapter_name: its name.

    Returns:
        The names of the parameters.

    Raises:
        ValueError: one cannot be a host, its module is adapted already as a whole, or another adapter has others of
            the module's parameters.
    """
    targets, done = config.target_parameters or [], list[str]()
    for name, module in list(model.named_modules()):
        if name and "base_layer" not in name.split("."):
            plain = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            done += _inject_into(model, name, plain, targets, config, adapter_name)
    return done


def _packed(module: nn.Module) -> dict[str, type]:
    """Name -> what a library has put in the place of a parameter: a parametrisation or an object of its own."""
    computed = getattr(module, "parametrizations", {})
    return {
        **{own: type(value) for own, value in vars(module).items() if value is not None},
        **{own: type(next(iter(steps))) for own, steps in computed.items()},
    }


def _inject_into(
    model: nn.Module, name: str, module: nn.Module, targets: Sequence[str], config: IsotuneConfig, adapter_name: str
) -> list[str]:
    def is_target(own: str) -> bool:
        return any(f"{name}.{own}" == t or f"{name}.{own}".endswith(f".{t}") for t in targets)

    for own, packer in _packed(module).items():
        if is_target(own):
            raise ValueError(
                f"target_parameters choose {name}.{own}, which is no parameter any more: a {packer.__module__}."
                f"{packer.__qualname__} stands in its place. Packed experts cannot be adapted: load them unquantised, "
                "as bitsandbytes leaves fused experts when transformers loads the model, or take them out of "
                "target_parameters."
            )
    chosen = [own for own, _ in module.named_parameters(recurse=False) if is_target(own)]
    if not chosen:
        return []
    top = model.get_submodule(name)
    if isinstance(top, BaseTunerLayer) and not isinstance(top, ExpertsLayer):
        raise ValueError(
            f"target_parameters choose {', '.join(chosen)} of {name!r}, which is adapted as a layer already; take it "
            "out of target_modules or out of target_parameters."
        )
    present = layers_on(top)
    if present and set(present) != set(chosen):
        raise ValueError(
            f"target_parameters choose {', '.join(chosen)} of {name!r}, where another adapter has "
            f"{', '.join(sorted(present))}; all adapters of a model must choose the same parameters of a module."
        )
    for own in chosen:
        layer = present.get(own)
        if layer is None:
            top = layer = ExpertsLayer(top, f"{name}.{own}")
        layer.update_layer(adapter_name, config)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, top)
    return [f"{name}.{own}" for own in chosen]
