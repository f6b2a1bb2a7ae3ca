"""What a masked channel still says: the constant behind it, handed on to those who read it.

A mask on a convolution makes its filter zero, and the normalisation behind it makes of zero `beta - gamma * mean /
std`, the same at every pixel of every image. Whoever reads the channel adds that constant, weighted, to its own
outputs; once the channel has left, the sum is missing. It can be given back exactly where the reader pads with
nothing: in the reader's bias, or in the running mean of the batch normalisation right behind it. Where a reader pads
with zeros, the constant is missing along the border as well, so the mean over the positions is given back, and the
network differs from the masked one by what is left at the border.

Masks that also cover the normalisation (as those of this package do) leave no constant, and nothing changes here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nni_plugin.groups import ChannelGroup
from nni_plugin.plan import PruningPlan

SPREAD = 1e-5
"""Largest spread of a constant over inputs and positions, relative to the largest value that its reader sees."""


class Constants:
    """The constants of channels that a plan removes, at each layer that reads them.

    Args:
        model: The masked network; left as it is. Run it within :meth:`listening` before :meth:`fold`.
        plan: What is going to leave.
        groups: The network's coupled groups, found with `keep_host=True`.
    """

    def __init__(self, model: nn.Module, plan: PruningPlan, groups: Iterable[ChannelGroup]) -> None:
        self.model = model
        kept = plan.kept()
        self._gone: dict[str, Tensor] = {}
        self._norms: dict[nn.Module, _BatchNorm] = {}
        for group in groups:
            self._norms.update(_norms_behind(group))
            out = torch.ones(group.width, dtype=torch.bool)
            out[list(kept.get(group.name, range(group.width)))] = False
            for member in group.readers:
                index = member.index[out[member.channel]]
                if member.kind == "dense" and len(index):
                    earlier = self._gone.get(member.path, index[:0])
                    self._gone[member.path] = torch.unique(torch.cat([earlier, index]))
        self._seen: dict[str, _Seen] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note, while the network runs, what each reader gets on the channels that go."""
        hooks = [
            self.model.get_submodule(path).register_forward_pre_hook(self._note(path, index), with_kwargs=True)
            for path, index in self._gone.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, path: str, index: Tensor) -> Any:
        def hook(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            values = (*args, *kwargs.values())[0].detach()
            channels = values.movedim(_channel_dim(layer), 0)[index.to(values.device)].flatten(1)
            seen = _Seen(channels.amin(1), channels.amax(1), values.abs().max(), torch.zeros_like(values[:1]))
            self._seen[path] = seen.joined(self._seen[path]) if path in self._seen else seen

        return hook

    @torch.no_grad()
    def fold(self) -> dict[str, str]:
        """Give back what the readers lose, in place.

        Returns:
            By path of the reader, what could not be given back and why; empty when all was, exactly.
        """
        short: dict[str, str] = {}
        for path, seen in self._seen.items():
            steady = seen.high - seen.low <= SPREAD * seen.largest
            if not bool(steady.all()):
                short[path] = f"{int((~steady).sum())} masked channels that it reads are not constant"
            constant = torch.where(steady, (seen.low + seen.high) / 2, torch.zeros_like(seen.low))
            if not bool(constant.any()):
                continue
            layer = self.model.get_submodule(path)
            parts = _contribution(layer, seen.zeros, self._gone[path], constant)
            share = parts.mean(1)
            if float((parts - share[:, None]).abs().max()) > SPREAD * float(parts.abs().max()):
                short.setdefault(path, "it pads with zeros, so the constants are right on average only")
            bias, norm = getattr(layer, "bias", None), self._norms.get(layer)
            if isinstance(bias, nn.Parameter):
                bias.add_(share.to(bias))
            elif norm is not None and norm.running_mean is not None:
                norm.running_mean.sub_(share.to(norm.running_mean))
            elif bool(share.any()):
                short[path] = "it has no bias, nor a batch normalisation right behind it, to hold the constants"
        return short


class _Seen(NamedTuple):
    """What a reader got: least and largest value of each channel that goes, the largest of all, an empty input."""

    low: Tensor
    high: Tensor
    largest: Tensor
    zeros: Tensor

    def joined(self, other: _Seen) -> _Seen:
        """Take in what it got another time."""
        low, high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        return _Seen(low, high, torch.maximum(self.largest, other.largest), self.zeros)


def _channel_dim(layer: nn.Module) -> int:
    return -1 if isinstance(layer, nn.Linear) else 1


def _contribution(layer: nn.Module, zeros: Tensor, index: Tensor, constant: Tensor) -> Tensor:
    """Return what constants on some input channels add to each output, `[outputs, positions]`."""
    dim = _channel_dim(layer)
    filled = zeros.clone()
    filled.movedim(dim, 0)[index.to(zeros.device)] = constant.reshape(-1, *[1] * (zeros.dim() - 1))
    both = layer.forward(torch.cat([filled, zeros]))
    return (both[:1] - both[1:]).movedim(dim, 0).flatten(1)


def _norms_behind(group: ChannelGroup) -> dict[nn.Module, _BatchNorm]:
    """Return, for layers of a group that write, the batch normalisation that reads their output and nothing else."""
    found: dict[nn.Module, _BatchNorm] = {}
    for item in group.host:
        node = item.dep.target
        if item.dep.handler.__name__ == "prune_in_channels" or len(node.outputs) != 1:
            continue
        (behind,) = node.outputs
        if isinstance(behind.module, _BatchNorm) and len(behind.inputs) == 1 and isinstance(node.module, nn.Module):
            found[node.module] = behind.module
    return found
