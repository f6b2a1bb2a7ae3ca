"""NNI's own pruners, called as its examples call them: a config_list, masks, `unwrap_model`, a speed-up.

Its examples (`examples/compression/pruning` of its repository) write dependencies into the config_list, take one
`sparse_ratio` for every layer, prune once and speed up. Here likewise, and a bisection looks for the smallest ratio
that meets the budget. As the ratio rises, layers lose one filter after another; where several would lose one at the
same ratio (a quarter of 16, of 32 and of 64), they lose it in the order of the network, as if their entries in the
config_list differed in the last digit, or the result would lie far below the budget. Scores are computed once: NNI's
own schedules too set `sparse_ratio` again and generate masks from a metric that is there.

Two steps of NNI's run on no network with today's torch, and ours take their place: `auto_set_dependency_group_ids` and
`ModelSpeedup`; normalisations follow the masks of the layers before them, so that the smaller network computes what
the masked one does. What its examples leave open, or what they do not fit:

    nni:level   `granularity: out_channel`, as single weights make no network smaller; the numbers are then nni:l1's
    nni:taylor  one step for each minibatch, in train mode, at a learning rate of zero
    nni:slim    the factors multiply the scales of batch normalisations, as its documentation says (its example puts
                them before the normalisation, which undoes them); NNI's Adam trains them for as many passes over the
                minibatches as it needs to bring one from one to zero, each penalised by 1e-4 (Liu et al., ICCV 2017).
                All other weights are at a learning rate of zero: `unwrap_model` throws the factors away, and weights
                trained beside them would belong to a network that is gone. A removed channel loses its bias too, which
                NNI's `align` to a vector fails to say

Whatever scoring changes (statistics of normalisations in train mode) is left behind: the masks are applied to the
network as it was.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import itertools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nni_plugin.adapters.host_task import HostPruned, HostTask
from nni_plugin.adapters.torch_pruning.graph import find_groups
from nni_plugin.errors import BudgetError, CriterionError, SurgeryError

Masks = dict[str, dict[str, Any]]

PRUNERS = {
    "nni:l1": "L1NormPruner",
    "nni:l2": "L2NormPruner",
    "nni:fpgm": "FPGMPruner",
    "nni:level": "LevelPruner",
    "nni:taylor": "TaylorPruner",
    "nni:slim": "SlimPruner",
}
"""Names of its classes."""

SLIM_STEPS = 100
"""NNI's Adam moves a factor by 0.01 a step, and it begins at one."""

SLIM_PENALTY = 1e-4
"""Of each factor, as in Network Slimming's experiments."""

