"""Choose the architecture that will be pruned, by its accuracy on data kept out of the search.

Candidates are the deterministic architecture of the gates and a few samples of them, each brought to the budget by
repair, so that all cost the same and differ only in what they keep. The test set has no part in it. (The authors'
released code takes the sample that did best on the test set, whatever it costs.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nni_plugin.correlation import kendall, spearman
from nni_plugin.errors import SearchError
from nni_plugin.performance.discretise import Discretiser, Kept
from nni_plugin.performance.search import PerformanceMaximization

_CANDIDATES, _UNSEEN = 2, 3
"""What is added to a search's seed for draws outside of it: they must not change how it would go on."""


@dataclass(frozen=True)
class Choice:
    """The architecture chosen.

    Args:
        kept: Channels kept, as ascending indices by group name.
        source: `"deterministic"`, or `"sample N"`.
        accuracy: On the held-out minibatches, in [0, 1]; None if there were none.
        loss: Likewise.
        compared: Accuracy of every candidate by its source, those alike once.
    """

    kept: Kept
    source: str
    accuracy: float | None
    loss: float | None
    compared: dict[str, float]


def choose(search: PerformanceMaximization, discretiser: Discretiser, held_out: Iterable[Any] | None = None) -> Choice:
    """Choose among the deterministic architecture and samples, all within the budget.

    Args:
        search: A search; it stays as it is.
        discretiser: Knows the budget.
        held_out: Minibatches of the training set that the search has not seen, gone through once for each candidate;
            None takes the deterministic architecture unseen.

    Returns:
        The candidate of the highest accuracy; of equals that of the lowest loss, then the deterministic one.

    Raises:
        BudgetError: No architecture meets the budget.
        DataError: There is no held-out minibatch.
    """
    chosen, logits = search.options, search.gates.logits.detach()
    search.gates.check()
    best = Choice(discretiser.deterministic(logits, chosen.offset), "deterministic", None, None, {})
    if held_out is None:
        return best
    generator = torch.Generator().manual_seed(chosen.seed + _CANDIDATES)
    candidates = {"deterministic": best.kept}
    for number in range(chosen.candidates):
        opened = search.sample(generator) >= 0.5
        candidates[f"sample {number + 1}"] = discretiser.repair(logits, opened)
    results: dict[str, tuple[float, float]] = {}
    seen: list[Tensor] = []
    with search.network:
        for source, kept in tqdm(candidates.items(), desc="compare", delay=2, disable=None, leave=False):
            architecture = search.layout.architecture(kept)
            if any(torch.equal(architecture, other) for other in seen):
                continue
            seen.append(architecture)
            results[source] = search.network.evaluate(architecture, held_out)
    winner = max(results, key=lambda source: (results[source][1], -results[source][0]))
    loss, accuracy = results[winner]
    compared = {source: result[1] for source, result in results.items()}
    return Choice(candidates[winner], winner, accuracy, loss, compared)


@dataclass(frozen=True)
class PredictorQuality:
    """How well a performance network predicts architectures that it has not seen.

    Args:
        spearman: Rank correlation of predicted and measured accuracies, in [-1, 1]; `nan` where either is constant.
        kendall: Likewise, tau-b.
        mean_abs_error: Mean absolute error, in units of accuracy.
        architectures: How many were compared.
    """

    spearman: float
    kendall: float
    mean_abs_error: float
    architectures: int


def predictor_quality(
    search: PerformanceMaximization,
    batches: Iterable[Any],
    architectures: Iterable[Tensor] | int = 32,
) -> PredictorQuality:
    """Compare predictions with accuracies on architectures that are not in the memory.

    Args:
        search: A search with a performance network; it stays as it is.
        batches: Minibatches to measure on, best held-out ones, gone through once for each architecture.
        architectures: Vectors of shape `[N]`; or how many to draw from the gates as they are.

    Raises:
        SearchError: The search has no performance network.
        DataError: There is no minibatch.
    """
    if search.learner is None:
        raise SearchError(f"mode={search.options.mode!r} has no performance network whose predictions could be judged.")
    if isinstance(architectures, int):
        generator = torch.Generator().manual_seed(search.options.seed + _UNSEEN)
        architectures = [search.sample(generator) for _ in range(architectures)]
    unseen = [architecture for architecture in architectures if not search.learner.memory.holds(architecture)]
    if not unseen:
        raise SearchError("Every architecture is in the memory: give more of them, or others.")
    with search.network:
        measured = [search.network.evaluate(architecture, batches)[1] for architecture in unseen]
    predicted = search.learner.predict(torch.stack(unseen)).double().cpu()
    truth = torch.tensor(measured, dtype=torch.float64)
    return PredictorQuality(
        spearman=spearman(predicted.numpy(), truth.numpy()),
        kendall=kendall(predicted.numpy(), truth.numpy()),
        mean_abs_error=float((predicted - truth).abs().mean()),
        architectures=len(unseen),
    )
