"""Networks as users hand them over: in wrappers, as averages, or not networks at all."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks_at_random import assert_same, state_of
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import nni_plugin
from nni_plugin import ChannelPruner, MACs, OneShot, from_pretrained, plan_channels, save_pretrained, verify
from nni_plugin.criteria import Magnitude, Random, TaylorFO
from nni_plugin.errors import CriterionError, GraphError, ModelError, NNIPluginError, ScheduleError
from nni_plugin.layers import BlockGate
from nni_plugin.networks import resnet20

X, Y = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 5))


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_a_wrapped_network_is_planned_cut_and_saved_as_the_one_inside(wrap: Callable[..., Any], tmp_path: Any) -> None:
    inside = network()
    wrapped = wrap(inside)
    wrapped(X)  # compiled for the widths before the cut
    plan = plan_channels(wrapped, X, TaylorFO(), [(X, Y)], loss_fn, MACs(0.5))
    assert plan.kept() == plan_channels(network(), X, TaylorFO(), [(X, Y)], loss_fn, MACs(0.5)).kept()
    assert verify(wrapped, plan, X).ok
    assert plan.apply(wrapped, X) is wrapped
    assert inside[0].out_channels < 16
    loaded = from_pretrained(save_pretrained(wrapped, tmp_path), model=network())
    assert torch.equal(loaded(X), wrapped.eval()(X))


@pytest.mark.parametrize("average", [ModelEmaV3, ModelEmaV2, ModelEma, AveragedModel, copy.deepcopy])
@pytest.mark.parametrize("cut", ["end", "never"])
def test_the_network_in_a_moving_average_is_cut_or_masked_too(average: Callable[..., Any], cut: Any) -> None:
    model = network()
    ema = average(model)
    inside = next(getattr(ema, name) for name in ("module", "ema", "eval") if hasattr(ema, name))
    inside = inside if isinstance(inside, nn.Module) else ema
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    schedule = OneShot(minibatches=1)
    pruner = ChannelPruner(model, X, TaylorFO(), MACs(0.5), schedule=schedule, optimizer=optimizer, ema=ema, cut=cut)
    with pruner:
        loss = loss_fn(model, (X, Y))
        loss.backward()
        pruner.on_backward(float(loss.detach()))
        optimizer.step()
        pruner.on_step()
    assert pruner.done
    for name, tensor in model.named_parameters():
        assert torch.equal(inside.get_parameter(name), tensor)
    assert (inside[0].out_channels < 16) == (cut == "end")
    assert bool((inside[0].weight.flatten(1) == 0).all(1).any()) == (cut == "never")


def old_weight_norm() -> nn.Module:
    model = network()
    nn.utils.weight_norm(model[0])
    return model


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return network()


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
@pytest.mark.parametrize(
    ("error", "text", "changed"),
    [
        (ModelError, "got the class Sequential: give an instance", {"model": nn.Sequential}),
        (ModelError, "a torch.nn.Module, got None", {"model": None}),
        (ModelError, "on the meta device", {"model": on_meta(), "criterion": Random()}),
        (GraphError, "has no parameters", {"model": nn.ReLU()}),
        (GraphError, "parametrizations in their place", {"model": old_weight_norm}),
        (GraphError, "not finite", {"example_inputs": X * torch.nan}),
        (GraphError, "'head' is not in the model", {"ignore": "head"}),
        (ScheduleError, "got 'iterative'", {"schedule": "iterative"}),
        (ScheduleError, "Expected a schedule", {"schedule": OneShot}),
        (CriterionError, "Expected minibatches", {"batches": None}),
        (CriterionError, "Expected loss_fn", {"loss_fn": None}),
    ],
)
def test_what_cannot_be_planned_is_refused(error: type[NNIPluginError], text: str, changed: dict[str, Any]) -> None:
    given = {"model": network(), "example_inputs": X, "criterion": TaylorFO(), "batches": [(X, Y)], "loss_fn": loss_fn}
    given = {**given, "budget": MACs(0.5), **changed}
    if given["model"] is old_weight_norm:
        given["model"] = old_weight_norm()
    before = state_of(given["model"]) if isinstance(given["model"], nn.Module) else None
    with pytest.raises(error, match=text):
        plan_channels(**given)
    if before is not None and "meta" not in text:
        assert_same(given["model"], before)


def test_more_that_is_refused() -> None:
    with pytest.raises(ModelError, match="moving average with the parameters of Sequential"):
        ChannelPruner(network(), X, TaylorFO(), MACs(0.5), ema=nn.Linear(3, 3))
    with pytest.raises(CriterionError, match="got the class BlockGate"):
        nni_plugin.plan_layers(resnet20(), torch.randn(2, 3, 32, 32), BlockGate, [(X, Y)], nni_plugin.Layers(1))
    with pytest.raises(CriterionError, match="only once"):
        nni_plugin.plan_jointly(resnet20(), torch.randn(2, 3, 32, 32), iter([(X, Y)]), loss_fn, MACs(0.5))


def test_one_layer_to_ignore_needs_no_list() -> None:
    model = network()
    for ignore in ("0", model[0], ["0"]):
        plan = plan_channels(model, X, Magnitude(), [], loss_fn, MACs(0.5), ignore=ignore)
        assert list(plan.kept()) == ["3"]


class Optional(nn.Module):
    """A network with a branch for inputs that the examples do not hold, and a layer whose output nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.table, self.head = nn.Linear(12, 24), nn.Linear(7, 24), nn.Linear(24, 3)
        self.idle = nn.Linear(24, 6)

    def forward(self, image: Tensor, table: Tensor | None = None) -> Tensor:
        x = self.image(image) if table is None else self.image(image) + self.table(table)
        x = x.relu()
        self.idle(x)
        return self.head(x)


def test_what_does_not_run_is_said_and_why_layers_stay_whole() -> None:
    with pytest.warns(UserWarning, match=r"1 layer does not run on the example inputs: 'table'\."):
        plan = plan_channels(Optional(), torch.randn(4, 12), Magnitude(), [], loss_fn, MACs(0.6))
    assert "whole: idle: no output of the network in use depends on it" in plan.explain().splitlines()
    assert "whole: head: its channels are the network's output (at head)" in plan.explain().splitlines()
    assert list(plan.kept()) == ["image"]


class Auxiliary(nn.Module):
    """Attention, which uses a layer without calling it, and a head for training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head, self.auxiliary = nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.body(x).mean(1)
        return (self.head(x), self.auxiliary(x)) if self.training else self.head(x)


@pytest.mark.filterwarnings("error:.*not run on the example inputs")
def test_what_runs_in_training_alone_or_is_used_without_a_call_does_run() -> None:
    plan = plan_channels(Auxiliary(), torch.randn(2, 5, 16), Magnitude(), [], loss_fn, MACs(0.8))
    assert list(plan.kept()) == ["body.linear1"]
