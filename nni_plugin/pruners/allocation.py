"""Which channels go: from scores and the ratios, thresholds and limits of a config_list to channels, as pure functions.

Channels that must go together (a coupled group, or several that share a `dependency_group_id`) are one
:class:`Bloc`. A bloc is pruned by itself, by its ratio or threshold, or in a pool (`global_group_id`) whose blocs share
one ratio of all their weights. Everything is decided by exact sorting and in the order of names, so that no result
depends on the order in which layers were found.

Rounding is NNI's: a ratio `r` of `n` channels removes `floor(n r)`, a pool removes at most `r` of its weights, and
limits clamp the ratio. Unlike NNI's, a pool reaches its ratio whatever its limits are, as long as they allow it, and
no bloc loses its last unit.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nni_plugin.errors import ConfigError

_ROUNDING = 1e-9
"""Shares are decimal fractions that floats cannot hold: 0.29 of 100 channels is 29, not 28."""


@dataclass(frozen=True)
class Limits:
    """How much of a bloc goes, in NNI's terms; every number is a share of what is REMOVED.

    Args:
        ratio: `sparse_ratio`, from 0 to 1, or None.
        threshold: `sparse_threshold`: units that score less go; or None.
        least: `min_sparse_ratio`, of the bloc's channels.
        most: `max_sparse_ratio`, of the bloc's channels.
    """

    ratio: float | None = None
    threshold: float | None = None
    least: float = 0.0
    most: float = 1.0


@dataclass(frozen=True, eq=False)
class Bloc:
    """Channels that go together, layer by layer, one mask for all of them.

    Args:
        name: By which ties are broken.
        unit: Label of the unit of removal of each channel: int64, shape `[width]`, labels `0..units-1`.
        weights: Weights that each channel stands for in a pool, shape `[width]`.
        limits: How much goes.
        pool: The `global_group_id` it shares its ratio with; None: by itself.
    """

    name: str
    unit: Tensor
    weights: Tensor
    limits: Limits
    pool: str | None = None

    @property
    def width(self) -> int:
        """Number of channels."""
        return len(self.unit)


@dataclass(frozen=True, eq=False)
class _Queue:
    """The units of a bloc, first to go first.

    Args:
        units: Labels, shape `[units]`.
        scores: Of each, ascending.
        channels: Channels gone once it has gone, shape `[units]`.
        weights: Weights that go with it, shape `[units]`.
        least: How many go in any case.
        most: How many may go.
    """

    units: Tensor
    scores: Tensor
    channels: Tensor
    weights: Tensor
    least: int
    most: int

    def within(self, channels: int) -> int:
        """Return how many units may go so that at most so many channels do, between the limits."""
        return min(max(_prefix(self.channels, channels), self.least), self.most)


def removed_channels(
    blocs: Iterable[Bloc], scores: Mapping[str, Tensor], gone: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Choose the channels to remove.

    Args:
        blocs: All blocs.
        scores: By bloc, shape `[width]`, higher = keep; a unit scores the sum of its channels.
        gone: Channels removed before, by bloc: bool, shape `[width]`. They are the first to go.

    Returns:
        By bloc, bool, shape `[width]`: True where a channel goes. Some unit of every bloc stays.

    Raises:
        ConfigError: Blocs of one pool do not share one ratio.
    """
    blocs = sorted(blocs, key=lambda bloc: bloc.name)
    queues = {bloc.name: _queue(bloc, scores[bloc.name], (gone or {}).get(bloc.name)) for bloc in blocs}
    counts: dict[str, int] = {}
    for bloc in blocs:
        queue = queues[bloc.name]
        if bloc.limits.threshold is not None:
            below = int((queue.scores < bloc.limits.threshold).sum())
            counts[bloc.name] = min(max(below, queue.least), queue.most)
        elif bloc.pool is None:
            counts[bloc.name] = queue.within(_share(bloc.limits.ratio or 0.0, bloc.width))
    for pool in pools_of(blocs).values():
        counts |= _pooled(pool, queues)
    return {bloc.name: _mark(bloc, queues[bloc.name].units[: counts[bloc.name]]) for bloc in blocs}


