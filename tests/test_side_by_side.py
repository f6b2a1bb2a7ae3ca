"""Layers of a network on many minibatches side by side: the same values as from full forward passes, in one of them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nni_plugin.networks import NETWORKS
from nni_plugin.side_by_side import SideBySide

BATCHES = [torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def call(network: nn.Module, batch: Tensor) -> Tensor:
    return network(batch)


class Branching(nn.Module):
    """Control flow on data, which cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(-x if x.mean() > 0 else x)


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS["resnet20"](in_chans=1).eval()


def layers(network: nn.Module) -> list[str]:
    order: list[str] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, __, path=path: order.append(path))
        for path, layer in network.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]
    network(BATCHES[0])
    for handle in handles:
        handle.remove()
    return order


@pytest.mark.parametrize(
    ("build", "memory", "walks"), [(resnet, 2**30, True), (resnet, 1000, False), (Branching, 2**30, False)]
)
@torch.no_grad()
def test_layers_read_and_give_what_they_do_in_full_passes(
    build: Callable[[], nn.Module], memory: int, walks: bool
) -> None:
    network = build().eval()
    paths = layers(network)
    side = SideBySide(network, paths, BATCHES, call, memory)
    assert (side.walk is not None) == walks
    for path in paths:
        seen: list[tuple[Tensor, Tensor]] = []
        hook = network.get_submodule(path).register_forward_hook(
            lambda _, args, out, seen=seen: seen.append((args[0].clone(), out.clone()))
        )
        for batch in BATCHES:
            network(batch)
        hook.remove()
        for (x, y), ours_x, ours_y in zip(seen, side.inputs(path), side.outputs(path), strict=True):
            assert torch.equal(ours_x, x)
            assert torch.equal(ours_y, y)
    assert not any(module._forward_hooks for module in network.modules())


@torch.no_grad()
def test_a_layer_that_is_changed_before_it_runs_changes_what_follows() -> None:
    network = resnet()
    paths = layers(network)
    side = SideBySide(network, paths, BATCHES, call, 2**30)
    for path in paths[:3]:
        list(side.inputs(path))
        network.get_submodule(path).weight.mul_(0.5)
    fresh = SideBySide(network, paths, BATCHES, call, 2**30)
    for ours, theirs in zip(side.outputs(paths[-1]), fresh.outputs(paths[-1]), strict=True):
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_every_layer_runs_once_a_minibatch() -> None:
    network = resnet()
    paths = layers(network)
    side = SideBySide(network, paths, BATCHES, call, 2**30)
    runs: list[int] = []
    first = network.get_submodule(paths[0])
    handle = first.register_forward_hook(lambda *_: runs.append(1))
    for path in paths:
        list(side.inputs(path))
    handle.remove()
    assert len(runs) == len(BATCHES)
