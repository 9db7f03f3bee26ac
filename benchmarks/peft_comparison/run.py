"""Run one experiment of PEFT's own benchmark by PEFT's unchanged run.py, with isotune's methods registered.

    git clone --branch v0.21.2 https://github.com/huggingface/peft
    python benchmarks/peft_comparison/experiments.py peft/method_comparison/MetaMathQA
    python benchmarks/peft_comparison/run.py peft/method_comparison/MetaMathQA \\
        experiments/isotune-psoft/llama-3.2-3B-rank256 -v

Further options, such as -v and --clean, go to PEFT's run.py. The PEFT of the checkout is used, not an installed one.
PEFT's scripts need Python 3.12, a CUDA or XPU device, their requirements.txt, the model and their data sets. Before
anything is loaded it is checked that the checkout, the experiment and the model are there and that the scripts fit the
PEFT in use.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPTS = ("run.py", "utils.py", "data.py")
DEFAULTS = "default_training_params.json"
RESULTS = ("results", "temporary_results", "cancelled_results")
"""Where PEFT's run.py writes: of its main branch, of another, and of a training that failed."""


class Missing(Exception):
    """What PEFT's run.py needs and does not find."""


def imported(path: Path) -> dict[str, list[str]]:
    """The names that a script takes from each module, also from those beside it."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise Missing(f"{path} does not parse with Python {sys.version.split()[0]}: {error.msg}") from error
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module)
    found: dict[str, list[str]] = {}
    for node in nodes:
        found.setdefault(str(node.module), []).extend(name.name for name in node.names)
    return found


def defined(path: Path) -> set[str]:
    """The names that a module has at its top level."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def check_benchmark(folder: Path) -> None:
    """That the folder holds the scripts of one of PEFT's benchmarks, of one version."""
    absent = [name for name in (*SCRIPTS, DEFAULTS) if not (folder / name).is_file()]
    if absent:
        raise Missing(
            f"{folder} is no benchmark of PEFT, it has no {', '.join(absent)}: clone "
            "https://github.com/huggingface/peft and give its method_comparison/MetaMathQA or image-gen"
        )
    if "path_experiment" not in (folder / "run.py").read_text(encoding="utf-8"):
        raise Missing(
            f"{folder / 'run.py'} takes no folder of an experiment, so it is of another version than those known here "
            "(PEFT 0.15 to 0.21) or another script; check out one of these, such as git checkout v0.21.2"
        )
    for module, names in imported(folder / "run.py").items():
        beside = folder / f"{module}.py"
        if beside.is_file() and (absent := sorted(set(names) - defined(beside))):
            raise Missing(
                f"{folder / 'run.py'} imports {', '.join(absent)} from {beside.name}, which has no such name: the two "
                "are of different versions; check them out together"
            )


