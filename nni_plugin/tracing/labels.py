"""Which channel each position of an activation holds: atoms over its dimensions, and how reshaping moves them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nni_plugin.tracing.ledger import Atoms, Ledger

MAX_POSITIONS = 20_000_000
"""Of a reshaped axis; beyond it an axis is fixed rather than followed."""


@dataclass(frozen=True, eq=False)
class Block:
    """Atoms over one or several dimensions of a tensor.

    Args:
        dims: The dimensions, ascending.
        atoms: One atom a position, in the shape of these dimensions.
        along: For each dimension the atoms that stand for its positions; `(atoms,)` over one dimension.
    """

    dims: tuple[int, ...]
    atoms: Atoms
    along: tuple[Atoms, ...]

    @classmethod
    def line(cls, dim: int, atoms: Atoms) -> Block:
        """Return a block over one dimension."""
        return cls((dim,), atoms, (atoms,))

    def moved(self, target: Sequence[int]) -> Block:
        """Return the block with each dimension `d` of its tensor become `target[d]`."""
        dims = [target[dim] for dim in self.dims]
        order = sorted(range(len(dims)), key=dims.__getitem__)
        return Block(tuple(dims[i] for i in order), self.atoms.transpose(order), tuple(self.along[i] for i in order))

    def taken(self, dim: int, positions: Atoms) -> Block:
        """Return the block at some positions of one of its dimensions."""
        at = self.dims.index(dim)
        if len(self.dims) == 1:
            return Block.line(dim, self.atoms[positions])
        along = tuple(a[positions] if i == at else a for i, a in enumerate(self.along))
        return Block(self.dims, self.atoms.take(positions, axis=at), along)

    def selected(self, dim: int, position: int) -> Block | None:
        """Return the block at one position of a dimension, over the others; None where there are none."""
        rest = [i for i, d in enumerate(self.dims) if d != dim]
        if not rest:
            return None
        if len(rest) == 1:
            return Block.line(self.dims[rest[0]], self.along[rest[0]])
        atoms = self.atoms.take([position], axis=self.dims.index(dim)).squeeze(self.dims.index(dim))
        return Block(tuple(self.dims[i] for i in rest), atoms, tuple(self.along[i] for i in rest))

    def without(self, dim: int) -> list[Block]:
        """Return what is left to say of the other dimensions once one is summed over."""
        return [Block.line(d, along) for d, along in zip(self.dims, self.along, strict=True) if d != dim]


@dataclass(frozen=True, eq=False)
class Labels:
    """What is known of a tensor's dimensions.

    Args:
        blocks: Channels, over dimensions that no two blocks share. A dimension in none is of fixed size.
        free: Dimensions along which the tensor is constant by construction; they follow whatever they meet.
    """

    blocks: tuple[Block, ...] = ()
    free: frozenset[int] = frozenset()

    def block(self, dim: int) -> Block | None:
        """Return the block over a dimension."""
        return next((block for block in self.blocks if dim in block.dims), None)

    def at(self, dim: int) -> Atoms | None:
        """Return the atoms that stand for the positions of a dimension; None where there are none."""
        block = self.block(dim)
        return None if block is None else block.along[block.dims.index(dim)]

    def moved(self, target: Sequence[int]) -> Labels:
        """Return the labels with each dimension `d` become `target[d]`."""
        return Labels(tuple(b.moved(target) for b in self.blocks), frozenset(target[d] for d in self.free))


NONE = Labels()


def reshaped(ledger: Ledger, labels: Labels, old: Sequence[int], new: Sequence[int]) -> Labels:
    """Return the labels of a tensor of shape `old` seen in shape `new`."""
    if 0 in old:
        return NONE  # nothing is in it
    groups = _matched(old, new)
    group_of = {dim: group for group in groups for dim in group[0]}
    blocks = []
    for block in _joined(ledger, labels.blocks, groups):
        moved = _reshaped_block(ledger, block, old, new, [group_of[dim] for dim in block.dims])
        blocks += [] if moved is None else [moved]
    free = {
        dim
        for before, after in groups
        if any(old[d] > 1 for d in before) and all(d in labels.free or old[d] == 1 for d in before)
        for dim in after
    }
    return Labels(tuple(blocks), frozenset(free))


def _matched(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Return the smallest runs of dimensions with equal numbers of positions, before and after."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        before, after, have, want = [], [], 1, 1
        if i < len(old):
            before, have, i = [i], old[i], i + 1
        if j < len(new):
            after, want, j = [j], new[j], j + 1
        while have != want:
            if have < want:
                before, have, i = [*before, i], have * old[i], i + 1
            else:
                after, want, j = [*after, j], want * new[j], j + 1
        groups.append((before, after))
    return groups


def _joined(ledger: Ledger, blocks: Sequence[Block], groups: Sequence[tuple[list[int], list[int]]]) -> list[Block]:
    """Return blocks such that no two end up in one dimension; those that would become one that is split."""
    run_of = {dim: run for run, (before, _) in enumerate(groups) for dim in before}
    joined: list[Block] = []
    for block in blocks:
        runs = {run_of[dim] for dim in block.dims}
        near = [other for other in joined if runs & {run_of[dim] for dim in other.dims}]
        joined = [other for other in joined if other not in near]
        whole = _split_over(ledger, [*near, block]) if near else block
        joined += [] if whole is None else [whole]
    return joined


def _split_over(ledger: Ledger, blocks: Sequence[Block]) -> Block | None:
    """Return a block over the dimensions of several: positions of their own, which go as those along a dimension do."""
    along = {dim: atoms for block in blocks for dim, atoms in zip(block.dims, block.along, strict=True)}
    dims = sorted(along)
    shape = [len(along[dim]) for dim in dims]
    if np.prod(shape, dtype=np.int64) > MAX_POSITIONS:
        for atoms in along.values():
            ledger.fix(atoms, f"a reshape lays it out over more than {MAX_POSITIONS} positions")
        return None
    atoms = ledger.new(int(np.prod(shape, dtype=np.int64))).reshape(shape)
    stand_ins = ledger.split(atoms)
    for one, dim in zip(stand_ins, dims, strict=True):
        ledger.same(one, along[dim])
    return Block(tuple(dims), atoms, stand_ins)


def _reshaped_block(
    ledger: Ledger,
    block: Block,
    old: Sequence[int],
    new: Sequence[int],
    groups: Sequence[tuple[list[int], list[int]]],
) -> Block | None:
    dims = sorted({dim for _, after in groups for dim in after})
    shape = [new[dim] for dim in dims]
    if np.prod(shape, dtype=np.int64) > MAX_POSITIONS:
        ledger.fix(block.atoms, f"a reshape lays it out over more than {MAX_POSITIONS} positions")
        return None
    places, depends = [], []
    for dim, (before, after) in zip(block.dims, groups, strict=True):
        sizes = [new[d] for d in after]
        stride = int(np.prod([old[d] for d in before if d > dim], dtype=np.int64))
        place = (np.arange(int(np.prod(sizes, dtype=np.int64))) // stride) % old[dim]
        whole = place.reshape([new[d] if d in after else 1 for d in dims])
        places.append(whole)
        depends.append({d for i, d in enumerate(dims) if whole.shape[i] > 1 and _varies(whole, i)})
    atoms = np.broadcast_to(block.atoms[tuple(places)], shape)
    kept = [i for i in range(len(dims)) if shape[i] > 1 and _varies(atoms, i)]
    atoms = atoms[tuple(slice(None) if i in kept else 0 for i in range(len(dims)))]
    kept_dims = tuple(dims[i] for i in kept)
    if len(kept_dims) == 0:
        return None
    if len(kept_dims) == 1:
        return Block.line(kept_dims[0], atoms)
    sources = [[k for k, on in enumerate(depends) if dim in on] for dim in kept_dims]
    if all(len(source) == 1 and len(depends[source[0]] & set(kept_dims)) == 1 for source in sources):
        along = []
        for i, source in zip(kept, sources, strict=True):
            line = places[source[0]][tuple(slice(None) if k == i else 0 for k in range(len(dims)))]
            along.append(block.along[source[0]][line])
        return Block(kept_dims, atoms, tuple(along))
    stand_ins = ledger.split(atoms)
    for one, source, dim in zip(stand_ins, sources, kept_dims, strict=True):
        # Dimensions that are now one, which holds nothing else: each of its positions is one of each of theirs.
        if len(source) > 1 and all(depends[k] == {dim} for k in source):
            sizes = [block.atoms.shape[k] for k in source]
            if len(one) == np.prod(sizes):
                at = tuple(places[k].ravel() for k in source)
                laid_out = np.empty(sizes, np.int64)
                laid_out[at] = one
                ledger.merged(laid_out, tuple(block.along[k] for k in source))
    return Block(kept_dims, atoms, stand_ins)


def _varies(values: Atoms, axis: int) -> bool:
    return bool((values != values.take([0], axis=axis)).any())
