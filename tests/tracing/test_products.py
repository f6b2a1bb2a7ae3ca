"""Matrix products, convolutions and attention: what is summed over is read, heads are units."""

import pytest
import torch
from attention_blocks import Standardised
from torch import Tensor, nn
from traced import Net, X, by_name, drawn, paths, prove, reasons

from nni_plugin.adapters.torch_pruning import find_groups

F = nn.functional

CONVOLUTIONS = {
    "dense": (nn.Conv2d(8, 6, 3, padding=1), 6, 8),
    "grouped": (nn.Conv2d(8, 6, 3, padding=1, groups=2), 6, 4),
    "depthwise": (nn.Conv2d(8, 8, 3, padding=1, groups=8), 8, 8),
    "transposed": (nn.ConvTranspose2d(8, 6, 3, padding=1), 6, 8),
    "transposed-grouped": (nn.ConvTranspose2d(8, 6, 3, padding=1, groups=2), 6, 4),
    "transposed-depthwise": (nn.ConvTranspose2d(8, 8, 3, padding=1, groups=8), 8, 8),
    "without-bias": (nn.Conv2d(8, 6, 1, bias=False), 6, 8),
}


@pytest.mark.parametrize("name", list(CONVOLUTIONS))
def test_convolutions(name: str) -> None:
    layer, width, units = CONVOLUTIONS[name]
    groups = by_name(prove(drawn(Net(lambda s, a, b: s.layer(a), width, layer=layer)), X))
    assert reasons(groups.values()) == {}
    assert groups["a"].units == units
    if "depthwise" in name:
        assert "layer" in paths(groups["a"])
    else:
        assert paths(groups["a"], "in") == {"layer"}
        assert groups["layer"].units == (3 if "grouped" in name else 6)


@pytest.mark.parametrize(
    ("layer", "width"), [(nn.Conv2d(8, 16, 1, groups=8), 16), (nn.Conv2d(8, 4, 1, groups=4), 4)], ids=["many", "one"]
)
def test_convolutions_that_cannot_be_cut(layer: nn.Module, width: int) -> None:
    groups = prove(drawn(Net(lambda s, a, b: s.layer(a), width, layer=layer)), X)
    assert "'layer'" in reasons(groups)["a"]
    assert "b" not in reasons(groups)


def test_weight_standardisation() -> None:
    groups = by_name(prove(drawn(Net(lambda s, a, b: s.layer(a), 6, layer=Standardised(8, 6))), X))
    assert reasons(groups.values()) == {}
    assert {"layer", "layer.gain"} <= paths(groups["layer"])
    assert [passage.path for passage in groups["a"].passages] == ["layer"]


def test_convolution_over_channels_keeps_them() -> None:
    conv = nn.Conv1d(1, 1, 3, padding=1)
    groups = prove(
        drawn(Net(lambda s, a, b: a * s.eca(a.mean((2, 3))[:, None]).transpose(1, 2)[..., None], eca=conv)), X
    )
    assert reasons(groups)["a"] == "it is convolved over in module 'eca'"


class Heads(nn.Module):
    """Attention of heads, over tokens `[N, L, 8]`.

    Args:
        fused: By torch's own operator.
        one: Queries, keys and values from one layer.
        named: Heads by attribute; otherwise their number is taken from the width of a head.
        shared: Heads of keys and values, each for several heads of queries.
    """

    def __init__(self, fused: bool, one: bool, named: bool, shared: int = 0, heads: int = 4, head_dim: int = 3) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale, self.fused = heads, head_dim, head_dim**-0.5, fused
        self.one, self.named, self.shared = one, named, shared
        inner = heads * head_dim
        if one:
            self.qkv = nn.Linear(8, 3 * inner)
        else:
            self.q, self.k, self.v = (nn.Linear(8, n * head_dim) for n in (heads, shared or heads, shared or heads))
        self.proj = nn.Linear(inner, 8)

    def split(self, x: Tensor) -> Tensor:
        last = (self.num_heads, -1) if self.named else (-1, self.head_dim)
        return x.view(*x.shape[:2], *last).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        if self.one:
            shape = (n, length, 3, self.num_heads, -1) if self.named else (n, length, 3, -1, self.head_dim)
            q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.shared:
            q, k, v = (
                layer(x).view(n, length, -1, self.head_dim).transpose(1, 2) for layer in (self.q, self.k, self.v)
            )
            k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
        else:
            q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        else:
            y = (q * self.scale @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(n, length, -1))


