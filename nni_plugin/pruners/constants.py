"""What a masked channel still says: the constant behind it, handed on to those who read it.

A mask on a convolution makes its filter zero, and the normalisation behind it makes of zero `beta - gamma * mean /
std`, whatever the image. Whoever reads the channel adds that constant, weighted, to its own outputs; once the channel
has left, the sum is missing. It is given back in the reader's bias, or in the running mean of the batch normalisation
right behind it. That is exact where no layer on the way pads with zeros; where one does, the constant is another along
the border, a bias can hold its mean over the positions only, and the network differs from the masked one by the rest.

Masks that also cover the normalisation (as those of this package do) leave no constant, and nothing changes here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from nni_plugin.groups import ChannelGroup
from nni_plugin.plan import PruningPlan
from nni_plugin.pruners.masks import used_channels

ROUNDING = 100
"""Largest spread of a constant over inputs, in units of the number format's precision times the largest value read."""

PASSING = ("AddBackward", "BatchNormBackward")
"""Operators on the way to a normalisation: sums, and what is inside a normalisation that ends in an activation."""


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
        self._norms: dict[nn.Module, list[tuple[_BatchNorm, Tensor]]] = {}
        for group in groups:
            self._norms.update(_norms_behind(group))
            out = torch.ones(group.width, dtype=torch.bool)
            out[list(kept.get(group.name, range(group.width)))] = False
            for member in group.readers:
                index = member.index[out[member.channel]]
                layer = model.get_submodule(member.path)
                if member.kind != "dense" or not isinstance(layer.weight, Tensor):
                    continue
                index = index[used_channels(layer, layer.weight.detach().cpu() != 0, "in")[index]]
                if len(index):
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
            maps = values.movedim(_channel_dim(layer), 0)[index.to(values.device)]
            seen = _Seen(maps.amin(1), maps.amax(1), values.abs().max(), torch.zeros_like(values[:1]))
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
            layer = self.model.get_submodule(path)
            spread = ROUNDING * torch.finfo(seen.zeros.dtype).eps
            steady = (seen.high - seen.low).reshape(len(seen.low), -1).amax(1) <= spread * seen.largest
            if not bool(steady.all()):
                short[path] = f"{int((~steady).sum())} masked channels that it reads are not constant"
            index, maps = self._gone[path][steady.cpu()], ((seen.low + seen.high) / 2)[steady]
            parts = _contribution(layer, seen.zeros, index, maps)
            share = parts.mean(1)
            if not bool(parts.any()):
                continue
            if float((parts - share[:, None]).abs().max()) > spread * float(parts.abs().max()):
                short.setdefault(path, "constants that it reads differ along the border, and are right on average only")
            bias, norms = getattr(layer, "bias", None), self._norms.get(layer, [])
            if isinstance(bias, nn.Parameter):
                bias.add_(share.to(bias))
            elif norms:
                for norm, places in norms:
                    assert norm.running_mean is not None
                    norm.running_mean[places] -= share.to(norm.running_mean)
            else:
                short[path] = "it has no bias, nor batch normalisations right behind it, to hold the constants"
        return short


class _Seen(NamedTuple):
    """What a reader got on the channels that go: the least and the largest at each position, `[channels, ...]`.

    Args:
        low: The least over all samples.
        high: The largest.
        largest: The largest absolute value of all channels.
        zeros: An empty input for one sample.
    """

    low: Tensor
    high: Tensor
    largest: Tensor
    zeros: Tensor

    def joined(self, other: _Seen) -> _Seen:
        """Take in what it got another time; maps of different sizes are no constants."""
        largest = torch.maximum(self.largest, other.largest)
        if self.low.shape != other.low.shape:
            return self._replace(high=torch.full_like(self.high, torch.inf), largest=largest)
        low, high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        return _Seen(low, high, largest, self.zeros)


def _channel_dim(layer: nn.Module) -> int:
    return -1 if isinstance(layer, nn.Linear) else 1


def _contribution(layer: nn.Module, zeros: Tensor, index: Tensor, maps: Tensor) -> Tensor:
    """Return what constant maps on some input channels add to each output, `[outputs, positions]`."""
    dim = _channel_dim(layer)
    filled = zeros.clone()
    filled.movedim(dim, 0)[index.to(zeros.device)] = maps[:, None]
    both: Tensor = layer.forward(torch.cat([filled, zeros]))
    return (both[:1] - both[1:]).movedim(dim, 0).flatten(1)


def _norms_behind(group: ChannelGroup) -> dict[nn.Module, list[tuple[_BatchNorm, Tensor]]]:
    """Return the batch normalisations behind each layer that writes a group, where nobody else reads it.

    A sum or a concatenation on the way hands the layer's outputs on as they are.

    Returns:
        By layer, the normalisations, each with its own position of every output channel of the layer.
    """
    if group.host is None:
        return {}
    names = group.host._DG._module2name
    outs = [member for member in group.members if member.axis == "out"]
    found: dict[nn.Module, list[tuple[_BatchNorm, Tensor]]] = {}
    for node in {item.dep.target for item in group.host if item.dep.handler.__name__ != "prune_in_channels"}:
        layer = node.module
        if not isinstance(layer, (_ConvNd, nn.Linear)):
            continue
        (writer, *more) = [member for member in outs if member.path == names[layer]]
        width = layer.out_channels if isinstance(layer, _ConvNd) else layer.out_features
        if more or not torch.equal(writer.index, torch.arange(width)):
            continue  # its channels are in several groups
        norms = []
        for norm in _ends(node):
            place = torch.full((group.width,), -1)
            for member in outs:
                if member.path == names[norm]:
                    place[member.channel] = member.index
            norms.append((norm, place[writer.channel]))
        if all(bool((places >= 0).all()) for _, places in norms):
            found[layer] = norms
    return found


def _ends(node: Any) -> list[_BatchNorm]:
    """Follow a layer's output through sums and concatenations; empty where it ends in more than normalisations."""
    norms: list[_BatchNorm] = []
    queue, seen = list(node.outputs), set()
    while queue:
        current = queue.pop()
        if current in seen:
            continue
        seen.add(current)
        module = current.module
        if isinstance(module, _BatchNorm) and module.running_mean is not None and len(current.inputs) == 1:
            norms.append(module)
        elif current.outputs and (
            type(module).__name__ == "_ConcatOp"
            or any(name in str(getattr(module, "_grad_fn", "")) for name in PASSING)
        ):
            queue += current.outputs
        else:
            return []
    return norms
