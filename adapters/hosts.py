"""The built-in methods of Torch-Pruning and NNI, each through its own host as its users call it.

:mod:`nni_plugin.methods` puts the hosts' criteria behind our planner, so that criteria alone differ. Here nothing of
the planner is left: the host's own pruner scores, ranks and decides, with its defaults as published, and what comes
out is counted by our counter alone.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugin.adapters.host_task import Batches, HostPruned, HostTask
from nni_plugin.adapters.torch_pruning.graph import find_groups
from nni_plugin.budgets import Budget, MACs, Params
from nni_plugin.cost import call, count, on_device_of, tensors_in
from nni_plugin.errors import BudgetError, CriterionError, DataError

__all__ = ["Batches", "HostPruned", "criterion_of", "is_built_in", "output_layers", "through_host"]

PREFIXES = ("tp:", "nni:")


def is_built_in(method: str) -> bool:
    """Tell whether a method's name is one of a host: `"tp:..."` or `"nni:..."`."""
    return method.startswith(PREFIXES)


def criterion_of(method: str) -> str:
    """Return the name of the criterion by which a method scores, whatever it ranks together.

    Raises:
        CriterionError: A host has no such method; the text has the closest names.

    Example:
        >>> criterion_of("tp:taylor-local"), criterion_of("taylor-fo")
        ('tp:taylor', 'taylor-fo')
    """
    if not is_built_in(method):
        return method
    from nni_plugin.adapters.nni.host_pruner import PRUNERS as OF_NNI
    from nni_plugin.adapters.torch_pruning.host_pruner import METHODS as OF_TORCH_PRUNING
    from nni_plugin.adapters.torch_pruning.host_pruner import importance_and_ranking

    known = (*OF_TORCH_PRUNING, *OF_NNI)
    if method not in known:
        close = difflib.get_close_matches(method, known, n=3)
        raise CriterionError(f"Unknown method {method!r}; did you mean {', '.join(close or known)}?")
    return importance_and_ranking(method)[0] if method in OF_TORCH_PRUNING else method


def through_host(
    model: nn.Module,
    examples: Any,
    method: str,
    budget: Budget,
    batches: Batches,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    *,
    ignore: Iterable[str] = (),
    seed: int = 0,
) -> HostPruned:
    """Prune a network by a host's own method.

    Args:
        model: The network; left as it is.
        examples: One tensor `[N, ...]`, or a tuple or dict of inputs, to trace and count with.
        method: `"tp:..."` for Torch-Pruning's, `"nni:..."` for NNI's.
        budget: `MACs` or `Params`, counted on the result; it is never exceeded.
        batches: Minibatches `(images, labels)` on the model's device, for methods that need data.
        loss_fn: `loss_fn(model, batch)`, one scalar.
        ignore: Names of layers to leave whole, with all below them; the layers of the output always are.
        seed: Of methods that draw random numbers, at least 0.

    Returns:
        The smaller network, which shares nothing with the one given and has no gradients, and how it came about.

    Raises:
        BudgetError: The host cannot be held to such a budget, or does not reach it.
        CriterionError: There is no such method, or it was not given what it scores by.
        DataError: There is no minibatch.
        GraphError: The network cannot be traced, or a layer to ignore does not exist.
        SurgeryError: The host fails, or breaks the network.
    """
    if not is_built_in(method):
        raise CriterionError(f"Methods of hosts begin with tp: or nni:, got {method!r}. The model is unchanged.")
    if not isinstance(budget, (MACs, Params)):
        raise BudgetError(
            f"The pruners of other libraries can be held to MACs or Params alone, got {budget!r}: {method} knows "
            "neither times nor our counts of channels and layers. The model is unchanged."
        )
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise CriterionError(f"seed must be an integer of at least 0, got {seed!r}. The model is unchanged.")
    if len(batches) == 0:
        raise DataError(f"{method} was given no minibatch; give at least one. The model is unchanged.")
    examples = on_device_of(model, examples)
    ignore = tuple(ignore)
    task = HostTask(
        model=copy.deepcopy(model),
        examples=examples,
        method=method,
        budget=budget,
        dense=count(model, examples),
        batches=batches,
        loss_fn=loss_fn,
        classifier=output_layers(model, examples, ignore),
        ignore=ignore,
        seed=seed,
    )
    if method.startswith("tp:"):
        from nni_plugin.adapters.torch_pruning.host_pruner import prune
    else:
        from nni_plugin.adapters.nni.host_pruner import prune
    modes = {path: module.training for path, module in model.named_modules()}
    trained = {path: parameter.requires_grad for path, parameter in model.named_parameters()}
    with torch.enable_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        pruned = prune(task)
    for path, module in pruned.model.named_modules():
        module.training = modes.get(path, model.training)
    for path, parameter in pruned.model.named_parameters():
        parameter.requires_grad_(trained.get(path, True))
    pruned.model.zero_grad(set_to_none=True)
    return pruned


def output_layers(model: nn.Module, examples: Any, ignore: Iterable[str] = ()) -> tuple[str, ...]:
    """Return the names of the layers that write the network's output: the classifier, which every method must keep.

    Args:
        model: The network; left as it is.
        examples: Inputs to trace it with.
        ignore: Names of layers to leave whole, checked here.

    Raises:
        GraphError: The network cannot be traced, or a layer to ignore does not exist.
    """
    groups = find_groups(model, examples, ignore=ignore)
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            outputs = tensors_in(call(model.eval(), examples))
    finally:
        for module, training in modes.items():
            module.training = training
    widths = {tensor.shape[1] for tensor in outputs if tensor.dim() > 1}
    fixed = [group for group in groups if group.fixed is not None and group.width in widths]
    written = [member for group in fixed for member in group.members if member.axis == "out"]
    return tuple(dict.fromkeys(member.path for member in written if member.kind == "dense"))
