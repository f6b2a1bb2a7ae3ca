"""What a pruning step costs on the graph: Torch-Pruning's own step and ours, the same channels, side by side.

Torch-Pruning's pruners (DepGraph, Fang et al., CVPR 2023) make every group anew at each step, and once more a group
for each layer that loses channels. Here the groups are found once. A step of a schedule then holds the removed
channels at zero (:class:`nni_plugin.masks.Masks`); where the network is cut physically, its tensors are sliced and the
groups renumbered. Channels are drawn at random over the groups on which both agree, and the networks that come out are
compared bit by bit. CPU-seconds of the process on one thread, in turns on fresh copies of one network.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import timm
import torch
from torch import Tensor, nn

from nni_plugin.adapters.torch_pruning import cut_channels, find_groups
from nni_plugin.adapters.torch_pruning.host_step import HostStep
from nni_plugin.errors import SurgeryError
from nni_plugin.groups import ChannelGroup
from nni_plugin.live_plan import LivePlan
from nni_plugin.masks import Masks
from nni_plugin.narrowing import narrowed
from nni_plugin.tensors import tensor_of

NETWORKS = ("resnet50", "resnet101", "densenet121", "vit_base_patch16_224", "convnext_base")
GOAL = 10.0
"""How many times faster than Torch-Pruning's a step should be, at least."""
FIND_GOAL = 3.0
"""CPU-seconds that finding the groups may take, at most."""


