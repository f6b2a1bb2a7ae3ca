"""What the exact Oracle costs: its engine beside the plain loop over channels.

The plain loop masks one channel by hooks, runs the whole network and takes the hooks off, in eval mode and without
gradients, on the same minibatch and threads. Its time is linear in the number of channels, so it is measured on a
random sample of each group's channels and scaled up; the engine measures all channels. Both run in turns, so that the
ratio holds on a machine whose speed drifts. Networks are untrained, their batch statistics settled on the images.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.criteria import Oracle
from nni_plugin.criteria.masked_loop import without
from nni_plugin.groups import ChannelGroup
from nni_plugin.networks import NETWORKS

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet20, 64 x 1 x 28 x 28": (lambda: NETWORKS["resnet20"](in_chans=1), (64, 1, 28, 28)),
    "resnet20, 256 x 1 x 28 x 28": (lambda: NETWORKS["resnet20"](in_chans=1), (256, 1, 28, 28)),
    "resnet56, 64 x 1 x 28 x 28": (lambda: NETWORKS["resnet56"](in_chans=1), (64, 1, 28, 28)),
    "resnet56, 256 x 1 x 28 x 28": (lambda: NETWORKS["resnet56"](in_chans=1), (256, 1, 28, 28)),
}


def run(rounds: int = 3, sampled: int = 1) -> dict[str, Any]:
    """Measure every case on one thread; returns medians in seconds and how many times faster the engine is.

    Args:
        rounds: Turns of both.
        sampled: Channels of each group that the plain loop runs in a turn.
    """
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    try:
        torch.set_num_threads(1)
        cases = {name: measure(*case, rounds, sampled) for name, case in CASES.items()}
    finally:
        torch.set_num_threads(threads)
    return {"seed": 0, "rounds": rounds, "threads": 1, "cases": cases}


def render(result: dict[str, Any]) -> str:
    """Return the page."""
    lines = [
        "# Cost of the Oracle",
        "",
        f"The exact loss change without each channel: all of them by our engine, beside a plain loop that masks one "
        f"channel and runs the whole network. {result['threads']} thread, {result['rounds']} rounds in turns, medians; "
        "the loop is timed on a sample of each group's channels and scaled up. Both evaluate without autograd, in eval "
        "mode; the largest difference of a loss change is absolute.",
        "",
        "| network, minibatch | channels | plain loop, s | engine, s | times faster | largest difference |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, case in result["cases"].items():
        seconds = f"{case['plain_loop_seconds']:.1f} | {case['engine_seconds']:.1f} | {case['times_faster']:.1f}"
        largest = case["largest_difference_of_a_loss_change"]
        lines.append(f"| {name} | {case['channels']} | {seconds} | {largest:.0e} |")
    return "\n".join(lines) + "\n"


def measure(
    build: Callable[[], nn.Module], shape: tuple[int, ...], rounds: int, sampled: int, device: str = "cpu"
) -> dict[str, Any]:
    """Measure one network on random images."""
    model = build()
    images, labels = torch.randn(shape), torch.randint(0, 10, shape[:1])
    with torch.no_grad():
        for _ in range(10):
            model(images)
    groups = [group for group in find_groups(model, images[:1]) if group.fixed is None]
    model.to(device).eval()
    images, labels = images.to(device), labels.to(device)
    channels = sum(group.width for group in groups)
    draw = random.Random(0)
    plain, engine, difference = [], [], 0.0
    for _ in range(rounds):
        some = [(g, c) for g in groups for c in draw.sample(range(g.width), min(sampled, g.width))]
        before = _now(device)
        expected = _plain_loop(model, some, images, labels)
        # Each group's sample stands for all its channels.
        weights = [group.width / min(sampled, group.width) for group, _ in some]
        plain.append(sum(w * s for w, (_, s) in zip(weights, expected, strict=True)))
        oracle = Oracle()
        before = _now(device)
        with oracle.collect(model, groups):
            oracle.update((images, labels))
        engine.append(_now(device) - before)
        for (group, channel), (change, _) in zip(some, expected, strict=True):
            difference = max(difference, abs(float(oracle.loss_changes(group)[channel]) - change))
    return {
        "channels": channels,
        "plain_loop_seconds": statistics.median(plain),
        "engine_seconds": statistics.median(engine),
        "times_faster": statistics.median(p / e for p, e in zip(plain, engine, strict=True)),
        "largest_difference_of_a_loss_change": difference,
    }


@torch.no_grad()
def _plain_loop(
    model: nn.Module, channels: list[tuple[ChannelGroup, int]], images: Tensor, labels: Tensor
) -> list[tuple[float, float]]:
    """Return the loss change without each channel, and the seconds that it took."""
    base = float(F.cross_entropy(model(images), labels))
    found = []
    for group, channel in channels:
        before = _now(images.device.type)
        with without(model, group, channel):
            change = float(F.cross_entropy(model(images), labels)) - base
        found.append((change, _now(images.device.type) - before))
    return found


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
