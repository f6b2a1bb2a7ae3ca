"""Where removed channels lie, and what groups are once these are gone: the index arithmetic of a physical step.

Many slices hold the same two index tensors (a batch normalisation has four tensors, and is a layer besides). They are
told apart by identity, so that each pair is looked at once, whatever it stands for, and what no removed channel
touches is taken over as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nni_plugin.groups import ChannelGroup, Member, Passage, Slice

Place = tuple[str, Any]
"""A tensor and its dimension, a layer and its axis, or a module with a side and a dimension."""


def staying(groups: Iterable[ChannelGroup], kept: Mapping[str, Sequence[int] | Tensor]) -> dict[str, NDArray[np.bool_]]:
    """Return which channels stay, bool, shape `[width]`, by the name of each group that loses some.

    Args:
        groups: Channel groups.
        kept: Indices of the channels that remain, by group name; groups not named keep all.
    """
    stays = {}
    for group in groups:
        if len(kept.get(group.name, range(group.width))) != group.width:
            mask = np.zeros(group.width, dtype=bool)
            mask[np.asarray(kept[group.name], dtype=np.int64)] = True
            stays[group.name] = mask
    return stays


def gone_positions(
    groups: Iterable[ChannelGroup], stays: Mapping[str, NDArray[np.bool_]]
) -> dict[Place, NDArray[np.int64]]:
    """Return the positions that removed channels had, ascending, by place; places that lose none are left out.

    Args:
        groups: All groups of the network.
        stays: What :func:`staying` returned.
    """
    found: dict[Place, list[NDArray[np.int64]]] = {}
    for group in groups:
        if group.name not in stays:
            continue
        leaves = ~stays[group.name]
        of_pair: dict[tuple[int, int], NDArray[np.int64]] = {}
        for place, piece in _pieces(group):
            pair = (id(piece.index), id(piece.channel))
            if pair not in of_pair:
                of_pair[pair] = piece.index.numpy()[leaves[piece.channel.numpy()]]
            if len(of_pair[pair]):
                found.setdefault(place, []).append(of_pair[pair])
    ascending: dict[tuple[int, ...], NDArray[np.int64]] = {}
    result = {}
    for place, parts in found.items():
        same = tuple(map(id, parts))
        if same not in ascending:
            ascending[same] = np.unique(np.concatenate(parts))
        result[place] = ascending[same]
    return result


def narrowed(groups: Iterable[ChannelGroup], kept: Mapping[str, Tensor]) -> list[ChannelGroup]:
    """Renumber groups for the network in which each keeps only some of its channels.

    Args:
        groups: All groups of the network.
        kept: Ascending channel indices that remain, by group name; groups not named keep all.

    Returns:
        The same groups by name, without the graph's own form.
    """
    groups = list(groups)
    stays = staying(groups, kept)
    gone = gone_positions(groups, stays)
    return [_Narrowing(group, stays.get(group.name), gone).group() for group in groups]


class _Narrowing:
    """One group after a cut: its own channels counted anew, and every position less those gone before it."""

    def __init__(
        self, group: ChannelGroup, stays: NDArray[np.bool_] | None, gone: Mapping[Place, NDArray[np.int64]]
    ) -> None:
        self._group, self._stays, self._gone = group, stays, gone
        self._rank = np.arange(group.width) if stays is None else np.cumsum(stays) - 1
        self._moved: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    def group(self) -> ChannelGroup:
        group = self._group
        members = tuple(self._member(member) for member in group.members)
        passages = tuple(self._passage(passage) for passage in group.passages)
        if self._stays is None:
            return replace(group, members=members, host=None, passages=passages)
        sizes = tuple(replace(size, channel=self._channel(size.channel)) for size in group.sizes)
        width = int(self._stays.sum())
        tied = None if group.tied is None else group.tied[torch.from_numpy(self._stays)]
        return replace(group, width=width, members=members, host=None, sizes=sizes, passages=passages, tied=tied)

    def _member(self, member: Member) -> Member:
        index, channel = self._numbers((member.path, member.axis), member)
        slices = tuple(self._slice(piece) for piece in member.slices)
        if index is member.index and all(new is old for new, old in zip(slices, member.slices, strict=True)):
            return member
        ties = member.ties
        if ties is not None and self._stays is not None:
            ties = ties[torch.from_numpy(self._stays[member.channel.numpy()])]
        return replace(member, index=index, channel=channel, slices=slices, ties=ties)

    def _slice(self, piece: Slice) -> Slice:
        index, channel = self._numbers((piece.tensor, piece.dim), piece)
        return piece if index is piece.index else Slice(piece.tensor, piece.dim, index, channel)

    def _passage(self, passage: Passage) -> Passage:
        index, channel = self._numbers((passage.path, (passage.side, passage.dim)), passage)
        return passage if index is passage.index else replace(passage, index=index, channel=channel)

    def _numbers(self, place: Place, piece: Member | Slice | Passage) -> tuple[Tensor, Tensor]:
        """Return positions and channels in the new numbering; the same tensors where nothing has changed."""
        gone = self._gone.get(place)
        if gone is None and self._stays is None:
            return piece.index, piece.channel
        key = (id(piece.index), id(piece.channel), id(gone))
        if key not in self._moved:
            index = piece.index.numpy()
            if self._stays is not None:
                index = index[self._stays[piece.channel.numpy()]]
            if gone is not None:
                index = index - np.searchsorted(gone, index)
            self._moved[key] = torch.from_numpy(index), self._channel(piece.channel)
        return self._moved[key]

    def _channel(self, channel: Tensor) -> Tensor:
        if self._stays is None:
            return channel
        old = channel.numpy()
        return torch.from_numpy(self._rank[old[self._stays[old]]])


def _pieces(group: ChannelGroup) -> Iterator[tuple[Place, Member | Slice | Passage]]:
    for member in group.members:
        yield (member.path, member.axis), member
        for piece in member.slices:
            yield (piece.tensor, piece.dim), piece
    for passage in group.passages:
        yield (passage.path, (passage.side, passage.dim)), passage
