"""Rows of UORA's random matrices that are re-initialised: against a plain twin, resumed, and what is refused."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from helpers import Chain, assert_unchanged, layers_of, relative_error, snapshot, some_tokens, tiny_llama, trainable
from isotune import PsoftConfig, UoraConfig, get_peft_model
from isotune.adapter.shared import SharedAdapter
from isotune.moving import MovingSchedule, Reinitialization, UoraSchedule

SIZES = (12, 20, 12, 20)
"""Two layers of one shape, and one of its transpose."""
RANK = 6
STEPS = 20


def model_of(**options: Any) -> Any:
    config = UoraConfig(**{"r": RANK, "d_initial": 1.0, "target_modules": r"(.*\.)?layers\.\d+", **options})
    return get_peft_model(Chain(*SIZES), config)


def adapters(model: nn.Module) -> list[SharedAdapter]:
    return [layer.adapter("default") for layer in layers_of(model)]  # type: ignore[misc]


def optimiser(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(trainable(model).values(), lr=1.0, momentum=0.5)


def schedule(**options: Any) -> UoraSchedule:
    return UoraSchedule(**{"threshold": 1.0, "weight": 0.4, "every": 6, **options})


def data(step: int) -> tuple[Tensor, Tensor]:
    """Inputs of a step, and a linear map of them."""
    x, wanted = (
        torch.randn(n, 12, generator=torch.Generator().manual_seed(seed)) for n, seed in ((64, step), (20, 99))
    )
    return x, (x @ wanted.T / 4).tanh()


def loss_of(model: Any, step: int) -> Tensor:
    x, target = data(step)
    return (model(x) - target).square().sum(1).mean()


def train(model: Any, using: UoraSchedule | None, own: Any = None, steps: range = range(STEPS)) -> list[float]:
    own, losses = own or optimiser(model), []
    for step in steps:
        loss = loss_of(model, step)
        own.zero_grad()
        loss.backward()
        own.step()
        if using is not None:
            using.step(model, own)
        losses.append(float(loss.detach()))
    return losses


class Twin(nn.Module):
    """The published update and the rule of our page in plain torch, with random matrices of its own."""

    def __init__(self, weight: float, threshold: float) -> None:
        super().__init__()
        self.base, self.weight, self.threshold = Chain(*SIZES).requires_grad_(False), weight, threshold
        self.d = nn.ParameterList(torch.ones(RANK) for _ in range(3))
        self.b = nn.ParameterList(torch.zeros(out) for out in SIZES[1:])
        self.counts = [0] * RANK
        self.rows = {(part, n): self.drawn(part, n) for part in (0, 1) for n in (12, 20)}

    def drawn(self, part: int, width: int) -> Tensor:
        factor, upper = np.linalg.qr(np.random.RandomState([0, part]).standard_normal((RANK, width)).T)
        return torch.from_numpy((factor * np.sign(np.diag(upper))).T).float()

    def forward(self, x: Tensor) -> Tensor:
        for layer, d, b in zip(self.base.layers, self.d, self.b, strict=True):
            up, down = self.rows[1, layer.out_features].T, self.rows[0, layer.in_features]
            x = torch.tanh(nn.functional.linear(x, layer.weight + b.diag() @ up @ d.diag() @ down, layer.bias))
        return x

    def boundary(self) -> int:
        small = [row for row in range(RANK) if np.mean([abs(d[row].item()) for d in self.d]) < self.threshold]
        for row in small:
            self.counts[row] += 1
            for (part, width), matrix in self.rows.items():
                new = np.random.RandomState([0, part, row, self.counts[row]]).standard_normal(width)
                matrix[row] *= 1 - self.weight
                matrix[row] += self.weight * torch.from_numpy(new / np.linalg.norm(new)).float()
        return len(small)


def test_a_training_with_three_boundaries_is_that_of_a_plain_twin() -> None:
    model, twin, using = model_of(), Twin(0.4, 1.0), schedule()
    found = train(model, using)
    own, losses, renewed = optimiser(twin), [], []
    for step in range(STEPS):
        loss = loss_of(twin, step)
        own.zero_grad()
        loss.backward()
        own.step()
        if step + 1 in (6, 12, 18):
            renewed.append(twin.boundary())
        losses.append(float(loss.detach()))
    assert found == pytest.approx(losses, rel=1e-5)
    assert [len(one.rows) for one in using.history] == renewed
    assert all(0 < count < RANK for count in renewed)
    for adapter, d, b in zip(adapters(model), twin.d, twin.b, strict=True):
        assert adapter.reinitializations.tolist() == twin.counts
        torch.testing.assert_close(adapter.vera_lambda_d, d, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(adapter.vera_lambda_b, b, rtol=1e-5, atol=1e-6)
    assert found != pytest.approx(train(model_of(), None), rel=1e-3)


def test_what_a_boundary_changes_is_said_and_is_all() -> None:
    model = model_of()
    own = optimiser(model)
    train(model, schedule(weight=0.01), own)
    with torch.no_grad():
        for adapter, value in zip(adapters(model), (0.2, -0.9, 1.5), strict=True):  # 0.87 in the mean
            adapter.vera_lambda_d[[1, 4]] = value
            adapter.vera_lambda_d[2] = -2.0
    layers = {layer.key: layer for layer in layers_of(model)}
    before = {key: layer.get_delta_weight("default") for key, layer in layers.items()}
    parameters = {name: p.clone() for name, p in trainable(model).items()}
    state = copy.deepcopy(own.state_dict())
    found = schedule(every=1, weight=0.01, threshold=1.0).step(model, own, STEPS)
    assert isinstance(found, Reinitialization)
    assert set(found.rows) >= {1, 4}
    assert 2 not in found.rows
    for key, layer in layers.items():
        change = relative_error(layer.get_delta_weight("default"), before[key])
        assert found.changes[key] == pytest.approx(change, rel=1e-3)
        assert change > 0
    assert found.change == max(found.changes.values())
    assert all(torch.equal(p, parameters[name]) for name, p in trainable(model).items())
    for index, kept in state["state"].items():
        assert torch.equal(own.state_dict()["state"][index]["momentum_buffer"], kept["momentum_buffer"])
    a, b = adapters(model)[0], adapters(model)[2]
    assert torch.equal(a.reinitializations, b.reinitializations)
    device = torch.device("cpu")
    assert a.matrices(torch.float32, device)[0].data_ptr() == b.matrices(torch.float32, device)[0].data_ptr()


def test_nothing_is_renewed_before_anything_is_learnt() -> None:
    model, using = model_of(), schedule(every=1)
    found = using.step(model, optimiser(model))
    assert found is not None
    assert found.rows == ()
    assert found.change == 0.0


def test_a_training_that_goes_on_from_its_file_has_the_same_curve(tmp_path: Path) -> None:
    """Between boundaries, in another object and with another optimiser that has the first one's state."""
    whole = train(model_of(), schedule())
    model = model_of()
    own = optimiser(model)
    first = train(model, schedule(), own, range(14))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Chain(*SIZES), tmp_path, is_trainable=True)
    other = optimiser(again)
    other.load_state_dict(own.state_dict())
    using = schedule()
    rest = []
    for step in range(14, STEPS):
        loss = loss_of(again, step)
        other.zero_grad()
        loss.backward()
        other.step()
        using.step(again, other, step + 1)
        rest.append(float(loss.detach()))
    assert first + rest == pytest.approx(whole, rel=1e-6)
    assert [one.number for one in using.history] == [3]


