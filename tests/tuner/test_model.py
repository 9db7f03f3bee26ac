"""How isotune stands in PEFT: targets, options of the model, and refusals that leave no trace."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import PeftModel
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import isotune
from helpers import (
    EVERY_METHOD,
    FAMILIES,
    HOSTS_OF_12,
    SUBSPACES,
    VOCABULARY,
    Stack,
    adapt,
    as_trained,
    assert_unchanged,
    configured,
    layers_of,
    move,
    only,
    psoft,
    randomize,
    relative_error,
    seeded_host,
    snapshot,
    some_tokens,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_opt,
    trainable,
)
from isotune import PsoftConfig, get_peft_model
from isotune.errors import IsotuneWarning
from isotune.tuner.layer import Linear

# -- which modules -------------------------------------------------------------------------------------------------


def keys(model: nn.Module) -> list[str]:
    return [layer.key for layer in layers_of(model)]


def test_all_linear_leaves_the_output_layer() -> None:
    for build, count in ((tiny_opt, 12), (tiny_llama, 14), (tiny_gpt2, 8)):
        model = adapt(build(), target_modules="all-linear")
        assert len(keys(model)) == count
        assert not [key for key in keys(model) if "lm_head" in key]


def test_default_targets_of_known_architectures() -> None:
    assert {k.rpartition(".")[2] for k in keys(adapt(tiny_llama()))} == {"q_proj", "v_proj"}
    assert {k.rpartition(".")[2] for k in keys(adapt(tiny_gpt2()))} == {"c_attn"}
    assert {k.rpartition(".")[2] for k in keys(adapt(tiny_bert()))} == {"query", "value"}


def test_layers_to_transform_and_exclusion_and_expressions() -> None:
    model = adapt(tiny_llama(layers=3), target_modules=["q_proj"], layers_to_transform=[0, 2])
    assert keys(model) == ["model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.q_proj"]
    model = adapt(tiny_llama(layers=3), target_modules=["q_proj"], layers_to_transform=1, layers_pattern="layers")
    assert keys(model) == ["model.layers.1.self_attn.q_proj"]
    model = adapt(tiny_llama(), target_modules=["q_proj", "v_proj"], exclude_modules=["layers.0.self_attn.v_proj"])
    assert len(keys(model)) == 3
    model = adapt(tiny_llama(), target_modules=r".*\.1\..*(up|down)_proj", exclude_modules=r".*up.*")
    assert keys(model) == ["model.layers.1.mlp.down_proj"]


@pytest.mark.filterwarnings("ignore::isotune.errors.IsotuneWarning")
def test_rank_and_alpha_patterns() -> None:
    config = psoft(r=8, psoft_alpha=8, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 5})
    config.alpha_pattern = {"layers.1.self_attn.q_proj": 2.0}
    model = adapt(tiny_llama(), config)
    found = {layer.key: (layer.adapter("default").size, layer.adapter("default").scale) for layer in layers_of(model)}
    assert found == {
        "model.layers.0.self_attn.q_proj": (8, 1.0),
        "model.layers.0.self_attn.v_proj": (5, 8 / 5),
        "model.layers.1.self_attn.q_proj": (8, 2 / 8),
        "model.layers.1.self_attn.v_proj": (5, 8 / 5),
    }


def test_conv1d_of_gpt2(tmp_path: Path) -> None:
    tokens = some_tokens()
    base = tiny_gpt2()
    expected = base(tokens).logits.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = get_peft_model(base, PsoftConfig(r=8, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)).eval()
    assert torch.equal(model(tokens).logits, expected)
    randomize(model)
    adapted = model(tokens).logits.detach()
    assert relative_error(adapted, expected) > 1e-3
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_gpt2(), tmp_path)
    torch.testing.assert_close(loaded(tokens).logits, adapted, rtol=1e-3, atol=1e-3)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, adapted, rtol=1e-4, atol=1e-4)
    for flag in (True, False):  # the layout is read off the layer, whatever was said
        assert layers_of(adapt(tiny_gpt2(), target_modules=["c_attn"], fan_in_fan_out=flag))[0].host.transposed


# -- what is trained and stored besides ----------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["none", "all", "isotune_only"])
def test_bias(bias: str, tmp_path: Path) -> None:
    model = get_peft_model(tiny_opt(), psoft(target_modules=["q_proj"], bias=bias))
    biases = {name for name in trainable(model) if name.endswith("bias")}
    every = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    own = {name for name in every if "q_proj" in name}
    assert biases == {"none": set(), "all": every, "isotune_only": own}[bias]
    if bias == "none":
        return
    with torch.no_grad():
        for name in biases:
            model.get_parameter(name).add_(0.5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_opt(), tmp_path)
    torch.testing.assert_close(
        loaded.eval()(some_tokens()).logits, model.eval()(some_tokens()).logits, rtol=1e-3, atol=1e-3
    )


def test_modules_to_save(tmp_path: Path) -> None:
    base = tiny_bert()
    model = get_peft_model(base, psoft(target_modules=["query"], modules_to_save=["classifier"]))
    assert {n.split(".")[2] for n in trainable(model)} == {"bert", "classifier"}
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            if "classifier" in name:
                parameter.add_(0.3)
    expected = model.eval()(some_tokens()).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path).eval()
    torch.testing.assert_close(loaded(some_tokens()).logits, expected, rtol=1e-3, atol=1e-3)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(some_tokens()).logits, expected, rtol=1e-3, atol=1e-3)


def test_mixed_batches_with_modules_to_save() -> None:
    """Each sample gets the head of its own adapter too."""
    model = adapt(tiny_bert(), target_modules=["query"], modules_to_save=["classifier"])
    model.add_adapter("other", psoft(target_modules=["query"], modules_to_save=["classifier"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.other" in name:
                parameter.add_(0.7)
    tokens, expected = some_tokens(2), []
    for row, name in zip(tokens, ("default", "other"), strict=True):
        model.set_adapter(name)
        expected.append(model.eval()(row[None]).logits)
    model.set_adapter("default")
    found = model(tokens, adapter_names=["default", "other"]).logits
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*tied.*:UserWarning")
def test_tied_weights() -> None:
    base = tiny_opt(tie_word_embeddings=True)
    embedding = base.get_input_embeddings().weight
    assert base.lm_head.weight is embedding
    values, tokens = embedding.detach().clone(), some_tokens()
    expected = base(tokens).logits.detach()
    model = adapt(base, target_modules=["lm_head"], r=8)
    adapted = model(tokens).logits.detach()
    assert relative_error(adapted, expected) > 1e-3
    model.merge_adapter()
    head = model.get_base_model().lm_head.base_layer
    assert head.weight is not embedding
    assert torch.equal(base.get_input_embeddings().weight, values)
    torch.testing.assert_close(model(tokens).logits, adapted, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert head.weight is embedding
    assert torch.equal(embedding, values)
    with model.disable_adapter():
        assert torch.equal(model(tokens).logits, expected)


@pytest.mark.filterwarnings("ignore:.*tied.*:UserWarning")
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("method", ["psoft", "hra"])
def test_tying_again_shares_the_weights_of_the_base(method: str, targets: list[str], merged: bool) -> None:
    """Trainer does so when it resumes, accelerate when it shards by FSDP2."""
    base = tiny_llama(tie_word_embeddings=True)
    weight, tokens = base.get_input_embeddings().weight, some_tokens()
    original = base(tokens).logits.detach()
    model = adapt(base, configured(method, targets))
    randomize(model)
    if merged:
        model.merge_adapter()
    expected, names = model(tokens).logits.detach(), list(model.state_dict())
    model.tie_weights()
    torch.testing.assert_close(model(tokens).logits, expected)
    assert list(model.state_dict()) == names
    if merged:
        model.unmerge_adapter()
    plain = model.unload()
    assert plain.get_input_embeddings().weight is weight
    assert plain.get_output_embeddings().weight is weight
    assert torch.equal(plain(tokens).logits, original)


@pytest.mark.filterwarnings("ignore:.*tied.*:UserWarning")
def test_tying_again_leaves_a_saved_module_to_itself() -> None:
    base = tiny_llama(tie_word_embeddings=True)
    weight, tokens = base.get_input_embeddings().weight, some_tokens()
    model = adapt(base, configured("psoft", ["q_proj"], modules_to_save=["embed_tokens"]))
    randomize(model)
    expected = model(tokens).logits.detach()
    model.tie_weights()
    assert base.lm_head.weight is weight
    torch.testing.assert_close(model(tokens).logits, expected)


@pytest.mark.filterwarnings("ignore:.*tied.*:UserWarning")
@pytest.mark.parametrize("disabled", [False, True])
def test_what_was_tied_to_a_merged_weight_is_tied_to_the_base_s_again(disabled: bool) -> None:
    base = tiny_llama(tie_word_embeddings=True)
    weight, tokens = base.get_input_embeddings().weight, some_tokens()
    original = base(tokens).logits.detach()
    model = adapt(base, configured("psoft", ["embed_tokens"]))
    randomize(model)
    expected = model(tokens).logits.detach()
    model.merge_adapter()
    base.tie_weights()
    assert base.lm_head.weight is base.get_input_embeddings().base_layer.weight
    if disabled:
        with model.disable_adapter():
            assert torch.equal(model(tokens).logits, original)
    else:
        model.unmerge_adapter()
    assert base.lm_head.weight is weight
    torch.testing.assert_close(model(tokens).logits, expected)


def test_a_weight_of_another_shape_is_refused_by_name() -> None:
    model = adapt(nn.Sequential(nn.Linear(8, 8)), psoft(r=4, target_modules=["0"]))
    model.get_base_model()[0].base_layer.weight = nn.Parameter(torch.randn(9, 8))
    with pytest.raises(ValueError, match=r"'0' is \(9, 8\) and not \(8, 8\), as its adapters are"):
        model(torch.randn(2, 8))


def test_a_model_without_tied_weights_is_left_alone() -> None:
    model = adapt(nn.Sequential(nn.Linear(8, 8)), psoft(r=4, target_modules=["0"]))
    model.tie_weights()


@pytest.mark.filterwarnings("ignore:.*tied.*:UserWarning")
def test_a_merged_tied_head_survives_saving(tmp_path: Path) -> None:
    model = adapt(tiny_opt(tie_word_embeddings=True), target_modules=["lm_head"], r=8)
    expected = model(some_tokens()).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(some_tokens()).logits, expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    reloaded = type(merged).from_pretrained(tmp_path)
    torch.testing.assert_close(reloaded(some_tokens()).logits, expected, rtol=1e-3, atol=1e-3)


# -- without weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False])
def test_meta_weights_are_deferred_until_they_come(whole: bool) -> None:
    config = psoft(target_modules=["q_proj", "v_proj"], init_weights=whole)
    normal = adapt(tiny_opt(), config)
    randomize(normal)
    with torch.device("meta"):
        empty = tiny_opt()
    assert all(p.is_meta for p in empty.parameters())
    model = get_peft_model(empty, copy.deepcopy(config)).eval()
    state = normal.state_dict()
    if not whole:  # the base alone, then the adapter's own parameters as training would write them
        state = {name: tensor for name, tensor in state.items() if "isotune" not in name}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights() if hasattr(model, "tie_weights") else None
    model.get_base_model().tie_weights()
    if not whole:
        for ours, theirs in zip(layers_of(model), layers_of(normal), strict=True):
            ours.adapter("default").load_state_dict(theirs.adapter("default").state_dict())
    assert not [name for name, p in model.named_parameters() if p.is_meta]
    tokens = some_tokens()
    torch.testing.assert_close(model(tokens).logits, normal(tokens).logits, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(layers_of(model), layers_of(normal), strict=True):
        torch.testing.assert_close(ours.bases("default")[0].stored, theirs.bases("default")[0].stored)
    model(tokens).logits.sum().backward()
    assert all(p.grad is not None for p in trainable(model).values())


def test_another_base_loaded_into_an_untrained_model_moves_the_subspace() -> None:
    model = adapt(Stack(), target_modules=["second"], init_weights=True)
    torch.manual_seed(77)
    other = Stack()
    names = {name: name.replace("second.", "second.base_layer.") for name, _ in other.named_parameters()}
    model.get_base_model().load_state_dict({names[n]: p for n, p in other.state_dict().items()}, strict=False)
    expected = adapt(other, target_modules=["second"], init_weights=True)
    for each in (model, expected):
        randomize(each)
    x = torch.randn(3, 24)
    torch.testing.assert_close(model(x), expected(x), rtol=1e-5, atol=1e-5)


# -- refusals ------------------------------------------------------------------------------------------------------


def with_nan(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.third.weight[1, 2] = float("nan")
    return model


def with_integers(model: nn.Module) -> nn.Module:
    model.third.weight = nn.Parameter(model.third.weight.detach().to(torch.int8), requires_grad=False)
    return model


def with_vector(model: nn.Module) -> nn.Module:
    model.third.weight = nn.Parameter(model.third.weight.detach().flatten())
    return model


def with_conv(model: nn.Module) -> nn.Module:
    model.third = nn.ConvTranspose2d(3, 3, 1)
    return model


def as_it_is(model: nn.Module) -> nn.Module:
    return model


ALL = ["first", "second", "third"]
REFUSED: list[Any] = [
    pytest.param(as_it_is, {"r": 25}, r"'first'.*40 × 24.*at most 24", id="rank above the smaller side"),
    pytest.param(as_it_is, {"rank_pattern": {"third": 30}}, "'third'.*at most 24", id="rank of a pattern"),
    pytest.param(with_nan, {}, "third.*NaN", id="NaN"),
    pytest.param(with_integers, {}, "'third'.*int8", id="integers"),
    pytest.param(with_vector, {}, "'third'.*shape", id="vector"),
    pytest.param(with_conv, {}, "'third'.*ConvTranspose2d.*Supported", id="module type"),
    pytest.param(as_it_is, {"target_modules": ["nothing"]}, "nothing|No modules were targeted", id="no match"),
    pytest.param(as_it_is, {"target_modules": None}, "target_modules", id="no default"),
]


@pytest.mark.parametrize(("prepare", "options", "message"), REFUSED)
def test_a_refused_model_is_as_before(
    prepare: Callable[[nn.Module], nn.Module], options: dict[str, Any], message: str
) -> None:
    model = prepare(Stack())
    model.first.bias.requires_grad_(False)
    model.second.eval()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, PsoftConfig(**{"r": 8, "target_modules": ALL, **options}))
    assert_unchanged(model, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of a model that has been adapted before
        adapted = get_peft_model(model, PsoftConfig(r=8, target_modules=["second"]))
    assert len(layers_of(adapted)) == 1


@pytest.mark.parametrize(("prepare", "options", "message"), [p for p in REFUSED if p.id != "no default"])
def test_a_refused_second_adapter_leaves_the_first_alone(
    prepare: Callable[[nn.Module], nn.Module], options: dict[str, Any], message: str
) -> None:
    model = get_peft_model(prepare(Stack()), psoft(target_modules=["second"]))
    before, active = snapshot(model), model.active_adapters
    x = torch.randn(3, 40)
    expected = model.get_base_model().second(x)
    with pytest.raises(ValueError, match=message):
        model.add_adapter("other", psoft(**{"target_modules": ALL, **options}))
    assert_unchanged(model, before)
    assert model.active_adapters == active
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model.get_base_model().second(x), expected)
    model.add_adapter("other", psoft(target_modules=["second"]))  # the name is still free


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_a_misspelt_name_among_several_is_said(method: str, tmp_path: Path) -> None:
    """PEFT adapts what it finds, and says nothing of the rest of the list."""
    base = Stack()
    with pytest.warns(IsotuneWarning, match="no module of the model is called 'secnd'.*Did you mean 'second'") as said:
        model = get_peft_model(copy.deepcopy(base), configured(method, ["first", "secnd"]))
    assert len(said) == 1
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PeftModel.from_pretrained(base, tmp_path)  # whoever loads it need not hear it again


class TwoPlaces(nn.Module):
    """One module in two places, beside another."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first = layer
        self.block = nn.ModuleDict({"second": layer, "other": nn.Linear(12, 12)})