def check_library(folder: Path, source: Path | None) -> str:
    """That the PEFT in use is the checkout's and has what its scripts import; returns what it is, in words."""
    import peft

    if source is not None and not Path(peft.__file__).is_relative_to(source):
        raise Missing(f"PEFT was imported from {peft.__file__} before that of {source} could be; start Python anew")
    for script in SCRIPTS:
        for module, names in imported(folder / script).items():
            if module.partition(".")[0] != "peft":
                continue
            absent = [name for name in names if not hasattr(importlib.import_module(module), name)]
            if absent:
                raise Missing(
                    f"{folder / script} imports {', '.join(absent)} from {module}, which PEFT {peft.__version__} does "
                    f"not have: check out the tag of that version (git checkout v{peft.__version__}), or install the "
                    "PEFT of the checkout"
                )
    if "get_peft_branch" not in (folder / "run.py").read_text(encoding="utf-8"):
        return f"PEFT {peft.__version__}"
    place = Path(peft.__file__).parent
    asked = ["git", "rev-parse", "--abbrev-ref", "HEAD"]
    try:
        branch = subprocess.run(asked, cwd=place, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise Missing(
            f"PEFT's run.py asks git for the branch of {place}, which is in no git repository: clone PEFT rather than "
            "unpack an archive of it"
        ) from error
    return f"PEFT {peft.__version__}, branch {branch}"


def check_experiment(benchmark: Path, experiment: Path) -> tuple[Path, Path]:
    """The folder that holds `experiments`, and the experiment's path in it, as PEFT's run.py wants it."""
    folders = [experiment] if experiment.is_absolute() else [benchmark / experiment, experiment.resolve()]
    found = next((folder for folder in folders if folder.is_dir()), None)
    if found is None:
        raise Missing(
            f"there is no experiment {folders[0]}: python benchmarks/peft_comparison/experiments.py {benchmark} writes "
            "isotune's"
        )
    if found.parents[1].name != "experiments":
        raise Missing(f"{found} is not named experiments/METHOD/NAME, as PEFT's run.py wants it")
    if (found / "adapter_config.json").is_file():
        from peft import PeftConfig

        try:
            PeftConfig.from_pretrained(str(found))
        except (TypeError, ValueError, KeyError) as error:
            raise Missing(f"{found / 'adapter_config.json'} cannot be read: {error}") from error
    return found.parents[2], found.relative_to(found.parents[2])


def check_model(benchmark: Path, experiment: Path) -> None:
    """That the model of an experiment is a local folder, in the cache, or can be fetched."""
    from huggingface_hub import snapshot_download

    from isotune.experiments.files import read_object

    settings: dict[str, Any] = {}
    for path in (benchmark / DEFAULTS, experiment / "training_params.json"):
        try:
            settings |= read_object(path) if path.is_file() else {}
        except ValueError as error:
            raise Missing(str(error)) from error
    model = str(settings.get("model_id", ""))
    if Path(model).is_dir():
        return

    try:
        snapshot_download(model, allow_patterns=["config.json", "model_index.json"])
    except Exception as error:  # not found, not allowed, no network, no valid name: the library has a class for each
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Missing(
            f"the model {model!r} cannot be loaded: {said} Accept its licence on its page and log in with "
            f"`hf auth login`, or set model_id to a folder that holds it in {experiment / 'training_params.json'}"
        ) from error


def results(benchmark: Path) -> dict[Path, int]:
    """The result files of a benchmark, and when each was written."""
    return {path: path.stat().st_mtime_ns for name in RESULTS for path in (benchmark / name).glob("*.json")}


def run(benchmark: Path, experiment: Path, options: list[str]) -> Path | None:
    """Run PEFT's run.py on an experiment.

    Returns:
        The result file that it wrote.

    Raises:
        Missing: something that it needs is not there; says what, and what to do.
    """
    check_benchmark(benchmark)
    source = next((place / "src" for place in benchmark.parents if (place / "src/peft/__init__.py").is_file()), None)
    if source is not None:
        sys.path.insert(0, str(source))
    import isotune  # registers the methods with PEFT

    library = check_library(benchmark, source)
    root, relative = check_experiment(benchmark, experiment)
    check_model(benchmark, root / relative)
    print(f"isotune {isotune.__version__}, {library}: {relative}", flush=True)
    if sys.version_info < (3, 12) and "TemporaryDirectory" in (benchmark / "utils.py").read_text(encoding="utf-8"):
        print("Python below 3.12: PEFT's utils.py cannot save the adapter and notes no true file size", flush=True)
    for name in RESULTS:  # PEFT writes there when all is done, and fails where a fresh clone does not have the folder
        (benchmark / name).mkdir(exist_ok=True)
    before = results(benchmark)
    os.chdir(root)
    sys.path.insert(0, str(benchmark))
    sys.argv = [str(benchmark / "run.py"), *options, str(relative)]
    runpy.run_path(sys.argv[0], run_name="__main__")
    return next((path for path, time in results(benchmark).items() if before.get(path) != time), None)


def conclude(written: Path | None) -> None:
    """Say where the result is; exits with 1 where there is none, or one of a training that came to nothing."""
    if written is None:
        raise SystemExit("PEFT's run.py wrote no result")
    content = json.loads(written.read_text(encoding="utf-8"))
    print(f"wrote {written}; isotune report {written.parent} shows it")
    if content["train_info"]["status"] != "success":
        raise SystemExit(f"the training came to nothing: {content['run_info'].get('error_msg') or 'no reason given'}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", type=Path, help="folder of a benchmark in a checkout of PEFT")
    parser.add_argument("experiment", type=Path, help="experiments/METHOD/NAME in it, or elsewhere")
    given, options = parser.parse_known_args()
    try:
        written = run(given.benchmark.resolve(), given.experiment, options)
    except Missing as error:
        raise SystemExit(str(error)) from error
    conclude(written)


if __name__ == "__main__":
    main()
