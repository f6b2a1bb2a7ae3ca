"""Labels against brute force: a tensor that holds its own positions goes through torch's views, labels through ours."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nni_plugin.tracing.labels import NONE, Block, Labels, reshaped
from nni_plugin.tracing.ledger import Ledger

CASES = settings(derandomize=True, database=None, deadline=None, print_blob=False)
SHAPES = st.lists(st.sampled_from([1, 2, 2, 3, 4]), min_size=1, max_size=4)


@st.composite
def journeys(draw: st.DrawFn) -> tuple[list[int], list[int], list[tuple[str, list[int]]]]:
    """Return a shape, the dimensions that hold channels, and views: `("shape", sizes)` or `("order", dims)`."""
    shape = draw(SHAPES)
    held = draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, max_size=2, unique=True))
    now, steps = list(shape), []
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            order = draw(st.permutations(range(len(now))))
            now, step = [now[dim] for dim in order], ("order", list(order))
        else:
            now = _shape_of(draw, int(np.prod(now)))
            step = ("shape", list(now))
        steps.append(step)
    return shape, held, steps


def _shape_of(draw: st.DrawFn, number: int) -> list[int]:
    """Return some sizes with this product."""
    primes = [p for p in (2, 3) for _ in range(number) if number % p == 0 and not (number := number // p) < 1]
    sizes: list[int] = []
    for prime in draw(st.permutations(primes)):
        if sizes and draw(st.booleans()):
            sizes[-1] *= prime
        else:
            sizes.append(prime)
    for at in draw(st.lists(st.integers(0, len(sizes)), max_size=1)):
        sizes.insert(at, 1)
    return sizes or [1]


def travelled(
    ledger: Ledger, labels: Labels, shape: Sequence[int], steps: Sequence[tuple[str, list[int]]]
) -> tuple[Labels, torch.Tensor]:
    """Return the labels at the end and where each position of the beginning has got to."""
    places = torch.arange(int(np.prod(shape))).reshape(list(shape))
    for kind, what in steps:
        if kind == "order":
            labels = labels.moved([what.index(dim) for dim in range(len(what))])
            places = places.permute(what)
        else:
            labels = reshaped(ledger, labels, list(places.shape), what)
            places = places.reshape(what)
    return labels, places


@settings(CASES, max_examples=400)
@given(journeys())
def test_channels_go_where_torch_takes_them(journey: tuple[list[int], list[int], list[tuple[str, list[int]]]]) -> None:
    shape, held, steps = journey
    ledger = Ledger()
    lines = [Block.line(dim, ledger.new(shape[dim])) for dim in sorted(held) if shape[dim] > 1]
    labels, places = travelled(ledger, Labels(tuple(lines)), shape, steps)
    dims = [dim for block in labels.blocks for dim in block.dims]
    assert len(dims) == len(set(dims))
    for block in labels.blocks:
        assert list(block.atoms.shape) == [places.shape[dim] for dim in block.dims]
        assert [len(along) for along in block.along] == [places.shape[dim] for dim in block.dims]

    solved = ledger.solve()
    start = np.stack(np.unravel_index(places.numpy().ravel(), shape), axis=1)
    for end, begin in zip(itertools.product(*map(range, places.shape)), start, strict=True):
        expected = {int(solved.tied[line.atoms[begin[line.dims[0]]]]) for line in lines}
        got = {int(solved.tied[block.atoms[tuple(end[dim] for dim in block.dims)]]) for block in labels.blocks}
        assert expected - set(solved.fixed) == got - set(solved.fixed)
    # One line always has a dimension that carries it, unless positions of several dimensions run into one another.
    if len(lines) == 1 and all(kind == "order" for kind, _ in steps):
        assert not solved.fixed


@settings(CASES, max_examples=100)
@given(journeys())
def test_a_view_and_back_is_nothing(journey: tuple[list[int], list[int], list[tuple[str, list[int]]]]) -> None:
    """Whatever is laid out over several dimensions and put together again is the line that it was."""
    shape, held, steps = journey
    dim = held[0]
    if shape[dim] == 1:
        return
    ledger = Ledger()
    atoms = ledger.new(shape[dim])
    there = [what for kind, what in steps if kind == "shape"]
    labels, _ = travelled(ledger, Labels((Block.line(dim, atoms),)), shape, [("shape", what) for what in there])
    back = reshaped(ledger, labels, there[-1] if there else shape, shape)
    assert [block.dims for block in back.blocks] == [(dim,)]
    assert (back.blocks[0].atoms == atoms).all()


def test_flattened_maps_repeat_each_channel() -> None:
    ledger = Ledger()
    atoms = ledger.new(3)
    labels = reshaped(ledger, Labels((Block.line(1, atoms),)), [2, 3, 4, 4], [2, 48])
    assert labels.blocks[0].dims == (1,)
    assert (labels.blocks[0].atoms == np.repeat(atoms, 16)).all()


def test_batch_before_channels_tiles_them() -> None:
    # As instance normalisation does.
    ledger = Ledger()
    atoms = ledger.new(3)
    labels = reshaped(ledger, Labels((Block.line(1, atoms),)), [2, 3, 5], [1, 6, 5])
    assert (labels.at(1) == np.tile(atoms, 2)).all()


def test_heads_keep_their_stand_ins_when_windows_are_folded_into_the_batch() -> None:
    ledger = Ledger()
    labels = reshaped(ledger, Labels((Block.line(2, ledger.new(6)),)), [2, 5, 6], [2, 5, 2, 3])
    heads = labels.at(2)
    moved = reshaped(ledger, labels, [2, 5, 2, 3], [10, 2, 3])
    assert heads is not None
    assert (moved.at(1) == heads).all()


def test_two_channel_dimensions_made_one_leave_one_of_them() -> None:
    """Bilinear pooling: rows are one layer's channels, columns another's; one of them may shrink."""
    ledger = Ledger()
    rows, columns = ledger.new(2), ledger.new(3)
    labels = Labels((Block.line(1, rows), Block.line(2, columns)))
    whole = reshaped(ledger, labels, [4, 2, 3], [4, 6]).at(1)
    solved = ledger.solve()
    assert whole is not None
    assert all(int(unit) in solved.fixed for unit in solved.tied[rows])
    assert (solved.tied[whole] == np.tile(solved.tied[columns], 2)).all()
    assert not any(int(unit) in solved.fixed for unit in solved.tied[columns])


def test_what_is_constant_stays_constant() -> None:
    ledger = Ledger()
    labels = reshaped(ledger, Labels(free=frozenset({0, 2})), [4, 2, 6], [4, 2, 2, 3])
    assert labels.free == {0, 2, 3}
    assert reshaped(ledger, labels, [4, 2, 2, 3], [8, 6]).free == {1}


def test_nothing_is_said_of_what_is_empty() -> None:
    ledger = Ledger()
    labels = Labels((Block.line(1, ledger.new(8)),))
    assert reshaped(ledger, labels, [0, 8, 8], [0, 4, 2, 8]) is NONE


def test_parts_of_a_block() -> None:
    ledger = Ledger()
    labels = reshaped(ledger, Labels((Block.line(0, ledger.new(6)),)), [6], [2, 3])
    (block,) = labels.blocks
    taken = block.taken(1, np.array([2, 0]))
    assert (taken.atoms == block.atoms[:, [2, 0]]).all()
    assert (taken.along[0] == block.along[0]).all()
    assert (taken.along[1] == block.along[1][[2, 0]]).all()
    row = block.selected(0, 1)
    assert row is not None
    assert row.dims == (1,)
    assert (row.atoms == block.along[1]).all()
    assert Block.line(0, ledger.new(2)).selected(0, 1) is None
    assert [line.dims for line in block.without(0)] == [(1,)]