SAME_OBJECT = r"'(first|block\.second)' is the same object as '(first|block\.second)'.*exclude_modules"


@pytest.mark.parametrize("host", HOSTS_OF_12)
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_one_module_in_two_places_is_refused(method: str, host: str) -> None:
    """PEFT would adapt it in one place, and merging would change both."""
    model = TwoPlaces(HOSTS_OF_12[host][0]())
    before = snapshot(model)
    for targets in (["first"], ["first", "second"], r".*(first|second)"):
        with pytest.raises(ValueError, match=SAME_OBJECT):
            get_peft_model(model, configured(method, targets))
        assert_unchanged(model, before)
        assert model.first is model.block["second"]


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_a_second_adapter_on_a_module_in_two_places_is_refused(method: str) -> None:
    model = as_trained(method, TwoPlaces(nn.Linear(12, 20)), "other")
    before, places = snapshot(model), model.get_base_model()
    with pytest.raises(ValueError, match=SAME_OBJECT):
        model.add_adapter("second", configured(method, ["first", "other"]))
    assert_unchanged(model, before)
    assert places.first is places.block["second"]
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_a_block_in_two_places_is_adapted_in_both(method: str) -> None:
    """Its parent has one place for the adapted module, as in models that repeat a block."""
    block = nn.Sequential(nn.Linear(12, 12))
    model, x = as_trained(method, nn.Sequential(block, nn.Tanh(), block), "0.0"), torch.randn(3, 12)
    layer, expected = only(model), model(x)
    torch.testing.assert_close(expected, layer(torch.tanh(layer(x))))
    assert not torch.equal(layer(x), layer.get_base_layer()(x))
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-5, atol=1e-5)


