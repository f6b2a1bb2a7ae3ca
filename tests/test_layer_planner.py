"""Blocks leave in the order of their importance, as few as a budget takes; the network that is asked about stays."""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import latency_by_macs
import pytest
import timm
import torch
from networks_at_random import assert_same, randomise, state_of
from torch import Tensor, nn

from nni_plugin import Channels, Gradual, Iterative, Latency, Layers, MACs, Params, PruningPlan, count, plan_layers
from nni_plugin.criteria import Magnitude
from nni_plugin.errors import BudgetError, CriterionError, DataError, GraphError, PlanError, ScheduleError
from nni_plugin.layers import BlockGate, Imprinting, LayerEnsemble, LayerImportance, LayerStatistic
from nni_plugin.layers.blocks import Block
from nni_plugin.layers.candidates import candidate_blocks, removal_sets
from nni_plugin.networks import resnet20, vgg19_bn

X = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
BLOCKS = ("layer1.0", "layer1.1", "layer1.2", "layer2.1", "layer2.2", "layer3.1", "layer3.2")
VIT: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "num_heads": 2, "num_classes": 3}


class Given(LayerImportance):
    """Importances by name; unknown blocks are important. Notes what it was asked about."""

    needs_batches = False

    def __init__(self, scores: Mapping[str, float]) -> None:
        self.scores, self.asked = scores, []  # type: ignore[var-annotated]

    def __str__(self) -> str:
        return "Given"

    def _score(
        self, model: nn.Module, example_inputs: Any, blocks: Sequence[Block], *_: Any, **__: Any
    ) -> dict[str, float]:
        self.asked.append([block.name for block in blocks])
        return {block.name: self.scores.get(block.name, 100.0) for block in blocks}


class Whiny(Given):
    needs_held_out = True

    def _score(
        self,
        model: nn.Module,
        example_inputs: Any,
        blocks: Sequence[Block],
        batches: Iterable[Any],
        loss_fn: Any,
        held_out: Iterable[Any] | None,
    ) -> dict[str, float]:
        assert held_out is not None
        self.seen = list(batches), list(held_out)
        return super()._score(model, example_inputs, blocks)


def resnet() -> nn.Module:
    return randomise(resnet20(width_mult=0.5))


ORDER = Given({"layer2.1": 1.0, "layer1.2": 2.0, "layer3.2": 3.0, "layer1.0": 4.0, "layer2.2": 5.0})


