"""The orthogonal projection of the supplement, Eq. 1: its identities, and a layer without gradient."""

import torch

from nni_plugin.performance.projection import orthogonal_part

OWNER = torch.tensor([0] * 5 + [1] * 3 + [2] * 4)


def gradients(seed: int = 0, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(scale * torch.randn(len(OWNER), dtype=torch.float64, generator=generator) for _ in range(2))


def by_layer(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return torch.zeros(3, dtype=torch.float64).index_add(0, OWNER, first * second)


def test_what_is_left_is_orthogonal_in_each_layer() -> None:
    for scale in (1.0, 1e-8):  # the eps must not show in gradients as small as those of gates
        performance, loss = gradients(scale=scale)
        part = orthogonal_part(performance, loss, OWNER)
        assert by_layer(part, loss).abs().max() < 1e-14 * scale**2
        assert by_layer(performance, loss).abs().min() > 1e-3 * scale**2


def test_both_parts_add_up_and_projecting_twice_changes_nothing() -> None:
    performance, loss = gradients(1)
    part = orthogonal_part(performance, loss, OWNER)
    along = performance - part
    for layer in range(3):  # the other part is a multiple of the loss's gradient, the one of Eq. 1
        mine = layer == OWNER
        factor = (loss[mine] @ performance[mine]) / (loss[mine] @ loss[mine])
        assert torch.allclose(along[mine], factor * loss[mine], rtol=1e-12, atol=0)
    assert torch.allclose(orthogonal_part(part, loss, OWNER), part, rtol=0, atol=1e-15)


def test_a_layer_without_gradient_of_the_loss_keeps_all_of_the_other() -> None:
    performance, loss = gradients(2)
    loss[OWNER == 1] = 0
    part = orthogonal_part(performance, loss, OWNER)
    assert torch.equal(part[OWNER == 1], performance[OWNER == 1])
    assert torch.isfinite(part).all()
    assert torch.equal(orthogonal_part(performance, torch.zeros_like(loss), OWNER), performance)


def test_layers_do_not_see_each_other() -> None:
    performance, loss = gradients(3)
    changed = loss.clone()
    changed[OWNER == 0] *= -3
    first, second = (orthogonal_part(performance, g, OWNER) for g in (loss, changed))
    assert torch.equal(first[OWNER > 0], second[OWNER > 0])
    assert orthogonal_part(performance.float(), loss.float(), OWNER).dtype == torch.float32
