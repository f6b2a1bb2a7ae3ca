"""The feature-map criterion against its definition: means over positions, absolute values, layers that compare."""

import math

import pytest
import torch
from gated import Batch, batches, collected, gate_members, gradients_of, group_of, loss_of
from networks_at_random import Branches, conv_bn, randomise
from torch import Tensor, nn

from nni_plugin import MACs, plan_channels
from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.criteria import FeatureMap
from nni_plugin.errors import CriterionError
from nni_plugin.groups import ChannelGroup

POSITIONS = {"1": 36, "3.branches.0.1": 36, "3.branches.0.4": 36, "4": 16, "7": 4}


def model_with_maps_of_three_sizes() -> nn.Module:
    inside = nn.Sequential(*conv_bn(6, 4), nn.ReLU(), *conv_bn(4, 6))
    layers = [*conv_bn(3, 6), nn.ReLU(), Branches("add", [inside, nn.Identity()], nn.ReLU())]
    tail = [nn.Conv2d(6, 5, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(5, 5, 1), nn.SiLU()]
    return randomise(nn.Sequential(*layers, *tail, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)))


def prunable(model: nn.Module, example: Tensor) -> list[ChannelGroup]:
    return [group for group in find_groups(model, example) if group.fixed is None]


def joint_means(model: nn.Module, group: ChannelGroup, batch: Batch) -> Tensor:
    """Sum over writers of the mean over positions of `a dE_n/da`, by autograd; `[N, width]`."""
    return sum(
        (gradients_of(model, [m], batch, group.width) / POSITIONS[m.path] for m in gate_members(group)), torch.zeros(())
    )


@pytest.mark.parametrize("training", [False, True])
def test_mean_of_maps_absolute_per_sample(training: bool) -> None:
    model, data = model_with_maps_of_three_sizes().train(training), batches()
    groups = prunable(model, data[0][0])
    assert len(groups) == 4
    raw, normal = (collected(model, FeatureMap(normalize=n), data, groups) for n in (False, True))
    for group in groups:
        expected = torch.cat([joint_means(model, group, batch) for batch in data]).abs().mean(0)
        torch.testing.assert_close(raw(group), expected, rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(normal(group), expected / expected.square().sum().sqrt(), rtol=1e-9, atol=1e-14)
        assert math.isclose(float(normal(group).norm()), 1, rel_tol=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_absolute_of_every_position(training: bool) -> None:
    model, data = model_with_maps_of_three_sizes().train(training), batches(2)
    groups = prunable(model, data[0][0])
    each = collected(model, FeatureMap(absolute="position", normalize=False), data, groups)
    whole = collected(model, FeatureMap(normalize=False), data, groups)
    sums = {path: [] for path in POSITIONS}  # type: dict[str, list[Tensor]]
    handles = []
    for path in POSITIONS:

        def hook(_: nn.Module, __: object, y: Tensor, path: str = path) -> None:
            value = y.detach().clone()
            y.register_hook(lambda g: sums[path].append(len(g) * (value * g).abs().mean((2, 3))))

        handles.append(model.get_submodule(path).register_forward_hook(hook))
    for batch in data:
        loss_of(model, batch).backward()
    for handle in handles:
        handle.remove()
    for group in groups:
        expected = torch.stack([torch.cat(sums[m.path]).mean(0) for m in group.writers]).sum(0)
        torch.testing.assert_close(each(group), expected, rtol=1e-9, atol=1e-14)
        assert (each(group) >= whole(group) * (1 - 1e-12)).all()
    assert any((each(group) > 1.5 * whole(group)).any() for group in groups)


def test_a_repeated_map_has_the_same_mean() -> None:
    """Twice as many positions of the same content: the sum of gradients stays, the mean over positions halves."""
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)]
    model = randomise(nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), *tail))
    (batch,) = batches(1)
    (group,) = prunable(model, batch[0])
    wide = (torch.cat([batch[0], batch[0]], 3), batch[1])
    one, two = (collected(model, FeatureMap(normalize=False), [b], [group])(group) for b in (batch, wide))
    torch.testing.assert_close(two, one / 2, rtol=1e-10, atol=0)
    one, two = (collected(model, FeatureMap(), [b], [group])(group) for b in (batch, wide))
    torch.testing.assert_close(two, one, rtol=1e-10, atol=0)


@pytest.mark.parametrize("absolute", ["map", "position"])
def test_invariances(absolute: str) -> None:
    model, data = model_with_maps_of_three_sizes(), batches(1, size=6)
    groups = prunable(model, data[0][0])

    def scores(batches: list[Batch], factor: float = 1, with_groups: bool = True) -> Tensor:
        criterion = FeatureMap(absolute=absolute)  # type: ignore[arg-type]
        known = groups if with_groups else []
        collected(model, criterion, batches, known, lambda m, b: factor * loss_of(m, b))
        return torch.cat([criterion(group) for group in groups])

    ((x, y),) = data
    whole = scores(data)
    same = {
        "another factor": scores(data, 7.0),
        "minibatches": scores(list(zip(x.split([2, 4]), y.split([2, 4]), strict=True))),
        "doubled": scores([(torch.cat([x, x]), torch.cat([y, y]))]),
        "groups not known": scores(data, with_groups=False),
    }
    for found in same.values():
        torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-13)


def test_a_dead_group_is_not_divided_by_zero() -> None:
    model, (batch,) = model_with_maps_of_three_sizes(), batches(1)
    model[4].weight.data.zero_()
    model[4].bias.data.zero_()
    group = group_of(prunable(model, batch[0]), "4")
    assert torch.equal(collected(model, FeatureMap(), [batch], [group])(group), torch.zeros(5, dtype=torch.float64))


def test_misuse_is_refused() -> None:
    with pytest.raises(CriterionError, match="absolute"):
        FeatureMap(absolute="sum")  # type: ignore[arg-type]
    with pytest.raises(CriterionError, match="gates"):
        FeatureMap("batch")  # type: ignore[arg-type]


def test_planning() -> None:
    model, data = model_with_maps_of_three_sizes(), batches(2)
    plan = plan_channels(model, data[0][0], FeatureMap(), data, loss_of, MACs(0.6))
    assert plan.cost_after.macs <= 0.6 * plan.cost_before.macs
