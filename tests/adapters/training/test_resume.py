from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from training_task import Kill, Recorder, Shrink, loader, tiny

from nni_plugin.adapters.training import (
    Callback,
    TrainingConfig,
    TrainingState,
    checkpoint_path,
    fit,
)
from nni_plugin.errors import TrainingError

# 8 minibatches an epoch.
EPOCHS = 3


class _EpochSampler(Sampler[int]):
    """Order and augmentation of an image are fixed by (epoch, index)."""

    def __init__(self, size: int) -> None:
        self.size, self.epoch = size, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Any:
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(100 + self.epoch))
        return iter((order + self.epoch * self.size).tolist())


class _Augmented(Dataset[Any]):
    def __init__(self, plain: Any) -> None:
        self.plain = plain

    def __len__(self) -> int:
        return len(self.plain)

    def __getitem__(self, key: int) -> Any:
        image, target = self.plain[key % len(self.plain)]
        return image + 0.1 * torch.randn(image.shape, generator=torch.Generator().manual_seed(key)), target


def _augmented() -> DataLoader[Any]:
    data = _Augmented(loader(64).dataset)
    return DataLoader(data, batch_size=8, sampler=_EpochSampler(64))


def _run(
    folder: Path,
    config: TrainingConfig,
    kill_at: int | None = None,
    shrink: bool = False,
    resume: bool = False,
    data: Any = None,
) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    torch.manual_seed(int(resume) + 99)  # what a new process starts with must not matter
    callbacks: list[Callback] = [Kill(kill_at)]
    if shrink:
        callbacks.insert(0, Shrink(at=(6, 13)))
    model = tiny()
    history = fit(
        model,
        loader(64) if data is None else data,
        config,
        test_loader=loader(16, seed=1),
        callbacks=callbacks,
        checkpoint_dir=folder,
        resume=resume,
        device="cpu",
    )
    return model.state_dict(), [{k: v for k, v in row.items() if k != "seconds"} for row in history]


def _assert_same(one: Any, other: Any) -> None:
    assert one[1] == other[1]
    assert one[0].keys() == other[0].keys()
    for name, value in one[0].items():
        assert torch.equal(value, other[0][name]), name


@pytest.mark.parametrize("kill_at", [3, 8, 12, 16, 21])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"opt": "adamw", "lr": 0.01, "model_ema": True, "clip_grad": 1.0},
        {"mixup": 0.4, "checkpoint_every": 3, "warmup_epochs": 1},
        {"opt": "adam", "lr": 0.01, "checkpoint_every": 3, "model_ema": True, "sched": "step", "decay_epochs": 1},
    ],
    ids=["sgd", "adamw-ema-clip", "mixup-mid-epoch", "adam-ema-mid-epoch"],
)
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, settings: Any, kill_at: int) -> None:
    config = TrainingConfig(**{"epochs": EPOCHS, "lr": 0.05, **settings})
    whole = _run(tmp_path / "whole", config)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "killed", config, kill_at=kill_at)
    _assert_same(_run(tmp_path / "killed", config, resume=True), whole)


@pytest.mark.parametrize("kill_at", [5, 7, 12, 15, 20])
@pytest.mark.parametrize("opt", ["sgd", "adamw"])
@pytest.mark.parametrize("model_ema", [False, True])
def test_shrinking_callback_survives(tmp_path: Path, opt: str, model_ema: bool, kill_at: int) -> None:
    config = TrainingConfig(epochs=EPOCHS, opt=opt, lr=0.02, model_ema=model_ema, checkpoint_every=2)
    whole = _run(tmp_path / "whole", config, shrink=True)
    assert whole[0]["hidden.weight"].shape == (6, 128)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "killed", config, shrink=True, kill_at=kill_at)
    _assert_same(_run(tmp_path / "killed", config, shrink=True, resume=True), whole)


def test_order_and_augmentation_by_epoch_survive_a_kill_in_mid_epoch(tmp_path: Path) -> None:
    config = TrainingConfig(epochs=EPOCHS, lr=0.05, checkpoint_every=3)
    whole = _run(tmp_path / "whole", config, data=_augmented())
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "killed", config, kill_at=14, data=_augmented())
    _assert_same(_run(tmp_path / "killed", config, resume=True, data=_augmented()), whole)


def test_a_sampler_is_told_the_epoch(tmp_path: Path) -> None:
    told: list[int] = []
    data = _augmented()
    plain = data.sampler.set_epoch
    data.sampler.set_epoch = lambda epoch: (told.append(epoch), plain(epoch))
    fit(tiny(), data, TrainingConfig(epochs=2), device="cpu")
    assert sorted(set(told)) == [0, 1]
    assert told == sorted(told)


def test_killed_twice_with_a_generator_of_the_loader(tmp_path: Path) -> None:
    def data() -> DataLoader[Any]:
        return DataLoader(loader(64).dataset, 8, shuffle=True, generator=torch.Generator().manual_seed(5))

    config = TrainingConfig(epochs=EPOCHS, lr=0.05, checkpoint_every=2)
    whole = _run(tmp_path / "whole", config, data=data())
    for kill_at, resume in ((5, False), (13, True)):
        with pytest.raises(KeyboardInterrupt):
            _run(tmp_path / "killed", config, kill_at=kill_at, resume=resume, data=data())
    _assert_same(_run(tmp_path / "killed", config, resume=True, data=data()), whole)


def test_resuming_a_finished_run_gives_its_result_without_training(tmp_path: Path) -> None:
    config = TrainingConfig(epochs=1, model_ema=True)
    whole = _run(tmp_path, config)
    recorder, model = Recorder(), tiny()
    with pytest.raises(TrainingError, match="callbacks"):
        fit(model, loader(64), config, callbacks=[recorder], checkpoint_dir=tmp_path, resume=True, device="cpu")
    _assert_same(_run(tmp_path, config, kill_at=1, resume=True), whole)


