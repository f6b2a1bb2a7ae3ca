"""Layer statistics: what a criterion says of a block's channels, as one number.

Elkerdawy et al., LayerPrune, ACCV 2020, arXiv 2007.05667: a layer's importance is the mean of its filters' scores,
and that of a block with several layers the mean of their means. A sum would favour wide layers, and so would one mean
over the filters of all layers.

A block's layers are the coupled groups that lie wholly inside it: the inner width of a residual basic block, the two of
a bottleneck, the hidden width of an MLP, the whole width of a layer in a plain network. The groups that a skip
connection shares between blocks say nothing about one of them. A block without any group of its own (a depthwise
branch, an attention whose heads are tied) is scored by what it adds to the stream: the channels of its last layer that
writes them, alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugin.cost import call, on_device_of
from nni_plugin.criteria.base import Criterion
from nni_plugin.errors import CriterionError
from nni_plugin.groups import ChannelGroup, Member
from nni_plugin.layers.base import LayerImportance, LossFn
from nni_plugin.layers.blocks import Block
from nni_plugin.layers.trace import eval_mode
from nni_plugin.scorer import Scorer

_ROUNDING = 1e-6
"""Relative difference below which scores are told apart by rounding only."""

_WRITES = ("dense", "norm", "depthwise", "embedding")


def mean_of_layer_means(layers: Iterable[Tensor]) -> float:
    """Return a block's score from the scores of the channels of its layers, `[width]` each.

    Example:
        >>> mean_of_layer_means([torch.tensor([1.0, 3.0]), torch.tensor([4.0, 5.0, 6.0, 9.0])])
        4.0
    """
    means = [float(scores.double().mean()) for scores in layers]
    return sum(means) / len(means)


def groups_inside(block: Block, groups: Iterable[ChannelGroup]) -> list[ChannelGroup]:
    """Return the groups whose channels are written inside a block and nowhere else, those to be left whole excepted."""
    return [
        group
        for group in groups
        if group.fixed is None and all(block.holds(m.path) for m in group.members if m.axis == "out")
    ]


def written_last(model: nn.Module, example_inputs: Any, block: Block, groups: Iterable[ChannelGroup]) -> ChannelGroup:
    """Return what a block without groups of its own adds to the stream, as a group that is its last layer's alone.

    Args:
        model: The network; left as it was.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs.
        block: The block.
        groups: All groups of the network.

    Returns:
        A group of the channels that the last layer inside writes, with the layer it normalises if it is a
        normalisation; for scoring only, since other blocks write the channels too.

    Raises:
        CriterionError: No layer inside writes channels that a criterion could score.
    """
    written = [
        (member, group)
        for group in groups
        for member in group.members
        if member.axis == "out" and member.kind in _WRITES and not member.beside and block.holds(member.path)
    ]
    order = _order_of_calls(model, example_inputs, {member.path for member, _ in written})
    written = sorted((pair for pair in written if pair[0].path in order), key=lambda pair: order.index(pair[0].path))
    if not written:
        raise CriterionError(
            f"Block {block.name!r} has no layer whose channels a criterion could score; leave it out, or rank by "
            "Imprinting."
        )
    last, group = written[-1]
    members = [replace(last, writer=True)]
    if last.kind in ("norm", "depthwise"):
        behind = [member for member, other in written[:-1] if other is group and member.kind == "dense"]
        members += [replace(member, writer=False) for member in behind[-1:]]
    channels = torch.unique(last.channel)
    return ChannelGroup(
        name=f"{block.name}: {last.path}",
        width=len(channels),
        members=tuple(_renumbered(member, channels) for member in members),
    )


class LayerStatistic(LayerImportance):
    """Mean over a block's layers of the mean score of their channels.

    Args:
        criterion: One of `nni_plugin.criteria` (what it has collected before is forgotten), or a stock importance; see
            `nni_plugin.methods.create_criterion`. One that normalises scores within a layer says little: divided by
            their mean (most of Torch-Pruning's) all layers are alike, and divided by their norm (`FeatureMap`) a layer
            of `C` channels has a mean of at most `1/sqrt(C)`, which makes wide layers leave first.

    Attributes:
        layers: The groups that each block was scored by, as their names by the block's; of the last scoring.
    """

    def __init__(self, criterion: Criterion | Callable[[Any], Any]) -> None:
        self.criterion = criterion
        scorer = Scorer(criterion)
        self.needs_batches = self.needs_loss = scorer.needs_data
        self._text = str(scorer)
        self.layers: dict[str, list[str]] = {}

    def __str__(self) -> str:
        """Name the criterion and its options."""
        return self._text

    def _score(
        self,
        model: nn.Module,
        example_inputs: Any,
        blocks: Sequence[Block],
        batches: Iterable[Any],
        loss_fn: LossFn | None,
        held_out: Iterable[Any] | None,
    ) -> dict[str, float]:
        # The two arrows that point up, taken when called: who finds groups, and who runs minibatches for a criterion.
        from nni_plugin.adapters.torch_pruning import find_groups
        from nni_plugin.planner import score_groups

        is_stock = not isinstance(self.criterion, Criterion)
        groups = find_groups(model, example_inputs, keep_host=is_stock)
        chosen = {block.name: groups_inside(block, groups) for block in blocks}
        for block in blocks:
            if not chosen[block.name]:
                self._check_can_score_alone(block)
                chosen[block.name] = [written_last(model, example_inputs, block, groups)]
        self.layers = {name: [group.name for group in inside] for name, inside in chosen.items()}
        every = {group.name: group for inside in chosen.values() for group in inside}
        scores = score_groups(model, list(every.values()), self.criterion, batches, loss_fn or _no_loss)
        found = {name: mean_of_layer_means(_known(name, inside, scores)) for name, inside in chosen.items()}
        if len(found) > 1 and max(found.values()) - min(found.values()) <= _ROUNDING * max(map(abs, found.values())):
            warnings.warn(
                f"{self} scores all {len(found)} blocks alike, so that the order of the network "
                "decides. Does it normalise within each layer?",
                stacklevel=3,
            )
        return found

    def _check_can_score_alone(self, block: Block) -> None:
        """Refuse criteria that cannot score one writer of channels that others write as well."""
        reason = None
        if not isinstance(self.criterion, Criterion):
            reason = "a stock importance scores only whole groups"
        elif self.criterion.needs_batch:
            reason = f"{type(self.criterion).__name__} removes channels where they are read, from all that write them"
        if reason is not None:
            raise CriterionError(
                f"Block {block.name!r} has no coupled channels of its own, and {reason}; leave the block out, or use "
                "another criterion."
            )


def _known(block: str, inside: Sequence[ChannelGroup], scores: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the scores of a block's groups, those excepted that a stock importance skips."""
    found = [scores[group.name] for group in inside if group.name in scores]
    if not found:
        raise CriterionError(f"The importance skips every layer of block {block!r}; leave it out, or use another.")
    return found


def _no_loss(model: nn.Module, batch: Any) -> Tensor:
    raise AssertionError("a criterion without data asked for a loss")


def _renumbered(member: Member, channels: Tensor) -> Member:
    """Return a member with only these channels of its group, ascending, numbered from 0."""
    on = torch.isin(member.channel, channels)
    slices = []
    for piece in member.slices:
        stays = torch.isin(piece.channel, channels)
        number = torch.searchsorted(channels, piece.channel[stays])
        slices.append(replace(piece, index=piece.index[stays], channel=number))
    return replace(
        member,
        index=member.index[on],
        channel=torch.searchsorted(channels, member.channel[on]),
        slices=tuple(slices),
        ties=None if member.ties is None else member.ties[on],
    )


@torch.no_grad()
def _order_of_calls(model: nn.Module, example_inputs: Any, paths: Iterable[str]) -> list[str]:
    """Return modules in the order in which a forward pass in eval mode leaves them."""
    order: list[str] = []
    with eval_mode(model), ExitStack() as stack:
        for path in paths:
            layer = model.get_submodule(path)
            stack.callback(layer.register_forward_hook(lambda *_, path=path: order.append(path)).remove)
        call(model, on_device_of(model, example_inputs))
    return order
