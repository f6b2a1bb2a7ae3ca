"""One channel taken out at the input of every layer that reads it: what an ablation is, by hooks.

This is the definition that faster ways are held to, and what is left when a network cannot be traced. Each channel
costs one full forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from nni_plugin.errors import CriterionError
from nni_plugin.groups import ChannelGroup, Member


def channel_dim(reader: nn.Module, x: Tensor) -> int:
    """Return the dimension of a reader's input that holds its channels."""
    return x.dim() - len(reader.kernel_size) - 1 if isinstance(reader, _ConvNd) else x.dim() - 1


@contextmanager
def without(model: nn.Module, group: ChannelGroup, channel: int) -> Iterator[None]:
    """Take one channel of a group out of a network: its readers see zeros there.

    Args:
        model: The network; hooks are on its readers meanwhile, and nothing afterwards.
        group: A group of this network.
        channel: Number of the channel in the group.

    Raises:
        CriterionError: A forward pass did not come by a reader, at the end.
    """
    reached: set[str] = set()
    with ExitStack() as stack:
        for member in group.readers:
            reader = model.get_submodule(member.path)
            hook = _zeroing(member, channel, reached)
            stack.callback(reader.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield
    missed = [member.path for member in group.readers if member.path not in reached]
    if missed:
        raise CriterionError(
            f"The channels of group {group.name!r} are read by {missed[0]!r}, which the forward pass did not call: its "
            "weights are used in another way. Leave the group whole with `ignore`."
        )


def _zeroing(member: Member, channel: int, reached: set[str]) -> Any:
    positions = member.index[member.channel == channel]

    def hook(reader: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        reached.add(member.path)
        x = args[0] if args else kwargs["input"]
        x = x.index_fill(channel_dim(reader, x), positions.to(x.device), 0)
        return ((x, *args[1:]), kwargs) if args else ((), {**kwargs, "input": x})

    return hook
