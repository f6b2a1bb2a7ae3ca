"""MACs against counts by hand, parameters, and the arithmetic that predicts them at other widths."""

from typing import Any

import pytest
import torch
from networks_at_random import Twice
from torch import Tensor, nn

from nni_plugin import Cost, MACs, count, plan_channels
from nni_plugin.adapters.torch_pruning import cut_channels, find_groups
from nni_plugin.budgets import Size
from nni_plugin.cost import batch_size_of, call, count_macs_by_module, count_params, tensors_in
from nni_plugin.criteria import Magnitude
from nni_plugin.errors import ModelError
from nni_plugin.plan import GroupPlan, PruningPlan
from nni_plugin.slim_cost import SlimCost

CASES: dict[str, tuple[nn.Module, tuple[int, ...], int, int]] = {
    # layer, shape of one sample, MACs = output positions x filters x inputs of a filter x kernel, parameters
    "conv": (nn.Conv2d(3, 8, 3, padding=1), (3, 5, 7), 5 * 7 * 8 * 3 * 9, 8 * 27 + 8),
    "strided": (nn.Conv2d(3, 8, 3, stride=2, bias=False), (3, 9, 9), 4 * 4 * 8 * 3 * 9, 8 * 27),
    "one-sided": (nn.Conv2d(3, 8, (1, 5), padding=(0, 2)), (3, 5, 7), 5 * 7 * 8 * 3 * 5, 8 * 15 + 8),
    "grouped": (nn.Conv2d(6, 8, 3, padding=1, groups=2), (6, 5, 5), 25 * 8 * 3 * 9, 8 * 27 + 8),
    "depthwise": (nn.Conv2d(6, 6, 3, padding=1, groups=6), (6, 5, 5), 25 * 6 * 9, 6 * 9 + 6),
    # A transposed convolution multiplies once per INPUT position, filter and kernel entry.
    "transposed": (nn.ConvTranspose2d(3, 8, 2, stride=2), (3, 5, 5), 25 * 3 * 8 * 4, 3 * 32 + 8),
    "transposed-grouped": (nn.ConvTranspose2d(6, 8, 2, stride=2, groups=2), (6, 5, 5), 25 * 6 * 4 * 4, 6 * 16 + 8),
    "conv1d": (nn.Conv1d(3, 8, 3), (3, 10), 8 * 8 * 9, 8 * 9 + 8),
    "conv3d": (nn.Conv3d(2, 4, 3), (2, 4, 5, 6), 2 * 3 * 4 * 4 * 2 * 27, 4 * 54 + 4),
    "linear": (nn.Linear(6, 5), (6,), 30, 35),
    "linear-on-tokens": (nn.Linear(6, 5, bias=False), (7, 6), 7 * 30, 30),
    "norm": (nn.BatchNorm2d(3), (3, 5, 5), 0, 6),
    "twice": (Twice(nn.Conv2d(4, 4, 3, padding=1)), (4, 5, 5), 2 * 25 * 16 * 9, 4 * 36 + 4),
}


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_by_hand_and_for_any_batch(name: str, batch: int) -> None:
    layer, shape, macs, params = CASES[name]
    assert count(layer, torch.randn(batch, *shape)) == Cost(macs, params)


def test_parts_add_up_and_shared_ones_count_each_call() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), Twice(nn.Conv2d(4, 4, 1)), nn.Flatten(), nn.Linear(100, 7)
    )
    macs = count_macs_by_module(model, torch.randn(3, 3, 5, 5))
    assert macs == {"0": 25 * 108, "2.layer": 2 * 25 * 16, "4": 700, "": 25 * 108 + 2 * 25 * 16 + 700}


def test_a_shared_parameter_counts_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert count_params(model) == 16 + 8
    assert count(model, torch.zeros(1, 4)) == Cost(32, 24)


def test_products_outside_layers_count_too() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    assert count(Attention(), torch.randn(2, 3, 5, 4)).macs == 2 * 3 * 5 * 5 * 4


