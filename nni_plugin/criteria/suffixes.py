"""What must run again when a channel goes: the part of a network behind the layers that read it.

A channel changes nothing before its readers, so their inputs come from one base pass, and so does what reaches the
rest of the network from elsewhere. The first reader on the way is linear in the channel: its output changes by
`-W[:, c] x_c`, one input channel's share of its work. A reader behind another reader is run on an input that is zero
where the channel lies. Samples of several channels run side by side, as many as fit.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from nni_plugin.criteria.replay import Replay
from nni_plugin.criteria.traced import CONVOLUTIONS, CannotReplayError, last_uses
from nni_plugin.groups import ChannelGroup

_FRESH = (*CONVOLUTIONS, nn.Linear)
_ADD = (operator.add, torch.add)


@dataclass(eq=False)
class Suffix:
    """What runs when channels of one group go.

    Args:
        group: The group.
        nodes: The nodes behind its readers, in order.
        positions: For each reader node and each channel the positions on the input's axis.
        short: Reader nodes whose output changes by one channel's contribution.
        fetched: Nodes before these whose base values are needed.
        keep: Nodes whose values the base pass must keep.
        frees: Values that are not needed any more after each node.
        overwrites: Nodes that may write into their first argument.
        bytes_per_sample: Memory of the values alive at a time.
    """

    group: ChannelGroup
    nodes: list[fx.Node]
    positions: dict[fx.Node, list[Tensor]]
    short: set[fx.Node] = field(default_factory=set)
    fetched: set[fx.Node] = field(default_factory=set)
    keep: set[fx.Node] = field(default_factory=set)
    frees: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    overwrites: set[fx.Node] = field(default_factory=set)
    bytes_per_sample: float = 0.0


def find_suffix(replay: Replay, network: nn.Module, group: ChannelGroup) -> Suffix:
    """Find what runs again when channels of a group go.

    Raises:
        CannotReplayError: A reader is not a node of the graph.
    """
    positions: dict[fx.Node, list[Tensor]] = {}
    for member in group.readers:
        nodes = replay.nodes_of.get(network.get_submodule(member.path), [])
        if not nodes or any(not isinstance(node.args[0] if node.args else None, fx.Node) for node in nodes):
            raise CannotReplayError(f"{member.path!r}, which reads {group.name!r}, is not called as a layer")
        of_channel = [member.index[member.channel == c].to(replay.device) for c in range(group.width)]
        for node in nodes:
            before = positions.get(node, [at[:0] for at in of_channel])
            positions[node] = [torch.cat(pair) for pair in zip(before, of_channel, strict=True)]
    behind: set[fx.Node] = set()
    for node in replay.nodes:
        if node in positions or any(before in behind for before in node.all_input_nodes):
            behind.add(node)
    suffix = Suffix(group, [node for node in replay.nodes if node in behind], positions)
    for node in suffix.nodes:
        if replay.by_rows and node in positions and node.args[0] not in behind and _short(replay, node):
            suffix.short.add(node)
            suffix.keep |= {node, node.args[0]}  # type: ignore[arg-type]
        else:
            suffix.fetched |= set(node.all_input_nodes) - behind
    suffix.keep |= suffix.fetched
    if replay.by_rows:
        suffix.keep = set().union(*(replay.needed(node) for node in suffix.keep))
    suffix.frees = last_uses(suffix.nodes)
    if replay.by_rows:
        suffix.overwrites = {node for node in suffix.nodes if _may_overwrite(replay, node, suffix)}
        suffix.bytes_per_sample = _peak(replay, suffix)
    return suffix


def _short(replay: Replay, node: fx.Node) -> bool:
    """Tell whether one channel's contribution is much less work than the whole layer."""
    layer = replay.layers[node]
    if replay.device.type != "cpu" or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    if isinstance(layer, CONVOLUTIONS) and type(layer) in CONVOLUTIONS:
        return bool(layer.groups == 1)
    return type(layer) is nn.Linear


def _may_overwrite(replay: Replay, node: fx.Node, suffix: Suffix) -> bool:
    """Tell whether a node is a ReLU or a sum whose first argument nobody else holds."""
    first = node.args[0] if node.args else None
    relu = node.op == "call_module" and type(replay.layers[node]) is nn.ReLU
    add = node.op == "call_function" and node.target in _ADD and len(node.args) == 2 and not node.kwargs
    if not (relu or add) or not isinstance(first, fx.Node) or first not in suffix.frees.get(node, ()):
        return False
    if first in suffix.fetched:  # taken for this chunk; a second user may have made a view of it
        return isinstance(replay.kinds[first], list) and sum(user in suffix.nodes for user in first.users) == 1
    made = type(replay.layers[first]) in _FRESH if first.op == "call_module" else first.target in _ADD
    return made and node.all_input_nodes.count(first) == 1 and len(first.users) == 1


def _peak(replay: Replay, suffix: Suffix) -> float:
    """Return the memory of the values alive at a time, for each row."""
    alive = peak = 0.0
    held: set[fx.Node] = set()
    for node in suffix.nodes:
        size = replay.bytes_per_sample
        for new in (node, *([] if node in suffix.short else node.all_input_nodes)):
            if new not in held:
                held.add(new)
                alive += size(new)
        peak = max(peak, alive + (size(node) if node in suffix.short else 0))
        for done in suffix.frees.get(node, ()):
            if done in held:
                held.discard(done)
                alive -= size(done)
    return peak