def trainer(folder: Path, using: UoraSchedule) -> Trainer:
    torch.manual_seed(0)
    config = UoraConfig(r=8, d_initial=0.1, target_modules=["q_proj", "v_proj"])
    rows = [{"input_ids": row, "labels": row} for row in some_tokens(16, 9, seed=3)]
    settings = TrainingArguments(
        str(folder),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        save_steps=1,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
    )
    return Trainer(get_peft_model(tiny_llama(layers=1), config), settings, train_dataset=rows, callbacks=[using])


@pytest.mark.slow
def test_a_trainer_resumed_at_and_between_boundaries_has_the_same_curve(tmp_path: Path) -> None:
    def curve(trained: Trainer) -> list[float]:
        return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]

    using = schedule(every=3, threshold=0.1)
    whole = trainer(tmp_path / "whole", using)
    whole.train()
    assert [one.done for one in using.history] == [3, 6]
    assert all(one.rows for one in using.history)
    for stop, expected in ((3, [3, 6]), (4, [6])):
        part = schedule(every=3, threshold=0.1)
        again = trainer(tmp_path / f"from-{stop}", part)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
        assert curve(again) == pytest.approx(curve(whole), abs=1e-6)
        assert [one.done for one in part.history] == expected
        assert torch.equal(adapters(again.model)[0].reinitializations, adapters(whole.model)[0].reinitializations)


