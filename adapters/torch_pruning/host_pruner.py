"""Torch-Pruning's own pruners, called as its benchmark calls them (`reproduce/main.py` of its repository).

Fang et al., CVPR 2023 (DepGraph). All channels of the network are ranked together (`global_pruning`), all of them may
go (`pruning_ratio=1`) in 400 small steps, the classifier is ignored, the network is in eval mode, and it is stepped
until it is small enough; scores are computed anew at every step. The ending of a method's name says what else it can
rank together, see `RANKINGS`. What its benchmark leaves open:

    gradients   of `tp:taylor` and `tp:hessian` are added up over the minibatches once, before the first step, as in
                its examples for transformers; Torch-Pruning slices them along with the weights
    training    `BNScalePruner` and `GroupNormPruner` are published with a sparse training before; here none takes
                place, so that all methods are given the same dense network and the same training behind
    counting    of MACs is ours, and the last step is the first that is at or below the budget

It leaves a group whole, without a word, that would lose all its channels at once, so its steps can end above any
budget: that is an error here.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch_pruning as tp
from torch import nn

from nni_plugin.adapters.host_task import HostPruned, HostTask
from nni_plugin.adapters.torch_pruning.importance import IMPORTANCES
from nni_plugin.errors import BudgetError, CriterionError, ModelError, SurgeryError
from nni_plugin.scorer import Scorer

STEPS = 400
"""`--iterative-steps` of its benchmark."""

PRUNERS: dict[str, Callable[..., Any]] = {
    "tp:bn-scale": tp.pruner.BNScalePruner,
    "tp:group-norm": tp.pruner.GroupNormPruner,
}
"""Those with a class of their own; the others are called through `BasePruner`, once called MagnitudePruner."""

RANKINGS: dict[str, dict[str, bool]] = {
    "": {"global_pruning": True, "isomorphic": False},
    "-isomorphic": {"global_pruning": True, "isomorphic": True},
    "-local": {"global_pruning": False, "isomorphic": False},
}
"""Which channels are ranked together, by the ending of a method's name: all of the network, as in its benchmark; those
of layers built alike (Fang et al., ECCV 2024, Isomorphic Pruning); those of one layer, as its constructor defaults to.
"""

METHODS = tuple(name + ending for ending in RANKINGS for name in IMPORTANCES)
"""Every name that :func:`prune` knows."""

_HOST_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What it raises on networks it cannot follow."""


def prune(task: HostTask) -> HostPruned:
    """Prune a network by one of Torch-Pruning's pruners.

    Args:
        task: What to do; its model is changed.

    Returns:
        The same network, smaller, in eval mode.

    Raises:
        BudgetError: All steps are done and the network is still too large.
        CriterionError: There is no such method.
        SurgeryError: Torch-Pruning fails, or the network does not run after a step.
    """
    if task.method not in METHODS:
        raise CriterionError(
            f"Unknown method {task.method!r}; Torch-Pruning's are {', '.join(IMPORTANCES)}, each also with -isomorphic "
            "or -local behind it."
        )
    name, ranking = importance_and_ranking(task.method)
    model, importance = task.model.eval(), IMPORTANCES[name]()
    for parameter in model.parameters():
        parameter.requires_grad_(True)  # layers that are frozen vanish from its graph
    kind = PRUNERS.get(name, tp.pruner.BasePruner)
    gathered = _gather(task, importance)
    spent, step = task.spent(model), 0
    try:
        pruner = kind(
            model,
            task.examples,
            importance=importance,
            **ranking,
            pruning_ratio=1.0,
            iterative_steps=STEPS,
            ignored_layers=[model.get_submodule(path) for path in task.keep],
            num_heads=_heads(model),
            # Its defaults for these are shared by all pruners of a process, and written to.
            in_channel_groups={},
            out_channel_groups={},
        )
        while spent > task.limit and step < STEPS:
            step += 1
            pruner.step()
            _narrow_heads(model)
            spent = task.spent(model)
    except (*_HOST_ERRORS, ModelError) as error:
        raise SurgeryError(
            f"{task.method}: Torch-Pruning failed at step {step} of {STEPS} on this {type(model).__name__} "
            f"({type(error).__name__}: {error}). Try another method, or ignore the layer; the model is unchanged."
        ) from error
    if spent > task.limit:
        raise BudgetError(
            f"{task.method}: after all {STEPS} steps Torch-Pruning has kept {task.ratio(spent):.4f} of the "
            f"{task.unit}, {task.budget.ratio:g} was asked. Ask for that at least; the model is unchanged."
        )
    settings = _settings(task, kind, importance, gathered)
    return HostPruned(model, {**settings, **ranking, "steps": step, "ratio": task.ratio(spent)})


def importance_and_ranking(method: str) -> tuple[str, dict[str, bool]]:
    """Return the name of a method's importance, and what its ending asks for, see `RANKINGS`."""
    ending = next(ending for ending in reversed(RANKINGS) if method.endswith(ending))
    return method.removesuffix(ending), RANKINGS[ending]


def _heads(model: nn.Module) -> dict[nn.Module, int]:
    """Return the number of heads of each projection to queries, keys and values in one, as its examples find them."""
    return {attention.qkv: attention.num_heads for attention in _attentions(model)}


def _attentions(model: nn.Module) -> list[Any]:
    with_heads = [module for module in model.modules() if isinstance(getattr(module, "num_heads", None), int)]
    return [module for module in with_heads if isinstance(getattr(module, "qkv", None), nn.Linear)]


def _narrow_heads(model: nn.Module) -> None:
    """Bring up to date what attention counts by itself, as its examples do: heads stay, and get narrower."""
    for attention in _attentions(model):
        width = attention.qkv.out_features // 3
        for name, size in (("head_dim", width // attention.num_heads), ("attn_dim", width)):
            if hasattr(attention, name):
                setattr(attention, name, size)


def _gather(task: HostTask, importance: Any) -> str:
    """Add up the gradients of all minibatches where the importance reads them; returns what was done."""
    scorer = Scorer(importance)
    task.model.zero_grad(set_to_none=True)
    if not scorer.needs_data:
        return "none"
    for batch in task.batches:
        scorer.backward(task.model, batch, task.loss_fn)
    each = "each sample" if hasattr(importance, "accumulate_grad") else "each minibatch, added up"
    return f"of {each}, {len(task.batches)} minibatches, once before the first step"


def _settings(task: HostTask, kind: Callable[..., Any], importance: Any, gradients: str) -> dict[str, Any]:
    values = {name: value for name, value in vars(importance).items() if name[0] != "_" and name != "needs_gradients"}
    plain = {name: value for name, value in values.items() if isinstance(value, (bool, int, float, str, type(None)))}
    scores = next(base for base in type(importance).__mro__ if base.__module__.startswith("torch_pruning"))
    return {
        "host": "torch-pruning",
        "version": importlib.metadata.version("torch-pruning"),
        "pruner": kind.__name__,
        "importance": scores.__name__,
        "importance_arguments": plain,
        "pruning_ratio": 1.0,
        "iterative_steps": STEPS,
        "ignored_layers": list(task.keep),
        "gradients": gradients,
        "sparse_training": "none",
    }
