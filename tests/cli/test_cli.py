"""The command line: exit codes, one line for errors, tracebacks for bugs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import isotune
import isotune_cli as cli
from isotune.experiments import train as train_module
from isotune.experiments.loading import packaged
from isotune.experiments.recipe import Recipe

runner = CliRunner()
RECIPE = "model: m\ndata: {files: {train: a.csv, test: a.csv}}\nmethod: lora\n"


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    seen: list[Recipe] = []
    monkeypatch.setattr(train_module, "train", seen.append)
    return seen


@pytest.mark.slow
def test_recipes_lists_what_train_takes() -> None:
    done = runner.invoke(cli.app, ["recipes"])
    assert done.exit_code == 0
    table, last = done.output.strip().split("\n\n")
    assert [line.split()[0] for line in table.splitlines()] == ["recipe", *packaged()]
    assert last.startswith(f"{len(packaged())} recipes; ")


def test_train_hands_recipe_and_overrides_over(called: list[Recipe]) -> None:
    done = runner.invoke(cli.app, ["train", "demo", "method.r=8", "train.lr=[1e-3, 2e-3]", "output=x"])
    assert (done.exit_code, done.output) == (0, "")
    assert (called[0].method.options, called[0].train.lr, called[0].output) == ({"r": 8}, [1e-3, 2e-3], "x")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "train.lrr=1"], "error: packaged recipe demo: unknown key 'train.lrr'"),
        (["demo", "train.epochs=x"], "error: packaged recipe demo: train.epochs: should be a valid number"),
        (["absent.yaml"], "error: there is no recipe file absent.yaml"),
        (["demoo"], "did you mean 'demo'?"),
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
        (KeyboardInterrupt(), 130, "interrupted: run the same command again to continue\n"),
    ],
)
def test_what_is_raised_sets_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, said: str
) -> None:
    def fail(recipe: Recipe) -> None:
        raise raised

    monkeypatch.setattr(train_module, "train", fail)
    done = runner.invoke(cli.app, ["train", "demo"])
    assert (done.exit_code, done.stderr) == (code, said)


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(recipe: Recipe) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(train_module, "train", fail)
    done = runner.invoke(cli.app, ["train", "demo"])
    assert isinstance(done.exception, KeyError)
    assert done.exit_code == 1


@pytest.mark.slow
def test_help_names_the_commands_and_the_module_itself_imports_little() -> None:
    done = runner.invoke(cli.app, ["--help"])
    assert done.exit_code == 0
    assert "train" in done.output
    assert "recipes" in done.output
    script = "import sys, isotune_cli; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "typer" in loaded
    assert not set(loaded) & {"isotune", "torch", "peft", "numpy"}


def test_version() -> None:
    done = runner.invoke(cli.app, ["--version"])
    assert done.exit_code == 0
    assert done.output == f"isotune {isotune.__version__}\n"
