"""Operators that take a statistic over dimensions: normalisations, means, softmax, pooling."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from nni_plugin.tracing.elementwise import matched
from nni_plugin.tracing.labels import NONE, Block, Labels
from nni_plugin.tracing.operators import rule
from nni_plugin.tracing.shapes import without_dims

if TYPE_CHECKING:
    from nni_plugin.tracing.trace import Trace


def _with_affine(trace: Trace, x: Tensor, dim: int, vectors: Iterable[Any]) -> Labels:
    """Match a dimension with vectors over it and with the running layer's own channels."""
    shape = [int(size) for size in x.shape]
    wide = [1] * (len(shape) - 1 - dim)
    parts = [(trace.labels(x), shape)]
    for vector in vectors:
        if isinstance(vector, Tensor) and vector.dim() == 1:
            parts.append((trace.labels(vector), [len(vector), *wide]))
    axis = trace.norm_axis()
    if axis is not None and len(axis) > 1 and shape[dim] % len(axis) == 0:
        # Instance normalisation puts the channels of one picture behind those of another.
        line = np.tile(axis, shape[dim] // len(axis))
        parts.append((Labels((Block.line(0, line),)), [len(line), *wide]))
    return matched(trace, parts, shape)


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
      "_batch_norm_with_update", "_batch_norm_no_update", "batch_norm")  # fmt: skip
