"""Training by accelerate's own FSDP2, in processes without accelerators; run by torchrun or `accelerate launch`.

accelerate has all it takes to spread a model over CPUs, but does so for accelerators alone. So it is told that these
processes have some, after it has found them a device (the CPU) and a backend (gloo), and nothing else of it is changed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from distributed import worker
from helpers import some_tokens, trainable
from isotune.parallel.sharding import is_sharded


def as_accelerators() -> None:
    """Let the next Accelerator spread models over these processes."""
    AcceleratorState._reset_state()
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def accelerator_of(mixed_precision: str | None = None, **plugin: Any) -> Accelerator:
    """An Accelerator with FSDP2, each decoder layer by itself unless `plugin` says otherwise."""
    as_accelerators()
    options = {"fsdp_version": 2, "auto_wrap_policy": "transformer_based_wrap", **plugin}
    chosen = FullyShardedDataParallelPlugin(**options)
    return Accelerator(cpu=True, mixed_precision=mixed_precision, fsdp_plugin=chosen)


def prepared(accelerator: Accelerator, model: nn.Module) -> tuple[nn.Module, Any]:
    """The model and an optimizer of what is trained, as accelerate gives them back."""
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=worker.RATE)
    return accelerator.prepare(model, optimizer)


def train(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    steps: range = range(worker.STEPS),
    evaluate: bool = False,
) -> list[float]:
    """Steps on the rows of this process; the loss of all rows at each."""
    losses = []
    for step in steps:
        rows = some_tokens(worker.ROWS, 9, seed=step % 3)[accelerator.process_index :: accelerator.num_processes]
        if evaluate:
            with torch.no_grad():
                model(input_ids=rows)
        loss = model(input_ids=rows, labels=rows).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach().float(), "mean")))
    return losses


def by_hand(out: Path) -> dict[str, Any]:
    """A loop of one's own: what `accelerator.prepare` gives is trained, saved, and gone on with."""
    found: dict[str, Any] = {}
    half, rest = range(worker.STEPS // 2), range(worker.STEPS // 2, worker.STEPS)
    worker.count_solves()
    for method, kind in (("psoft", "FULL_STATE_DICT"), ("oft", "SHARDED_STATE_DICT")):
        accelerator = accelerator_of(state_dict_type=kind)
        model, optimizer = prepared(accelerator, worker.adapted(method))
        found.setdefault("solved", len(worker.SOLVED))
        found["sharded"] = all(is_sharded(parameter) for parameter in trainable(model).values())
        losses = train(accelerator, model, optimizer, half)
        accelerator.save_state(str(out / f"state-{method}"))
        found[method] = losses + train(accelerator, model, optimizer, rest)
        state = accelerator.get_state_dict(model)
        accelerator.unwrap_model(model).save_pretrained(
            str(out / method), is_main_process=accelerator.is_main_process, state_dict=state
        )
        expected = worker.logits(model)
        if accelerator.is_main_process:
            torch.save(expected, out / f"{method}.pt")
        accelerator = accelerator_of(state_dict_type=kind)
        model, optimizer = prepared(accelerator, worker.adapted(method, seed=8))
        accelerator.load_state(str(out / f"state-{method}"))
        found[f"{method} resumed"] = train(accelerator, model, optimizer, rest)
    settings: dict[str, dict[str, Any]] = {
        "whole between": {"reshard_after_forward": False},
        "checkpointed": {"activation_checkpointing": True},
        "one group": {"auto_wrap_policy": "no_wrap"},
        "half": {"mixed_precision": "bf16"},
    }
    for name, options in settings.items():
        accelerator = accelerator_of(**options)
        model, optimizer = prepared(accelerator, worker.adapted("psoft"))
        found[name] = train(accelerator, model, optimizer, evaluate=name == "whole between")
    accelerator = accelerator_of(cpu_ram_efficient_loading=True)
    model, optimizer = prepared(accelerator, worker.adapted("oft"))
    found["oft sent"] = train(accelerator, model, optimizer)
    found["refused"] = worker.refused(lambda: worker.adapted("psoft"))
    return found


def trainer_of(out: Path, fsdp: dict[str, Any] | None) -> Any:
    """A Trainer of STEPS steps with eight rows each over all processes, which saves at half of them."""
    from transformers import Trainer, TrainingArguments

    size = dist.get_world_size() if fsdp is not None else 1
    arguments = TrainingArguments(
        output_dir=str(out),
        use_cpu=True,
        max_steps=worker.STEPS,
        per_device_train_batch_size=worker.ROWS // size,
        per_device_eval_batch_size=worker.ROWS // size,
        learning_rate=worker.RATE,
        lr_scheduler_type="constant",
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=4,
        save_steps=worker.STEPS // 2,
        report_to=[],
        disable_tqdm=True,
        fsdp=fsdp is not None,
        fsdp_config=fsdp,
    )
    assert arguments.device.type == "cpu"  # here it meets the other processes
    if fsdp is not None:
        as_accelerators()
    rows = [{"input_ids": row, "labels": row} for row in some_tokens(3 * worker.ROWS, 9)]
    return Trainer(model=worker.adapted("psoft"), args=arguments, train_dataset=rows, eval_dataset=rows[: worker.ROWS])


def losses_of(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def by_trainer(out: Path) -> dict[str, Any]:
    """transformers' Trainer with `fsdp`: evaluation in between, a checkpoint that is gone on with, the adapter."""
    found: dict[str, Any] = {}
    for kind, reshard in (("FULL_STATE_DICT", False), ("SHARDED_STATE_DICT", True)):
        folder = out / f"trainer-{kind}"
        settings = {"version": 2, "state_dict_type": kind, "reshard_after_forward": reshard}
        trainer = trainer_of(folder, {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", **settings})
        trainer.train()
        found[f"trainer {kind}"] = losses_of(trainer)
        found[f"trainer {kind} evaluated"] = losses_of(trainer, "eval_loss")
        trainer.save_model(str(folder / "adapter"))
        expected = worker.logits(trainer.model)
        if dist.get_rank() == 0:
            torch.save(expected, folder / "logits.pt")
        trainer = trainer_of(folder, {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", **settings})
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{worker.STEPS // 2}"))
        found[f"trainer {kind} resumed"] = losses_of(trainer)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    as_accelerators()
    result = by_trainer(folder) if "trainer" in sys.argv else by_hand(folder)
    worker.report(folder, result)
