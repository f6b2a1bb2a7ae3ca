"""Small convolutional networks at random: every coupling that the core claims to cut exactly, in any order.

`networks()` is a hypothesis strategy of :class:`Recipe`; `recipe.build()` makes the network, its weights, affine
parameters and statistics drawn from the recipe's seed, in float64 and eval mode. `any_plan(groups, seed)` keeps a
random legal part of every group.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from nni_plugin.groups import ChannelGroup
from nni_plugin.plan import GroupPlan, PruningPlan

SIZE = 6  # pixels of a side

BLOCKS = (
    "conv",
    "bare",  # a convolution with a bias and no normalisation
    "residual",
    "projection",
    "resnext",
    "depthwise",
    "inverted",
    "squeeze",
    "concat",
    "dense",
    "shared",
    "up",
    "up_grouped",
    "pool",
)
HEADS = ("mean", "flatten", "mlp", "conv")
ACTIVATIONS = ("relu", "silu", "sigmoid", "prelu", "prelu_one", "none")


def activation(name: str, width: int) -> nn.Module:
    return {
        "relu": nn.ReLU,
        "silu": nn.SiLU,
        "sigmoid": nn.Sigmoid,
        "prelu": lambda: nn.PReLU(width),
        "prelu_one": nn.PReLU,
        "none": nn.Identity,
    }[name]()


class Branches(nn.Module):
    """What several branches make of one input, added or concatenated, then an activation."""

    def __init__(self, how: str, branches: Iterable[nn.Module], after: nn.Module | None = None) -> None:
        super().__init__()
        self.how, self.branches, self.after = how, nn.ModuleList(branches), after or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        parts = [branch(x) for branch in self.branches]
        joined = (
            torch.cat(parts, 1) if self.how == "cat" else torch.stack(parts).sum(0) if len(parts) > 2 else sum(parts)
        )
        return self.after(joined)


class Squeeze(nn.Module):
    """Squeeze-and-excite with convolutions, or linear layers."""

    def __init__(self, width: int, linear: bool) -> None:
        super().__init__()
        inner, self.linear = max(width // 2, 2), linear
        layer = nn.Linear if linear else lambda a, b: nn.Conv2d(a, b, 1)
        self.fc1, self.fc2 = layer(width, inner), layer(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3), keepdim=not self.linear)
        gate = torch.sigmoid(self.fc2(torch.relu(self.fc1(pooled))))
        return x * (gate[:, :, None, None] if self.linear else gate)


class Twice(nn.Module):
    """One layer called twice."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layer(torch.relu(self.layer(x))))


def conv_bn(channels: int, width: int, kernel: int = 3, groups: int = 1, affine: bool = True) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, width, kernel, padding=kernel // 2, groups=groups, bias=not affine),
        nn.BatchNorm2d(width, affine=affine),
    ]