_HOST_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What it raises on networks and configurations that it cannot work with."""


def prune(task: HostTask) -> HostPruned:
    """Prune a network by one of NNI's pruners.

    Args:
        task: What to do; its model is changed.

    Returns:
        The smaller network.

    Raises:
        BudgetError: With one filter left in every layer the network is still too large.
        CriterionError: There is no such method, or NNI cannot be loaded.
        SurgeryError: NNI fails.
    """
    if task.method not in PRUNERS:
        raise CriterionError(f"Unknown method {task.method!r}; NNI's are {', '.join(PRUNERS)}.")
    pruning = _nni()
    from nni_plugin.pruners import ModelSpeedup

    for parameter in task.model.parameters():
        parameter.requires_grad_(True)
    config = config_list(task)
    widths = _widths(task.model, config)
    try:
        masks_at, arguments = _scored(task, pruning, config)
    except _HOST_ERRORS as error:
        raise SurgeryError(
            f"{task.method}: NNI failed on this {type(task.model).__name__} ({type(error).__name__}: {error}). Try "
            "another method, or ignore the layer; the model is unchanged."
        ) from error
    reports: dict[int, Any] = {}
    moves = removals(widths)

    def slim(count: int) -> nn.Module:
        model = copy.deepcopy(task.model)
        gone = Counter(unit for _, unit in moves[:count])
        # Half a filter more than go, so that no rounding makes it one less.
        masks = masks_at({unit: (gone[unit] + 0.5) / width for unit, width in widths.items()})
        speedup = ModelSpeedup(model, task.examples, masks)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its report is in the settings
            speedup.speedup_model()
        reports[count] = speedup.report
        return model

    model, count, trials = _largest(task, slim, len(moves))
    report = reports.get(count)
    left = 0 if report is None else sum(verdict.asked - verdict.removed for verdict in report.left)
    settings = {
        "host": "nni",
        "version": importlib.metadata.version("nni"),
        "pruner": PRUNERS[task.method],
        "arguments": arguments,
        "ranking": "within each layer, coupled layers together",
        "sparse_ratio": moves[count - 1][0] if count else 0.0,
        "excluded": _excluded(task),
        "dependencies": "nni_plugin.pruners.auto_set_dependency_group_ids",
        "speedup": "nni_plugin.pruners.ModelSpeedup",
        "masked_channels_left": left,
        "difference_to_masked": 0.0 if report is None else report.max_rel,
        "trials": trials,
        "ratio": task.ratio(task.spent(model)),
    }
    return HostPruned(model, settings)


def config_list(task: HostTask) -> list[dict[str, Any]]:
    """Return NNI's config_list for a task, with dependencies and any ratio.

    Raises:
        GraphError: The network cannot be traced.
    """
    from nni_plugin.pruners import auto_set_dependency_group_ids

    excluded = _excluded(task)
    config: list[dict[str, Any]] = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5}]
    if excluded:
        config[0]["exclude_op_names"] = excluded
    config = auto_set_dependency_group_ids(task.model, config, task.examples)
    if task.method == "nni:slim":
        return _on_scales(task.model, config)
    if task.method == "nni:level":
        return [entry | ({"granularity": "out_channel"} if "sparse_ratio" in entry else {}) for entry in config]
    return config


def removals(widths: Mapping[str, int]) -> list[tuple[float, str]]:
    """Return which layer loses a filter next as one ratio for all of them rises, until each has one left.

    Args:
        widths: By layer, or by what layers share: how many filters.

    Returns:
        At which ratio, and which layer, ascending; at the same ratio in the order of `widths`.

    Example:
        >>> removals({"a": 2, "b": 4})
        [(0.25, 'b'), (0.5, 'a'), (0.5, 'b'), (0.75, 'b')]
    """
    moves = [(gone / width, unit) for unit, width in widths.items() for gone in range(1, width)]
    return sorted(moves, key=lambda move: move[0])


def _excluded(task: HostTask) -> list[str]:
    """Return the layers to leave whole, and those coupled with them, which NNI would mask all the same."""
    groups = find_groups(task.model, task.examples, ignore=task.keep)
    fixed = [member.path for group in groups if group.fixed for member in group.members if member.axis == "out"]
    modules = {path for path, _ in task.model.named_modules()}
    return [path for path in dict.fromkeys(fixed) if path in modules]


def _on_scales(model: nn.Module, config: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Move the entries of coupled layers to the scales of their batch normalisations, where they have any."""
    chosen = {entry["op_names"][0]: entry for entry in config if "sparse_ratio" in entry}
    moved: list[dict[str, Any]] = []
    for entry in config:
        (path,) = entry["op_names"]
        if path not in chosen and isinstance(model.get_submodule(path), _BatchNorm):
            source = chosen[entry["target_settings"]["weight"]["align"]["module_name"]]
            moved.append({**source, "op_names": [path], "target_names": ["weight"]})
    ids = {entry.get("dependency_group_id") for entry in moved}
    return moved + [entry for entry in chosen.values() if entry.get("dependency_group_id") not in ids]


def _unit(entry: Mapping[str, Any]) -> str:
    """Return what an entry shares its ratio with: its dependency group, or nothing but itself."""
    return str(entry.get("dependency_group_id", entry["op_names"][0]))


def _widths(model: nn.Module, config: list[dict[str, Any]]) -> dict[str, int]:
    """Return how many filters the layers have that are given a ratio, in each of their blocks, by what shares it."""
    widths = {}
    for entry in config:
        if "sparse_ratio" in entry:
            weight = model.get_submodule(entry["op_names"][0]).weight
            assert isinstance(weight, Tensor)
            widths[_unit(entry)] = len(weight) // entry.get("internal_metric_block", 1)
    return widths