def digits(number: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(20) % 10
    return [(torch.randn(20, 3, 16, 16, dtype=torch.float64, generator=generator), labels) for _ in range(number)]


def test_so_many_layers_leave_the_least_important_first() -> None:
    model = resnet()
    before = state_of(model)
    plan = plan_layers(model, X, ORDER, [], Layers(3))
    assert plan.removed_blocks == ("layer2.1", "layer1.2", "layer3.2")
    assert_same(model, before)
    assert not hasattr(model, "pruning_plan")
    assert plan.cost_before == count(model, X)
    slim = plan.apply(copy.deepcopy(model), X)
    assert plan.cost_after == count(slim, X)
    assert slim.pruning_plan.removed_blocks == plan.removed_blocks
    assert PruningPlan.from_json(plan.to_json()) == plan
    assert " at 0x" not in plan.provenance["importance"]
    rows = plan.provenance["blocks"]
    assert [row["name"] for row in rows] == list(BLOCKS)
    assert {row["name"]: row["score"] for row in rows if row["removed"]} == {
        "layer2.1": 1.0, "layer1.2": 2.0, "layer3.2": 3.0,
    }  # fmt: skip
    assert "layer1.2  removed     2" in plan.explain()


@pytest.mark.parametrize("budget", [MACs(0.8), MACs(0.5), Params(0.7), Params(0.3)])
def test_a_budget_is_met_and_nothing_leaves_needlessly(budget: MACs | Params) -> None:
    model = resnet()
    value = (lambda net: count(net, X).macs) if isinstance(budget, MACs) else (lambda net: count(net, X).params)
    plan = plan_layers(model, X, ORDER, [], budget)
    assert value(plan.apply(copy.deepcopy(model), X)) <= budget.ratio * value(model)
    for block in plan.removed_blocks:
        rest = tuple(other for other in plan.removed_blocks if other != block)
        put_back = copy.deepcopy(model)
        if rest:
            PruningPlan((), rest).apply(put_back, X)
        assert value(put_back) > budget.ratio * value(model)


def test_the_more_important_block_is_the_one_that_may_stay() -> None:
    """A block of little cost goes first; once a dear one has left as well, the cheap one was not needed."""
    model = resnet()
    params = {b: count(model, X).params - count(PruningPlan((), (b,)).apply(resnet(), X), X).params for b in BLOCKS}
    ratio = 1 - params["layer3.2"] / count(model, X).params
    plan = plan_layers(model, X, Given({"layer1.0": 0.0, "layer3.2": 1.0}), [], Params(math.ceil(ratio * 1e6) / 1e6))
    assert plan.removed_blocks == ("layer3.2",)


def test_latency_is_met_on_the_slim_network(monkeypatch: pytest.MonkeyPatch) -> None:
    latency_by_macs.use(monkeypatch)
    model = resnet()
    dense = latency_by_macs.milliseconds(model, (3, 16, 16))
    plan = plan_layers(model, X, ORDER, [], Latency(0.7))
    left = latency_by_macs.milliseconds(plan.apply(copy.deepcopy(model), X), (3, 16, 16))
    assert left <= 0.7 * dense
    assert plan.provenance["latency"]["ratio"] == left / dense
    for block in plan.removed_blocks:
        rest = PruningPlan((), tuple(other for other in plan.removed_blocks if other != block))
        assert latency_by_macs.milliseconds(rest.apply(copy.deepcopy(model), X), (3, 16, 16)) > 0.7 * dense
    same = plan_layers(model, X, ORDER, [], Latency(ms=0.7 * dense))
    assert same.removed_blocks == plan.removed_blocks
    with pytest.raises(BudgetError, match="remain"):
        plan_layers(model, X, ORDER, [], Latency(0.01))


def test_a_real_clock() -> None:
    """Whatever it says, the plan holds what was measured; the machine may be busy, so no number is asked for."""
    plan = plan_layers(resnet().float(), X.float(), ORDER, [], Latency(0.9, batch_size=2))
    timing = plan.provenance["latency"]
    assert timing["dense"]["batch_size"] == timing["pruned"]["batch_size"] == 2
    assert timing["pruned"]["median_ms"] > 0
    assert plan.removed_blocks


def test_steps_score_what_is_left_under_the_dense_names() -> None:
    importance = Given({"layer1.1": 0.0, "layer1.2": 1.0})
    plan = plan_layers(resnet(), X, importance, [], Layers(2), schedule=Gradual(2))
    # Without layer1.1 the block behind it has moved up, so that the name is scored once more.
    assert importance.asked == [list(BLOCKS), ["layer1.0", "layer1.1", *BLOCKS[3:]]]
    assert plan.removed_blocks == ("layer1.1", "layer1.2")
    steps = [(row["step"], row["name"]) for row in plan.provenance["blocks"] if row["removed"]]
    assert steps == [(0, "layer1.1"), (1, "layer1.2")]


def test_one_step_or_several_agree_where_scores_do_not_change() -> None:
    model = resnet()
    once = plan_layers(model, X, LayerStatistic(Magnitude()), [], Layers(4))
    anew = plan_layers(model, X, LayerStatistic(Magnitude()), [], Layers(4), schedule=Gradual(4))
    assert set(once.removed_blocks) == set(anew.removed_blocks)


def test_what_must_stay_stays_in_every_step() -> None:
    importance = Given({"layer1.1": 0.0, "layer1.2": 1.0})
    plan = plan_layers(
        resnet(), X, importance, [], Layers(2), schedule=Gradual(2), keep=("layer1.2", "layer1.0"), reestimate=False
    )
    assert plan.removed_blocks[0] == "layer1.1"
    assert not {"layer1.2", "layer1.0"} & set(plan.removed_blocks)


def test_more_steps_than_blocks() -> None:
    importance = Given({"layer1.1": 0.0})
    plan = plan_layers(resnet(), X, importance, [], Layers(7), schedule=Gradual(10))
    assert len(plan.removed_blocks) == 7
    assert len(importance.asked) == 7


def test_a_module_inside_keeps_its_block_and_one_name_is_no_list() -> None:
    plan = plan_layers(resnet(), X, ORDER, [], Layers(1), keep="layer2.1.conv1")
    assert plan.removed_blocks == ("layer1.2",)


def test_the_random_state_is_left_alone() -> None:
    loader = torch.utils.data.DataLoader([(x[0], y[0]) for x, y in digits(12)], batch_size=4)  # type: ignore[arg-type]
    model = resnet()
    before = torch.random.get_rng_state()
    plan_layers(model, X, BlockGate(), loader, Layers(1))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_of_a_few_minibatches_the_last_is_held_out() -> None:
    importance = Whiny({})
    batches = digits(3)
    plan_layers(resnet(), X, importance, batches, Layers(1))
    learned, held_out = importance.seen
    assert [id(b) for b in held_out] == [id(batches[2])]
    assert len(learned) == 2


def test_every_fifth_minibatch_is_held_out() -> None:
    importance = Whiny({})
    batches = digits(11)
    plan_layers(resnet(), X, importance, batches, Layers(1))
    learned, held_out = importance.seen
    assert [id(b) for b in held_out] == [id(batches[4]), id(batches[9])]
    assert [id(b) for b in learned] == [id(b) for i, b in enumerate(batches) if i not in (4, 9)]
    given = digits(1)
    plan_layers(resnet(), X, importance, batches, Layers(1), held_out=given)
    assert importance.seen == (batches, given)


@pytest.mark.parametrize(
    "importance",
    [
        Imprinting(),
        BlockGate(),
        LayerStatistic(Magnitude()),
        LayerEnsemble([Imprinting(), BlockGate(), Magnitude()]),
    ],
    ids=lambda importance: type(importance).__name__,
)
def test_every_importance_plans(importance: LayerImportance) -> None:
    model = resnet()
    plan = plan_layers(model, X, importance, digits(), Layers(2), reestimate=True, schedule=Gradual(2))
    assert len(plan.removed_blocks) == 2
    out = plan.apply(model, X).train()(X)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class TestBlocksInsideBlocks:
    def vit(self) -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model("vit_tiny_patch16_224", depth=3, **VIT).double().eval()

    def names(self, candidates: Any) -> list[str]:
        return [block.name for block in candidate_blocks(self.vit(), X, candidates)]

    def test_candidates(self) -> None:
        outer, inner, every = (self.names(how) for how in ("outermost", "innermost", "all"))
        assert outer == ["blocks.0", "blocks.1", "blocks.2"]
        assert inner == [f"blocks.{i}.{part}" for i in range(3) for part in ("attn", "mlp")]
        assert set(every) == {*outer, *inner}

    def test_a_block_takes_its_branches_along(self) -> None:
        blocks = candidate_blocks(self.vit(), X, "all")
        scores = {"blocks.0.mlp": 0.0, "blocks.1": 1.0, "blocks.0": 2.0, "blocks.0.attn": 3.0}
        sets = removal_sets(blocks, {block.name: scores.get(block.name, 9.0) for block in blocks})
        assert sets[:4] == [(), ("blocks.0.mlp",), ("blocks.0.mlp", "blocks.1"), ("blocks.1", "blocks.0")]
        model = self.vit()
        plan = plan_layers(model, X, Given(scores), [], Layers(2), candidates="all")
        assert set(plan.removed_blocks) == {"blocks.0.mlp", "blocks.1"}
        assert plan.apply(model, X)(X).shape == (2, 3)

    def test_a_branch_that_left_first_leaves_once_with_its_block(self) -> None:
        scores = {"blocks.0.mlp": 0.0, "blocks.0": 1.0, "blocks.1.attn": 2.0}
        plan = plan_layers(self.vit(), X, Given(scores), [], Params(0.3), candidates="all", schedule=Gradual(3))
        removed = plan.removed_blocks
        assert not any(a != b and a.startswith(f"{b}.") for a in removed for b in removed)
        slim = plan.apply(self.vit(), X)
        assert count(slim, X).params <= 0.3 * count(self.vit(), X).params


def test_units_of_a_plain_network() -> None:
    model = randomise(vgg19_bn(width_mult=0.125))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    plan = plan_layers(model, x, LayerStatistic(Magnitude()), [], Layers(3))
    assert len(plan.removed_blocks) == 3
    assert plan.apply(model, x)(x).shape == (2, 10)


def test_a_budget_that_is_met_already_says_so() -> None:
    with pytest.warns(UserWarning, match="removes nothing"):
        plan = plan_layers(resnet(), X, ORDER, [], MACs(1.0))
    assert plan.removed_blocks == ()


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (BudgetError, "only 7 blocks", {"budget": Layers(8)}),
        (BudgetError, "remain", {"budget": MACs(0.01)}),
        (BudgetError, "Whole blocks leave", {"budget": Channels(0.5)}),
        (PlanError, "'layer9'", {"keep": ["layer9"]}),
        (PlanError, "candidates", {"candidates": "some"}),
        (ScheduleError, "without training", {"schedule": Iterative(1, 1)}),
        (BudgetError, "Whole blocks leave", {"budget": 0.5}),
        (CriterionError, "LayerStatistic", {"importance": Magnitude()}),
        (GraphError, "keep fewer", {"keep": BLOCKS}),
        (DataError, "holds 0 minibatches", {"importance": Imprinting(), "batches": []}),
        (DataError, "only once", {"importance": Imprinting(), "batches": iter(digits())}),
        (DataError, "1 of 11 classes", {"importance": Imprinting(num_classes=11), "batches": digits()}),
    ],
)
def test_bad_input(error: type[Exception], match: str, arguments: dict[str, Any]) -> None:
    model = resnet()
    before = state_of(model)
    given = {"importance": ORDER, "batches": [], "budget": Layers(1), **arguments}
    with pytest.raises(error, match=match):
        plan_layers(model, X, given.pop("importance"), given.pop("batches"), given.pop("budget"), **given)
    assert_same(model, before)


def test_shuffled_minibatches_cannot_be_held_out() -> None:
    class Shuffled:
        def __iter__(self) -> Any:
            return iter([(torch.randn(20, 3, 16, 16, dtype=torch.float64), torch.arange(20) % 10)] * 5)

    with pytest.raises(DataError, match="shuffle"):
        plan_layers(resnet(), X, Imprinting(), Shuffled(), Layers(1))


def test_no_removable_block() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(784, 2)).double()
    with pytest.raises(GraphError, match="no block"):
        plan_layers(model, X, ORDER, [], Layers(1))
