"""What several test files share: tiny models, ways to look into an adapted model, and plain-torch references."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftConfig
from peft.utils import save_and_load
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.integrations.peft import MIN_PEFT_VERSION

from isotune import PsoftConfig, get_peft_model
from isotune.adapter.lowrank import ComplementAdapter
from isotune.adapter.restarting import RestartingAdapter
from isotune.adapter.shared import SharedAdapter
from isotune.methods import METHODS
from isotune.methods.rotation import RotationConfig
from isotune.tuner.layer import Layer

transformers_takes_peft = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION)
    or not hasattr(save_and_load, "_maybe_shard_state_dict_for_tp"),
    reason="transformers' own add_adapter and load_adapter ask for a later PEFT; see docs/internals.md",
)
has_pefts_psoft = pytest.mark.skipif(not hasattr(peft, "PsoftConfig"), reason="PEFT has PSOFT from 0.19 on")


QUICK = os.environ.get("ISOTUNE_TESTS", "all") == "quick"
"""Whether this run is `make quick`: few random examples a property, and gradients checked along random directions."""
PROCESSES = (2, 4) if os.environ.get("ISOTUNE_TESTS") == "product" else (2,)
"""Numbers of processes; four on two cores take minutes, so that `make product` alone runs them."""

VOCABULARY = 96
WORDS = [f"w{i}" for i in range(VOCABULARY - 4)]
TARGETS = {
    "opt": ["q_proj", "v_proj"],
    "llama": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "bert": ["query", "value"],
}


def _seeded(build: Callable[[], nn.Module], dtype: torch.dtype, scale: float = 4.0) -> nn.Module:
    state = torch.get_rng_state()
    torch.manual_seed(1234)
    model = build()
    torch.set_rng_state(state)
    with torch.no_grad():
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 2 and not weight.is_meta:
                weight.mul_(scale)  # the usual 0.02 makes every layer a small perturbation, which hides errors
    return model.to(dtype).eval()


def tiny_opt(dtype: torch.dtype = torch.float32, layers: int = 2, **options: Any) -> nn.Module:
    """An OPT of width 64."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        word_embed_proj_dim=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        ffn_dim=112,
        max_position_embeddings=64,
        dropout=0.0,
        attention_dropout=0.0,
        **options,
    )
    return _seeded(lambda: OPTForCausalLM(config), dtype)


def tiny_llama(dtype: torch.dtype = torch.float32, layers: int = 2, **options: Any) -> nn.Module:
    """A Llama of width 64 with grouped key-value heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 112,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            **options,
        }
    )
    return _seeded(lambda: LlamaForCausalLM(config), dtype)


def tiny_gpt2(dtype: torch.dtype = torch.float32, layers: int = 2, **options: Any) -> nn.Module:
    """A GPT-2 of width 64, whose linear layers are transposed Conv1D."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_layer=layers,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **options,
    )
    return _seeded(lambda: GPT2LMHeadModel(config), dtype)


def tiny_bert(dtype: torch.dtype = torch.float32, layers: int = 2, **options: Any) -> nn.Module:
    """A BERT classifier of width 64."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **options,
    )
    return _seeded(lambda: BertForSequenceClassification(config), dtype)


def tiny_unet(seed: int = 0, **options: Any) -> Any:
    """A random UNet of diffusers with one block of cross attention on each side; equal seeds give equal weights."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
    }
    sizes = {"sample_size": 8, "cross_attention_dim": 32, "attention_head_dim": 8, "norm_num_groups": 8}
    return UNet2DConditionModel(**{**blocks, **sizes, **options}).eval()


