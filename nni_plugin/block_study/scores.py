"""Several layer importances on one network, in as few passes over the minibatches as they need together.

Layer statistics whose criteria read what an ordinary backward pass leaves share one pass; criteria of equal options
(also inside an ensemble) are scored once. What runs the network in a way of its own takes a pass of its own: a second
derivative, an Oracle, a stock importance, gates on blocks, and Imprinting two without gradients.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.criteria import Criterion
from nni_plugin.errors import CriterionError
from nni_plugin.groups import ChannelGroup
from nni_plugin.layers import BlockGate, Imprinting, LayerEnsemble, LayerImportance, LayerStatistic
from nni_plugin.layers.base import LossFn
from nni_plugin.layers.blocks import Block
from nni_plugin.layers.ensemble import rank_sums
from nni_plugin.layers.statistics import groups_inside, mean_of_layer_means, written_last
from nni_plugin.planner import unchanged
from nni_plugin.scorer import Scorer

_HOST_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What stock importances raise on networks they cannot score."""


@dataclass(frozen=True)
class BlockScores:
    """What one importance says of the blocks, or why it says nothing.

    Args:
        scores: By block name, lower = leaves first; empty with a reason.
        seconds: What scoring took; of importances that shared a pass, the whole of it.
        reason: Why there are none; empty if there are.
        details: Further numbers by block name: `accuracy` of Imprinting's proxy behind a block, in [0, 1], and
            `predicted_loss_change` of gates on blocks.
    """

    scores: dict[str, float]
    seconds: float = 0.0
    reason: str = ""
    details: dict[str, dict[str, float]] = field(default_factory=dict)


def score_blocks(
    importances: Mapping[str, LayerImportance],
    model: nn.Module,
    example_inputs: Any,
    blocks: Sequence[Block],
    batches: Iterable[Any],
    loss_fn: LossFn,
    held_out: Iterable[Any] | None = None,
    *,
    seed: int = 0,
) -> Iterator[tuple[str, BlockScores]]:
    """Score blocks by several importances on the network as it is used (in eval mode), one after the other.

    Args:
        importances: By name.
        model: The network; left as it was.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs.
        blocks: The candidates, in forward order.
        batches: Minibatches of the training set that can be gone through again.
        loss_fn: `loss_fn(model, batch)` -> a finite scalar.
        held_out: Further minibatches of the training set.
        seed: Of what an importance draws.

    Yields:
        Names and scores, in the order of `importances`; one that cannot score this network carries the reason.

    Raises:
        DataError: The minibatches cannot be scored on.
    """
    given = (model, example_inputs, blocks, batches, loss_fn)
    wanted = {_key(name, s): s for name, item in importances.items() for s in _statistics(item)}
    criteria = {key: statistic.criterion for key, statistic in wanted.items()}
    shared = {key: c for key, c in criteria.items() if isinstance(c, Criterion) and _reads_an_ordinary_pass(c)}
    found: dict[str, BlockScores] = _score_together(shared, *given) if len(shared) > 1 else {}

    def scored(key: str, importance: LayerImportance) -> BlockScores:
        if key not in found:
            torch.manual_seed(seed)
            found[key] = _score(importance, *given, held_out)
        return found[key]

    for name, importance in importances.items():
        if isinstance(importance, LayerEnsemble) and len(_statistics(importance)) == len(importance.members):
            yield name, _ensemble([scored(_key(name, s), s) for s in _statistics(importance)])
        else:
            yield name, scored(_key(name, importance), importance)


def _statistics(importance: LayerImportance) -> list[LayerStatistic]:
    members = importance.members if isinstance(importance, LayerEnsemble) else [importance]
    return [member for member in members if isinstance(member, LayerStatistic)]


def _key(name: str, importance: LayerImportance) -> str:
    """Return what importances that give equal scores have in common."""
    is_own = isinstance(importance, LayerStatistic) and isinstance(importance.criterion, Criterion)
    return str(importance) if is_own else name


def _reads_an_ordinary_pass(criterion: Criterion) -> bool:
    is_special = criterion.needs_graph or criterion.needs_batch
    return criterion.needs_data and criterion.needs_gradients and not is_special


def _score_together(
    criteria: Mapping[str, Criterion],
    model: nn.Module,
    example_inputs: Any,
    blocks: Sequence[Block],
    batches: Iterable[Any],
    loss_fn: LossFn,
) -> dict[str, BlockScores]:
    """Return the layer statistics of several criteria after one pass; nothing if one of them cannot take part."""
    begun = time.perf_counter()
    scorers = {key: Scorer(criterion) for key, criterion in criteria.items()}
    try:
        groups = find_groups(model, example_inputs)
        layers = {
            block.name: groups_inside(block, groups) or [written_last(model, example_inputs, block, groups)]
            for block in blocks
        }
        every = list({group.name: group for inside in layers.values() for group in inside}.values())
        _pass_over(list(scorers.values()), model, every, batches, loss_fn)
    except CriterionError:
        return {}  # each by itself then, which tells whose fault it was
    seconds = time.perf_counter() - begun
    kept = {group.name: torch.arange(group.width) for group in every}
    found: dict[str, BlockScores] = {}
    for key, scorer in scorers.items():
        try:
            found[key] = BlockScores(_means(layers, scorer.scores(every, kept, 0.0)), seconds)
        except CriterionError as error:
            found[key] = BlockScores({}, reason=str(error))
    return found


def _pass_over(
    scorers: Sequence[Scorer],
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Iterable[Any],
    loss_fn: LossFn,
) -> None:
    with unchanged(model):
        model.eval()
        try:
            for scorer in scorers:
                scorer.open(model, groups)
            seen = False
            for batch in batches:
                seen = True
                model.zero_grad(set_to_none=True)
                scorers[0].backward(model, batch, loss_fn)
                for scorer in scorers:
                    scorer.update(model, groups, due=False, batch=batch)
            if not seen:
                raise CriterionError("There is no batch to score with: the loader is empty (or used up).")
        finally:
            for scorer in reversed(scorers):
                scorer.close()


def _means(layers: Mapping[str, Sequence[ChannelGroup]], scores: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: mean_of_layer_means([scores[group.name] for group in inside]) for name, inside in layers.items()}


def _score(
    importance: LayerImportance,
    model: nn.Module,
    example_inputs: Any,
    blocks: Sequence[Block],
    batches: Iterable[Any],
    loss_fn: LossFn,
    held_out: Iterable[Any] | None,
) -> BlockScores:
    is_foreign = isinstance(importance, LayerStatistic) and not isinstance(importance.criterion, Criterion)
    begun = time.perf_counter()
    try:
        scores = importance.score(model, example_inputs, blocks, batches, loss_fn, held_out)
    except CriterionError as error:
        return BlockScores({}, reason=str(error))
    except torch.OutOfMemoryError:
        raise
    except _HOST_ERRORS as error:
        if not is_foreign:
            raise
        return BlockScores({}, reason=f"{type(error).__name__}: {error}")
    seconds = time.perf_counter() - begun
    details = {}
    if isinstance(importance, Imprinting):
        details["accuracy"] = importance.accuracies
    elif isinstance(importance, BlockGate):
        details["predicted_loss_change"] = importance.loss_changes
    return BlockScores(scores, seconds, details=details)


def _ensemble(members: Sequence[BlockScores]) -> BlockScores:
    reason = next((member.reason for member in members if member.reason), "")
    if reason:
        return BlockScores({}, reason=f"one of its members cannot score: {reason}")
    # Those that shared a pass took it once.
    seconds = sum({member.seconds for member in members})
    return BlockScores(rank_sums([member.scores for member in members]), seconds)
