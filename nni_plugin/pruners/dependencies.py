"""Dependencies for NNI's own pruners, written into their config_list; ours find them by themselves.

NNI's `auto_set_denpendency_group_ids` needs tensorboard, which NNI does not declare, knows the couplings of a few
operators, and leaves out the normalisations: under its masks a channel is gone and its `beta` is not, so no smaller
network computes the same. Here the couplings are those of our own trace, and what carries a masked channel
follows it by NNI's own `align`.
"""

from __future__ import annotations

from typing import Any

import torch
from nni.compression.base.config import select_modules_by_config
from nni.compression.base.setting import PruningSetting
from torch import nn

from nni_plugin.adapters.torch_pruning.graph import find_groups
from nni_plugin.groups import ChannelGroup, Member
from nni_plugin.pruners.config import check_config
from nni_plugin.pruners.wrapping import followers
from nni_plugin.tensors import Place, places_of


def auto_set_dependency_group_ids(
    model: nn.Module, config_list: list[dict[str, Any]], dummy_input: Any
) -> list[dict[str, Any]]:
    """Rewrite a config_list so that NNI's pruners mask coupled layers, and what carries their channels, alike.

    Each selected layer gets an entry of its own with a `dependency_group_id`, which replaces its own if it has one, and
    an `internal_metric_block` where the groups of a convolution ask for it. Normalisations and unselected layers of the
    same group are told to `align` with it. Layers whose channels are the network's output keep their entry as it is.

    Args:
        model: The network, not wrapped; left as it is.
        config_list: NNI's.
        dummy_input: One tensor `[N, ...]`, or a tuple or dict of inputs, to trace the network with.

    Returns:
        A new config_list. Layer classes in it that NNI does not know are registered with NNI, with the settings that it
        has for BatchNorm2d.

    Raises:
        ConfigError: The config_list does not fit the network; the text names the key.
        GraphError: The network cannot be traced.
    """
    checked = check_config(model, config_list, PruningSetting.registry)
    settings: dict[str, dict[str, Any]] = {}
    for entry in checked.config_list:
        modules, shared, _ = select_modules_by_config(model, entry)
        settings |= dict.fromkeys(modules, shared)
    coupled: list[dict[str, Any]] = []
    done: set[str] = set()
    for group in find_groups(model, dummy_input):
        members = [member for member in followers(group) if _whole(model, group, member)]
        chosen = [member.path for member in members if member.path in settings and member.kind != "norm"]
        if group.fixed is not None or not chosen or done & {member.path for member in members}:
            continue
        ids: dict[str, Any] = {"dependency_group_id": group.name}
        if _blocks(group) > 1:
            ids["internal_metric_block"] = _blocks(group)
        coupled += [{"op_names": [name], **settings[name], **ids} for name in chosen]
        rest = [member for member in members if member.path not in chosen and member.path not in checked.excluded]
        coupled += [_aligned(model, member, chosen[0]) for member in rest]
        done |= {member.path for member in members}
    alone = [{"op_names": [name], **shared} for name, shared in settings.items() if name not in done]
    return [*coupled, *alone]


def _whole(model: nn.Module, group: ChannelGroup, member: Member) -> bool:
    """Tell whether a layer's outputs are the group's channels, all of them, place by place: what NNI can align."""
    layer = model.get_submodule(member.path)
    places = _parameters(layer)
    at_its_place = torch.equal(member.index, member.channel) and len(member.index) == group.width
    fit = all(p.dim == 0 and p.period is None and len(getattr(layer, p.tensor)) == group.width for p in places)
    return bool(places) and at_its_place and fit


def _parameters(layer: nn.Module) -> list[Place]:
    return [place for place in places_of(layer, "out") if isinstance(getattr(layer, place.tensor), nn.Parameter)]


def _blocks(group: ChannelGroup) -> int:
    """Return the number of blocks whose same places go together; 1 where that is not how channels are tied."""
    repeated = torch.arange(group.width) % group.units
    return group.width // group.units if torch.equal(group.unit, repeated) else 1


def _aligned(model: nn.Module, member: Member, source: str) -> dict[str, Any]:
    layer = model.get_submodule(member.path)
    kind = type(layer).__name__
    if kind not in PruningSetting.registry:
        PruningSetting.register(kind, PruningSetting.registry["BatchNorm2d"])
    align = {"module_name": source, "target_name": "weight", "dims": [0]}
    targets = [place.tensor for place in _parameters(layer)]
    return {
        "op_names": [member.path],
        "target_names": targets,
        "target_settings": {target: {"align": align} for target in targets},
    }
