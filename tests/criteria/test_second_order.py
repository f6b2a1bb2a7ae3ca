"""Taylor-SO and OBD against autograd's Hessian over explicit gates, and against exact loss changes."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gated import Batch, batches, collected, gated, group_of, loss_of, member_of
from hypothesis import given, settings
from networks_at_random import Branches, Recipe, Twice, conv_bn, networks, randomise
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nni_plugin import MACs, PruningPlan, plan_channels
from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.criteria import OBD, TaylorFO, TaylorSO
from nni_plugin.criteria.base import Criterion
from nni_plugin.criteria.gate_criterion import GateCriterion
from nni_plugin.criteria.gates import GateLayout
from nni_plugin.criteria.second_order import GateHessian
from nni_plugin.errors import CriterionError
from nni_plugin.groups import ChannelGroup

pytestmark = pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")


def head(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)]


def plain() -> nn.Module:
    layers = [*conv_bn(3, 5), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(64, 4), nn.Tanh()]
    return randomise(nn.Sequential(*layers, nn.Linear(4, 3)))


def residual() -> nn.Module:
    inside = nn.Sequential(*conv_bn(4, 3), nn.SiLU(), *conv_bn(3, 4))
    return randomise(nn.Sequential(*conv_bn(3, 4), nn.ReLU(), Branches("add", [inside, nn.Identity()]), *head(4)))


def depthwise() -> nn.Module:
    layers = [*conv_bn(3, 4, 1), nn.SiLU(), *conv_bn(4, 4, 3, 4), nn.ReLU6(), nn.Conv2d(4, 6, 3, groups=2), nn.SiLU()]
    return randomise(nn.Sequential(*layers, *head(6)))


def twice() -> nn.Module:
    return randomise(nn.Sequential(nn.Conv2d(3, 4, 3), Twice(nn.Conv2d(4, 4, 3, padding=1)), *head(4)))


def chained() -> nn.Module:
    """Convolutions read under one gate and written under another, whose weights carry the product of both."""
    bare = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.SiLU(), nn.Conv2d(4, 6, 3, groups=2), nn.SiLU()]
    return randomise(nn.Sequential(*bare, nn.Flatten(), nn.Linear(24, 3)))


NETWORKS = [plain, residual, depthwise, twice, chained]


@pytest.fixture(params=[False, True], ids=["eval", "train"])
def mode(request: pytest.FixtureRequest) -> bool:
    return request.param


def prunable(model: nn.Module, example: Tensor) -> list[ChannelGroup]:
    return [group for group in find_groups(model, example) if group.fixed is None]


def members_of(model: nn.Module, group: ChannelGroup, gates: str = "auto") -> Any:
    return TaylorFO(gates)._members(model, group)  # type: ignore[arg-type]


def exact(
    model: nn.Module,
    groups: list[ChannelGroup],
    batch: Batch,
    gates: str = "auto",
    loss: Callable[[nn.Module, Batch], Tensor] = loss_of,
) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """Return the loss as a function of all gates, and its gradient and Hessian by autograd."""

    def of_gates(z: Tensor) -> Tensor:
        first, contexts = 0, []
        for group in groups:
            contexts.append(gated(model, members_of(model, group, gates), z, first))
            contexts[-1].__enter__()
            first += group.width
        value = loss(model, batch)
        for context in contexts:
            context.__exit__(None, None, None)
        return value

    ones = torch.ones(sum(group.width for group in groups), dtype=torch.float64)
    gradient = torch.autograd.functional.jacobian(of_gates, ones)
    return of_gates, gradient, torch.autograd.functional.hessian(of_gates, ones)


def hessian_of(model: nn.Module, groups: list[ChannelGroup], batch: Batch, gates: str = "auto") -> GateHessian:
    model.zero_grad()
    loss_of(model, batch).backward(create_graph=True)
    return GateHessian(model, GateLayout([(group, members_of(model, group, gates)) for group in groups]))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11 * float(expected.abs().max()))


def flat(criterion: GateCriterion, groups: list[ChannelGroup]) -> Tensor:
    return torch.cat([criterion(group) for group in groups])


# -- the Hessian ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", NETWORKS)
def test_products_are_those_of_the_hessian_over_explicit_gates(build: Callable[[], nn.Module], mode: bool) -> None:
    model, (batch,) = build().train(mode), batches(1)
    groups = prunable(model, batch[0])
    _, gradient, expected = exact(model, groups, batch)
    assert float((expected - expected.diag().diag()).abs().max()) > 1e-4
    hessian = hessian_of(model, groups, batch)
    close(hessian.gradient, gradient)
    close(torch.stack([hessian.times(row) for row in torch.eye(len(gradient), dtype=torch.float64)]), expected)
    close(hessian.diagonal(), expected.diagonal())
    close(hessian.row_sums(), expected.sum(1))


def test_the_network_in_question_has_weights_under_two_gates() -> None:
    """Without the curvature of `w(z)` itself the mixed terms would be wrong, though the diagonal would not."""
    model, (batch,) = chained(), batches(1)
    groups = prunable(model, batch[0])
    chosen = [{(m.path, m.axis) for m in members_of(model, group)} for group in groups]
    assert chosen == [{("3", "in")}, {("3", "out")}]
    assert (
        float((model[3].weight.detach() * torch.autograd.grad(loss_of(model, batch), model[3].weight)[0]).abs().max())
        > 1e-4
    )


@pytest.mark.parametrize("gates", ["weight", "input"])
def test_gates_elsewhere(gates: str, mode: bool) -> None:
    for build in (plain, residual, depthwise):
        model, (batch,) = build().train(mode), batches(1)
        groups = prunable(model, batch[0])
        _, gradient, expected = exact(model, groups, batch, gates)
        hessian = hessian_of(model, groups, batch, gates)
        close(hessian.gradient, gradient)
        close(torch.stack([hessian.times(row) for row in torch.eye(len(gradient), dtype=torch.float64)]), expected)


@settings(derandomize=True, database=None, deadline=None, max_examples=15)
@given(networks(most=2))
def test_random_networks(recipe: Recipe) -> None:
    model, batch = recipe.build().train(recipe.seed % 2 == 0), (recipe.inputs(3), torch.tensor([0, 1, 2]))
    groups = prunable(model, batch[0])
    if groups:
        _, gradient, expected = exact(model, groups, batch)
        hessian, v = hessian_of(model, groups, batch), torch.randn(len(gradient), dtype=torch.float64)
        scale = max(float(expected.abs().max()), 1e-3)
        torch.testing.assert_close(hessian.gradient, gradient, rtol=1e-8, atol=1e-11)
        torch.testing.assert_close(hessian.times(v), expected @ v, rtol=1e-7, atol=1e-9 * scale)


def test_random_signs_estimate_the_diagonal_without_bias() -> None:
    model, (batch,) = residual(), batches(1)
    groups = prunable(model, batch[0])
    _, _, expected = exact(model, groups, batch)
    off = expected - expected.diag().diag()
    hessian, vectors = hessian_of(model, groups, batch), 600
    deviation = (off.square().sum(1) / vectors).sqrt()
    found = hessian.estimated_diagonal(vectors, "0")
    assert ((found - expected.diagonal()).abs() <= 4 * deviation + 1e-12).all()
    assert ((found - expected.diagonal()).abs() > 0.05 * deviation).any()
    close(found, hessian.estimated_diagonal(vectors, "0"))
    single = torch.stack([hessian.estimated_diagonal(1, str(seed)) for seed in range(200)])
    torch.testing.assert_close(single.std(0), off.square().sum(1).sqrt(), rtol=0.3, atol=1e-12)


# -- scores -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", NETWORKS)
def test_scores_are_those_of_the_exact_hessian(build: Callable[[], nn.Module], mode: bool) -> None:
    model, data = build().train(mode), batches(2)
    groups = prunable(model, data[0][0])
    parts = [exact(model, groups, batch)[1:] for batch in data]
    diagonal = torch.stack([0.5 * h.diagonal() - g for g, h in parts])
    row = torch.stack([g - 0.5 * h.sum(1) for g, h in parts])
    second = collected(model, TaylorSO(samples=None), data, groups)
    close(flat(second, groups), diagonal.square().mean(0))
    close(torch.cat([second.loss_changes(group) for group in groups]), diagonal.mean(0))
    rows = collected(model, TaylorSO(hessian="row"), data, groups)
    close(flat(rows, groups), row.square().mean(0))
    assert rows.loss_changes(groups[0]) is None
    curvature = torch.stack([0.5 * h.diagonal() for _, h in parts]).mean(0)
    close(flat(collected(model, OBD(samples=None, signed=True), data, groups), groups), curvature)
    close(flat(collected(model, OBD(samples=None), data, groups), groups), curvature.abs())


def quadratic_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch[0]), F.one_hot(batch[1], 3).double())


def test_for_a_quadratic_loss_the_diagonal_is_the_oracle(mode: bool) -> None:
    """One layer of gates, nothing but linear layers behind it and a squared error: the series ends."""
    layers = [*conv_bn(3, 6), nn.Conv2d(6, 4, 3, padding=1), *head(4)]
    model, data = randomise(nn.Sequential(*layers)).train(mode), batches(1)
    groups = [group_of(prunable(model, data[0][0]), "0")]
    of_gates, _, _ = exact(model, groups, data[0], loss=quadratic_loss)
    ones = torch.ones(6, dtype=torch.float64)
    with torch.no_grad():
        changes = torch.stack([of_gates(ones - gate) - of_gates(ones) for gate in torch.eye(6, dtype=torch.float64)])
    second = collected(model, TaylorSO(samples=None), data, groups, quadratic_loss)
    close(flat(second, groups), changes.square())
    close(second.loss_changes(groups[0]), changes)
    rows = collected(model, TaylorSO(hessian="row"), data, groups, quadratic_loss)
    assert float((flat(rows, groups) / changes.square() - 1).abs().max()) > 0.1


def test_more_random_signs_come_closer() -> None:
    model, data = residual(), batches(2)
    groups = prunable(model, data[0][0])
    right = torch.cat([collected(model, TaylorSO(samples=None), data, groups).loss_changes(g) for g in groups])

    def error(samples: int) -> float:
        criterion = collected(model, TaylorSO(samples=samples), data, groups)
        return float((torch.cat([criterion.loss_changes(group) for group in groups]) - right).norm())

    assert error(256) < 0.5 * error(4)


def test_the_seed_decides() -> None:
    model, data = residual(), batches(2)
    groups = prunable(model, data[0][0])
    torch.manual_seed(5)
    first = flat(collected(model, TaylorSO(), data, groups), groups)
    state = torch.random.get_rng_state()
    assert torch.equal(first, flat(collected(model, TaylorSO(), data, groups), groups))
    assert torch.equal(state, torch.random.get_rng_state())
    assert not torch.allclose(first, flat(collected(model, TaylorSO(seed=1), data, groups), groups))
    # Each minibatch draws anew: the noise of the same minibatch twice is not the noise of one.
    again = flat(collected(model, TaylorSO(), [data[0], data[0]], groups), groups)
    assert not torch.allclose(again, flat(collected(model, TaylorSO(), data[:1], groups), groups))
    # A window that is broken off and taken up again draws the same signs.
    half, other = collected(model, TaylorSO(), data[:1], groups), TaylorSO()
    other.load_state_dict(half.state_dict())
    assert torch.equal(first, flat(collected(model, other, data[1:], groups), groups))


# -- what it leaves, and what it refuses ------------------------------------------------------------------------


@pytest.mark.parametrize("build", [lambda: TaylorSO(), lambda: TaylorSO(hessian="row"), lambda: OBD()])
def test_no_graph_is_left(build: Callable[[], GateCriterion]) -> None:
    model, (batch,) = plain(), batches(1)
    groups = prunable(model, batch[0])
    seen: list[weakref.ref[Tensor]] = []
    handle = model[3].register_forward_hook(lambda _, __, y: seen.append(weakref.ref(y)))
    criterion = build()
    with criterion.collect(model, groups):
        loss_of(model, batch).backward(create_graph=True)
        values = [parameter.grad.detach().clone() for parameter in model.parameters()]
        criterion.update()
        gc.collect()
        assert [ref() for ref in seen] == [None]
        for parameter, value in zip(model.parameters(), values, strict=True):
            assert not parameter.grad.requires_grad
            assert torch.equal(parameter.grad, value)
    handle.remove()


def test_gradients_without_a_graph_are_refused() -> None:
    model, (batch,) = plain(), batches(1)
    groups, criterion = prunable(model, batch[0]), TaylorSO()
    with criterion.collect(model, groups):
        with pytest.raises(CriterionError, match=r"'1\.weight' has no gradient"):
            criterion.update()
        loss_of(model, batch).backward()
        with pytest.raises(CriterionError, match=r"loss\.backward\(create_graph=True\)"):
            criterion.update()
    assert criterion.minibatches == 0


def test_fused_attention_is_named() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.value, self.out = nn.Conv2d(3, 8, 1), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).flatten(2).mT.contiguous()
            heads = [tensor[:, None] for tensor in (x, x, self.value(x))]
            return self.out(F.scaled_dot_product_attention(*heads).mean((1, 2)))

    model, (batch,) = Attention(), batches(1)
    batch = (batch[0].float(), batch[1])
    groups = prunable(model, batch[0])
    criterion = TaylorSO()
    with criterion.collect(model, groups):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            loss = loss_of(model, batch)
        loss.backward(create_graph=True)
        with pytest.raises(CriterionError, match=r"sdpa_kernel\(torch\.nn\.attention\.SDPBackend\.MATH\)"):
            criterion.update()
        assert not any(parameter.grad.requires_grad for parameter in model.parameters())
        model.zero_grad()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            loss = loss_of(model, batch)
        loss.backward(create_graph=True)
        criterion.update()
    assert flat(criterion, groups).shape == (sum(group.width for group in groups),)


def test_misuse_is_refused() -> None:
    for arguments in ({"samples": 0}, {"samples": True}, {"samples": 1.5}, {"seed": "0"}, {"gates": "batch"}):
        for kind in (TaylorSO, OBD):
            with pytest.raises(CriterionError):
                kind(**arguments)
    with pytest.raises(CriterionError, match="hessian"):
        TaylorSO(hessian="full")  # type: ignore[arg-type]
    with pytest.raises(CriterionError, match="pass them to collect"), OBD().collect(plain()):
        pass


def test_a_gradient_scaler_is_allowed_for() -> None:
    model, (batch,) = plain(), batches(1)
    groups = prunable(model, batch[0])
    right = flat(collected(model, TaylorSO(), [batch], groups), groups)
    criterion = TaylorSO()
    with criterion.collect(model, groups):
        model.zero_grad()
        (1024 * loss_of(model, batch)).backward(create_graph=True)
        with torch.no_grad():  # as torch.amp.GradScaler.unscale_ does
            for parameter in model.parameters():
                parameter.grad.div_(1024)
        criterion.update(batch, loss_scale=1024.0)
    torch.testing.assert_close(flat(criterion, groups), right, rtol=1e-12, atol=0)


def test_half_precision_is_accumulated_in_single() -> None:
    model, (batch,) = residual(), batches(1)
    groups = prunable(model, batch[0])
    right = collected(model, TaylorSO(samples=None), [batch], groups)
    half = [(batch[0].to(torch.bfloat16), batch[1])]
    criterion = collected(model.to(torch.bfloat16), TaylorSO(samples=None), half, groups)
    for group in groups:
        assert criterion(group).dtype == torch.float32
        scale = float(right.loss_changes(group).abs().max())
        torch.testing.assert_close(
            criterion.loss_changes(group).double(), right.loss_changes(group), rtol=0.2, atol=0.2 * scale
        )


def test_a_gradient_that_does_not_depend_on_the_weights_has_no_curvature() -> None:
    """The loss is linear in the normalisation's parameters: their gradients depend on no weight."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.shift = plain(), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).square().sum() + self.shift(x).mean()

    model, (batch,) = Shifted().double().eval(), batches(1)
    model(batch[0]).backward(create_graph=True)
    group = ChannelGroup("shift", 3, (member_of(model, "shift", "out", 3),))
    hessian = GateHessian(model, GateLayout([(group, group.members)]))
    assert float(hessian.gradient.abs().min()) > 0
    assert torch.equal(hessian.row_sums(), torch.zeros(3, dtype=torch.float64))


