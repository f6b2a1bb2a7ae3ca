"""Plans as data: refused when damaged, equal after JSON, composed like functions."""

import copy
import json
import pickle
import random
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nni_plugin import Cost, GroupPlan, ModelIdentity, PruningPlan
from nni_plugin.errors import PlanError


@st.composite
def group_plans(draw: Any, name: str, total: int | None = None, factors: bool = True) -> GroupPlan:
    total = total or draw(st.integers(1, 12))
    kept = tuple(sorted(draw(st.sets(st.integers(0, total - 1), min_size=1))))
    numbers = st.floats(-1e6, 1e6)
    values = draw(st.none() | st.tuples(*[numbers] * len(kept))) if factors else None
    return GroupPlan(name, total, kept, values, draw(st.none() | st.tuples(numbers, numbers)))


@st.composite
def plans(draw: Any) -> PruningPlan:
    names = draw(st.lists(st.text(min_size=1, max_size=8), unique=True, max_size=5))
    costs = st.none() | st.builds(Cost, st.integers(0, 2**50), st.integers(0, 2**40))
    kwargs = st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.none() | st.booleans())
    return PruningPlan(
        tuple(draw(group_plans(name)) for name in names),
        tuple(draw(st.lists(st.text(min_size=1, max_size=5), unique=True, max_size=2))),
        draw(st.none() | st.builds(ModelIdentity, st.just("timm"), st.text(min_size=1, max_size=9), kwargs)),
        draw(costs),
        draw(costs),
        draw(st.none() | st.floats(-1e9, 1e9)),
        draw(kwargs),
    )


@given(plans())
def test_a_plan_survives_json_copies_and_pickles(plan: PruningPlan) -> None:
    again = PruningPlan.from_json(plan.to_json())
    assert again == plan
    assert again.digest == plan.digest
    assert hash(again) == hash(plan)
    assert again.to_json() == plan.to_json()
    assert copy.deepcopy(plan) == plan
    assert pickle.loads(pickle.dumps(plan)) == plan
    json.loads(plan.to_json())
    assert plan.explain()


def damaged(change: Any) -> str:
    plan = PruningPlan(
        (GroupPlan("a", 4, (0, 2), (1.0, 0.5), (0.0, 1.0)),),
        model=ModelIdentity("timm", "resnet18"),
        cost_before=Cost(10, 5),
        cost_after=Cost(6, 3),
        provenance={"seed": 0},
    )
    data = json.loads(plan.to_json())
    change(data)
    return json.dumps(data)


def put(*path: Any) -> Any:
    *way, last, value = path

    def change(data: Any) -> None:
        for key in way:
            data = data[key]
        data[last] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        put("schema_version", 2),
        put("schema_version", None),
        put("groups", None),
        put("groups", {}),
        put("groups", [1]),
        put("groups", ["a"]),
        put("groups", [None]),
        put("groups", [{}]),
        put("groups", 0, "name", None),
        put("groups", 0, "name", 3),
        put("groups", 0, "total", "4"),
        put("groups", 0, "total", 4.0),
        put("groups", 0, "total", True),
        put("groups", 0, "total", -4),
        put("groups", 0, "kept", []),
        put("groups", 0, "kept", None),
        put("groups", 0, "kept", "02"),
        put("groups", 0, "kept", [2, 0]),
        put("groups", 0, "kept", [0, 0]),
        put("groups", 0, "kept", [0, 4]),
        put("groups", 0, "kept", [-1, 0]),
        put("groups", 0, "kept", [0.0, 2.0]),
        put("groups", 0, "kept", [False, True]),
        put("groups", 0, "factors", [1.0]),
        put("groups", 0, "factors", 1.0),
        put("groups", 0, "factors", ["x", "y"]),
        put("groups", 0, "factors", [None, None]),
        put("groups", 0, "factors", [float("nan"), 1.0]),
        put("groups", 0, "factors", [float("inf"), 1.0]),
        put("groups", 0, "score_range", [1.0]),
        put("groups", 0, "score_range", []),
        put("groups", 0, "score_range", 3),
        put("groups", 0, "score_range", ["a", "b"]),
        put("removed_blocks", None),
        put("removed_blocks", "layer1"),
        put("model", []),
        put("model", "timm"),
        put("model", {}),
        put("model", "name", ""),
        put("model", "name", 3),
        put("model", "kwargs", [1, 2]),
        put("model", "kwargs", "text"),
        put("model", "extra", 1),
        put("cost_before", 3),
        put("cost_before", [1, 2]),
        put("cost_before", {"macs": 1}),
        put("cost_before", "macs", "many"),
        put("cost_after", "params", None),
        put("predicted_loss_change", "a lot"),
        put("provenance", [1, 2]),
        put("provenance", "text"),
        lambda data: data.pop("groups"),
        lambda data: data.pop("removed_blocks"),
        lambda data: data["groups"][0].pop("kept"),
        lambda data: data["groups"].append(data["groups"][0]),
    ],
)
def test_damaged_plans_are_refused(change: Any) -> None:
    with pytest.raises(PlanError):
        PruningPlan.from_json(damaged(change))