def tiny_text_encoder(projected: bool = False) -> Any:
    """A random text encoder of CLIP with two layers, with a projection as the second one of SDXL has it."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(CLIPTextConfig(vocab_size=40, **sizes)).eval()


INNER_ATTENTION = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
"""Options of `tiny_unet` with the cross attention in the inner blocks, as SDXL has it."""

FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "opt": tiny_opt,
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "bert": tiny_bert,
}


def make_tokenizer(words: Sequence[str] = WORDS) -> Any:
    """A word-level tokenizer over as many words as WORDS."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def some_tokens(batch: int = 2, length: int = 7, seed: int = 5) -> Tensor:
    """Token indices without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCABULARY, (batch, length), generator=generator)


class Stack(nn.Module):
    """Three linear layers of different shapes, two of them of one rank in most tests."""

    def __init__(self, width: int = 24, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(width, 40, bias=bias, dtype=dtype)
        self.second = nn.Linear(40, 32, bias=bias, dtype=dtype)
        self.third = nn.Linear(32, width, bias=bias, dtype=dtype)
        self.skip: set[str] = set()
        self.repeat: set[str] = set()

    def forward(self, x: Tensor) -> Tensor:
        for name in ("first", "second", "third"):
            layer = getattr(self, name)
            base = getattr(layer, "base_layer", layer)
            y = torch.nn.functional.linear(x, base.weight, base.bias) if name in self.skip else layer(x)
            if name in self.repeat:
                y = y + layer(x * 0.5)
            x = torch.tanh(y)
        return x


def psoft(**options: Any) -> PsoftConfig:
    """A configuration that starts at a random operator, unless told otherwise."""
    return PsoftConfig(**{"r": 8, "init_weights": False, **options})


def adapt(model: nn.Module, config: PsoftConfig | None = None, **options: Any) -> Any:
    """An adapted model in evaluation mode; `options` are the configuration's."""
    return get_peft_model(model, config or psoft(**options)).eval()


