"""What a trace finds, proven: random plans on every group, the masked network against the compact one, and training."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from networks_at_random import any_plan
from torch import Tensor, nn

from nni_plugin import verify
from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.adapters.torch_pruning.surgery import cut_channels
from nni_plugin.cost import call, tensors_in
from nni_plugin.groups import ChannelGroup
from nni_plugin.plan import PruningPlan

X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def drawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every vector from 0.5 to 1.5 and every weight anew, in float64 and eval mode: zeros hide what is wrong."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*model.double().parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.dim() == 1:
            tensor.data.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        elif isinstance(tensor, nn.Parameter):
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator) / tensor[0].numel() ** 0.5)
    return model.eval()


def prove(
    model: nn.Module, inputs: Any, *, seeds: Iterable[int] = range(3), least: int = 1, **options: Any
) -> list[ChannelGroup]:
    """Cut a random part of every group: equal to the mask, and trainable. Returns the groups.

    Args:
        model: From `drawn`.
        inputs: Example inputs in float64.
        seeds: One random plan each.
        least: Units that each group keeps at least.
        options: Passed on to `find_groups`.
    """
    groups = find_groups(model, inputs, **options)
    for seed in seeds:
        plan = any_plan(groups, seed, least)
        parity = verify(model, plan, inputs, groups=groups)
        assert parity.max_rel <= 1e-9, f"{parity} with {plan.kept()}"
        trains(model, plan, groups, inputs)
    return groups


def trains(model: nn.Module, plan: PruningPlan, groups: list[ChannelGroup], inputs: Any) -> None:
    """Assert that a cut network runs forward and backward in train mode, with a gradient for whatever had one."""
    dense, slim = copy.deepcopy(model).train(), copy.deepcopy(model)
    cut_channels(slim, plan, groups)
    slim.train()
    for network in (dense, slim):
        sum(out.square().mean() for out in tensors_in(call(network, inputs)) if out.requires_grad).backward()
    expected = {name for name, parameter in dense.named_parameters() if parameter.grad is not None}
    got = {name: parameter for name, parameter in slim.named_parameters() if parameter.grad is not None}
    assert set(got) == expected
    for name, parameter in got.items():
        assert parameter.grad is not None
        assert parameter.grad.shape == parameter.shape, name


class Net(nn.Module):
    """Two stems of 8 channels, something done to them, a convolution and a classifier.

    Args:
        do: Function of this module and both stems' outputs `[N, 8, 8, 8]`, returning `[N, width, ...]`.
        width: Its number of channels.
        parts: Modules and parameters that it uses.
    """

    def __init__(self, do: Callable[..., Tensor], width: int = 8, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.next, self.head = nn.Conv2d(width, 5, 1), nn.Linear(5, 3)
        self.do = functools.partial(do, self)
        for name, part in parts.items():
            setattr(self, name, part)

    def __deepcopy__(self, memo: dict[int, Any]) -> Net:
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        nn.Module.__init__(twin)
        twin.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k != "do"})
        twin.do = functools.partial(self.do.func, twin)
        return twin

    def forward(self, x: Tensor) -> Tensor:
        y = self.next(self.do(torch.relu(self.a(x)), torch.relu(self.b(x))))
        return self.head(torch.relu(y).flatten(2).mean(2))


def by_name(groups: Iterable[ChannelGroup]) -> dict[str, ChannelGroup]:
    return {group.name: group for group in groups}


def reasons(groups: Iterable[ChannelGroup]) -> dict[str, str]:
    """Return why each group that must stay whole does, but for the network's output and what leads to none."""
    told = {group.name: group.fixed for group in groups if group.fixed}
    return {name: why for name, why in told.items() if "network's output" not in why and "no output" not in why}


def paths(group: ChannelGroup, axis: str = "out") -> set[str]:
    return {member.path for member in group.members if member.axis == axis}