@pytest.mark.parametrize("text", ["", "{", "null", "3", "[]", '"plan"', "{}", "\x00", "[" * 100_000])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError):
        PruningPlan.from_json(text)


@settings(derandomize=True, database=None, max_examples=300)
@given(st.integers(0, 2**32), st.sampled_from([None, 0, -1, 1.5, "x", [], {}, True, [1], {"a": 1}, float("nan")]))
def test_any_value_anywhere_is_read_or_refused(seed: int, value: Any) -> None:
    """One value of a right plan replaced by something else: a plan or a PlanError, nothing else."""
    data = json.loads(damaged(lambda _: None))
    draw = random.Random(seed)
    spot = data
    while True:
        keys = list(spot) if isinstance(spot, dict) else range(len(spot))
        key = draw.choice(list(keys))
        if not isinstance(spot[key], dict | list) or not spot[key] or draw.random() < 0.3:
            spot[key] = value
            break
        spot = spot[key]
    try:
        plan = PruningPlan.from_json(json.dumps(data))
    except PlanError:
        return
    assert PruningPlan.from_json(plan.to_json()) == plan
    assert plan.explain()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("a", 4, ()), "lose all its 4"),
        (("a", 4, (2, 1)), "ascending"),
        (("a", 4, (1, 1)), "ascending"),
        (("a", 4, (0, 4)), "within"),
        (("a", 4, (-1,)), "within"),
        (("a", 4, (0, 1), (1.0,)), "expected 2 finite factors"),
        (("a", 4, (0,), (float("nan"),)), "finite"),
        (("a", 4, (0.5, 1.5)), "'a'"),
    ],
)
def test_groups_are_checked(arguments: Any, text: str) -> None:
    with pytest.raises(PlanError, match=text):
        GroupPlan(*arguments)


def test_numbers() -> None:
    plan = PruningPlan((GroupPlan("a", 4, (0, 2)), GroupPlan("b", 3, (0, 1, 2))))
    assert plan.groups[0].removed == (1, 3)
    assert (plan.channels_removed, plan.channels_kept) == (2, 5)
    assert plan.kept() == {"a": (0, 2), "b": (0, 1, 2)}


def test_frozen_and_each_group_once() -> None:
    plan = PruningPlan((GroupPlan("a", 4, (0, 2)),))
    with pytest.raises(FrozenInstanceError):
        plan.groups = ()  # type: ignore[misc]
    with pytest.raises(PlanError, match="twice"):
        PruningPlan((GroupPlan("a", 4, (0,)), GroupPlan("a", 4, (0,))))


def test_the_digest_is_of_what_applying_does() -> None:
    plan = PruningPlan((GroupPlan("a", 4, (0, 2)), GroupPlan("b", 3, (0,))))
    other = PruningPlan((GroupPlan("b", 3, (0,), None, (0, 1)), GroupPlan("a", 4, (0, 2))), provenance={"seed": 1})
    assert plan.digest == other.digest
    different = [
        PruningPlan((GroupPlan("a", 4, (0, 1)), GroupPlan("b", 3, (0,)))),
        PruningPlan((GroupPlan("a", 5, (0, 2)), GroupPlan("b", 3, (0,)))),
        PruningPlan((GroupPlan("a", 4, (0, 2), (1.0, 2.0)), GroupPlan("b", 3, (0,)))),
        PruningPlan(plan.groups, ("block",)),
    ]
    assert len({p.digest for p in [plan, *different]}) == 5


# -- composition ----------------------------------------------------------------------------------------------


@st.composite
def three_plans(draw: Any) -> tuple[PruningPlan, PruningPlan, PruningPlan]:
    first = PruningPlan(tuple(draw(group_plans(name)) for name in "abc"))
    second = PruningPlan(tuple(draw(group_plans(g.name, len(g.kept))) for g in first.groups))
    third = PruningPlan(tuple(draw(group_plans(g.name, len(g.kept))) for g in second.groups))
    return first, second, third