def test_counting_changes_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()).train()
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    count(model, torch.randn(2, 3, 5, 5))
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ModelError, match="does not run"):
        count(model, torch.randn(2, 4, 5, 5))
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("wrong", [torch.tensor(1.0), torch.zeros(0, 3), [], {}, "text", None, (1, 2)])
def test_inputs_need_a_batch(wrong: Any) -> None:
    with pytest.raises(ModelError, match="batch dimension"):
        count(nn.Linear(3, 3), wrong)


def test_inputs_of_every_form() -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> dict[str, Any]:
            return {"sum": a + b, "both": [a, (b,)], "text": "no tensor"}

    a, b = torch.ones(4, 2), torch.zeros(4, 2)
    for inputs in ((a, b), [a, b], {"a": a, "b": b}):
        assert [t.sum().item() for t in tensors_in(call(Two(), inputs))] == [8, 8, 0]
        assert batch_size_of(inputs) == 4


def test_costs_for_people() -> None:
    assert str(Cost(40_551_000, 272_474)) == "40.55 M MACs, 0.2725 M parameters"


# -- at other widths (on random networks: adapters/torch_pruning/test_parity_random.py) ------------------------


def test_predicted_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(8)
    )
    model = nn.Sequential(*model, nn.Flatten(), nn.Linear(8 * 16, 5))
    example = torch.randn(2, 3, 4, 4)
    groups = find_groups(model, example)
    slim = SlimCost(model, example, groups)
    assert slim.dense == Size(Cost(16 * (6 * 27 + 8 * 27) + 640, 6 * 28 + 8 * 27 + 16 + 645), 14)
    size = slim.predict({"0": torch.tensor([0, 3]), "2": torch.tensor([0, 1, 4, 5])})
    assert size == Size(Cost(16 * (2 * 27 + 4 * 9) + 4 * 80, 2 * 28 + 4 * 9 + 8 + 4 * 80 + 5), 6)
    assert slim.predict({}) == slim.predict({"0": torch.arange(6)}) == slim.dense
    plan = PruningPlan((GroupPlan("0", 6, (0, 3)), GroupPlan("2", 8, (0, 1, 4, 5))))
    cut_channels(model, plan, groups)
    assert count(model, example) == size.cost


def test_groups_that_stay_whole_are_no_channels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    example = torch.randn(1, 3, 4, 4)
    slim = SlimCost(model, example, find_groups(model, example, ignore=["0"]))
    assert slim.widths == {"2": 4}
    assert slim.dense.channels == 4


class Attention(nn.Module):
    """Its own attention with torch's layer, which has one operator for all of it in inference."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.mlp(x)


def test_attention_counts_where_torch_would_run_it_as_one_operator() -> None:
    tokens, width = 10, 32
    by_hand = tokens * width * (4 * width + 2 * 64) + 2 * tokens * tokens * width  # projections, MLP; scores, mixing
    x = torch.randn(3, tokens, width)
    assert count(Attention(), x).macs == by_hand
    assert count(nn.TransformerEncoderLayer(width, 4, 64, batch_first=True), x).macs == by_hand
    assert torch.backends.mha.get_fastpath_enabled()
    plan = plan_channels(Attention(), x, Magnitude(), [], lambda model, batch: model(batch).mean(), MACs(0.8))
    slim = plan.apply(Attention(), x)
    hidden = slim.mlp[0].out_features
    left = tokens * width * (4 * width + 2 * hidden) + 2 * tokens * tokens * width
    assert count(slim, x).macs == left <= 0.8 * by_hand


@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_recurrent_layers(kind: str, gates: int) -> None:
    layer = getattr(nn, kind)(16, 24, 2, bidirectional=True, batch_first=True)
    by_hand = 7 * 2 * gates * 24 * ((16 + 24) + (48 + 24))  # steps, directions; two layers
    assert count(layer, torch.randn(3, 7, 16)).macs == by_hand
