"""The command line: exit codes, one line for errors, tracebacks for bugs."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from tqdm import tqdm
from typer.testing import CliRunner

import isotune
import isotune_cli as cli
from isotune.errors import IsotuneWarning
from isotune.experiments import processes
from isotune.experiments import train as train_module
from isotune.experiments.loading import packaged
from isotune.experiments.recipe import Recipe
from isotune.files.base_model import quiet

runner = CliRunner()
RECIPE = "model: m\ndata: {files: {train: a.csv, test: a.csv}}\nmethod: lora\n"


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    seen: list[Recipe] = []
    rows = [{"title": "PSOFT", "mean": 0.5, "untrained_score": None}]
    result = {"metric": "accuracy", "data": {}, "rows": rows, "adapter": "x/psoft/adapter"}
    monkeypatch.setattr(sys, "argv", ["isotune", "train", "demo"])  # a worker of pytest-xdist has none

    def note(recipe: Recipe, command: str) -> dict[str, Any]:
        assert command == "isotune train demo"
        seen.append(recipe)
        return result

    monkeypatch.setattr(train_module, "train", note)
    return seen


@pytest.mark.slow
def test_recipes_lists_what_train_takes() -> None:
    done = runner.invoke(cli.app, ["recipes"])
    assert done.exit_code == 0
    table, last = done.output.strip().split("\n\n")
    assert {line.split()[0] for line in table.splitlines()} == {"recipe", *packaged()}
    assert last.startswith(f"{len(packaged())} recipes; ")


def test_train_hands_recipe_and_overrides_over(called: list[Recipe]) -> None:
    done = runner.invoke(cli.app, ["train", "demo", "method.r=8", "train.lr=[1e-3, 2e-3]", "output=x"])
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.endswith("\nadapter: x/psoft/adapter; next: isotune inspect x/psoft/adapter, or export\n")
    assert done.stdout.splitlines()[-2].split() == ["PSOFT", "50.0", "%"]
    assert called[0].method.options == {"r": 8, "scaled_generator": True}
    assert (called[0].train.lr, called[0].output) == ([1e-3, 2e-3], "x")


def test_the_folder_of_a_training_is_an_option_as_in_other_commands(called: list[Recipe]) -> None:
    """Whatever it is called, as it stands: a number and a colon would mean something else in YAML."""
    for name in ("2024", 'a: "b"', "runs/übung"):
        assert runner.invoke(cli.app, ["train", "demo", "output=x", "-o", name]).exit_code == 0
        assert called[-1].output == name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "train.lrr=1"], "error: packaged recipe demo: unknown key 'train.lrr'"),
        (["demo", "train.epochs=x"], "error: packaged recipe demo: train.epochs: should be a valid number"),
        (["absent.yaml"], "error: there is no recipe file absent.yaml"),
        (["demoo"], "there is no recipe 'demoo'; did you mean 'demo'? `isotune recipes` lists all"),
        (["zzzzzz"], "there is no recipe 'zzzzzz'; `isotune recipes` lists all"),
        (["demo", "-q", "-v"], "error: give --quiet or --verbose, and not both"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(called: list[Recipe], arguments: list[str], said: str) -> None:
    done = runner.invoke(cli.app, ["train", *arguments])
    assert done.exit_code == 2
    assert done.stdout == ""
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert called == []


def test_missing_data_are_one_line_before_any_model_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE)
    done = runner.invoke(cli.app, ["train", "r.yaml"])
    assert (done.exit_code, done.stderr) == (2, "error: there is no data file a.csv\n")
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (ValueError("said plainly"), 2, "error: said plainly\n"),
        (OSError(errno.ENOSPC, "No space left", "a/b"), 2, "error: cannot read or write a/b: No space left\n"),
        (OSError(errno.EACCES, "Permission denied"), 2, "error: cannot read or write a file: Permission denied\n"),
        (
            SafetensorError("I/O error: x (os error 28)"),
            2,
            "error: cannot read or write the weights: I/O error: x (os error 28)\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted; the same command again goes on from what was finished\n"),
    ],
)
def test_what_is_raised_sets_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, said: str
) -> None:
    def fail(recipe: Recipe, command: str) -> None:
        raise raised

    monkeypatch.setattr(train_module, "train", fail)
    done = runner.invoke(cli.app, ["train", "demo"])
    assert (done.exit_code, done.stderr) == (code, said)


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    for bug in (KeyError("a bug"), OSError("of no file"), SafetensorError("a bug")):

        def fail(recipe: Recipe, command: str, bug: Exception = bug) -> None:
            raise bug

        monkeypatch.setattr(train_module, "train", fail)
        done = runner.invoke(cli.app, ["train", "demo"])
        assert done.exception is bug
    assert done.exit_code == 1


@pytest.mark.slow
def test_help_names_the_commands_and_the_module_itself_imports_little() -> None:
    done = runner.invoke(cli.app, ["--help"])
    assert done.exit_code == 0
    assert "train" in done.output
    assert "recipes" in done.output
    script = "import sys, isotune_cli; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not set(loaded) & {"isotune", "torch", "peft", "numpy", "typer"}
    script = "import sys, isotune_cli.commands; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "typer" in loaded
    assert not set(loaded) & {"isotune", "torch", "peft", "numpy", "tqdm"}


def test_version() -> None:
    done = runner.invoke(cli.app, ["--version"])
    assert done.exit_code == 0
    assert done.output == f"isotune {isotune.__version__}\n"


# -- what every command shares ----------------------------------------------------------------------------------------


def test_json_is_all_there_is_on_stdout(called: list[Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    result = {"metric": "accuracy", "data": {"\u202e": "ü"}, "rows": [], "adapter": "a"}

    def talk(recipe: Recipe, command: str) -> dict[str, Any]:
        processes.say("a line about progress")
        return result

    monkeypatch.setattr(train_module, "train", talk)
    done = runner.invoke(cli.app, ["train", "demo", "--json"])
    assert json.loads(done.stdout) == result
    assert done.stdout.isascii()
    assert done.stderr == "a line about progress\n"


@pytest.mark.parametrize(
    ("options", "said", "warned", "logged"), [((), 1, 1, 0), (("-q",), 0, 0, 0), (("--verbose",), 1, 1, 1)]
)
def test_quiet_and_verbose(
    called: list[Recipe],
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    said: int,
    warned: int,
    logged: int,
) -> None:
    names = ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY")
    for name in names:
        monkeypatch.setenv(name, "error")
    inner = train_module.train

    def talk(recipe: Recipe, command: str) -> dict[str, Any]:
        processes.say("ours")
        logging.getLogger("another.library").info("theirs")
        with quiet():
            logging.getLogger("another.library").info("theirs")
            warnings.warn("a warning", IsotuneWarning, stacklevel=1)
        for _ in tqdm(range(2), desc="a bar", disable=False):
            pass
        return inner(recipe, command)

    monkeypatch.setattr(train_module, "train", talk)
    seen: list[str] = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_, **__: seen.append(str(message)))
    before = logging.getLogger().handlers[:], warnings.showwarning, tqdm.display
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        done = runner.invoke(cli.app, ["train", "demo", *options])
    assert (logging.getLogger().handlers, warnings.showwarning, tqdm.display) == before
    assert "50.0 %" in done.stdout
    assert done.stderr.splitlines().count("ours") == said
    assert done.stderr.splitlines().count("theirs") == 2 * logged
    assert done.stderr.count("a bar: 100% 2/2") == said
    assert seen.count("a warning") == warned
    assert {os.environ[name] for name in names} == {"info" if logged else "error"}


COMMANDS = ["train", "compare", "eval", "plan", "rank", "inspect", "export", "import", "report"]


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_with_a_result_has_the_options_and_whole_sentences(command: str) -> None:
    done = runner.invoke(cli.app, [command, "--help"], env={"COLUMNS": "100"})
    assert done.exit_code == 0
    for option in ("--json", "--quiet", "--verbose", "-q", "-v"):
        assert option in done.output
    assert "[[" not in done.output
    assert "]..." not in done.output.replace("[KEY=VALUE]...", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "a" * 100_000],
        ["train", "a" * 100_000 + ".yaml"],
        ["train", "demo", "b" * 100_000],
        ["train", "demo", "train.lr=" + "c" * 100_000],
        ["train", "demo", "train.schedule=" + "word " * 20_000],
        ["plan", "d" * 100_000],
        ["plan", "m", "--rank", "e" * 100_000],
        ["plan", "m", "--method", "f" * 100_000],
        ["inspect", "g" * 100_000],
        ["report", "h" * 100_000],
        ["export", "i", "--to", "j" * 100_000, "-o", "k"],
    ],
)
def test_a_value_of_any_length_is_cut(arguments: list[str]) -> None:
    done = runner.invoke(cli.app, arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert 20 < len(done.stderr) < 4000


def test_a_network_that_is_not_there_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    class ConnectError(Exception):
        pass

    def fail(recipe: Recipe, command: str) -> None:
        try:
            raise ConnectError("[Errno -2] Name or service not known")
        except ConnectError as error:
            raise ValueError("cannot load the model x") from error

    monkeypatch.setattr(train_module, "train", fail)
    for offline, advice in (("", "set HF_HUB_OFFLINE=1"), ("1", "unset HF_HUB_OFFLINE")):
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        done = runner.invoke(cli.app, ["train", "demo"])
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
        assert f"give a folder on this machine, or {advice}" in done.stderr


@pytest.mark.slow
def test_ctrl_c_in_the_first_seconds_leaves_no_traceback() -> None:
    for name in ("torch", "typer", "transformers"):
        script = f"""
import importlib.abc, os, signal, sys, threading

class Interrupt(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = ["isotune", "plan", "no-such-model"]
from isotune_cli import main
main()
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (130, ""), name
        assert "Traceback" not in done.stderr
        assert done.stderr.startswith("interrupted")


@pytest.mark.slow
def test_help_takes_next_to_nothing() -> None:
    script = "import sys; sys.argv[1:] = ['--help']; from isotune_cli import main; main()"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # 0.3 s; importing torch alone takes more than two.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5
