r"""Imprinting: how much better classes can be told apart behind a block than in front of it.

Elkerdawy et al., "One-Shot Layer-Wise Accuracy Approximation for Layer Pruning", ICIP 2020, and "To Filter Prune, or
to Layer Prune, That Is the Question" (LayerPrune), ACCV 2020, arXiv 2007.05667. Behind each block a linear classifier
is written down rather than trained: its weights are the means of each class's embeddings, scaled to unit length,

    W_c = m_c / ||m_c||,   m_c = mean of e(x) over the training samples of class c,   prediction = argmax_c W_c . e(x)

with embeddings `e` as in :mod:`nni_plugin.layers.embedding`, not normalised. The accuracy `a_i` of that proxy, on
samples held out of the training set, says what the network up to there knows, and a block's importance is the signed
gain `s_i = a_i - a_(i-1)`, with `a_0 = 0` in front of the first one. The block with the smallest gain leaves first; a
negative gain says that classes are further apart without it.

The block in front of a candidate need not be a candidate: then the proxy is measured on the signal that comes in. The
authors measure accuracies on the test set; here that would be a leak.

Cost: two passes of inference, of which one over the held-out samples. Memory, beside a forward pass: with `K` classes
and `P` points of vectors of length `D`, `8 K P D` bytes while means are summed up (in float64), `4 K P D` afterwards
(for a float32 network). `P` is the number of blocks, or twice that where no block follows directly on another. `D` is
about `target_length`, at most `max(4 target_length, width of the block)`. For 1,000 classes, 50 blocks in a row and
`D = 2048` that is 0.82 GB and then 0.41 GB; `target_length=512` takes a quarter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nni_plugin.cost import call, on_device_of
from nni_plugin.errors import CriterionError, DataError, NNIPluginError
from nni_plugin.layers.base import LayerImportance, LossFn, counted
from nni_plugin.layers.blocks import Block
from nni_plugin.layers.points import StreamPoints
from nni_plugin.layers.trace import eval_mode
from nni_plugin.processes import several


def imprinted_weights(sums: Tensor) -> Tensor:
    """Return the weights of a proxy classifier.

    Args:
        sums: Sum (or mean: the length does not matter) of the embeddings of each class, `[classes, D]`.

    Returns:
        Rows of unit length, `[classes, D]`; zero for a class whose embeddings add up to nothing.
    """
    return F.normalize(sums, dim=1, eps=torch.finfo(sums.dtype).tiny)


def predictions(weights: Tensor, embeddings: Tensor) -> Tensor:
    """Return the class of each sample.

    Args:
        weights: Of a proxy classifier, `[classes, D]`.
        embeddings: `[N, D]`; their length does not matter.

    Returns:
        Classes, int64, `[N]`; the first one of equals.
    """
    return (embeddings @ weights.T).argmax(1)


class Imprinting(LayerImportance):
    """Gain in accuracy of the imprinted classifier behind a block over that in front of it.

    Minibatches are `(inputs, labels)`, labels int64 `[N]`.

    Args:
        target_length: Length that embeddings should have; 2048 on ResNet-56 and 512 on VGG19 in the authors' code.
        num_classes: Number of classes, all of which the minibatches must hold; None: the width of the network's output.
        stem: Measure a proxy in front of the first block as well, whose gain is then over that and not over
            `a_0 = 0`, so that it may leave like any other.

    Attributes:
        accuracies: Of the proxy behind each block, in [0, 1], by the block's name; of the last scoring.
        classifier_accuracy: Of the network itself on the same held-out samples; None unless its output is
            `[N, num_classes]`.
    """

    needs_held_out = True

    def __init__(self, target_length: int = 2048, num_classes: int | None = None, stem: bool = False) -> None:
        for name, value, least in (("target_length", target_length, 1), ("num_classes", num_classes, 2)):
            if value is not None and value < least:
                raise CriterionError(f"{name} must be at least {least}, got {value}.")
        self.target_length, self.num_classes, self.stem = target_length, num_classes, stem
        self.accuracies: dict[str, float] = {}
        self.classifier_accuracy: float | None = None

    def _score(
        self,
        model: nn.Module,
        example_inputs: Any,
        blocks: Sequence[Block],
        batches: Iterable[Any],
        loss_fn: LossFn | None,
        held_out: Iterable[Any] | None,
    ) -> dict[str, float]:
        assert held_out is not None
        self.accuracies, self.classifier_accuracy = {}, None
        points = StreamPoints(model, blocks, self.target_length, stem=self.stem)
        with eval_mode(model), torch.no_grad():
            sums = _Sums(model, points, self.num_classes or _width_of_output(model, example_inputs))
            with _together():
                sums.gather(batches)
            weights = sums.weights()
            tally = _Tally(model, points, weights)
            with _together():
                tally.gather(held_out)
            accuracies, own = tally.accuracies()
        self.accuracies = {block.name: accuracies[i] for i, block in enumerate(blocks)}
        self.classifier_accuracy = own
        before = [0.0 if point is None else accuracies[point] for point in points.before]
        return {block.name: accuracies[i] - before[i] for i, block in enumerate(blocks)}


class _Sums:
    """Sums of the embeddings of each class at every point, in float64 where the device has it."""

    def __init__(self, model: nn.Module, points: StreamPoints, num_classes: int) -> None:
        self.model, self.points, self.num_classes = model, points, num_classes
        self.sums: dict[int, Tensor] = {}
        self.dtypes: dict[int, torch.dtype] = {}
        self.counts = torch.zeros(num_classes, dtype=torch.int64)

    def gather(self, batches: Iterable[Any]) -> None:
        """Add minibatches."""
        with self.points.watch(self._visit):
            for batch in counted(batches, "to imprint classes from"):
                inputs, self._labels = _labelled(self.model, batch, self.num_classes)
                self.counts = self.counts.to(self._labels.device)
                self.counts.index_add_(0, self._labels, torch.ones_like(self._labels))
                self.points.expect(len(self._labels), inputs)
                call(self.model, inputs)
                self.points.check_visited()

    def weights(self) -> dict[int, Tensor]:
        """Return the weights of each point's proxy, over all processes; the sums are used up.

        Raises:
            DataError: A class has no sample.
            CriterionError: An embedding is not finite.
        """
        _all_reduce([self.counts, *(self.sums[point] for point in sorted(self.sums))])
        missing = torch.nonzero(self.counts == 0).flatten().tolist()
        if missing:
            some = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            raise DataError(
                f"{len(missing)} of {len(self.counts)} classes have no sample in the minibatches (labels {some}): "
                "imprinting needs all of them. Give minibatches that hold every class, or num_classes. The model is "
                "unchanged."
            )
        weights = {}
        for point in sorted(self.sums):
            total = self.sums.pop(point)
            _check_finite(total, self.points, point)
            weights[point] = imprinted_weights(total).to(self.dtypes[point])
        return weights

    def _visit(self, point: int, vectors: Tensor) -> None:
        if point not in self.sums:
            dtype = torch.float32 if vectors.device.type == "mps" else torch.float64
            self.sums[point] = torch.zeros(self.num_classes, vectors.shape[1], dtype=dtype, device=vectors.device)
            self.dtypes[point] = vectors.dtype
        total = self.sums[point]
        total.index_add_(0, self._labels.to(total.device), vectors.to(total.dtype))


class _Tally:
    """Samples that each point's proxy gets right."""

    def __init__(self, model: nn.Module, points: StreamPoints, weights: dict[int, Tensor]) -> None:
        self.model, self.points, self.weights = model, points, weights
        self.num_classes = len(weights[0])
        self.right = [torch.zeros((), dtype=torch.int64, device=weights[point].device) for point in sorted(weights)]
        self.finite = [torch.ones((), dtype=torch.bool, device=weights[point].device) for point in sorted(weights)]
        self.own = torch.zeros(2, dtype=torch.int64, device=weights[0].device)  # right, and answered as classes
        self.samples = torch.zeros((), dtype=torch.int64, device=weights[0].device)

    def gather(self, batches: Iterable[Any]) -> None:
        """Add minibatches."""
        with self.points.watch(self._visit):
            for batch in counted(batches, "held out to measure on"):
                inputs, self._labels = _labelled(self.model, batch, self.num_classes)
                self.points.expect(len(self._labels), inputs)
                output = call(self.model, inputs)
                self.points.check_visited()
                self.samples += len(self._labels)
                if isinstance(output, Tensor) and output.shape == (len(self._labels), self.num_classes):
                    self.own[0] += (output.argmax(1) == self._labels).sum()
                    self.own[1] += len(self._labels)
        for point, finite in enumerate(self.finite):
            _check_finite(finite, self.points, point)

    def accuracies(self) -> tuple[list[float], float | None]:
        """Return each point's accuracy, over all processes, and the network's own."""
        _all_reduce([self.samples, self.own, *self.right])
        samples = int(self.samples)
        own = int(self.own[0]) / samples if int(self.own[1]) == samples else None
        return [int(right) / samples for right in self.right], own

    def _visit(self, point: int, vectors: Tensor) -> None:
        weights = self.weights[point]
        if vectors.shape[1] != weights.shape[1]:
            raise CriterionError(
                f"Embeddings {_where(self.points, point)} have {vectors.shape[1]} numbers, and had {weights.shape[1]} "
                "in the first pass: give inputs of one size."
            )
        labels = self._labels.to(vectors.device)
        self.right[point] += (predictions(weights, vectors) == labels).sum()
        self.finite[point] &= vectors.sum().isfinite()


