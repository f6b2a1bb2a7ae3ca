"""NNI's usual way on networks its users name, today: masks, `unwrap_model`, speed-up, the same output, a backward pass.

Weights are random, and so are scales, biases and statistics of all normalisations: with `beta` at zero, where libraries
leave it, masks that forget the normalisation behind a convolution would look right. Methods:

    nni:l1                NNI's L1NormPruner, its config_list as a user writes it
    nni:l1 coupled        the same, the config_list rewritten by our `auto_set_dependency_group_ids`
    taylor-fo             our TaylorFOPruner in the place of NNI's TaylorPruner

NNI's own ModelSpeedup runs on no network with today's torch; ours is used for all. Then one ratio over a whole network
(`global_group_id`), our pruner and NNI's, in processes that differ in PYTHONHASHSEED alone.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from nni_plugin.benchmarks.process_memory import in_a_process
from nni_plugin.cost import count

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "regnety_002": lambda: timm.create_model("regnety_002", num_classes=10),
    "mobilenetv3_small_050": lambda: timm.create_model("mobilenetv3_small_050", num_classes=10),
}
METHODS = ("nni:l1", "nni:l1 coupled", "taylor-fo")
GLOBAL = ("nni:taylor", "taylor-fo")
TOLERANCE = 1e-5
"""Largest difference of outputs, over the largest output, at which they count as equal."""

_PROGRAM = "nni_plugin.benchmarks.nni_drop_in"


def run(
    networks: tuple[str, ...] = tuple(NETWORKS),
    methods: tuple[str, ...] = METHODS,
    size: int = 64,
    images: int = 8,
    training_steps: int = 4,
    ratio: float = 0.5,
    hash_seeds: tuple[int, ...] = (0, 1, 2),
    threads: int = 1,
) -> dict[str, Any]:
    """Go NNI's way with every network and method; returns costs, differences and seconds.

    Args:
        networks: Of `resnet18` (torchvision), `regnety_002`, `mobilenetv3_small_050` (timm).
        methods: Of those above.
        size: Height and width of the images.
        images: Images in a minibatch.
        training_steps: Optimizer steps over which Taylor scores are gathered.
        ratio: Share to remove, of every convolution, or of all together.
        hash_seeds: Values of PYTHONHASHSEED for the ratio over the whole of the first network; none: leave it out.
        threads: Of torch, for the seconds.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    batch = (torch.randn(images, 3, size, size), torch.arange(images) % 10)
    cases = {n: {m: measure(NETWORKS[n](), m, batch, training_steps, ratio) for m in methods} for n in networks}
    torch.set_num_threads(before)
    arguments = (networks[0], size, images, training_steps, ratio)
    shares = {
        method: {
            str(seed): in_a_process(_PROGRAM, (method, *arguments), threads, {"PYTHONHASHSEED": str(seed)})
            for seed in hash_seeds
        }
        for method in GLOBAL
    }
    settings = {"size": size, "images": images, "training_steps": training_steps, "ratio": ratio, "threads": threads}
    return {"settings": settings, "tolerance": TOLERANCE, "cases": cases, "global": shares}


def measure(
    model: nn.Module, method: str, batch: tuple[Tensor, Tensor], training_steps: int, ratio: float
) -> dict[str, Any]:
    """Prune one network by one method and speed it up.

    Returns:
        `macs_before`, `macs_after`; `sparsity`: masked share of all weights of convolutions; `difference`: of outputs,
        masked and compact, over the largest; `gradients`: whether a backward pass reaches every parameter;
        `seconds_masks`, `seconds_speedup`; `left`: masked channels that could not leave.
    """
    from nni_plugin.pruners import ModelSpeedup

    randomise(model)
    x = batch[0]
    before = count(model, x[:1]).macs
    begun = time.perf_counter()
    pruner = _pruner(model, method, batch, training_steps, [{"op_types": ["Conv2d"], "sparse_ratio": ratio}])
    wrapped, masks = pruner.compress()
    seconds = time.perf_counter() - begun
    with torch.no_grad():
        expected = wrapped.eval()(x)
    pruner.unwrap_model()
    begun = time.perf_counter()
    speedup = ModelSpeedup(model, x, masks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report is read below
        speedup.speedup_model()
    seconds_speedup = time.perf_counter() - begun
    with torch.no_grad():
        difference = float((model(x) - expected).abs().max() / expected.abs().max())
    F.cross_entropy(model.train()(x), batch[1]).backward()
    assert speedup.report is not None
    return {
        "macs_before": before,
        "macs_after": count(model, x[:1]).macs,
        "sparsity": _sparsity(masks),
        "difference": difference,
        "gradients": all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters()),
        "left": sum(verdict.asked - verdict.removed for verdict in speedup.report.left),
        "seconds_masks": seconds,
        "seconds_speedup": seconds_speedup,
    }


