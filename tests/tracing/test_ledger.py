"""Relations between atoms: same, tied, fixed, and which dimension of a split carries the channels."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nni_plugin.tracing.ledger import Ledger, Solved


def units(solved: Solved, atoms: np.ndarray) -> list[int]:
    """Return the units of atoms, numbered in order of appearance."""
    return list(np.unique(solved.tied[atoms.ravel()], return_inverse=True)[1])


def test_same_is_an_equivalence_and_implies_tied() -> None:
    ledger = Ledger()
    a, b, c = ledger.new(3), ledger.new(3), ledger.new(3)
    ledger.same(a, b)
    ledger.same(b, c[::-1])
    ledger.tie(a[:1], a[1:2])
    solved = ledger.solve()
    assert (solved.same[a] == solved.same[c[::-1]]).all()
    assert len(set(solved.same[a])) == 3
    assert len(set(solved.tied[a])) == 2
    assert solved.tied[a[0]] == solved.tied[a[1]] != solved.tied[a[2]]


def test_what_must_stay_keeps_the_first_reason() -> None:
    ledger = Ledger()
    a, b = ledger.new(2), ledger.new(2)
    ledger.same(a, b)
    ledger.fix(b[:1], "one")
    ledger.fix(a, "two")
    solved = ledger.solve()
    assert solved.fixed == {int(solved.tied[a[0]]): "one", int(solved.tied[a[1]]): "two"}


@given(st.integers(1, 12), st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11), st.booleans()), max_size=15))
def test_components_are_those_of_a_walk(size: int, pairs: list[tuple[int, int, bool]]) -> None:
    ledger = Ledger()
    atoms = ledger.new(size)
    same, tied = {i: {i} for i in range(size)}, {i: {i} for i in range(size)}
    for one, other, is_same in pairs:
        if max(one, other) >= size:
            continue
        (ledger.same if is_same else ledger.tie)(atoms[[one]], atoms[[other]])
        for sets in (same, tied) if is_same else (tied,):
            whole = sets[one] | sets[other]
            for i in whole:
                sets[i] = whole
    solved = ledger.solve()
    for i in range(size):
        for j in range(size):
            assert (solved.same[i] == solved.same[j]) == (j in same[i])
            assert (solved.tied[i] == solved.tied[j]) == (j in tied[i])


def test_the_longer_dimension_of_a_split_carries() -> None:
    ledger = Ledger()
    atoms = ledger.new(6)
    ledger.split(atoms.reshape(2, 3))
    solved = ledger.solve()
    assert units(solved, atoms) == [0, 1, 2, 0, 1, 2]
    assert not any(int(unit) in solved.fixed for unit in solved.tied[atoms])


def test_a_dimension_that_is_fixed_does_not_carry() -> None:
    ledger = Ledger()
    atoms = ledger.new(6)
    rows, columns = ledger.split(atoms.reshape(2, 3))
    ledger.fix(columns[:1], "it is indexed")
    solved = ledger.solve()
    assert units(solved, atoms) == [0, 0, 0, 1, 1, 1]
    assert not any(int(unit) in solved.fixed for unit in solved.tied[atoms])
    assert all(int(unit) in solved.fixed for unit in solved.tied[columns])
    assert not any(int(unit) in solved.fixed for unit in solved.tied[rows])


def test_where_no_dimension_can_shrink_all_stays() -> None:
    ledger = Ledger()
    atoms = ledger.new(6)
    for along in ledger.split(atoms.reshape(2, 3)):
        ledger.fix(along, "no")
    solved = ledger.solve()
    assert all("none of which" in solved.fixed[int(unit)] or solved.fixed[int(unit)] == "no" for unit in solved.tied)


def attention() -> tuple[Ledger, np.ndarray, tuple[np.ndarray, ...]]:
    """Return queries of two heads of four positions, as an attention uses them."""
    ledger = Ledger()
    atoms = ledger.new(8)
    along = ledger.split(atoms.reshape(2, 4))
    ledger.heads(along[0])
    ledger.contract(along[1])
    return ledger, atoms, along


def test_heads_come_before_their_positions() -> None:
    ledger, atoms, (heads, positions) = attention()
    solved = ledger.solve()
    assert units(solved, atoms) == [0] * 4 + [1] * 4
    assert solved.heads[solved.tied[heads]].all()
    assert solved.contracted[solved.tied[positions]].all()
    assert not solved.contracted[solved.tied[heads]].any()


def test_heads_come_before_longer_dimensions() -> None:
    ledger = Ledger()
    atoms = ledger.new(10)
    heads, _ = ledger.split(atoms.reshape(2, 5))
    ledger.heads(heads)
    assert units(ledger.solve(), atoms) == [0] * 5 + [1] * 5


def test_positions_come_first_where_they_are_asked_for() -> None:
    ledger, atoms, _ = attention()
    assert units(ledger.solve(head_dim=True), atoms) == [0, 1, 2, 3] * 2


def test_positions_that_a_product_sums_over_do_not_carry_unasked() -> None:
    ledger, atoms, (heads, _) = attention()
    ledger.fix(heads, "no")
    solved = ledger.solve()
    assert all(int(unit) in solved.fixed for unit in solved.tied[atoms])


def test_splits_that_share_a_dimension_carry_alike() -> None:
    # The heads of values are as many as those of queries, though their positions are more and would win alone.
    ledger, queries, (heads, _) = attention()
    values = ledger.new(10)
    value_heads, _ = ledger.split(values.reshape(2, 5))
    ledger.same(heads, value_heads)
    solved = ledger.solve()
    assert units(solved, np.concatenate([queries, values])) == [0] * 4 + [1] * 4 + [0] * 5 + [1] * 5


@pytest.mark.parametrize("between", ["flat", "other"])
def test_a_dimension_laid_out_twice_is_one_dimension(between: str) -> None:
    """Three dimensions, two of them merged and taken apart again: what is known of one is known of its copy."""
    ledger = Ledger()
    atoms = ledger.new(24).reshape(2, 3, 4)
    first = ledger.split(atoms)
    if between == "flat":
        merged, last = ledger.split(atoms.reshape(6, 4))
        outer, inner = ledger.split(merged.reshape(2, 3))
    else:
        outer, merged = ledger.split(atoms.reshape(2, 12))
        inner, last = ledger.split(merged.reshape(3, 4))
    solved = ledger.solve()
    for one, other in zip(first, (outer, inner, last), strict=True):
        assert (solved.same[one] == solved.same[other]).all()


def test_different_parts_of_a_split_are_not_one() -> None:
    ledger = Ledger()
    atoms = ledger.new(24).reshape(2, 3, 4)
    whole, part = ledger.split(atoms)[0], ledger.split(atoms[:, :, :2])[0]
    solved = ledger.solve()
    assert (solved.same[whole] != solved.same[part]).all()


def test_along_what_must_stay_nothing_carries() -> None:
    # The stand-ins of fixed atoms are met by a split that could go either way.
    ledger = Ledger()
    fixed, atoms = ledger.new(12), ledger.new(8)
    ledger.fix(fixed, "given")
    long, _ = ledger.split(fixed.reshape(4, 3))
    rows, columns = ledger.split(atoms.reshape(2, 4))
    ledger.same(columns, long)
    solved = ledger.solve()
    assert units(solved, atoms) == [0] * 4 + [1] * 4
    assert not any(int(unit) in solved.fixed for unit in solved.tied[rows])
