"""Taylor-FG and Taylor-Fisher: identities of per-sample squares, and how well they predict what a removal costs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from gated import Batch, batches, collected, gate_members, gated, gradients_of, group_of, loss_of
from networks_at_random import Branches, conv_bn, randomise
from torch import Tensor, nn

from nni_plugin import MACs, plan_channels
from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.criteria import TaylorFG, TaylorFisher, TaylorFO
from nni_plugin.criteria.gate_criterion import GateCriterion
from nni_plugin.errors import CriterionError
from nni_plugin.groups import ChannelGroup


def residual() -> nn.Module:
    inside = nn.Sequential(*conv_bn(6, 4), nn.ReLU(), *conv_bn(4, 6))
    layers = [*conv_bn(3, 6), nn.ReLU(), Branches("add", [inside, nn.Identity()], nn.ReLU())]
    return randomise(nn.Sequential(*layers, nn.Conv2d(6, 5, 3), nn.SiLU(), *head(5)))


def head(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)]


def prunable(model: nn.Module, example: Tensor) -> list[ChannelGroup]:
    return [group for group in find_groups(model, example) if group.fixed is None]


def of(model: nn.Module, criterion: GateCriterion, data: list[Batch], groups: list[ChannelGroup]) -> dict[str, Tensor]:
    criterion = collected(model, criterion, data, groups)
    return {group.name: criterion(group) for group in groups}


def assert_scores(found: dict[str, Tensor], expected: dict[str, Tensor], factor: float = 1) -> None:
    assert found.keys() == expected.keys()
    for name, scores in expected.items():
        torch.testing.assert_close(
            found[name], factor * scores, rtol=1e-9, atol=1e-13 * float(scores.abs().max()) * factor
        )


@pytest.fixture(params=[TaylorFG, TaylorFisher])
def kind(request: pytest.FixtureRequest) -> type[GateCriterion]:
    return request.param


def test_scores_are_those_of_the_gradients_of_every_sample() -> None:
    model, data = residual(), batches()
    groups = prunable(model, data[0][0])
    full, fisher, signed = (of(model, c, data, groups) for c in (TaylorFG(), TaylorFisher(), TaylorFisher(signed=True)))
    changes = collected(model, TaylorFisher(), data, groups)
    for group in groups:
        g = torch.cat([gradients_of(model, gate_members(group), batch, group.width) for batch in data])
        change = 0.5 * g.square().mean(0) - g.mean(0)
        assert_scores({"": full[group.name]}, {"": g.square().mean(0)})
        assert_scores({"": fisher[group.name]}, {"": change.square()})
        assert_scores({"": signed[group.name]}, {"": change})
        assert_scores({"": changes.loss_changes(group)}, {"": change})
    assert TaylorFG().loss_changes.__func__ is GateCriterion.loss_changes
    assert collected(model, TaylorFG(), data, groups).loss_changes(groups[0]) is None


def test_squares_of_samples_are_at_least_the_square_of_their_mean() -> None:
    model, (batch,) = residual(), batches(1, size=6)
    groups = prunable(model, batch[0])
    full, first = of(model, TaylorFG(), [batch], groups), of(model, TaylorFO(), [batch], groups)
    for group in groups:
        assert (full[group.name] >= first[group.name] * (1 - 1e-12)).all()
        assert (full[group.name] > 1.01 * first[group.name]).any()
    single = (batch[0][:1], batch[1][:1])
    assert_scores(of(model, TaylorFG(), [single], groups), of(model, TaylorFO(), [single], groups))


def test_a_duplicated_batch_changes_nothing(kind: type[GateCriterion]) -> None:
    model, data = residual(), batches()
    groups = prunable(model, data[0][0])
    once = of(model, kind(), data, groups)
    assert_scores(of(model, kind(), [(torch.cat([x, x]), torch.cat([y, y])) for x, y in data], groups), once)
    assert_scores(of(model, kind(), [*data, *data], groups), once)


def test_the_size_of_minibatches_does_not_matter(kind: type[GateCriterion]) -> None:
    model, data = residual(), batches(1, size=7)
    groups = prunable(model, data[0][0])
    whole = of(model, kind(), data, groups)
    ((x, y),) = data
    for parts in ([3, 4], [5, 2], [1] * 7):
        split = list(zip(x.split(parts), y.split(parts), strict=True))
        assert_scores(of(model, kind(), split, groups), whole)


def test_a_scaled_loss() -> None:
    model, data = residual(), batches()
    groups = prunable(model, data[0][0])
    once, thrice = (
        {group.name: criterion(group) for group in groups}
        for criterion in (
            collected(model, TaylorFG(), data, groups, lambda m, b, c=c: c * loss_of(m, b)) for c in (1, 3)
        )
    )
    assert_scores(thrice, once, 9)


@pytest.mark.parametrize("copies", [2, 3])
def test_one_gate_over_identical_contributions(copies: int) -> None:
    """B identical branches with one output: the gradient is B times one branch's, its square B squared."""
    first = randomise(nn.Sequential(*conv_bn(4, 6), nn.ReLU()))
    twins = [copy.deepcopy(first) for _ in range(copies)]
    model = randomise(nn.Sequential(nn.Sequential(*conv_bn(3, 4)), Branches("add", twins), *head(6)))
    for twin in twins:
        twin.load_state_dict(first.state_dict())
    (batch,) = batches(1)
    group = group_of(find_groups(model, batch[0]), "1.branches.0.0")
    assert len(group.writers) == copies
    one = gradients_of(model, group.writers[:1], batch, 6)
    assert_scores(of(model, TaylorFG(), [batch], [group]), {group.name: one.square().mean(0)}, copies**2)


