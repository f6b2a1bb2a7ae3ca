"""Which coupled channels masks leave without effect, and the plan that removes them.

A mask speaks of one layer, a channel may lie in many. It can leave when nobody who reads it gets anything from it:
followed along the dependency graph, an addition is dead where all its terms are, a chain of layers where one of them
is, a product where the factor that carries the gate is, and a reader is content where it ignores the channel itself.
So masks that conflict within a group prune their intersection, and masks one after the other their union.

Dead means "the same for every input", not zero: a normalisation or bias behind a masked filter gives its constant.
What becomes of these is the matter of :mod:`nni_plugin.pruners.constants`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugin.groups import ChannelGroup, Member
from nni_plugin.plan import GroupPlan, PruningPlan
from nni_plugin.pruners.masks import used_channels
from nni_plugin.tensors import CHANNEL_NORMS

CARRIERS = ("norm", "depthwise", "prelu")
"""Kinds of layers that work channel by channel: what they are not given, they do not give."""


@dataclass(frozen=True)
class Verdict:
    """What became of one group's masks.

    Args:
        name: The group's name.
        width: Its channels before.
        asked: How many of them some mask of the group asks to remove.
        removed: How many leave.
        reason: Why the others stay; empty where none does.
        renormalised: Layers that normalise over the channels that leave, and so change what the others become.
    """

    name: str
    width: int
    asked: int
    removed: int
    reason: str = ""
    renormalised: tuple[str, ...] = ()


def dead_channels(model: nn.Module, group: ChannelGroup, masks: Mapping[str, Tensor]) -> Tensor:
    """Return which channels of a group masks leave without effect; bool, shape `[width]`.

    Args:
        model: The network; left as it is.
        group: One of its coupled groups, found with `keep_host=True`.
        masks: One boolean mask a parameter, True where it is kept, by name; parameters not named are kept.
    """
    asked, alive, _ = _follow(model, group, masks)
    return asked & ~alive


def plan_from_masks(
    model: nn.Module,
    groups: Iterable[ChannelGroup],
    masks: Mapping[str, Tensor],
    called: Callable[[str], str] = str,
) -> tuple[PruningPlan, tuple[Verdict, ...]]:
    """Turn masks into a plan.

    Args:
        model: The network; left as it is.
        groups: Its coupled groups, found with `keep_host=True`.
        masks: One boolean mask a parameter, True where it is kept, by name; parameters not named are kept.
        called: What a layer is called in the verdicts, by its name in `model`; the plan has the names of `model`.

    Returns:
        The plan, with an entry for every group that may be pruned, and a verdict for every group that a mask asks of.
    """
    entries, verdicts = [], []
    for group in groups:
        asked, alive, begins = _follow(model, group, masks)
        begins = [(called(path), gives) for path, gives in begins]
        gone, reason = _choose(group, asked, alive, begins)
        if group.fixed is None:
            entries.append(GroupPlan(group.name, group.width, tuple((~gone).nonzero().flatten().tolist())))
        if bool(asked.any()):
            norms = [called(m.path) for m in group.members if isinstance(_module(model, m), CHANNEL_NORMS)]
            over = tuple(norms) if gone.any() else ()
            counts = int(asked.sum()), int(gone.sum())
            verdicts.append(Verdict(called(group.name), group.width, *counts, reason, over))
    return PruningPlan(tuple(entries), provenance={"method": "masks"}), tuple(verdicts)


def _choose(
    group: ChannelGroup, asked: Tensor, alive: Tensor, begins: Iterable[tuple[str, Tensor]]
) -> tuple[Tensor, str]:
    """Return the channels that leave, and why those that were asked for and do not leave stay."""
    if group.fixed is not None:
        return torch.zeros_like(asked), f"it must stay whole: {group.fixed}"
    dead = asked & ~alive
    gone = dead & ~torch.isin(group.unit, group.unit[~dead])
    reasons = []
    if bool((asked & alive).any()):
        keepers = [path for path, gives in begins if bool((gives & asked & alive).any())]
        reasons.append(f"{int((asked & alive).sum())} are kept by {_listed(keepers)}, whose masks do not ask for them")
    if bool((dead & ~gone).any()):
        reasons.append(f"{int((dead & ~gone).sum())} are tied to channels that stay (a grouped layer)")
    if bool(gone.all()):
        # A layer without channels does not run; the one that stays computes what it computed under the mask.
        gone = group.unit != group.unit[0]
        reasons.append(f"{int((~gone).sum())} must stay for the layers to run, though all were to go")
    return gone, "; ".join(reasons)


def _listed(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(repr(path) for path in paths[:3]) + more


def _names_of_all(model: nn.Module) -> dict[str, str]:
    """Return the name under which a mask speaks of each parameter: shared ones have several."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}


def _module(model: nn.Module, member: Member) -> nn.Module | None:
    return None if member.kind == "parameter" else model.get_submodule(member.path)