def test_planning_meets_the_budget_and_leaves_the_network_as_it_was() -> None:
    model, data = residual(), batches(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for criterion in (TaylorSO(), TaylorSO(hessian="row"), OBD()):
        plan = plan_channels(model, data[0][0], criterion, data, loss_of, MACs(0.6))
        assert plan.cost_after.macs <= 0.6 * plan.cost_before.macs
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("criterion", [OBD(), TaylorSO()])
def test_checkpoints_that_hide_the_graph_are_refused(criterion: Criterion) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.head, self.reentrant = nn.Conv2d(3, 6, 3), nn.Linear(4, 3), reentrant
            self.body = nn.Sequential(nn.Conv2d(6, 6, 3), nn.Tanh(), nn.Conv2d(6, 4, 3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = checkpoint(self.body, x, use_reentrant=self.reentrant) if torch.is_grad_enabled() else self.body(x)
            return self.head(x.mean((2, 3)))

    def planned(reentrant: bool) -> PruningPlan:
        batch = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])
        return plan_channels(Checkpointed(reentrant).eval(), batch[0], criterion, [batch], loss_of, MACs(0.5))

    assert all(group.score_range[1] > 0 for group in planned(reentrant=False).groups)
    with pytest.raises(CriterionError, match="use_reentrant=False"):
        planned(reentrant=True)