def _width_of_output(model: nn.Module, example_inputs: Any) -> int:
    output = call(model, on_device_of(model, example_inputs))
    if not isinstance(output, Tensor) or output.dim() != 2:
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise DataError(f"The network's output does not say how many classes there are ({got}): give num_classes.")
    return output.shape[1]


def _labelled(model: nn.Module, batch: Any, num_classes: int) -> tuple[Any, Tensor]:
    """Return inputs and labels of a minibatch on the model's device; labels are checked where they come from."""
    if not isinstance(batch, Sequence) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        raise DataError(f"Imprinting needs minibatches (inputs, labels), got {type(batch).__name__}.")
    labels = batch[1]
    if labels.dim() != 1 or labels.is_floating_point() or labels.dtype == torch.bool or len(labels) == 0:
        raise DataError(
            f"Imprinting needs one class a sample, labels int64 [N], got {labels.dtype} of shape "
            f"{tuple(labels.shape)}; turn mixing of samples off."
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise DataError(
            f"Labels must lie in 0..{num_classes - 1} for {num_classes} classes, got {low if low < 0 else high}: "
            "renumber them, or give num_classes. The model is unchanged."
        )
    return on_device_of(model, batch[0]), on_device_of(model, labels.long())


def _check_finite(values: Tensor, points: StreamPoints, point: int) -> None:
    """Refuse sums with a value that is no number, or a flag that says so."""
    if not bool(values.all() if values.dtype == torch.bool else values.isfinite().all()):
        raise CriterionError(
            f"The signal {_where(points, point)} has values that are not finite: the data hold some, or training has "
            "diverged. The model is unchanged."
        )


def _where(points: StreamPoints, point: int) -> str:
    if point < len(points.blocks):
        return f"behind block {points.blocks[point].name!r}"
    return f"in front of block {points.blocks[points.before.index(point)].name!r}"


@contextmanager
def _together() -> Iterator[None]:
    """Let an error of one process be one of all, which would wait for its sums for ever."""
    problem: NNIPluginError | None = None
    try:
        yield
    except NNIPluginError as error:
        problem = error
    if several():
        words: list[str | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(words, None if problem is None else str(problem))
        elsewhere = next((word for word in words if word is not None), None)
        if problem is None and elsewhere is not None:
            raise DataError(f"Another process cannot score its minibatches: {elsewhere}")
    if problem is not None:
        raise problem


def _all_reduce(tensors: Iterable[Tensor]) -> None:
    """Sum tensors in place over all processes; nothing alone."""
    if several():
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)
