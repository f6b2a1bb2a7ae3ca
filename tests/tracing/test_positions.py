"""Operators that work element by element or move positions: what is coupled, and that cutting it is exact."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from traced import Net, X, by_name, drawn, paths, prove, reasons

F = nn.functional
Do = Callable[[nn.Module, Tensor, Tensor], Tensor]


def shuffled(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.shape
    return x.reshape(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def written(target: Tensor, source: Tensor, part: slice) -> Tensor:
    target[:, part] += source[:, part]
    return target


# What is done to `a` and `b` of 8 channels, its number of channels, and whether they come to be the same channels.
FOLLOWED: dict[str, tuple[Do, int, bool]] = {
    "sum": (lambda s, a, b: a + 2 * b, 8, True),
    "product": (lambda s, a, b: a * torch.sigmoid(b), 8, True),
    "where": (lambda s, a, b: torch.where(a > b, a, b), 8, True),
    "maximum": (lambda s, a, b: torch.maximum(a, b), 8, True),
    "in-place": (lambda s, a, b: (a * 1).add_(b).mul_(0.5).relu_(), 8, True),
    "in-place-on-a-view": (lambda s, a, b: written(a * 1, b, slice(None)), 8, True),
    "one-per-map": (lambda s, a, b: a * b.mean((2, 3), keepdim=True), 8, True),
    "one-per-channel": (lambda s, a, b: a * b.mean((2, 3))[..., None, None], 8, True),
    "constants": (lambda s, a, b: a + torch.ones_like(a) * b.new_zeros(()), 8, False),
    "zeros-and-sum": (lambda s, a, b: torch.zeros_like(a) + a + b, 8, True),
    "cat": (lambda s, a, b: torch.cat([a, b], 1), 16, False),
    "cat-thrice": (lambda s, a, b: torch.cat([a, a + b, b], 1), 24, True),
    "cat-with-empty": (lambda s, a, b: torch.cat([a[:, :0], a], 1) + b, 8, True),
    "stack-and-sum": (lambda s, a, b: torch.stack([a, b], 1).sum(1), 8, True),
    "stack-last-and-sum": (lambda s, a, b: torch.stack([a, b], -1).sum(-1), 8, True),
    "chunk": (lambda s, a, b: a.chunk(2, 1)[0] * a.chunk(2, 1)[1] + b.chunk(2, 1)[0], 4, True),
    "glu": (lambda s, a, b: F.glu(torch.cat([a, b], 1), 1), 8, True),
    "unequal-slices": (lambda s, a, b: torch.cat([a[..., :3], b[..., 3:]], -1), 8, True),
    "shuffle": (lambda s, a, b: shuffled(torch.cat([a, b], 1), 2), 16, True),
    "spatial-roll-and-flip": (lambda s, a, b: a.roll(2, 2).flip(3) + b.flip(2, 3), 8, True),
    "flip": (lambda s, a, b: a.flip(1) + b, 8, True),
    "repeat": (lambda s, a, b: a.repeat(1, 2, 1, 1), 16, False),
    "expand": (lambda s, a, b: a + b.mean((2, 3), keepdim=True).expand(-1, -1, 8, 8), 8, True),
    "interleave": (lambda s, a, b: a.repeat_interleave(2, 1), 16, False),
    "flat-and-back": (
        lambda s, a, b: a.flatten(2).transpose(1, 2).reshape(2, 8, 8, -1).permute(0, 3, 1, 2) + b,
        8,
        True,
    ),
    "unsqueezed-in-place": (lambda s, a, b: b + a.mean((2, 3)).unsqueeze_(1).transpose(1, 2)[..., None], 8, True),
    "squeezed-in-place": (lambda s, a, b: b + (a.mean((2, 3)) * 1)[:, None].squeeze_(1)[..., None, None], 8, True),
    "spatial-index": (lambda s, a, b: a[:, :, [1, 0, 3, 2, 5, 4, 7, 6]] + b, 8, True),
    "spatial-selection": (lambda s, a, b: a + b.index_select(2, torch.tensor([7, 6, 5, 4, 3, 2, 1, 0])), 8, True),
    "spatial-topk": (lambda s, a, b: b + a.flatten(2).topk(4, 2).values.mean(2)[..., None, None], 8, True),
    "spatial-padding": (lambda s, a, b: F.pad(a, (1, 0, 0, 1))[..., 1:, 1:] + b, 8, True),
    "unbound-maps": (lambda s, a, b: sum(a.unbind(2))[:, :, None] + b, 8, True),
    "unfolded": (lambda s, a, b: F.unfold(a, 1).view(2, -1, 8, 8) + b, 8, True),
    "autograd-function": (lambda s, a, b: Doubled.apply(a) + b, 8, True),
    "checkpoint": (lambda s, a, b: torch.utils.checkpoint.checkpoint(torch.tanh, a, use_reentrant=True) + b, 8, True),
    "vmap": (lambda s, a, b: torch.vmap(lambda x: 2 * x)(a) + b, 8, True),
}


class Doubled(torch.autograd.Function):
    """An operator of the user's own."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return 2 * gradient


