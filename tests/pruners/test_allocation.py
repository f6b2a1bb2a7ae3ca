"""Which channels go: exact counts, exact pools, limits, whatever the scores are."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nni_plugin.errors import ConfigError
from nni_plugin.pruners.allocation import Bloc, Limits, emptied, removed_channels

ratios = st.floats(0.0, 0.99)


def bloc(name: str, width: int, limits: Limits, pool: str | None = None, tied: int = 1, weight: int = 1) -> Bloc:
    unit = torch.arange(width) % (width // tied)
    return Bloc(name, unit, torch.full((width,), float(weight)), limits, pool)


@st.composite
def pools(draw: st.DrawFn) -> tuple[list[Bloc], dict[str, torch.Tensor], float]:
    ratio = draw(ratios)
    blocs, scores = [], {}
    for number in range(draw(st.integers(1, 5))):
        tied = draw(st.sampled_from((1, 1, 2)))
        width = tied * draw(st.integers(1, 12))
        least = draw(st.sampled_from((0.0, 0.0, 0.25)))
        most = draw(st.sampled_from((1.0, 1.0, 0.5)))
        name = f"layer{number}"
        limits = Limits(ratio, None, least, most)
        blocs.append(bloc(name, width, limits, "pool", tied, draw(st.integers(1, 50))))
        values = draw(st.lists(st.integers(0, 5), min_size=width, max_size=width))
        scores[name] = torch.tensor(values, dtype=torch.float64)
    return blocs, scores, ratio


@given(st.integers(1, 64), ratios, st.integers(0, 2**16))
def test_a_ratio_removes_exactly_the_lowest(width: int, ratio: float, seed: int) -> None:
    scores = torch.randint(0, 9, (width,), generator=torch.Generator().manual_seed(seed)).double()
    going = removed_channels([bloc("a", width, Limits(ratio))], {"a": scores})["a"]
    assert int(going.sum()) == math.floor(width * ratio + 1e-7)
    if going.any():
        assert scores[going].max() <= scores[~going].min()


def test_shares_are_decimal() -> None:
    assert 100 * 0.29 < 29  # in floats
    assert int(removed_channels([bloc("a", 100, Limits(0.29))], {"a": torch.rand(100)})["a"].sum()) == 29
    assert int(removed_channels([bloc("a", 8, Limits(0.75))], {"a": torch.rand(8)})["a"].sum()) == 6


@given(pools())
def test_a_pool_reaches_its_ratio_to_the_unit_within_its_limits(drawn) -> None:  # type: ignore[no-untyped-def]
    blocs, scores, ratio = drawn
    going = removed_channels(blocs, scores)
    total = sum(float(b.weights.sum()) for b in blocs)
    largest = max(float(b.weights[0]) * len(b.unit) / len(b.unit.unique()) for b in blocs)
    reached = sum(float(b.weights[going[b.name]].sum()) for b in blocs)
    floors = ceilings = 0.0
    for b in blocs:
        units, tied = len(b.unit.unique()), len(b.unit) // len(b.unit.unique())
        most = min(math.floor(b.width * b.limits.most) // tied, units - 1)
        least = min(math.floor(b.width * b.limits.least) // tied, most)
        removed = int(going[b.name].sum()) // tied
        assert least <= removed <= most
        assert not going[b.name].all()
        for label in b.unit.unique():  # tied channels go together
            assert len(going[b.name][b.unit == label].unique()) == 1
        floors += least * tied * float(b.weights[0])
        ceilings += most * tied * float(b.weights[0])
    asked = ratio * total
    if floors <= asked:
        assert reached <= asked + 1e-6
    if asked <= ceilings:
        assert reached > asked - largest - 1e-6
    else:
        assert reached == pytest.approx(ceilings)


@given(pools(), st.randoms())
def test_the_order_of_blocs_does_not_matter(drawn, random) -> None:  # type: ignore[no-untyped-def]
    blocs, scores, _ = drawn
    shuffled = random.sample(blocs, len(blocs))
    first, second = removed_channels(blocs, scores), removed_channels(shuffled, scores)
    assert all(torch.equal(first[name], second[name]) for name in first)


@given(pools())
def test_a_pool_removes_the_lowest_of_all(drawn) -> None:  # type: ignore[no-untyped-def]
    blocs, scores, _ = drawn
    going = removed_channels(blocs, scores)
    free = [b for b in blocs if b.limits.least == 0 and len(b.unit) == len(b.unit.unique())]
    highest = max((float(scores[b.name][going[b.name]].max()) for b in free if going[b.name].any()), default=-math.inf)
    for b in free:
        stays = scores[b.name][~going[b.name]]
        full = int(going[b.name].sum()) == min(math.floor(b.width * b.limits.most), b.width - 1)
        others = [o for o in blocs if o is not b]
        if not full and all(len(o.unit) == len(o.unit.unique()) for o in others):
            assert float(stays.min()) >= highest


@given(st.lists(st.floats(-2, 2), min_size=2, max_size=12), st.floats(-2, 2))
def test_a_threshold_removes_what_is_below(values: list[float], threshold: float) -> None:
    scores = torch.tensor(values, dtype=torch.float64)
    going = removed_channels([bloc("a", len(values), Limits(None, threshold))], {"a": scores})["a"]
    below = scores < threshold
    if below.all():
        assert int(going.sum()) == len(values) - 1
    else:
        assert torch.equal(going, below)


def test_limits_clamp_a_threshold_and_a_ratio() -> None:
    scores = {"a": torch.arange(8.0)}
    for limits, count in (
        (Limits(None, 100.0, 0.0, 0.5), 4),
        (Limits(None, -1.0, 0.25, 1.0), 2),
        (Limits(0.9, None, 0.0, 0.5), 4),
        (Limits(0.0, None, 0.25, 1.0), 2),
        (Limits(0.9, None, 0.0, 0.0), 0),
    ):
        assert int(removed_channels([bloc("a", 8, limits)], scores)["a"].sum()) == count, limits


def test_blocs_below_their_threshold_as_a_whole_are_named() -> None:
    scores = torch.arange(8.0)
    for limits, named in (
        (Limits(None, 100.0), True),
        (Limits(None, 7.0), False),
        (Limits(0.99), False),
        (Limits(None, 100.0, 0.0, 0.5), False),
    ):
        assert bool(emptied([bloc("a", 8, limits)], {"a": scores})) == named, limits


def test_what_went_before_goes_first() -> None:
    before = torch.tensor([False, False, True, True])
    going = removed_channels([bloc("a", 4, Limits(0.75))], {"a": torch.tensor([0.0, 1, 2, 3])}, {"a": before})["a"]
    assert going.tolist() == [True, False, True, True]


def test_a_pool_has_one_ratio() -> None:
    blocs = [bloc("a", 4, Limits(0.5), "p"), bloc("b", 4, Limits(0.25), "p")]
    with pytest.raises(ConfigError, match=r"global_group_id p .*sparse_ratio.*0.25, 0.5"):
        removed_channels(blocs, {"a": torch.rand(4), "b": torch.rand(4)})
