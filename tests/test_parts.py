"""Heads, head positions, MLP width and residual stream of a transformer: each prunable or not, and ranked alike."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nni_plugin import MACs, PruningPlan, plan_channels, verify
from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.channel_pruner import ChannelPruner
from nni_plugin.criteria import TaylorFisher, TaylorFO
from nni_plugin.errors import BudgetError, GraphError, PlanError
from nni_plugin.groups import ChannelGroup

X = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
BATCHES = [(X, torch.tensor([0, 1, 2, 3]))]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def transformer(fused: bool = True) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"depth": 2, "embed_dim": 32, "num_heads": 4, "img_size": 32, "patch_size": 8, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **sizes).double().eval()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    return model


def by_part(groups: list[ChannelGroup]) -> dict[str, list[str]]:
    parts: dict[str, list[str]] = {}
    for group in groups:
        parts.setdefault(group.part, []).append(group.name)
    return parts


def test_every_group_is_told_what_it_is() -> None:
    groups = find_groups(transformer(), X)
    assert by_part(groups) == {
        "embedding": ["patch_embed.proj"],
        "heads": ["blocks.0.attn.qkv", "blocks.1.attn.qkv"],
        "mlp": ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1", "head"],
    }
    heads = next(group for group in groups if group.part == "heads")
    assert (heads.units, heads.width) == (4, 64)  # queries and keys are the same channels, values others
    assert {(size.path, size.name) for size in heads.sizes} == {
        ("blocks.0.attn", "num_heads"),
        ("blocks.0.attn", "attn_dim"),
    }


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("parts", "free"),
    [
        (("heads",), {"heads"}),
        (("mlp",), {"mlp"}),
        (("embedding",), {"embedding"}),
        (("heads", "mlp", "embedding"), {"heads", "mlp", "embedding"}),
    ],
)
def test_only_the_parts_asked_for_shrink(parts: tuple[str, ...], free: set[str], fused: bool) -> None:
    model = transformer(fused)
    groups = find_groups(model, X, parts=parts)
    assert {group.part for group in groups if group.fixed is None} == free
    assert all("parts=" in str(g.fixed) for g in groups if g.part not in free and g.name != "head")
    plan = plan_channels(model, X, TaylorFO(), BATCHES, loss, MACs(0.9), parts=parts)
    assert {groups[0].part if e.name == groups[0].name else e.name for e in plan.groups if e.removed}
    assert verify(model, plan, X).max_rel < 1e-12
    slim = plan.apply(copy.deepcopy(model), X)
    loss(slim.train(), BATCHES[0]).backward()
    attention = slim.blocks[0].attn
    assert attention.qkv.out_features == 3 * attention.num_heads * attention.head_dim
    assert slim.num_features == slim.patch_embed.proj.out_channels


def test_positions_of_every_head_leave_where_the_scale_is_stored() -> None:
    model = transformer(fused=False)
    plan = plan_channels(model, X, TaylorFO(), BATCHES, loss, MACs(0.93), parts=("head_dim",))
    stored = PruningPlan.from_json(plan.to_json())
    slim = stored.apply(copy.deepcopy(model), X)
    assert [block.attn.num_heads for block in slim.blocks] == [4, 4]
    assert min(block.attn.head_dim for block in slim.blocks) < 8
    assert [block.attn.scale for block in slim.blocks] == [8**-0.5, 8**-0.5]
    assert verify(model, stored, X).max_rel < 1e-12
    # A fused attention takes its scale from the number of positions: they stay, and it is said.
    reasons = [g.fixed for g in find_groups(transformer(), X, parts=("head_dim",)) if "attn" in g.name]
    assert all("scale" in str(reason) for reason in reasons)


def test_parts_that_make_no_sense_are_refused() -> None:
    with pytest.raises(GraphError, match="got tokens"):
        find_groups(transformer(), X, parts=("tokens",))
    with pytest.raises(GraphError, match="one of heads and head_dim"):
        find_groups(transformer(), X, parts=("heads", "head_dim"))
    plan = plan_channels(transformer(False), X, TaylorFO(), BATCHES, loss, MACs(0.93), parts=("head_dim",))
    anonymous = PruningPlan(plan.groups)  # it no longer says what it was made for
    with pytest.raises(PlanError, match="unchanged"):
        anonymous.apply(transformer(False), X)


@pytest.mark.parametrize("gates", ["weight", "input"])
def test_isomorphic_ranking_takes_the_same_part_of_every_kind(gates: str) -> None:
    model = transformer()
    criterion = TaylorFisher(gates=gates)
    apart = plan_channels(model, X, criterion, BATCHES, loss, MACs(0.5), isomorphic=True)
    together = plan_channels(model, X, criterion, BATCHES, loss, MACs(0.5))
    part = {group.name: group.part for group in find_groups(model, X)}

    def removed(plan: PruningPlan) -> dict[str, float]:
        whole: dict[str, list[int]] = {}
        for entry in plan.groups:
            counts = whole.setdefault(part[entry.name], [0, 0])
            counts[0] += len(entry.removed)
            counts[1] += entry.total
        return {name: gone / total for name, (gone, total) in whole.items()}

    shares = removed(apart)
    assert max(shares.values()) - min(shares.values()) <= 1 / 8  # a head is an eighth of all heads
    spread = removed(together).values()
    assert max(spread) - min(spread) > 1 / 4  # their scores are on scales of their own
    assert verify(model, apart, X).max_rel < 1e-12
    with pytest.raises(BudgetError, match="both"):
        ChannelPruner(model, X, criterion, MACs(0.5), isomorphic=True, stages={"blocks": 0.5})


class Tokens(nn.Module):
    """A module with a number that equals its width by chance, and one that is its width."""

    def __init__(self) -> None:
        super().__init__()
        self.side, self.width = 6, 6
        self.first, self.second, self.fc = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == self.side
        tokens = self.second(self.first(x)).reshape(len(x), self.width, -1)
        return self.fc(tokens.mean(2))


def test_a_number_that_equals_a_width_by_chance_is_left_alone() -> None:
    model, x = Tokens().double(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    plan = plan_channels(model, x, TaylorFO(gates="weight"), [(x, torch.tensor([0, 1]))], loss, MACs(0.5))
    slim = plan.apply(copy.deepcopy(model), x)
    assert slim.side == 6
    assert slim.width == slim.second.out_channels < 6
    stored = PruningPlan.from_json(plan.to_json())
    assert verify(model, stored, x).max_rel < 1e-12
    again = stored.apply(copy.deepcopy(model), x)
    assert torch.equal(again(x), slim(x))