def _kept_by(
    model: nn.Module, width: int, member: Member, masks: Mapping[str, Tensor], names: Mapping[str, str]
) -> Tensor:
    """Return which channels of its group a member lets through, as far as its own mask goes; bool, `[width]`."""
    layer = _module(model, member)
    name = member.path if layer is None else f"{member.path}.weight" if member.path else "weight"
    mask = masks.get(names.get(name, name))
    kept = torch.ones(width, dtype=torch.bool)
    if mask is None or member.kind in ("", "prelu"):
        return kept
    if layer is None:
        (piece,) = member.slices
        used = mask.movedim(piece.dim, 0).flatten(1).any(1)
    else:
        used = used_channels(layer, mask, member.axis)
    # A flattened channel is many positions; it is alive while one of them is.
    kept[member.channel] = False
    kept[member.channel[used[member.index]]] = True
    return kept


def _follow(
    model: nn.Module, group: ChannelGroup, masks: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, list[tuple[str, Tensor]]]:
    """Follow the channels of a group from the layers that write them to those that read them.

    Returns:
        Which channels some mask asks for, and which reach anybody, bool `[width]`; and by path, which of them each
        layer that begins them gives.
    """
    names = _names_of_all(model)
    own = [_kept_by(model, group.width, member, masks, names) for member in group.members]
    asked = ~torch.stack(own).all(0)
    if group.host is None or not bool(asked.any()):
        return asked, ~asked, []
    covered, outs, ins = _nodes(group, own)
    gates = _gates(covered, outs)
    alive = {node: torch.zeros(group.width, dtype=torch.bool) for node in covered}

    def inflow(node: Any) -> Tensor:
        sources = [source for source in node.inputs if source in covered and (source in outs or not _is_layer(source))]
        if _is_product(node):
            sources = [source for source in sources if source in gates] or sources
        if not sources:
            # An operator that nothing leads to is a weight on its way into a product; a layer is fed from elsewhere.
            return covered[node] & _is_layer(node)
        return torch.stack([alive[source] for source in sources]).any(0)

    changed = True
    while changed:  # upwards from nothing alive, so that a layer that is called on its own output settles too
        changed = False
        for node, flow in covered.items():
            if _is_layer(node) and node not in outs:
                continue
            if not _is_layer(node) or any(member.kind in CARRIERS for member, _ in outs[node]):
                flow = flow & inflow(node)
            for _, kept in outs.get(node, ()):
                flow = flow & kept
            if not torch.equal(flow, alive[node]):
                alive[node], changed = flow, True
    reached, read = torch.zeros(group.width, dtype=torch.bool), torch.zeros(group.width, dtype=torch.bool)
    for node, readers in ins.items():
        for member, kept in readers:
            reached |= inflow(node) & kept
            read[member.channel] = True
    for node, writers in outs.items():
        if any(member.writer for member, _ in writers):
            reached |= alive[node] & ~read
    begins = [
        (m.path, alive[node]) for node, held in outs.items() for m, _ in held if m.kind not in CARRIERS and not m.beside
    ]
    return asked, reached, begins


_Held = dict[Any, list[tuple[Member, Tensor]]]


def _nodes(group: ChannelGroup, own: Sequence[Tensor]) -> tuple[dict[Any, Tensor], _Held, _Held]:
    """Return the graph's nodes with the channels they cover, and what writes and what reads at each, with its mask."""
    covered: dict[Any, Tensor] = {}
    outs: _Held = {}
    ins: _Held = {}
    number = {int(index): i for i, index in enumerate(group.host[0].idxs)}
    members = iter(zip(group.members, own, strict=True))
    for item in group.host:
        node = item.dep.target
        roots = item.idxs if item.root_idxs is None else item.root_idxs
        here = covered.setdefault(node, torch.zeros(group.width, dtype=torch.bool))
        here[torch.tensor([number[int(i)] for i in roots], dtype=torch.int64)] = True
        if _is_layer(node):  # the group has one member for each of these, in the same order
            member, kept = next(members)
            (outs if member.axis == "out" else ins).setdefault(node, []).append((member, kept))
    return covered, outs, ins


def _gates(nodes: Iterable[Any], outs: _Held) -> set[Any]:
    """Return the nodes whose output carries the gated signal, as against those that only scale it."""
    nodes = [node for node in nodes if not _is_layer(node)]
    gates = {node for node, held in outs.items() if any(not member.beside for member, _ in held)}
    before = 0
    while before != len(gates):
        before = len(gates)
        gates |= {node for node in nodes if any(source in gates for source in node.inputs)}
    return gates


def _is_layer(node: Any) -> bool:
    return isinstance(node.module, nn.Parameter) or not type(node.module).__name__.startswith("_")


def _is_product(node: Any) -> bool:
    return not _is_layer(node) and "Mul" in str(getattr(node.module, "_grad_fn", ""))