def block(kind: str, channels: int, width: int, act: str) -> tuple[nn.Module, int]:
    """Return a block and its number of output channels."""
    if kind == "conv":
        return nn.Sequential(*conv_bn(channels, width), activation(act, width)), width
    if kind == "bare":
        return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), activation(act, width)), width
    if kind in ("residual", "projection"):
        width = channels if kind == "residual" else width
        inside = nn.Sequential(*conv_bn(channels, 5), activation(act, 5), *conv_bn(5, width))
        other = nn.Identity() if kind == "residual" else nn.Sequential(*conv_bn(channels, width, 1))
        return Branches("add", [inside, other], activation(act, width)), width
    if kind == "resnext":
        layers = [*conv_bn(channels, 8, 1), nn.ReLU(), *conv_bn(8, 8, 3, 2), nn.ReLU(), *conv_bn(8, channels, 1)]
        return Branches("add", [nn.Sequential(*layers), nn.Identity()], activation(act, channels)), channels
    if kind == "depthwise":
        return nn.Sequential(*conv_bn(channels, channels, 3, channels), nn.ReLU(), *conv_bn(channels, width, 1)), width
    if kind == "inverted":
        layers = [*conv_bn(channels, 6, 1), nn.ReLU6(), *conv_bn(6, 6, 3, 6), nn.ReLU6(), *conv_bn(6, channels, 1)]
        return Branches("add", [nn.Sequential(*layers), nn.Identity()]), channels
    if kind == "squeeze":
        return nn.Sequential(*conv_bn(channels, width), activation(act, width), Squeeze(width, act == "relu")), width
    if kind == "concat":
        parts = [nn.Sequential(*conv_bn(channels, w), activation(act, w)) for w in (width, 3)]
        return Branches("cat", parts), width + 3
    if kind == "dense":
        inside = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 3, 3, padding=1, bias=False))
        return Branches("cat", [nn.Identity(), inside]), channels + 3
    if kind == "shared":
        return Twice(nn.Conv2d(channels, channels, 3, padding=1)), channels
    if kind == "up":
        return nn.Sequential(nn.ConvTranspose2d(channels, width, 2, stride=2), nn.MaxPool2d(2), nn.ReLU()), width
    if kind == "up_grouped":
        wide = 2 * ((width + 1) // 2)
        layers = [*conv_bn(channels, 8, 1), nn.SiLU(), nn.ConvTranspose2d(8, 2 * wide, 2, stride=2, groups=2)]
        return nn.Sequential(*layers, nn.AvgPool2d(2)), 2 * wide
    assert kind == "pool"
    return (nn.MaxPool2d if act == "relu" else nn.AvgPool2d)(3, 1, 1), channels


def head(kind: str, channels: int, classes: int = 3) -> nn.Module:
    if kind == "mean":
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
    if kind == "flatten":
        return nn.Sequential(nn.MaxPool2d(3), nn.Flatten(), nn.Linear(channels * (SIZE // 3) ** 2, classes))
    if kind == "mlp":
        inner = [nn.Linear(channels * (SIZE // 3) ** 2, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, classes)]
        return nn.Sequential(nn.AvgPool2d(3), nn.Flatten(), *inner)
    return nn.Sequential(nn.Conv2d(channels, classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw affine parameters and statistics (whose defaults hide mistakes), in float64 and eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.double().modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            tensors = [(module.weight, 0.5, 1.0), (module.bias, -0.5, 1.0), (module.running_mean, -0.3, 0.6)]
            for tensor, low, size in [*tensors, (module.running_var, 0.5, 1.0)]:
                if tensor is not None:
                    tensor.data.copy_(low + size * torch.rand(tensor.shape, generator=generator))
    return model.eval()


@dataclass(frozen=True)
class Recipe:
    """Blocks (kind, width, activation) and head of a network, and the seed of everything drawn at random."""

    blocks: tuple[tuple[str, int, str], ...]
    head: str
    seed: int

    def build(self) -> nn.Module:
        torch.manual_seed(self.seed)
        channels = 4
        layers: list[nn.Module] = [nn.Sequential(*conv_bn(3, channels), nn.ReLU())]
        for kind, width, act in self.blocks:
            layer, channels = block(kind, channels, width, act)
            layers.append(layer)
        return randomise(nn.Sequential(*layers, head(self.head, channels)), self.seed)

    def inputs(self, number: int = 2) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(number, 3, SIZE, SIZE, dtype=torch.float64, generator=generator)


def _mishandled(recipe: Recipe) -> bool:
    """Tell recipes that the graph mishandles; `test_parity_random` has tests of their own that show it."""
    joins = any(kind in ("concat", "dense") for kind, _, _ in recipe.blocks)
    one = any(act == "prelu_one" for _, _, act in recipe.blocks)
    flat = recipe.head in ("flatten", "mlp")
    return (joins and flat) or (one and (joins or flat))


def networks(blocks: Sequence[str] = BLOCKS, most: int = 4) -> st.SearchStrategy[Recipe]:
    one = st.tuples(st.sampled_from(blocks), st.integers(2, 6), st.sampled_from(ACTIVATIONS))
    several = st.lists(one, min_size=1, max_size=most).map(tuple)
    recipes = st.builds(Recipe, several, st.sampled_from(HEADS), st.integers(0, 2**16))
    return recipes.filter(lambda recipe: not _mishandled(recipe))


def any_plan(groups: Sequence[ChannelGroup], seed: int, least: int = 1, names: set[str] | None = None) -> PruningPlan:
    """Keep a random legal part of every group that may be pruned (or of those named), at least `least` units."""
    draw = random.Random(seed)
    entries = []
    for group in groups:
        if group.fixed is not None:
            continue
        units = list(range(group.units))
        if names is None or group.name in names:
            units = draw.sample(units, draw.randint(min(least, group.units), group.units))
        kept = torch.isin(group.unit, torch.tensor(units)).nonzero().flatten().tolist()
        entries.append(GroupPlan(group.name, group.width, tuple(kept)))
    return PruningPlan(tuple(entries))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Copy everything that a network holds: parameters, buffers and gradients, by name."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            state[f"{name}.grad"] = parameter.grad.clone()
    return state


def assert_same(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Assert that a network holds, bit for bit, what `state_of` returned."""
    now = state_of(model)
    assert list(now) == list(state)
    for name, tensor in state.items():
        assert now[name].dtype == tensor.dtype
        assert now[name].shape == tensor.shape, f"{name}: {tuple(now[name].shape)}, was {tuple(tensor.shape)}"
        assert torch.equal(now[name], tensor), name