COMPUTED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm of hooks": torch.nn.utils.weight_norm,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
}


@pytest.mark.covered
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", COMPUTED)
@pytest.mark.parametrize("host", HOSTS_OF_12)
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_a_weight_that_is_computed_from_others_is_refused(method: str, host: str, norm: str) -> None:
    """What merging would write into it the next forward would compute again."""
    model, x = seeded_host(host), HOSTS_OF_12[host][1]()
    COMPUTED[norm](model.layer)
    expected, before = model.eval()(x), snapshot(model)
    with pytest.raises(ValueError, match=r"'layer'.*is not a parameter.*remove_parametrizations.*exclude_modules"):
        get_peft_model(model, configured(method, ["layer"]))
    assert_unchanged(model, before)
    assert torch.equal(model(x), expected)


@pytest.mark.covered
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", COMPUTED)
@pytest.mark.parametrize("host", HOSTS_OF_12)
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_a_weight_that_is_computed_later_is_not_merged_into(method: str, host: str, norm: str) -> None:
    """A parametrisation of the base layer of a model that has been adapted."""
    model, x = as_trained(method, seeded_host(host), "layer"), HOSTS_OF_12[host][1]()
    COMPUTED[norm](only(model).get_base_layer())
    # What depends on the weight cannot follow one that a hook computes only when the layer is called, and in a
    # convolution no other weight can be put in the place of a computed one.
    follows = "conv" not in host and (method not in SUBSPACES or norm != "weight_norm of hooks")
    expected, before = model.eval()(x) if follows else None, snapshot(model)
    for act in (model.merge_adapter, model.merge_and_unload, *(() if follows else (lambda: model(x),))):
        with pytest.raises(ValueError, match=r"is not a parameter.*remove_parametrizations"):
            act()
        assert_unchanged(model, before)
        assert expected is None or torch.equal(model(x), expected)


