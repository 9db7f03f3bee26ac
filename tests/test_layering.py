"""Who may import whom (DESIGN.md), read off the sources."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Set
from pathlib import Path

import pytest

import isotune

SOURCE = Path(isotune.__file__).parent
TORCH = {"torch", "numpy", "safetensors", "tqdm"}
BELOW: dict[str, tuple[str, ...]] = {
    "errors": (),
    "versions": (),
    "json_files": (),
    "whole_files": (),
    "package_models": (),
    "progress": (),
    "model_card": (),
    "algebra": (),
    "subspace": ("algebra",),
    "internals": (),
    "parallel": (),
    "adapter": ("algebra", "subspace", "parallel"),
    "hosts": ("parallel",),
    "methods": ("algebra", "subspace", "adapter", "model_card"),
    "tuner": ("algebra", "subspace", "parallel", "adapter", "hosts", "methods", "model_card"),
    "files": ("algebra", "subspace", "parallel", "adapter", "hosts", "methods", "tuner", "model_card"),
    "tools": ("algebra", "subspace", "parallel", "adapter", "hosts", "methods", "tuner", "files"),
    "moving": ("algebra", "subspace", "parallel", "adapter", "hosts", "methods", "tuner"),
    "diagnostics": ("algebra", "subspace", "parallel", "adapter", "hosts", "methods", "tuner", "files"),
    "__init__": ("versions", "methods", "tuner", "tools"),
    "experiments": (
        *("algebra", "subspace", "adapter", "hosts", "methods", "tuner", "files", "tools", "diagnostics", "model_card"),
        "moving",
    ),
    "report": ("methods", "diagnostics", "files", "experiments"),
    "cli": ("files", "tools", "diagnostics", "methods", "experiments", "report"),
    "__main__": ("cli",),
    "integrations": ("methods", "model_card"),
}
"""Package -> those of isotune that it may import, besides itself and those in `BASIC`."""
BASIC = {"errors", "json_files", "package_models", "progress", "versions", "whole_files"}
SHARED_BY_METHODS = ("methods.config", "methods.checks", "methods.rotation", "methods.basis", "methods.subspace")
MAY_IMPORT_PEFT = (
    "methods.config",
    "tuner",
    "files",
    "tools",
    "__init__",
    "integrations",
    "internals.model_cards",
    "internals.peft_hooks",
    "internals.peft_quantisation",
)
KERNELS = tuple(
    f"algebra.{name}"
    for name in ("launching", "block_kernels", "elimination_kernels", "decoding_kernels", "gain_kernels")
)
OUTER = ("experiments", "report", "cli", "__main__", "integrations")
STANDARD = set(sys.stdlib_module_names)


def module_name(path: Path) -> str:
    """layer, algebra.skew, methods (for the package itself), __init__ (for isotune) or cli (for isotune_cli)."""
    first, *parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    parts = ["cli", *parts] if first == "isotune_cli" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


FILES = {module_name(path): path for path in sorted(SOURCE.parent.glob("isotune*/**/*.py"))}
INNER = [name for name in FILES if name.split(".")[0] not in OUTER]


def imported(node: ast.AST) -> list[str]:
    """With the command line, which is a package of its own for its --help to be quick, as a part of isotune."""
    return [re.sub(r"^isotune_cli\b", "isotune.cli", name) for name in named(node)]


def named(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        assert node.module is not None
        if node.module == "isotune":
            return [f"isotune.{alias.name}" for alias in node.names]
        # `from package import module` imports the module, too.
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        return [node.module, *(name for name in names if name.removeprefix("isotune.") in FILES)]
    return []


def statements(body: list[ast.stmt], *, lazy: bool) -> Iterator[ast.AST]:
    """Every node outside of functions, with `lazy` those inside functions too; those under TYPE_CHECKING included."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not lazy:
            continue
        yield node
        for field in ("body", "orelse", "finalbody"):
            yield from statements(getattr(node, field, []), lazy=lazy)
        for handler in getattr(node, "handlers", []):
            yield from statements(handler.body, lazy=lazy)


@functools.cache
def imports_of(name: str, *, lazy: bool = True) -> frozenset[str]:
    tree = ast.parse(FILES[name].read_text())
    return frozenset(target for node in statements(tree.body, lazy=lazy) for target in imported(node))


