"""Operators that sum products: matrix products, convolutions, attention. What is summed over is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from nni_plugin.tracing.elementwise import matched
from nni_plugin.tracing.labels import Block, Labels
from nni_plugin.tracing.operators import rule

if TYPE_CHECKING:
    from nni_plugin.tracing.trace import Trace


def _product(trace: Trace, one: Tensor, other: Tensor) -> Labels:
    """Match `[..., M, K]` with `[..., K, N]` and return the labels of `[..., M, N]`."""
    rank = one.dim()
    k = n = rank - 1
    left, right = trace.labels(one), trace.labels(other)
    a, b = left.block(k), right.block(rank - 2)
    if one.shape[k] > 1 and k not in left.free and rank - 2 not in right.free:
        activations = trace.value(one).step is not None and trace.value(other).step is not None
        bare = any(_is_bare(trace, tensor) for tensor in (one, other))
        if a is not None and b is not None and len(a.dims) == 2 == len(b.dims) and _parallel(a, b, k, rank - 2):
            trace.ledger.same(a.atoms if a.dims[1] == k else a.atoms.T, b.atoms if b.dims[1] == k - 1 else b.atoms.T)
        trace.same(left, k, right, rank - 2, (one.shape[k], other.shape[rank - 2]))
        for labels, dim in ((left, k), (right, rank - 2)):
            along = labels.at(dim)
            if along is not None and activations:
                trace.ledger.contract(along)
            if along is not None and bare:
                trace.fix(along, "is summed over with a bare parameter")
    for dim in range(rank - 2):
        trace.same(left, dim, right, dim, (one.shape[dim], other.shape[dim]))
        for labels in (left, right):
            along = labels.at(dim)
            if along is not None:
                trace.ledger.heads(along)
    kept_left = [b for block in left.blocks for b in (block.without(k) if k in block.dims else [block])]
    kept_right = [b for block in right.blocks for b in (block.without(rank - 2) if rank - 2 in block.dims else [block])]
    target = [*range(rank - 2), n, n]
    blocks: list[Block] = []
    taken: set[int] = set()
    candidates = [*kept_left, *(block.moved(target) for block in kept_right)]
    for block in sorted(candidates, key=lambda block: -len(block.dims)):
        if not taken & set(block.dims):
            blocks.append(block)
            taken |= set(block.dims)
        else:
            for dim, along in zip(block.dims, block.along, strict=True):
                if dim not in taken:
                    blocks.append(Block.line(dim, along))
                    taken.add(dim)
    return Labels(tuple(blocks))


def _parallel(a: Block, b: Block, k: int, j: int) -> bool:
    """Tell whether two blocks over a batch dimension and the summed one lie alike."""
    batch_a, batch_b = [d for d in a.dims if d != k], [d for d in b.dims if d != j]
    return batch_a == batch_b and sorted(a.atoms.shape) == sorted(b.atoms.shape)


def _is_bare(trace: Trace, tensor: Tensor) -> bool:
    """Tell whether a tensor is a bare parameter, seen in some shape."""
    step = trace.value(tensor).step
    while step is not None and step.kind != "parameter" and len(step.inputs) == 1 and step.layer is None:
        step = step.inputs[0]
    return step is not None and step.kind == "parameter"


@rule("mm", "bmm")
def product(trace: Trace, operator: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> Labels:
    """Multiply matrices."""
    return _product(trace, args[0], args[1])


@rule("addmm", "baddbmm")
def product_with_bias(trace: Trace, operator: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> Labels:
    """Multiply matrices and add."""
    shape = list(outputs[0].shape)
    return matched(
        trace, [(_product(trace, args[1], args[2]), shape), (trace.labels(args[0]), list(args[0].shape))], shape
    )


@rule("convolution", "_convolution", "mkldnn_convolution")
def convolution(trace: Trace, operator: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> Labels:
    """Convolve: channels are dimension 1, the others hold none."""
    x, weight, bias, transposed, groups = args[0], args[1], args[2], args[6], args[8]
    values, filters = trace.labels(x), trace.labels(weight)
    out_dim, in_dim = (1, 0) if transposed else (0, 1)
    for block in values.blocks:
        for dim, along in zip(block.dims, block.along, strict=True):
            if dim > 1:
                trace.fix(along, "is convolved over")
    channels, outs = x.shape[1], outputs[0].shape[1]
    if groups == 1:
        trace.same(values, 1, filters, in_dim, (channels, weight.shape[in_dim]))
        line = filters.at(out_dim)
    elif groups == channels == outs and weight.shape[1] == 1:
        trace.same(values, 1, filters, 0, (channels, weight.shape[0]))
        line = filters.at(0)
    else:
        line = _grouped(trace, values, filters, channels, outs, groups, transposed)
    blocks = [block for block in values.blocks if block.dims == (0,)]
    for block in values.blocks:
        if 0 in block.dims and len(block.dims) > 1:
            blocks.append(Block.line(0, block.along[block.dims.index(0)]))
    if line is not None:
        blocks.append(Block.line(1, line))
    labels = Labels(tuple(blocks))
    if bias is None:
        return labels
    shape = list(outputs[0].shape)
    return matched(trace, [(labels, shape), (trace.labels(bias), [len(bias), *[1] * (len(shape) - 2)])], shape)


def _grouped(
    trace: Trace, values: Labels, filters: Labels, channels: int, outs: int, groups: int, transposed: bool
) -> Any:
    """Match a grouped convolution: its groups stay equally wide, so each position leaves all of them together."""
    read, written = values.at(1), filters.at(1 if transposed else 0)
    narrow = filters.at(0 if transposed else 1)
    ledger = trace.ledger
    if transposed:
        # The weight holds outputs folded and inputs whole.
        if read is not None and narrow is not None:
            ledger.same(read, narrow)
            ledger.tie(read, np.resize(read[: channels // groups], channels))
        elif read is not None or narrow is not None:
            trace.fix(read if read is not None else narrow, "meets a fixed size")
        return None if written is None else trace.in_axis(written, outs)
    if narrow is not None:
        axis = trace.in_axis(narrow, channels)
        if read is None:
            trace.fix(narrow, "meets a fixed size")
        elif axis is not None:
            ledger.same(read, axis)
        else:
            ledger.tie(read, np.resize(narrow, channels))
    elif read is not None:
        # One input a group: whole groups could leave, which no layer of ours knows how to do.
        trace.fix(read, "enters a grouped convolution with one input channel a group")
    if written is not None:
        if channels == groups:
            trace.fix(written, "leaves a grouped convolution with one input channel a group")
        else:
            ledger.tie(written, np.resize(written[: outs // groups], outs))
    return written


@rule(
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip
def attention(trace: Trace, operator: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> Labels:
    """Attend: `[B, H, N, D]` each; queries and keys are summed over `D`, keys and values over positions."""
    query, key, value = (trace.labels(tensor) for tensor in args[:3])
    for other, tensor in ((key, args[1]), (value, args[2])):
        for dim in (0, 1):
            trace.same(query, dim, other, dim, (args[0].shape[dim], tensor.shape[dim]))
    trace.same(key, 2, value, 2, (args[1].shape[2], args[2].shape[2]))
    a, b = query.block(3), key.block(3)
    if a is not None and b is not None and a.dims == b.dims:
        trace.ledger.same(a.atoms, b.atoms)
    trace.same(query, 3, key, 3, (args[0].shape[3], args[1].shape[3]))
    for labels in (query, key):
        along = labels.at(3)
        if along is not None:
            trace.ledger.contract(along)
            if kwargs.get("scale") is None:
                trace.fix(along, "sets the scale of an attention by its number")
    for labels in (query, key, value):
        along = labels.at(1)
        if along is not None:
            trace.ledger.heads(along)
    # By name on CPUs, fourth on accelerators; the kernels without one have a number there.
    mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
    if isinstance(mask, Tensor):
        heads = query.at(1)
        shape = [*args[0].shape[:3], args[1].shape[2]]
        mine = Labels(() if heads is None else (Block.line(1, heads),))
        matched(trace, [(mine, shape), (trace.labels(mask), list(mask.shape))], shape)
    rows = query.at(2)
    kept = [block for block in value.blocks if 2 not in block.dims]
    if rows is not None and not any(2 in block.dims for block in kept):
        kept.append(Block.line(2, rows))
    return Labels(tuple(kept))
