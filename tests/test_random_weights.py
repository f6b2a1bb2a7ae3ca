"""Nothing that libraries start at a constant hides a branch; what they draw stays."""

import timm
import torch
from torch import nn

from nni_plugin.adapters.libraries import usual_input
from nni_plugin.adapters.models import create_model
from nni_plugin.random_weights import randomise


class Branch(nn.Module):
    """Has every kind of start that hides something."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.last = nn.Linear(8, 8)
        self.norm = nn.BatchNorm2d(8)
        self.layer_norm = nn.LayerNorm(8)
        self.gamma = nn.Parameter(1e-6 * torch.ones(8))
        self.scale = nn.Parameter(1e-6 * torch.ones(8, 1, 1))
        self.skip = nn.Parameter(torch.zeros(()))
        self.position = nn.Parameter(torch.zeros(1, 4, 8))
        self.temperature = nn.Parameter(2.3 * torch.ones(2, 1, 1))
        self.drawn = nn.Parameter(torch.randn(4, 8))
        nn.init.zeros_(self.norm.weight)
        nn.init.zeros_(self.last.weight)


def test_constants_are_drawn_and_weights_stay() -> None:
    model = Branch()
    weight, drawn = model.conv.weight.detach().clone(), model.drawn.detach().clone()
    randomise(model)
    assert torch.equal(model.conv.weight, weight)
    assert torch.equal(model.drawn, drawn)
    for scale in (model.norm.weight, model.layer_norm.weight, model.gamma, model.scale, model.norm.running_var):
        assert scale is not None
        assert 0.5 <= scale.min().item() < scale.max().item() <= 1.5
    for shift in (model.norm.bias, model.layer_norm.bias, model.norm.running_mean, model.position, model.conv.bias):
        assert shift is not None
        assert -0.5 <= shift.min().item() < 0 < shift.max().item() <= 0.5
    assert model.skip.item() != 0
    assert 1 < model.temperature.min().item() < model.temperature.max().item() < 3.5
    assert 0.3 < model.last.weight.abs().max().item() <= 8**-0.5


def test_the_same_seed_draws_the_same() -> None:
    torch.manual_seed(0)
    models = [Branch() for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    for model, seed in zip(models, (0, 0, 1), strict=True):
        randomise(model, seed)
    first, same, other = (model.norm.running_mean for model in models)
    assert torch.equal(first, same)  # type: ignore[arg-type]
    assert not torch.equal(first, other)  # type: ignore[arg-type]


def test_no_branch_of_a_network_is_hidden() -> None:
    for name in ("resnet18", "convnext_atto"):
        model = timm.create_model(name)
        randomise(model)
        for parameter in model.parameters():
            assert parameter.abs().max().item() > 1e-3


def test_images_are_of_the_models_own_size() -> None:
    assert usual_input(timm.create_model("convnext_atto"), "timm", "convnext_atto") == (3, 224, 224)
    assert usual_input(timm.create_model("test_vit"), "timm", "test_vit") == (3, 160, 160)
    own = create_model("resnet20", "nni_plugin")
    assert usual_input(own, "nni_plugin", "resnet20") == (3, 32, 32)
    assert usual_input(own, "torchvision", "inception_v3") == (3, 299, 299)
    assert usual_input(own, "torchvision", "resnet18") == (3, 224, 224)