def adapted_stack(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A Stack with random operators on all its layers."""
    options.setdefault("target_modules", ["first", "second", "third"])
    return adapt(Stack(dtype=dtype), **options)


def layers_of(model: nn.Module) -> list[Layer]:
    """Every isotune layer, in order."""
    return [module for module in model.modules() if isinstance(module, Layer)]


def down_of(layer: Layer, adapter: str = "default") -> Tensor:
    """The factor of a subspace update that reads the input, (r, in), without its filling."""
    own = layer.adapter(adapter)
    return own.placement.down[..., : own.basis_rank, :]


def up_of(layer: Layer, adapter: str = "default") -> Tensor:
    """The factor that writes the output, (out, r), times the scale, without its filling."""
    own = layer.adapter(adapter)
    return own.placement.up[..., : own.size] * own.scale


def randomize(model: nn.Module, adapter: str = "default", std: float = 0.1, seed: int = 7) -> None:
    """Move every operator of an adapter away from where it is, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers_of(model):
            if adapter in layer.isotune_operator:
                for parameter in layer.adapter(adapter).parameters():
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.add_((std * noise).to(parameter))


def _alone(operator: nn.Module, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    half = (torch.float16, torch.bfloat16)
    parameters = {name: p.float() if p.dtype in half else p for name, p in operator.named_parameters()}
    with torch.autocast("cpu", enabled=False):
        result = operator.evaluate(parameters)
    evaluated = result if dtype is None else tuple(tensor.to(dtype) for tensor in result)
    return (*evaluated, *(getattr(operator, name) for name in operator.beside))


def one_by_one(model: nn.Module) -> nn.Module:
    """A copy whose operators are computed each for itself, at every call: slow, and never stale."""
    twin = copy.deepcopy(model)
    for layer in layers_of(twin):
        for operator in layer.isotune_operator.values():
            operator.tensors = functools.partial(_alone, operator)
    return twin


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that an optimizer would be given."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """A copy of each trainable parameter's gradient."""
    return {name: None if p.grad is None else p.grad.clone() for name, p in trainable(model).items()}


def assert_same_gradients(model: nn.Module, reference: nn.Module, tolerance: float = 1e-5) -> None:
    """Equal gradients to `tolerance` of the largest entry; none is the same as zero."""
    ours, theirs = gradients(model), gradients(reference)
    assert ours.keys() == theirs.keys()
    assert any(g is not None and bool(g.any()) for g in theirs.values())
    for name, expected in theirs.items():
        found = ours[name]
        expected = torch.zeros(1) if expected is None else expected
        found = torch.zeros(1) if found is None else found
        limit = tolerance * max(float(expected.abs().max()), 1e-3)
        assert float((found - expected).abs().max()) <= limit, name


def assert_equal_with_gradients(found: Tensor, expected: Tensor, sources: Sequence[Tensor]) -> None:
    """Equal values, and equal gradients of every source, in float64."""
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    weights = torch.randn_like(found)
    gradients = torch.autograd.grad(found, sources, weights)
    for one, other in zip(gradients, torch.autograd.grad(expected, sources, weights), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def assert_all_differ(outputs: dict[str, Tensor]) -> None:
    """No two of these are equal."""
    for (first, one), (second, other) in itertools.combinations(outputs.items(), 2):
        assert (one - other).abs().max() > 1e-6, (first, second)


def assert_gradients_are_right(function: Callable[..., Any], *values: Tensor) -> None:
    """torch's gradcheck in float64, of a random projection of all entries; tests/algebra checks each by itself."""
    assert torch.autograd.gradcheck(function, values, fast_mode=True)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def reference_difference(operator: nn.Module) -> Tensor:
    """M − I of an operator on a subspace by the definition, with a plain inverse; differentiable."""
    if hasattr(operator, "coefficients"):
        return operator.coefficients.T
    if hasattr(operator, "stretch"):
        return torch.diag(operator.stretch)
    if hasattr(operator, "core"):
        return operator.core.T
    size, generator = operator.size, operator.generator
    eye = torch.eye(size, dtype=generator.dtype)
    if operator.orthogonal:
        rows, columns = torch.triu_indices(size, size, offset=1)
        upper = torch.zeros(size, size, dtype=generator.dtype).index_put((rows, columns), generator)
        skew = upper - upper.T
        rotation = (eye + skew) @ torch.linalg.inv(eye - skew)
    else:
        rotation = eye + generator
    if operator.input_scale is not None:
        rotation = torch.diag(operator.input_scale) @ rotation
    if operator.output_scale is not None:
        rotation = rotation @ torch.diag(operator.output_scale)
    return rotation - eye


def reference_update(layer: Layer, adapter: str = "default") -> Tensor:
    """The change of W by the definition s·P(Mᵀ − I)V, from the layer's reader and a plain inverse, (out, in)."""
    operator = layer.adapter(adapter)
    weight = layer.unmerged_matrix().to(torch.promote_types(layer.host.weight.dtype, torch.float32))
    if isinstance(operator, SharedAdapter):
        return reference_shared(operator, weight)
    basis = down_of(layer, adapter).to(weight)
    scale = layer.configs[adapter].scale_of(layer.key)
    if isinstance(operator, ComplementAdapter):
        return scale * reference_complement(operator, weight, basis)
    if isinstance(operator, RestartingAdapter):
        return scale * reference_restarting(operator, weight, basis)
    writer = weight @ basis.T
    if operator.power is None:
        writer = writer / writer.square().sum(0).sqrt()
    elif operator.power:
        writer = writer / basis.square().sum(1)
    return scale * writer @ reference_difference(operator).to(weight).T @ basis


def reference_shared(operator: Any, weight: Tensor) -> Tensor:
    """diag(b) B diag(d) A by the definition, from the adapter's own A and B; differentiable."""
    down, up = operator.matrices(weight.dtype, weight.device)
    return torch.diag(operator.vera_lambda_b.to(weight)) @ up @ torch.diag(operator.vera_lambda_d.to(weight)) @ down


def reference_complement(operator: Any, weight: Tensor, basis: Tensor) -> Tensor:
    """(I − U Uᵀ) B A (I − Vᵀ V) by the definition, with U from a singular value decomposition; differentiable."""
    left = torch.linalg.svd(weight @ basis.T, full_matrices=False).U
    a, b = operator.lora_A.to(weight), operator.lora_B.to(weight)
    a = a @ (torch.eye(weight.shape[1]).to(weight) - basis.T @ basis)
    return (torch.eye(weight.shape[0]).to(weight) - left @ left.T) @ b @ a


def reference_restarting(operator: Any, weight: Tensor, basis: Tensor) -> Tensor:
    """B A, without the part of the weight W Vᵀ V that it started from if that is split off; differentiable."""
    found = operator.lora_B.to(weight) @ operator.lora_A.to(weight)
    if not operator.subtracted:
        return found
    basis = basis / basis.norm(dim=1, keepdim=True)
    return found - weight @ basis.T @ basis


def rotated(operator: Any, matrix: Tensor) -> Tensor:
    """W under a rotation of all inputs or outputs, and its gain, by the definition of the two forms."""
    own = operator.matrix().to(matrix.dtype)
    matrix = own @ matrix if operator.side == "output" else matrix @ own.T
    return matrix if operator.gain is None else operator.gain.to(matrix.dtype)[:, None] * matrix


OPTIONS_FOR_12: dict[str, dict[str, Any]] = {
    "psoft": {"r": 4},
    "oft": {"oft_block_size": 3},
    "boft": {"boft_block_size": 2, "boft_n_butterfly_factor": 2},
    "goft": {},
    "qgoft": {},
    "hra": {"r": 4},
    "lora_xs": {"r": 4},
    "svfit": {"r": 4},
    "cersa": {"r": 4},
    "oplora": {"r": 4, "preserved_rank": 3},
    "rosa": {"r": 4},
    "peso": {"r": 4},
    "uora": {"r": 4, "d_initial": 1.0},
    "road": {"group_size": 4, "side": "input"},
}
"""Options with which each method fits a layer whose W has a multiple of 12 columns."""

OPTIONS_FOR_TINY: dict[str, dict[str, Any]] = {
    "psoft": {"r": 8},
    "oft": {"oft_block_size": 8},
    "boft": {"boft_block_size": 4, "boft_n_butterfly_factor": 3},
    "goft": {},
    "qgoft": {},
    "hra": {"r": 4},
    "lora_xs": {"r": 8},
    "svfit": {"r": 8},
    "cersa": {"r": 8},
    "oplora": {"r": 8, "preserved_rank": 6},
    "rosa": {"r": 8},
    "peso": {"r": 8},
    "uora": {"r": 8, "d_initial": 1.0},
    "road": {"group_size": 8, "side": "input"},
}
"""Options with which each method fits every layer of the tiny models."""

ONE_OF_EACH_FORM = ("psoft", "boft")
"""An update of W, and a rotation of the inputs with a gain of the outputs. What a host alone can get wrong shows under
one method of each form; that every method is right on every host is for test_contract.py."""

EXACT_START: dict[str, dict[str, Any]] = {"lora_xs": {"init_std": 0.0}}
"""Options with which a method that starts next to the identity starts at it."""


class OneLayer(nn.Module):
    """A model of one layer called by name, so that keyword arguments of PEFT reach nobody else."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def only(model: nn.Module) -> Layer:
    """The one adapted layer of a model."""
    (layer,) = layers_of(model)
    return layer


def merged_matrix(
    layer: Layer, names: Sequence[str] = ("default",), update: Callable[[Layer, str], Tensor] = reference_update
) -> Tensor:
    """W with these adapters in this order by the definition of the two forms, (out, in), float32 at least.

    `update` gives the change of W by an additive adapter, in the layout of W or of the layer's weight.
    """
    matrix = layer.unmerged_matrix()
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    for name in names:
        operator = layer.adapter(name)
        if layer.adapter(name).additive:
            change = update(layer, name)
            matrix = matrix + (
                change if change.shape == matrix.shape else layer.host.stored(change).reshape(matrix.shape)
            )
        else:
            matrix = rotated(operator, matrix)
    return matrix


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All of a model that a refused operation must leave alone."""
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "parameters": {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "attributes": set(vars(model)),
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    """The very same modules and parameters, with the same values and flags."""
    after = snapshot(model)
    assert after["modules"] == before["modules"]
    assert after["training"] == before["training"]
    assert after["attributes"] == before["attributes"]
    assert after["parameters"].keys() == before["parameters"].keys()
    for name, (identity, flag, value) in before["parameters"].items():
        assert after["parameters"][name][:2] == (identity, flag), name
        assert torch.equal(after["parameters"][name][2].nan_to_num(7.0), value.nan_to_num(7.0)), name


@contextmanager
def counted(monkeypatch: Any, target: str) -> Iterator[list[Any]]:
    """Count the calls of the function named by a dotted path while keeping what it does."""
    import importlib

    module_name, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError:  # a method of a class
        parent, _, owner = module_name.rpartition(".")
        module = getattr(importlib.import_module(parent), owner)
    original, calls = getattr(module, name), []

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, wrapper)
        yield calls


# -- every method at run time --------------------------------------------------------------------------------------

LORA = "lora"
"""PEFT's LoRA, by which a test tests itself: what LoRA passes is no fault of the test's own."""

_OF_OUTPUTS = "-output"
FORMS = (*METHODS, *(name + _OF_OUTPUTS for name in METHODS if issubclass(METHODS[name], RotationConfig)))
"""All methods, and those that rotate the inputs of a layer as rotations of its outputs, "oft-output"."""


def form_of(form: str) -> tuple[str, dict[str, Any]]:
    """The method of an entry of FORMS, and the option that makes it one."""
    method = form.removesuffix(_OF_OUTPUTS)
    return method, {} if method == form else {"side": "output"}


EVERY_METHOD = (*METHODS, "coft", "oft-output")
"""All methods, OFT with its constraint, which takes a path of its own, and one rotation of outputs."""

_ALIKE = {
    "psoft": ("svfit",),
    "lora_xs": ("cersa",),
    "oft": ("coft",),
    "goft": ("qgoft",),
    "rosa": ("peso",),
    "oft-output": ("goft-output", "qgoft-output", "hra-output", "road-output"),
    "square": ("square-no-bias",),
    "tall": ("tall-no-bias",),
    "conv1d-wide": ("conv1d-tall",),
    "conv2d": ("conv1d", "conv3d", "conv2d-1x1-no-bias", "conv2d-circular"),
    "embedding": ("embedding-padding",),
}
ALIKE = {other: one for one, others in _ALIKE.items() for other in others}
"""What a covering part need not cross with everything: methods whose adapters are another's but for the matrix that is
made of their parameters, and where they start; rotations of outputs, which one class applies to every chain (BOFT has a
gain besides); hosts of one class with another shape, bias or padding. Each has a case of every test still."""

WITH_LORA = (*EVERY_METHOD, LORA)
FEW = ("psoft", "lora_xs", "oft", "boft", "hra", LORA)
"""What a quick run tests the run-time core with; GOFT, qGOFT and COFT are rotations there as OFT is."""

SUBSPACES = ("psoft", "lora_xs", "svfit", "cersa", "oplora", "rosa", "peso")
"""Methods whose adapters have a subspace of their base's weight."""
UPDATES = (*SUBSPACES, "uora")
"""Methods that update the weight; the others rotate the inputs of a layer, or its outputs."""

MOVING = tuple(method for method in SUBSPACES if method != "oplora")
"""Those of them whose subspaces can move during training."""

EMBEDDED = ("rosa", "peso")
"""Methods on subspaces that store the subspace itself, and refuse to pin it."""


def with_basis(method: str, basis: str) -> dict[str, Any]:
    """The option, if the method has it; skips a test of what the method refuses."""
    if method in EMBEDDED and basis == "pinned":
        pytest.skip("stores its subspace, and refuses to pin it")
    return {"basis": basis} if method in SUBSPACES else {}


DROPOUT: dict[str, dict[str, Any]] = {
    "psoft": {"psoft_dropout": 0.5},
    "oft": {"module_dropout": 0.5},
    "coft": {"module_dropout": 0.5},
    "boft": {"boft_dropout": 0.5},
    "oplora": {"lora_dropout": 0.5},
    "uora": {"vera_dropout": 0.5},
    LORA: {"lora_dropout": 0.5},
}
"""Options with which the methods that can drop at random do."""

CHECKPOINTING = (None, "re-entrant", "not re-entrant")


def configured(method: str, targets: Any = r"(.*\.)?layers\.\d+", **options: Any) -> PeftConfig:
    """A configuration that fits layers whose W has a multiple of 12 columns, by default those of a Chain."""
    if method == LORA:
        return LoraConfig(**{"r": 4, "target_modules": targets, **options})
    name, own = ("oft", {"coft": True, "eps": 0.5}) if method == "coft" else form_of(method)
    own = {**own, "r": 1, "oft_block_size": 0} if method == "oft-output" else own  # any number of outputs
    return METHODS[name](**{"target_modules": targets, **OPTIONS_FOR_12[name], **own, **options})


def checkpointed(mode: str | None, function: Callable[..., Any], *args: Any) -> Any:
    """A call whose intermediate results are computed again in backward, in one of the two ways of torch."""
    return function(*args) if mode is None else checkpoint(function, *args, use_reentrant=mode == "re-entrant")


class Chain(nn.Module):
    """Linear layers of a few shapes with tanh between; equal seeds give equal weights.

    Args:
        sizes: of the input and the outputs.
        seed: of the weights.
        checkpointing: how each layer is a checkpointed part of its own, if it is.
    """

    def __init__(self, *sizes: int, seed: int = 0, checkpointing: str | None = None) -> None:
        super().__init__()
        sizes = sizes or (12, 24, 24, 12)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpointed(self.checkpointing, lambda x, layer=layer: torch.tanh(layer(x)), x)
        return x


def move(model: nn.Module, seed: int = 1, size: float = 0.2, only: str = "") -> Any:
    """Add noise to all trainable parameters whose names hold `only`, as training does; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and only in name:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def as_trained(method: str, base: nn.Module | None = None, *targets: str, seed: int = 1, **options: Any) -> Any:
    """A model, by default a Chain, with an adapter off the identity, in evaluation mode."""
    config = configured(method, list(targets), **options) if targets else configured(method, **options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # some methods start at random
        return move(get_peft_model(Chain() if base is None else base, config), seed).eval()


def afresh(model: Any, base: nn.Module | None = None) -> Any:
    """The same adapted model built anew: what it must compute, whatever was done to it before."""
    twin = get_peft_model(Chain() if base is None else base, model.peft_config["default"])
    twin.load_state_dict(model.state_dict())
    return twin.train(model.training)


def error_of_update(found: Tensor, expected: Tensor, base: Tensor) -> float:
    """The difference in units of the adapter's own change of the output."""
    found, expected, base = (one.detach().double() for one in (found, expected, base))
    return float((found - expected).norm() / (expected - base).norm())


HOSTS_OF_12: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(12, 20), lambda: torch.randn(5, 12)),
    "transposed": (lambda: _transposed(20, 12), lambda: torch.randn(5, 12)),
    "conv1d": (lambda: nn.Conv1d(3, 20, 4, padding=1), lambda: torch.randn(2, 3, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 20, (3, 2), groups=2), lambda: torch.randn(2, 4, 5, 4)),
    "conv3d": (lambda: nn.Conv3d(3, 20, (2, 1, 2)), lambda: torch.randn(2, 3, 3, 2, 3)),
    "embedding": (lambda: nn.Embedding(19, 12), lambda: torch.arange(12).view(3, 4)),
}
"""Hosts whose W has 12 columns: how to build one, and what goes through it."""


def _transposed(out_features: int, in_features: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(out_features, in_features)
    nn.init.normal_(layer.weight, std=0.3)
    return layer


def seeded_host(host: str, seed: int = 0) -> OneLayer:
    """A model of one such host; equal seeds give equal weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return OneLayer(HOSTS_OF_12[host][0]())


def tensors_left_by(action: Callable[[], Any], times: int = 4) -> int:
    """How many more live tensors more calls of the action leave than the first ones did."""

    def count(times: int) -> int:
        for _ in range(times):
            action()
        gc.collect()
        return sum(isinstance(thing, Tensor) for thing in gc.get_objects())

    before = count(2)
    return count(times) - before


def bytes_left_by(action: Callable[[], Any], times: int = 20) -> float:
    """How many bytes each call leaves, tensors that only C++ holds included.

    A few are counted by mistake: what takes the place of memory that was there before the counting began.
    """
    action()
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        for _ in range(times):
            action()
    return sum(event.nbytes() for event in profile.kineto_results.events() if event.name() == "[memory]") / times


def _imul(weight: Tensor) -> None:
    weight *= 3


WRITES: dict[str, Callable[[Tensor], object]] = {
    "mul_": lambda weight: weight.mul_(3),
    "*=": _imul,
    "data.copy_": lambda weight: weight.data.copy_(torch.zeros_like(weight)),
    "data =": lambda weight: setattr(weight, "data", torch.zeros_like(weight)),
    "[0] =": lambda weight: weight.__setitem__(0, 0.0),
    "init": nn.init.normal_,
    "out": lambda weight: torch.mul(torch.zeros_like(weight), 2, out=weight),
    "foreach": lambda weight: torch._foreach_mul_([weight], 2.0),
}
"""Ways to write to a weight."""


@torch.no_grad()
def assert_writing_is_refused(layer: Any, advice: str) -> None:
    """Every way to write to the weight that a layer computes is an error that gives the advice."""
    before = layer.weight.clone()
    for write in WRITES.values():
        with pytest.raises(ValueError, match=f"would be lost.*{advice}"):
            write(layer.weight)
    torch.testing.assert_close(layer.weight.clone(), before, rtol=0, atol=0)
    assert layer.weight.clone().mul_(3).shape == layer.weight.data.shape
    layer.weight.requires_grad_(False)
