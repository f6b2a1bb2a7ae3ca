"""What scoring adds to the memory of training: the peak of forward and backward passes, with and without it.

Every measurement has a process of its own, since a peak never falls again. It builds the network, finds its groups,
takes the resident memory (`VmRSS`) as the baseline, runs the minibatches, and takes `ru_maxrss`, the highest resident
memory of the process so far; the difference is what the passes took: activations, gradients, what scoring keeps, and
working memory. The floor is the same process without a criterion. The first minibatch, which tells the criteria on
single samples what is overwritten in place, counts. Linux only.
"""

from __future__ import annotations

import json
import statistics
import sys
from contextlib import nullcontext
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nni_plugin.adapters.torch_pruning import find_groups
from nni_plugin.benchmarks.process_memory import MEBI, highest, in_a_process, resident
from nni_plugin.errors import CriterionError
from nni_plugin.methods import create_criterion

NETWORKS = ("resnet50", "mobilenetv2_100", "vit_tiny_patch16_224")
METHODS = ("taylor-fo", "feature-map", "taylor-fisher", "obs", "taylor-so-row")
_SECOND_ORDER = ("taylor-so", "obd")
FLOOR = "none"
GOAL = 1.25
"""Most that scoring may need, as a multiple of the floor."""

_PROGRAM = "nni_plugin.benchmarks.scoring_memory"


def run(
    networks: tuple[str, ...] = NETWORKS,
    methods: tuple[str, ...] = METHODS,
    batch: int = 8,
    size: int = 224,
    minibatches: int = 2,
    rounds: int = 1,
) -> dict[str, Any]:
    """Measure every network without and with each criterion; returns medians in MiB, and ratios to the floor.

    Args:
        networks: Names of timm.
        methods: Method names.
        batch: Images in a minibatch.
        size: Height and width of the images.
        minibatches: Forward and backward passes in a process.
        rounds: Processes for each.
    """
    cases: dict[str, dict[str, Any]] = {}
    for network in networks:
        peaks: dict[str, float] = {}
        for method in (FLOOR, *methods):
            found = [in_a_process(_PROGRAM, (network, method, batch, size, minibatches)) for _ in range(rounds)]
            peaks[method] = statistics.median(found)
        floor = peaks.pop(FLOOR)
        of_methods = {method: {"mib": peak, "ratio": peak / floor} for method, peak in peaks.items()}
        cases[network] = {"forward_backward_mib": floor, "with": of_methods}
    settings = {"batch": batch, "size": size, "minibatches": minibatches, "rounds": rounds, "threads": 1}
    return {"settings": settings, "goal": GOAL, "cases": cases}


def render(result: dict[str, Any]) -> str:
    """Return the page."""
    asked, methods = result["settings"], list(next(iter(result["cases"].values()))["with"])
    lines = [
        "# Memory of scoring",
        "",
        f"Peak memory of {asked['minibatches']} forward and backward passes in train mode over what the process held "
        f"before, in MiB; minibatches of {asked['batch']} x 3 x {asked['size']} x {asked['size']}, float32, CPU. "
        f"In brackets the ratio to the passes alone; the goal is at most {result['goal']}.",
        "",
        "| Network | passes alone | " + " | ".join(methods) + " |",
        "|---|--:|" + "--:|" * len(methods),
    ]
    for network, case in result["cases"].items():
        cells = [f"{case['with'][m]['mib']:.0f} ({case['with'][m]['ratio']:.2f})" for m in methods]
        lines.append(f"| {network} | {case['forward_backward_mib']:.0f} | {' | '.join(cells)} |")
    if any(method.startswith(_SECOND_ORDER) for method in methods):
        lines += [
            "",
            "`taylor-so`, `taylor-so-row` and `obd` are beyond the goal: a Hessian needs the graph of the backward "
            "pass, and so all that the pass would have let go.",
        ]
    return "\n".join(lines) + "\n"


def measure(network: str, method: str, batch: int, size: int, minibatches: int) -> float:
    """Run passes in this process, which must be a fresh one; returns what they took at most, in MiB.

    Raises:
        CriterionError: The passes stayed below what finding the groups took, so that no peak of theirs is known.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = timm.create_model(network, num_classes=10).train()
    images, labels = torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,))
    groups = [group for group in find_groups(model, images[:1]) if group.fixed is None]

    criterion = None if method == FLOOR else create_criterion(method)
    second = criterion is not None and criterion.needs_graph

    def passes() -> None:
        model.zero_grad(set_to_none=True)
        with sdpa_kernel(SDPBackend.MATH) if second else nullcontext():  # fused attention has no second derivative
            loss = F.cross_entropy(model(images), labels)
        loss.backward(create_graph=second)

    before, peak = resident(), highest()
    if criterion is None:
        for _ in range(minibatches):
            passes()
    else:
        with criterion.collect(model, groups):
            for _ in range(minibatches):
                passes()
                criterion.update()
    if highest() <= peak:
        raise CriterionError("The passes took less memory than finding the groups: measure with a larger --batch.")
    return (highest() - before) / MEBI


if __name__ == "__main__":
    name, kind, *numbers = sys.argv[1:]
    print(json.dumps(measure(name, kind, *(int(number) for number in numbers))))