def test_callbacks_come_back_before_the_weights(tmp_path: Path) -> None:
    order: list[str] = []

    class Watch(Callback):
        def on_train_begin(self, state: TrainingState) -> None:
            self.state = state
            self.fresh = state.model.head.weight.detach().clone()
            order.append(f"begin {state.step}")

        def state_dict(self) -> dict[str, Any]:
            return {"steps": self.state.step}

        def load_state_dict(self, state: Any) -> None:
            order.append(f"load {state['steps']}")
            assert torch.equal(self.state.model.head.weight, self.fresh)

    config = TrainingConfig(epochs=1)
    for resume in (False, True):
        fit(tiny(), loader(16), config, callbacks=[Watch()], checkpoint_dir=tmp_path, resume=resume, device="cpu")
    assert order == ["begin 0", "begin 2", "load 2"]


class _Poison(Callback):
    """Makes the loss, or only the weights, not finite after `at` minibatches."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_begin(self, state: TrainingState) -> None:
        self.state = state

    def on_step(self) -> None:
        if self.state.step == self.at:
            nn.init.constant_(self.state.model.head.bias, float("nan"))


@pytest.mark.parametrize(("at", "message"), [(11, "loss is nan at step 11, lower --lr"), (16, "weights are not")])
def test_divergence_raises_and_leaves_the_checkpoint(tmp_path: Path, at: int, message: str) -> None:
    config = TrainingConfig(epochs=EPOCHS)
    with pytest.raises(TrainingError, match=message):
        fit(tiny(), loader(64), config, callbacks=[_Poison(at)], checkpoint_dir=tmp_path, device="cpu")
    assert [file.name for file in tmp_path.iterdir()] == ["finetune.pt"]
    history = fit(
        tiny(), loader(64), config, callbacks=[_Poison(0)], checkpoint_dir=tmp_path, resume=True, device="cpu"
    )
    assert [row["step"] for row in history] == [8, 16, 24]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    path.write_bytes(content)


def _pickle(path: Path) -> None:
    torch.save({"format": 1, "settings": "{}", "content": nn.Linear(2, 2)}, path)


@pytest.mark.parametrize(
    "damage",
    [
        _cut,
        _flip,
        _pickle,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("hello"),
        lambda path: torch.save([1], path),
    ],
    ids=["truncated", "flipped bit", "pickled object", "empty", "text", "other content"],
)
def test_damaged_checkpoint_is_refused_in_one_line(tmp_path: Path, damage: Any) -> None:
    config = TrainingConfig(epochs=1)
    _run(tmp_path, config)
    damage(checkpoint_path(tmp_path, "finetune"))
    with pytest.raises(TrainingError, match=r"finetune\.pt is damaged") as caught:
        _run(tmp_path, config, resume=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "data", "message"),
    [
        (TrainingConfig(epochs=1, lr=0.2), None, "config.lr was 0.1, is now 0.2"),
        (TrainingConfig(epochs=2), None, "config.epochs was 1, is now 2"),
        (TrainingConfig(epochs=1), loader(32), "data.batches was 8, is now 4"),
    ],
)
def test_checkpoint_of_another_run_is_refused(tmp_path: Path, config: Any, data: Any, message: str) -> None:
    _run(tmp_path, TrainingConfig(epochs=1))
    with pytest.raises(TrainingError, match=message):
        _run(tmp_path, config, resume=True, data=data)


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    config = TrainingConfig(epochs=1)
    fit(tiny(), loader(16), config, checkpoint_dir=tmp_path, device="cpu")
    other = tiny()
    other.head = nn.Linear(12, 5)
    with pytest.raises(TrainingError, match=r"model\.shapes\.head\.bias was"):
        fit(other, loader(16), config, checkpoint_dir=tmp_path, resume=True, device="cpu")


def test_phases_keep_their_own_checkpoints(tmp_path: Path) -> None:
    for phase in ("pretrain", "finetune"):
        fit(tiny(), loader(8), TrainingConfig(epochs=1), checkpoint_dir=tmp_path, phase=phase, device="cpu")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["finetune.pt", "pretrain.pt"]


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failed_write_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    config = TrainingConfig(epochs=EPOCHS)
    whole = _run(tmp_path / "whole", config)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "killed", config, kill_at=9)
    before = checkpoint_path(tmp_path / "killed", "finetune").read_bytes()

    def fail(descriptor: int) -> None:
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        expected = TrainingError if isinstance(failure, OSError) else KeyboardInterrupt
        with pytest.raises(expected):
            _run(tmp_path / "killed", config, resume=True)
    assert [file.name for file in (tmp_path / "killed").iterdir()] == ["finetune.pt"]
    assert checkpoint_path(tmp_path / "killed", "finetune").read_bytes() == before
    _assert_same(_run(tmp_path / "killed", config, resume=True), whole)


def test_a_state_that_cannot_be_read_back_safely_is_refused(tmp_path: Path) -> None:
    class Bad(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"layers": {1, 2}}

    with pytest.raises(TrainingError, match=r"checkpoint\['callbacks'\]\[0\]\['layers'\].*got set"):
        fit(tiny(), loader(8), TrainingConfig(epochs=1), callbacks=[Bad()], checkpoint_dir=tmp_path, device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_resume_needs_a_folder() -> None:
    with pytest.raises(TrainingError, match="checkpoint_dir"):
        fit(tiny(), loader(8), TrainingConfig(epochs=1), resume=True, device="cpu")
