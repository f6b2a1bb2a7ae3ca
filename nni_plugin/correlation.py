"""How well scores rank channels: their correlation with what removing each channel really does to the loss.

Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, Section 4: a criterion is good if it
orders the channels as the Oracle does, the squared change of the loss when a channel alone is removed (Eq. 3).

    spearman            Pearson's correlation of ranks (ties share their mean rank), over the channels of all groups
    spearman_per_group  the mean of the same within each group, since a criterion may rank well inside a layer and
                        yet weigh layers wrongly
    kendall             tau-b: agreeing minus disagreeing pairs, as a share of all pairs, corrected for ties
    pearson             of the numbers themselves, ruled by the few channels that matter most

A coefficient is not a number (`nan`) where it is not defined: fewer than three channels, or a side on which all
channels are equal. Cost: sorting.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nni_plugin.errors import CriterionError

FEWEST = 3
"""Channels below which no coefficient is given: two are always in perfect order or in reverse."""

Values: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Correlation:
    """How scores correlate with reference values; see the module's text.

    Args:
        spearman: Over the channels of all groups.
        spearman_per_group: Mean over the groups in which it is defined, each group counting once.
        kendall: Tau-b over the channels of all groups.
        pearson: Over the channels of all groups.
        channels: How many channels were compared.
    """

    spearman: float
    spearman_per_group: float
    kendall: float
    pearson: float
    channels: int


def correlate(scores: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> Correlation:
    """Correlate the scores of channels with reference values of the same channels.

    Args:
        scores: By group name, shape `[width]` each; groups that a criterion does not score may be missing.
        reference: Likewise; every group scored must be there. NaN where it was not measured: left out.

    Raises:
        CriterionError: A group is not in the reference or of another width, or a value is not finite.

    Example:
        >>> scores = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([4.0, 6.0, 5.0])}
        >>> changes = {"a": torch.tensor([0.1, 0.2, 0.9]), "b": torch.tensor([1.0, 2.0, 3.0])}
        >>> found = correlate(scores, changes)
        >>> round(found.spearman, 3), found.spearman_per_group, found.channels
        (0.943, 0.75, 6)
    """
    pairs = {name: _pair(name, scores[name], reference) for name in scores}
    if not pairs:
        return Correlation(math.nan, math.nan, math.nan, math.nan, 0)
    first, second = (np.concatenate(side) for side in zip(*pairs.values(), strict=True))
    return Correlation(
        spearman=spearman(first, second),
        spearman_per_group=_mean([spearman(*pair) for pair in pairs.values()]),
        kendall=kendall(first, second),
        pearson=pearson(first, second),
        channels=len(first),
    )


def spearman(first: Values, second: Values) -> float:
    """Return Spearman's rank correlation, ties sharing their mean rank; `nan` where it is not defined."""
    from scipy import stats

    return _coefficient(stats.spearmanr, first, second)


def kendall(first: Values, second: Values) -> float:
    """Return Kendall's tau-b; `nan` where it is not defined."""
    from scipy import stats

    return _coefficient(stats.kendalltau, first, second)


def pearson(first: Values, second: Values) -> float:
    """Return Pearson's correlation; `nan` where it is not defined."""
    from scipy import stats

    return _coefficient(stats.pearsonr, first, second)


def ranks(values: Values) -> Values:
    """Return the rank of each value, from 0 for the smallest to 1 for the largest; ties share their mean rank.

    Example:
        >>> ranks(np.array([5.0, 1.0, 1.0])).tolist()
        [1.0, 0.25, 0.25]
    """
    from scipy import stats

    ranked: Values = (stats.rankdata(values) - 1) / max(len(values) - 1, 1)
    return ranked


def _coefficient(measure: Callable[[Values, Values], Any], first: Values, second: Values) -> float:
    if len(first) < FEWEST or np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sides that are nearly constant are judged above
        return float(measure(first, second).statistic)


def _pair(name: str, scores: Tensor, reference: Mapping[str, Tensor]) -> tuple[Values, Values]:
    if name not in reference or reference[name].shape != scores.shape:
        expected = tuple(reference[name].shape) if name in reference else "no such group"
        raise CriterionError(f"Group {name!r} has scores of shape {tuple(scores.shape)}; the reference has {expected}.")
    first, second = scores.detach().double().cpu(), reference[name].detach().double().cpu()
    measured = ~second.isnan()
    first, second = first[measured], second[measured]
    for values, what in ((first, "score"), (second, "reference value")):
        if not bool(torch.isfinite(values).all()):
            raise CriterionError(f"Group {name!r} has a {what} that is not finite; only finite ones can be ranked.")
    return first.numpy(), second.numpy()


def _mean(values: list[float]) -> float:
    """Return the mean of the numbers among values; `nan` if there is none."""
    defined = [value for value in values if not math.isnan(value)]
    return math.fsum(defined) / len(defined) if defined else math.nan
