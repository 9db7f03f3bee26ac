"""The one tuner layer: adapters on a frozen host, their merge state, and the placing of their subspaces."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from isotune.config import IsotuneConfig
from isotune.errors import BaseMismatchError, IsotuneWarning
from isotune.forms import SubspaceUpdate, mark
from isotune.hosts import host_for
from isotune.operators import Operator, OperatorBatch, batch_operators, is_symbolic
from isotune.pinning import CANDIDATE_TOLERANCE, MAX_RESIDUAL, candidate_rank, pin_width, recover
from isotune.subspace import SubspaceRequest, principal_subspaces
from isotune.subspace_cache import SubspaceCache

_M = TypeVar("_M", bound=nn.Module)


class Linear(nn.Module, BaseTunerLayer):
    """Adapters of any isotune method on one frozen layer that multiplies by a matrix.

    The name is what PEFT recognises as an adapted linear layer when it expands "all-linear".

    Args:
        base_layer: the host module, possibly already wrapped by another tuner layer.
        key: its name in the model.

    Raises:
        ValueError: the layer cannot be a host, or the rank does not fit its weight.
    """

    adapter_layer_names = ("isotune_operator",)
    other_param_names = ("isotune_form", "isotune_dropout")

    def __init__(self, base_layer: nn.Module, key: str = "") -> None:
        super().__init__()
        self.base_layer = base_layer
        self.key = key
        self.host = host_for(self.get_base_layer(), key)
        self.in_features = self.host.in_features
        self.out_features = self.host.out_features
        self.isotune_operator = nn.ModuleDict()
        self.isotune_form = nn.ModuleDict()
        self.isotune_dropout = nn.ModuleDict()
        self.configs: dict[str, IsotuneConfig] = {}
        self.links: Links | None = None
        self.merged_adapters: list[str] = []
        # In a list, since a parameter assigned to a module would be registered as one of its own.
        self._original_weight: list[nn.Parameter] = []
        self._batch_adapters: tuple[str, ...] | None = None
        self._host_mark: tuple[int, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy of one layer must not bring the whole model along; the copy of a model links its layers anew.
        return {**self.__dict__, "links": None}

    def train(self, mode: bool = True) -> Linear:
        """Set the mode; a base is checked here too, since transformers' own loader ends in model.eval()."""
        if self.links is not None and not all(self.raw_form(name).settled for name in self.configs):
            self.links.settle()
        super().train(mode)
        return self

    # -- adapters ------------------------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, config: IsotuneConfig) -> None:
        """Add an adapter, the identity until trained; its subspace is placed later, for all layers together.

        Raises:
            ValueError: the rank is above the smaller side of the weight.
        """
        rank = config.rank_of(self.key)
        limit = min(self.in_features, self.out_features)
        if rank > limit:
            raise ValueError(
                f"r={rank} is too large for the module {self.key!r}, whose weight is {self.out_features} × "
                f"{self.in_features}; the rank may be at most {limit}. Choose a smaller r, give this module its own "
                f"with rank_pattern={{{self.key!r}: {limit}}}, or exclude it with exclude_modules."
            )
        weight = self.host.weight
        device = torch.device("cpu") if weight.is_meta else weight.device
        wide = torch.promote_types(weight.dtype, torch.float32)
        operator = _placed(config.build_operator(rank), device, wide)
        if not config.init_weights:
            operator.randomize_parameters()
        pinned = config.basis == "pinned"
        form = SubspaceUpdate(
            rank,
            self.in_features,
            symmetric=getattr(config, "ab_svd_init", "psoft_init") == "pissa_init",
            pin_width=pin_width(rank, self.in_features) if pinned else None,
            device=device,
        )
        dropout = getattr(config, "psoft_dropout", 0.0)
        self.configs[adapter_name] = config
        self.isotune_operator[adapter_name] = operator
        self.isotune_form[adapter_name] = form
        self.isotune_dropout[adapter_name] = nn.Dropout(dropout) if dropout else nn.Identity()
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from this layer and from the computations it shares."""
        super().delete_adapter(adapter_name)
        self.configs.pop(adapter_name, None)
        if self.links is not None:
            self.links.unlink()

    def operator(self, adapter_name: str) -> Operator:
        """The operator of an adapter."""
        operator = self._modules["isotune_operator"]._modules[adapter_name]  # type: ignore[union-attr]
        assert isinstance(operator, Operator)
        return operator

    def raw_form(self, adapter_name: str) -> SubspaceUpdate:
        """The form of an adapter, placed or not."""
        form = self._modules["isotune_form"]._modules[adapter_name]  # type: ignore[union-attr]
        assert isinstance(form, SubspaceUpdate)
        return form

    def form(self, adapter_name: str) -> SubspaceUpdate:
        """The form of an adapter, placed on the host; placing it now if something has changed."""
        form = self.raw_form(adapter_name)
        if torch.compiler.is_compiling():
            return form
        if not form.settled or (form.symbolic and not is_symbolic(self.host.weight)):
            AdapterGroup(adapter_name, [self] if self.links is None else self.links.layers).place()
        return form

    def unmerged_matrix(self) -> Tensor:
        """W (out, in) of the base, also while adapters are merged into the host."""
        if self._original_weight:
            with self._restored():
                return self.host.matrix()
        return self.host.matrix()

    @property
    def _base_weight(self) -> nn.Parameter:
        """The base's own weight parameter, also while adapters are merged into the host."""
        return self._original_weight[0] if self._original_weight else self.host.weight

    def note_host(self) -> None:
        """Remember the weight that subspaces were placed on."""
        self._host_mark = mark(self._base_weight)

    def host_has_changed(self) -> bool:
        """Whether the host's weight was replaced or written to since subspaces were placed on it."""
        return self._host_mark is not None and self._host_mark != mark(self._base_weight)

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Multiply the configured scale of an adapter's update by `scale`, as PEFT's set_scale does."""
        if adapter_name in self.isotune_form:
            form = self.form(adapter_name)
            form.rescale(self.configs[adapter_name].scale_of(self.key) * scale)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT would also cast to the base's dtype, and the pin and the operator are kept in float32.
        target = device or self.host.weight.device
        if target.type == "meta":
            return
        for modules in (self.isotune_operator, self.isotune_form):
            if adapter_name in modules and not any(p.is_meta for p in modules[adapter_name].parameters()):
                _placed(modules[adapter_name], target)

    # -- forward -------------------------------------------------------------------------------------------------
    # Looking a submodule up as an attribute costs as much as launching an operation, so what every call needs is
    # taken from `_modules` and `_parameters`.

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The host's output with the active adapters' updates."""
        if self._disable_adapters:
            if self.merged:
                self.unmerge()
            return self._host_output(x, *args, **kwargs)
        if self._batch_adapters is not None:
            return self._mixed(x, self._batch_adapters, *args, **kwargs)
        if self.merged_adapters:
            return self._host_output(x, *args, **kwargs)
        operators = self._modules["isotune_operator"]._modules  # type: ignore[union-attr]
        names = self._active_adapter
        active = [name for name in ([names] if isinstance(names, str) else names) if name in operators]
        if len(active) == 1 and not args and not kwargs and self._is_plain(x) and not self._drops(active[0]):
            return self._fused(x, active[0])
        result = self._host_output(x, *args, **kwargs)
        for name in active:
            result = self._add_update(result, x, name)
        return result

    def _host_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.base_layer(x, *args, **kwargs)
        return result

    def _is_plain(self, x: Tensor) -> bool:
        """Whether the host is exactly x Wᵀ + b with frozen W and b, so that it may be computed with its update."""
        host = self._modules["base_layer"]
        if type(host) is not nn.Linear or host._forward_hooks or host._forward_pre_hooks or host._backward_hooks:
            return False
        if host._backward_pre_hooks or "forward" in host.__dict__:  # the latter: patched, e.g. by a dispatcher
            return False
        weight, bias = host._parameters.get("weight"), host._parameters.get("bias")
        return (
            weight is not None
            and not weight.requires_grad
            and (bias is None or not bias.requires_grad)
            and x.dtype == weight.dtype
            and not torch.is_autocast_enabled(x.device.type)
        )

    def _drops(self, name: str) -> bool:
        return self.training and type(self._modules["isotune_dropout"]._modules[name]) is not nn.Identity  # type: ignore[union-attr]

    def _fused(self, x: Tensor, name: str) -> Tensor:
        parameters = self._modules["base_layer"]._parameters  # type: ignore[union-attr]
        weight, bias = parameters["weight"], parameters["bias"]
        assert weight is not None
        return self._form_in_use(name).linear(x, self.operator(name).difference(x.dtype), weight, bias)

    def _add_update(self, result: Tensor, x: Tensor, name: str) -> Tensor:
        difference = self.operator(name).difference(result.dtype)
        return self._form_in_use(name).update(self.isotune_dropout[name](x), difference, result)

    def _form_in_use(self, name: str) -> SubspaceUpdate:
        form = self.form(name)
        if form.candidates is not None:
            form.candidates = None  # a file's pin would have been loaded before the first forward
        return form

    def _mixed(self, x: Tensor, names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        """Each sample of the batch with the adapter named for it, "__base__" for none."""
        result = self._host_output(x, *args, **kwargs)
        if len(names) != x.shape[0]:
            raise ValueError(f"adapter_names has {len(names)} entries for a batch of {x.shape[0]} samples.")
        parts = result.clone()
        for name in dict.fromkeys(names):
            if name == "__base__" or name not in self.isotune_operator:
                continue
            rows = torch.tensor([i for i, other in enumerate(names) if other == name], device=x.device)
            parts = parts.index_copy(0, rows, self._add_update(result[rows], x[rows], name))
        return parts

    # -- merging -------------------------------------------------------------------------------------------------

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The change of the host's weight by an adapter, in the layout of the weight and float32 at least."""
        with torch.no_grad():
            delta = self.form(adapter_name).delta(self.operator(adapter_name).difference())
        return self.host.stored(delta)

    def low_rank(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Exact factors (out, r) and (r, in) of the change of W by an adapter, float32 at least."""
        with torch.no_grad():
            return self.form(adapter_name).low_rank(self.operator(adapter_name).difference())

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put W' = W + Σ ΔW in the place of the host's weight, added in float32 and rounded once.

        The original parameter is kept, and `unmerge` puts it back bit for bit; modules that share it (tied
        embeddings) keep it too.

        Raises:
            ValueError: with `safe_merge`, the result would hold NaN or infinity; nothing is changed.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.isotune_operator]
        if not names:
            return
        merged = self._merged_matrix(names, safe_merge)
        if not self._original_weight:
            self._original_weight.append(self.host.weight)
        self.host.set_matrix(merged)
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """Raise what `merge` with `safe_merge` would raise, and change nothing."""
        names = self.active_adapters if adapter_names is None else adapter_names
        names = [n for n in names if n in self.isotune_operator and n not in self.merged_adapters]
        if names:
            self._merged_matrix(names, safe_merge=True)

    def _merged_matrix(self, names: list[str], safe_merge: bool) -> Tensor:
        matrix = self.unmerged_matrix()
        total = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        for name in (*self.merged_adapters, *names):
            total = total + self.form(name).delta(self.operator(name).difference())
        merged = total.to(matrix.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(
                f"Merging {', '.join(names)} into {self.key!r} gives NaN or infinite weights, so nothing was merged. "
                "The adapter is broken (a diverged training?), or its values exceed the range of "
                f"{matrix.dtype}: load a good checkpoint, or the base in float32."
            )
        return merged

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the original weight back, the same bits."""
        if not self.merged:
            warnings.warn("Nothing is merged, so there is nothing to unmerge.", IsotuneWarning, stacklevel=2)
            return
        original, current = self._original_weight.pop(), self.host.weight
        if original.device != current.device or original.dtype != current.dtype:
            original.data = original.data.to(current)  # the model was moved or cast while merged
        self.host.restore(original)
        self.merged_adapters.clear()

    @contextmanager
    def _restored(self) -> Iterator[None]:
        merged = self.host.weight
        self.host.restore(self._original_weight[0])
        try:
            yield
        finally:
            self.host.restore(merged)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """The update is additive and of rank r."""
        return True

    def extra_repr(self) -> str:
        """The adapters with their ranks."""
        ranks = {name: form.rank for name, form in self.isotune_form.items()}
        return f"ranks={ranks}" if ranks else ""


def _placed(module: _M, device: torch.device, dtype: torch.dtype | None = None) -> _M:
    """`module.to`, only where something differs: under FakeTensorMode even a conversion to the same would fail."""
    tensors = [*module.parameters(), *module.buffers()]
    if any(t.is_meta for t in tensors):
        return module if dtype is None else module.to(dtype=dtype)  # to be replaced by what is loaded
    if any(t.device != device or (dtype is not None and t.dtype != dtype) for t in tensors):
        module.to(device=device, dtype=dtype)
    return module


class Links:
    """What the isotune layers of one model share: the batches of their operators, and when a forward pass runs.

    It hangs on every module that contains all adapted layers, with a hook before and after its forward; the outermost
    of them that is called is the forward pass. A copy of it is empty and finds the layers of the copied model itself.
    """

    def __init__(self) -> None:
        self.layers: list[Linear] = []
        self.batches: list[OperatorBatch] = []
        self.built = False
        self.model: nn.Module | None = None
        self.trainable: dict[nn.Parameter, bool] = {}
        self._running: list[int] = []

    def __reduce__(self) -> tuple[type[Links], tuple[()]]:
        return Links, ()

    @classmethod
    def attach(cls, model: nn.Module) -> Links:
        """Link the isotune layers of a model, and watch the forward passes of it and of what holds all of them."""
        links = model.__dict__.get("_isotune_links") or cls()
        links.build(model)
        names = [name for name, module in model.named_modules() if isinstance(module, Linear)]
        paths = [name.split(".")[:-1] for name in names]
        common = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))]
        for depth in range(len(common) + 1):
            module = model.get_submodule(".".join(common[:depth]))
            if "_isotune_links" not in module.__dict__:
                module.register_forward_pre_hook(_enter)
                module.register_forward_hook(_leave, always_call=True)
            module.__dict__["_isotune_links"] = links
        return links

    @staticmethod
    def detach(model: nn.Module) -> None:
        """Undo `attach`."""
        for module in model.modules():
            if module.__dict__.pop("_isotune_links", None) is not None:
                for hooks, own in ((module._forward_pre_hooks, _enter), (module._forward_hooks, _leave)):
                    for key in [key for key, hook in hooks.items() if hook is own]:
                        del hooks[key]
                        module._forward_hooks_always_called.pop(key, None)

    def build(self, model: nn.Module) -> None:
        """Find the layers, and batch their operators by adapter."""
        self.model = model
        self.layers = [module for module in model.modules() if isinstance(module, Linear)]
        for layer in self.layers:
            layer.links = self
        adapters = dict.fromkeys(name for layer in self.layers for name in layer.isotune_operator)
        self.batches = [
            batch
            for name in adapters
            for batch in batch_operators(
                layer.operator(name) for layer in self.layers if name in layer.isotune_operator
            )
        ]
        self.built = True

    def settle(self) -> None:
        """Place every adapter whose stored basis has changed, and take one out that does not fit this base.

        Raises:
            BaseMismatchError: as `AdapterGroup.place`; the adapter is gone then and the base as it was.
        """
        for name in dict.fromkeys(name for layer in self.layers for name in layer.configs):
            group = AdapterGroup(name, self.layers)
            try:
                group.refresh()
            except BaseMismatchError:
                if self.model is not None:
                    remove_adapter(self.model, name)
                raise

    def unlink(self) -> None:
        """Forget the batches; the next forward pass makes them anew."""
        self.batches.clear()
        self.built = False

    def enter(self, module: nn.Module) -> None:
        """A module that holds all layers is called."""
        if id(module) in self._running:
            self._running.clear()  # an interrupt (Ctrl-C in a notebook) left the last pass without an end
        if not self._running:
            if not self.built:
                self.build(module)
            for batch in self.batches:
                batch.begin()
        self._running.append(id(module))

    def leave(self, module: nn.Module) -> None:
        """It has returned or raised."""
        if id(module) in self._running:
            del self._running[self._running.index(id(module)) :]
        if not self._running:
            for batch in self.batches:
                batch.end()


