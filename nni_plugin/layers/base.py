"""What every layer importance is: one number a removable block, lower = leaves first, and an order made of them.

A criterion for channels scores the channels of a group; a layer importance scores whole blocks. What it needs is
declared, so that whoever plans can gather it: minibatches to learn from, a loss, minibatches held out of the training
set. No importance changes the network: weights, statistics, gradients, modes and hooks are as they were afterwards.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from nni_plugin.correlation import spearman
from nni_plugin.described import described
from nni_plugin.errors import CriterionError, DataError
from nni_plugin.layers.blocks import Block

LossFn = Callable[[nn.Module, Any], Tensor]
"""`loss_fn(model, batch)` -> a finite scalar, the mean over the samples of the minibatch."""


class LayerImportance(ABC):
    """Base class of the layer importances: checks what it is given and what comes out; subclasses measure."""

    needs_batches = True
    """Whether minibatches are read at all."""

    needs_loss = False
    """Whether `loss_fn` is called."""

    needs_held_out = False
    """Whether minibatches of the training set are needed that `batches` does not hold."""

    def __str__(self) -> str:
        """Name the importance and its options."""
        return described(self)

    def score(
        self,
        model: nn.Module,
        example_inputs: Any,
        blocks: Sequence[Block],
        batches: Iterable[Any] = (),
        loss_fn: LossFn | None = None,
        held_out: Iterable[Any] | None = None,
    ) -> dict[str, float]:
        """Score blocks on the network as it is used (in eval mode).

        Args:
            model: The network; weights, statistics, gradients and modes are put back.
            example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs.
            blocks: The candidates, in forward order.
            batches: Minibatches of the training set; not read unless `needs_batches`.
            loss_fn: `loss_fn(model, batch)` -> a finite scalar; not called unless `needs_loss`.
            held_out: Further minibatches of the training set, never of the test set, which would leak into the choice;
                not read unless `needs_held_out`.

        Returns:
            One finite number a block by its name, lower = leaves first, in the order of `blocks`.

        Raises:
            CriterionError: There is no block, something needed is missing, or a score is not finite.
            DataError: The minibatches cannot be scored on.
        """
        self._check(model, blocks, loss_fn, held_out)
        scores = self._score(model, example_inputs, blocks, batches, loss_fn, held_out)
        bad = [name for name, score in scores.items() if not math.isfinite(score)]
        if bad:
            raise CriterionError(
                f"{type(self).__name__} gave {len(bad)} of {len(scores)} blocks a score that is not finite, first "
                f"{bad[0]!r}: the network's values overflow. Load its weights anew; the model is unchanged."
            )
        return {block.name: scores[block.name] for block in blocks}

    def _check(
        self, model: nn.Module, blocks: Sequence[Block], loss_fn: LossFn | None, held_out: Iterable[Any] | None
    ) -> None:
        kind = type(self).__name__
        if not blocks:
            raise CriterionError(f"{kind} was given no block: nothing in {type(model).__name__} can be removed whole.")
        names = [block.name for block in blocks]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise CriterionError(f"{kind} was given block {twice!r} twice; give each block once.")
        known = {name for name, _ in model.named_modules()}
        for block in blocks:
            missing = [member for member in block.members if member not in known]
            if missing or not block.members:
                what = f"no module {missing[0]!r}" if missing else "no modules for it"
                raise CriterionError(
                    f"{type(model).__name__} has {what} (block {block.name!r}): the blocks are of another network; "
                    "find them anew with removable_blocks."
                )
        if self.needs_loss and loss_fn is None:
            raise CriterionError(f"{kind} needs the loss: give loss_fn(model, batch) -> a scalar.")
        if self.needs_held_out and held_out is None:
            raise CriterionError(
                f"{kind} measures on minibatches that it has not learned from: give held_out, a part of the training "
                "set kept back (not the test set, whose accuracy would then no longer be a fair one)."
            )

    @abstractmethod
    def _score(
        self,
        model: nn.Module,
        example_inputs: Any,
        blocks: Sequence[Block],
        batches: Iterable[Any],
        loss_fn: LossFn | None,
        held_out: Iterable[Any] | None,
    ) -> dict[str, float]:
        """Return a number by the name of each block; see :meth:`score`."""


def removal_order(scores: Mapping[str, float]) -> list[str]:
    """Return the blocks in the order in which they leave: ascending by score, ties in the order given.

    Example:
        >>> removal_order({"layer1.0": 0.3, "layer1.1": -0.1, "layer2.1": 0.3})
        ['layer1.1', 'layer1.0', 'layer2.1']
    """
    return sorted(scores, key=lambda name: scores[name])


def rank_agreement(one_shot: Mapping[str, float], iterative: Mapping[str, float]) -> float:
    """Return Spearman's rank correlation of two scorings, over the blocks that both hold.

    So a ranking made once is compared with one made anew after some blocks have left (LayerPrune, supplement, Table
    2): blocks that have left are in the first alone and do not count.

    Args:
        one_shot: Score by block name.
        iterative: The same, of another importance or of the network with blocks removed.

    Returns:
        In [-1, 1]; `nan` below three common blocks, or where one side scores all of them alike.

    Example:
        >>> rank_agreement({"a": 0.1, "b": 0.2, "c": 0.4, "d": 0.3}, {"a": 1.0, "c": 9.0, "d": 4.0})
        1.0
    """
    common = [name for name in one_shot if name in iterative]
    first, second = (np.array([side[name] for name in common], dtype=np.float64) for side in (one_shot, iterative))
    return spearman(first, second)


def counted(batches: Iterable[Any], what: str) -> Iterator[Any]:
    """Hand minibatches on, and refuse to have handed on none.

    Raises:
        DataError: There was none.
    """
    seen = False
    for batch in batches:
        seen = True
        yield batch
    if not seen:
        raise DataError(f"There is no minibatch {what}: the loader is empty (or used up). The model is unchanged.")
