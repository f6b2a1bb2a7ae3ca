"""Which positions are one channel, which must go together, and which must stay: three relations over numbered atoms.

An *atom* is one position along one axis of a layer or a bare parameter. Two atoms are the *same* channel when an
operator adds, scales or reads one with the other; they are *tied* when one cannot leave without the other although
they are different channels (the groups of a grouped convolution, the rows of an attention head); an atom is *fixed*
when its size is not ours to change. All three are only noted while the network runs and solved once at the end, as
connected components.

Splits. `view(..., heads, head_dim)` lays one axis out over two. What can be removed then is whole heads or one
position of every head, never a ragged set. Which of the dimensions *carries* the channels is settled at the end, when
it is known how each was used: not one that is indexed or meets a fixed size, rather heads (a batch dimension of a
matrix product) than what a product of activations sums over, rather the longer one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Atoms = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Split:
    """One axis laid out over several dimensions.

    Args:
        atoms: The atoms by position, one dimension each.
        along: For each dimension one stand-in atom a position: gone when all atoms at that position are.
    """

    atoms: Atoms
    along: tuple[Atoms, ...]


@dataclass(frozen=True, eq=False)
class Solved:
    """The relations as labels.

    Args:
        same: Label of the channel of each atom.
        tied: Label of the unit of removal of each atom; atoms of one channel share it.
        fixed: Why the atoms of a unit must stay, by its label.
        heads: Whether the unit is one position of a batch dimension of a matrix product, by its label.
        contracted: Whether a product of two activations sums over the unit, by its label.
    """

    same: Atoms
    tied: Atoms
    fixed: dict[int, str]
    heads: NDArray[np.bool_]
    contracted: NDArray[np.bool_]


class Ledger:
    """Takes down relations between atoms.

    Attributes:
        size: Number of atoms so far.
    """

    def __init__(self) -> None:
        self.size = 0
        self._same: list[tuple[Atoms, Atoms]] = []
        self._tied: list[tuple[Atoms, Atoms]] = []
        self._fixed: list[tuple[Atoms, str]] = []
        self._heads: list[Atoms] = []
        self._contracted: list[Atoms] = []
        self._splits: list[Split] = []

    def new(self, number: int) -> Atoms:
        """Return so many new atoms."""
        atoms = np.arange(self.size, self.size + number, dtype=np.int64)
        self.size += number
        return atoms

    def same(self, one: Atoms, other: Atoms) -> None:
        """Note that atoms are the same channels, position by position."""
        if one is not other:
            self._same.append((one.ravel(), other.ravel()))

    def tie(self, one: Atoms, other: Atoms) -> None:
        """Note that atoms go together, position by position."""
        if one is not other:
            self._tied.append((one.ravel(), other.ravel()))

    def fix(self, atoms: Atoms, reason: str) -> None:
        """Note that atoms must stay; the first reason noted is the one given."""
        self._fixed.append((atoms.ravel(), reason))

    def heads(self, atoms: Atoms) -> None:
        """Note that a matrix product is taken for each of these positions."""
        self._heads.append(atoms.ravel())

    def contract(self, atoms: Atoms) -> None:
        """Note that a product of two activations sums over these positions."""
        self._contracted.append(atoms.ravel())

    def split(self, atoms: Atoms) -> tuple[Atoms, ...]:
        """Lay atoms out over dimensions; returns the stand-ins along each."""
        along = tuple(self.new(size) for size in atoms.shape)
        self._splits.append(Split(atoms, along))
        return along

    def merged(self, atoms: Atoms, along: tuple[Atoms, ...]) -> None:
        """Note that atoms are what stand-ins along several dimensions came to when these were made one."""
        self._splits.append(Split(atoms, along))

    def solve(self, *, head_dim: bool = False) -> Solved:
        """Return the components.

        Args:
            head_dim: An attention carries its channels along the positions that it sums over, not along its heads.
        """
        equal = [*self._same, self._alike()]
        plain = self._components([*equal, *self._tied])
        is_fixed = self._spread(plain, _marked(plain, [atoms for atoms, _ in self._fixed]))
        is_head, contracted = _marked(plain, self._heads), _marked(plain, self._contracted)
        sharing = Counter(int(plain[along[0]]) for split in self._splits for along in split.along if len(along))

        def rank(along: Atoms) -> tuple[bool, bool, bool, int, int]:
            # Splits that share a dimension rank it alike, so that they come to the same choice.
            label = plain[along]
            batch, summed = bool(is_head[label].any()), bool(contracted[label].any())
            allowed = not is_fixed[label].any() and not (batch if head_dim else summed)
            return allowed, summed if head_dim else batch, not summed, sharing[int(label[0])], len(along)

        ties, fixes = list(self._tied), list(self._fixed)
        for split in self._splits:
            ranks = [rank(along) for along in split.along]
            carrier = max(range(len(ranks)), key=lambda dim: (ranks[dim], dim))
            if not ranks[carrier][0]:
                fixes.append((split.atoms.ravel(), "it is laid out over dimensions none of which can shrink"))
            for dim, along in enumerate(split.along):
                if dim == carrier:
                    rows = np.moveaxis(split.atoms, dim, 0).reshape(len(along), -1)
                    ties.append((np.repeat(along, rows.shape[1]), rows.ravel()))
                else:
                    fixes.append((along, "it is laid out over dimensions another of which carries the channels"))
        same = self._components(equal)
        tied = self._components([*equal, *ties])
        reasons: dict[int, str] = {}
        for atoms, reason in fixes:
            for label in np.unique(tied[atoms]):
                reasons.setdefault(int(label), reason)
        return Solved(same, tied, reasons, _marked(tied, self._heads), _marked(tied, self._contracted))

    def _alike(self) -> tuple[Atoms, Atoms]:
        """Return in pairs the stand-ins that stand for the same atoms: heads laid out twice are the same heads.

        Told by sums of random numbers, one for every channel, over the atoms that each stands for.
        """
        channel = self._components(self._same)
        drawn = np.random.default_rng(0).integers(2**63, size=self.size, dtype=np.uint64)
        known = np.zeros(self.size, dtype=bool)
        every, sums = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
        for split in self._splits:
            numbers = drawn[channel[split.atoms]]
            for dim, along in enumerate(split.along):
                summed = np.moveaxis(numbers, dim, 0).reshape(len(along), -1).sum(axis=1)
                fresh = ~known[channel[along]]
                drawn[channel[along][fresh]] = summed[fresh]
                known[channel[along]] = True
                every.append(along)
                sums.append(summed)
        order = np.argsort(np.concatenate(sums), kind="stable")
        atoms, total = np.concatenate(every)[order], np.concatenate(sums)[order]
        equal = total[1:] == total[:-1]
        return atoms[:-1][equal], atoms[1:][equal]

    def _spread(self, plain: Atoms, is_fixed: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Mark also the stand-ins along the dimensions of what must stay: none of these can carry anything else."""
        known = -1
        while known != (known := int(is_fixed.sum())):
            for split in self._splits:
                if is_fixed[plain[split.atoms]].any():
                    for along in split.along:
                        is_fixed[plain[along]] = True
        return is_fixed

    def _components(self, edges: list[tuple[Atoms, Atoms]]) -> Atoms:
        one = np.concatenate([edge[0] for edge in edges] or [np.empty(0, np.int64)])
        other = np.concatenate([edge[1] for edge in edges] or [np.empty(0, np.int64)])
        graph = coo_array((np.ones(len(one), np.int8), (one, other)), shape=(self.size, self.size))
        labels: Atoms = connected_components(graph, directed=False)[1].astype(np.int64)
        return labels


def _marked(labels: Atoms, marks: list[Atoms]) -> NDArray[np.bool_]:
    """Return for each label whether one of its atoms is marked."""
    result = np.zeros(int(labels.max(initial=-1)) + 1, dtype=bool)
    for atoms in marks:
        result[labels[atoms]] = True
    return result
