"""Operators that move positions: views, permutations, parts and concatenations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from nni_plugin.tracing.elementwise import matched
from nni_plugin.tracing.labels import NONE, Block, Labels, reshaped
from nni_plugin.tracing.ledger import Atoms
from nni_plugin.tracing.operators import rule

if TYPE_CHECKING:
    from nni_plugin.tracing.trace import Trace


def _note_sizes(trace: Trace, before: Labels, after: Labels) -> None:
    known = [along for block in before.blocks for along in block.along]
    for block in after.blocks:
        for along in block.along:
            trace.note_size(along, passed_on=any(np.array_equal(along, other) for other in known))


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze", "squeeze", "squeeze_", "unsqueeze_")
def view(trace: Trace, operator: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> Labels:
    """Lay dimensions out anew."""
    if outputs[0].dtype != args[0].dtype:
        for block in trace.labels(args[0]).blocks:
            trace.fix(block.atoms, "is seen as another type")
        return NONE
    labels = reshaped(trace.ledger, trace.labels(args[0]), trace.shape_before, list(outputs[0].shape))
    if "squeeze" not in str(operator):
        _note_sizes(trace, trace.labels(args[0]), labels)
    return labels


@rule("permute", "transpose", "t", "transpose_", "movedim", "numpy_T")
def permuted(trace: Trace, operator: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> Labels:
    """Reorder dimensions."""
    rank, name = args[0].dim(), str(operator)
    order = list(range(rank))
    if ".permute" in name:
        order = [dim % rank for dim in args[1]]
    elif ".transpose" in name:
        a, b = args[1] % rank, args[2] % rank
        order[a], order[b] = order[b], order[a]
    else:
        order.reverse()
    target = [0] * rank
    for new, old in enumerate(order):
        target[old] = new
    return trace.labels(args[0]).moved(target)


@rule("expand")
def expanded(trace: Trace, operator: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> Labels:
    """Repeat dimensions of one position; the tensor is constant along them."""
    before, after = list(args[0].shape), list(outputs[0].shape)
    shift = len(after) - len(before)
    labels = trace.labels(args[0]).moved(range(shift, len(after)))
    grown = {dim for dim in range(len(after)) if after[dim] > 1 and (dim < shift or before[dim - shift] == 1)}
    _note_sizes(trace, labels, labels)
    return Labels(labels.blocks, labels.free | grown)


@rule("repeat")
def repeated(trace: Trace, operator: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> Labels:
    """Repeat dimensions; of channels each copy holds the same ones."""
    before, times = list(args[0].shape), list(args[1])
    shift = len(times) - len(before)
    labels = trace.labels(args[0]).moved(range(shift, len(times)))
    for dim in range(shift, len(times)):
        if times[dim] > 1 and labels.block(dim) is not None:
            labels = _at(labels, dim, np.tile(np.arange(before[dim - shift]), times[dim]))
    grown = {dim for dim, time in enumerate(times) if time > 1 and (dim < shift or before[dim - shift] == 1)}
    return Labels(labels.blocks, labels.free | grown)


def _at(labels: Labels, dim: int, positions: Atoms) -> Labels:
    """Return labels at some positions of a dimension."""
    if len(positions) == 1:
        return _selected(labels, dim, int(positions[0]))
    return Labels(tuple(b.taken(dim, positions) if dim in b.dims else b for b in labels.blocks), labels.free)


def _selected(labels: Labels, dim: int, position: int) -> Labels:
    """Return labels at one position of a dimension, which remains with nothing to say."""
    blocks = [b if dim not in b.dims else b.selected(dim, position) for b in labels.blocks]
    return Labels(tuple(block for block in blocks if block is not None), labels.free)


def _dropped(labels: Labels, dim: int, rank: int) -> Labels:
    """Return labels without a dimension that has nothing to say."""
    rest = Labels(labels.blocks, labels.free - {dim})
    return rest.moved([d if d < dim else d - 1 for d in range(rank)])


@rule("slice")
def sliced(trace: Trace, operator: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> Labels:
    """Take a range of positions; where it begins and ends are sizes."""
    dim = (args[1] if len(args) > 1 else 0) % args[0].dim()
    size, labels = args[0].shape[dim], trace.labels(args[0])
    start = args[2] if len(args) > 2 and args[2] is not None else 0
    end = args[3] if len(args) > 3 and args[3] is not None else size
    step = args[4] if len(args) > 4 else 1
    positions = np.arange(size)[start:end:step]
    along = labels.at(dim)
    if along is not None and len(positions) < size:
        for edge in (start, end):
            if 0 < abs(edge) < size:
                trace.note_size(along[:edge] if edge > 0 else along[edge:])
        if step != 1:
            _tie_parts(trace, [along[offset::step] for offset in range(step)])
    return _at(labels, dim, positions)


def _tie_parts(trace: Trace, parts: list[Atoms]) -> None:
    """Let equal parts shrink alike; unequal ones must stay."""
    if len({len(part) for part in parts}) > 1:
        for part in parts:
            trace.fix(part, "is split into unequal parts")
        return
    for part in parts[1:]:
        trace.ledger.tie(parts[0], part)


@rule("split", "chunk", "split_with_sizes", "unsafe_split", "unsafe_chunk")
def split(trace: Trace, operator: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> Iterable[Labels]:
    """Take ranges one behind the other; equal ones shrink alike, as `chunk` will have them."""
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % args[0].dim()
    labels, start = trace.labels(args[0]), 0
    along, parts, result = labels.at(dim), [], []
    for output in outputs:
        stop = start + output.shape[dim]
        if along is not None:
            parts.append(along[start:stop])
            trace.note_size(parts[-1])
        result.append(_at(labels, dim, np.arange(start, stop)))
        start = stop
    trace.note_size(along)
    if parts and len({len(part) for part in parts}) == 1:
        _tie_parts(trace, parts)
    return result


@rule("glu")
def gated(trace: Trace, operator: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> Labels:
    """Multiply one half of a dimension with the other."""
    dim = (args[1] if len(args) > 1 else -1) % args[0].dim()
    labels, shape = trace.labels(args[0]), list(outputs[0].shape)
    halves = (np.arange(shape[dim]), np.arange(shape[dim]) + shape[dim])
    return matched(trace, [(_at(labels, dim, half), shape) for half in halves], shape)


@rule("unbind")
def unbound(trace: Trace, operator: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> Iterable[Labels]:
    """Take every position of a dimension for itself."""
    dim = (args[1] if len(args) > 1 else 0) % args[0].dim()
    return [_one(trace, args[0], dim, position) for position in range(len(outputs))]


@rule("select")
def selected(trace: Trace, operator: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> Labels:
    """Take one position of a dimension."""
    dim = args[1] % args[0].dim()
    return _one(trace, args[0], dim, args[2] % args[0].shape[dim])


def _one(trace: Trace, tensor: Tensor, dim: int, position: int) -> Labels:
    labels = trace.labels(tensor)
    trace.fix(labels.at(dim), "is indexed one by one")
    return _dropped(_selected(labels, dim, position), dim, tensor.dim())


@rule("index_select")
def index_selected(trace: Trace, operator: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> Labels:
    """Take positions by a tensor: what it counts must stay."""
    dim, labels = args[1] % max(args[0].dim(), 1), trace.labels(args[0])
    trace.fix(labels.at(dim), "is indexed by a tensor")
    return _at(labels, dim, np.atleast_1d(args[2].cpu().numpy()))


@rule("index")
def indexed(trace: Trace, operator: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> Labels:
    """Take positions of some dimensions by tensors that lie next to each other; the other dimensions move along."""
    labels, index = trace.labels(args[0]), list(args[1]) + [None] * (args[0].dim() - len(args[1]))
    by = [dim for dim, one in enumerate(index) if one is not None]
    for block in [block for dim in by for block in trace.labels(index[dim]).blocks]:
        trace.fix(block.atoms, "says which positions are taken")
    adjacent = by == list(range(by[0], by[-1] + 1)) and all(index[dim].dtype.is_signed for dim in by)
    keep = []
    for block in labels.blocks:
        touched = not adjacent or any(dim in block.dims for dim in by)
        if touched:
            trace.fix(block.atoms, "is indexed by a tensor")
            for along in block.along:
                trace.fix(along, "is indexed by a tensor")
        else:
            keep.append(block)
    if not keep:
        return NONE
    grown = max(index[dim].dim() for dim in by) - len(by)
    target = [dim if dim < by[0] else dim + grown for dim in range(args[0].dim())]
    return Labels(tuple(block.moved(target) for block in keep))


@rule("embedding")
def looked_up(trace: Trace, operator: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> Labels:
    """Take rows of a table."""
    labels = trace.labels(args[0])
    trace.fix(labels.at(0), "is indexed by a tensor")
    for block in trace.labels(args[1]).blocks:
        trace.fix(block.atoms, "says which positions are taken")
    along = labels.at(1)
    return NONE if along is None else Labels((Block.line(outputs[0].dim() - 1, along),))


@rule("flip", "roll")
def turned(trace: Trace, operator: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> Labels:
    """Turn positions around: channels keep whom they belong to. Rolled ones would come to others once some are gone."""
    labels, rank = trace.labels(args[0]), args[0].dim()
    dims = args[1] if ".flip" in str(operator) else (args[2] if len(args) > 2 else [])
    if ".roll" in str(operator) and not dims:
        for block in labels.blocks:
            trace.fix(block.atoms, "is rolled over all dimensions as one")
        return NONE
    for at, dim in enumerate(dims):
        if labels.block(dim % rank) is not None:
            positions = np.arange(args[0].shape[dim])
            moved = positions[::-1]
            if ".roll" in str(operator):
                moved = np.roll(positions, args[1][at])
                trace.fix(labels.at(dim % rank), "is rolled")
            labels = _at(labels, dim % rank, moved)
    return labels


@rule("cat", "concat")
def concatenated(trace: Trace, operator: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> Labels:
    """Put tensors one behind the other; along other dimensions they meet position by position."""
    tensors = [tensor for tensor in args[0] if tensor.dim() == outputs[0].dim()]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % outputs[0].dim()
    parts = [trace.labels(tensor) for tensor in tensors]
    lines = [part.at(dim) for part in parts]
    rest = [
        Labels(
            tuple(b for block in part.blocks for b in (block.without(dim) if dim in block.dims else [block])),
            part.free - {dim},
        )
        for part in parts
    ]
    sizes = [[1 if d == dim else size for d, size in enumerate(tensor.shape)] for tensor in tensors]
    shape = [1 if d == dim else size for d, size in enumerate(outputs[0].shape)]
    labels = matched(trace, list(zip(rest, sizes, strict=True)), shape)
    if all(line is None for line in lines):
        return labels
    whole = []
    for line, tensor in zip(lines, tensors, strict=True):
        if line is None:
            line = trace.ledger.new(tensor.shape[dim])
            trace.fix(line, "is concatenated as a fixed size")
        whole.append(line)
    return Labels((*labels.blocks, Block.line(dim, np.concatenate(whole))), labels.free)


@rule("stack")
def stacked(trace: Trace, operator: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> Labels:
    """Put tensors side by side along a new dimension."""
    rank = outputs[0].dim()
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % rank
    target = [d if d < dim else d + 1 for d in range(rank - 1)]
    parts = [trace.labels(tensor).moved(target) for tensor in args[0]]
    described = [sorted(block.dims for block in part.blocks) for part in parts]
    if any(one != described[0] for one in described):
        for part in parts:
            for block in part.blocks:
                trace.fix(block.atoms, "is stacked with a fixed size")
        return NONE
    blocks = []
    for block in parts[0].blocks:
        others = [part.block(block.dims[0]) for part in parts]
        arrays = [other.atoms for other in others if other is not None]
        if all((array == block.atoms).all() for array in arrays):
            blocks.append(block)
            continue
        at = sum(d < dim for d in block.dims)
        atoms = np.stack(arrays, axis=at)
        along = trace.ledger.split(atoms)
        trace.stacked.add(int(along[at][0]))
        blocks.append(Block(tuple(sorted((*block.dims, dim))), atoms, along))
    return Labels(tuple(blocks), frozenset.intersection(*(part.free for part in parts)))


@rule(
    "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
    "replication_pad2d", "replication_pad3d",
)  # fmt: skip
def padded(trace: Trace, operator: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> Labels:
    """Widen dimensions that hold no channels, or shift them where one end loses what the other gains."""
    labels, rank = trace.labels(args[0]), args[0].dim()
    changed = {rank - 1 - at // 2 for at, number in enumerate(args[1]) if number != 0}
    return without_dims(trace, labels, changed, "is padded")


def without_dims(trace: Trace, labels: Labels, changed: set[int], what: str) -> Labels:
    """Return the labels of dimensions that keep their positions; the others hold no channels."""
    kept = []
    for block in labels.blocks:
        if changed & set(block.dims):
            for along in block.along:
                trace.fix(along, what)
        else:
            kept.append(block)
    return Labels(tuple(kept), labels.free - changed)
