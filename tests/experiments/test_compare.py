"""Comparisons: what is run in which order, what is chosen, what survives a kill, and that engines agree."""

from __future__ import annotations

import copy
import errno
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from isotune.experiments import claim, execute, registry
from isotune.experiments.compare import Options, parse, plan, rates, searched, split_methods
from isotune.experiments.compare import whole_number as read_number
from isotune.experiments.engines import LocalProcesses, RayTasks
from isotune.experiments.engines import make as make_engine
from isotune.experiments.files import StorageError, read_json
from isotune.experiments.recipe import Recipe, RecipeError, validate
from isotune.experiments.run import WEIGHTS, Run
from isotune.experiments.runner import carry_out
from isotune.experiments.schedule import Schedule
from isotune.experiments.table import table
from isotune.report.results import read
from isotune_cli import app

# What depends on the speed and the state of the machine.
MEASURED = (
    *("load_seconds", "setup_seconds", "train_seconds", "evaluation_seconds", "tokens_per_second", "peak_memory_bytes"),
    *("hardware", "phase", "lr_search"),
)


class Fake:
    """An engine that makes records up, one run at a time."""

    def __init__(self, outcome: Callable[[Run], dict[str, Any]]) -> None:
        self.outcome = outcome
        self.started: list[Run] = []
        self.waiting: list[Run] = []
        self.stopped = self.closed = False

    @property
    def free(self) -> int:
        return 1 - len(self.waiting)

    @property
    def running(self) -> int:
        return len(self.waiting)

    def start(self, spec: Run) -> None:
        self.started.append(spec)
        self.waiting.append(spec)

    def wait(self) -> list[tuple[Run, dict[str, Any]]]:
        spec = self.waiting.pop()
        if spec.phase == "start":
            (spec.folder / WEIGHTS).parent.mkdir(parents=True, exist_ok=True)
            (spec.folder / WEIGHTS).touch()
        return [(spec, self.outcome(spec))]

    def stop(self) -> None:
        self.stopped = True

    def close(self) -> None:
        self.closed = True


def scored(validation: Callable[[Run], float], test: Callable[[Run], float]) -> Callable[[Run], dict[str, Any]]:
    def outcome(spec: Run) -> dict[str, Any]:
        return {
            **spec.identity(),
            "validation": {"accuracy": validation(spec)},
            "test": {"accuracy": test(spec)},
            "train_seconds": 1.0 + spec.seed,
            "trainable_parameters": 10,
            "adapter_parameters": 8,
            "head_parameters": 2,
            "forgetting": {"change": 0.5},
            "kept_bytes": 100,
            "adapter_bytes": 1000,
            "peak_memory_bytes": None,
        }

    return outcome


def planned(tiny: dict[str, Any], *methods: str, **options: Any) -> Schedule:
    folder = Path(tiny["output"]).parent / "comparison"
    found = plan("tiny", validate(tiny), Options(methods=methods, **options), folder)
    found.begin()
    return found


def records_of(folder: Path) -> dict[str, Any]:
    runs = folder / "runs"
    return {str(path.relative_to(runs)): read_json(path) for path in sorted(runs.rglob("*.json"))}


def comparable(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in MEASURED}


# -- the command line's words -----------------------------------------------------------------------------------------


def test_a_method_is_a_name_with_options(tiny: dict[str, Any]) -> None:
    recipe = validate(tiny)
    assert split_methods("psoft:r=1+lr=[1e-3,2e-3],lora,oft:oft_block_size=8") == [
        "psoft:r=1+lr=[1e-3,2e-3]",
        "lora",
        "oft:oft_block_size=8",
    ]
    variant = parse("psoft:r=2+psoft_mag_a=false+lr=[2e-3,1e-3]+train.epochs=1", recipe, Options())
    assert variant.method.options == {"r": 2, "psoft_mag_a": False}
    assert variant.method.train["epochs"] == 1
    assert variant.rates == (1e-3, 2e-3)
    assert parse("psoft", recipe, Options()).method.options == {"r": 4}  # as the recipe says
    assert parse("psoft_so", recipe, Options()).method.options == {}
    assert parse("lora:lr=1e-2", recipe, Options(lr_search=3, factor=10)).rates == (1e-3, 1e-2, 1e-1)
    assert parse("lora", recipe, Options(rates=rates("3e-3,1e-3"))).rates == (1e-3, 3e-3)
    # A scaled generator has a usual rate of its own, unless another is given.
    for method, usual in (("psoft", 5e-3), ("psoft_so", 5e-3), ("oft", 1.25e-2), ("coft", 1.25e-2)):
        assert parse(f"{method}:scaled_generator=true", recipe, Options(lr_search=1)).rates == (usual,)
        assert parse(f"{method}:scaled_generator=true+lr=7e-3", recipe, Options(lr_search=1)).rates == (7e-3,)
    assert parse("psoft:scaled_generator=false", recipe, Options(lr_search=1)).rates == (8e-4,)


