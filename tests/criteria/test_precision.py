"""Mixed precision: scaled losses give the scores of unscaled ones, and half precision is summed up in float32."""

from typing import Any

import pytest
import torch
from gated import Batch, batches, loss_of
from networks_at_random import Branches, conv_bn, randomise
from torch import Tensor, nn

from nni_plugin import ChannelPruner, Channels, Iterative, MACs, count
from nni_plugin.adapters.data import create_loaders
from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.adapters.training import TrainingConfig, fit
from nni_plugin.criteria import OBS, TaylorFisher, TaylorFO
from nni_plugin.groups import ChannelGroup
from nni_plugin.methods import create_criterion
from nni_plugin.networks import resnet20

pytestmark = pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")

SCALE = 1024.0
GRADIENT_METHODS = (
    "taylor-fo",
    "taylor-fg",
    "taylor-fisher",
    "taylor-so",
    "taylor-so-row",
    "obd",
    "obs",
    "feature-map",
)


def network(width: int = 6, inner: int = 4) -> nn.Module:
    torch.manual_seed(0)
    inside = nn.Sequential(*conv_bn(width, inner), nn.ReLU(), *conv_bn(inner, width))
    layers = [*conv_bn(3, width), nn.ReLU(), Branches("add", [inside, nn.Identity()], nn.ReLU())]
    layers += [*conv_bn(width, inner), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inner, 3)]
    return randomise(nn.Sequential(*layers))


def prunable(model: nn.Module, data: list[Batch]) -> list[ChannelGroup]:
    return [group for group in find_groups(model, data[0][0]) if group.fixed is None]


def backward(model: nn.Module, batch: Batch, scale: float, create_graph: bool) -> float:
    """Go back from a scaled loss and unscale the gradients of parameters in place, as a gradient scaler does."""
    model.zero_grad()
    loss = loss_of(model, batch)
    (loss * scale).backward(create_graph=create_graph)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(scale)
    return float(loss.detach())


