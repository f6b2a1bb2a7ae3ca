"""Explicit gates for tests: real tensors `z = 1` multiplied into a network, so that autograd tells what is right.

`gated(model, members, z)` multiplies what each member writes (or reads) by its channels' entries of `z`, one gate a
channel for `[gates]`, one a sample and channel for `[N, gates]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nni_plugin.criteria.base import Criterion
from nni_plugin.groups import ChannelGroup, Member
from nni_plugin.tensors import NORMS, Axis, kind_of

Batch = tuple[Tensor, Tensor]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batches(number: int = 3, size: int = 4, side: int = 6, seed: int = 7) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    shape = (size, 3, side, side)
    return [
        (
            torch.randn(shape, dtype=torch.float64, generator=generator),
            torch.randint(0, 3, (size,), generator=generator),
        )
        for _ in range(number)
    ]


def member_of(model: nn.Module, path: str, axis: Axis, width: int) -> Member:
    """Return a member that covers a whole axis, gate `i` at position `i`."""
    index = torch.arange(width)
    return Member(path, axis, kind_of(model.get_submodule(path)), index, index, ())


def gate_members(group: ChannelGroup, gates: str = "auto") -> tuple[Member, ...]:
    """Return where the gates of a group lie: on its writers, or where it is read."""
    return group.readers if gates == "input" or group.forked else group.writers


def group_of(groups: Iterable[ChannelGroup], name: str) -> ChannelGroup:
    return next(group for group in groups if any(m.path == name and m.axis == "out" for m in group.members))


@contextmanager
def gated(model: nn.Module, members: Sequence[Member], z: Tensor, first: int = 0) -> Iterator[Tensor]:
    """Put gates on members; those of the first group begin at entry `first` of `z`."""
    handles = []
    for member in members:
        layer = model.get_submodule(member.path)
        gate = _gate(layer, member, z, first)
        inside = next(layer.children(), None) if isinstance(layer, NORMS) else None
        if member.axis == "in" or inside is not None:
            where = layer if inside is None else inside
            handles.append(where.register_forward_pre_hook(lambda _, args, g=gate: (g(args[0]), *args[1:])))
        else:
            handles.append(layer.register_forward_hook(lambda _, __, y, g=gate: g(y)))
    try:
        yield z
    finally:
        for handle in handles:
            handle.remove()


def _gate(layer: nn.Module, member: Member, z: Tensor, first: int) -> Callable[[Tensor], Tensor]:
    def gate(a: Tensor) -> Tensor:
        last = isinstance(layer, nn.Linear) or (isinstance(layer, nn.LayerNorm) and "2d" not in type(layer).__name__)
        dim = a.dim() - 1 if last else 1
        factor = z.new_ones(*z.shape[:-1], a.shape[dim])
        factor[..., member.index] = z[..., member.channel + first]
        shape = [1] * a.dim()
        shape[dim] = a.shape[dim]
        if z.dim() == 2:
            factor = factor.repeat_interleave(len(a) // len(z), 0)
            shape[0] = len(a)
        return a * factor.reshape(shape)

    return gate


def gradients_of(model: nn.Module, members: Sequence[Member], batch: Batch, width: int) -> Tensor:
    """Return `dE_n/dz` of every sample by autograd through explicit gates, shape `[N, width]`."""
    z = torch.ones(len(batch[1]), width, dtype=torch.float64, requires_grad=True)
    with gated(model, members, z):
        (found,) = torch.autograd.grad(loss_of(model, batch), z)
    return found * len(batch[1])


def collected(
    model: nn.Module,
    criterion: Any,
    data: Iterable[Batch],
    groups: Iterable[ChannelGroup] = (),
    loss: Callable[[nn.Module, Batch], Tensor] = loss_of,
) -> Any:
    """Run minibatches through a criterion; returns it."""
    assert isinstance(criterion, Criterion)
    with criterion.collect(model, list(groups)):
        for batch in data:
            model.zero_grad()
            loss(model, batch).backward(create_graph=criterion.needs_graph)
            criterion.update(batch)
    return criterion