def own(targets: Set[str]) -> set[str]:
    return {t.removeprefix("isotune.") for t in targets if t.startswith("isotune.")}


def foreign(targets: Set[str]) -> set[str]:
    return {t.split(".")[0] for t in targets if t != "isotune" and not t.startswith("isotune.")} - STANDARD


def under(targets: Set[str], *packages: str) -> set[str]:
    return {t for t in targets if any(t == p or t.startswith(p + ".") for p in packages)}


def package(name: str) -> str:
    return name.split(".")[0]


def test_the_sources_are_found() -> None:
    assert {"tuner.layer", "tuner.model", "algebra.cayley", "methods.psoft", "hosts.linear"} <= set(FILES)
    assert "peft" in foreign(imports_of("tuner.model"))
    assert "algebra.cayley" in own(imports_of("methods.psoft"))
    assert {package(name) for name in FILES} == set(BELOW)


def offences(found: Iterable[tuple[str, object]]) -> dict[str, object]:
    """What each file does against a rule; empty if none does."""
    return {name: offence for name, offence in found if offence}


def test_imports_run_downward() -> None:
    def allowed(name: str) -> set[str]:
        found = {package(name), *BASIC, *BELOW[package(name)]}
        # Which transform of torch follows is no mathematics, and one file of it asks.
        if package(name) not in ("algebra", "report", "__main__") or name == "algebra.recording":
            found.add("internals")
        return found | {"__version__"} if package(name) in OUTER else found

    assert not offences((name, {package(t) for t in own(imports_of(name))} - allowed(name)) for name in FILES)


def test_algebra_is_torch_only() -> None:
    algebra = [name for name in FILES if package(name) == "algebra"]
    kernels = {"torch", "triton"}
    assert not offences((n, foreign(imports_of(n)) - (kernels if n in KERNELS else {"torch"})) for n in algebra)


def test_triton_is_imported_when_it_is_used() -> None:
    kernels = {f"isotune.{kernel}" for kernel in KERNELS}
    assert not offences((name, kernels & imports_of(name, lazy=False)) for name in FILES if name not in KERNELS)


def test_core_packages_know_only_torch_and_numpy() -> None:
    core = [name for name in FILES if package(name) in ("subspace", "adapter", "parallel", "hosts")]
    assert not offences((name, foreign(imports_of(name, lazy=False)) - TORCH) for name in core)


def test_a_method_is_one_short_file_that_knows_no_other() -> None:
    methods = [name for name in FILES if name.startswith("methods.") and name not in SHARED_BY_METHODS]
    others = {name: {t for t in own(imports_of(name)) if package(t) == "methods"} for name in methods}
    assert not offences((name, others[name] - set(SHARED_BY_METHODS)) for name in methods)
    assert not offences((name, foreign(imports_of(name)) - {"torch"}) for name in methods)
    assert not longer_than(150, methods)


def test_no_file_is_long() -> None:
    assert not longer_than(400, FILES)


def longer_than(most: int, names: Iterable[str]) -> dict[str, int]:
    lengths = {name: len(FILES[name].read_text().splitlines()) for name in names}
    return {name: length for name, length in lengths.items() if length > most}


def test_peft_is_known_in_few_places() -> None:
    elsewhere = [n for n in INNER if n not in MAY_IMPORT_PEFT and package(n) not in MAY_IMPORT_PEFT]
    assert not offences((name, foreign(imports_of(name)) & {"peft"}) for name in elsewhere)


def test_transformers_is_never_imported_at_module_level() -> None:
    heavy = {"transformers", "trl", "accelerate", "datasets", "diffusers", "matplotlib", "pydantic", "typer", "scipy"}
    assert not offences((name, foreign(imports_of(name, lazy=False)) & heavy) for name in INNER)


def test_no_cycles_between_modules() -> None:
    graph = {name: {t for t in own(imports_of(name, lazy=False)) if t in FILES} for name in FILES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for target in graph[name]:
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.slow
def test_importing_isotune_loads_nothing_of_the_outside() -> None:
    script = "import sys, isotune; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "isotune.tuner.layer" in loaded
    assert not under(loaded, "isotune.experiments", "isotune.report", "isotune_cli", "matplotlib", "pydantic", "typer")
    assert not loaded & {f"isotune.{name}" for name in KERNELS}