def emptied(blocs: Iterable[Bloc], scores: Mapping[str, Tensor]) -> list[Bloc]:
    """Return the blocs that lie below their threshold as a whole, so that no score says which last unit stays.

    Args:
        blocs: All blocs.
        scores: By bloc, shape `[width]`.
    """
    return [
        bloc
        for bloc in blocs
        if bloc.limits.threshold is not None
        and bloc.limits.most == 1
        and bool((_queue(bloc, scores[bloc.name], None).scores < bloc.limits.threshold).all())
    ]


def pools_of(blocs: Iterable[Bloc]) -> dict[str, list[Bloc]]:
    """Return the blocs of each pool; a bloc with a threshold goes by that.

    Raises:
        ConfigError: Blocs of one pool do not share one ratio.
    """
    pools: dict[str, list[Bloc]] = defaultdict(list)
    for bloc in blocs:
        if bloc.pool is not None and bloc.limits.threshold is None:
            pools[bloc.pool].append(bloc)
    for name, pool in pools.items():
        ratios = {bloc.limits.ratio or 0.0 for bloc in pool}
        if len(ratios) > 1:
            raise ConfigError(
                f"global_group_id {name} is one pool with one sparse_ratio, got {sorted(ratios)}. Give its layers the "
                "same sparse_ratio, or different ids. The model is unchanged."
            )
    return pools


def _queue(bloc: Bloc, scores: Tensor, gone: Tensor | None) -> _Queue:
    units = int(bloc.unit.max()) + 1
    score = torch.zeros(units, dtype=torch.float64).index_add_(0, bloc.unit, scores.double())
    if gone is not None:
        score[torch.unique(bloc.unit[gone])] = -math.inf
    order = torch.sort(score, stable=True).indices
    channels = torch.bincount(bloc.unit, minlength=units)[order].cumsum(0)
    weights = torch.zeros(units, dtype=torch.float64).index_add_(0, bloc.unit, bloc.weights.double())[order]
    most = min(_prefix(channels, _share(bloc.limits.most, bloc.width)), units - 1)
    least = min(_prefix(channels, _share(bloc.limits.least, bloc.width)), most)
    return _Queue(order, score[order], channels, weights, least, most)


def _pooled(blocs: Sequence[Bloc], queues: Mapping[str, _Queue]) -> dict[str, int]:
    """Return how many units of each bloc of a pool go: the lowest of all, up to the pool's share of weights."""
    ratio = blocs[0].limits.ratio or 0.0
    counts = {bloc.name: queues[bloc.name].least for bloc in blocs}
    total = sum(float(bloc.weights.sum()) for bloc in blocs)
    left = total * ratio - sum(float(queues[n].weights[:count].sum()) for n, count in counts.items())
    parts = [(queues[bloc.name], number) for number, bloc in enumerate(blocs)]
    scores = torch.cat([queue.scores[queue.least : queue.most] for queue, _ in parts])
    weights = torch.cat([queue.weights[queue.least : queue.most] for queue, _ in parts])
    owner = torch.cat([torch.full((queue.most - queue.least,), number) for queue, number in parts])
    order = torch.sort(scores, stable=True).indices
    going = owner[order][: _prefix(weights[order].cumsum(0), left + _ROUNDING * total)]
    for number, count in enumerate(torch.bincount(going, minlength=len(blocs)).tolist()):
        counts[blocs[number].name] += count
    return counts


def _share(ratio: float, width: int) -> int:
    return math.floor(width * ratio + _ROUNDING * width)


def _prefix(cumulated: Tensor, limit: float) -> int:
    """Return how many leading elements sum up to at most a limit, from their ascending cumulated sums."""
    return int((cumulated <= limit).sum())


def _mark(bloc: Bloc, units: Tensor) -> Tensor:
    going = torch.zeros(int(bloc.unit.max()) + 1, dtype=torch.bool)
    going[units] = True
    marked: Tensor = going[bloc.unit]
    return marked
