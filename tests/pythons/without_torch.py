"""What isotune asks of a Python and that needs nothing installed, run by tests/test_pythons.py under each one there is.

    python -B -W error tests/pythons/without_torch.py src tests ...

The first folder holds the package, the others whatever is to run on the same Pythons. Prints a line for each fault and
"N modules, N annotations" at the end; exits with 1 if there was any fault.
"""

from __future__ import annotations

import ast
import builtins
import copy
import doctest
import enum
import importlib
import importlib.util
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any


class Kind(str, enum.Enum):
    """An enumeration as PEFT's: strings whose values are their names."""

    LORA = "LORA"
    OFT = "OFT"


class Anything(type):
    """The class of a stand-in for what another library defines: every use in an annotation gives the stand-in."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __getitem__(cls, item: Any) -> type:
        return cls

    def __call__(cls, *args: Any, **kwargs: Any) -> type:
        return cls


class Foreign(metaclass=Anything):
    """The stand-in."""


def load(path: Path) -> ModuleType:
    """A module by its path alone, without the package around it."""
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[path.stem] = module
    specification.loader.exec_module(module)
    return module


def faults_of_the_enumeration(module: ModuleType) -> Iterator[str]:
    """Everything that PEFT and its users may do with a member, done with an added one."""
    assert doctest.testmod(module).failed == 0
    own = Kind.LORA
    member = module.add_member(Kind, "ISOTUNE_PSOFT")
    other = module.add_member(Kind, "ISOTUNE_OFT")
    promises = {
        "E[name]": lambda: Kind["ISOTUNE_PSOFT"] is member,
        "E(value)": lambda: Kind("ISOTUNE_PSOFT") is member,
        "E(member)": lambda: Kind(member) is member,
        "E.NAME": lambda: Kind.ISOTUNE_PSOFT is member,
        "getattr": lambda: getattr(Kind, "ISOTUNE_OFT") is other,  # noqa: B009
        "hasattr": lambda: hasattr(Kind, "ISOTUNE_OFT") and not hasattr(Kind, "ISOTUNE_HRA"),
        "no second one": lambda: module.add_member(Kind, "ISOTUNE_PSOFT") is member and len(Kind) == 4,
        "one of its own stays": lambda: module.add_member(Kind, "LORA") is own is Kind.LORA is Kind("LORA"),
        "list": lambda: list(Kind) == ["LORA", "OFT", "ISOTUNE_PSOFT", "ISOTUNE_OFT"],
        "reversed": lambda: list(reversed(Kind)) == [other, member, Kind.OFT, own],
        "the name in list": lambda: "ISOTUNE_PSOFT" in list(Kind) and "ISOTUNE_HRA" not in list(Kind),
        "member in E": lambda: member in Kind,
        "string in E": lambda: sys.version_info < (3, 12) or ("ISOTUNE_PSOFT" in Kind and "ISOTUNE_HRA" not in Kind),
        "__members__": lambda: Kind.__members__["ISOTUNE_PSOFT"] is member and "ISOTUNE_OFT" in Kind.__members__,
        "isinstance": lambda: isinstance(member, Kind) and isinstance(member, str) and type(member) is type(own),
        "name and value": lambda: (member.name, member.value) == ("ISOTUNE_PSOFT", "ISOTUNE_PSOFT"),
        "type of the value": lambda: type(member.value) is type(own.value) is str,
        "equality": lambda: member == "ISOTUNE_PSOFT" and member != other and member != own,
        "hash": lambda: hash(member) == hash("ISOTUNE_PSOFT") and {member: 1}["ISOTUNE_PSOFT"] == 1,
        "key": lambda: {"ISOTUNE_PSOFT": 1}[member] == 1 and {member: 1}[Kind.ISOTUNE_PSOFT] == 1,
        "repr": lambda: repr(member) == repr(own).replace("LORA", "ISOTUNE_PSOFT"),
        "str": lambda: str(member) == str(own).replace("LORA", "ISOTUNE_PSOFT"),
        "format": lambda: f"{member}" == f"{own}".replace("LORA", "ISOTUNE_PSOFT"),
        "copy": lambda: copy.copy(member) is copy.deepcopy(member) is copy.deepcopy([member])[0] is member,
        "dir": lambda: "ISOTUNE_PSOFT" in dir(Kind),
        "an iteration after another": lambda: [kind.name for kind in Kind] == [kind.value for kind in Kind],
    }
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        promises[f"pickle {protocol}"] = lambda p=protocol: pickle.loads(pickle.dumps(member, p)) is member  # type: ignore[misc]
    for promise, holds in promises.items():
        try:
            kept = holds()
        except Exception as error:
            yield f"enumeration: {promise}: {type(error).__name__}: {error}"
        else:
            if not kept:
                yield f"enumeration: {promise}"
    for name, kinds, expected in (
        ("psoft", Kind, ValueError),
        ("A B", Kind, ValueError),
        ("", Kind, ValueError),
        ("RED", enum.Enum("Number", {"ONE": 1}), TypeError),
    ):
        try:
            module.add_member(kinds, name)
        except expected:
            continue
        yield f"enumeration: {name!r} is not refused by {expected.__name__}"
    try:
        Kind("ISOTUNE_HRA")
    except ValueError:
        return
    yield "enumeration: an unknown value is not refused"


def bindings(tree: ast.Module) -> Iterator[tuple[str, str, str | None]]:
    """Each imported name, with its module and what it is there; (name, module, None) for a module itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name.split(".")[0], alias.name, None
        elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
            for alias in node.names:
                yield alias.asname or alias.name, node.module or "", alias.name


