"""The performance networks: their sizes and what they compute, layer by layer, against plain torch modules."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nni_plugin.errors import SearchError
from nni_plugin.performance import LinearPredictor, PerformanceNetwork, ReleasedNetwork
from nni_plugin.performance.network import build_predictor

WIDTHS = [5, 3, 8]
RESNET56 = [16] * 9 + [32] * 9 + [64] * 9


def numbers(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def architectures(number: int = 6) -> torch.Tensor:
    return torch.rand(number, sum(WIDTHS), dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("training", [True, False])
def test_table_2(training: bool) -> None:
    """FC_i(C_i, 16), BN, ReLU for each layer; GRU(16, 16), averaged over its steps; FC(16, 1), sigmoid."""
    torch.manual_seed(1)
    network = PerformanceNetwork(WIDTHS).double().train(training)
    network.norm.running_mean.uniform_(-0.1, 0.1)
    network.norm.running_var.uniform_(0.5, 1.5)
    norm = network.norm
    values = architectures()
    expected_steps = []
    for i, part in enumerate(values.split(WIDTHS, dim=1)):
        weight = network.read.weight.split(WIDTHS)[i]
        read = F.linear(part, weight.T, network.read.bias[i])
        mine = slice(16 * i, 16 * (i + 1))
        mean, var = norm.running_mean[mine].clone(), norm.running_var[mine].clone()
        read = F.batch_norm(read, mean, var, norm.weight[mine], norm.bias[mine], training, 0.1, norm.eps)
        expected_steps.append(torch.relu(read))
    outputs, _ = network.gru(torch.stack(expected_steps, dim=1))
    expected = torch.sigmoid(network.head(outputs.sum(1) / len(WIDTHS)))[:, 0]
    assert torch.allclose(network(values), expected, rtol=1e-12)
    assert network.gru.training  # cuDNN gives no gradients of inputs in eval mode


def test_released() -> None:
    torch.manual_seed(1)
    network = ReleasedNetwork(WIDTHS, hidden=8).double().eval()
    values = architectures()
    steps = []
    for i, part in enumerate(values.split(WIDTHS, dim=1)):
        direction = network.read.weight.split(WIDTHS)[i]
        weight = network.read.scale[i] * direction / direction.norm(dim=0)
        steps.append(torch.relu(F.layer_norm(part @ weight, [8], network.norm.weight, network.norm.bias)))
    _, (forwards, backwards) = network.gru(torch.stack(steps, dim=1))
    expected = torch.sigmoid(torch.cat([forwards, backwards], 1) @ network.head.weight[0])
    assert torch.allclose(network(values), expected, rtol=1e-12)
    # Weight normalisation begins as the identity.
    assert torch.allclose(network.read.scale[1, 0], network.read.weight.split(WIDTHS)[1].norm(dim=0))


def test_sizes_for_resnet56() -> None:
    assert numbers(ReleasedNetwork(RESNET56)) == 207_360  # what the authors' code was counted to have
    per_layer = sum(16 * width + 16 + 2 * 16 for width in RESNET56)
    assert numbers(PerformanceNetwork(RESNET56)) == per_layer + 2 * 3 * 16 * 16 + 2 * 3 * 16 + 16 + 1
    assert numbers(LinearPredictor(RESNET56)) == 1008


def test_linear_is_monotone_in_each_gate() -> None:
    torch.manual_seed(0)
    network = LinearPredictor(WIDTHS).double()
    values = architectures(1)
    before = network(values)
    for gate in range(sum(WIDTHS)):
        more = values.clone()
        more[0, gate] += 0.5
        assert torch.sign(network(more) - before) == torch.sign(network.head.weight[0, gate])


@pytest.mark.parametrize("name", ["table2", "released", "linear"])
def test_predictions_lie_between_0_and_1_and_alone_in_eval_mode(name: str) -> None:
    network = build_predictor(name, WIDTHS, seed=3).double().eval()
    values = architectures()
    together = network(values)
    assert together.shape == (6,)
    assert bool(((together > 0) & (together < 1)).all())
    assert torch.allclose(network(values[2:3]), together[2:3], rtol=1e-12)


def test_a_seed_gives_a_network_and_leaves_the_random_state() -> None:
    state = torch.get_rng_state()
    first, second, other = (build_predictor("table2", WIDTHS, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.head.weight, second.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)
    with pytest.raises(SearchError, match="table2, released, linear"):
        build_predictor("gru", WIDTHS)
