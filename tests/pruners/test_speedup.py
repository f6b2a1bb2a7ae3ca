"""ModelSpeedup on small networks: what leaves, what stays and why, what is refused and then changes nothing."""

import inspect
import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from masked import disturb, filters, masked
from networks_at_random import assert_same, state_of
from torch import nn

import nni_plugin
from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.errors import GraphError, MaskError, SurgeryError
from nni_plugin.pruners import speedup as module
from nni_plugin.pruners.speedup import ModelSpeedup


class Block(nn.Module):
    """A stem, a residual branch with a squeeze-excite, a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv1, self.bn1 = nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.depth, self.bn2 = nn.Conv2d(8, 8, 3, groups=8, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc1, self.fc2 = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.conv2, self.bn3 = nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = F.hardswish(self.bn(self.stem(x)))
        y = F.silu(self.bn2(self.depth(F.relu(self.bn1(self.conv1(x))))))
        y = y * torch.sigmoid(self.fc2(F.relu(self.fc1(y.mean((2, 3), keepdim=True)))))
        return self.head((x + self.bn3(self.conv2(y))).mean((2, 3)))


IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    return disturb(Block())


def speed_up(model, masks, **arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        speedup = ModelSpeedup(model, IMAGES, masks, **arguments)
        assert speedup.speedup_model() is model
    return speedup


def difference(model, reference):
    with torch.no_grad():
        return float((model.eval()(IMAGES) - reference(IMAGES)).abs().max())


def test_takes_the_arguments_of_nnis_own():
    host = pytest.importorskip("nni.compression.speedup").ModelSpeedup
    assert list(inspect.signature(ModelSpeedup).parameters) == list(inspect.signature(host).parameters)
    ours, theirs = (
        {name: p.default for name, p in inspect.signature(cls).parameters.items()} for cls in (ModelSpeedup, host)
    )
    assert ours == theirs


def test_a_layer_masked_with_its_normalisation_leaves_exactly(model):
    masks = filters(model, {"conv1": [0, 3, 5], "bn1": [0, 3, 5], "depth": [0, 3, 5], "bn2": [0, 3, 5], "fc1": [1]})
    reference, parameters = masked(model, masks), dict(model.named_parameters())
    speedup = speed_up(model, masks)
    assert (model.conv1.out_channels, model.depth.groups, model.conv2.in_channels) == (5, 5, 5)
    assert (model.fc1.in_channels, model.fc1.out_channels, model.fc2.out_channels) == (5, 3, 5)
    assert difference(model, reference) < 1e-5
    assert speedup.report.max_abs < 1e-5
    assert not speedup.report.inexact
    assert not speedup.report.left
    assert speedup.plan.cost_after.macs < speedup.plan.cost_before.macs
    assert speedup.plan.cost_after == nni_plugin.cost.count(model, IMAGES)
    assert speedup.plan.kept()["conv1"] == (1, 2, 4, 6, 7)
    assert model.pruning_plan == speedup.plan
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    model(IMAGES).square().sum().backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())


def test_one_layer_of_a_chain_is_enough(model):
    for gone in ({"conv1": [0, 2]}, {"depth": [0, 2]}, {"conv1": [0], "depth": [2]}, {"bn2": [0], "bn1": [2]}):
        small = disturb(Block())
        speed_up(small, filters(small, gone))
        assert small.conv2.in_channels == 6


def test_only_the_intersection_leaves_a_sum(model):
    masks = filters(model, {"stem": [0, 1, 2], "bn": [0, 1, 2], "conv2": [1, 2, 3], "bn3": [1, 2, 3]})
    reference = masked(model, masks)
    speedup = speed_up(model, masks)
    assert speedup.plan.kept()["stem"] == (0, 3, 4, 5)
    assert difference(model, reference) < 1e-5
    (verdict,) = speedup.report.left
    assert (verdict.name, verdict.width, verdict.asked, verdict.removed) == ("stem", 6, 4, 2)
    assert "2 are kept by 'stem', 'conv2'" in verdict.reason
    assert speedup.report.zeros_left == 27 + 2 + 8 + 2  # channel 0 of stem and bn, channel 3 of conv2 and bn3


def test_a_mask_beside_the_signal_removes_nothing_of_it(model):
    masks = filters(model, {"fc2": [1, 2]})
    reference = masked(model, masks)
    speedup = speed_up(model, masks)
    assert speedup.plan.channels_removed == 0
    assert difference(model, reference) < 1e-5


def test_unread_channels_leave(model):
    masks = {path: {"weight": torch.ones_like(model.get_submodule(path).weight)} for path in ("conv2", "fc1")}
    for mask in masks.values():
        mask["weight"][:, [4, 7]] = 0
    reference = masked(model, masks)
    speedup = speed_up(model, masks)
    assert speedup.plan.kept()["conv1"] == (0, 1, 2, 3, 5, 6)
    assert not speedup.report.inexact
    assert difference(model, reference) < 1e-5


def test_single_weights_stay_as_zeros(model):
    masks = {"conv1": {"weight": (torch.rand_like(model.conv1.weight) < 0.5).float()}}
    masks["conv1"]["weight"][:, 0] = 1
    reference = masked(model, masks)
    speedup = speed_up(model, masks)
    assert speedup.report.zeros_left == int((masks["conv1"]["weight"] == 0).sum()) > 0
    assert not speedup.report.groups
    assert difference(model, reference) == 0
    assert torch.equal(model.conv1.weight, model.conv1.weight * masks["conv1"]["weight"])


class Plain(nn.Module):
    """A residual branch of two convolutions."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv1, self.conv2 = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.head((x + self.conv2(F.relu(self.conv1(x)))).mean((2, 3)))


