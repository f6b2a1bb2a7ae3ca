"""PerformanceMaximizationPruner: the ratio as a share of MACs, masked is compact, schedules, what is refused."""

import copy
import itertools
from typing import Any

import pytest
import torch
from networks_at_random import assert_same, state_of
from nni.compression.pruning import AGPPruner
from nni_task import BATCH, CONVS, Plain, Training, data, evaluator_of, resnet, step
from torch import nn

from nni_plugin import count
from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.errors import BudgetError, ConfigError, SearchError
from nni_plugin.performance import (
    ArchitectureCost,
    ArchitectureLayout,
    CostTarget,
    PerformanceMaximization,
    SearchOptions,
    gated_groups,
)
from nni_plugin.pruners import L1NormPruner, ModelSpeedup, PerformanceMaximizationPruner
from nni_plugin.pruners.minibatches import held_out_places

STEPS = 4
QUICK = {"steps": 40, "predictor_start": 6, "predictor_warmup": 2, "predictor_batch": 8, "memory": 10, "candidates": 3}
INNER = [{"op_names_re": [r"layer.*conv1"], "sparse_ratio": 0.5}]


def pruner_of(model: nn.Module, config: Any = CONVS, **further: Any) -> Any:
    evaluator = further.pop("evaluator", None) or evaluator_of(model)
    chosen = SearchOptions(**{**QUICK, **further.pop("search", {})})
    steps = further.pop("training_steps", STEPS)
    return PerformanceMaximizationPruner(model, config, evaluator, steps, **{"options": chosen, **further})


def share_left(pruner: Any, model: nn.Module, cost: str = "macs") -> float:
    """What stays of the cost that the selected channels can save."""
    x = data()[0][:1]
    groups = [g for g in find_groups(model, x) if g.name in {part.name for part in pruner.plan().groups}]
    objective = getattr(ArchitectureCost(model, x, ArchitectureLayout(groups)), cost)
    slim = pruner.plan().apply(copy.deepcopy(model), x)
    return (getattr(count(slim, x), cost) - objective.fixed) / (objective.dense - objective.fixed)


@pytest.mark.parametrize("config", [CONVS, INNER])
@pytest.mark.parametrize("cost", ["macs", "params"])
def test_the_ratio_is_the_share_of_the_cost_and_masked_is_compact(config: Any, cost: str) -> None:
    model, x = resnet(), data()[0]
    pruner = pruner_of(model, config, cost=cost)
    _, masks = pruner.compress()
    with torch.no_grad():
        expected = model.eval()(x)
    pruner.unwrap_model()
    dense = copy.deepcopy(model)
    assert 0.47 < share_left(pruner, dense, cost) <= 0.5 + 1e-9
    selected = {group.name for group in pruner.plan().groups}
    assert ("conv1" in selected) == (config is CONVS)
    planned = pruner.plan().apply(copy.deepcopy(model), x).eval()
    speedup = ModelSpeedup(model, x, masks)
    speedup.speedup_model()
    with torch.no_grad():
        for small in (model.eval(), planned):
            assert torch.allclose(small(x), expected, rtol=1e-9, atol=1e-9)
    found = speedup.plan.kept()
    assert {name: found[name] for name in selected} == pruner.plan().kept()
    assert pruner.choice.source in pruner.choice.compared
    model.train()(x).square().sum().backward()


def test_it_is_the_search_on_the_minibatches_of_the_training() -> None:
    model, (images, target) = resnet(), data()
    plain = copy.deepcopy(model)
    pruner = pruner_of(model, INNER, held_out=0.25)
    pruner.compress()
    Training()(plain, torch.optim.SGD(plain.parameters(), lr=0.0), step, max_steps=STEPS)
    batches = list(zip(images.split(BATCH), target.split(BATCH), strict=True))
    for place in held_out_places(4, 0.25):
        del batches[place]
    groups = [g for g in gated_groups(find_groups(plain, images[:1])) if g.name.endswith("conv1")]
    objective = ArchitectureCost(plain, images[:1], ArchitectureLayout(groups)).macs
    limit = objective.fixed + 0.5 * (objective.dense - objective.fixed)
    search = PerformanceMaximization(
        plain, groups, CostTarget(objective, limit), lambda m, batch: step(batch, m), SearchOptions(**QUICK)
    ).run(batches)
    assert pruner.search.target.p == pytest.approx(0.5)
    ours, theirs = ([(r.loss, r.accuracy, r.cost_ratio) for r in one.history] for one in (pruner.search, search))
    assert ours == theirs
    for name, values in search.gates.vectors().items():
        assert torch.equal(pruner.scores[name], (values + 3.0).cpu())


def test_the_training_goes_on_undisturbed_and_nothing_stays_on_the_network() -> None:
    model, plain = resnet(), resnet()
    pruner = pruner_of(model, evaluator=evaluator_of(model, lr=0.05))
    pruner.compress()
    Training()(plain, torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9), step, max_steps=STEPS)
    pruner.unwrap_model()
    expected = {**dict(plain.named_parameters()), **dict(plain.named_buffers())}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert torch.allclose(tensor, expected[name], rtol=1e-12, atol=1e-15), name
        assert tensor.requires_grad == expected[name].requires_grad, name
    for name, part in model.named_modules():
        assert not part._forward_hooks, name
        assert not part._forward_pre_hooks, name
        assert part.training, name