def effect(plan: PruningPlan, dense: dict[str, list[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    """What is left of (channel, value) pairs after keeping and multiplying."""
    result = {}
    for entry in plan.groups:
        factors = entry.factors or (1.0,) * len(entry.kept)
        rows = dense[entry.name]
        result[entry.name] = [(rows[i][0], rows[i][1] * f) for i, f in zip(entry.kept, factors, strict=True)]
    return result


@given(three_plans())
def test_composition_is_one_after_the_other(plans_: tuple[PruningPlan, PruningPlan, PruningPlan]) -> None:
    first, second, third = plans_
    dense = {g.name: [(i, 1.0) for i in range(g.total)] for g in first.groups}
    both = first.then(second)
    assert effect(both, dense) == effect(second, effect(first, dense))
    left, right = both.then(third), first.then(second.then(third))
    assert left.kept() == right.kept()


def test_composition_keeps_both_ends() -> None:
    identity = ModelIdentity("timm", "resnet18")
    first = PruningPlan((GroupPlan("a", 4, (0, 2)),), ("x",), identity, Cost(9, 9), Cost(6, 6), 0.5, {"n": 1})
    second = PruningPlan((GroupPlan("a", 2, (1,)),), ("y",), None, Cost(6, 6), Cost(3, 3), 0.1, {"n": 2})
    both = first.then(second)
    assert (both.model, both.cost_before, both.cost_after) == (identity, Cost(9, 9), Cost(3, 3))
    assert both.removed_blocks == ("x", "y")
    assert both.provenance == {"n": 2}
    assert both.kept() == {"a": (2,)}


def test_widths_that_do_not_meet() -> None:
    first = PruningPlan((GroupPlan("a", 4, (0, 2)),))
    with pytest.raises(PlanError, match=r"leaves 2 channels.*starts from 3"):
        first.then(PruningPlan((GroupPlan("a", 3, (0,)),)))
    both = first.then(PruningPlan((GroupPlan("b", 3, (0,)),)))
    assert both.kept() == {"a": (0, 2), "b": (0,)}
    assert first.then(PruningPlan(())).kept() == first.kept()


# -- what it tells --------------------------------------------------------------------------------------------


def test_explain() -> None:
    plan = PruningPlan(
        (GroupPlan("conv1", 8, (0, 1, 2, 3, 4), None, (0.125, 2.0)), GroupPlan("layer1.conv", 4, (0, 1, 2))),
        ("layer2.0",),
        cost_before=Cost(2_000_000, 30_000),
        cost_after=Cost(1_000_000, 10_000),
    )
    lines = plan.explain().splitlines()
    assert lines[0].split() == ["layer", "kept/total", "scores", "share", "of", "the", "cut"]
    assert lines[2].split() == ["conv1", "5/8", "0.125", "..", "2", "75.0", "%"]
    assert lines[3].split() == ["layer1.conv", "3/4", "25.0", "%"]
    assert lines[4].split() == ["layer2.0", "removed"]
    assert "4 of 12 coupled channels and 1 block removed" in lines[5]
    assert "2 M MACs" in lines[6]
    assert "1 M MACs" in lines[6]


@pytest.mark.parametrize("kwargs", [{"a": object()}, {"a": {1, 2}}, {"a": float("nan")}])
def test_identities_hold_plain_values(kwargs: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="resnet18"):
        ModelIdentity("timm", "resnet18", kwargs)


def test_identities_are_values() -> None:
    kwargs = {"width": 2, "depths": [1, 2]}
    identity = ModelIdentity("nni_plugin", "resnet20", kwargs)
    kwargs["depths"].append(3)  # type: ignore[attr-defined]
    assert identity.kwargs["depths"] == [1, 2]
    with pytest.raises(TypeError):
        identity.kwargs["width"] = 3  # type: ignore[index]
    assert copy.deepcopy(identity) is identity
    assert pickle.loads(pickle.dumps(identity)) == identity
    assert hash(identity) == hash(ModelIdentity("nni_plugin", "resnet20", {"depths": [1, 2], "width": 2}))
    for bad in (("", "x"), ("timm", ""), (None, "x"), ("timm", 3)):
        with pytest.raises(PlanError):
            ModelIdentity(*bad)  # type: ignore[arg-type]


def test_layers_of_blocks_that_leave_are_told_so() -> None:
    """A joint plan scales channels in one step, and in a later one takes the block around them."""
    groups = [GroupPlan(name, 4, (0, 1, 2, 3)) for name in ("layer1.0.conv1", "layer1.00.conv1", "layer1.0", "fc")]
    plan = PruningPlan(tuple(groups), ("layer1.0",))
    assert [plan.leaves(group.name) for group in groups] == [True, False, True, False]
    shown = [line.split()[1] for line in plan.explain().splitlines()[2:6]]
    assert shown == ["with", "4/4", "with", "4/4"]