@pytest.mark.parametrize("host", HOSTS_OF_12)
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_a_weight_whose_parametrisation_was_removed_is_taken(method: str, host: str) -> None:
    """As the message of the refusal says."""
    base, x = seeded_host(host), HOSTS_OF_12[host][1]()
    parametrizations.weight_norm(base.layer)
    parametrize.remove_parametrizations(base.layer, "weight")
    model = as_trained(method, base, "layer")
    expected = model(x)
    assert relative_error(only(model).get_base_layer()(x), expected) > 1e-3
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-4, atol=1e-5)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out_proj = nn.Linear(24, 3)


@pytest.mark.parametrize("name", ["classifier", "out_proj", "weight", "bias"])
def test_an_adapter_called_like_a_part_of_a_saved_module_is_refused(name: str) -> None:
    """PEFT would not save it, or under a wrong name, or raise a KeyError after the training."""

    base = nn.ModuleDict({"query": nn.Linear(24, 24), "classifier": Head()})
    options = {"r": 4, "target_modules": ["query"]}
    said = f"adapter name '{name}' is not allowed: 'classifier'"
    before = snapshot(base)
    with pytest.raises(ValueError, match=said):
        get_peft_model(base, PsoftConfig(modules_to_save=["classifier"], **options), name)
    assert_unchanged(base, before)
    model = get_peft_model(base, PsoftConfig(modules_to_save=["classifier"], **options))
    with pytest.raises(ValueError, match=said):
        model.add_adapter(name, PsoftConfig(**options))
    assert list(model.peft_config) == ["default"]
    model.add_adapter("other", PsoftConfig(**options))