@pytest.mark.parametrize(("weight", "times"), [(0.5, 0.87), (1.0, 1.41)])
def test_how_much_an_update_changes_where_all_of_d_are_equal(weight: float, times: float) -> None:
    """As the method's page has it: about the root of the share of the rows, times a factor of the weight."""
    model = get_peft_model(Chain(96, 96), UoraConfig(r=64, target_modules=["layers.0"]))
    (adapter,) = adapters(model)
    with torch.no_grad():
        adapter.vera_lambda_b.normal_(generator=torch.Generator().manual_seed(0))
        adapter.vera_lambda_d[:8].mul_(0.999)
    found = UoraSchedule(threshold=0.09995, weight=weight, every=1).step(model, None)
    assert found is not None
    assert len(found.rows) == 8
    assert found.change == pytest.approx(times * (8 / 64) ** 0.5, rel=0.15)


def test_ctrl_c_at_any_line_of_a_boundary_changes_nothing() -> None:
    model = model_of()
    own = optimiser(model)
    train(model, None, own)
    using, exchange = schedule(every=1), [SharedAdapter.hold, SharedAdapter.refresh, SharedAdapter._made]
    functions = [UoraSchedule._act.__wrapped__, *exchange]  # type: ignore[attr-defined]
    codes = {function.__code__ for function in functions}
    whole = copy.deepcopy(model)
    assert schedule(every=1).step(whole, own) is not None
    after = whole.state_dict()

    def interrupted(at: int) -> bool:
        """Renew rows until that line of these functions; returns whether there is such a line."""
        lines = 0

        def trace(frame: Any, event: str, _: Any) -> Any:
            nonlocal lines
            if frame.f_code not in codes:
                return None
            if event == "line":
                lines += 1
                if lines > at:
                    sys.settrace(before)
                    raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            using.step(model, own, 1)
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False

    x, state = data(0)[0], copy.deepcopy(model.state_dict())
    expected, at = model(x).detach(), 0
    while interrupted(at):
        now = model.state_dict()
        if using.history:  # all is done, and only the answer was lost
            assert all(torch.equal(tensor, after[name]) for name, tensor in now.items()), at
            break
        assert all(torch.equal(tensor, state[name]) for name, tensor in now.items()), at
        assert torch.equal(model(x), expected), at
        at += 1
    assert at > 30
    assert len(using.history) == 1


REFUSED: list[tuple[str, Any, dict[str, Any], str]] = [
    ("another method", PsoftConfig(r=4, target_modules=r".*layers\.\d+"), {}, "only UORA has random rows"),
    ("a threshold above the start", UoraConfig(r=4, target_modules=r".*layers\.\d+"), {"threshold": 1.2}, "d_initial"),
    ("no such adapter", UoraConfig(r=4, target_modules=r".*layers\.\d+"), {"adapter": "other"}, "no isotune adapter"),
]


@pytest.mark.parametrize(("config", "options", "said"), [one[1:] for one in REFUSED], ids=[one[0] for one in REFUSED])
def test_a_model_that_cannot_be_renewed(config: Any, options: dict[str, Any], said: str) -> None:
    model = get_peft_model(Chain(), config)
    before = snapshot(model)
    with pytest.raises(ValueError, match=said):
        schedule(**{"threshold": 0.1, **options}).step(model, optimiser(model))
    assert_unchanged(model, before)


def test_a_merged_adapter_another_weight_and_one_that_has_diverged_are_refused() -> None:
    model = model_of()
    own = optimiser(model)
    train(model, schedule(), own)
    with pytest.raises(ValueError, match=r"with weight=0\.4, .* not 0\.5"):
        schedule(weight=0.5).step(model, own)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        schedule().step(model, own)
    model.unmerge_adapter()
    with torch.no_grad():
        adapters(model)[1].vera_lambda_d[0] = float("nan")
    with pytest.raises(ValueError, match="diverged"):
        schedule(every=1).step(model, own, 40)
    with pytest.raises(ValueError, match="cannot move: its method has no subspace"):
        MovingSchedule(1).step(model, own)


@pytest.mark.parametrize("left_out", ["threshold", "weight", "every"])
def test_what_is_not_public_has_no_default(left_out: str) -> None:
    given = {"threshold": 0.1, "weight": 0.5, "every": 10}
    with pytest.raises(TypeError, match=left_out):
        UoraSchedule(**{name: value for name, value in given.items() if name != left_out})


@pytest.mark.parametrize(
    "options",
    [
        *[{"threshold": value} for value in (0.0, float("nan"), "0.1", True)],
        *[{"weight": value} for value in (0.0, 1.5, 1e-60, "0.5", True)],
        {"every": 0},
        {"unit": "s"},
    ],
)
def test_values_that_are_not_allowed(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        schedule(**options)
