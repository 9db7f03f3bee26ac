"""Who may import whom (DESIGN.md), read off the sources."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import isotune

SOURCE = Path(isotune.__file__).parent
OUTER = ("experiments", "report", "cli", "__main__")
CORE = {
    "operators",
    "pinning",
    "subspace",
    "subspace_cache",
    "errors",
    "geometry",
    "lowrank",
    "distributed",
    "tensor_parallel",
}
MAY_IMPORT_PEFT = {
    "adapters",
    "layer",
    "links",
    "plugin",
    "adapter_file",
    "peft_import",
    "experts",
    "export",
    "serving",
    "hotswap",
    "config",
    "__init__",
}
STANDARD = set(sys.stdlib_module_names)


def module_name(path: Path) -> str:
    """layer, algebra.skew, methods (for the package itself) or __init__ (for isotune)."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


FILES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}
INNER = [name for name in FILES if name.split(".")[0] not in OUTER]


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        assert node.module is not None
        if node.module == "isotune":
            return [f"isotune.{alias.name}" for alias in node.names]
        return [node.module]
    return []


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(body: list[ast.stmt], *, lazy: bool) -> Iterator[ast.AST]:
    """Every node that runs at import, and with `lazy` those inside functions too; nothing under TYPE_CHECKING."""
    for node in body:
        if is_type_checking(node) or (isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not lazy):
            continue
        yield node
        for field in ("body", "orelse", "finalbody"):
            yield from statements(getattr(node, field, []), lazy=lazy)
        for handler in getattr(node, "handlers", []):
            yield from statements(handler.body, lazy=lazy)


def imports_of(name: str, *, lazy: bool = True) -> set[str]:
    tree = ast.parse(FILES[name].read_text())
    return {target for node in statements(tree.body, lazy=lazy) for target in imported(node)}


def own(targets: set[str]) -> set[str]:
    return {t.removeprefix("isotune.") for t in targets if t.startswith("isotune.")}


def foreign(targets: set[str]) -> set[str]:
    return {t.split(".")[0] for t in targets if t != "isotune" and not t.startswith("isotune.")} - STANDARD


def under(targets: set[str], *packages: str) -> set[str]:
    return {t for t in targets if any(t == p or t.startswith(p + ".") for p in packages)}


def test_the_sources_are_found() -> None:
    assert {"layer", "plugin", "algebra.cayley", "methods.psoft", "hosts.linear", "operators"} <= set(FILES)
    assert "peft" in foreign(imports_of("layer"))
    assert "algebra.cayley" in own(imports_of("methods.psoft"))


@pytest.mark.parametrize("name", [n for n in FILES if n.startswith("algebra")])
def test_algebra_is_torch_only(name: str) -> None:
    assert foreign(imports_of(name)) <= {"torch"}
    assert own(imports_of(name)) == under(own(imports_of(name)), "algebra")


@pytest.mark.parametrize("name", sorted(CORE & set(FILES)))
def test_core_modules_know_only_torch_numpy_and_algebra(name: str) -> None:
    targets = imports_of(name)
    assert foreign(targets) <= {"torch", "numpy", "safetensors", "tqdm"}
    assert own(targets) == {t for t in own(targets) if t.split(".")[0] in CORE | {"algebra"}}


def test_forms_know_algebra_and_the_core() -> None:
    targets = imports_of("forms")
    assert foreign(targets) <= {"torch", "numpy"}
    assert own(targets) == {t for t in own(targets) if t.split(".")[0] in CORE | {"algebra"}}


@pytest.mark.parametrize("name", [n for n in FILES if n.startswith("hosts")])
def test_hosts_know_torch_and_quantisers_only_lazily(name: str) -> None:
    assert foreign(imports_of(name, lazy=False)) <= {"torch", "numpy"}
    assert own(imports_of(name)) == under(own(imports_of(name)), "hosts", "errors", "distributed", "tensor_parallel")


@pytest.mark.parametrize("name", [n for n in FILES if n.startswith("methods.")])
def test_a_method_knows_no_host_and_no_other_method(name: str) -> None:
    targets = own(imports_of(name))
    assert targets == under(targets, "algebra", "forms", "operators", "config", "errors")
    assert foreign(imports_of(name)) <= {"torch"}
    assert len(FILES[name].read_text().splitlines()) <= 150


@pytest.mark.parametrize("name", INNER)
def test_peft_is_known_in_few_places(name: str) -> None:
    assert "peft" not in foreign(imports_of(name)) or name in MAY_IMPORT_PEFT


@pytest.mark.parametrize("name", INNER)
def test_transformers_is_never_imported_at_module_level(name: str) -> None:
    heavy = {"transformers", "trl", "accelerate", "datasets", "diffusers", "matplotlib", "pydantic", "typer", "scipy"}
    assert not foreign(imports_of(name, lazy=False)) & heavy


@pytest.mark.parametrize("name", INNER)
def test_nothing_inside_knows_the_outside(name: str) -> None:
    assert not under(own(imports_of(name)), *OUTER)


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
    assert "isotune.layer" in loaded
    assert not under(loaded, "isotune.experiments", "isotune.report", "isotune.cli", "matplotlib", "pydantic", "typer")