def batch_norm(trace: Trace, operator: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> Labels:
    """Normalise each channel (dimension 1) over all others."""
    labels = _with_affine(trace, args[0], 1, (arg for arg in args[1:5] if isinstance(arg, Tensor)))
    training = "no_training" not in str(operator) and any(arg is True for arg in args[1:])
    if training:
        for block in labels.blocks:
            for dim, along in zip(block.dims, block.along, strict=True):
                if dim != 1:
                    trace.note_statistic(along, "batch_norm")
    return labels


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(trace: Trace, operator: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> Labels:
    """Normalise over the last dimensions."""
    rank, number = args[0].dim(), len(args[1])
    if number > 1:
        labels = trace.labels(args[0])
        for dim in range(rank - number, rank):
            along = labels.at(dim)
            if along is not None:
                trace.ledger.fix(along, f"layer {trace.module!r} is of a kind that cannot be cut")
        return labels
    labels = _with_affine(trace, args[0], rank - 1, args[2:4])
    trace.note_statistic(labels.at(rank - 1), "layer norm")
    trace.note_size(labels.at(rank - 1))
    return labels


@rule("native_group_norm", "group_norm")
def group_norm(trace: Trace, operator: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> Labels:
    """Normalise groups of channels (dimension 1) with what lies behind them; the groups stay equally wide."""
    x, weight, bias, groups = args[0], args[1], args[2], args[6]
    labels = _with_affine(trace, x, 1, (weight, bias))
    along = labels.at(1)
    if along is not None:
        trace.note_statistic(along, "group norm")
        if groups > 1:
            trace.ledger.tie(along, np.resize(along[: len(along) // groups], len(along)))
    return labels


def _reduced(labels: Labels, dims: Sequence[int], rank: int, keepdim: bool) -> Labels:
    """Return the labels of what is left when dimensions are reduced."""
    blocks = []
    for block in labels.blocks:
        rest = [d for d in block.dims if d not in dims]
        if len(rest) == len(block.dims):
            blocks.append(block)
        else:
            blocks += [Block.line(d, block.along[block.dims.index(d)]) for d in rest]
    free = labels.free - set(dims)
    if keepdim:
        return Labels(tuple(blocks), free)
    target = [dim - sum(d < dim for d in dims) for dim in range(rank)]
    return Labels(tuple(block.moved(target) for block in blocks), frozenset(target[d] for d in free))


def _dims(args: Any, kwargs: Any, rank: int, at: int = 1) -> tuple[list[int], bool]:
    dims = kwargs.get("dim", args[at] if len(args) > at else None)
    dims = [dims] if isinstance(dims, int) and not isinstance(dims, bool) else dims
    keepdim = kwargs.get("keepdim", args[at + 1] if len(args) > at + 1 else False)
    return ([dim % max(rank, 1) for dim in dims] if dims else list(range(rank))), keepdim is True


@rule("sum")
def summed(trace: Trace, operator: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> Labels:
    """Sum over dimensions: channels that are zero add nothing, and tensors that were stacked are added."""
    dims, keepdim = _dims(args, kwargs, args[0].dim())
    labels = trace.labels(args[0])
    blocks = tuple(_added(trace, block, dims) for block in labels.blocks)
    return _reduced(Labels(blocks, labels.free), dims, args[0].dim(), keepdim)


def _added(trace: Trace, block: Block, dims: Sequence[int]) -> Block:
    """Return a block without a stacked dimension that is summed over: what is added is the same channel."""
    for at, (dim, along) in enumerate(zip(block.dims, block.along, strict=True)):
        if dim in dims and int(along[0]) in trace.stacked and len(block.dims) == 2:
            rows = np.moveaxis(block.atoms, at, 0)
            for row in rows[1:]:
                trace.ledger.same(rows[0], row)
            return Block.line(block.dims[1 - at], rows[0])
    return block


@rule("mean", "var", "std", "var_mean", "linalg_vector_norm", "norm", "logsumexp")
def averaged(trace: Trace, operator: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> Labels | list[Labels]:
    """Take a statistic over dimensions."""
    at = 2 if "norm" in str(operator) else 1
    dims, keepdim = _dims(args, kwargs, args[0].dim(), at)
    labels = trace.labels(args[0])
    for dim in dims:
        trace.note_statistic(labels.at(dim), str(operator).split(".")[1])
    result = _reduced(labels, dims, args[0].dim(), keepdim or outputs[0].dim() == args[0].dim())
    return [result] * len(outputs)


@rule("amax", "amin", "max", "min", "argmax", "argmin", "prod", "median", "any", "all")
def extreme(trace: Trace, operator: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> Labels | list[Labels]:
    """Choose among positions: those chosen among must stay."""
    if len(args) > 1 and isinstance(args[1], Tensor):
        return matched(trace, [(trace.labels(t), list(t.shape)) for t in args[:2]], list(outputs[0].shape))
    dims, keepdim = _dims(args, kwargs, args[0].dim())
    labels = trace.labels(args[0])
    for dim in dims:
        trace.fix(labels.at(dim), "is chosen among")
    return [_reduced(labels, dims, args[0].dim(), keepdim)] * len(outputs)


@rule("_softmax", "_log_softmax", "_safe_softmax", "softmax", "cumsum", "sort", "topk", "logcumsumexp", "cumprod")
def along(trace: Trace, operator: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> list[Labels]:
    """Work along one dimension whose positions must stay."""
    at = 2 if ".topk" in str(operator) else 1
    dim = (args[at] if len(args) > at else kwargs.get("dim", -1)) % max(args[0].dim(), 1)
    labels, what = trace.labels(args[0]), f"enters {str(operator).split('.')[1].strip('_')}"
    trace.fix(labels.at(dim), what)
    if ".topk" in str(operator):  # another number of positions
        labels = without_dims(trace, labels, {dim}, what)
    return [labels] * len(outputs)


@rule(
    "avg_pool2d", "avg_pool1d", "avg_pool3d", "max_pool2d_with_indices", "max_pool2d", "max_pool3d_with_indices",
    "_adaptive_avg_pool2d", "adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_max_pool2d", "adaptive_max_pool1d", "upsample_bilinear2d", "upsample_nearest2d", "upsample_bicubic2d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "upsample_linear1d", "upsample_nearest1d",
    "upsample_trilinear3d", "upsample_nearest3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d", "adaptive_max_pool3d",
)  # fmt: skip
def pooled(trace: Trace, operator: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> list[Labels]:
    """Resample the spatial dimensions, the last ones, as many as the operator's name says."""
    rank = args[0].dim()
    number = int(re.findall(r"(\d)d", str(operator))[0])
    result = without_dims(trace, trace.labels(args[0]), set(range(rank - number, rank)), "is resampled")
    return [result] * len(outputs)


@rule("im2col", "col2im", "unfold")
def unfolded(trace: Trace, operator: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> Labels:
    """Lay patches out. `im2col` puts them behind each channel, `unfold` behind all dimensions."""
    labels, x = trace.labels(args[0]), args[0]
    if ".unfold" in str(operator):
        dim = args[1] % max(x.dim(), 1)
        trace.fix(labels.at(dim), "is unfolded")
        kept = [b for block in labels.blocks for b in (block.without(dim) if dim in block.dims else [block])]
        return Labels(tuple(kept))
    at = x.dim() - 3  # without a batch dimension 0
    channels = labels.at(at)
    for block in labels.blocks:
        for d, atoms in zip(block.dims, block.along, strict=True):
            if d > at or ".col2im" in str(operator):
                trace.fix(atoms, "is unfolded")
    if channels is None or ".col2im" in str(operator):
        return NONE
    times = outputs[0].shape[at] // x.shape[at]
    return Labels((Block.line(at, np.repeat(channels, times)),))
