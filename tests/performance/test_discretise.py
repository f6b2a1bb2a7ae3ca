"""From gates to channels: the deterministic rule, and a budget met by repair in the order of the gates' values."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks_at_random import Recipe, networks
from search_task import CASES, prunable
from torch import nn

from nni_plugin.errors import BudgetError
from nni_plugin.performance import ArchitectureCost, ArchitectureLayout
from nni_plugin.performance.discretise import Discretiser
from nni_plugin.performance.gates import EVEN


def plain() -> tuple[nn.Module, torch.Tensor]:
    """Two groups, of 8 and 6 channels, the second of which costs much less a channel."""
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32, 2)), torch.zeros(1, 3, 4, 4)


def discretiser(limit: float = 1e12, **options) -> tuple[Discretiser, ArchitectureCost]:
    model, example = plain()
    layout = ArchitectureLayout([group for group in prunable(model, example) if group.name in ("0", "2")])
    cost = ArchitectureCost(model, example, layout)
    return Discretiser(layout, lambda kept: cost.predict(kept).cost.macs, limit, **options), cost


def test_the_rule_keeps_what_is_as_likely_open_as_closed() -> None:
    """With a budget that just these gates meet, nothing is repaired."""
    everything, cost = discretiser()
    logits = torch.linspace(-1, 1, everything.layout.size, dtype=torch.float64)[torch.randperm(14)]
    rule = everything.layout.kept((logits + 0.1 >= EVEN).double())
    assert 0 < sum(map(len, rule.values())) < 14
    exact, _ = discretiser(cost.predict(rule).cost.macs)
    kept = exact.deterministic(logits, 0.1)
    assert {name: index.tolist() for name, index in kept.items()} == {n: index.tolist() for n, index in rule.items()}


def test_too_much_is_cut_from_the_lowest_gates_on() -> None:
    _, cost = discretiser()
    dense = cost.dense.cost.macs
    values = torch.arange(14.0)  # the first group is the lowest
    for limit in (0.9 * dense, 0.6 * dense, 0.4 * dense):
        kept = discretiser(limit)[0].repair(values, torch.ones(14, dtype=torch.bool))
        first = kept["0"].tolist()
        assert first == list(range(8 - len(first), 8))
        assert len(kept["2"]) == 6 or len(first) == 1
        assert cost.predict(kept).cost.macs <= limit


def test_room_is_filled_with_the_highest_closed_gates() -> None:
    _, cost = discretiser()
    dense = cost.dense.cost.macs
    opened = torch.zeros(14, dtype=torch.bool)
    opened[[0, 8]] = True  # the lowest of each group, by value
    values = torch.arange(14.0)
    kept = discretiser(0.7 * dense)[0].repair(values, opened)
    assert kept["0"][0] == 0  # what was open stays open
    assert kept["2"][0] == 0
    added = kept["0"].tolist()[1:]
    assert added == list(range(8 - len(added), 8))
    assert cost.predict(kept).cost.macs <= 0.7 * dense


def test_no_cheap_channel_is_left_out_that_would_fit() -> None:
    """A channel of the first group costs far more than one of the second."""
    _, cost = discretiser()
    values = torch.cat([torch.arange(8.0) + 10, torch.arange(6.0)])
    for limit in range(int(0.3 * cost.dense.cost.macs), cost.dense.cost.macs, 97):
        kept = discretiser(limit)[0].repair(values, torch.ones(14, dtype=torch.bool))
        assert cost.predict(kept).cost.macs <= limit
        for name, width in (("0", 8), ("2", 6)):
            more = next((i for i in reversed(range(width)) if i not in kept[name].tolist()), None)
            if more is not None:
                wider = {**kept, name: torch.cat([kept[name], torch.tensor([more])]).sort().values}
                assert cost.predict(wider).cost.macs > limit


def test_widths_are_rounded_and_never_below_the_minimum() -> None:
    _, cost = discretiser()
    values = torch.randn(14)
    kept = discretiser(0.6 * cost.dense.cost.macs, round_to=4)[0].repair(values, values > 0)
    assert len(kept["0"]) in (4, 8)
    assert len(kept["2"]) in (4, 6)
    kept = discretiser(0.5 * cost.dense.cost.macs, min_channels=3)[0].repair(-torch.arange(14.0), values > 9)
    assert min(len(kept["0"]), len(kept["2"])) >= 3


def test_out_of_reach() -> None:
    _, cost = discretiser()
    with pytest.raises(BudgetError, match=r"smallest width .* remain \(0\.\d+ of the dense network\)"):
        discretiser(0.01 * cost.dense.cost.macs)
    with pytest.raises(BudgetError, match="min_channels"):
        discretiser(0.3 * cost.dense.cost.macs, min_channels=6)


@CASES
@given(networks(most=3), st.integers(0, 2**16), st.booleans())
def test_any_network_meets_any_limit_that_can_be_met(recipe: Recipe, seed: int, params: bool) -> None:
    model, example = recipe.build(), recipe.inputs()
    layout = ArchitectureLayout(prunable(model, example))
    cost = ArchitectureCost(model, example, layout)

    def measure(kept: dict[str, torch.Tensor]) -> float:
        found = cost.predict(kept).cost
        return found.params if params else found.macs

    least = measure({g.name: (g.unit == g.unit[0]).nonzero().flatten() for g in layout.groups})
    whole = measure({})
    generator = torch.Generator().manual_seed(seed)
    limit = least + float(torch.rand(1, generator=generator)) * (whole - least)
    values = torch.randn(layout.size, generator=generator)
    opened = torch.rand(layout.size, generator=generator) < 0.5
    chosen = Discretiser(layout, measure, max(limit, least))
    kept = chosen.repair(values, opened)
    assert measure(kept) <= max(limit, least)
    assert all(len(kept[group.name]) >= 1 for group in layout.groups)
    again = chosen.repair(values, opened)
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    # A legal network: units stay together, and the vector says just this.
    assert all(torch.equal(layout.kept(layout.architecture(kept))[name], kept[name]) for name in kept)


def test_room_that_is_left_goes_to_the_highest_gate_that_fits() -> None:
    """Ten for a channel of the first group, one for those of the two others."""
    model = nn.Sequential(
        *[nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.ReLU()]
    )
    model.extend([nn.Conv2d(6, 2, 1), nn.Flatten(), nn.Linear(32, 2)])
    layout = ArchitectureLayout([g for g in prunable(model, torch.zeros(1, 3, 4, 4)) if g.name in ("0", "2", "4")])

    def measure(kept: dict[str, torch.Tensor]) -> float:
        return 10 * len(kept["0"]) + len(kept["2"]) + len(kept["4"])

    values = torch.cat([torch.arange(8.0) + 20, torch.arange(6.0), torch.arange(6.0) + 10])
    kept = Discretiser(layout, measure, 75).repair(values, torch.ones(20, dtype=torch.bool))
    # By order all of the last two groups go but one channel each, then one of the first: 72. Then there is room for 3.
    assert {name: index.tolist() for name, index in kept.items()} == {
        "0": [1, 2, 3, 4, 5, 6, 7],
        "2": [5],
        "4": [2, 3, 4, 5],
    }
