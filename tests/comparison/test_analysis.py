"""Means, paired differences, intervals, fronts and losses on numbers that are known by hand."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from nni_plugin.comparison.analysis import Mean, best_built_in, differences, front, interval, losses, points
from nni_plugin.comparison.report import lead
from nni_plugin.comparison.results import Row, to_csv


def row(method: str, seed: int, top1: float, target: str = "macs=0.5") -> Row:
    return Row("net", "data", method, seed, target, 0.5, 0.4, 0.8, 90.0, 50.0, top1, 3.0)


OURS = [row("obs", seed, top1) for seed, top1 in enumerate((89.0, 90.0, 91.0))]
TAYLOR = [row("tp:taylor", seed, top1) for seed, top1 in enumerate((88.0, 88.5, 90.5))]
L1 = [row("nni:l1", seed, top1) for seed, top1 in enumerate((80.0, 80.0, 80.0))]


def test_differences_are_paired_by_seed_and_against_the_best_built_in() -> None:
    [found] = differences([*L1, *OURS, *TAYLOR])
    assert (found.method, found.against) == ("obs", "tp:taylor")
    assert found.difference == Mean(1.0, 0.5, 3)
    # Student's interval of 1.0, 1.5, 0.5: the quantile of two degrees of freedom is 4.3027.
    assert found.interval == pytest.approx((1 - 4.302653 * 0.5 / math.sqrt(3), 1 + 4.302653 * 0.5 / math.sqrt(3)))
    assert found.verdict == "not told apart"
    assert "do not tell apart" in losses([*OURS, *TAYLOR])[0]


def test_intervals_of_several_of_ours_hold_together() -> None:
    both = [*OURS, *TAYLOR, *(row("taylor-fo", seed, 85.0 + seed) for seed in range(3))]
    alone = differences([*OURS, *TAYLOR])[0].interval
    together = {d.method: d.interval for d in differences(both)}["obs"]
    assert alone is not None
    assert together is not None
    # The quantile of 97.5 % confidence, of two degrees of freedom, is 6.2053.
    assert together[1] - together[0] == pytest.approx((alone[1] - alone[0]) * 6.205347 / 4.302653)


def test_a_seed_that_one_of_them_lacks_does_not_count() -> None:
    [found] = differences([*OURS, *TAYLOR[:2]])
    assert found.difference == Mean(1.25, pytest.approx(math.sqrt(0.125)), 2)


def test_a_strong_built_in_that_lacks_a_seed_still_counts() -> None:
    strong = [row("tp:lamp", seed, 92.0) for seed in (0, 1)]
    [found] = differences([*OURS, *TAYLOR, *strong])
    assert (found.against, found.difference.count) == ("tp:lamp", 2)
    assert found.difference.mean == pytest.approx(-2.5)
    assert best_built_in([*TAYLOR, *strong], "macs=0.5") == "tp:lamp"
    assert best_built_in(OURS, "macs=0.5") is None
    assert differences(OURS) == []


def test_what_is_not_known_is_not_called_ahead() -> None:
    level = [row("tp:lamp", r.seed, r.top1) for r in OURS]
    assert losses([*OURS, *level]) == ["macs=0.5: obs and tp:lamp are level."]
    [text] = losses([OURS[0], L1[0]])
    assert text == "macs=0.5: obs has 9.00 points more than nni:l1, on one seed: more is not known."
    same = [row("tp:lamp", r.seed, r.top1 - 0.25) for r in OURS]
    assert differences([*OURS, *same])[0].verdict == "no spread"
    assert losses([*OURS, *same])[0].endswith("on seeds without spread: more is not known.")
    assert losses(L1) == ["macs=0.5: no result of ours; there is one of nni:l1."]
    assert "nothing to compare with" in losses(OURS)[0]


def test_rounding_is_no_spread() -> None:
    """Three more of 360 images right on each seed: percentages differ by rounding alone."""
    right = (300, 310, 299)
    ours = [row("obs", seed, (n + 3) / 3.6) for seed, n in enumerate(right)]
    theirs = [row("tp:lamp", seed, n / 3.6) for seed, n in enumerate(right)]
    assert differences([*ours, *theirs])[0].verdict == "no spread"
    ours = [row("obs", seed, n / 100) for seed, n in enumerate((9130, 9121, 9107))]
    theirs = [row("tp:lamp", seed, n / 100) for seed, n in enumerate((9133, 9119, 9106))]
    assert losses([*ours, *theirs]) == ["macs=0.5: obs and tp:lamp are level."]


def test_a_lucky_seed_of_ours_does_not_stand_before_what_is_known_better() -> None:
    ahead = [row("taylor-fo", seed, 99.0 + 0.1 * seed) for seed in range(3)]
    assert losses([*ahead, row("obs", 0, 99.9), *L1]) == []


def test_losses_are_said_plainly() -> None:
    behind = [row("obs", seed, 70.0) for seed in range(3)]
    ahead = [row("obs", seed, 99.0 + 0.1 * seed) for seed in range(3)]
    [text] = losses([*behind, *TAYLOR])
    assert text == "macs=0.5: tp:taylor is ahead of our best, obs, by 19.00 points (behind)."
    assert losses([*ahead, *L1]) == []
    assert "higher mean at 1 of 1 targets, 1 of them with an interval above zero" in lead([*ahead, *L1])
    assert lead(ahead) == ""


def test_a_single_seed_has_no_interval_and_no_deviation() -> None:
    [found] = differences([OURS[0], TAYLOR[0]])
    assert found.interval is None
    assert found.verdict == "one seed"
    assert str(found.difference) == "1.00"


def test_points_go_from_the_best_down_within_each_target() -> None:
    rows = [*L1, *OURS, row("obs", 0, 95.0, "macs=0.75"), row("nni:l1", 0, 96.0, "macs=0.75")]
    assert [(p.target, p.method) for p in points(rows)] == [
        ("macs=0.5", "obs"),
        ("macs=0.5", "nni:l1"),
        ("macs=0.75", "nni:l1"),
        ("macs=0.75", "obs"),
    ]


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=8))
def test_the_interval_is_that_of_a_paired_t_test(values: list[float]) -> None:
    found = interval(values)
    if stats.sem(values) == 0:
        assert found is None
        return
    assume(stats.sem(values) > 1e-6)  # of nearly equal values the two round differently
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert found == pytest.approx((expected.low, expected.high), rel=1e-9, abs=1e-9)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 100)), min_size=1, max_size=12))
def test_the_front_holds_what_nothing_beats(of: list[tuple[float, float]]) -> None:
    kept = front(of)
    for i, (cost, top1) in enumerate(of):
        beaten = any(c <= cost and t >= top1 and (c, t) != (cost, top1) for c, t in of)
        assert ((cost, top1) in [of[k] for k in kept]) == (not beaten), i
    assert [of[k][0] for k in kept] == sorted(of[k][0] for k in kept)


def test_the_table_has_its_columns_in_their_order() -> None:
    assert to_csv([OURS[0]]).splitlines() == [
        "model,dataset,method,seed,target,macs_ratio,params_ratio,latency_ratio,top1_baseline,top1_before_finetune,"
        "top1,seconds",
        "net,data,obs,0,macs=0.5,0.5000,0.4000,0.8000,90.00,50.00,89.00,3.0",
    ]