@pytest.mark.parametrize("gates", ["auto", "input"])
def test_scores_are_the_same_with_and_without_groups(kind: type[GateCriterion], gates: str) -> None:
    model, data = residual(), batches()
    groups = prunable(model, data[0][0])
    known, unknown = collected(model, kind(gates), data, groups), collected(model, kind(gates), data)  # type: ignore[arg-type]
    for group in groups:
        assert_scores({"": unknown(group)}, {"": known(group)})


def test_as_importance_of_a_stock_pruner(kind: type[GateCriterion]) -> None:
    tp = pytest.importorskip("torch_pruning")
    model, data = residual(), batches()
    groups = prunable(model, data[0][0])
    criterion = collected(model, kind(), data)
    order = {group.name: criterion(group).argsort().tolist() for group in groups}
    pruner = tp.pruner.BasePruner(
        model, data[0][0], importance=criterion, pruning_ratio=0.2, ignored_layers=[model[-1]], global_pruning=False
    )
    seen = {}
    for host in pruner.step(interactive=True):
        seen[ChannelGroup.from_host(host).name] = sorted(int(i) for i in host[0].idxs)
    assert seen.keys() == order.keys()
    for name, removed in seen.items():
        assert 0 < len(removed) < len(order[name])
        assert removed == sorted(order[name][: len(removed)])


def test_planning_leaves_no_hook() -> None:
    model, data = residual(), batches()
    plan = plan_channels(model, data[0][0], TaylorFisher(), data, loss_of, MACs(0.6))
    assert plan.cost_after.macs <= 0.6 * plan.cost_before.macs
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_state_goes_on_where_it_was(kind: type[GateCriterion]) -> None:
    model, data = residual(), batches(4)
    groups = prunable(model, data[0][0])
    whole = of(model, kind(), data, groups)
    half, other = collected(model, kind(), data[:1], groups), kind()
    other.load_state_dict(half.state_dict())
    assert_scores(of(model, other, data[1:], groups), whole)
    assert other.samples == 16


def test_bn_gates_are_asked_of_layers_that_have_them(kind: type[GateCriterion]) -> None:
    model, data = residual(), batches(1)
    with pytest.raises(CriterionError, match="without an affine normalisation"):
        collected(model, kind("bn"), data, prunable(model, data[0][0]))


# -- against the exact loss change ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, list[Batch]]:
    """A small residual network that has learned to tell which of three patterns an image holds, half in noise."""
    torch.manual_seed(0)
    patterns = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    y = torch.arange(192) % 3
    x = patterns[y] * torch.rand(192, 1, 1, 1, dtype=torch.float64) + 0.8 * torch.randn(192, 3, 6, 6).double()
    inside = nn.Sequential(*conv_bn(8, 6), nn.ReLU(), *conv_bn(6, 8))
    layers = [*conv_bn(3, 8), nn.ReLU(), Branches("add", [inside, nn.Identity()], nn.ReLU())]
    model = nn.Sequential(*layers, nn.Conv2d(8, 10, 3), nn.ReLU(), *head(10)).double().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(90):
        part = torch.arange(192).reshape(6, 32)[step % 6]
        optimizer.zero_grad()
        F.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
    return model.eval(), [(x, y)]


def exact_changes(model: nn.Module, data: list[Batch], group: ChannelGroup) -> Tensor:
    """The naive Oracle: the loss with each channel's gate closed, one forward pass a channel."""
    (batch,) = data
    with torch.no_grad():
        whole = loss_of(model, batch)
        changes = []
        for channel in range(group.width):
            z = torch.ones(group.width, dtype=torch.float64)
            z[channel] = 0
            with gated(model, gate_members(group), z):
                changes.append(loss_of(model, batch) - whole)
    return torch.stack(changes)


def spearman(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([a.argsort().argsort().double(), b.argsort().argsort().double()])
    return float(torch.corrcoef(ranks)[0, 1])


def test_the_fisher_ranks_channels_as_the_oracle_does(trained: tuple[nn.Module, list[Batch]]) -> None:
    model, data = trained
    groups = prunable(model, data[0][0])
    fisher, first = collected(model, TaylorFisher(), data, groups), collected(model, TaylorFO(), data, groups)
    exact = torch.cat([exact_changes(model, data, group) for group in groups])
    predicted = torch.cat([fisher.loss_changes(group) for group in groups])
    assert len(exact) == 24
    assert spearman(predicted, exact) > 0.8
    scores = torch.cat([fisher(group) for group in groups])
    assert spearman(scores, exact.square()) > 0.8
    assert spearman(scores, exact.square()) > spearman(torch.cat([first(group) for group in groups]), exact.square())
