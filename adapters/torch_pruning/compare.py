"""Compare the network with a plan's channels held at zero with the compact one."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from nni_plugin.adapters.torch_pruning.surgery import check_fit, cut_channels
from nni_plugin.cost import call, tensors_in
from nni_plugin.errors import SurgeryError
from nni_plugin.groups import ChannelGroup
from nni_plugin.masks import mask_plan
from nni_plugin.plan import PruningPlan

TOLERANCE = 1e-4
"""Largest accepted difference, relative to the largest output."""


_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Parity:
    """How far the masked and the compact network are apart.

    Args:
        max_abs: Largest absolute difference of any output.
        max_rel: The same over the largest absolute output of the masked network.
        tolerance: Largest accepted `max_rel`.
        renormalised: Layers that normalise over removed channels. A masked network would differ there by right;
            it is compared with these layers normalising over the channels that remain.
    """

    max_abs: float
    max_rel: float
    tolerance: float
    renormalised: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether they agree."""
        return self.max_rel <= self.tolerance

    def __str__(self) -> str:
        """Return one line for a person to read."""
        difference = f"masked against compact: {self.max_abs:.3g} absolute, {self.max_rel:.3g} relative"
        verdict = f"{difference} ({'equal' if self.ok else 'NOT EQUAL'} within {self.tolerance:g})"
        if self.renormalised:
            more = f" and {len(self.renormalised) - 1} more" if len(self.renormalised) > 1 else ""
            verdict += f", {self.renormalised[0]!r}{more} normalising over the channels that remain"
        return verdict


def compare(
    model_before: nn.Module,
    plan: PruningPlan,
    example_inputs: Any,
    groups: Sequence[ChannelGroup],
    *,
    tolerance: float = TOLERANCE,
) -> Parity:
    """Compare the masked network with the compact one in eval mode, for a plan without blocks.

    Args:
        model_before: The dense network; copied twice, itself untouched.
        plan: The plan to prove, with its factors.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs.
        groups: The network's groups.
        tolerance: Largest accepted relative difference.

    Raises:
        PlanError: The plan does not fit the network.
        SurgeryError: One of the two networks gives other outputs in number or shape, or does not run.
    """
    check_fit(plan, groups)
    masked, compact = copy.deepcopy(model_before), _copy_sharing_values(model_before)
    _fold_factors(masked, plan, groups)
    mask_plan(masked, plan, groups)
    cut_channels(compact, plan, groups)
    renormalised = _renormalise(masked, compact, plan, groups)
    return Parity(*difference(masked, compact, example_inputs), tolerance, renormalised)


def _copy_sharing_values(model: nn.Module) -> nn.Module:
    """Return a copy whose tensors are new objects over the same values: cutting gives them values of their own."""
    tensors: dict[int, Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        data = tensor.detach()
        tensors[id(tensor)] = (
            nn.Parameter(data, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data
        )
    return copy.deepcopy(model, tensors)


def difference(masked: nn.Module, compact: nn.Module, example_inputs: Any) -> tuple[float, float]:
    """Return the largest difference of the outputs of two networks, and the same over the largest output.

    Networks in half precision, whose rounding would pass for a difference or hide one, are converted to float32.

    Args:
        masked: A copy of the caller's network, which may be converted.
        compact: Likewise.
        example_inputs: What both are run on.
    """
    if any(parameter.dtype in _HALVES for parameter in masked.parameters()):
        masked._apply(_in_single), compact._apply(_in_single)
        example_inputs = tree_map_only(Tensor, _in_single, example_inputs)
    try:
        expected, got = (_outputs(network, example_inputs) for network in (masked, compact))
    except Exception as error:  # whatever a network of the user's raises
        reason = str(error) or f"{type(error).__name__} without a word"
        raise SurgeryError(f"The pruned network does not run: {reason}. The model is unchanged.") from error
    if [a.shape for a in expected] != [b.shape for b in got]:
        raise SurgeryError(
            f"The pruned network returns {[tuple(b.shape) for b in got]}, expected "
            f"{[tuple(a.shape) for a in expected]}. The model is unchanged."
        )
    largest = max((float(a.abs().max()) for a in expected if a.numel()), default=0.0)
    difference = max((_distance(a, b) for a, b in zip(expected, got, strict=True) if a.numel()), default=0.0)
    relative = 0.0 if difference == 0 else difference / largest if largest else float("inf")
    return difference, relative


def _in_single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _HALVES else tensor


def _distance(a: Tensor, b: Tensor) -> float:
    difference = float((a - b).abs().max())
    return float("inf") if difference != difference else difference


def _outputs(network: nn.Module, example_inputs: Any) -> list[Tensor]:
    network.eval()
    with torch.no_grad():
        return [t for t in tensors_in(call(network, example_inputs)) if t.is_floating_point()]


def _fold_factors(model: nn.Module, plan: PruningPlan, groups: Sequence[ChannelGroup]) -> None:
    """Fold a plan's factors into a network without removing anything."""
    entries = []
    for entry in plan.groups:
        if entry.factors is not None:
            factors = torch.ones(entry.total, dtype=torch.float64)
            factors[list(entry.kept)] = torch.tensor(entry.factors, dtype=torch.float64)
            entries.append(replace(entry, kept=tuple(range(entry.total)), factors=tuple(factors.tolist())))
    if entries:
        cut_channels(model, replace(plan, groups=tuple(entries)), groups)


def _renormalise(
    masked: nn.Module, compact: nn.Module, plan: PruningPlan, groups: Sequence[ChannelGroup]
) -> tuple[str, ...]:
    """Let the masked network's statistics over channels see only those that remain; returns the modules' names.

    Zeros among the normalised channels change the statistics of the others. That difference is right, and it must
    not hide a wrong one, so each such module gives what the compact one gives on the kept channels, zeros elsewhere.
    """
    kept = plan.kept()
    gone: dict[str, dict[tuple[str, int], list[Tensor]]] = {}
    for group in groups:
        out = torch.ones(group.width, dtype=torch.bool)
        out[list(kept.get(group.name, range(group.width)))] = False
        for passage in group.passages:
            if bool(out[passage.channel].any()):
                sides = gone.setdefault(passage.path, {})
                sides.setdefault((passage.side, passage.dim), []).append(passage.index[out[passage.channel]])
    for path, sides in gone.items():
        removed = {side: torch.unique(torch.cat(parts)) for side, parts in sides.items()}
        masked.get_submodule(path).register_forward_hook(
            _on_kept(compact.get_submodule(path), removed), with_kwargs=True
        )
    return tuple(sorted(gone))


def _on_kept(compact: nn.Module, removed: Mapping[tuple[str, int], Tensor]) -> Any:
    def hook(_: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        named = None if inputs else next(iter(keywords))
        first, *rest = inputs if named is None else (keywords[named],)
        for (side, dim), index in removed.items():
            if side == "in":
                first = first.index_select(dim, _others(first.shape[dim], index).to(first.device))
        got = compact(first, *rest, **keywords) if named is None else compact(**{**keywords, named: first})
        if not isinstance(output, Tensor):
            return got
        result = torch.zeros_like(output)
        places = {dim: _others(output.shape[dim], index) for (side, dim), index in removed.items() if side == "out"}
        grid = [places.get(dim, torch.arange(size)).to(output.device) for dim, size in enumerate(output.shape)]
        result[torch.meshgrid(*grid, indexing="ij")] = got
        return result

    return hook


def _others(size: int, removed: Tensor) -> Tensor:
    stays = torch.ones(size, dtype=torch.bool)
    stays[removed] = False
    return stays.nonzero().flatten()
