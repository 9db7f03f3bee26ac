"""The numbers, the table, the JSON and the picture of `isotune inspect`."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification
from typer.testing import CliRunner

import isotune_cli as cli
from helpers import DROPOUT, LORA, Chain, as_trained, layers_of, randomize
from isotune import (
    BOFTConfig,
    GOFTConfig,
    HRAConfig,
    OFTConfig,
    PeftModel,
    PsoftConfig,
    QGOFTConfig,
    get_peft_model,
)
from isotune.diagnostics.inspect import inspect
from isotune.errors import AdapterFileError, BaseMismatchError
from isotune.methods.rotation import RotationConfig
from isotune.report.adapter import SHORTENED, save_png, to_text

CONFIG = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=40)


def bert(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return BertForSequenceClassification(CONFIG).eval()


def make(folder: Path, *, named: bool = True, **options: object) -> PeftModel:
    """A trained-looking adapter at folder/adapter on a base at folder/base."""
    bert().save_pretrained(folder / "base")
    base = BertForSequenceClassification.from_pretrained(folder / "base") if named else bert()
    arguments = {"r": 4, "target_modules": ["query", "intermediate.dense"], "task_type": "SEQ_CLS", **options}
    model = get_peft_model(base, PsoftConfig(init_weights=False, **arguments))
    model.save_pretrained(folder / "adapter")
    return model


@pytest.mark.parametrize("options", [{}, {"ab_svd_init": "pissa_init"}, {"basis": "embedded", "psoft_orth": False}])
def test_numbers_are_those_of_the_full_matrices(options: dict[str, object], tmp_path: Path) -> None:
    model = make(tmp_path, **options)
    report = inspect(tmp_path / "adapter")
    assert report.base == str(tmp_path / "base")
    assert len(report.layers) == 4
    for row in report.layers:
        layer = model.get_submodule(f"base_model.model.{row.module}")
        weight, delta = layer.base_layer.weight.double(), layer.get_delta_weight("default").double()
        _, spectrum, right = torch.linalg.svd(weight)
        basis = right[:4]
        assert row.energy == pytest.approx(float(spectrum[:4].square().sum() / spectrum.square().sum()), rel=1e-4)
        assert row.update_norm == pytest.approx(float(delta.norm()), rel=1e-5)
        assert row.relative_norm == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-5)
        values = torch.linalg.svdvals(delta)
        assert row.stable_rank == pytest.approx(float((values.norm() / values[0]) ** 2), rel=1e-4)
        shares = values[:4].square() / values.square().sum()
        assert row.entropy_rank == pytest.approx(math.exp(-float((shares * shares.log()).sum())), rel=1e-4)
        principal = weight @ basis.T @ basis
        angles = [torch.corrcoef(torch.cat([m, -m], 1)).clamp(-1, 1).arccos() for m in (principal, principal + delta)]
        moved = (angles[1] - angles[0]).fill_diagonal_(0).abs().rad2deg()
        assert row.angle_moved_largest == pytest.approx(float(moved.max()), rel=1e-3)
        assert row.angle_moved_mean == pytest.approx(float(moved.sum()) / (len(moved) * (len(moved) - 1)), rel=1e-3)
        assert row.base_residual is not None
        assert row.base_residual < 1e-4
        scale = layer.isotune_operator["default"].input_scale.detach()
        assert row.alpha == pytest.approx((float(scale.min()), float(scale.max())))
        if options.get("psoft_orth", True):
            assert row.orthogonality_error < 1e-5
            assert 1 < (row.largest_angle or 0) < 180
        else:
            assert row.orthogonality_error > 1e-2
            assert row.largest_angle is None


def test_strict_rotation_moves_no_angle(tmp_path: Path) -> None:
    make(tmp_path, psoft_mag_a=False, psoft_mag_b=False)
    for row in inspect(tmp_path / "adapter").layers:
        assert row.alpha is row.beta is None
        assert (row.angle_moved_largest or 1) < 1e-3
        assert (row.largest_angle or 0) > 1


@pytest.mark.slow
def test_without_a_base_the_file_speaks_and_one_line_says_what_is_missing(tmp_path: Path) -> None:
    make(tmp_path, named=False)
    whole = inspect(tmp_path / "adapter", bert())
    report = inspect(tmp_path / "adapter")
    assert report.base is None
    for row, full in zip(report.layers, whole.layers, strict=True):
        assert (row.rank, row.orthogonality_error, row.largest_angle) == (
            full.rank,
            full.orthogonality_error,
            full.largest_angle,
        )
        assert (row.alpha, row.beta) == (full.alpha, full.beta)
        assert row.energy is None
    text = to_text(report)
    assert sum("--base MODEL" in line for line in text.splitlines()) == 1
    assert "energy\n" not in text
    assert "--base" not in to_text(whole)
    save_png(report, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_table_is_aligned_and_ends_with_the_summary(tmp_path: Path) -> None:
    make(tmp_path, rank_pattern={"query": 3})
    report = inspect(tmp_path / "adapter")
    lines = to_text(report).splitlines()
    rows = [line for line in lines if line.lstrip().startswith(("0.", "1."))]
    assert len(rows) == 4
    assert len({len(line) for line in rows}) == 1
    assert lines[-1] == report.summary()
    assert "4 layers of rank 3 to 4" in lines[-1]
    assert f"{report.parameters:,} trainable parameters" in lines[-1]
    assert report.parameters == 2 * (3 + 3 + 3) + 2 * (6 + 4 + 4)


@pytest.mark.slow
def test_command_prints_json_and_draws(tmp_path: Path) -> None:
    make(tmp_path)
    png = tmp_path / "a.png"
    arguments = ["inspect", str(tmp_path / "adapter"), "--base", str(tmp_path / "base"), "--png", str(png), "--json"]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    content = json.loads(done.stdout)
    assert content["missing"] is None
    assert content["layers"][0]["rank"] == 4
    import matplotlib.image

    picture = matplotlib.image.imread(png)
    assert picture.shape[0] > 400
    assert picture.shape[1] > 800
    assert len({tuple(pixel) for pixel in picture[::5, ::5].reshape(-1, picture.shape[2]).tolist()}) > 10
    # A picture that cannot be written takes nothing from what was found.
    (tmp_path / "file").touch()
    done = CliRunner().invoke(cli.app, [*arguments[:-2], str(tmp_path / "file" / "a.png"), "--json"])
    assert (done.exit_code, json.loads(done.stdout)) == (1, content)
    assert done.stderr.splitlines()[-1] == f"error: cannot read or write {tmp_path}/file: File exists"
    done = CliRunner().invoke(cli.app, [*arguments[:-2], str(tmp_path / "new" / "a.png")])
    assert done.exit_code == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]
    # A folder that holds the adapter is enough, and of several the names are said.
    done = CliRunner().invoke(cli.app, ["inspect", str(tmp_path)])
    assert done.exit_code == 0
    assert "energy" in done.stdout
    shutil.copytree(tmp_path / "adapter", tmp_path / "other")
    done = CliRunner().invoke(cli.app, ["inspect", str(tmp_path)])
    assert done.exit_code == 2
    assert f"holds 2 adapters; give the folder of one: {tmp_path}/adapter, {tmp_path}/other" in done.stderr


def test_the_short_table_has_the_layers_that_were_turned_farthest(tmp_path: Path) -> None:
    make(tmp_path)
    report = inspect(tmp_path / "adapter", str(tmp_path / "base"))
    angles = [layer.largest_angle for layer in report.layers]
    assert angles != sorted(angles, reverse=True)
    many = dataclasses.replace(report, layers=[*report.layers * 9])
    short = to_text(many, everything=False).splitlines()
    end = short.index(f"{len(many.layers) - SHORTENED} more layers; all of them, with every column: --all")
    shown = [line.split() for line in short[:end] if line.split() and line.split()[-1][0].isdigit()]
    assert len(shown) == SHORTENED
    assert [f"{max(angles):.1f}" in cells for cells in shown[:9]] == [True] * 9
    assert max(map(len, short[:end])) <= 100
    assert len(to_text(many).splitlines()) > len(many.layers)
    assert "more layers" not in to_text(report, everything=False)


@pytest.mark.parametrize("method", [name for name in DROPOUT if name != LORA])
def test_dropout_of_an_operator_changes_no_number(method: str, tmp_path: Path) -> None:
    """Whatever mode the base is in, and the layers that the file is read into are new ones."""
    as_trained(method, **DROPOUT[method]).save_pretrained(tmp_path)
    dropping = [inspect(tmp_path, base).layers for base in (None, None, Chain().train(), Chain().train())]
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **dict.fromkeys(DROPOUT[method], 0.0)}))
    assert dropping[0] == dropping[1] == inspect(tmp_path).layers
    assert dropping[2] == dropping[3] == inspect(tmp_path, Chain().eval()).layers
    assert all(layer.update_norm for layer in dropping[2])


def test_refusals(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(BaseMismatchError):
        inspect(tmp_path / "adapter", bert(seed=1))
    with pytest.raises(AdapterFileError):
        inspect(tmp_path / "base")
    with pytest.raises(ValueError, match="no folder"):
        inspect(tmp_path / "adapter", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="not installed"):
        inspect(tmp_path / "adapter", "package:no_such_package_here")
    with pytest.raises(ValueError, match="carries no model"):
        inspect(tmp_path / "adapter", "package:json")
    with pytest.raises(ValueError, match=r"\.png"):
        save_png(inspect(tmp_path / "adapter"), tmp_path / "a.svg")


@pytest.mark.parametrize(
    ("config", "free"),
    [
        (OFTConfig(oft_block_size=8), False),
        (BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2), False),
        (GOFTConfig(), False),
        (QGOFTConfig(), True),
        (HRAConfig(r=4), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_rotations_of_all_inputs(config: RotationConfig, free: bool, tmp_path: Path) -> None:
    base = bert()
    config.target_modules = ["query", "dense"]
    config.exclude_modules = ["classifier"]
    model = get_peft_model(base, config)
    randomize(model, std=0.2)
    model.save_pretrained(str(tmp_path))
    alone, report = inspect(tmp_path), inspect(tmp_path, bert())
    layers = dict(zip([layer.key for layer in layers_of(model)], layers_of(model), strict=True))
    assert len(report.layers) == len(layers) == len(alone.layers)
    for found in report.layers:
        layer = layers[found.module]
        matrix = layer.adapter("default").matrix().detach()
        angle = float(torch.linalg.eigvals(matrix.double()).angle().abs().max())
        assert (found.orthogonality_error > 1e-3) == free
        if not free:
            assert found.largest_angle == pytest.approx(math.degrees(angle), rel=1e-3, abs=1e-2)
        delta = layer.get_delta_weight("default")
        assert found.update_norm == pytest.approx(float(delta.norm()), rel=1e-4)
        assert found.energy is None
        if not free and layer.adapter("default").gain is None:
            assert found.angle_moved_largest == pytest.approx(0.0, abs=0.1)
    assert "width" in report.summary()
    assert all(layer.update_norm is None for layer in alone.layers)
    assert "width" in alone.summary()


def test_a_picture_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_trained("oft", nn.Sequential(nn.Linear(12, 12)), "0").save_pretrained(tmp_path / "adapter")
    report = inspect(tmp_path / "adapter", nn.Sequential(nn.Linear(12, 12)))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"needs matplotlib: pip install .*\[report\]"):
        save_png(report, tmp_path / "a.png")