def scored(model: nn.Module, method: str, data: list[Batch], scale: float = 1.0, told: float | None = None) -> Any:
    criterion, groups = create_criterion(method), prunable(model, data)
    with criterion.collect(model, groups):
        for batch in data:
            backward(model, batch, scale, criterion.needs_graph)
            criterion.update(batch, loss_scale=scale if told is None else told)
    return torch.cat([criterion(group).double() for group in groups])


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_a_scaled_loss_gives_the_same_scores(method: str) -> None:
    model, data = network(), batches()
    expected = scored(model, method, data)
    assert len(expected.unique()) == len(expected)
    torch.testing.assert_close(scored(model, method, data, SCALE), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("method", ["taylor-fg", "taylor-fisher", "taylor-so"])
def test_the_scale_must_be_told(method: str) -> None:
    """What hooks and second passes see is scaled: without the scale these scores are others."""
    model, data = network(), batches()
    expected = scored(model, method, data)
    assert not torch.allclose(scored(model, method, data, SCALE, told=1.0), expected, rtol=0.1)


@pytest.mark.parametrize("method", ["taylor-fo", "taylor-fisher", "obs", "taylor-so-row"])
def test_a_pruner_is_told_the_scale(method: str) -> None:
    plans = []
    for scale in (1.0, SCALE):
        model, data = network(), batches(2)
        criterion = create_criterion(method)
        pruner = ChannelPruner(model, data[0][0], criterion, Channels(9), schedule=Iterative(3, 1), cut="never")
        with pruner:
            for batch in data:
                pruner.on_backward(backward(model, batch, scale, pruner.needs_graph), batch, loss_scale=scale)
                pruner.on_step()
        assert pruner.done
        plans.append(pruner.plan())
    assert plans[0].kept() == plans[1].kept()
    for once, scaled in zip(plans[0].groups, plans[1].groups, strict=True):
        assert scaled.score_range == pytest.approx(once.score_range, rel=1e-9)


# -- half precision ---------------------------------------------------------------------------------------------


def ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()


def spearman(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


@pytest.mark.parametrize("method", ["taylor-fo", "taylor-fg", "taylor-fisher", "feature-map", "obs"])
def test_autocast_ranks_channels_as_float32_does(method: str) -> None:
    model = network(24, 16).float()
    data = [(x.float(), y) for x, y in batches(2, size=32)]
    groups = prunable(model, data)
    found = []
    for enabled in (False, True):
        # Little damping: the more of it, the less an order hangs on the gradients, which are looked at here.
        criterion = OBS(damping=0.1) if method == "obs" else create_criterion(method)
        with criterion.collect(model, groups):
            for batch in data:
                model.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                    loss = loss_of(model, batch)
                loss.backward()
                criterion.update(batch)
        kept = criterion._gradients if isinstance(criterion, OBS) else list(criterion._sums.values())
        assert kept
        assert all(total.dtype == torch.float32 for total in kept)
        found.append(torch.cat([criterion(group) for group in groups]))
    assert len(found[0]) == 24 + 16 + 16
    assert not torch.equal(*found)
    assert spearman(*found) > 0.99


@pytest.mark.parametrize("kind", [TaylorFO, TaylorFisher])
def test_a_network_in_half_precision_is_summed_up_in_float32(kind: type) -> None:
    """In bfloat16 the sum of 300 equal numbers stops at 256 of them."""
    model = network().bfloat16()
    ((x, y),) = batches(1)
    data = [(x.bfloat16(), y)]
    groups = prunable(model, data)
    found = []
    for times in (1, 300):
        criterion = kind()
        with criterion.collect(model, groups):
            for _ in range(times):
                model.zero_grad()
                loss_of(model, data[0]).backward()
                criterion.update()
        found.append(torch.cat([criterion(group) for group in groups]))
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", ["taylor-fo", "taylor-fo-weight", "taylor-fo-weight-sum"])
def test_products_that_float16_cannot_hold(method: str) -> None:
    """Squares of weights times gradients lie below what float16 tells from zero."""
    model = network()
    groups = prunable(model, batches(1))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data.half())
        parameter.grad = (1e-3 * torch.randn(parameter.shape, generator=generator)).half().to(parameter)
    found = []
    for dtype in (torch.float64, torch.float16):
        for parameter in model.parameters():
            gradient, parameter.grad = parameter.grad, None
            parameter.data = parameter.data.to(dtype)
            assert gradient is not None
            parameter.grad = gradient.to(dtype)
        criterion = create_criterion(method)
        with criterion.collect(model, groups):
            criterion.update()
        found.append(torch.cat([criterion(group).double() for group in groups]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=0)


def test_pruning_while_training_in_bfloat16() -> None:
    """On digits, from the first minibatch to a network that is cut and goes on learning."""
    data = create_loaders("digits", batch_size=128, img_size=8, augment=False)
    torch.manual_seed(0)
    model = resnet20(width_mult=0.5)
    images = torch.zeros(1, 3, 8, 8)
    criterion = TaylorFisher()
    pruner = ChannelPruner(model, images, criterion, MACs(0.6), schedule=Iterative(20, 2))
    dense, seen = pruner.dense.cost.macs, []
    gather = criterion._accumulate

    def accumulate(statistics: dict[str, Tensor]) -> None:
        seen.extend(total.dtype for total in statistics.values())
        gather(statistics)

    criterion._accumulate = accumulate  # type: ignore[method-assign]
    history = fit(
        model, data, TrainingConfig(epochs=3, lr=0.1, amp="bf16"), callbacks=[pruner], device="cpu", progress=False
    )
    assert pruner.done
    assert pruner.parity is not None
    assert pruner.parity.ok
    assert count(model, images).macs <= 0.6 * dense
    assert model.pruning_plan == pruner.plan()
    assert set(seen) == {torch.float32}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert history[-1]["top1"] > 50  # one in ten by chance