@pytest.mark.parametrize("gone", [{"conv2": range(6)}, {"conv1": range(8)}])
def test_a_branch_masked_as_a_whole_keeps_one_channel(gone):
    model = disturb(Plain())
    masks = filters(model, gone)
    reference = masked(model, masks)
    with pytest.warns(UserWarning, match="'conv1': 7 of 8 removed; 1 must stay for the layers to run"):
        ModelSpeedup(model, IMAGES, masks).speedup_model()
    assert (model.conv1.out_channels, model.conv2.in_channels, model.conv2.out_channels) == (1, 1, 6)
    assert difference(model, reference) < 1e-5


def test_what_must_stay_whole_is_said(model):
    speedup = speed_up(model, filters(model, {"head": [1]}))
    (verdict,) = speedup.report.groups
    assert verdict.removed == 0
    assert "network's output" in str(speedup.report)
    assert bool((model.head.weight[1] == 0).all())


@pytest.mark.parametrize("train", [True, False])
def test_mode_statistics_and_random_state_stay(model, train):
    model.train(train)
    model.bn1.eval()
    modes = [part.training for part in model.modules()]
    means = {name: buffer.clone() for name, buffer in model.named_buffers()}
    random = torch.random.get_rng_state()
    gone = {"conv1": [0], "bn1": [0], "depth": [0], "bn2": [0]}
    speed_up(model, filters(model, gone))
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), random)
    for name, buffer in model.named_buffers():
        before = means[name][1:] if name.startswith(("bn1.r", "bn2.r")) else means[name]
        assert torch.equal(buffer, before), name