def test_the_seed_decides() -> None:
    plans = []
    for seed in (0, 0, 1):
        pruner = pruner_of(resnet(), search={"seed": seed})
        pruner.compress()
        plans.append(pruner.plan().kept())
    assert plans[0] == plans[1] != plans[2]


def test_inside_a_schedule_what_is_masked_stays_masked() -> None:
    model, training = resnet(), Training()
    pruner = pruner_of(model, evaluator=evaluator_of(model, training), search={"mode": "gates-only", "steps": 10})
    scheduled = AGPPruner(pruner, interval_steps=STEPS, total_times=3)
    seen: list[dict[str, set[int]]] = []

    def look(steps: int) -> None:
        if steps % STEPS == 0:
            seen.append({name: set(kept) for name, kept in pruner.plan().kept().items()})

    training.after_step = look
    _, masks = scheduled.compress(max_steps=3 * STEPS + 1, max_epochs=None)
    assert len(seen) == 3
    for before, after in itertools.pairwise(seen):
        assert all(after[name] <= before[name] for name in before)
        assert after != before
    scheduled.unwrap_model()
    assert 0.4 < share_left(pruner, model) <= 0.5
    with torch.no_grad():
        small = copy.deepcopy(model)
        ModelSpeedup(small, data()[0], masks).speedup_model()
    assert count(small, data()[0]).macs < count(model, data()[0]).macs


def test_from_compressor_keeps_what_another_masked() -> None:
    model, x = resnet(), data()[0]
    first = L1NormPruner(model, [{"op_names": ["layer2.0.conv1"], "sparse_ratio": 0.5}], example_inputs=x)
    first.compress()
    config = [{"op_names_re": [r"layer[13].*conv1"], "sparse_ratio": 0.5}]
    options = SearchOptions(**{**QUICK, "mode": "gates-only"})
    second = PerformanceMaximizationPruner.from_compressor(first, config, STEPS, evaluator_of(model), options=options)
    _, masks = second.compress(max_steps=STEPS, max_epochs=None)
    with torch.no_grad():
        expected = model.eval()(x)
        second.unwrap_model()
        ModelSpeedup(model, x, masks).speedup_model()
        assert torch.allclose(model.eval()(x), expected, rtol=1e-9)
    assert model.layer2[0].conv1.out_channels == 8


def test_a_network_without_normalisation() -> None:
    model, x = Plain().double(), data()[0]
    pruner = pruner_of(model, [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.4}])
    _, masks = pruner.compress()
    with torch.no_grad():
        expected = model.eval()(x)
        pruner.unwrap_model()
        ModelSpeedup(model, x, masks).speedup_model()
        assert torch.allclose(model.eval()(x), expected, rtol=1e-9)


# -- what is refused, the network unchanged --------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "error", "match"),
    [
        ([{**CONVS[0], "sparse_ratio": 0.999}], BudgetError, "smallest width"),
        (
            [
                {"op_names": ["layer1.0.conv1"], "sparse_ratio": 0.5},
                {"op_names": ["layer2.0.conv1"], "sparse_ratio": 0.3},
            ],
            ConfigError,
            r"sparse_ratio is 0.3 of layer 'layer2.0.conv1' and 0.5 of 'layer1.0.conv1'",
        ),
        ([{"op_types": ["Conv2d"], "sparse_threshold": 0.1}], ConfigError, "sparse_threshold=0.1"),
        ([{**CONVS[0], "max_sparse_ratio": 0.6}], ConfigError, "max_sparse_ratio=0.6"),
        (
            [{"op_names": ["layer1.0.conv1", "layer2.0.conv1"], "sparse_ratio": 0.5, "dependency_group_id": "a"}],
            ConfigError,
            "dependency_group_id='a'",
        ),
    ],
)
def test_settings_that_do_not_fit(config: Any, error: type[Exception], match: str) -> None:
    model = resnet()
    state = state_of(model)
    with pytest.raises(error, match=match):
        pruner_of(model, config)
    assert_same(model, state)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"options": {"steps": 3}}, "options must be"),
        ({"cost": "latency"}, "cost must be"),
        ({"held_out": 1.0}, "held_out must be a share"),
        ({"training_steps": 1}, "at least 2"),
        ({"training_steps": 0}, "at least 1"),
        ({"evaluator": "mine"}, "NNI's evaluators"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        pruner_of(resnet(), **options)


def test_accuracy_in_percent_is_told_and_masks_stay() -> None:
    model = resnet()

    def percent(output: torch.Tensor, batch: Any) -> torch.Tensor:
        return 100 * (output.argmax(1) == batch[1]).float().mean()

    pruner = pruner_of(model, accuracy_fn=percent)
    with pytest.raises(SearchError, match="Percent"):
        pruner.compress()
    assert pruner.evaluator.model is None
    assert all(bool(m.all()) for targets in pruner.get_masks().values() for m in targets.values() if m is not None)
