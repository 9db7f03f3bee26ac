"""What each process of tests/test_tensor_parallel.py does; its functions run in one process too, for comparison."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from peft import PeftModel

from distributed import worker
from helpers import (
    ALIKE,
    OPTIONS_FOR_TINY,
    form_of,
    gradients,
    layers_of,
    randomize,
    some_tokens,
    tiny_llama,
    trainable,
)
from isotune import add_adapter, get_peft_model
from isotune.methods import METHODS

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EVERYWHERE = [*PROJECTIONS, "lm_head", "embed_tokens"]
METHODS_APART = [method for method in METHODS if method not in ALIKE]
CURVES = ["psoft", "oft", "boft"]
UNEVEN = ["psoft", "hra"]
SPLIT = ["psoft", "boft"]
OF_OUTPUTS = ["oft-output", "boft-output"]
WIDTHS = {"even": 112, "uneven": 114}
DROPOUTS = {"psoft": "psoft_dropout", "oft": "module_dropout", "boft": "boft_dropout"}


def base(kind: str = "even") -> Any:
    """Two layers with biases, whose inner features four processes can divide evenly or not."""
    width = WIDTHS.get(kind, WIDTHS["even"])
    model = tiny_llama(num_key_value_heads=4, intermediate_size=width, attention_bias=True, mlp_bias=True)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.2, generator=generator)
    return model


OTHER_STYLES = {"lm_head": "rowwise_split_input", "model.embed_tokens": "embedding_colwise"}


def divided(folder: Path, plan: Any = None) -> Any:
    """A saved model, loaded over all processes with its own plan, or other styles for some modules."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_size=dist.get_world_size(), tp_plan=plan)
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)


def seed() -> None:
    """Random numbers that are those of one process in the first, and others in every other."""
    torch.manual_seed(11 + (dist.get_rank() if dist.is_initialized() else 0))


def adapted(model: Any, method: str, targets: list[str] = PROJECTIONS) -> Any:
    seed()
    name, form = form_of(method)
    model = get_peft_model(model, METHODS[name](target_modules=targets, **{**OPTIONS_FOR_TINY[name], **form}))
    randomize(model, std=0.02)
    return model.train()


def composed(model: Any, *methods: str) -> Any:
    """Adapters of several methods, all of them active at once."""
    first, *others = methods
    seed()
    model = get_peft_model(
        model, METHODS[first](target_modules=PROJECTIONS, **OPTIONS_FOR_TINY[first]), adapter_name=first
    )
    for method in others:
        add_adapter(model, method, METHODS[method](target_modules=PROJECTIONS, **OPTIONS_FOR_TINY[method]))
    model.base_model.set_adapter(list(methods))
    for index, method in enumerate(methods):
        randomize(model, method, std=0.02, seed=index)
    return model.train()


def one_step(model: Any) -> dict[str, torch.Tensor]:
    """The loss of one batch, and every gradient."""
    rows = some_tokens(3, 9)
    loss = model(input_ids=rows, labels=rows).loss
    loss.backward()
    found = gradients(model)
    return {"loss": loss.detach(), **{name: g for name, g in found.items() if g is not None}}


def steps_of_all(base: Any) -> dict[str, dict[str, torch.Tensor]]:
    """`one_step` of everything that is compared; `base` gives a fresh model of a kind."""
    found = {method: one_step(adapted(base("even"), method, EVERYWHERE)) for method in METHODS_APART}
    for method in SPLIT:
        found[f"{method} split"] = one_step(adapted(base("split"), method, EVERYWHERE))
    for method in OF_OUTPUTS:
        found[method] = one_step(adapted(base("even"), method))
    for method in UNEVEN:
        found[f"{method} uneven"] = one_step(adapted(base("uneven"), method))
    for methods in (("psoft", "oft"), ("oft", "psoft"), ("hra", "boft")):
        found[" on ".join(methods)] = one_step(composed(base("even"), *methods))
    return found


def answers(model: Any) -> dict[str, Any]:
    """What a trained adapter generates, and the logits of a batch in which one sample has no adapter."""
    rows = some_tokens(2, 9)
    tokens = model.eval().generate(rows, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    with torch.no_grad():
        mixed = model(rows, adapter_names=["default", "__base__"]).logits
    return {"tokens": tokens, "mixed": mixed, "logits": worker.logits(model)}


def state_of(model: nn.Module) -> list[float]:
    return [float(p.detach().double().norm()) for p in trainable(model).values()]


def run(out: Path) -> dict[str, Any]:
    rank = dist.get_rank()

    def base(kind: str = "even") -> Any:
        return divided(out / "even", OTHER_STYLES) if kind == "split" else divided(out / kind)

    found: dict[str, Any] = {}
    worker.count_solves()

    seed()
    for method in ("hra", "lora_xs"):
        config = METHODS[method](target_modules=PROJECTIONS, **OPTIONS_FOR_TINY[method])
        found[f"start {method}"] = state_of(get_peft_model(base(), config))

    torch.save(steps_of_all(base), out / f"steps-{rank}.pt")

    for method in CURVES:
        before = len(worker.SOLVED)
        model = adapted(base(), method)
        found[f"solved {method}"] = len(worker.SOLVED) - before
        found[f"curve {method}"] = worker.train(model, trainable(model).values())
        found[f"end {method}"] = state_of(model)
        given = answers(model)
        expected = given["logits"]
        model.save_pretrained(str(out / method), is_main_process=rank == 0)
        dist.barrier()
        if rank == 0:
            torch.save(given, out / f"{method}.pt")
        loaded = PeftModel.from_pretrained(base(), out / method)
        found[f"loaded {method}"] = float((worker.logits(loaded) - expected).abs().max())
        weights = {name: p.to_local().clone() for name, p in model.named_parameters() if hasattr(p, "to_local")}
        assert weights
        plain = worker.logits(base())
        model.merge_adapter(safe_merge=True)
        with model.disable_adapter():
            found[f"disabled {method}"] = float((worker.logits(model) - plain).abs().max())
        model.merge_adapter()
        found[f"moved {method}"] = float((expected - plain).abs().max())
        found[f"merged {method}"] = float((worker.logits(model) - expected).abs().max())
        model.unmerge_adapter()
        found[f"unmerged {method}"] = all(
            torch.equal(weights[name], p.to_local()) for name, p in model.named_parameters() if name in weights
        )
        whole = model.merge_and_unload()
        found[f"unloaded {method}"] = float((worker.logits(whole) - expected).abs().max())
        assert not layers_of(whole)

    model = adapted(base(), "psoft")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found["curve checkpointed"] = worker.train(model, trainable(model).values())

    for method, option in DROPOUTS.items():
        config = METHODS[method](target_modules=PROJECTIONS, **OPTIONS_FOR_TINY[method], **{option: 0.1})
        model = base()
        found[f"dropout {method}"] = worker.refused(lambda model=model, config=config: get_peft_model(model, config))
        assert not layers_of(model)
    return found


if __name__ == "__main__":
    worker.main(run)