def test_an_optimizer_is_carried_along(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(IMAGES).square().sum().backward()
    optimizer.step()
    momentum = optimizer.state[model.conv2.weight]["momentum_buffer"].clone()
    speedup = speed_up(model, filters(model, {"conv1": [1, 2], "bn1": [1, 2], "depth": [1, 2], "bn2": [1, 2]}))
    nni_plugin.carry_optimizer(optimizer, speedup.plan)
    kept = list(speedup.plan.kept()["conv1"])
    assert torch.equal(optimizer.state[model.conv2.weight]["momentum_buffer"], momentum[:, kept])
    model.zero_grad()
    model(IMAGES).square().sum().backward()
    optimizer.step()


def test_masks_of_a_file(model, tmp_path):
    torch.save(filters(model, {"conv1": [2]}), tmp_path / "masks.pth")
    assert speed_up(model, tmp_path / "masks.pth", map_location="cpu").plan.channels_removed == 1


def test_nothing_to_remove_is_said(model):
    with pytest.warns(UserWarning, match="removes nothing"):
        ModelSpeedup(model, IMAGES, filters(model, {"conv1": []})).speedup_model()


def test_a_second_pruning_follows_the_first(model):
    speed_up(model, filters(model, {"conv1": [0]}))
    speed_up(model, filters(model, {"conv1": [0]}))
    assert model.pruning_plan.kept()["conv1"] == (2, 3, 4, 5, 6, 7)


def test_the_logger_is_told(model, caplog):
    with caplog.at_level(logging.INFO, "mine"):
        speed_up(model, filters(model, {"conv1": [0]}), logger=logging.getLogger("mine"))
    assert "1 of 1 masked coupled channels removed" in caplog.text


def test_bad_masks_leave_the_model_alone(model):
    state = state_of(model)
    with pytest.raises(MaskError, match="no module 'conv9'"):
        ModelSpeedup(model, IMAGES, {"conv9": {"weight": torch.ones(1)}})
    with pytest.raises(MaskError, match=r"'weight' of module 'conv1' has shape \[8\]"):
        ModelSpeedup(model, IMAGES, {"conv1": {"weight": torch.ones(8)}})
    assert_same(model, state)


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_dim": 1},
        {"graph_module": nn.Identity()},
        {"customized_replacers": [1]},
        {"customized_mask_updaters": [1]},
    ],
)
def test_what_belongs_to_nnis_own_way_is_refused(model, arguments):
    with pytest.raises(MaskError, match=next(iter(arguments))):
        ModelSpeedup(model, IMAGES, filters(model, {"conv1": [0]}), **arguments)


def test_an_input_that_does_not_run_leaves_the_model_alone(model):
    state = state_of(model)
    speedup = ModelSpeedup(model, torch.randn(2, 4, 6, 6), filters(model, {"conv1": [0]}))
    with pytest.raises(GraphError, match="example inputs"):
        speedup.speedup_model()
    assert_same(model, state)


def test_twice_is_refused(model):
    speedup = speed_up(model, filters(model, {"conv1": [0]}))
    with pytest.raises(MaskError, match="applied already"):
        speedup.speedup_model()
    assert model.conv1.out_channels == 7


@pytest.mark.parametrize("error", [SurgeryError, KeyboardInterrupt])
def test_any_failure_puts_everything_back(model, error, monkeypatch):
    def fail(*_args, **_arguments):
        raise error("stop")

    model.train()
    model(IMAGES).sum().backward()
    state, modes = state_of(model), [part.training for part in model.modules()]
    monkeypatch.setattr(module, "apply_plan", fail)
    with pytest.raises(error, match="stop"):
        ModelSpeedup(model, IMAGES, filters(model, {"conv1": [0, 1], "stem": [2]})).speedup_model()
    assert_same(model, state)
    assert [part.training for part in model.modules()] == modes
    assert not any(part._forward_pre_hooks for part in model.modules())


class Reshaped(nn.Module):
    """A reshape with a number in it: channels that the graph says may leave may not."""

    def __init__(self):
        super().__init__()
        self.inner, self.after = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        y = F.relu(self.inner(x))
        y = y.reshape(len(y), 2, 4, -1).transpose(1, 2).reshape(len(y), 8, 6, 6)
        return self.head(F.relu(self.after(y)).mean((2, 3)))


def test_a_group_that_cannot_be_cut_stays_whole_and_the_rest_goes():
    model = disturb(Reshaped())
    masks = filters(model, {"inner": [0, 5], "after": [1, 2]})
    reference = masked(model, masks)
    speedup = speed_up(model, masks)
    assert (model.inner.out_channels, model.after.out_channels) == (8, 4)
    assert [verdict.name for verdict in speedup.report.left] == ["inner"]
    assert difference(model, reference) < 1e-5
    assert {group.name for group in find_groups(model, IMAGES)} == {"inner", "after", "head"}
