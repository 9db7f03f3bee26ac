"""The geometry of a trained model as its run's record keeps it."""

from __future__ import annotations

import json
import math
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from helpers import adapt, layers_of, psoft, randomize, tiny_bert, tiny_gpt2
from isotune import BOFTConfig, HRAConfig, OFTConfig, get_peft_model
from isotune.diagnostics.geometry import MAX_ROWS
from isotune.experiments.angles import MAP_ROWS, adapter_geometry
from isotune.experiments.files import write_json

TARGETS = ["query", "value", "intermediate.dense"]


def measured(model: nn.Module) -> dict[str, Any]:
    found = adapter_geometry(model)
    assert found is not None
    return found


def angles_between(rows: Tensor) -> Tensor:
    """Degrees, by the cosine of each pair alone."""
    count = len(rows)
    angles = torch.zeros(count, count, dtype=torch.float64)
    for i in range(count):
        for j in range(count):
            if i != j:
                angles[i, j] = nn.functional.cosine_similarity(rows[i], rows[j], dim=0).clamp(-1, 1).arccos().rad2deg()
    return angles


def test_strict_keeps_angles_and_norms_and_relaxed_moves_them() -> None:
    strict = measured(adapt(tiny_bert(), target_modules=TARGETS, psoft_mag_a=False, psoft_mag_b=False))
    relaxed = measured(adapt(tiny_bert(), target_modules=TARGETS))
    assert (strict["strict"], relaxed["strict"]) == (True, False)
    assert strict["subspaces"]
    for row in strict["layers"]:
        assert math.radians(row["angles_moved"]["largest"]) <= 1e-5
        assert row["norms_moved"]["largest"] <= 1e-5
        assert row["orthogonality_error"] <= 1e-5
        assert row["rotation"]["largest"] > 1
    assert max(row["angles_moved"]["largest"] for row in relaxed["layers"]) > 1
    assert max(row["norms_moved"]["largest"] for row in relaxed["layers"]) > 0.01
    for found, still in ((strict, True), (relaxed, False)):
        for shown in found["heat_maps"]:
            assert len(shown["before"]) == len(shown["after"]) == MAP_ROWS * (MAP_ROWS - 1) // 2
            moved = max(abs(a - b) for a, b in zip(shown["before"], shown["after"], strict=True))
            assert (moved <= 1.001e-3) == still  # three decimals of a degree


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.slow
def test_numbers_are_those_of_the_full_matrices(merged: bool) -> None:
    model = adapt(tiny_bert(), target_modules=["query", "value"], ab_svd_init="pissa_init")
    expected = {layer.key: layer for layer in layers_of(model)}
    deltas = {key: layer.get_delta_weight("default").double() for key, layer in expected.items()}
    weights = {key: layer.unmerged_matrix().double() for key, layer in expected.items()}
    if merged:
        model.merge_adapter()
    found = measured(model)
    assert [row["module"] for row in found["layers"]] == list(expected)
    for row in found["layers"]:
        operator: Any = expected[row["module"]].adapter("default")
        weight, rank = weights[row["module"]], operator.size
        right = torch.linalg.svd(weight).Vh[:rank]
        before = weight @ right.T @ right
        after = before + deltas[row["module"]]
        moved = (angles_between(after) - angles_between(before)).abs()
        assert len(weight) <= MAX_ROWS
        assert row["angles_moved"]["largest"] == pytest.approx(float(moved.max()), rel=2e-3)
        assert row["angles_moved"]["mean"] == pytest.approx(float(moved.sum()) / (64 * 63), rel=2e-3)
        change = (after.norm(dim=1) / before.norm(dim=1) - 1).abs()
        assert row["norms_moved"]["largest"] == pytest.approx(float(change.max()), rel=2e-3)
        assert row["norms_moved"]["mean"] == pytest.approx(float(change.mean()), rel=2e-3)
        rotation = operator.evaluate({"generator": operator.generator})[0].detach().double() + torch.eye(rank)
        angles = torch.linalg.eigvals(rotation).angle().abs().rad2deg()
        assert row["rotation"]["largest"] == pytest.approx(float(angles.max()), rel=1e-3)
        assert row["rotation"]["mean"] == pytest.approx(float(angles.mean()), rel=1e-3)
        assert row["rotation"]["quantiles"][2] == pytest.approx(float(angles.quantile(0.5)), rel=1e-3, abs=1e-3)
        for shown in found["heat_maps"]:
            if shown["module"] == row["module"]:
                table = angles_between(after[shown["rows"]])
                pairs = [float(table[i, j]) for i in range(len(table)) for j in range(i + 1, len(table))]
                assert shown["after"] == pytest.approx(pairs, abs=0.02)
    worst = max(found["layers"], key=lambda row: row["angles_moved"]["largest"])
    assert found["heat_maps"][0]["module"] == worst["module"]


@pytest.mark.parametrize(
    "config",
    [OFTConfig(oft_block_size=8, module_dropout=0.5), BOFTConfig(boft_block_size=4), HRAConfig(r=4)],
    ids=lambda value: type(value).__name__,
)
def test_rotations_of_all_inputs_turn_the_whole_weight(config: Any) -> None:
    config.target_modules = ["c_attn"]
    model = get_peft_model(tiny_gpt2(), config)
    randomize(model, std=0.2)
    model.train()  # dropout must not get into what is measured
    found = measured(model)
    assert not found["subspaces"]
    assert all(layer.adapter("default").training for layer in layers_of(model))
    model.eval()
    for row, layer in zip(found["layers"], layers_of(model), strict=True):
        matrix = layer.adapter("default").matrix().detach().double()
        angles = torch.linalg.eigvals(matrix).angle().abs().rad2deg()
        assert row["size"] == 64
        assert row["rotation"]["largest"] == pytest.approx(float(angles.max()), rel=1e-3)
        assert row["rotation"]["mean"] == pytest.approx(float(angles.mean()), rel=2e-3)
        # A gain scales outputs, so it changes norms and no angle.
        assert math.radians(row["angles_moved"]["largest"]) < 2e-3
    assert found["strict"] == (not isinstance(config, BOFTConfig))


def test_a_free_matrix_has_no_angles_and_other_models_no_geometry(tmp_path: Any) -> None:
    free = measured(adapt(tiny_bert(), psoft(target_modules=TARGETS, psoft_orth=False)))
    assert all(row["rotation"] is None and row["orthogonality_error"] > 1e-2 for row in free["layers"])
    assert not free["strict"]
    write_json(tmp_path / "a.json", free)
    assert json.loads((tmp_path / "a.json").read_text()) == free
    assert adapter_geometry(tiny_bert()) is None
    lora = peft.get_peft_model(tiny_bert(), peft.LoraConfig(r=2, target_modules=["query"]))
    assert adapter_geometry(lora) is None