def attend(s: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    return a + s.attention(a.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (8, 8))


@pytest.mark.parametrize("named", [True, False], ids=["num-heads", "head-dim"])
@pytest.mark.parametrize("one", [True, False], ids=["qkv", "q-k-v"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_whole_heads_leave(fused: bool, one: bool, named: bool) -> None:
    model = drawn(Net(attend, attention=Heads(fused, one, named)))
    groups = by_name(prove(model, X))
    heads = groups["attention.qkv" if one else "attention.q"]
    assert reasons(groups.values()) == {}
    assert heads.units == 4
    assert heads.part == "heads"
    assert {size.name for size in heads.sizes} == {"num_heads"}
    assert paths(heads, "in") == {"attention.proj"}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_positions_of_every_head_leave(fused: bool) -> None:
    """Of queries and keys; the scale is the module's own and stays."""
    model = drawn(Net(attend, attention=Heads(fused, False, True)))
    groups = by_name(prove(model, X, parts={"head_dim"}))
    assert groups["attention.q"].units == 3
    assert groups["attention.q"].part == "head_dim"
    assert paths(groups["attention.q"]) == {"attention.q", "attention.k"}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_heads_that_share_keys_leave_together(fused: bool) -> None:
    model = drawn(Net(attend, attention=Heads(fused, False, False, shared=2)))
    groups = by_name(prove(model, X, least=1))
    assert reasons(groups.values()) == {}
    assert groups["attention.q"].units == 2
    assert {"attention.q", "attention.k", "attention.v"} <= paths(groups["attention.q"])


def test_a_scale_that_torch_takes_from_the_width_keeps_it() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(*(layer(x)[:, None] for layer in (self.q, self.k, self.v)))[:, 0]

    groups = by_name(prove(drawn(Net(attend, attention=Plain())), X))
    assert groups["attention.q"].fixed == "it sets the scale of an attention by its number in module 'attention'"
    assert groups["a"].fixed is None


def test_a_mask_has_a_row_for_every_head() -> None:
    """Given to torch's fused kernel, which takes none that wants a gradient."""

    class Masked(Heads):
        def __init__(self) -> None:
            super().__init__(True, True, True)
            self.slopes = nn.Parameter(torch.ones(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            n, length, _ = x.shape
            q, k, v = self.qkv(x).reshape(n, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            mask = (self.slopes * torch.linspace(0, 1, length, dtype=x.dtype)).expand(-1, length, -1).detach()
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None], scale=self.scale)
            return self.proj(y.transpose(1, 2).reshape(n, length, -1))

    groups = by_name(find_groups(drawn(Net(attend, attention=Masked())), X))
    assert groups["attention.qkv"].units == 4
    assert "attention.slopes" in paths(groups["attention.qkv"])
    assert reasons(groups.values()) == {}


def test_a_product_with_a_bare_parameter_keeps_what_it_sums_over() -> None:
    matrix = nn.Parameter(torch.ones(8, 8))
    groups = by_name(prove(drawn(Net(lambda s, a, b: (a.permute(0, 2, 3, 1) @ s.w).permute(0, 3, 1, 2), w=matrix)), X))
    assert groups["a"].fixed == "it is summed over with a bare parameter in module ''"


def test_products_of_batches_of_activations() -> None:
    """Spatial attention without heads: channels are the batch of the product."""

    def do(s: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum("nchw,ncwv->nchv", a, b)

    groups = by_name(prove(drawn(Net(do)), X))
    assert "b" in paths(groups["a"])
    assert groups["a"].fixed is None


def test_bilinear_pooling_leaves_one_side() -> None:
    groups = by_name(prove(drawn(Net(lambda s, a, b: torch.einsum("nchw,ndhw->ncdhw", a, b).flatten(1, 2), 64)), X))
    assert [bool(groups[name].fixed) for name in ("a", "b")].count(True) == 1