@pytest.mark.parametrize(
    ("first", "second"),
    [(["classifier", "out_proj"], None), (["classifier"], ["out_proj"]), (["out_proj"], ["classifier"])],
)
def test_saved_modules_within_one_another_are_refused(first: list[str], second: list[str] | None) -> None:
    """PEFT would raise a KeyError when the trained adapter is saved."""
    base = nn.ModuleDict({"query": nn.Linear(24, 24), "classifier": Head()})
    said = r"'classifier\.out_proj' lies within 'classifier', and PEFT cannot save both"
    if second is None:
        before = snapshot(base)
        with pytest.raises(ValueError, match=said):
            get_peft_model(base, psoft(target_modules=["query"], modules_to_save=first))
        assert_unchanged(base, before)
        return
    model = get_peft_model(base, psoft(target_modules=["query"], modules_to_save=first))
    with pytest.raises(ValueError, match=said):
        model.add_adapter("other", psoft(target_modules=["query"], modules_to_save=second))
    assert list(model.peft_config) == ["default"]
    model.add_adapter("other", psoft(target_modules=["query"], modules_to_save=first))


def test_a_refusal_with_modules_to_save_leaves_no_wrapper() -> None:
    model = tiny_bert()
    before = snapshot(model)
    with pytest.raises(ValueError, match="at most"):
        get_peft_model(model, psoft(r=500, target_modules=["query"], modules_to_save=["classifier"]))
    assert_unchanged(model, before)


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_safe_merge_of_a_whole_model_is_all_or_nothing(family: str) -> None:
    """A bad last layer must not leave the layers before it merged."""
    model = adapt(FAMILIES[family](), target_modules=["q_proj", "v_proj"])
    with torch.no_grad():
        layers_of(model)[-1].adapter("default").generator[0] = float("nan")
    before = snapshot(model)
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(safe_merge=True)
    assert not any(layer.merged for layer in layers_of(model))
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match="NaN"):
        model.merge_and_unload(safe_merge=True)
    assert len(layers_of(model)) == 4
    assert not any(layer.merged for layer in layers_of(model))


