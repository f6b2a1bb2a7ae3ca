"""Statistics: what is taken over channels changes when one leaves, so it is taken over those that remain."""

import pytest
import torch
from torch import Tensor, nn
from traced import Net, X, by_name, drawn, paths, prove, reasons

F = nn.functional


def last(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Length(nn.Module):
    """Normalises by the root of the mean square."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class Response(nn.Module):
    """Normalises each map's length by the mean length of all maps, as ConvNeXt V2 does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        length = x.norm(dim=(1, 2), keepdim=True)
        return x + self.bias + self.weight * (x * length / (length.mean(-1, keepdim=True) + 1e-6))


# The layer, what is done with it, units of the stem `a`, and whether a statistic runs over channels.
NORMS = {
    "batch": (nn.BatchNorm2d(8), lambda s, a, b: s.norm(a), 8, False),
    "batch-without-parameters": (nn.BatchNorm2d(8, affine=False), lambda s, a, b: s.norm(a), 8, False),
    "batch-without-statistics": (nn.BatchNorm2d(8, track_running_stats=False), lambda s, a, b: s.norm(a), 8, False),
    "instance": (nn.InstanceNorm2d(8), lambda s, a, b: s.norm(a), 8, False),
    "instance-with-parameters": (nn.InstanceNorm2d(8, affine=True), lambda s, a, b: s.norm(a), 8, False),
    "group": (nn.GroupNorm(2, 8), lambda s, a, b: s.norm(a), 4, True),
    "group-of-all": (nn.GroupNorm(1, 8), lambda s, a, b: s.norm(a), 8, True),
    "layer": (nn.LayerNorm(8), lambda s, a, b: last(s.norm, a), 8, True),
    "layer-without-parameters": (nn.LayerNorm(8, elementwise_affine=False), lambda s, a, b: last(s.norm, a), 8, True),
    "length": (Length(), lambda s, a, b: last(s.norm, a), 8, True),
    "response": (Response(), lambda s, a, b: last(s.norm, a), 8, True),
    "torch-length": (nn.RMSNorm(8), lambda s, a, b: last(s.norm, a), 8, True),
}


@pytest.mark.filterwarnings("error:input's size:UserWarning")
@pytest.mark.parametrize("name", list(NORMS))
def test_normalisation(name: str) -> None:
    layer, do, units, over = NORMS[name]
    groups = by_name(prove(drawn(Net(do, norm=layer)), X))
    if name == "torch-length":
        assert reasons(groups.values())["a"] == "layer 'norm' is of a kind that cannot be cut"
        return
    assert reasons(groups.values()) == {}
    assert groups["a"].units == units
    assert {passage.path for passage in groups["a"].passages} == ({"norm"} if over else set())
    assert {passage.side for passage in groups["a"].passages} == ({"in", "out"} if over else set())


def test_a_statistic_over_channels_beside_layers_keeps_them() -> None:
    """Verification takes a module with a statistic as it is; one that holds layers would never be looked into."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * x.mean(1, keepdim=True)

    groups = by_name(prove(drawn(Net(lambda s, a, b: s.gated(a), gated=Gated())), X))
    assert groups["a"].fixed == "it enters a statistic (mean) beside layers in module 'gated'"
    assert groups["gated.inner"].fixed is None
    groups = by_name(prove(drawn(Net(lambda s, a, b: b * a.mean(1, keepdim=True))), X))
    assert groups["a"].fixed == "it enters a statistic (mean) beside layers in module ''"
    wrapped = by_name(prove(drawn(nn.Sequential(Net(lambda s, a, b: b * a.mean(1, keepdim=True)))), X))
    assert wrapped["0.a"].fixed == "it enters a statistic (mean) beside layers in module '0'"


def test_a_length_is_that_of_what_remains() -> None:
    groups = prove(drawn(Net(lambda s, a, b: F.normalize(a, dim=1) + b)), X)
    assert reasons(groups) == {}
    assert not by_name(groups)["a"].passages


def test_a_statistic_over_what_stays_anyway_is_none() -> None:
    """Over tokens, whose number is given: the channels beside them do not pass through it."""

    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Parameter(torch.zeros(1, 64, 8))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.positions
            return x - x.mean(1, keepdim=True)

    def do(s: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        return s.centred(a.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (8, 8)) + b

    groups = by_name(prove(drawn(Net(do, centred=Centred())), X))
    assert groups["a"].fixed is None
    assert not groups["a"].passages


@pytest.mark.parametrize(
    "how", ["softmax", "log_softmax", "cumsum", "sort", "topk", "amax", "argmax", "prod", "median"]
)
def test_what_chooses_among_channels_keeps_them(how: str) -> None:
    def do(s: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        y = a.topk(4, 1) if how == "topk" else getattr(torch, how)(a, 1)
        y = y if isinstance(y, Tensor) else y[0]
        y = y.double() if y.dim() == 4 else y[:, None].double()
        return b * y.sum(1, keepdim=True)

    groups = prove(drawn(Net(do)), X)
    assert f"{how} in module ''" in reasons(groups)["a"] or "chosen among in module ''" in reasons(groups)["a"]
    assert "b" not in reasons(groups)


POOLS = {
    "mean": lambda s, a, b: F.avg_pool2d(a, 3, 1, 1) + b,
    "max": lambda s, a, b: F.max_pool2d(a, 3, 1, 1) + b,
    "adaptive-mean": lambda s, a, b: F.adaptive_avg_pool2d(a, 2).repeat(1, 1, 4, 4) + b,
    "adaptive-one": lambda s, a, b: F.adaptive_avg_pool2d(a, 1) + b,
    "adaptive-max": lambda s, a, b: F.adaptive_max_pool2d(a, 1) + b,
    "line": lambda s, a, b: F.avg_pool1d(a.flatten(2), 3, 1, 1).unflatten(2, (8, 8)) + b,
    "max-line": lambda s, a, b: F.max_pool1d(a.flatten(2), 3, 1, 1).unflatten(2, (8, 8)) + b,
    "nearest": lambda s, a, b: F.interpolate(F.max_pool2d(a, 2), scale_factor=2) + b,
    "exact": lambda s, a, b: F.interpolate(F.max_pool2d(a, 2), scale_factor=2, mode="nearest-exact") + b,
    "bilinear": lambda s, a, b: F.interpolate(F.max_pool2d(a, 2), size=8, mode="bilinear") + b,
    "one-picture": lambda s, a, b: F.max_pool2d(a[0], 3, 1, 1)[None] + b,
    "reflected": lambda s, a, b: F.pad(a, (1, 1, 1, 1), mode="reflect")[..., 1:-1, 1:-1] + b,
    "unfolded": lambda s, a, b: F.unfold(a, 3, padding=1).unflatten(1, (-1, 9)).sum(2).unflatten(2, (8, 8)) + b,
}


@pytest.mark.parametrize("name", list(POOLS))
def test_pooling_follows_channels(name: str) -> None:
    groups = by_name(prove(drawn(Net(POOLS[name])), X))
    assert reasons(groups.values()) == {}
    assert "b" in paths(groups["a"])


def test_pooling_over_channels_keeps_them() -> None:
    def do(s: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        return F.avg_pool1d(a.flatten(2).transpose(1, 2), 3, 1, 1).transpose(1, 2).unflatten(2, (8, 8)) + b

    groups = by_name(prove(drawn(Net(do)), X))
    assert groups["a"].fixed == "it is resampled in module ''"


def test_normalisation_over_whole_maps_keeps_channels() -> None:
    groups = by_name(prove(drawn(Net(lambda s, a, b: s.norm(a), norm=nn.LayerNorm([8, 8, 8]))), X))
    assert groups["a"].fixed == "layer 'norm' is of a kind that cannot be cut"


def test_local_response_normalisation_keeps_channels() -> None:
    groups = prove(drawn(Net(lambda s, a, b: s.norm(a), norm=nn.LocalResponseNorm(3))), X)
    assert "in module 'norm'" in reasons(groups)["a"]
