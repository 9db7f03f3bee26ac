"""A method says all about itself: one that is new in the registry is known everywhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from comparisons import METHODS as MADE_UP
from comparisons import write_comparison
from isotune.experiments import budget, registry
from isotune.experiments.compare import Options, parse
from isotune.experiments.methods import adapter_config
from isotune.experiments.planning.setting import Setting
from isotune.experiments.recipe import Method, RecipeError, validate
from isotune.methods import METHODS, PsoftConfig
from isotune.report.figures import Looks, sections
from isotune.report.results import read


@dataclass
class StretchConfig(PsoftConfig):
    """A toy method, sized by an option of its own."""

    title, usual_learning_rate = "Stretch", 3e-3
    size_names, size_step = {"width": "w"}, 4
    presets = {"stretch_so": ("Stretch-SO", {"psoft_mag_a": False})}  # noqa: RUF012

    width: int = field(default=8)


@pytest.fixture(autouse=True)
def stretch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "stretch", StretchConfig)


def test_a_new_method_is_known_to_recipes_searches_and_budgets(tiny: dict[str, Any]) -> None:
    recipe = validate({**tiny, "method": {"name": "stretch", "width": 8}})
    assert parse("stretch", recipe, Options(lr_search=1)).rates == (3e-3,)
    assert parse("stretch_so", recipe, Options(lr_search=1)).rates == (3e-3,)
    config = adapter_config("stretch_so", width=16)
    assert (type(config), config.width, config.psoft_mag_a) == (StretchConfig, 16, False)
    found = budget.match(Method(name="stretch"), 800, lambda method: 10 * method.options["width"])
    assert found.options == {"width": 80}
    assert Setting("m", "stretch").method == "stretch"
    with pytest.raises(RecipeError, match=r"'stretch', 'stretch_so'.*did you mean 'stretch'\?"):
        validate({**tiny, "method": "strech"})


def test_a_new_method_is_named_and_sized_in_reports(tmp_path: Path) -> None:
    labels = ("stretch:width=8", "stretch:width=16", "stretch_so:width=8")
    found = read(write_comparison(tmp_path, methods=dict.fromkeys(labels, MADE_UP["psoft:r=46"])))
    assert [variant.title for variant in found.variants] == ["Stretch w=8", "Stretch w=16", "Stretch-SO w=8"]
    ranks = next(section for section in sections(found, Looks([found])) if section.key == "ranks")
    assert ranks.figures[0].data[0]["x"] == [8, 16]


def test_every_method_of_the_package_says_its_title_rate_and_size() -> None:
    found = registry.entries()
    assert {*METHODS} <= {*found}
    titles = [entry.title for entry in found.values()]
    assert len(set(titles)) == len(titles)
    assert all(entry.usual_learning_rate > 0 for entry in found.values())
    assert {name for name, entry in found.items() if entry.size_option is None} == {
        "goft",
        "qgoft",
        "road",
        "uora",
        "vera",
        "head",
        "full",
    }
    assert found["psoft_so"].fixed == {"psoft_mag_a": False, "psoft_mag_b": False}


def test_only_a_head_and_full_fine_tuning_are_no_adapters() -> None:
    """A method that is not known here, as in another release's record, is one."""
    assert [name for name in registry.entries() if registry.is_plain(name)] == ["head", "full"]
    assert not registry.is_plain("lily")
