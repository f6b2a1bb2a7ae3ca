"""Operators that work position by position: what meets is the same channel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from nni_plugin.cost import tensors_in
from nni_plugin.tracing.labels import Block, Labels
from nni_plugin.tracing.operators import rule

if TYPE_CHECKING:
    from nni_plugin.tracing.trace import Trace


@rule(
    "alias", "clone", "contiguous", "detach", "detach_", "_to_copy", "lift_fresh", "lift_fresh_copy", "native_dropout",
    "masked_fill", "masked_fill_", "where", "bernoulli", "bernoulli_", "relu", "relu_", "_reshape_copy", "dropout",
    "hardtanh", "hardtanh_", "hardswish", "hardswish_", "hardsigmoid", "hardsigmoid_", "leaky_relu", "leaky_relu_",
    "elu", "elu_", "silu", "silu_", "mish", "mish_", "gelu", "gelu_", "softplus", "softplus_", "clamp_", "prelu",
    "_prelu_kernel", "threshold", "threshold_", "rrelu_with_noise", "log_sigmoid_forward",
)  # fmt: skip
def pointwise(trace: Trace, operator: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> Labels:
    """Broadcast all inputs and match them."""
    inputs = [tensor for tensor in tensors_in([*args, *kwargs.values()]) if tensor.dim() > 0]
    return matched(trace, [(trace.labels(tensor), list(tensor.shape)) for tensor in inputs], list(outputs[0].shape))


def matched(trace: Trace, inputs: list[tuple[Labels, list[int]]], shape: list[int]) -> Labels:
    """Match tensors that are broadcast to one shape, and return the labels of the result."""
    aligned = []
    for labels, size in inputs:
        shift = len(shape) - len(size)
        moved = labels.moved(range(shift, len(shape)))
        wide = {dim for dim in range(len(shape)) if dim < shift or (size[dim - shift] == 1 and shape[dim] > 1)}
        aligned.append((moved, wide))
    blocks: list[Block] = []
    taken: set[int] = set()
    for labels, _ in aligned:
        # The fullest description of each dimension wins: a block over several comes before one over a part of it.
        for block in sorted(labels.blocks, key=lambda block: -len(block.dims)):
            fresh = [block] if not taken & set(block.dims) else [b for b in _lines(block) if b.dims[0] not in taken]
            blocks += fresh
            taken |= set(block.dims)
    for labels, wide in aligned:
        for block in blocks:
            if block in labels.blocks:
                continue
            other = labels.block(block.dims[0])
            if other is not None and other.dims == block.dims and not wide & set(block.dims):
                trace.ledger.same(block.atoms, other.atoms)
                if len(block.dims) == 1:
                    continue
            for dim, along in zip(block.dims, block.along, strict=True):
                if dim in wide or dim in labels.free:
                    continue
                theirs = labels.at(dim)
                if theirs is None:
                    trace.fix(along, "meets a fixed size")
                else:
                    trace.ledger.same(along, theirs)
    free = {
        dim
        for dim in range(len(shape))
        if dim not in taken
        and any(dim in labels.free for labels, _ in aligned)
        and all(dim in labels.free or dim in wide for labels, wide in aligned)
    }
    return Labels(tuple(blocks), frozenset(free))


def _lines(block: Block) -> list[Block]:
    """Return a block dimension by dimension."""
    return [Block.line(dim, along) for dim, along in zip(block.dims, block.along, strict=True)]


@rule("as_strided", "as_strided_")
def restrided(trace: Trace, operator: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> Labels:
    """Change the strides alone, as pooling does for the sake of memory formats; any other use is not followed."""
    labels = trace.labels(args[0])
    if list(args[1]) == list(outputs[0].shape) == trace.shape_before:
        return labels
    for block in labels.blocks:
        trace.fix(block.atoms, "is laid out anew by strides")
    return Labels()


@rule("copy_")
def copied(trace: Trace, operator: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> Labels:
    """Match a tensor with what is written into it."""
    inputs = [tensor for tensor in args[:2] if tensor.dim() > 0]
    return matched(trace, [(trace.labels(tensor), list(tensor.shape)) for tensor in inputs], list(outputs[0].shape))


@rule(
    "zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like",
    "full_like", "empty_like", "fill_", "zero_", "scalar_tensor", "rand", "randn", "rand_like", "randn_like",
)  # fmt: skip
def constant(trace: Trace, operator: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> Labels:
    """Return that every dimension follows what it meets: there is nothing in it to tell positions apart."""
    return Labels(free=frozenset(range(outputs[0].dim())))


@rule("arange", "linspace", "eye", "tril_indices", "triu_indices")
def numbered(trace: Trace, operator: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> Labels:
    """Return nothing: positions are told apart, and their number is fixed."""
    return Labels()
