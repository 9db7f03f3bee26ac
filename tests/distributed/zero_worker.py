"""What each process of tests/test_zero.py does with DeepSpeed; run by torchrun."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from torch import distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
import deepspeed
from peft import PeftModel

from distributed import accelerated, worker
from helpers import some_tokens, tiny_llama

# It would be compiled, which takes minutes, and serves inference alone.
import_module("deepspeed.comm.torch").build_shm_op = lambda: None


def configuration(stage: int, **options: Any) -> dict[str, Any]:
    """Of DeepSpeed; ZeRO-3 with nothing kept whole for being small, unless `options` say so."""
    if stage == 3:
        options = {"stage3_param_persistence_threshold": 0, **options}
    return {
        "train_micro_batch_size_per_gpu": worker.ROWS // int(os.environ["WORLD_SIZE"]),
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True, **options},
        "zero_allow_untested_optimizer": True,
    }


def engine_of(model: Any, config: dict[str, Any]) -> Any:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=worker.RATE)
    return deepspeed.initialize(model=model, model_parameters=parameters, optimizer=optimizer, config=config)[0]


def train(engine: Any) -> list[float]:
    """As `worker.train`, by the engine."""
    rank, size = dist.get_rank(), dist.get_world_size()
    losses = []
    for step in range(worker.STEPS):
        rows = some_tokens(worker.ROWS, 9, seed=step % 3)[rank::size]
        loss = engine(input_ids=rows, labels=rows).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / size)
    return losses


def save(engine: Any, folder: Path) -> None:
    """The state dict that accelerate and Trainer take, of which PEFT writes the adapter's part, and what it gives."""
    expected = worker.logits(engine)
    divided = engine.zero_optimization_partition_weights()
    state = engine._zero3_consolidated_16bit_state_dict() if divided else engine.module.state_dict()
    if dist.get_rank() == 0:
        engine.module.save_pretrained(str(folder), state_dict=state)
        torch.save(expected, folder.with_suffix(".pt"))
    dist.barrier()


def loaded_in_parts(folder: Path, config: dict[str, Any]) -> Any:
    """The base model as transformers loads it when it knows that ZeRO-3 comes."""
    from transformers import LlamaForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    known = HfDeepSpeedConfig(config)
    model = LlamaForCausalLM.from_pretrained(folder)
    del known
    assert all(p.numel() == 0 for p in model.parameters())
    return model


def merged_and_back(engine: Any) -> float:
    """How far the merged model is from the unmerged one, all of it gathered, as TRL sends weights to a server."""
    before = worker.logits(engine)
    model = engine.module
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        model.merge_adapter()
        merged = {name: p.detach().clone() for name, p in model.named_parameters() if ".base_layer." in name}
        model.unmerge_adapter()
    after = worker.logits(engine)
    plain = tiny_llama()
    state = {name.removeprefix("base_model.model.").replace(".base_layer", ""): t for name, t in merged.items()}
    plain.load_state_dict(state, strict=False)
    return max(float((worker.logits(plain) - before).abs().max()), float((after - before).abs().max()))


def run(out: Path) -> dict[str, Any]:
    rank = dist.get_rank()
    found: dict[str, Any] = {}
    worker.count_solves()
    for method in ("psoft", "oft"):
        engine = engine_of(worker.adapted(method), configuration(2))
        found[f"zero2 {method}"] = train(engine)
        save(engine, out / f"zero2-{method}")
    for method in ("psoft", "oft", "boft"):
        engine = engine_of(worker.adapted(method), configuration(3))
        found[f"zero3 {method}"] = train(engine)
        save(engine, out / f"zero3-{method}")
        if method == "psoft":
            found["merge refused"] = worker.refused(engine.module.merge_adapter)
            found["merged"] = merged_and_back(engine)
            engine.save_checkpoint(str(out / "checkpoint"))
    model = worker.adapted("psoft")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found["zero3 checkpointed"] = train(engine_of(model, configuration(3)))
    found["zero3 small whole"] = train(
        engine_of(worker.adapted("psoft"), configuration(3, stage3_param_persistence_threshold=1000))
    )
    # The base divided while it is loaded, before there is an adapter.
    if rank == 0:
        tiny_llama().save_pretrained(out / "base")
    dist.barrier()
    for method in ("psoft", "oft"):
        before = len(worker.SOLVED)
        model = worker.adapted(method, loaded_in_parts(out / "base", configuration(3)))
        found[f"solved {method}"] = len(worker.SOLVED) - before
        engine = engine_of(model, configuration(3))
        found[f"loaded {method}"] = train(engine)
        save(engine, out / f"loaded-{method}")
        # What one process has saved, on a base that is divided.
        again = PeftModel.from_pretrained(loaded_in_parts(out / "base", configuration(3)), out / f"zero3-{method}")
        engine = deepspeed.initialize(model=again, config=configuration(3))[0]
        expected = torch.load(out / f"zero3-{method}.pt", weights_only=True)
        found[f"again {method}"] = float((worker.logits(engine) - expected).abs().max())
    return found


def run_by_accelerate(out: Path, stage: int) -> dict[str, Any]:
    """The same by accelerate, which tells transformers to divide the base for ZeRO-3."""
    from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
    from transformers import LlamaForCausalLM

    plugin = DeepSpeedPlugin(hf_ds_config=configuration(stage), zero3_init_flag=stage == 3)
    accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    if accelerator.is_main_process:
        tiny_llama().save_pretrained(out / "base")
    accelerator.wait_for_everyone()
    base = LlamaForCausalLM.from_pretrained(out / "base")
    found: dict[str, Any] = {"divided": all(hasattr(p, "ds_id") for p in base.parameters())}
    model, optimizer = accelerated.prepared(accelerator, worker.adapted("psoft", base))
    found["losses"] = accelerated.train(accelerator, model, optimizer)
    expected, state = worker.logits(model), accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(out / "adapter", state_dict=state)
        torch.save(expected, out / "adapter.pt")
    accelerator.wait_for_everyone()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, engine = Path(sys.argv[1]), sys.argv[2]
    if engine == "deepspeed":
        deepspeed.init_distributed("gloo")
        result = run(folder)
    else:
        result = run_by_accelerate(folder, int(engine))
    worker.report(folder, result)
