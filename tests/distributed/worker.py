"""What each process of tests/test_distributed.py does; run by torchrun, or called in one process for comparison."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import isotune.parallel.processes
import isotune.subspace.solvers
from helpers import OPTIONS_FOR_TINY, down_of, layers_of, randomize, some_tokens, tiny_llama, trainable
from isotune import get_peft_model, regularization_loss
from isotune.methods import METHODS
from isotune.parallel.processes import average_gradients

STEPS = 10
RATE = 0.03
ROWS = 8
SOLVED: list[str] = []


def count_solves() -> None:
    """Note every subspace that this process finds by itself."""
    original = isotune.subspace.solvers.principal_subspace

    def noted(*args: Any, **kwargs: Any) -> Any:
        SOLVED.append("one")
        return original(*args, **kwargs)

    isotune.subspace.solvers.principal_subspace = noted


def adapted(method: str, base: nn.Module | None = None, seed: int = 7, **options: Any) -> Any:
    options = {"target_modules": ["q_proj", "v_proj"], **OPTIONS_FOR_TINY[method], **options}
    torch.manual_seed(seed)  # HRA starts at random pairs of reflections
    model = get_peft_model(tiny_llama() if base is None else base, METHODS[method](**options))
    randomize(model, std=0.02, seed=seed)
    return model.train()


def train(
    model: nn.Module,
    parameters: Any,
    rank: int = 0,
    size: int = 1,
    after_backward: Any = None,
    evaluate: bool = False,
) -> list[float]:
    """Steps of AdamW on the rows of this process; the loss of all rows at each."""
    optimizer = torch.optim.AdamW(parameters, lr=RATE)
    losses = []
    for step in range(STEPS):
        rows = some_tokens(ROWS, 9, seed=step % 3)[rank::size]
        if evaluate:
            logits(model)
            model.train()
        loss = model(input_ids=rows, labels=rows).loss
        (loss + regularization_loss(model)).backward()
        if after_backward is not None:
            after_backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if size > 1:
            dist.all_reduce(mean)
        losses.append(float(mean) / size)
    return losses


def sharded(model: Any, *, with_adapter: bool = True, **options: Any) -> Any:
    """Each block and then the rest by FSDP2, the adapter with them or whole in every process."""
    from torch.distributed.fsdp import fully_shard

    if not with_adapter:
        options["ignored_params"] = set(trainable(model).values())
    for block in model.get_base_model().model.layers:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def logits(model: nn.Module) -> torch.Tensor:
    model.eval()  # which DeepSpeed's engine does not return
    with torch.no_grad():
        return model(input_ids=some_tokens(2, 9)).logits


def save_whole(model: Any, folder: Path) -> None:
    """As the FSDP2 guides do it: the full state dict, of which PEFT writes the adapter's part."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        model.save_pretrained(str(folder), state_dict=state)
    dist.barrier()


def refused(action: Callable[[], Any]) -> str:
    """What a ValueError says, or nothing where there is none."""
    try:
        action()
    except ValueError as error:
        return str(error)
    return ""


def report(folder: Path, found: dict[str, Any]) -> None:
    """Write down what this process has found, and part from the others."""
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def main(run: Callable[[Path], dict[str, Any]]) -> None:
    """`run` with the folder that torchrun was given, by gloo."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    report(folder, run(folder))


def run(out: Path) -> dict[str, Any]:
    rank, size = dist.get_rank(), dist.get_world_size()
    found: dict[str, Any] = {}
    count_solves()
    for method in ("psoft", "oft"):
        model = adapted(method)
        found[f"solved {method}"] = len(SOLVED)
        replica = nn.parallel.DistributedDataParallel(model)
        found[f"ddp {method}"] = train(replica, trainable(model).values(), rank, size)
        if method == "psoft":
            buffers = {name: list(tensor.shape) for name, tensor in replica.module.named_buffers()}
            found["sent buffers"] = [name for name in buffers if name not in replica.parameters_to_ignore]
        model = sharded(adapted(method))
        found[f"fsdp {method}"] = train(model, [p for p in model.parameters() if p.requires_grad], rank, size)
        save_whole(model, out / f"fsdp-{method}")
        expected = logits(model)
        if rank == 0:
            torch.save(expected, out / f"fsdp-{method}.pt")
    model = sharded(adapted("psoft"), with_adapter=False)
    own = list(trainable(model).values())
    found["fsdp ignored"] = train(model, own, rank, size, lambda: average_gradients(own))
    model = sharded(adapted("psoft"), reshard_after_forward=False)
    found["fsdp evaluated"] = train(
        model, [p for p in model.parameters() if p.requires_grad], rank, size, evaluate=True
    )
    model = sharded(adapted("hra", regularizer_weight=0.3))
    found["fsdp hra"] = train(model, [p for p in model.parameters() if p.requires_grad], rank, size)
    model = adapted("psoft")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    replica = nn.parallel.DistributedDataParallel(model)
    found["ddp checkpointed"] = train(replica, trainable(model).values(), rank, size)
    model = adapted("psoft")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = sharded(model)
    found["fsdp checkpointed"] = train(model, [p for p in model.parameters() if p.requires_grad], rank, size)
    found["merge refused"] = refused(model.merge_adapter)
    # A second adapter on weights that are already spread: each weight is gathered for it.
    before = len(SOLVED)
    model.add_adapter("late", METHODS["psoft"](r=6, target_modules=["q_proj"]))
    found["solved late"] = len(SOLVED) - before
    found["late reader"] = float(down_of(layers_of(model)[0], "late").double().square().sum())
    # One process alone must not wait for the others for ever.
    isotune.parallel.processes.WAIT = timedelta(seconds=1)
    if rank == 0:
        found["alone"] = bool(logits(adapted("psoft")).isfinite().all())
    dist.barrier()
    before = len(SOLVED)
    adapted("psoft")
    found["solved together again"] = len(SOLVED) - before
    return found


if __name__ == "__main__":
    main(run)