def _scored(
    task: HostTask, pruning: ModuleType, config: list[dict[str, Any]]
) -> tuple[Callable[[Mapping[str, float]], Masks], dict[str, Any]]:
    """Let NNI's pruner score a copy of the network; returns its masks at any ratios, and what it was called with."""
    model = copy.deepcopy(task.model)
    arguments: dict[str, Any] = {}
    if task.method == "nni:taylor":
        arguments = {"training_steps": len(task.batches)}
    elif task.method == "nni:slim":
        penalised = sum("sparse_ratio" in entry for entry in config)
        steps = math.ceil(SLIM_STEPS / len(task.batches)) * len(task.batches)
        # NNI divides by the number of layers; this gives each factor the published penalty.
        arguments = {"training_steps": steps, "regular_scale": SLIM_PENALTY * penalised}
    options = dict(arguments)
    if arguments:
        options["evaluator"] = _evaluator(task, model)
    pruner = getattr(pruning, PRUNERS[task.method])(model, config, **options)
    generate, seen = pruner._generate_sparsity, []

    def record(metrics: Any) -> Any:
        seen.append(metrics)
        return generate(metrics)

    pruner._generate_sparsity = record
    pruner.compress()
    if not seen:
        raise SurgeryError(f"{task.method}: NNI's pruner ended without masks. The model is unchanged.")
    units = {entry["op_names"][0]: _unit(entry) for entry in config if "sparse_ratio" in entry}

    def masks_at(ratios: Mapping[str, float]) -> Masks:
        for path, spaces in pruner._target_spaces.items():
            for space in spaces.values():
                if space.sparse_ratio is not None:
                    space.sparse_ratio = ratios[units[path]]
        pruner.update_masks(generate(seen[-1]))
        masks = {path: dict(of) for path, of in pruner.get_masks().items()}
        for path, of in masks.items():
            layer = task.model.get_submodule(path)
            if isinstance(layer, _BatchNorm) and layer.bias is not None:
                of.setdefault("bias", of["weight"])
        return masks

    return masks_at, arguments | ({"learning_rate": 0.0} if arguments else {})


def _evaluator(task: HostTask, model: nn.Module) -> Any:
    """Return NNI's evaluator of a training that leaves the weights as they are."""
    import nni
    from nni.compression import TorchEvaluator

    def train(
        network: nn.Module, optimizer: Any, step: Callable[..., Tensor], _: Any, max_steps: int, __: Any = None
    ) -> None:
        network.train()
        for batch in itertools.islice(itertools.chain.from_iterable(itertools.repeat(task.batches)), max_steps):
            optimizer.zero_grad()
            step(batch, network).backward()
            optimizer.step()

    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.0)
    return TorchEvaluator(train, optimizer, lambda batch, network: task.loss_fn(network, batch))


def _largest(task: HostTask, slim: Callable[[int], nn.Module], most: int) -> tuple[nn.Module, int, int]:
    """Find the fewest removals whose network fits; returns that network, their number, and how many were tried."""
    least = task.spent(task.model)
    if least <= task.limit:
        return task.model, 0, 0
    found: tuple[nn.Module, int] | None = None
    low, high, trials = 1, most + 1, 0
    while low < high:
        middle = (low + high) // 2
        model = slim(middle)
        spent = task.spent(model)
        trials, least = trials + 1, min(least, spent)
        if spent <= task.limit:
            found, high = (model, middle), middle
        else:
            low = middle + 1
    if found is None:
        raise BudgetError(
            f"{task.method}: with one filter left in every layer NNI keeps {task.ratio(least):.4f} of the {task.unit}, "
            f"{task.budget.ratio:g} was asked. Ask for that at least; the model is unchanged."
        )
    return *found, trials


def _nni() -> ModuleType:
    """Load NNI's pruners, which takes seconds the first time."""
    try:
        return importlib.import_module("nni.compression.pruning")
    except ImportError as error:
        raise CriterionError(
            f'NNI cannot be loaded ({error}); methods that begin with nni: need pip install "nni-plugin[nni]".'
        ) from error
