"""The quadratic model against brute force: order of removal, compensation, and the two forms of the inverse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nni_plugin.criteria import quadratic
from nni_plugin.criteria.obs import LEAST_DAMPING


def gradients(samples: int, gates: int, seed: int = 0) -> Tensor:
    """Correlated rows of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(gates, gates, generator=generator, dtype=torch.float64)
    rows = torch.randn(samples, gates, generator=generator, dtype=torch.float64) @ mix
    return rows * torch.rand(gates, generator=generator, dtype=torch.float64)


def least_loss(hessian: Tensor, removed: list[int]) -> tuple[float, Tensor]:
    """Minimise 1/2 d H d with d = -1 on the removed gates, by plain linear algebra."""
    kept = [i for i in range(len(hessian)) if i not in removed]
    d = torch.zeros(len(hessian), dtype=torch.float64)
    d[removed] = -1
    if kept:
        d[kept] = -torch.linalg.solve(hessian[kept][:, kept], hessian[kept][:, removed] @ d[removed])
    return float(0.5 * d @ hessian @ d), 1 + d


def hessian_of(rows: Tensor, damping: float) -> Tensor:
    fisher = rows.T @ rows / len(rows)
    return fisher + quadratic.damped(rows, damping) * torch.eye(len(fisher), dtype=torch.float64)


