"""Networks that hold sequences first are refused where single samples are scored, however their shapes come out."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nni_plugin import MACs, plan_jointly
from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.criteria import OBS, TaylorFisher, TaylorFO
from nni_plugin.errors import CriterionError
from nni_plugin.layers import BlockGate, Imprinting, removable_blocks
from nni_plugin.planner import score_groups

SAMPLES, LENGTH = 8, 16  # rows of positions are a multiple of the samples


class Encoder(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.stem = nn.Linear(6, 16)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, 0.0, norm_first=True, batch_first=batch_first) for _ in range(3)
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x if self.batch_first else x.transpose(0, 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1 if self.batch_first else 0))


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def minibatches(length: int = LENGTH) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(SAMPLES, length, 6), torch.arange(SAMPLES) % 4) for _ in range(3)]


def score(network: nn.Module, how: Any, length: int = LENGTH) -> Any:
    batches = minibatches(length)
    images = batches[0][0][:2]
    if isinstance(how, (BlockGate, Imprinting)):
        blocks = [block for block in removable_blocks(network, images) if block.kind == "block"]
        return how.score(network, images, blocks, batches, loss_fn, batches)
    if how == "jointly":
        return plan_jointly(network, images, batches, loss_fn, MACs(0.8), steps=1, cost_powers=(1.0,))
    groups = [group for group in find_groups(network, images) if group.fixed is None]
    return score_groups(network, groups, how, batches, loss_fn)


def _name(how: Any) -> str:
    return how if isinstance(how, str) else type(how).__name__


@pytest.mark.parametrize(
    "how", [BlockGate(), Imprinting(64), Imprinting(64, stem=True), TaylorFisher(), OBS(), "jointly"], ids=_name
)
def test_sequence_first_is_refused(how: Any) -> None:
    torch.manual_seed(0)
    network = Encoder(batch_first=False).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(CriterionError, match="batch_first=True"):
        score(network, how)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("how", [BlockGate(), Imprinting(64), TaylorFisher(), OBS()], ids=_name)
@pytest.mark.parametrize("length", [LENGTH, SAMPLES])  # as long as there are samples: looked at, and right
def test_batch_first_is_not(how: Any, length: int) -> None:
    assert score(Encoder(batch_first=True).eval(), how, length)


def test_criteria_of_whole_minibatches_do_not_care() -> None:
    torch.manual_seed(0)
    one, other = Encoder(batch_first=True).eval(), Encoder(batch_first=False).eval()
    other.load_state_dict(one.state_dict())
    torch.manual_seed(1)
    expected = score(one, TaylorFO())
    torch.manual_seed(1)
    found = score(other, TaylorFO())
    assert any(name in expected for name in found)
    for name in expected.keys() & found.keys():
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-8)


def test_a_network_that_cannot_be_tried_asks_for_another_batch_size() -> None:
    class Stashing(Encoder):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.stem(x)  # no copy of it can be made while its graph lives
            return super().forward(x)

    with pytest.raises(CriterionError, match="minibatches of another size"):
        score(Stashing(batch_first=True).eval(), TaylorFisher(), SAMPLES)
    assert score(Stashing(batch_first=True).eval(), TaylorFisher(), SAMPLES + 1)
