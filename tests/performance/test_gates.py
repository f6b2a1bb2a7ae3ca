"""Gates: their probability, their gradient, and that gates of 0 and 1 are the masked and the compact network."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks_at_random import Recipe, assert_same, networks, state_of
from search_task import CASES, EXAMPLE, batches, hooks_on, loss_of, prunable, small_resnet
from torch import nn

from nni_plugin.adapters.torch_pruning import apply_plan, find_groups
from nni_plugin.errors import GraphError, SearchError
from nni_plugin.masks import mask_plan
from nni_plugin.performance import ArchitectureLayout, DifferentiableGates, gated_groups
from nni_plugin.performance.gates import EVEN, gumbel, keep_probability
from nni_plugin.performance.hooks import GateHooks, sound_gates
from nni_plugin.plan import GroupPlan, PruningPlan


def gates_of(model: nn.Module, example: torch.Tensor, **options) -> DifferentiableGates:
    return DifferentiableGates(prunable(model, example), dtype=torch.float64, **options)


def test_keep_probability() -> None:
    """The numbers of the specification, and what 40,000 samples say."""
    logits = torch.tensor([0.0, -2.0, -3.0, -4.0, -5.0], dtype=torch.float64)
    assert keep_probability(logits, 3.0).tolist() == pytest.approx([1.0, 0.934, 0.632, 0.308, 0.127], abs=5e-4)
    assert float(keep_probability(torch.tensor(EVEN, dtype=torch.float64), 0.0)) == pytest.approx(0.5, abs=1e-15)
    noise = gumbel(torch.rand(40_000, 1, dtype=torch.float64))
    opened = (torch.sigmoid((logits + noise + 3.0) / 0.4) >= 0.5).double().mean(0)
    assert opened.tolist() == pytest.approx(keep_probability(logits, 3.0).tolist(), abs=0.01)


def test_noise_is_finite_at_both_ends() -> None:
    ends = gumbel(torch.tensor([0.0, 1 - 2**-53, 1.0], dtype=torch.float64))
    assert torch.isfinite(ends).all()
    assert (ends.diff() > 0).all()


def test_samples_are_hard_and_their_gradient_is_the_soft_one() -> None:
    gates = gates_of(small_resnet(), EXAMPLE, seed=3, offset=-0.2)
    sample = gates(torch.Generator().manual_seed(5))
    assert set(sample.detach().round(decimals=12).tolist()) == {0.0, 1.0}
    weights = torch.randn(gates.layout.size, dtype=torch.float64)
    (hard,) = torch.autograd.grad((weights * sample).sum(), gates.logits)

    gates.straight_through = False
    soft = gates(torch.Generator().manual_seed(5))  # the same noise
    assert torch.equal(soft >= 0.5, (sample >= 0.5) & (soft >= 0.5))
    expected = weights * soft.detach() * (1 - soft.detach()) / gates.temperature
    assert torch.allclose(hard, expected, rtol=1e-12)
    soft = soft.detach()
    assert 0 < float(soft.min()) < float(soft.max()) < 1


def test_a_group_keeps_its_largest_gate() -> None:
    gates = gates_of(small_resnet(), EXAMPLE, offset=-50.0)
    sample = gates(torch.Generator().manual_seed(0)).detach()
    assert [float(part.sum()) for part in gates.layout.split(sample).values()] == [1.0] * len(gates.layout.groups)


def test_a_seed_gives_gates_whatever_was_drawn_before() -> None:
    model = small_resnet()
    first = gates_of(model, EXAMPLE, seed=1)
    torch.rand(7)
    assert torch.equal(first.logits, gates_of(model, EXAMPLE, seed=1).logits)
    assert not torch.equal(first.logits, gates_of(model, EXAMPLE, seed=2).logits)


def test_inner_groups_by_default() -> None:
    groups = find_groups(small_resnet(), EXAMPLE)
    assert [group.name for group in gated_groups(groups)] == [f"layer{i}.0.conv1" for i in (1, 2, 3)]
    skips = [group.name for group in gated_groups(groups, "skip-only")]
    assert "conv1" in skips
    assert sorted(skips + [g.name for g in gated_groups(groups)]) == sorted(g.name for g in gated_groups(groups, "all"))
    with pytest.raises(GraphError, match="select"):
        gated_groups(groups, "inner")
    with pytest.raises(GraphError, match="No group of channels can have gates"):
        gated_groups([group.freeze("for a test") for group in groups])


@settings(CASES, max_examples=60)
@given(networks(), st.integers(0, 2**16))
def test_hard_gates_are_the_masked_and_the_compact_network(recipe: Recipe, seed: int) -> None:
    model, example = recipe.build(), recipe.inputs()
    gates = gates_of(model, example, seed=seed, init_std=2.0, offset=0.0)
    sample = gates(torch.Generator().manual_seed(seed)).detach().round()
    before = state_of(model)
    with gates.applied(model, sample), torch.no_grad():
        got = model(example)
    assert_same(model, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sound_gates(model, gates.layout.groups, example) == gates.layout.groups
    assert_same(model, before)

    kept = gates.layout.kept(sample)
    plan = PruningPlan(tuple(GroupPlan(g.name, g.width, tuple(kept[g.name].tolist())) for g in gates.layout.groups))
    with torch.no_grad():
        masked = mask_plan(copy.deepcopy(model), plan, gates.layout.groups)(example)
        compact = apply_plan(copy.deepcopy(model), plan, example)(example)
    assert torch.allclose(got, masked, rtol=1e-9, atol=1e-12)
    assert torch.allclose(got, compact, rtol=1e-9, atol=1e-12)
    assert torch.equal(gates.layout.architecture(kept).double(), sample)


def test_the_gradient_is_that_of_the_loss() -> None:
    """Against differences of the loss between soft gates."""
    model = small_resnet().double()
    images, labels = batches()[0]
    gates = gates_of(model, EXAMPLE.double())
    point = torch.rand(gates.layout.size, dtype=torch.float64, requires_grad=True)

    def loss(architecture: torch.Tensor) -> torch.Tensor:
        with gates.applied(model, architecture):
            return loss_of(model, (images.double(), labels))

    (gradient,) = torch.autograd.grad(loss(point), point)
    for gate in (0, 20, gates.layout.size - 1):
        moved = torch.zeros_like(point)
        moved[gate] = 1e-7
        difference = (loss(point + moved) - loss(point - moved)).detach() / 2e-7
        assert float(difference) == pytest.approx(float(gradient[gate]), rel=1e-4, abs=1e-9)


def test_nothing_stays_on_the_network_also_after_an_error() -> None:
    model = small_resnet().train()
    model.bn1.eval()
    model.fc.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    before = state_of(model)
    gates = DifferentiableGates(gated_groups(find_groups(model, EXAMPLE)))
    with gates.applied(model, torch.ones(gates.layout.size)):
        assert hooks_on(model) == len(gates.layout.groups)
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        model(EXAMPLE)
    with pytest.raises(RuntimeError), gates.applied(model, torch.ones(gates.layout.size)):
        model(torch.zeros(2, 7, 8, 8))
    assert hooks_on(model) == 0
    assert [module.training for module in model.modules()] == modes
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["fc.weight"]
    assert_same(model, before)


class Direct(nn.Module):
    """Channels that are also read by something that is no layer, and that the graph does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.fc = nn.Linear(4, 3)

        self.before = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(torch.relu(self.before(x))))
        return self.fc(self.second(x).mean((2, 3))) + x.detach().mean((1, 2, 3))[:, None]


