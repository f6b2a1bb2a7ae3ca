"""Torch-Pruning's own pruners: the loop is its benchmark's, gradients shrink with the weights, failures are said."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torch_pruning as tp
from hosted import CLASSES, EXAMPLES, loss, minibatches, network, task
from torch import Tensor, nn

from nni_plugin import MACs
from nni_plugin.adapters.hosts import through_host
from nni_plugin.adapters.torch_pruning import host_pruner
from nni_plugin.adapters.torch_pruning.host_pruner import prune
from nni_plugin.cost import count
from nni_plugin.errors import BudgetError, SurgeryError


def same(one: nn.Module, other: nn.Module) -> bool:
    there = other.state_dict()
    return all(value.shape == there[name].shape and torch.equal(value, there[name]) for name, value in state(one))


def state(model: nn.Module) -> Any:
    return model.state_dict().items()


@pytest.mark.parametrize("method", ["tp:magnitude", "tp:taylor"])
def test_it_is_the_loop_of_its_benchmark(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_pruner, "STEPS", 100)
    theirs = network().eval()
    importance: Any = tp.importance.MagnitudeImportance(p=2)
    if method == "tp:taylor":
        importance = tp.importance.TaylorImportance()
        for batch in minibatches():
            loss(theirs, batch).backward()
    pruner = tp.pruner.MagnitudePruner(
        theirs,
        EXAMPLES,
        importance=importance,
        global_pruning=True,
        pruning_ratio=1.0,
        iterative_steps=100,
        ignored_layers=[theirs.fc],
    )
    dense, steps = count(theirs, EXAMPLES).macs, 0
    while count(theirs, EXAMPLES).macs > 0.6 * dense:
        pruner.step()
        steps += 1
    ours = prune(task(method, MACs(0.6)))
    assert same(ours.model, theirs)
    assert ours.settings["steps"] == steps


def test_gradients_are_added_up_and_sliced_with_the_weights() -> None:
    assert host_pruner.STEPS == 400  # as published

    def half_square(model: nn.Module, _: Any) -> Tensor:
        return sum((p.square().sum() / 2 for p in model.parameters()), torch.zeros(()))

    slim = prune(task("tp:taylor", MACs(0.8), loss_fn=half_square, batches=minibatches(2))).model
    assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in network().parameters())
    for parameter in slim.parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, 2 * parameter)


@pytest.mark.parametrize(
    ("method", "pruner", "importance", "gradients"),
    [
        ("tp:group-norm", "GroupNormPruner", "GroupMagnitudeImportance", "none"),
        ("tp:bn-scale", "BNScalePruner", "BNScaleImportance", "none"),
        ("tp:hessian", "BasePruner", "GroupHessianImportance", "of each sample, 3 minibatches"),
        ("tp:taylor-tuned", "BasePruner", "GroupTaylorImportance", "of each minibatch, added up, 3 minibatches"),
    ],
)
def test_settings_say_what_was_called(method: str, pruner: str, importance: str, gradients: str) -> None:
    settings = prune(task(method, MACs(0.95))).settings
    assert (settings["pruner"], settings["importance"]) == (pruner, importance)
    assert settings["gradients"].startswith(gradients)
    assert settings["ignored_layers"] == ["fc"]
    assert "needs_gradients" not in settings["importance_arguments"]
    assert settings["importance_arguments"]["group_reduction"] in ("mean", "sum")


def test_two_pruners_share_nothing() -> None:
    """Its defaults are dicts that every pruner of a process writes to."""
    kept = copy.deepcopy(tp.pruner.BasePruner.__init__.__defaults__)
    grouped = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=2), nn.Flatten(), nn.Linear(512, CLASSES))
    through_host(grouped, EXAMPLES, "tp:magnitude", MACs(0.8), minibatches(), loss)
    assert str(tp.pruner.BasePruner.__init__.__defaults__) == str(kept)


def test_heads_get_narrower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_pruner, "STEPS", 20)
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=24, depth=1, num_heads=3, num_classes=CLASSES
    )
    slim = through_host(model, EXAMPLES, "tp:magnitude", MACs(0.5), minibatches(), loss).model
    attention: Any = slim.blocks[0].attn
    assert attention.num_heads == 3
    assert attention.head_dim < 8
    assert attention.qkv.out_features == 3 * attention.attn_dim == 9 * attention.head_dim
    loss(slim, minibatches()[0]).backward()


class Fixed(nn.Module):
    """Writes down how many channels it has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 1), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).reshape(len(x), 8, -1).mean(2))


def test_a_network_that_it_breaks() -> None:
    with pytest.raises(SurgeryError, match=r"tp:magnitude: Torch-Pruning failed at step \d+ of 400 on this Fixed"):
        prune(task("tp:magnitude", MACs(0.5), Fixed()))


def test_a_step_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> None:
        raise IndexError("index out of range")

    monkeypatch.setattr(tp.pruner.BasePruner, "step", fail)
    with pytest.raises(SurgeryError, match=r"step 1 of 400 on this ResNet \(IndexError: index out of range\)"):
        prune(task("tp:magnitude", MACs(0.5)))


def test_removing_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_pruner, "STEPS", 3)
    monkeypatch.setattr(tp.pruner.BasePruner, "step", lambda _: None)
    with pytest.raises(BudgetError, match=r"after all 3 steps Torch-Pruning has kept 1.0000 of the MACs, 0.5 was"):
        prune(task("tp:magnitude", MACs(0.5)))
