"""Every criterion as the importance of Torch-Pruning's own pruner, which finds its groups from layers of its choice."""

import copy

import pytest
import torch
import torch_pruning as tp
from gated import Batch, collected, loss_of
from networks_at_random import randomise
from torch import nn

from nni_plugin import count
from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.criteria import Oracle
from nni_plugin.groups import ChannelGroup
from nni_plugin.methods import METHODS, create_criterion
from nni_plugin.networks import resnet20

pytestmark = pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")


def network() -> nn.Module:
    torch.manual_seed(0)
    return randomise(resnet20(num_classes=3, width_mult=0.25)).float().eval()


def data() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 3, 8, 8, generator=generator), torch.tensor([0, 1, 2, 1])) for _ in range(2)]


def prunable(model: nn.Module) -> list[ChannelGroup]:
    images = data()[0][0].to(next(model.parameters()))
    return [group for group in find_groups(model, images) if group.fixed is None]


@pytest.mark.parametrize("method", METHODS)
def test_two_steps_of_a_stock_pruner(method: str) -> None:
    model, criterion = network(), create_criterion(method)
    heads = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    pruner = tp.pruner.BasePruner(
        model, data()[0][0], criterion, global_pruning=True, pruning_ratio=0.4, iterative_steps=2, ignored_layers=heads
    )
    params = [count(model, data()[0][0]).params]
    for _ in range(2):
        criterion.reset()
        if criterion.needs_data:
            collected(model, criterion, data(), prunable(model))
        pruner.step()
        params.append(count(model, data()[0][0]).params)
        assert model(data()[0][0]).shape == (4, 3)
    assert params[0] > params[1] > params[2]


def test_the_oracle_in_the_order_of_the_stock_groups() -> None:
    """A score is the squared change of the loss when Torch-Pruning itself cuts that channel out."""
    model = network().double()
    ours = [(images.double(), labels) for images, labels in data()]
    criterion = collected(model, Oracle(), ours, prunable(model))
    names = {group.name for group in prunable(model)}

    def mean_loss(network: nn.Module) -> float:
        return sum(float(loss_of(network, batch).detach()) for batch in ours) / len(ours)

    graph = tp.DependencyGraph().build_dependency(model, ours[0][0])
    elsewhere = 0
    for host in graph.get_all_groups(ignored_layers=[model.fc], root_module_types=[nn.Conv2d]):
        scores = criterion(host)
        root = host[0].dep.target
        elsewhere += root.name.split(" ")[0] not in names
        for channel in range(0, len(scores), 3):
            slim = copy.deepcopy(model)
            its = tp.DependencyGraph().build_dependency(slim, ours[0][0])
            layer = slim.get_submodule(graph._module2name[root.module])
            its.get_pruning_group(layer, tp.prune_conv_out_channels, [channel]).prune()
            assert float(scores[channel]) == pytest.approx((mean_loss(slim) - mean_loss(model)) ** 2, rel=1e-6)
    assert elsewhere