def run(
    networks: tuple[str, ...] = NETWORKS,
    channels: int = 100,
    rounds: int = 5,
    seed: int = 0,
    size: int = 224,
) -> dict[str, Any]:
    """Measure every network; returns the CPU-seconds of each round, in the order taken, and their medians.

    Args:
        networks: Names of timm; random weights.
        channels: Channels removed in the step.
        rounds: Measurements of each; one more round before them is not counted.
        seed: Of weights, image and channels.
        size: Height and width of the one image.

    Raises:
        SurgeryError: The two ways leave different networks.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cases = {network: measure(network, channels, rounds, seed, size) for network in networks}
    finally:
        torch.set_num_threads(threads)
    settings = {"channels": channels, "rounds": rounds, "seed": seed, "size": size, "images": 1, "threads": 1}
    return {"settings": settings, "goal": GOAL, "find_goal": FIND_GOAL, "cases": cases}


def measure(network: str, channels: int, rounds: int, seed: int, size: int) -> dict[str, Any]:
    """Measure one network; see :func:`run`.

    Raises:
        SurgeryError: The two ways leave different networks.
    """
    torch.manual_seed(seed)
    dense, image = timm.create_model(network).eval(), torch.randn(1, 3, size, size)
    groups = find_groups(dense, image)
    prunable = [group for group in groups if group.fixed is None]
    agreed = {group.name for group in find_groups(dense, image, keep_host=True) if group.fixed is None}
    both = [group for group in prunable if group.name in agreed]
    live = LivePlan(prunable)
    live.kept.update(drawn(both, channels, seed))
    losing = [group for group in both if len(live.kept[group.name]) < group.width]
    positions = {group.name: _positions(group, live.kept[group.name]) for group in losing}
    plan = live.relative()
    seconds: dict[str, list[float]] = {}
    for counted in [False] + [True] * rounds:
        taken: dict[str, float] = {}
        theirs = copy.deepcopy(dense)
        with _timed(taken, "theirs_find"):
            host = HostStep(theirs, image)
            host.find()
        with _timed(taken, "theirs_groups"):
            host.find()
        with _timed(taken, "theirs_prune"):
            host.prune(positions)
        del host
        with _timed(taken, "ours_find"):
            find_groups(dense, image)
        masks = Masks(copy.deepcopy(dense), prunable)
        with _timed(taken, "ours_mask"):
            masks.remove(live.kept)
            masks.zero_weights()
        del masks
        ours = copy.deepcopy(dense)
        with _timed(taken, "ours_cut"):
            cut_channels(ours, plan, groups)
        with _timed(taken, "ours_renumber"):
            narrowed(groups, live.kept)
        cut = [name for name, tensor in ours.state_dict().items() if tensor.shape != tensor_of(dense, name).shape]
        with _timed(taken, "copy"):
            _copy_each(dense, cut)
        check_equal(theirs, ours, image, network)
        if counted:
            for what, number in taken.items():
                seconds.setdefault(what, []).append(number)
    return {
        "groups": len(prunable),
        "groups_agreed": len(both),
        "groups_cut": len(losing),
        "channels": plan.channels_removed,
        "tensors_cut": len(cut),
        "megabytes_cut": sum(tensor_of(dense, name).nbytes for name in cut) / 1e6,
        "median_s": {what: statistics.median(numbers) for what, numbers in seconds.items()},
        "rounds_s": seconds,
    }


def render(result: Mapping[str, Any]) -> str:
    """Return the page."""
    asked, cases = result["settings"], result["cases"]
    lines = [
        "# Speed of surgery",
        "",
        f"One pruning step that removes {asked['channels']} channels, drawn at random (seed {asked['seed']}) over the "
        "groups on which Torch-Pruning and we agree. CPU-seconds on one thread, medians of "
        f"{asked['rounds']} rounds taken in turns on fresh copies; timm, random weights, float32, one image of "
        f"{asked['size']} x {asked['size']}. In every round both ways left the same network: the same shapes, every "
        "tensor and the output equal bit by bit. Python's garbage collector is on, as in training.",
        "",
        "- Torch-Pruning: what its pruners do on a graph that is already traced, scores not counted: all groups made "
        "anew (`get_all_groups`), then for each layer chosen `get_pruning_group(...).prune()`.",
        "- masked: ours in a schedule, on the groups found once: channels are held at zero (`Masks.remove`, "
        "`zero_weights`), and the network is cut once at the end.",
        "- cut: ours where the network is cut at this very step: `cut_channels`, which can be undone, and the groups "
        "renumbered for the next one (`narrowed`).",
        "- copying: each tensor that a cut shrinks, copied whole, once, one after the other: about the least that "
        "cutting out of place can take, whatever finds the positions.",
        f"- In brackets how many times faster than Torch-Pruning's step; the goal is {result['goal']:g}.",
        "",
        "| Network | groups cut | Torch-Pruning | masked | cut | cutting + renumbering | copying |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for network, case in cases.items():
        s = case["median_s"]
        step, cut = s["theirs_groups"] + s["theirs_prune"], s["ours_cut"] + s["ours_renumber"]
        lines.append(
            f"| {network} | {case['groups_cut']} | {step:.3f} | {s['ours_mask']:.4f} ({step / s['ours_mask']:.1f}) "
            f"| {cut:.3f} ({step / cut:.1f}) | {s['ours_cut']:.3f} + {s['ours_renumber']:.3f} | {s['copy']:.3f} |"
        )
    lines += [
        "",
        "Finding the groups, once for each network: Torch-Pruning's `build_dependency` and first `get_all_groups`, and "
        f"our `find_groups`, which is to take {result['find_goal']:g} s at most. Agreed are groups with the same "
        "channels in the same layers; the attention's queries, keys and values are none, as Torch-Pruning does not "
        "know of heads there unless it is told.",
        "",
        "| Network | groups | agreed | Torch-Pruning | ours |",
        "|---|--:|--:|--:|--:|",
    ]
    for network, case in cases.items():
        s = case["median_s"]
        lines.append(
            f"| {network} | {case['groups']} | {case['groups_agreed']} | {s['theirs_find']:.2f} "
            f"| {s['ours_find']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def drawn(groups: Sequence[ChannelGroup], channels: int, seed: int) -> dict[str, Tensor]:
    """Return the channels kept when units are removed at random until so many are gone; no group loses all."""
    units = [(group, unit) for group in groups for unit in range(group.units)]
    stays = {group.name: torch.ones(group.width, dtype=torch.bool) for group in groups}
    gone = 0
    for at in torch.randperm(len(units), generator=torch.Generator().manual_seed(seed)).tolist():
        group, unit = units[at]
        rest = stays[group.name] & (group.unit != unit)
        if gone >= channels:
            break
        if rest.any():
            gone += int(stays[group.name].sum() - rest.sum())
            stays[group.name] = rest
    return {name: mask.nonzero().flatten() for name, mask in stays.items()}


def _positions(group: ChannelGroup, kept: Tensor) -> list[int]:
    """Return where the removed channels lie on the output of the group's root."""
    root = group.members[0]
    return root.index[~torch.isin(root.channel, kept)].tolist()


@contextmanager
def _timed(taken: dict[str, float], what: str) -> Iterator[None]:
    """Note the CPU-seconds of a block; garbage is collected before, and during it as Python does by itself."""
    gc.collect()
    begun = time.process_time()
    yield
    taken[what] = time.process_time() - begun


def _copy_each(model: nn.Module, names: Sequence[str]) -> None:
    for name in names:
        tensor_of(model, name).detach().clone()


def check_equal(theirs: nn.Module, ours: nn.Module, image: Tensor, network: str) -> None:
    """Compare two networks bit by bit, and what they compute."""
    left, right = theirs.state_dict(), ours.state_dict()
    differing = [name for name in left | right if name not in left or name not in right]
    differing += [name for name in left if name in right and not torch.equal(left[name], right[name])]
    if not differing:
        with torch.no_grad():
            if torch.equal(theirs.eval()(image), ours.eval()(image)):
                return
        differing = ["the output"]
    raise SurgeryError(f"{network}: Torch-Pruning's network and ours differ at {', '.join(differing[:5])}.")
