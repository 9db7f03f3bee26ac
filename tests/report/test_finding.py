"""The sentence of a report: results whose right sentence is known, and the quantiles that it is judged by."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from isotune.experiments.outcome import MethodResult, method_result
from isotune.experiments.records import Record
from isotune.report.finding import finding, share
from isotune.report.results import Comparison

HEAD = ("head", (0.700, 0.701, 0.699), 0)
LORA = ("lora:r=8", (0.800, 0.803, 0.797), 331_776)
OFT = ("oft:oft_block_size=32", (0.830, 0.834, 0.829), 321_408)
PISSA = ("pissa:r=8", (0.824, 0.830, 0.827), 331_776)
PSOFT = ("psoft:r=46", (0.802, 0.799, 0.801), 40_572)
GOFT = ("goft", (0.750, 0.752, 0.747), 20_700)


def method(label: str, scores: Sequence[float], parameters: int | None, metric: str = "accuracy") -> MethodResult:
    name, _, option = label.partition(":")
    key, _, value = option.partition("=")
    options: dict[str, Any] = {"name": name, **({key: int(value)} if key else {})}
    records = [
        Record(
            label=label, method=options, lr=1e-3, seed=seed, metric=metric, test={metric: score},
            adapter_parameters=parameters, trainable_parameters=None if parameters is None else parameters + 7_700,
        )
        for seed, score in enumerate(scores)
    ]  # fmt: skip
    failed = None if scores else "out of memory"
    return method_result(label, records, method=options, lr=1e-3, failed=failed)


def comparison(*methods: tuple[str, Sequence[float], int | None], metric: str = "accuracy") -> Comparison:
    variants = [method(*one, metric) for one in methods]
    return Comparison(
        folder=Path("x"), recipe="demo", task="text-classification", model="m", metric=metric,
        higher_is_better=metric != "loss", seeds=(0, 1, 2), command="", data={"test": 566}, match_params=None,
        variants=variants, runs=[run for v in variants for run in v.runs], chosen_by=metric,
    )  # fmt: skip


def sentence(*methods: tuple[str, Sequence[float], int | None], metric: str = "accuracy") -> str:
    found = finding(comparison(*methods, metric=metric))
    assert found is not None
    return found.sentence


def shifted(about: tuple[str, Sequence[float], int | None], by: float) -> tuple[str, list[float], int | None]:
    return about[0], [score + by for score in about[1]], about[2]


def test_who_beats_lora_at_its_size_and_the_smallest_that_matches_it() -> None:
    assert sentence(HEAD, LORA, OFT, PISSA, PSOFT, GOFT) == (
        "OFT and PiSSA beat LoRA at its size; PSOFT matches LoRA with an eighth of its parameters."
    )


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        (0.05, "PSOFT beats LoRA with an eighth of its parameters."),
        (0.0, "PSOFT matches LoRA with an eighth of its parameters."),
        (-0.05, "LoRA does best; the next, PSOFT, is 4.9 points worse."),
    ],
)
def test_better_equal_and_worse(by: float, expected: str) -> None:
    assert sentence(LORA, shifted(PSOFT, by)) == expected
    assert sentence(shifted(PSOFT, by), HEAD, LORA) == expected


def test_less_is_better_where_it_is_a_loss() -> None:
    lora = ("lora:r=8", (1.25, 1.26, 1.255), 1_898_496)
    psoft = ("psoft:r=46", (1.17, 1.18, 1.175), 142_002)
    assert sentence(lora, psoft, metric="loss") == "PSOFT beats LoRA with 7.5 % of its parameters."
    assert sentence(lora, shifted(psoft, 0.2), metric="loss") == "LoRA does best; the next, PSOFT, is 0.120 worse."
    # One percent of a loss of 1.255 is the most by which a match may be worse, and 0.004 above it is less.
    assert sentence(lora, ("psoft:r=46", (1.252, 1.256, 1.254), 142_002), metric="loss").startswith("PSOFT matches")


def test_one_seed_cannot_tell() -> None:
    one = [(label, scores[:1], size) for label, scores, size in (LORA, OFT, PSOFT)]
    found = finding(comparison(*one))
    assert found is not None
    assert found.sentence == "OFT has the highest accuracy (83.0 %), but one seed cannot tell it from the others."
    assert "--seeds 3" in found.basis
    assert sentence(*one[::2]) == (
        "PSOFT has the highest accuracy (80.2 %), but one seed cannot tell it from LoRA (80.0 %)."
    )
    # One method with more seeds does not make up for another with one.
    assert "one seed cannot tell" in sentence(LORA, one[1])


def test_wide_scatter_is_no_match() -> None:
    """The more the seeds scatter, the less may be said: what is open is never called equal."""
    noisy = ("psoft:r=46", (0.77, 0.80, 0.83), 40_572)
    assert sentence(LORA, noisy) == (
        "LoRA has the highest accuracy (80.0 %), but 3 seeds cannot tell it from PSOFT (80.0 %)."
    )
    # The quiet methods beside it do not lend it their small errors.
    assert sentence(LORA, OFT, PISSA, GOFT, noisy) == "OFT and PiSSA beat LoRA at its size."
    # Nor may a match be as bad as the head: it keeps at least half of what LoRA gains.
    head = ("head", (0.797, 0.798, 0.796), 0)
    assert "matches" not in sentence(head, LORA, ("psoft:r=46", (0.797, 0.800, 0.795), 40_572))


def test_failed_methods_and_a_failed_lora_are_left_out() -> None:
    failed = ("lora:r=8", (), None)
    assert sentence(LORA, PSOFT, ("oft:oft_block_size=32", (), None)) == sentence(LORA, PSOFT)
    assert sentence(failed, OFT, GOFT) == "OFT does best; the next, GOFT, is 8.1 points worse."
    assert sentence(failed, OFT, shifted(PSOFT, 0.03)) == "PSOFT matches OFT with an eighth of its parameters."
    assert finding(comparison(failed)) is None


def test_only_one_method() -> None:
    assert sentence(PSOFT) == "PSOFT reaches 80.1 ± 0.1 % with 3 seeds; it was compared with nothing."
    assert sentence(PSOFT, HEAD) == "PSOFT reaches 80.1 %, 10.1 points better than the head alone."
    assert sentence(GOFT, shifted(HEAD, 0.1)) == "GOFT reaches 75.0 %, 5.0 points worse than the head alone."
    assert sentence(("psoft:r=46", (0.8,), 40_572), ("head", (0.7,), 0)) == (
        "PSOFT has the highest accuracy (80.0 %), but one seed cannot tell it from head only (70.0 %)."
    )
    assert sentence(HEAD).startswith("head only reaches 70.0 ± 0.1 %")


def test_several_of_one_method_have_their_sizes_in_their_names() -> None:
    small = ("psoft:r=8", PSOFT[1], 1_584)
    assert sentence(LORA, PSOFT, small) == "PSOFT r=8 matches LoRA with 0.48 % of its parameters."


def test_without_parameters_no_size_is_named() -> None:
    bare = [(label, scores, None) for label, scores, _ in (LORA, OFT)]
    assert sentence(*bare) == "OFT beats LoRA."
    assert sentence(LORA, ("full", (0.9, 0.9, 0.9), 22_000_000), PSOFT) == sentence(LORA, PSOFT)


def test_the_basis_names_what_the_sentence_stands_on() -> None:
    found = finding(comparison(HEAD, LORA, PSOFT))
    assert found is not None
    assert found.basis == (
        "With 95 % confidence over the seeds, on these 566 test examples. To match means to be at most 1.0 point worse."
    )
    large = finding(dataclasses.replace(comparison(LORA, OFT), data={}))
    assert large is not None
    assert large.basis == "With 95 % confidence over the seeds, on these test examples."


@pytest.mark.parametrize(
    ("part", "words"),
    [(1 / 2, "half of"), (1 / 8.18, "an eighth of"), (0.1, "a tenth of"), (0.6, "60 % of"), (1 / 30, "3.3 % of"),
     (1.5, "1.5 times"), (12, "12 times"), (99.7, "100 times"), (68_000, "68,000 times")],
)  # fmt: skip
def test_shares_are_words_where_they_are_near(part: float, words: str) -> None:
    assert share(part) == words


def test_scipy_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ValueError, match=r"needs scipy: pip install '.*\[report\]'"):
        sentence(PSOFT, LORA)