def namespace_of(tree: ast.Module) -> tuple[dict[str, Any], list[str]]:
    """The names of a module: those of the standard library as they are here, everything else as a stand-in."""
    names: dict[str, Any] = {}
    faults = []
    for name, module, member in bindings(tree):
        names[name] = Foreign
        if module.split(".")[0] not in sys.stdlib_module_names:
            continue
        try:
            found = importlib.import_module(module)
            if member is None:
                names[name] = sys.modules[module.split(".")[0]] if name == module.split(".")[0] else found
            else:
                names[name] = (
                    getattr(found, member) if hasattr(found, member) else importlib.import_module(f"{module}.{member}")
                )
        except ImportError:
            faults.append(f"{module}{'.' + member if member else ''} does not exist")
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.setdefault(node.name, Foreign)
        elif isinstance(node, ast.Assign):
            for target in ast.walk(ast.Tuple(node.targets, ast.Load())):
                if isinstance(target, ast.Name):
                    names.setdefault(target.id, Foreign)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = names.get(node.value.id)
            if isinstance(module, ModuleType) and isinstance(node.ctx, ast.Load) and not hasattr(module, node.attr):
                faults.append(f"line {node.lineno}: {module.__name__}.{node.attr} does not exist")
    return names, faults


def annotations(tree: ast.Module) -> Iterator[ast.expr]:
    """Every annotation of an argument, a result or a variable."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation is not None:
            yield node.annotation
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.returns is not None:
            yield node.returns
        elif isinstance(node, ast.AnnAssign):
            yield node.annotation


def main(folders: list[Path]) -> int:
    """Check everything and return how many faults there were."""
    count, faults = 0, list(faults_of_the_enumeration(load(folders[0] / "isotune/internals/enumeration.py")))
    paths = sorted(path for folder in folders for path in folder.rglob("*.py"))
    for path in paths:
        text = path.read_text(encoding="utf-8")
        try:
            compile(text, str(path), "exec", dont_inherit=True)
            tree = ast.parse(text)
        except (SyntaxError, Warning) as error:
            faults.append(f"{path}: {type(error).__name__}: {error}")
            continue
        names, found = namespace_of(tree)
        faults += [f"{path}: {fault}" for fault in found]
        for annotation in annotations(tree):
            count += 1
            try:
                value = eval(compile(ast.Expression(annotation), str(path), "eval"), {**vars(builtins), **names})
                if isinstance(value, str):  # one in quotes
                    eval(value, {**vars(builtins), **names})
            except Exception as error:
                faults.append(f"{path}:{annotation.lineno}: {ast.unparse(annotation)}: {type(error).__name__}: {error}")
    print(*faults, f"{len(paths)} modules, {count} annotations", sep="\n")
    return len(faults)


if __name__ == "__main__":
    sys.exit(main([Path(name) for name in sys.argv[1:]]) > 0)
