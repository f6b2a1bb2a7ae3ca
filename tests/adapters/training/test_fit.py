from __future__ import annotations

import copy
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training_task import Kill, Recorder, Shrink, Tiny, loader, tiny

from nni_plugin import ChannelPruner, Channels, Iterative
from nni_plugin.adapters.training import Callback, TrainingConfig, TrainingState, evaluate, fit
from nni_plugin.adapters.training.config import SCHEDULERS
from nni_plugin.criteria import TaylorFO
from nni_plugin.errors import TrainingError
from nni_plugin.masks import mask_plan

FAST: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.0}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"opt": "adamw", "lr": 3e-3, "smoothing": 0.1},
        {"mixup": 0.2, "model_ema": True, "model_ema_decay": 0.9},
        {"amp": "bf16", "warmup_epochs": 1, "clip_grad": 1.0},
        {"channels_last": True},
    ],
    ids=["sgd", "adamw-smoothing", "mixup-ema", "bf16-warmup-clip", "channels-last"],
)
def test_learns_planted_classes(settings: dict[str, Any]) -> None:
    model = tiny()
    history = fit(
        model,
        loader(128),
        TrainingConfig(**{"epochs": 6, **FAST, **settings}),
        test_loader=loader(64, seed=1),
        device="cpu",
    )
    assert [row["epoch"] for row in history] == list(range(6))
    assert history[-1]["step"] == 6 * 16
    assert history[-1]["top1"] > 90
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    # What was reported is what the caller now holds.
    assert evaluate(model, loader(64, seed=1))["top1"] == history[-1]["top1"]


def test_callbacks_are_called_in_order_and_see_the_model_itself() -> None:
    first, second, model = Recorder(), Recorder(), tiny()
    second.calls = first.calls
    fit(model, loader(16), TrainingConfig(epochs=2, amp="bf16", **FAST), callbacks=[first, second], device="cpu")
    epochs = ["begin", *2 * ["backward", "step"], "epoch 0", *2 * ["backward", "step"], "epoch 1"]
    assert first.calls == [call for call in epochs for _ in range(2)]
    assert first.state.model is model
    assert isinstance(first.state.optimizer, torch.optim.SGD)
    assert (first.state.step, first.state.epoch, first.state.total_steps) == (4, 2, 4)
    # Accelerate patches `forward` of what it prepares: not the user's model.
    assert "forward" not in vars(model)


def test_train_loss_is_the_mean_over_images() -> None:
    recorder = Recorder()
    data = loader(20, batch_size=8)
    history = fit(tiny(), data, TrainingConfig(epochs=1, **FAST), callbacks=[recorder], device="cpu")
    a, b, c = recorder.losses
    assert history[0]["train_loss"] == pytest.approx((8 * a + 8 * b + 4 * c) / 20)


class _Gradients(Callback):
    """Keeps the gradients before, and the change of the weights by, the first step."""

    def on_train_begin(self, state: TrainingState) -> None:
        self.model = state.model
        self.before = [p.detach().clone() for p in state.model.parameters()]

    def on_backward(self, loss: float) -> None:
        self.gradients = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]

    def on_step(self) -> None:
        self.change = [b - p.detach() for b, p in zip(self.before, self.model.parameters(), strict=True)]


def _norm(tensors: list[torch.Tensor]) -> float:
    return float(torch.cat([t.flatten() for t in tensors]).norm())


def test_gradients_are_clipped_after_the_callbacks_saw_them() -> None:
    seen = _Gradients()
    config = TrainingConfig(epochs=1, lr=0.5, momentum=0.0, weight_decay=0.0, sched="none", clip_grad=1e-2)
    fit(tiny(), loader(8), config, callbacks=[seen], device="cpu")
    assert _norm(seen.gradients) > 0.1
    assert _norm(seen.change) == pytest.approx(0.5 * 1e-2, rel=1e-3)
    for change, gradient in zip(seen.change, seen.gradients, strict=True):
        torch.testing.assert_close(change / 0.5, gradient * 1e-2 / _norm(seen.gradients), rtol=2e-2, atol=1e-6)


def test_learning_rate_follows_the_schedule_by_minibatches() -> None:
    rates = []

    class Rates(Recorder):
        def on_backward(self, loss: float) -> None:
            rates.append(self.state.optimizer.param_groups[0]["lr"])

    fit(tiny(), loader(32), TrainingConfig(epochs=2, lr=0.08), callbacks=[Rates()], device="cpu")
    expected = [0.04 * (1 + torch.cos(torch.tensor(torch.pi * step / 8)).item()) for step in range(8)]
    assert rates == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("sched", SCHEDULERS)
def test_every_schedule_runs(sched: str) -> None:
    history = fit(tiny(), loader(16), TrainingConfig(epochs=3, sched=sched, warmup_epochs=1), device="cpu")
    assert all(0 <= row["lr"] <= 0.1 for row in history)


def test_modes_are_kept_and_frozen_parts_stay() -> None:
    model = tiny().eval()
    model.dropout.train()
    model.head.requires_grad_(False)
    before = model.head.weight.clone()
    fit(model, loader(16), TrainingConfig(epochs=1), test_loader=loader(16), device="cpu")
    assert not model.training
    assert model.dropout.training
    assert torch.equal(model.head.weight, before)


def test_averaged_weights_end_in_the_model() -> None:
    recorder, model = Recorder(), tiny()
    config = TrainingConfig(epochs=1, model_ema=True, **FAST)
    fit(model, loader(32), config, callbacks=[recorder], device="cpu")
    plain = tiny()
    fit(plain, loader(32), TrainingConfig(epochs=1, **FAST), device="cpu")
    ema = recorder.state.ema
    assert ema is not None
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), ema.state_dict().values(), strict=True))
    assert not torch.equal(model.head.weight, plain.head.weight)


