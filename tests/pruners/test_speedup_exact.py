"""Masked equals compact: on networks at random, with constants behind the masks, and in grouped layers."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from masked import disturb, filters, masked, random_masks
from networks_at_random import Recipe, networks
from torch import nn

import nni_plugin
from nni_plugin.pruners.speedup import ModelSpeedup


def speed_up(model, images, masks):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        speedup = ModelSpeedup(model, images, masks)
        speedup.speedup_model()
    return speedup


@torch.no_grad()
def relative_difference(model, reference, images):
    """Relative to the largest output; to one where all are zero."""
    expected = reference.eval()(images)
    return float((model.eval()(images) - expected).abs().max() / (expected.abs().max() or 1))


@settings(max_examples=30)
@given(recipe=networks(), seed=st.integers(0, 2**16))
def test_any_network_under_any_masks(recipe, seed):
    model, images = recipe.build(), recipe.inputs()
    masks = random_masks(model, seed)
    reference = masked(model, masks)
    speedup = speed_up(model, images, masks)
    with torch.no_grad():
        assert float((model(images) - reference(images)).abs().max()) <= speedup.report.max_abs + 1e-12
    if not speedup.report.inexact:
        assert relative_difference(model, reference, images) < 1e-9
    model(images).sum().backward()


def test_the_networks_at_random_are_pruned():
    removed = exact = 0
    for seed in range(8):
        recipe = Recipe((("residual", 4, "relu"), ("squeeze", 4, "silu"), ("concat", 3, "relu")), "mean", seed)
        model = recipe.build()
        speedup = speed_up(model, recipe.inputs(), random_masks(model, seed))
        removed += speedup.plan.channels_removed
        exact += not speedup.report.inexact
    assert removed > 40
    assert exact >= 2


def unpadded(norm_behind):
    """No layer pads, so that constants are the same everywhere."""
    reader = [nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6)] if norm_behind else [nn.Conv2d(8, 6, 3)]
    first = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Hardswish()]
    return disturb(nn.Sequential(*first, *reader, nn.SiLU(), nn.Flatten(), nn.Linear(6 * 16, 3)).double())


@pytest.mark.parametrize("norm_behind", [False, True])
def test_constants_behind_masked_convolutions_are_handed_on(norm_behind):
    model, images = unpadded(norm_behind), torch.randn(4, 3, 8, 8).double()
    masks = filters(model, {"0": [1, 2, 5, 7]})
    reference = masked(model, masks)
    speedup = speed_up(model, images, masks)
    assert speedup.plan.channels_removed == 4
    assert not speedup.report.inexact
    other = torch.randn(4, 3, 8, 8).double()
    assert relative_difference(model, reference, other) < 1e-12


def test_constants_pass_sums_and_concatenations():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
            self.inner, self.grow = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 3, 1, bias=False)
            self.norm1, self.norm2 = nn.BatchNorm2d(7), nn.BatchNorm2d(7)
            self.last, self.head = nn.Conv2d(7, 5, 1), nn.Linear(12, 2)

        def forward(self, x):
            x = F.relu(self.norm(self.stem(x)))
            x = torch.cat([x, self.grow(F.relu(self.inner(x)))], 1)
            x = torch.cat([self.last(F.relu(self.norm1(x))), F.relu(self.norm2(x))], 1)
            return self.head(x.mean((2, 3)))

    model, images = disturb(Dense().double()), torch.randn(4, 3, 5, 5).double()
    masks = filters(model, {"inner": [0, 3], "stem": [1]}, bias=False)
    reference = masked(model, masks)
    speedup = speed_up(model, images, masks)
    assert speedup.plan.channels_removed == 3
    assert not speedup.report.inexact
    assert relative_difference(model, reference, images) < 1e-12


def padded():
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1, bias=False)]
    layers += [nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)]
    return disturb(nn.Sequential(*layers))


def test_constants_along_a_padded_border_are_right_on_average_and_it_is_said():
    model, images = padded(), torch.randn(4, 3, 12, 12)
    masks = filters(model, {"0": [1, 2, 5, 7]})
    model[1].bias.data += 1
    model[1].running_mean.data -= 1
    reference, dropped = masked(model, masks), masked(model, {**masks, **filters(model, {"1": [1, 2, 5, 7]})})
    speedup = ModelSpeedup(model, images, masks)
    with pytest.warns(UserWarning, match="'3': constants that it reads differ along the border") as record:
        speedup.speedup_model()
    distance = relative_difference(model, reference, images)
    assert f"{speedup.report.max_rel:.3g} relative" in str(record[0].message)
    assert 1e-5 < distance <= speedup.report.max_rel
    assert distance < relative_difference(dropped, reference, images) / 3
    with torch.no_grad():  # inside of the border the readers' outputs differ by one constant a channel
        inside = (model[:4](images) - reference[:4](images))[:, :, 1:-1, 1:-1]
    assert float(inside.flatten(2).std(2).max()) < 1e-5 * float(inside.abs().max())


def test_channels_that_a_norm_over_channels_sees_leave_and_it_is_said():
    layers = [nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 4, 1), nn.InstanceNorm2d(4, affine=True)]
    model, images = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 16, 3)), torch.randn(2, 3, 4, 4)
    masks = filters(model, {"0": [1, 6], "1": [1, 6], "3": [2], "4": [2]})
    reference = masked(model, masks)
    speedup = speed_up(model, images, masks)
    assert (model[0].out_channels, model[1].num_channels, model[3].out_channels, model[6].in_features) == (6, 6, 3, 48)
    assert speedup.report.inexact == {"1": "it normalises over channels, of which some have left"}
    assert speedup.report.max_rel > 1e-5
    for network in (model, reference):
        network[1] = nn.Identity()
    assert relative_difference(model, reference, images) < 1e-5


class Grouped(nn.Module):
    """What RegNet does: a convolution in groups between two others, with a squeeze-excite behind it."""

    def __init__(self, transposed=False):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 12, 1, bias=False), nn.BatchNorm2d(12)
        layer = nn.ConvTranspose2d if transposed else nn.Conv2d
        self.conv2, self.bn2 = layer(12, 12, 3, padding=1, groups=3, bias=False), nn.BatchNorm2d(12)
        self.fc1, self.fc2 = nn.Linear(12, 5), nn.Linear(5, 12)
        self.conv3, self.head = nn.Conv2d(12, 6, 1), nn.Linear(6 * 16, 2)

    def forward(self, x):
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        x = x * torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3))))))[:, :, None, None]
        return self.head(self.conv3(x).flatten(1))


# As many channels of each group, at different places; one more of the second.
SCATTERED = {"conv1": [0, 2, 4, 5, 6, 9, 11], "conv2": [1, 7, 8], "bn1": [0, 2, 4, 5, 6, 9, 11], "bn2": [1, 7, 8]}


@pytest.mark.parametrize("transposed", [False, True])
def test_scattered_masks_of_grouped_layers_line_up(transposed):
    model, images = disturb(Grouped(transposed).double()), torch.randn(2, 3, 4, 4).double()
    masks = filters(model, {name: gone for name, gone in SCATTERED.items() if name != "conv2"})
    if not transposed:
        masks.update(filters(model, {"conv2": SCATTERED["conv2"]}))
    reference = masked(model, masks)
    speedup = speed_up(model, images, masks)
    assert (model.conv1.out_channels, model.conv2.in_channels, model.conv2.groups) == (6, 6, 3)
    assert (model.conv2.out_channels, model.conv3.in_channels) == (9, 9)
    assert relative_difference(model, reference, images) < 1e-12
    order = speedup.plan.provenance["reordered"]["conv1"]
    gone = [order[i] for i in range(12) if i not in speedup.plan.kept()["conv1"]]
    assert set(gone) < set(SCATTERED["conv1"])
    (verdict,) = speedup.report.left
    assert (verdict.name, verdict.asked, verdict.removed) == ("conv1", 7, 6)
    assert "1 are tied to channels that stay" in verdict.reason


def test_an_optimizer_follows_a_new_order():
    model, images = disturb(Grouped()), torch.randn(2, 3, 4, 4)
    masks = filters(model, SCATTERED)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(images).square().sum().backward()
    optimizer.step()
    for parameter in model.parameters():  # so that a parameter tells where its momentum belongs
        optimizer.state[parameter]["momentum_buffer"] = parameter.detach().clone()
    before = {name: (optimizer.state[p]["momentum_buffer"], p.detach().clone()) for name, p in model.named_parameters()}
    with torch.no_grad():
        for path, targets in masks.items():
            for name, mask in targets.items():
                before[f"{path}.{name}"][0].mul_(mask)
    speedup = speed_up(model, images, masks)
    with pytest.warns(UserWarning, match="starts afresh for 1 of them"):
        nni_plugin.carry_optimizer(optimizer, speedup.plan)
    for name, parameter in model.named_parameters():
        if name == "conv2.weight":
            assert parameter not in optimizer.state
        elif parameter.requires_grad and not name.endswith(("bias", "running_mean")):
            assert torch.equal(optimizer.state[parameter]["momentum_buffer"], parameter), name
    model.zero_grad()
    model(images).square().sum().backward()
    optimizer.step()


def test_an_order_that_changes_the_network_is_taken_back():
    class Numbered(Grouped):
        def forward(self, x):
            x = F.relu(self.bn1(self.conv1(x)))
            x = x * (1 + torch.arange(x.shape[1]) % 4)[:, None, None]  # every channel has its own meaning
            return self.head(self.conv3(F.relu(self.bn2(self.conv2(x)))).flatten(1))

    model, images = disturb(Numbered()), torch.randn(2, 3, 4, 4)
    masks = filters(model, {name: SCATTERED[name] for name in ("conv1", "bn1")})
    reference = masked(model, masks)
    speed_up(model, images, masks)
    assert model.conv1.out_channels == 12
    assert relative_difference(model, reference, images) == 0