def _enter(module: nn.Module, args: Any) -> None:
    module.__dict__["_isotune_links"].enter(module)


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    module.__dict__["_isotune_links"].leave(module)


class AdapterGroup:
    """One adapter on all its layers: what is found for them together, once.

    Args:
        adapter_name: the adapter.
        layers: the layers of the model; those without the adapter are left out.
    """

    def __init__(self, adapter_name: str, layers: Iterable[Linear]) -> None:
        self.adapter_name = adapter_name
        self.layers = [layer for layer in layers if adapter_name in layer.isotune_operator]

    @torch.no_grad()
    def place(self) -> None:
        """Solve the subspaces of all layers that need it, pin them or recover them from their pins, and place them.

        Raises:
            BaseMismatchError: a pinned basis was trained on another base; names the worst layer and the residual.
            ValueError: a weight has no principal subspace (NaN, …).
        """
        pending = [layer for layer in self.layers if self._form(layer).needs_placing()]
        real = []
        for layer in pending:
            if is_symbolic(layer.host.weight):
                self._form(layer).place_symbolic(layer.host.matrix(), self._scale(layer))
            else:
                real.append(layer)
        foreign = [layer for layer in real if self._form(layer).holds_foreign_basis()]
        self._solve([layer for layer in real if layer not in foreign])
        self._recover(foreign)

    def refresh(self) -> None:
        """Place again what a load of weights has changed: the stored bases, or the weights of the hosts."""
        for layer in self.layers:
            if layer.host_has_changed():
                untrained = not bool(layer.operator(self.adapter_name).own_difference().any())
                self._form(layer).forget(stored=untrained)
        self.place()

    def _form(self, layer: Linear) -> SubspaceUpdate:
        return layer.raw_form(self.adapter_name)

    def _scale(self, layer: Linear) -> float:
        return layer.configs[self.adapter_name].scale_of(layer.key)

    def _subspaces(self, layers: list[Linear]) -> list[Tensor]:
        """The leading right singular vectors of the layers' weights, (k, in) each, k ≥ r."""
        if not layers:
            return []
        config = layers[0].configs[self.adapter_name]
        requests = []
        for layer in layers:
            rank = self._form(layer).rank
            if config.basis == "pinned":
                # A few more than r: a cut between nearly equal singular values may fall differently elsewhere.
                rank = candidate_rank(rank, layer.in_features, layer.out_features)
            requests.append(SubspaceRequest(layer.unmerged_matrix(), rank, f"module {layer.key!r}"))
        cache = SubspaceCache() if config.subspace_cache else None
        solver = getattr(config, "psoft_svd", "auto")
        found = principal_subspaces(requests, solver=solver, tolerance=CANDIDATE_TOLERANCE, cache=cache)
        return [subspace.basis for subspace in found]

    def _solve(self, layers: list[Linear]) -> None:
        fresh = []
        for layer in layers:
            twin = self._sibling(layer)
            if twin is None:
                fresh.append(layer)
            else:
                self._form(layer).adopt_twin(twin, layer.unmerged_matrix(), self._scale(layer))
        solved: dict[tuple[int, int], SubspaceUpdate] = {}
        for layer, subspace in zip(fresh, self._subspaces(fresh), strict=True):
            form, matrix = self._form(layer), layer.unmerged_matrix()
            twin = solved.setdefault((id(subspace), matrix.data_ptr()), form)
            if twin is form:
                form.adopt(subspace, matrix, self._scale(layer), layer.configs[self.adapter_name].basis_seed)
            else:
                form.adopt_twin(twin, matrix, self._scale(layer))
        for layer in layers:
            layer.note_host()

    def _sibling(self, layer: Linear) -> SubspaceUpdate | None:
        """Another adapter's form on the same layer whose basis and tensors can be used as they are."""
        own, config = self._form(layer), layer.configs[self.adapter_name]
        for name, other in layer.configs.items():
            form = layer.raw_form(name)
            if (
                form is not own
                and form.solved_here
                and form.settled
                and (form.rank, form.symmetric, form.embedded) == (own.rank, own.symmetric, own.embedded)
                and other.basis_seed == config.basis_seed
            ):
                return form
        return None

    def _recover(self, layers: list[Linear]) -> None:
        """Bases that came from a file: embedded ones as they are, pinned ones found again on this base."""
        pinned = [layer for layer in layers if not self._form(layer).embedded]
        missing = [layer for layer in pinned if self._form(layer).candidates is None]
        solved = dict(zip(map(id, missing), self._subspaces(missing), strict=True))
        found: list[tuple[Linear, Tensor, float]] = [
            (layer, self._form(layer).stored, 0.0) for layer in layers if self._form(layer).embedded
        ]
        for layer in pinned:
            candidates = self._form(layer).candidates
            seed = layer.configs[self.adapter_name].basis_seed
            candidates = solved[id(layer)] if candidates is None else candidates
            found.append((layer, *recover(self._form(layer).stored, candidates, seed=seed)))
        self._refuse_other_base([(layer, residual) for layer, _, residual in found])
        for layer, basis, residual in found:
            self._form(layer).place(basis, layer.unmerged_matrix(), self._scale(layer))
            self._form(layer).residual = residual
            layer.note_host()

    def _refuse_other_base(self, residuals: list[tuple[Linear, float]]) -> None:
        above = [(layer, residual) for layer, residual in residuals if not residual <= MAX_RESIDUAL]
        if not above:
            return
        worst, residual = max(above, key=lambda pair: pair[1])
        message = (
            f"The adapter {self.adapter_name!r} was not trained on this base model: in {len(above)} of "
            f"{len(self.layers)} layers the principal subspace differs, most in {worst.key!r} with a residual of "
            f"{residual:.3f} (the same base gives below 0.001, a base rounded to bfloat16 about 0.003, at most "
            f"{MAX_RESIDUAL} is allowed). Load the adapter on the base it was trained on, unquantised; or train and "
            "save it with basis='embedded', which fits any base of the same shapes; or, to load it all the same, set "
            "on_base_mismatch='warn' in PeftModel.from_pretrained or on the config."
        )
        if worst.configs[self.adapter_name].on_base_mismatch == "warn":
            warnings.warn(message, IsotuneWarning, stacklevel=2)
        else:
            raise BaseMismatchError(message)


def remove_adapter(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter that was refused out of a model, and with the last one every trace of isotune.

    Args:
        model: the model that the adapter was injected into, not a PeftModel around it.
        adapter_name: the adapter.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear) and adapter_name in module.isotune_operator:
            alone, original = len(module.isotune_operator) == 1, module.base_layer
        elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            alone, original = len(module.modules_to_save) == 1, module.original_module
        else:
            continue
        if alone:
            setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], original)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT tells which adapter is active now
            if isinstance(module, Linear):
                module.delete_adapter(adapter_name)
            else:
                module.delete_adapter(adapter_name, None)
    configs = getattr(model, "peft_config", {})
    configs.pop(adapter_name, None)
    links = model.__dict__.get("_isotune_links")
    if any(isinstance(module, Linear) for module in model.modules()):
        if links is not None:
            links.unlink()
        return
    if links is not None:
        for parameter, flag in links.trainable.items():
            parameter.requires_grad_(flag)
    Links.detach(model)
    if not configs and hasattr(model, "peft_config"):
        del model.peft_config
        if getattr(model, "_hf_peft_config_loaded", False):
            model._hf_peft_config_loaded = False  # type: ignore[assignment]