def test_last_odd_minibatch_is_mixed_but_for_one() -> None:
    fit(tiny(), loader(13, batch_size=8), TrainingConfig(epochs=1, mixup=1.0), device="cpu")


def test_mixup_leaves_the_data_unchanged() -> None:
    data = loader(16, batch_size=16, shuffle=False)
    before = data.dataset.tensors[0].clone()
    fit(tiny(), data, TrainingConfig(epochs=1, mixup=1.0), device="cpu")
    assert torch.equal(data.dataset.tensors[0], before)


def test_other_accelerators_keep_working() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    mine = Accelerator(cpu=True, mixed_precision="no")
    try:
        fit(tiny(), loader(8), TrainingConfig(epochs=1, amp="bf16"), device="cpu")
        assert mine.mixed_precision == "no"
        assert mine.num_processes == 1
    finally:
        AcceleratorState._shared_state.clear()
        PartialState._shared_state.clear()


def test_quiet_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fit(tiny(), loader(16), TrainingConfig(epochs=1), test_loader=loader(8), device="cpu")
    quiet = capsys.readouterr()
    assert quiet.out == ""
    assert quiet.err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    fit(tiny(), loader(16), TrainingConfig(epochs=1), device="cpu", phase="pretrain")
    assert "pretrain 1/1" in capsys.readouterr().err
    fit(tiny(), loader(16), TrainingConfig(epochs=1), device="cpu", progress=False)
    assert capsys.readouterr().err == ""


def test_no_epochs_do_nothing() -> None:
    model = tiny()
    before = model.head.weight.clone()
    assert fit(model, loader(8), TrainingConfig(epochs=0), device="cpu") == []
    assert torch.equal(model.head.weight, before)


class _Watched(ChannelPruner):
    """Writes down how far from zero the removed channels of the average have ever been when an epoch ends."""

    def on_train_begin(self, state: TrainingState) -> None:
        super().on_train_begin(state)
        self.leaked: list[float] = []

    def on_epoch_end(self, epoch: int, metrics: dict[str, float]) -> None:
        dead = copy.deepcopy(self.ema)
        assert dead is not None
        mask_plan(dead, self.plan(), self.groups)
        pairs = zip(self.ema.parameters(), dead.parameters(), strict=True)
        self.leaked.append(max(float((a - b).detach().abs().max()) for a, b in pairs))


def test_the_average_of_removed_channels_is_zero() -> None:
    """Momentum goes on moving weights that are held at zero; the average must not take it in."""
    model = tiny(dropout=0.0)
    pruner = _Watched(model, torch.zeros(1, 3, 8, 8), TaylorFO(), Channels(14), schedule=Iterative(3, 3), cut="never")
    config = TrainingConfig(epochs=2, lr=0.05, model_ema=True)
    fit(model, loader(64), config, callbacks=[pruner], device="cpu")
    assert pruner.plan().channels_kept == 14
    assert pruner.leaked == [0.0, 0.0]


class _Splits:
    def __init__(self) -> None:
        self.train, self.test = loader(32), loader(16, seed=1)


def test_takes_splits_as_well() -> None:
    assert "top1" in fit(tiny(), _Splits(), TrainingConfig(epochs=1), device="cpu")[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, d: (m.requires_grad_(False), d), "unfreeze"),
        (lambda m, d: (m, [(torch.zeros(2, 3, 8, 8), torch.zeros(2).long())]), "DataLoader"),
        (lambda m, d: (m, DataLoader(TensorDataset(torch.zeros(4, 3, 8, 8)), 8, drop_last=True)), "without batches"),
        (lambda m, d: (_with_head(m, 2), d), "has 2 outputs but the data holds labels 0 to 3"),
    ],
    ids=["frozen", "no loader", "empty", "too few classes"],
)
def test_bad_input_is_refused(change: Any, message: str) -> None:
    model, data = change(tiny(), loader(16, shuffle=False))
    with pytest.raises(TrainingError, match=message):
        fit(model, data, TrainingConfig(epochs=1), device="cpu")


def _with_head(model: Tiny, classes: int) -> Tiny:
    model.head = nn.Linear(12, classes)
    return model


@pytest.mark.parametrize(
    ("device", "amp", "message"),
    [("cpu", "fp16", "--amp fp16"), ("coffee", "no", "--device"), ("cuda:99", "no", "--device")],
)
def test_impossible_hardware_is_refused(device: str, amp: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        fit(tiny(), loader(8), TrainingConfig(epochs=1, amp=amp), device=device)


def test_interrupt_comes_through() -> None:
    with pytest.raises(KeyboardInterrupt):
        fit(tiny(), loader(16), TrainingConfig(epochs=1), callbacks=[Kill(1)], device="cpu")


def _shrinking_process(path: str) -> None:
    model = tiny(dropout=0.0)
    fit(model, loader(64), TrainingConfig(epochs=2, **FAST), callbacks=[Shrink(at=(2, 5))], device="cpu")
    import torch.distributed

    torch.save(model.state_dict(), f"{path}/{torch.distributed.get_rank()}.pt")


def test_two_processes_agree_while_the_model_shrinks(tmp_path: Any) -> None:
    # Fresh processes: a fork of one in which autograd has run may hang or fail.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    search = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [*command, str(tmp_path)], env={**os.environ, "PYTHONPATH": search}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    a, b = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert a["hidden.weight"].shape == (6, 128)
    parameters = [name for name, _ in tiny().named_parameters()]
    assert all(torch.equal(a[name], b[name]) for name in parameters)


if __name__ == "__main__":
    _shrinking_process(sys.argv[1])