def whole_network(name: str, method: str, size: int, images: int, training_steps: int, ratio: float) -> dict[str, Any]:
    """Prune a network by one ratio over all convolutions; returns the share reached, and a digest of the masks."""
    torch.manual_seed(0)
    model = NETWORKS[name]()
    randomise(model)
    batch = (torch.randn(images, 3, size, size), torch.arange(images) % 10)
    config = [{"op_types": ["Conv2d"], "sparse_ratio": ratio, "global_group_id": 1}]
    _, masks = _pruner(model, method, batch, training_steps, config).compress()
    digest = hashlib.sha256()
    for layer, targets in sorted(masks.items()):
        digest.update(layer.encode() + targets["weight"].numpy().tobytes())
    return {"sparsity": _sparsity(masks), "digest": digest.hexdigest()}


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Draw scales and variances of normalisations from 0.5 to 1.5, biases and means from -0.5 to 0.5."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor, low in (
                (layer.weight, 0.5),
                (layer.running_var, 0.5),
                (layer.bias, -0.5),
                (layer.running_mean, -0.5),
            ):
                assert tensor is not None
                tensor.data.copy_(low + torch.rand(tensor.shape, generator=generator))


def _pruner(
    model: nn.Module, method: str, batch: tuple[Tensor, Tensor], training_steps: int, config: list[dict[str, Any]]
) -> Any:
    import nni
    from nni.compression.pruning import L1NormPruner, TaylorPruner

    from nni_plugin.pruners import TaylorFOPruner, TorchEvaluator, auto_set_dependency_group_ids

    if method == "nni:l1":
        return L1NormPruner(model, config)
    if method == "nni:l1 coupled":
        return L1NormPruner(model, auto_set_dependency_group_ids(model, copy.deepcopy(config), batch[0]))
    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.01)
    evaluator = TorchEvaluator(_train(batch), optimizer, _step)
    taylor = TaylorFOPruner if method == "taylor-fo" else TaylorPruner
    return taylor(model, config, evaluator, training_steps)


def _train(batch: tuple[Tensor, Tensor]) -> Callable[..., None]:
    def train(model: nn.Module, optimizer: Any, step: Any, _: Any, max_steps: int, max_epochs: int | None) -> None:
        model.train()
        for _step in range(max_steps):
            optimizer.zero_grad()
            step(batch, model).backward()
            optimizer.step()

    return train


def _step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _sparsity(masks: dict[str, dict[str, Any]]) -> float:
    """Return the masked share of the weights of convolutions."""
    weights = [of["weight"] for of in masks.values() if of["weight"] is not None and of["weight"].dim() == 4]
    masked = sum(int((mask == 0).sum()) for mask in weights)
    total = sum(int(mask.numel()) for mask in weights)
    return masked / total


def render(result: dict[str, Any]) -> str:
    """Return the page."""
    asked = result["settings"]
    lines = [
        "# NNI's way, today",
        "",
        f"`compress()`, `unwrap_model()`, our `ModelSpeedup`, output against the masked network, backward pass; "
        f"{asked['ratio']:.0%} of every convolution, images of {asked['size']} x {asked['size']}, random weights and "
        f"normalisations, CPU, {asked['threads']} thread(s). The output counts as equal up to "
        f"{result['tolerance']:g} of the largest; *left*: masked channels that stayed.",
        "",
        "| network | pruner | MACs before, M | after | kept | difference | equal | left | masks, s | speed-up, s |",
        "|---|---|--:|--:|--:|--:|---|--:|--:|--:|",
    ]
    for network, methods in result["cases"].items():
        for method, case in methods.items():
            equal = "yes" if case["difference"] <= result["tolerance"] else "no"
            lines.append(
                f"| {network} | {method} | {case['macs_before'] / 1e6:.1f} | {case['macs_after'] / 1e6:.1f} "
                f"| {case['macs_after'] / case['macs_before']:.3f} | {case['difference']:.1e} | {equal} "
                f"| {case['left']} | {case['seconds_masks']:.1f} | {case['seconds_speedup']:.1f} |"
            )
    reached = all(case["gradients"] for methods in result["cases"].values() for case in methods.values())
    lines += [
        "",
        f"Gradients reach {'every parameter of every' if reached else 'NOT every parameter of each'} compact network. "
        "`nni:l1` masks convolutions alone: what the normalisation makes of a masked channel stays, no smaller network "
        "computes it along padded borders, and layers that share channels disagree. `coupled` is NNI's pruner with the "
        "config_list of our `auto_set_dependency_group_ids`.",
    ]
    if any(result["global"].values()):
        lines += ["", f"## {asked['ratio']:g} of a whole network", "", *_shares(result["global"])]
    return "\n".join(lines) + "\n"


def _shares(methods: dict[str, dict[str, Any]]) -> list[str]:
    seeds = list(next(iter(methods.values())))
    lines = [
        f"| pruner | {' | '.join(f'PYTHONHASHSEED={seed}' for seed in seeds)} | masks |",
        f"|---|{'--:|' * len(seeds)}---|",
    ]
    for method, found in methods.items():
        same = "the same" if len({of["digest"] for of in found.values()}) == 1 else "differ"
        shares = [f"{found[seed]['sparsity']:.4f}" for seed in seeds]
        lines.append(f"| {method} | {' | '.join(shares)} | {same} |")
    return lines


if __name__ == "__main__":
    kind, network, side, many, steps, share = sys.argv[1:]
    print(json.dumps(whole_network(network, kind, int(side), int(many), int(steps), float(share))))
