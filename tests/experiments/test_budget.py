"""The size that brings an adapter nearest to a number of parameters."""

from __future__ import annotations

from pathlib import Path

import pytest

from isotune.experiments import budget, methods, models, registry
from isotune.experiments.budget import match
from isotune.experiments.loop import is_head
from isotune.experiments.recipe import Method


def quadratic(method: Method) -> int:
    size = method.options["r"]
    return 10 * size * (size - 1) // 2 + 20 * size


@pytest.mark.parametrize(("target", "rank"), [(1, 1), (50, 2), (59, 2), (60, 2), (61, 2), (71, 3), (20_000, 62)])
def test_the_nearest_rank_is_found(target: int, rank: int) -> None:
    found = match(Method(name="psoft"), target, quadratic).options["r"]
    assert found == min(range(1, 200), key=lambda r: abs(quadratic(Method(name="psoft", r=r)) - target)) == rank


def test_a_given_size_stays_and_what_has_none_is_left() -> None:
    for method in (Method(name="psoft", r=3), Method(name="goft"), Method(name="vera"), Method(name="full")):
        assert match(method, 1000, lambda m: pytest.fail("nothing is to be counted")) == method


def test_sizes_that_do_not_fit_are_passed_over() -> None:
    def count(method: Method) -> int:
        size = method.options["oft_block_size"]
        if 48 % size:
            raise ValueError("does not divide")
        return 48 * (size - 1) // 2

    assert match(Method(name="oft"), 100, count).options == {"oft_block_size": 6}
    assert match(Method(name="oft"), 10**9, count).options == {"oft_block_size": 48}
    # Where nothing fits the run itself will say why.
    assert match(Method(name="oft"), 100, lambda m: count(Method(name="oft", oft_block_size=7))).options == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", [e.name for e in registry.entries().values() if e.size_option])
def test_the_count_is_that_of_the_trained_model(tiny_model: Path, name: str) -> None:
    model, head = models.load_classifier(str(tiny_model), "auto", ["a", "b"])
    found = match(Method(name=name), 1500, budget.counter(model, head, "SEQ_CLS"))
    assert set(found.options) == {registry.entry(name).size_option}
    counted = budget.counter(model, head, "SEQ_CLS")(found)
    model, head = models.load_classifier(str(tiny_model), "auto", ["a", "b"])
    trained = methods.attach(found, model, head, "SEQ_CLS")
    assert counted == sum(p.numel() for n, p in trained.named_parameters() if p.requires_grad and not is_head(n, head))
    most = 384  # of SVFit, with a number for every singular value
    assert counted == most if name == "svfit" else 700 < counted < 3200