@pytest.mark.parametrize("samples", [15, 60])
@pytest.mark.parametrize("damping", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("low_rank", [False, True])
def test_order_is_greedy_with_compensation(
    samples: int, damping: float, low_rank: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if low_rank:
        monkeypatch.setattr(quadratic, "DENSE", 0)
    rows = gradients(samples, 18)
    hessian = hessian_of(rows, damping)
    removed: list[int] = []
    while len(removed) < 17:
        rest = [m for m in range(18) if m not in removed]
        removed.append(min(rest, key=lambda m: least_loss(hessian, [*removed, m])[0]))
    assert quadratic.removal_order(rows, damping).tolist()[:17] == removed


@pytest.mark.parametrize("low_rank", [False, True])
def test_each_of_tied_gates_is_damped(low_rank: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate on several has the quadratic form of them all, held equal."""
    if low_rank:
        monkeypatch.setattr(quadratic, "DENSE", 0)
    rows = gradients(40, 14, seed=1)
    sizes = torch.tensor([1, 4, 1, 2, 1, 4, 1])
    units = torch.repeat_interleave(torch.arange(7), sizes)
    together = torch.zeros(14, 7, dtype=torch.float64)
    together[torch.arange(14), units] = 1
    added = rows @ together
    ridge = quadratic.damped(added / sizes.sqrt(), 0.5)
    hessian = together.T @ (rows.T @ rows / 40 + ridge * torch.eye(14, dtype=torch.float64)) @ together
    removed: list[int] = []
    while len(removed) < 6:
        rest = [m for m in range(7) if m not in removed]
        removed.append(min(rest, key=lambda m: least_loss(hessian, [*removed, m])[0]))
    assert quadratic.removal_order(added, 0.5, sizes=sizes).tolist()[:6] == removed


def test_costs_divide_the_loss() -> None:
    rows = torch.eye(6, dtype=torch.float64) * torch.arange(1.0, 7.0, dtype=torch.float64)
    assert quadratic.removal_order(rows).tolist() == [0, 1, 2, 3, 4, 5]
    costs = torch.tensor([1.0, 1, 1, 1, 1, 1000])
    assert quadratic.removal_order(rows, costs=costs).tolist() == [5, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("low_rank", [False, True])
def test_chunks_come_close_to_single_steps(low_rank: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = gradients(80, 60, seed=3)
    hessian = hessian_of(rows, 0.1)
    single = quadratic.removal_order(rows, chunk=1)
    if low_rank:
        monkeypatch.setattr(quadratic, "DENSE", 0)
    chunked = quadratic.removal_order(rows, chunk=5)
    assert sorted(chunked.tolist()) == list(range(60))
    for count in (10, 20, 30):
        one, many = (least_loss(hessian, order[:count].tolist())[0] for order in (single, chunked))
        assert many <= 1.02 * one


@pytest.mark.parametrize("low_rank", [False, True])
def test_one_chunk_of_all_gates_is_the_order_of_single_steps(low_rank: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = gradients(80, 60, seed=4)
    costs = torch.rand(60, generator=torch.Generator().manual_seed(0)) + 0.5
    expected = quadratic.removal_order(rows, costs=costs, chunk=1)
    if low_rank:
        monkeypatch.setattr(quadratic, "DENSE", 0)
    assert torch.equal(quadratic.removal_order(rows, costs=costs, chunk=60), expected)


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("samples", [20, 90])
def test_gates_that_say_the_same_are_put_in_order_without_damping_to_speak_of(
    low_rank: bool, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if low_rank:
        monkeypatch.setattr(quadratic, "DENSE", 0)
    rows = gradients(samples, 15, seed=5).repeat(1, 4)
    rows[::7] *= 30  # few samples far above the others
    order = quadratic.removal_order(rows, LEAST_DAMPING, chunk=60)
    assert sorted(order.tolist()) == list(range(60))
    # With a twin that stays a gate is free, the last of a kind is not.
    assert sorted(order[45:].remainder(15).tolist()) == list(range(15))


def test_updates_part_by_part_are_those_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = gradients(50, 64, seed=6)
    monkeypatch.setattr(quadratic, "DENSE", 0)
    expected = quadratic.removal_order(rows, chunk=3)
    monkeypatch.setattr(quadratic, "PART", 7)
    assert torch.equal(quadratic.removal_order(rows, chunk=3), expected)


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 40), st.integers(2, 30), st.integers(0, 9), st.sampled_from([0.01, 0.1, 1.0]))
def test_compensation_is_the_minimum(samples: int, gates: int, seed: int, damping: float) -> None:
    rows = gradients(samples, gates, seed)
    removed = torch.rand(gates, generator=torch.Generator().manual_seed(seed)) < 0.5
    z = quadratic.Compensation(rows, removed)(damping)
    _, expected = least_loss(hessian_of(rows, damping), removed.nonzero().flatten().tolist())
    torch.testing.assert_close(z, expected, rtol=1e-7, atol=1e-7)


def test_only_movable_gates_move() -> None:
    rows = gradients(30, 10)
    removed, movable = torch.zeros(10, dtype=torch.bool), torch.arange(10) < 6
    removed[[1, 8]] = True
    z = quadratic.Compensation(rows, removed, movable=movable)()
    assert z[removed].tolist() == [0, 0]
    assert z[[6, 7, 9]].tolist() == [1, 1, 1]
    assert not bool((z[[0, 2, 3, 4, 5]] == 1).any())


def test_linear_term_is_a_damped_newton_step() -> None:
    rows = gradients(30, 8)
    none = torch.zeros(8, dtype=torch.bool)
    expected = 1 - torch.linalg.solve(hessian_of(rows, 0.1), rows.mean(0))
    torch.testing.assert_close(quadratic.Compensation(rows, none, linear=True)(0.1), expected)
    torch.testing.assert_close(quadratic.Compensation(rows, none)(0.1), torch.ones(8, dtype=torch.float64))


def test_loss_change_is_the_quadratic_form() -> None:
    rows = gradients(20, 5)
    z = torch.tensor([0, 1.2, 1, 0.7, 0], dtype=torch.float64)
    d, fisher = z - 1, rows.T @ rows / 20
    assert quadratic.loss_change(rows, z) == pytest.approx(float(0.5 * d @ fisher @ d))
    assert quadratic.loss_change(rows, z, linear=True) == pytest.approx(float(0.5 * d @ fisher @ d + rows.mean(0) @ d))
