"""Frozen layers that can be adapted, each seen as a matrix W of shape (out, in)."""

from __future__ import annotations

from torch import nn

from isotune.hosts.conv import ConvHost
from isotune.hosts.embedding import EmbeddingHost
from isotune.hosts.experts import ExpertsHost
from isotune.hosts.factored import FactoredHost, FactoredLinear
from isotune.hosts.host import Host, Kept, is_packed, widen
from isotune.hosts.linear import LinearHost
from isotune.hosts.quantised import Backend, QuantisedHost
from isotune.parallel.tensor_parallel import refuse_other_splits

__all__ = [
    "Backend",
    "ConvHost",
    "EmbeddingHost",
    "ExpertsHost",
    "FactoredHost",
    "FactoredLinear",
    "Host",
    "Kept",
    "LinearHost",
    "QuantisedHost",
    "host_for",
    "is_packed",
    "widen",
]

_HOSTS: tuple[type[Host], ...] = (LinearHost, ConvHost, EmbeddingHost, FactoredHost)


def host_for(module: nn.Module, name: str = "", backend: Backend | None = None, parameter: str | None = None) -> Host:
    """Find the host class of a module.

    Args:
        module: the frozen layer.
        name: its name in the model, for the message.
        backend: for a quantised layer, how its weight is read and written.
        parameter: for a module of experts, the name of the adapted parameter.

    Returns:
        The host around the module.

    Raises:
        ValueError: no host supports this layer, its weight is not a floating-point matrix, or tensor parallelism has
            split it in a way that adapters do not support.
    """
    refuse_other_splits(module, name, packed=parameter is not None or backend is not None)
    if parameter is not None:
        return ExpertsHost(module, name, parameter)
    if backend is not None:
        return QuantisedHost(module, name, backend)
    for host in _HOSTS:
        if host.accepts(module):
            return host(module, name)
    supported = ", ".join([*sorted(kind for host in _HOSTS for kind in host.kinds), *QuantisedHost.kinds])
    raise ValueError(
        f"The target module {name!r} is a {type(module).__module__}.{type(module).__qualname__}, which cannot be "
        f"adapted. Supported: {supported}. Choose target_modules that match only these, or exclude the module with "
        "exclude_modules."
    )