class Listed(nn.Module):
    """Calls its layers through a plain list, as a head of Mask2Former does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(8, 8), nn.ReLU()]
        for index, layer in enumerate(self.layers):
            self.add_module(str(index), layer)
        self.last = nn.Linear(8, 8)


def test_a_layer_that_is_called_through_a_plain_list_is_said() -> None:
    with pytest.warns(IsotuneWarning, match=r"'0' lies in a plain list of its Listed too, 'layers'.*exclude_modules"):
        get_peft_model(Listed(), psoft(r=4, target_modules=["0", "last"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(Listed(), psoft(r=4, target_modules=["last"]))
    with pytest.warns(IsotuneWarning, match="'0' lies in a plain list"):
        model.add_adapter("second", psoft(r=4, target_modules=["0", "last"]))


def test_unloading_leaves_the_very_base() -> None:
    base = tiny_opt()
    before = {name: (id(p), p.detach().clone()) for name, p in base.named_parameters()}
    model = adapt(base, target_modules=["q_proj"])
    model.merge_adapter()
    model.unmerge_adapter()
    unloaded = model.unload()
    assert not [m for m in unloaded.modules() if isinstance(m, Linear)]
    for name, parameter in unloaded.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_the_public_names() -> None:
    assert set(isotune.__all__) <= set(dir(isotune))
    assert isotune.get_peft_model is peft.get_peft_model


# -- weights of several layers --------------------------------------------------------------------------------------


def tiny_t5(kind: str = "UMT5", **options: Any) -> nn.Module:
    """An encoder-decoder whose head, and both embeddings, have the weight of a fourth module."""
    sizes = {"vocab_size": VOCABULARY, "d_model": 24, "d_kv": 6, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes, decoder_start_token_id=0, **options)
    model: nn.Module = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    return model.eval()


SWITCH = {"num_sparse_encoder_layers": 0, "num_sparse_decoder_layers": 0, "num_decoder_layers": 1, "num_experts": 2}


@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning")
@pytest.mark.parametrize(("kind", "options"), [("T5", {}), ("UMT5", {}), ("SwitchTransformers", SWITCH)])
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_a_merged_head_of_a_model_that_scales_by_its_tie(
    method: str, kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """PEFT says in the configuration that it is tied no longer, and then UMT5's logits were √d_model times as large."""
    model = move(get_peft_model(tiny_t5(kind, **options), configured(method, ["lm_head"]))).eval()
    tokens = some_tokens()
    given = {"input_ids": tokens, "decoder_input_ids": tokens}
    expected = model(**given).logits.detach()
    merged = model.merge_and_unload()
    assert relative_error(merged(**given).logits, expected) < 1e-5
    merged.save_pretrained(tmp_path)
    assert relative_error(type(merged).from_pretrained(tmp_path).eval()(**given).logits, expected) < 1e-5


@pytest.mark.parametrize("method", ["psoft", "hra"])
def test_an_embedding_that_only_lends_its_weight_is_said(method: str) -> None:
    with pytest.warns(
        IsotuneWarning, match=r"The weight of 'shared' is also that of .*encoder\.embed_tokens'.*instead"
    ):
        get_peft_model(tiny_t5("T5"), configured(method, ["shared"]))
    for names in (["embed_tokens"], ["encoder.embed_tokens"], ["shared", "embed_tokens"]):
        get_peft_model(tiny_t5("T5"), configured(method, names))
    get_peft_model(tiny_llama(tie_word_embeddings=True), configured(method, ["embed_tokens"]))
