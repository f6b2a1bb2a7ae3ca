"""Gates on whole blocks: their gradients are those of real gates, and a redundant block's is zero."""

import pytest
import torch
import torch.nn.functional as F
from layered import Residual, batches, chain, loss_of, plant, vgg
from networks_at_random import assert_same, state_of
from torch import nn

from nni_plugin.errors import CriterionError, DataError
from nni_plugin.layers import Block, BlockGate, removable_blocks, removal_order
from nni_plugin.layers.block_gate import block_gate_gradients


class Mixed(nn.Module):
    """A block whose output is mixed with its input, `x + z (y - x)`."""

    def __init__(self, block, z):
        super().__init__()
        self.block, self.z = block, z

    def forward(self, x):
        return x + self.z * (self.block(x) - x)


def _changes_by_differences(model, at, batch, step=1e-5):
    """Central differences of every sample's loss in the gate of a block."""
    block, losses = model[at], []
    for z in (1 + step, 1 - step):
        model[at] = Mixed(block, z)
        with torch.no_grad():
            losses.append(F.cross_entropy(model(batch[0]), batch[1], reduction="none"))
    model[at] = block
    return (losses[0] - losses[1]) / (2 * step)


def test_gradients_are_those_of_a_gate_sample_by_sample():
    model, data = chain(3), batches(2)
    blocks = removable_blocks(model, data[0][0])
    rows = block_gate_gradients(model, blocks, data, loss_of)
    assert rows.shape == (24, 3)
    for column, block in enumerate(blocks):
        expected = torch.cat([_changes_by_differences(model, int(block.name), batch) for batch in data])
        assert torch.allclose(rows[:, column], expected, rtol=1e-4, atol=1e-7)


def test_scores_are_mean_squares_and_predictions_their_second_order():
    model, data = chain(3), batches(2)
    blocks, importance = removable_blocks(model, data[0][0]), BlockGate()
    rows = block_gate_gradients(model, blocks, data, loss_of)
    scores = importance.score(model, data[0][0], blocks, data, loss_of)
    assert list(scores.values()) == pytest.approx(rows.square().mean(0).tolist(), rel=1e-12)
    changes = (0.5 * rows.square().mean(0) - rows.mean(0)).tolist()
    assert list(importance.loss_changes.values()) == pytest.approx(changes, rel=1e-12)
    signed = BlockGate(signed=True).score(model, data[0][0], blocks, data, loss_of)
    assert list(signed.values()) == pytest.approx(changes, rel=1e-12)
    images, labels = (torch.cat(part) for part in zip(*data, strict=True))
    uneven = list(zip(images.split(7), labels.split(7), strict=True))
    again = BlockGate().score(model, data[0][0], blocks, uneven, loss_of)
    assert list(again.values()) == pytest.approx(list(scores.values()), rel=1e-9)


def test_first_order_is_exact_for_a_loss_linear_in_the_block():
    """The sum of the last block's output: taking the block away changes it by exactly `-g`."""
    model, images = nn.Sequential(nn.Identity(), Residual(3, 4)).double().eval(), batches(1)[0][0]

    def total(network, batch):
        return network(batch).flatten(1).sum(1).mean()

    gradient = block_gate_gradients(model, [Block("1", "block", ("1",), (3, 6, 6))], [images], total)
    with torch.no_grad():
        removed = images.flatten(1).sum(1) - model(images).flatten(1).sum(1)
    assert torch.allclose(-gradient[:, 0], removed, rtol=1e-9)


def test_a_redundant_block_has_no_gradient():
    data = batches(2)
    for at in (1, 2, 3):
        model = chain(3)
        plant(model[at])
        scores = BlockGate().score(model, data[0][0], removable_blocks(model, data[0][0]), data, loss_of)
        assert scores[str(at)] == 0.0
        assert removal_order(scores)[0] == str(at)
        assert sorted(scores.values())[1] > 0


def test_branches_units_and_nested_blocks_are_gated_as_if_alone():
    model, data = chain(2), batches(1)
    model[1].after = nn.Identity()
    branch, whole = (
        Block("1.inside", "branch", ("1.reduce", "1.inside"), (6, 6, 6)),
        Block("1", "block", ("1",), (6, 6, 6)),
    )
    both = block_gate_gradients(model, [whole, branch], data, loss_of)
    assert torch.allclose(both[:, 0], both[:, 1], rtol=1e-9)  # what the branch adds is all that the block does
    assert torch.equal(both[:, :1], block_gate_gradients(model, [whole], data, loss_of))
    plain = vgg()
    units = removable_blocks(plain, data[0][0])
    assert len(units) == 2
    assert float(block_gate_gradients(plain, units, data, loss_of).abs().min()) > 0


def test_leaves_no_trace_and_needs_no_trainable_parameter():
    model, data = chain(2).train(), batches(2)
    blocks = removable_blocks(model, data[0][0])
    loss_of(model, data[0]).backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    before = state_of(model)
    rows = block_gate_gradients(model, blocks, data, loss_of)
    assert_same(model, before)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(p.grad, kept) for p, kept in zip(model.parameters(), gradients, strict=True))
    model.requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(block_gate_gradients(model, blocks, data, loss_of), rows)


class InPlace(nn.Module):
    """A block that overwrites what it was given."""

    def forward(self, x):
        return x.mul_(2)


def _twice(model, batch):
    model(batch[0])
    return loss_of(model, batch)


def _broken(model, batch):
    loss_of(model, batch)
    raise RuntimeError("broken")


@pytest.mark.parametrize(
    ("loss", "data", "error", "match"),
    [
        (loss_of, [], DataError, "no minibatch to score with"),
        (lambda model, batch: model(batch[0]), None, CriterionError, "must return a scalar"),
        (lambda model, batch: batch[0].sum().requires_grad_(), None, CriterionError, "did not run"),
        (_twice, None, CriterionError, "runs the network twice"),
        (_broken, None, RuntimeError, "broken"),
    ],
)
def test_what_cannot_be_gated_is_refused(loss, data, error, match):
    model, blocks = chain(2).train(), removable_blocks(chain(2), batches(1)[0][0])
    with pytest.raises(error, match=match):
        block_gate_gradients(model, blocks, batches(1) if data is None else data, loss)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_block_that_overwrites_its_input_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), InPlace(), nn.Flatten(), nn.Linear(108, 4)).double()
    with pytest.raises(CriterionError, match="changes its input in place"):
        block_gate_gradients(model, [Block("1", "block", ("1",), (3, 6, 6))], batches(1), loss_of)


def test_values_that_are_not_finite():
    model, (images, labels) = chain(2), batches(1)[0]
    blocks = removable_blocks(model, images)
    with pytest.raises(CriterionError, match="2 of 2 blocks a score that is not finite"):
        BlockGate().score(model, images, blocks, [(images * torch.nan, labels)], loss_of)