def test_a_method_is_given_settings_within_a_section(tiny: dict[str, Any]) -> None:
    text = "uora:r=2+train.reinit.threshold=0.1+train.reinit.weight=0.5+train.reinit.every=3"
    variant = parse(text, validate(tiny), Options())
    assert variant.method.train == {"reinit": {"threshold": 0.1, "weight": 0.5, "every": 3}}
    with pytest.raises(RecipeError, match=r"needs .* threshold, weight and every"):
        parse("uora:r=2", validate(tiny), Options())


def test_every_method_has_a_usual_rate() -> None:
    assert all(entry.usual_learning_rate > 0 for entry in registry.entries().values())


def test_which_layers_are_adapted_is_said_once_for_all(tiny: dict[str, Any]) -> None:
    tiny["method"]["target_modules"] = ["query"]
    recipe = validate(tiny)
    assert parse("lora:r=2", recipe, Options()).method.options == {"target_modules": ["query"], "r": 2}
    assert parse("full", recipe, Options()).method.options == {}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("psfot", "did you mean 'psoft'?"),
        ("psoft:rr=1", "did you mean 'method.r'?"),
        ("psoft:r", "an option is KEY=VALUE"),
        ("psoft:r=[", "not valid YAML"),
        ("psoft:lr=-1", "a learning rate is a number above 0"),
        ("psoft:lr=[]", "a learning rate is a number above 0"),
        ("psoft:train.epcohs=1", "did you mean 'epochs'?"),
        ("full:r=1", "full has no options"),
    ],
)
def test_a_wrong_method_is_one_line(tiny: dict[str, Any], given: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(given, validate(tiny), Options())
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("methods", "options", "said"),
    [
        (("psoft", "psoft"), {}, "psoft is given twice"),
        (("psoft:lr=[1e-3]", "lora"), {}, "every method is given the same number of learning rates, but psoft"),
        (("psoft",), {"seeds": 0}, "--seeds is 0 and must be at least 1"),
        (("psoft",), {"lr_search": 0}, "--lr-search is 0 and must be at least 1"),
        (("psoft",), {"factor": 1.0}, "--lr-factor is 1 and must be above 1"),
        (("psoft",), {"match_params": 0}, "--match-params is 0"),
    ],
)
def test_a_wrong_comparison_is_refused(
    tiny: dict[str, Any], methods: tuple[str, ...], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        planned(tiny, *methods, **options)


def test_a_search_needs_a_validation_set(tiny: dict[str, Any]) -> None:
    tiny["data"]["files"].pop("validation")
    with pytest.raises(RecipeError, match="chosen on a validation set, and there is none"):
        planned(tiny, "psoft")
    assert planned(tiny, "psoft", lr_search=1).total() == 3


def test_numbers_of_parameters_are_read() -> None:
    assert [read_number(text) for text in ("80000", "80k", "1.2M")] == [80_000, 80_000, 1_200_000]
    with pytest.raises(RecipeError, match="such as 80000, 80k"):
        read_number("many")


def test_an_engine_has_a_name() -> None:
    with pytest.raises(ValueError, match="Did you mean 'local'"):
        make_engine("locl", 1, 1)
    with pytest.raises(ValueError, match="give --engine ray"):
        make_engine("local", 1, 1, "ray://there")


# -- the plan, with made-up records -----------------------------------------------------------------------------------


def test_each_method_is_searched_on_validation_and_then_given_its_seeds(tiny: dict[str, Any]) -> None:
    found = planned(tiny, "psoft", "lora", lr_search=3, seeds=3)
    best = {variant.label: variant.rates[1] for variant in found.variants}
    engine = Fake(
        scored(
            lambda spec: 0.9 if spec.lr == best[spec.label] else 0.6,
            # The test set says the opposite, and is not asked.
            lambda spec: 0.5 + 0.1 * spec.seed if spec.lr == best[spec.label] else 0.99,
        )
    )
    result = carry_out(found, engine)
    assert [spec.phase for spec in engine.started] == ["search"] * 6 + ["seed"] * 4
    assert {(spec.seed, spec.lr == best[spec.label]) for spec in engine.started[6:]} == {(1, True), (2, True)}
    assert [spec.seed for spec in engine.started[6:]] == [1, 1, 2, 2]  # a comparison that is stopped is balanced
    assert len(engine.started) == found.total()
    for row in result["rows"]:
        assert (row["lr"], row["seeds"], row["failed"]) == (best[row["label"]], 3, None)
        assert row["mean"] == pytest.approx(0.6)
        assert row["standard_error"] == pytest.approx(0.1 / math.sqrt(3))
        assert row["scores"] == pytest.approx({"0": 0.5, "1": 0.6, "2": 0.7})
        assert (row["train_seconds"], row["forgetting"], row["peak_memory_bytes"]) == (2.0, 0.5, None)
        assert row["lr_at_border"] is False
    assert result["complete"] is True
    assert read_json(found.folder / "comparison.json") == result
    assert "60.0 ± 5.8 %" in table(result)


def test_what_is_done_is_skipped_and_more_seeds_go_on(tiny: dict[str, Any]) -> None:
    outcome = scored(lambda spec: spec.lr, lambda spec: 0.5)
    carry_out(planned(tiny, "psoft", lr_search=2, seeds=1), Fake(outcome))
    engine = Fake(outcome)
    first = carry_out(planned(tiny, "psoft", lr_search=2, seeds=1), engine)
    assert engine.started == []
    assert first["rows"][0]["seeds"] == 1
    assert first["rows"][0]["standard_error"] is None
    carry_out(planned(tiny, "psoft", "lora", lr_search=2, seeds=2), engine)
    assert [(spec.label, spec.phase) for spec in engine.started] == [
        ("lora", "search"),
        ("lora", "search"),
        ("psoft", "seed"),
        ("lora", "seed"),
    ]


def test_other_settings_are_not_mixed_into_a_folder(tiny: dict[str, Any]) -> None:
    outcome = scored(lambda spec: spec.lr, lambda spec: 0.5)
    carry_out(planned(tiny, "psoft", lr_search=1, seeds=1), Fake(outcome))
    other = copy.deepcopy(tiny)
    other["method"]["r"] = 2
    with pytest.raises(RecipeError, match=r"other settings .method is"):
        planned(other, "psoft", lr_search=1, seeds=1)
    other = copy.deepcopy(tiny)
    other["train"]["epochs"] = 3
    with pytest.raises(RecipeError, match=r"another experiment .train.epochs is 2.0 there and 3.0 here.*-o FOLDER"):
        planned(other, "psoft", lr_search=1, seeds=1)
    other["train"] = {**tiny["train"], "max_steps": 1}
    with pytest.raises(RecipeError, match=r"train.max_steps is null there and 1 here"):
        planned(other, "psoft", lr_search=1, seeds=1)


def test_a_record_that_holds_no_run_is_not_taken_for_one(tiny: dict[str, Any]) -> None:
    carry_out(planned(tiny, "psoft", lr_search=1, seeds=1), Fake(scored(lambda spec: spec.lr, lambda spec: 0.5)))
    (path,) = (Path(tiny["output"]).parent / "comparison" / "runs").rglob("*.json")
    path.write_text('{"a": NaN}')
    with pytest.raises(ValueError, match=f"cannot read {re.escape(str(path))}: it holds no run"):
        planned(tiny, "psoft", lr_search=1, seeds=1)
    path.unlink()
    assert len(planned(tiny, "psoft", lr_search=1, seeds=1).records) == 0


def test_settings_that_a_later_release_adds_do_not_end_a_comparison(tiny: dict[str, Any]) -> None:
    outcome = scored(lambda spec: spec.lr, lambda spec: 0.5)
    found = planned(tiny, "psoft", lr_search=1, seeds=1)
    carry_out(found, Fake(outcome))
    for path in (found.folder / "experiment.json", *found.folder.rglob("runs/*/*.json")):
        stored = read_json(path)
        (stored["recipe"]["train"] if "data" in stored else stored["settings"]).pop("group_by_length", None)
        path.write_text(json.dumps(stored))
    engine = Fake(outcome)
    carry_out(planned(tiny, "psoft", lr_search=1, seeds=1), engine)
    assert engine.started == []


def test_a_failed_run_is_recorded_and_the_others_go_on(tiny: dict[str, Any]) -> None:
    good = scored(lambda spec: spec.lr, lambda spec: 0.5)

    def outcome(spec: Run) -> dict[str, Any]:
        if spec.label == "lora":
            return execute.failure(spec, "the training loss is nan at step 3", final=True)
        if spec.seed == 1:
            return execute.failure(spec, "the process was ended by SIGKILL")
        return good(spec)

    result = carry_out(planned(tiny, "psoft", "lora", lr_search=2, seeds=3), Fake(outcome))
    psoft, lora = result["rows"]
    assert (psoft["seeds"], psoft["mean"]) == (2, 0.5)
    assert psoft["failed"] == "1 of 3 seeds: the process was ended by SIGKILL"
    assert (lora["lr"], lora["mean"]) == (None, None)
    assert lora["failed"] == "at every learning rate; at the first: the training loss is nan at step 3"
    assert "LoRA failed: at every learning rate" in table(result)
    # What would fail alike is not tried again; what was killed is.
    engine = Fake(good)
    again = carry_out(planned(tiny, "psoft", "lora", lr_search=2, seeds=3), engine)
    assert [(spec.label, spec.seed) for spec in engine.started] == [("psoft", 1)]
    assert again["rows"][0]["failed"] is None
    assert again["rows"][0]["seeds"] == 3


def test_the_best_rate_at_the_border_is_marked(tiny: dict[str, Any]) -> None:
    result = carry_out(planned(tiny, "psoft", seeds=1), Fake(scored(lambda spec: spec.lr, lambda spec: 0.5)))
    assert result["rows"][0]["lr_at_border"] is True
    title = result["rows"][0]["title"]
    said = f"best rate at the border for {title}, a better one may lie beyond: --lr-search auto searches on"
    assert table(result).count(said) == 1


def test_the_table_says_what_its_headings_mean_and_how_sure_a_single_seed_is(tiny: dict[str, Any]) -> None:
    result = carry_out(planned(tiny, "psoft", "lora", lr_search=1, seeds=1), Fake(scored(lambda _: 0.5, lambda _: 0.5)))
    first, second = result["rows"]
    first |= {"interval": [0.25, 0.75], "forgetting_unit": "nats a token"}
    second["forgetting"] = None
    shown = table(result)
    assert "50.0 % (25.0 to 75.0)" in shown
    assert "+0.500" in shown
    assert next(line for line in shown.splitlines() if line.startswith("LoRA")).rstrip().endswith("–")
    told = " ".join(shown.splitlines()[-3:])
    assert "forgetting: the change on text that was not trained on, in nats a token" in told
    assert "kept: " in told
    assert "in brackets: 95 % interval" in told
    first["interval"] = first["forgetting"] = None
    assert "forgetting" not in table(result)
    assert "brackets" not in table(result)


def test_less_is_better_for_a_loss(tiny: dict[str, Any]) -> None:
    tiny["metric"] = "loss"

    def outcome(spec: Run) -> dict[str, Any]:
        record = scored(lambda s: 0.0, lambda s: 0.0)(spec)
        return {**record, "validation": {"loss": spec.lr}, "test": {"loss": 1.5}}

    found = planned(tiny, "psoft", seeds=1)
    result = carry_out(found, Fake(outcome))
    assert result["higher_is_better"] is False
    assert result["rows"][0]["lr"] == min(found.variants[0].rates)
    assert result["rows"][0]["mean"] == 1.5


def with_head(tiny: dict[str, Any]) -> dict[str, Any]:
    tiny["baselines"] = [{"name": "head", "train": {"lr": 0.05, "lr_head": None, "max_steps": 60}}]
    tiny["train"] |= {"start_from_head": True, "max_steps": 2}
    return tiny


def test_heads_to_start_from_come_first_one_for_each_seed(
    tiny: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    engine = Fake(scored(lambda spec: spec.lr, lambda spec: 0.5))
    carry_out(planned(with_head(tiny), "head", "psoft", lr_search=1, seeds=2), engine)
    assert [(spec.phase, spec.seed) for spec in engine.started[:2]] == [("start", 0), ("start", 1)]
    heads = {spec.seed: spec.folder for spec in engine.started if spec.phase == "start"}
    for spec in engine.started[2:]:
        assert spec.start_from == (heads[spec.seed] if spec.label == "psoft" else None)
    # Where only the records were kept, a head is trained again once something starts from it, and not before.
    shutil.rmtree(heads[1])
    again = Fake(scored(lambda spec: spec.lr, lambda spec: 0.5))
    carry_out(planned(tiny, "head", "psoft", lr_search=1, seeds=2), again)
    assert again.started == []
    caplog.set_level("INFO", "isotune")
    carry_out(planned(tiny, "head", "psoft", "lora", lr_search=1, seeds=2), again)
    assert [(spec.phase, spec.seed) for spec in again.started] == [("search", 0), ("start", 1), ("seed", 1)]
    assert "start:head lr 0.05 seed 1, again for its weights" in caplog.text
    assert re.findall(r"run \d+ of \d+", caplog.text) == ["run 7 of 8", "run 8 of 8"]
    # A head that fails takes with it only what starts from it.
    tiny["output"] = str(Path(tiny["output"]).parent / "other" / "run")
    good = scored(lambda spec: spec.lr, lambda spec: 0.5)
    fails = Fake(lambda spec: execute.failure(spec, "no memory") if spec.phase == "start" else good(spec))
    result = carry_out(planned(tiny, "head", "psoft", lr_search=1, seeds=2), fails)
    assert {spec.label for spec in fails.started if spec.phase != "start"} == {"head"}
    assert [row["failed"] for row in result["rows"]] == [None, "the head to start from: no memory"]


@pytest.mark.slow
def test_a_run_starts_from_the_trained_head(tiny: dict[str, Any]) -> None:
    with_head(tiny)["train"] |= {"lr_head": 1e-9}
    found = planned(tiny, "psoft:lr=[1e-9]", lr_search=1, seeds=1)
    head, psoft = found.heads[0], found.search(found.variants[0])[0]
    first = execute.execute(head)
    assert execute.execute(psoft)["test"] == first["test"]
    assert first["test"] != first["untrained"]


def test_a_search_goes_on_until_the_best_lies_inside(tiny: dict[str, Any]) -> None:
    """The best rate lies two steps above the usual one; the second method's lies at it."""
    peaks = {"psoft:lr=1e-3": 6e-3, "lora:lr=1e-3": 1e-3}
    engine = Fake(scored(lambda spec: -abs(math.log(spec.lr / peaks[spec.label])), lambda spec: 0.5))
    options: dict[str, Any] = {"lr_search": "auto", "seeds": 2}
    found = planned(tiny, *peaks, **options)
    assert found.total() == 2 * 4
    result = carry_out(found, engine)
    psoft, lora = result["rows"]
    assert psoft["lr_tried"] == [4e-4, 1e-3, 2.5e-3, 4e-3, 6.3e-3, 1e-2, 1.6e-2]
    assert lora["lr_tried"] == [4e-4, 6.3e-4, 1e-3, 1.6e-3, 2.5e-3]
    assert (psoft["lr"], lora["lr"]) == (6.3e-3, 1e-3)
    assert (psoft["lr_at_border"], lora["lr_at_border"]) == (False, False)
    assert result["complete"] is True
    assert [spec.phase for spec in engine.started].count("seed") == 2
    # Each run knows those that ended before it could begin, whatever ran beside it.
    earlier = {spec.lr: len(spec.earlier) for spec in engine.started if spec.label == "psoft:lr=1e-3" and not spec.seed}
    assert earlier == {4e-4: 0, 1e-3: 0, 2.5e-3: 0, 6.3e-3: 3, 1.6e-2: 4, 4e-3: 5, 1e-2: 5}
    assert all(path.exists() for spec in engine.started for path in spec.earlier)
    again = Fake(engine.outcome)
    assert carry_out(planned(tiny, *peaks, **options), again) == result
    assert again.started == []


def test_a_search_ends_at_its_limit_which_is_the_same_for_all(tiny: dict[str, Any]) -> None:
    rising = Fake(scored(lambda spec: spec.lr, lambda spec: 0.5))
    result = carry_out(planned(tiny, "psoft", "lora", lr_search="auto", lr_runs=4, seeds=1), rising)
    assert [len(row["lr_tried"]) for row in result["rows"]] == [4, 4]
    assert all(row["lr_at_border"] for row in result["rows"])
    titles = ", ".join(row["title"] for row in result["rows"])
    assert f"at the border for {titles}, a better one may lie beyond: --lr-runs allows more rates" in table(result)


def test_a_run_that_was_stopped_is_not_chosen(tiny: dict[str, Any]) -> None:
    """Its score was the best while it ran; the search goes on around the best of the others."""
    whole = scored(lambda spec: 0.9 if spec.lr > 5e-3 else spec.lr, lambda spec: 0.5)

    def outcome(spec: Run) -> dict[str, Any]:
        found = whole(spec)
        return found if spec.lr < 5e-3 else {**found, "test": {}, "stopped": {"step": 3, "of": 6, "rule": "halving"}}

    result = carry_out(planned(tiny, "psoft:lr=1e-3", lr_search="auto", seeds=2), Fake(outcome))
    (row,) = result["rows"]
    assert row["lr_stopped"] == [6.3e-3]
    assert row["lr"] == 4e-3
    assert row["seeds"] == 2
    assert row["failed"] is None


def test_a_stopped_run_is_trained_to_its_end_by_another_search(tiny: dict[str, Any]) -> None:
    whole = scored(lambda spec: spec.lr, lambda spec: 0.5)

    def outcome(spec: Run) -> dict[str, Any]:
        return {**whole(spec), "test": {}, "stopped": {"step": 3, "of": 6}} if spec.earlier else whole(spec)

    auto = carry_out(planned(tiny, "psoft", lr_search="auto", lr_runs=4, seeds=1), Fake(outcome))
    (stopped,) = auto["rows"][0]["lr_stopped"]
    engine = Fake(whole)
    result = carry_out(planned(tiny, "psoft", rates=[8e-4, stopped], seeds=1), engine)
    assert [spec.lr for spec in engine.started] == [stopped]
    assert (result["rows"][0]["lr"], result["rows"][0]["failed"]) == (stopped, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_search": "auto", "factor": 1.02}, "--lr-factor is 1.02 and must be at least 1.5 with --lr-search auto"),
        ({"lr_search": "auto", "lr_runs": 2}, "--lr-runs is 2; it is for --lr-search auto, which tries at least 3"),
        ({"lr_search": 3, "lr_runs": 8}, "--lr-runs is 8; it is for --lr-search auto"),
        ({"lr_search": "auto", "rates": [1e-3]}, "--lr-search auto finds the rates itself"),
    ],
)
def test_a_search_that_cannot_be_is_refused(tiny: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        planned(tiny, "psoft", **options)


def test_methods_with_given_rates_have_no_part_in_an_automatic_search(tiny: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="the same number of learning rates, but lora:lr=\\[1e-3\\] 1 and psoft 8"):
        planned(tiny, "psoft", "lora:lr=[1e-3]", lr_search="auto")


def test_an_automatic_search_needs_optuna(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "optuna" else there(name, *rest)
    )
    with pytest.raises(RecipeError, match=r"needs optuna: pip install '.*\[search\]'"):
        planned(tiny, "psoft", lr_search="auto")


def test_a_search_is_a_number_or_auto() -> None:
    assert (searched("auto"), searched("4")) == ("auto", 4)
    with pytest.raises(RecipeError, match=r"--lr-search is .*often.* such as 3, or auto"):
        searched("often")


@pytest.mark.parametrize("known", [False, True])
def test_all_processes_look_for_the_untrained_score_before_one_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """One that came later would find it, and wait no more for those that go on to score."""
    path = tmp_path / "seed=0.json"
    if known:
        path.write_text('{"scores": {"accuracy": 0.5}}')
    waited: list[bool] = []
    monkeypatch.setattr(execute.processes, "wait_for_all", lambda: waited.append(path.exists()))
    run: Any = SimpleNamespace(recipe=SimpleNamespace(score_untrained=None), start_from=None, untrained=path)
    task: Any = SimpleNamespace(generates=False, score_untrained=lambda model: {"accuracy": 0.5})
    assert execute._untrained(run, task, None) == {"accuracy": 0.5}
    assert waited == ([True] if known else [False, True])


def test_ctrl_c_stops_the_engine_and_keeps_what_is_done(tiny: dict[str, Any]) -> None:
    good = scored(lambda spec: spec.lr, lambda spec: 0.5)

    def outcome(spec: Run) -> dict[str, Any]:
        if len(engine.started) == 2:
            raise KeyboardInterrupt
        return good(spec)

    engine = Fake(outcome)
    found = planned(tiny, "psoft", lr_search=3, seeds=1)
    with pytest.raises(KeyboardInterrupt):
        carry_out(found, engine)
    assert engine.stopped
    assert engine.closed
    assert len(planned(tiny, "psoft", lr_search=3, seeds=1).records) == 1
    assert read_json(found.folder / "comparison.json")["complete"] is False


def test_the_bar_says_what_is_done_meanwhile(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Fake):
        waits = 0

        def wait(self) -> list[tuple[Run, dict[str, Any]]]:
            self.waits += 1
            return [] if self.waits % 2 else super().wait()

        def doing(self) -> str:
            return "measuring what is forgotten"

    titles = []
    monkeypatch.setattr("tqdm.std.tqdm.set_description_str", lambda bar, title: titles.append(title))
    carry_out(planned(tiny, "psoft", lr_search=1, seeds=2), Slow(scored(lambda _: 0.5, lambda _: 0.5)))
    assert titles == ["comparing (measuring what is forgotten)"] * 2


def test_two_commands_do_not_write_to_one_folder(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "_PATIENCE", 0.05)
    good, second = scored(lambda spec: spec.lr, lambda spec: 0.5), Fake(lambda spec: {})

    def outcome(spec: Run) -> dict[str, Any]:
        with pytest.raises(RecipeError, match=f"another process is writing to {folder}; .*with -o FOLDER"):
            carry_out(planned(tiny, "psoft", seeds=1), second)
        if found.records:
            assert [one.name for one in read(folder).variants] == ["psoft"]  # as `isotune report` does meanwhile
        with monkeypatch.context() as patch:  # the other processes of a launcher, of whom the main one holds the folder
            patch.setenv("RANK", "1")
            planned(tiny, "psoft", seeds=1).alone().__enter__()
        return good(spec)

    found = planned(tiny, "psoft", seeds=1)
    folder = found.folder
    assert carry_out(found, Fake(outcome))["complete"]
    assert not second.started
    assert carry_out(planned(tiny, "psoft", seeds=1), second)["complete"]
    assert not any(path.name.startswith(".") for path in folder.rglob("*"))


def test_a_full_disk_stops_the_comparison_with_one_line(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    engine = Fake(scored(lambda spec: spec.lr, lambda spec: 0.5))
    found = planned(tiny, "psoft", seeds=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(StorageError, match="No space left on device; make room and run the same command again"):
            carry_out(found, engine)
    assert engine.closed
    assert len(engine.started) == 1
    assert not any(path.name.startswith(".") for path in found.folder.rglob("*"))
    assert carry_out(planned(tiny, "psoft", seeds=1), engine)["complete"] is True


# -- real runs in real processes --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tiny_model: Path, tiny_data: Path) -> dict[str, Any]:
    """A recipe of eight steps."""
    return {
        "model": str(tiny_model),
        "data": {
            "path": str(tiny_data),
            "files": {"train": "train.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"},
        },
        "method": {"name": "psoft", "r": 4},
        "train": {"epochs": 1, "batch_size": 8, "lr_head": 0.01, "max_length": 16},
    }


METHODS = ("psoft:lr=[1e-2,2e-2]", "lora:r=2+lr=[1e36,2e36]")


@pytest.fixture(scope="module")
def finished(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of two methods, one of which diverges, by two processes at a time."""
    folder = tmp_path_factory.mktemp("finished") / "comparison"
    found = plan("small", validate(small), Options(methods=METHODS, seeds=2, command="isotune …"), folder)
    carry_out(found, LocalProcesses(2))
    return folder


@pytest.mark.slow
def test_a_record_holds_all_that_a_report_needs(finished: Path) -> None:
    record = read_json(finished / "runs" / "psoft_lr=[1e-2,2e-2]" / "lr=0.01-seed=0.json")
    assert {
        *("format", "recipe", "task", "label", "method", "phase", "model", "seed", "lr", "lr_head", "versions"),
        *("hardware", "data", "metric", "validation", "test", "interval", "curve", "best_step"),
        *("trainable_parameters", "adapter_parameters", "head_parameters", "adapter_bytes", "train_seconds"),
        *("tokens_per_second", "peak_memory_bytes", "kept_bytes", "forgetting", "geometry"),
    } <= set(record)
    assert record["trainable_parameters"] == record["adapter_parameters"] + record["head_parameters"]
    assert record["interval"]["low"] <= record["test"]["accuracy"] <= record["interval"]["high"]
    assert record["forgetting"]["change"] > 0
    assert record["kept_bytes"] > 0
    assert record["tokens_per_second"] > 0
    assert 100 * 2**20 < record["peak_memory_bytes"] < 8 * 2**30
    assert record["geometry"]["layers"]
    assert [row["step"] for row in record["curve"] if "validation_accuracy" in row] == [8]
    assert record["hardware"]["threads"] == 1
    kept = [path for path in finished.rglob("*.safetensors") if not path.name.startswith("forgetting-")]
    assert not kept  # weights are kept only when asked for


@pytest.mark.slow
def test_a_loss_that_is_no_number_is_that_runs_failure(finished: Path) -> None:
    result = read_json(finished / "comparison.json")
    psoft, lora = result["rows"]
    assert psoft["failed"] is None
    assert (psoft["seeds"], len(psoft["scores"])) == (2, 2)
    assert "loss is nan at step" in lora["failed"] or "loss is inf at step" in lora["failed"]
    assert "\n" not in lora["failed"]
    assert result["complete"] is True
    assert result["command"] == "isotune …"


@pytest.mark.slow
def test_the_same_by_one_process_and_by_two(finished: Path, small: dict[str, Any], tmp_path: Path) -> None:
    options = Options(methods=METHODS[:1], seeds=1, keep_adapters=True)
    found = plan("small", validate(small), options, tmp_path / "comparison")
    carry_out(found, LocalProcesses(1))
    first, second = records_of(finished), records_of(found.folder)
    assert len(second) == 2
    for name, record in second.items():
        assert comparable(record) == comparable(first[name])
    assert len(list((tmp_path / "comparison" / "work").rglob("adapter_model.safetensors"))) == 2


@pytest.fixture
def long(small: dict[str, Any]) -> Recipe:
    """Forty steps with a checkpoint after every fourth, so that there is a middle to be stopped in."""
    train = {**small["train"], "epochs": 5, "eval_steps": 4, "select_best": False}
    return validate({**small, "train": train})


def has_checkpoint(folder: Path) -> bool:
    return any(folder.rglob("checkpoint-*/trainer_state.json"))


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "what was waited for did not happen"
        time.sleep(0.005)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_result(long: Recipe, tmp_path: Path) -> None:
    options = Options(methods=["psoft:lr=[2e-2]"], seeds=1)
    whole = plan("long", long, options, tmp_path / "whole")
    carry_out(whole, LocalProcesses(1))

    class Killing(LocalProcesses):
        def wait(self) -> list[tuple[Run, dict[str, Any]]]:
            until(lambda: has_checkpoint(tmp_path / "killed"))
            os.kill(next(iter(self.pending)).pid, signal.SIGKILL)
            return super().wait()

    killed = carry_out(plan("long", long, options, tmp_path / "killed"), Killing(1))
    assert "the process was ended by SIGKILL" in killed["rows"][0]["failed"]
    folder = next((tmp_path / "killed" / "work").rglob("log.txt")).parent
    begun = {path.name for path in folder.glob("checkpoint-*")}
    assert begun
    resumed = carry_out(plan("long", long, options, tmp_path / "killed"), LocalProcesses(1))
    assert resumed["rows"][0]["failed"] is None
    first, second = (next(iter(records_of(tmp_path / name).values())) for name in ("whole", "killed"))
    for split in ("validation", "test"):
        assert second[split] == pytest.approx(first[split], abs=1e-6)
    assert [row["step"] for row in second["curve"]] == [row["step"] for row in first["curve"]]


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_and_no_process(long: Recipe, tmp_path: Path) -> None:
    class Interrupted(LocalProcesses):
        def wait(self) -> list[tuple[Run, dict[str, Any]]]:
            until(lambda: has_checkpoint(tmp_path))
            self.seen = list(self.pending)
            raise KeyboardInterrupt

    engine = Interrupted(1)
    found = plan("long", long, Options(methods=["psoft:lr=[2e-2]"], seeds=1), tmp_path / "comparison")
    with pytest.raises(KeyboardInterrupt):
        carry_out(found, engine)
    assert [process.exitcode for process in engine.seen] == [128 + signal.SIGINT]
    assert has_checkpoint(tmp_path)
    assert records_of(found.folder) == {}


@pytest.mark.slow
def test_the_command_compares_and_shows_what_is_done(finished: Path, small: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(small))
    found = plan(str(path), validate(small), Options(methods=["psoft"], lr_search=1, seeds=1), tmp_path / "out")
    carry_out(found, Fake(scored(lambda spec: spec.lr, lambda spec: 0.25)))
    command = [
        "compare",
        str(path),
        "--methods",
        "psoft",
        "--lr-search",
        "1",
        "--seeds",
        "1",
        "-o",
        str(tmp_path / "out"),
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "1 run, 1 of them done" in done.stderr
    assert "25.0 %" in done.stdout
    wrong = CliRunner().invoke(app, [*command[:3], "psfot", *command[4:]])
    assert wrong.exit_code == 2
    assert "did you mean 'psoft'?" in wrong.output


@pytest.fixture
def ray_engine() -> Iterator[RayTasks]:
    pytest.importorskip("ray")
    engine = RayTasks(2, 1)
    yield engine
    engine.close()


@pytest.mark.slow
def test_ray_gives_the_same_records(
    finished: Path, small: dict[str, Any], tmp_path: Path, ray_engine: RayTasks
) -> None:
    options = Options(methods=("psoft:lr=[1e-2]", "lora:r=2+lr=[1e36]"), seeds=1)
    found = plan("small", validate(small), options, tmp_path / "comparison")
    carry_out(found, ray_engine)
    local = {
        (record["method"]["name"], record["lr"], record["seed"]): record for record in records_of(finished).values()
    }
    records = list(records_of(found.folder).values())
    assert [record["method"]["name"] for record in records] == ["lora", "psoft"]
    for record in records:
        other = local[record["method"]["name"], record["lr"], record["seed"]]
        if "failed" in record:
            # The rest of the message names the folder of the last checkpoint.
            assert record["failed"].split(";")[0] == other["failed"].split(";")[0]
        else:
            assert {**comparable(record), "label": ""} == {**comparable(other), "label": ""}