def test_channels_read_by_no_layer_stay_whole() -> None:
    model, example = Direct(), torch.randn(2, 3, 5, 5)
    groups = [group for group in find_groups(model, example) if group.name in ("first", "before")]
    with pytest.warns(UserWarning, match="'first' is left whole: its channels are read by something else"):
        assert [group.name for group in sound_gates(model, groups, example)] == ["before"]
    with pytest.warns(UserWarning, match="'first'"), pytest.raises(GraphError, match="nothing to search"):
        sound_gates(model, groups[:1], example)


def test_channels_whose_reader_is_not_called_stay_whole() -> None:
    class Borrowed(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self[1](torch.relu(self[0](x))))
            return nn.functional.conv2d(x, self[2].weight, self[2].bias).mean((2, 3))

    model, example = Borrowed(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 3, 1)), torch.randn(2, 3, 5, 5)
    called = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 3, 1))
    # Torch-Pruning does not find the readers of such weights, so the groups are those of the network as it seems.
    names = {"0": "0", "2": "1", "4": "2"}
    groups = [
        replace(
            group,
            name=names[group.name],
            members=tuple(
                replace(
                    member,
                    path=names[member.path],
                    slices=tuple(replace(p, tensor=names[p.tensor[0]] + p.tensor[1:]) for p in member.slices),
                )
                for member in group.members
            ),
        )
        for group in prunable(called, example)
    ]
    with pytest.warns(UserWarning, match="'1' is left whole: the forward pass does not call '2'"):
        assert [group.name for group in sound_gates(model, groups, example)] == ["0"]


def test_readers_that_are_not_called_are_told() -> None:
    """Each forward pass anew: the first one came by every reader."""
    model = small_resnet()
    layout = ArchitectureLayout(gated_groups(prunable(model, EXAMPLE)))
    with GateHooks(model, layout) as hooks:
        with pytest.raises(SearchError, match="none were set"):
            model(EXAMPLE)
        for part in (model, model.layer1):
            hooks.set(torch.ones(layout.size))
            part(torch.zeros(2, 1 if part is model else 16, 8, 8))
            if part is model:
                hooks.check_reached()
        with pytest.raises(GraphError, match=r"did not call layer 'layer2\.0\.conv2'"):
            hooks.check_reached()


def test_gates_that_are_not_numbers_are_told() -> None:
    gates = gates_of(small_resnet(), EXAMPLE)
    gates.logits.data[-1] = float("nan")
    with pytest.raises(SearchError, match=r"Gates of 1 groups are not finite, first 'fc|first 'layer3"):
        gates()
    with pytest.raises(SearchError, match="temperature"):
        gates_of(small_resnet(), EXAMPLE, temperature=0.0)


def test_tied_channels_share_a_gate() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.ReLU(),
        nn.Conv2d(8, 5, 1),
        nn.Flatten(),
        nn.Linear(5, 2),
    )
    layout = ArchitectureLayout(prunable(model, torch.randn(2, 3, 3, 3)))
    assert layout.size < layout.channels
    values = torch.arange(layout.size, dtype=torch.float64)
    expanded = layout.expand(values)
    for group in layout.groups:
        mine = expanded[layout.channel_slices[group.name]] - layout.slices[group.name].start
        assert mine.tolist() == group.unit.tolist()
    assert layout.unit_sizes.sum() == layout.channels