@pytest.mark.parametrize("name", list(FOLLOWED))
def test_followed_exactly(name: str) -> None:
    do, width, joined = FOLLOWED[name]
    groups = prove(drawn(Net(do, width)), X)
    assert reasons(groups) == {}
    assert ("b" in paths(by_name(groups)["a"])) == joined


# What keeps `a` whole, and the words that say why.
KEPT: dict[str, tuple[Do, int, str]] = {
    "select": (lambda s, a, b: a[:, 3:4].squeeze(1)[:, None] + a[:, 0][:, None] + b, 8, "indexed one by one"),
    "index": (lambda s, a, b: a[:, [1, 0, 3, 2, 5, 4, 7, 6]] + b, 8, "indexed by a tensor"),
    "mask": (lambda s, a, b: a[:, torch.arange(8) % 2 == 0] + b[:, :4], 4, "indexed by a tensor"),
    "index-select": (lambda s, a, b: a.index_select(1, torch.tensor(3)) + b, 8, "indexed by a tensor"),
    "roll": (lambda s, a, b: a.roll(3, 1) + b, 8, "is rolled in module ''"),
    "flat-roll": (lambda s, a, b: a.roll(3) + b, 8, "rolled over all dimensions"),
    "shift-by-padding": (lambda s, a, b: F.pad(a, (0, 0, 0, 0, 1, -1)) + b, 8, "padded"),
    "padding": (lambda s, a, b: F.pad(a, (0, 0, 0, 0, 0, 2)), 10, "padded"),
    "other-type": (lambda s, a, b: a.view(torch.int64).abs().sign().double() + b, 8, "another type"),
    "positions-told-by-channels": (
        lambda s, a, b: b + torch.linspace(0, 1, 64).double()[a.flatten(2).argmax(2)[0]][:, None, None],
        8,
        "says which positions",
    ),
    "written-into-zeros": (lambda s, a, b: written(torch.zeros_like(b), a, slice(0, 4)) + b, 8, "part of a tensor"),
    "unknown": (lambda s, a, b: torch.fft.rfft2(a).abs()[..., :1] + b, 8, "aten._fft_r2c in '' is not followed"),
    "fixed-size": (lambda s, a, b: a * torch.linspace(0, 1, 8).double()[:, None, None] + b, 8, "meets a fixed size"),
    "nested": (
        lambda s, a, b: torch.nested.to_padded_tensor(torch.nested.as_nested_tensor(list(a)), 0.0) + b,
        8,
        "aten._nested_tensor_from_tensor_list in '' is not followed",
    ),
}


@pytest.mark.parametrize("name", list(KEPT))
def test_kept_whole_with_the_reason(name: str) -> None:
    do, width, text = KEPT[name]
    assert text in reasons(prove(drawn(Net(do, width)), X))["a"]


def test_an_unknown_operator_names_the_module_that_ran_it() -> None:
    class Strange(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.matrix_exp(x)

    groups = prove(drawn(Net(lambda s, a, b: s.strange(a) + b, strange=nn.Sequential(Strange()))), X)
    assert reasons(groups)["a"] == "operator aten.linalg_matrix_exp in 'strange.0' is not followed"


def test_units_of_chunks_and_shuffles() -> None:
    groups = by_name(prove(drawn(Net(lambda s, a, b: torch.cat(a.chunk(2, 1), 0)[:2], 4)), X))
    assert groups["a"].width == 4
    assert groups["a"].members[0].channel.tolist() == [0, 1, 2, 3] * 2
    groups = by_name(prove(drawn(Net(lambda s, a, b: shuffled(a, 2))), X))
    assert groups["a"].units == 4


@pytest.mark.parametrize("name", ["stack-and-sum", "stack-last-and-sum"])
def test_what_is_stacked_and_summed_is_added(name: str) -> None:
    groups = by_name(prove(drawn(Net(FOLLOWED[name][0])), X))
    assert groups["a"].width == 8
    assert groups["a"].residual


def test_scalars_are_no_channels() -> None:
    def do(s: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        scalar = torch.tensor(2.0, dtype=a.dtype)
        return a * scalar.sum(0) + b * scalar.softmax(0).cumsum(0) * a[0, 0, 0, 0].detach().squeeze().item() ** 0

    assert "indexed" in reasons(prove(drawn(Net(do)), X))["a"]


def test_a_group_is_read_where_a_view_of_it_was_written() -> None:
    """The step that wrote through a view is on the way to the output: its layer carries the gate as well."""
    groups = by_name(prove(drawn(Net(lambda s, a, b: written(a * 1, b, slice(None)))), X))
    assert {member.path for member in groups["a"].writers} == {"a", "b"}


def test_slices_of_hard_coded_length_are_found_out_by_trying() -> None:
    from nni_plugin.adapters.torch_pruning import find_groups, sound_groups

    model = drawn(Net(lambda s, a, b: a[:, :5].sum(1, keepdim=True) * b))
    with pytest.warns(UserWarning, match="Group 'a' is left whole"):
        groups = by_name(sound_groups(model, find_groups(model, X), X))
    assert groups["a"].fixed
    assert not groups["b"].fixed
