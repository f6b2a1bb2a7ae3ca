"""Slicing in blocks and the way back: bit by bit what selecting position by position gives, on tensors of any size."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks_at_random import assert_same, conv_bn, randomise, state_of
from torch import Tensor, nn

from nni_plugin import GroupPlan, PruningPlan
from nni_plugin.adapters.torch_pruning import cut_channels, find_groups, slicing, surgery
from nni_plugin.adapters.torch_pruning.slicing import sliced

X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=[1, 3, 2**15])
def big(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """What counts as a big tensor and as a block worth copying by itself."""
    monkeypatch.setattr(slicing, "_BIG", request.param)
    return request.param


@st.composite
def cuts(draw: st.DrawFn) -> tuple[Tensor, dict[int, Tensor]]:
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]))
    data = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 9).to(dtype)
    if len(shape) == 4 and draw(st.booleans()):
        data = data.to(memory_format=torch.channels_last)
    elif draw(st.booleans()):
        data = data.transpose(0, -1)
    keep = {}
    for dim in draw(st.sets(st.integers(0, len(shape) - 1), min_size=1)):
        size = data.shape[dim]
        chosen = draw(st.sets(st.integers(0, size - 1), min_size=1))
        keep[dim] = torch.tensor(sorted(chosen))
    return data, keep


def selected(data: Tensor, keep: dict[int, Tensor]) -> Tensor:
    for dim, positions in keep.items():
        data = data.index_select(dim, positions)
    return data


@pytest.mark.parametrize("size", [1, 3, 2**15])
@given(cuts())
def test_slices_are_what_is_selected(size: int, cut: tuple[Tensor, dict[int, Tensor]]) -> None:
    data, keep = cut
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slicing, "_BIG", size)
        small = sliced(data, keep)
    assert torch.equal(small, selected(data, keep))
    layout = torch.contiguous_format
    if data.dim() == 4 and not data.is_contiguous() and data.is_contiguous(memory_format=torch.channels_last):
        layout = torch.channels_last
    assert small.is_contiguous(memory_format=layout)
    assert small.dtype == data.dtype
    assert small.untyped_storage().nbytes() == small.numel() * small.element_size()


def test_without_positions_it_is_a_copy() -> None:
    data = torch.randn(2, 3)
    copied = sliced(data, {})
    assert torch.equal(copied, data)
    assert copied.data_ptr() != data.data_ptr()


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [*conv_bn(3, 12), nn.ReLU(), *conv_bn(12, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return randomise(nn.Sequential(*layers, nn.Linear(8, 3)))


PLAN = PruningPlan((GroupPlan("0", 12, (0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11)), GroupPlan("3", 8, (0, 1, 2, 4, 5, 6, 7))))


@pytest.mark.usefixtures("big")
def test_undoing_puts_every_bit_and_stride_back() -> None:
    model = network()
    model(X).sum().backward()
    groups, before, twin = find_groups(model, X), copy.deepcopy(state_of(model)), copy.deepcopy(model)
    strides = {name: tensor.stride() for name, tensor in model.state_dict().items()}
    undo = cut_channels(model, PLAN, groups)
    assert model[0].weight.shape[0] == 11
    assert model[3].weight.shape == (7, 11, 1, 1)
    undo()
    assert_same(model, before)
    assert {name: tensor.stride() for name, tensor in model.state_dict().items()} == strides
    assert (model[0].out_channels, model[1].num_features, model[3].in_channels) == (12, 12, 12)
    cut_channels(model, PLAN, groups)  # and it can be cut as if nothing had been
    cut_channels(twin, PLAN, groups)
    model.zero_grad()
    assert_same(model, state_of(twin))


@pytest.mark.usefixtures("big")
def test_memory_that_tensors_share_is_shared_again() -> None:
    model = network()
    whole = torch.cat([model[0].weight.data.flatten(), model[3].weight.data.flatten()])
    size = model[0].weight.numel()
    model[0].weight.data = whole[:size].view_as(model[0].weight)
    model[3].weight.data = whole[size:].view_as(model[3].weight)
    before = copy.deepcopy(state_of(model))
    undo = cut_channels(model, PLAN, find_groups(model, X))
    undo()
    assert_same(model, before)
    whole.zero_()
    assert not model[0].weight.any()
    assert not model[3].weight.any()


def test_the_old_memory_of_a_big_tensor_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slicing, "_BIG", 1)
    model = network()
    groups, held = find_groups(model, X), model[0].weight.untyped_storage()
    undo = cut_channels(model, PLAN, groups)
    del held
    alive = [cell.cell_contents for cell in _closures(undo) if isinstance(cell.cell_contents, Tensor)]
    shapes = {tuple(tensor.shape) for tensor in alive}
    assert (12, 3, 3, 3) not in shapes


def _closures(function: object) -> list:
    found, todo = [], [function]
    while todo:
        item = todo.pop()
        todo += [callback for _, callback in getattr(getattr(item, "__self__", None), "_exit_callbacks", ())]
        wrapped = getattr(item, "__wrapped__", None)
        todo += [wrapped] if wrapped is not None else []
        for cell in getattr(item, "__closure__", None) or ():
            found.append(cell)
            if callable(cell.cell_contents) and hasattr(cell.cell_contents, "__closure__"):
                todo.append(cell.cell_contents)
    return found


@pytest.mark.usefixtures("big")
def test_a_cut_that_breaks_off_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    model(X).sum().backward()
    groups, before, calls = find_groups(model, X), copy.deepcopy(state_of(model)), []
    whole = surgery.sliced

    def breaking(data: Tensor, keep: dict[int, Tensor]) -> Tensor:
        calls.append(data.shape)
        if len(calls) == 4:
            raise MemoryError
        return whole(data, keep)

    monkeypatch.setattr(surgery, "sliced", breaking)
    with pytest.raises(MemoryError):
        cut_channels(model, PLAN, groups)
    assert_same(model, before)
    assert not any(surgery.CUTS.get(parameter) for parameter in model.parameters())
