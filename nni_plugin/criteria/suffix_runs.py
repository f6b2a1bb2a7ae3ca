"""Runs what lies behind the readers of a group, without each of its channels: samples of several side by side.

In chunks that fit a bound on memory, and on a CPU its caches. Where a channel is zero at all its readers already
(behind a ReLU, for many samples) nothing changes, and nothing is run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from nni_plugin.criteria.masked_loop import channel_dim
from nni_plugin.criteria.replay import Replay, Rows, leaves, take_rows
from nni_plugin.criteria.suffixes import Suffix, find_suffix
from nni_plugin.criteria.traced import CannotReplayError
from nni_plugin.groups import ChannelGroup

CPU_CHUNK = 8 * 2**20
"""Bytes of values alive at a time that the caches of a CPU cope with."""


class Suffixes:
    """Runs the suffixes of all groups of a network.

    Args:
        replay: The traced network.
        network: The network that was traced.
        groups: Its groups.
        memory: Bytes for the values that the base pass keeps, and for those of a chunk, half each.

    Raises:
        CannotReplayError: A reader is not a node of the graph.
    """

    def __init__(self, replay: Replay, network: nn.Module, groups: Sequence[ChannelGroup], memory: int) -> None:
        self.replay, self.memory = replay, memory
        self.output = replay.output
        self.suffixes = [find_suffix(replay, network, group) for group in groups]

    def batches(self) -> Iterator[list[Suffix]]:
        """Yield the suffixes in parts whose kept values fit in memory together; at least one at a time."""
        part: list[Suffix] = []
        kept: set[fx.Node] = set()
        for suffix in self.suffixes:
            together = kept | suffix.keep
            # What is read by short ways is copied channel by channel, while this group is run.
            copied = {node.all_input_nodes[0] for node in suffix.short}
            size = sum(map(self.replay.bytes_per_sample, [*together, *copied])) * self.replay.samples
            if part and size > self.memory / 2:
                yield part
                part, together = [], set(suffix.keep)
            part.append(suffix)
            kept = together
        if part:
            yield part

    def outputs(
        self, suffix: Suffix, kept: Mapping[fx.Node, Any], channels: Sequence[int] | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Any]]:
        """Run the network without each of some channels (all), in chunks.

        Args:
            suffix: What runs.
            kept: The values of the base pass.
            channels: The channels, ascending.

        Yields:
            Channel and sample of each row, int64 on the CPU, channels ascending; and the network's output for these
            rows. Rows that the channel does not change are left out.
        """
        channels = range(suffix.group.width) if channels is None else channels
        if self.output not in suffix.nodes:
            return
        if not self.replay.by_rows:
            for channel in channels:
                whole = torch.arange(self.replay.samples)
                yield torch.full_like(whole, channel), whole, self._run_whole(suffix, kept, channel)
            return
        alive = self._alive(suffix, kept)[list(channels)]
        row, sample = alive.nonzero(as_tuple=True)
        channel_of = torch.tensor(list(channels))[row]
        step = self.rows(suffix)
        by_channel: dict[fx.Node, Tensor] = {}
        for start in range(0, len(sample), step):
            part = slice(start, start + step)
            output = self._run_rows(suffix, kept, by_channel, channel_of[part], sample[part])
            yield channel_of[part], sample[part], output

    def rows(self, suffix: Suffix) -> int:
        """Return how many rows run side by side: what memory holds, on a CPU what its caches do."""
        limit = self.memory / 2
        if self.replay.device.type == "cpu":
            limit = min(limit, CPU_CHUNK)
        rows, samples = max(1, int(limit / max(suffix.bytes_per_sample, 1.0))), self.replay.samples
        # Whole channels, or equal parts of one: a chunk that ends within a channel does its small work twice.
        return rows - rows % samples if rows >= samples else math.ceil(samples / math.ceil(samples / rows))

    def whole(self, base: Any, pieces: Sequence[tuple[Any, slice, int]], samples: Tensor) -> Any:
        """Return the output for all samples, where some rows are not those of the base pass.

        Args:
            base: The output of the base pass.
            pieces: Outputs of chunks, which rows of each, and the number of all.
            samples: The sample of each of these rows.
        """
        if not self.replay.by_rows:
            return pieces[0][0]
        rows = samples.to(self.replay.device)

        def replaced(leaf: Tensor, how: Rows, parts: Sequence[Tensor]) -> Tensor:
            result = leaf.clone().unflatten(0, (-1, how.per_sample))
            cut = [p.unflatten(0, (number, -1))[part] for p, (_, part, number) in zip(parts, pieces, strict=True)]
            result[rows] = torch.cat(cut)
            merged: Tensor = result.flatten(0, 1)
            return merged

        kind = self.replay.kinds[self.output]
        if not isinstance(kind, list):
            return base
        parts = iter(zip(*(leaves(output) for output, _, _ in pieces), strict=True))
        hows = iter(kind)
        return map_aggregate(base, lambda leaf: replaced(leaf, next(hows), next(parts)))  # type: ignore[arg-type]

    # -- running -----------------------------------------------------------------------------------------

    def _alive(self, suffix: Suffix, kept: Mapping[fx.Node, Any]) -> Tensor:
        """Tell for each channel which samples it is not zero for; `[width, samples]` on the CPU."""
        width, samples = suffix.group.width, self.replay.samples
        if suffix.short != set(suffix.positions):
            return torch.ones(width, samples, dtype=torch.bool)
        alive = torch.zeros(width, samples, dtype=torch.bool)
        for node in suffix.short:
            x = kept[node.args[0]]  # type: ignore[index]
            dim = channel_dim(self.replay.layers[node], x)
            used = (x != 0).unflatten(0, (samples, -1)).movedim(dim + 1, 1).flatten(2).any(2).cpu()
            for channel, at in enumerate(suffix.positions[node]):
                alive[channel] |= used[:, at.cpu()].any(1)
        return alive

    def _run_rows(
        self,
        suffix: Suffix,
        kept: Mapping[fx.Node, Any],
        by_channel: dict[fx.Node, Tensor],
        channels: Tensor,
        samples: Tensor,
    ) -> Any:
        env: dict[fx.Node, Any] = {}
        rows = samples.to(self.replay.device)

        def value(node: fx.Node) -> Any:
            if node not in env:
                env[node] = self.replay.in_rows(node, kept, rows)
            return env[node]

        for node in suffix.nodes:
            if node in suffix.short:
                env[node] = self._without_contribution(node, kept, by_channel, suffix.positions[node], channels, rows)
            elif node in suffix.positions:
                env[node] = self._on_zeroed(node, value, suffix.positions[node], channels)
            elif node in suffix.overwrites:
                env[node] = self._overwriting(node, value)
            else:
                env[node] = self.replay.call(node, value)
            for done in suffix.frees.get(node, ()):
                env.pop(done, None)
        return env[self.output]

    def _run_whole(self, suffix: Suffix, kept: Mapping[fx.Node, Any], channel: int) -> Any:
        env: dict[fx.Node, Any] = {}

        def value(node: fx.Node) -> Any:
            return env[node] if node in env else kept[node]

        channels = torch.full((1,), channel)
        for node in suffix.nodes:
            self.replay.again(node)
            if node in suffix.positions:
                env[node] = self._on_zeroed(node, value, suffix.positions[node], channels)
            else:
                env[node] = self.replay.call(node, value)
            for done in suffix.frees.get(node, ()):
                env.pop(done, None)
        return env[self.output]

    def _without_contribution(
        self,
        node: fx.Node,
        kept: Mapping[fx.Node, Any],
        by_channel: dict[fx.Node, Tensor],
        positions: list[Tensor],
        channels: Tensor,
        rows: Tensor,
    ) -> Tensor:
        """Return a layer's output without what one channel, another for each row, contributes to it."""
        layer, (kind,) = self.replay.layers[node], self.replay.kinds[node]
        (kind_in,) = self.replay.kinds[node.args[0]]  # type: ignore[index]
        if node not in by_channel:  # channel first, so that one channel lies together
            x = kept[node.args[0]]  # type: ignore[index]
            by_channel[node] = x.movedim(channel_dim(layer, x), 0).contiguous()
        x = by_channel[node]
        out = take_rows(kept[node], rows, kind.per_sample)
        start = 0
        for channel, count in zip(*(t.tolist() for t in channels.unique_consecutive(return_counts=True)), strict=True):
            at = positions[channel]
            mine = x[at[0]].unsqueeze(0) if len(at) == 1 else x[at]
            mine = take_rows(mine.movedim(0, 1), rows[start : start + count], kind_in.per_sample)
            weight = layer.weight.index_select(1, at)  # type: ignore[operator]
            part = slice(start * kind.per_sample, (start + count) * kind.per_sample)
            if isinstance(layer, nn.Linear):
                out[part] -= mine.movedim(1, -1) @ weight.T
            else:
                out[part] -= layer._conv_forward(_dense_last(mine), _dense_last(weight), None)  # type: ignore[operator]
            start += count
        return out

    def _on_zeroed(self, node: fx.Node, value: Any, positions: list[Tensor], channels: Tensor) -> Any:
        """Run a layer on its input with zeros where each row's channel lies; the input is as before afterwards."""
        x = value(node.args[0])
        dim = channel_dim(self.replay.layers[node], x)
        if len(channels) == 1:  # one channel for all rows
            row: Any = slice(None)
            at = positions[int(channels)]
        else:
            counts = [len(positions[c]) for c in channels.tolist()]
            at = torch.cat([positions[c] for c in channels.tolist()])
            row = torch.arange(len(channels)).repeat_interleave(torch.tensor(counts)).to(at.device)
            per_row = x.shape[0] // len(channels)
            if per_row > 1:
                row = (row[:, None] * per_row + torch.arange(per_row, device=row.device)).flatten()
                at = at.repeat_interleave(per_row)
        if dim == 0 or any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
            raise CannotReplayError(f"{node.target!r} reads an input without samples of its own")
        where = (row, *[slice(None)] * (dim - 1), at)
        before = x[where].clone()
        x[where] = 0
        result = self.replay.call(node, value)
        x[where] = before
        return result

    def _overwriting(self, node: fx.Node, value: Any) -> Any:
        x = value(node.args[0])
        if node.op == "call_module":
            return x.relu_()
        y = value(node.args[1]) if isinstance(node.args[1], fx.Node) else node.args[1]
        fits = isinstance(y, Tensor) and isinstance(x, Tensor) and x.shape == y.shape and x.dtype == y.dtype
        return x.add_(y) if fits else x + y


def _dense_last(x: Tensor) -> Tensor:
    """Give a tensor with one channel the strides of channels-last: its own fit both forms, and the other is taken."""
    if x.dim() != 4 or x.shape[1] != 1 or not x.is_contiguous():
        return x
    _, _, height, width = x.shape
    return x.as_strided(x.shape, (height * width, 1, width, 1))
