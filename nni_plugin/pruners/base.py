"""The shell that makes any of our criteria a pruner of NNI's: which channels share their masks, and what masks say.

Scores are gathered as :mod:`nni_plugin.pruners.flow` says. Coupled layers share their masks, found by a trace of the
network; normalisations and biases behind a masked layer are masked with it, and where zero does not stay zero on the
way to a reader (a sigmoid), that reader's inputs too. So the masked network computes what the compact one does; not so
where LayerNorm or GroupNorm normalise over channels that leave, which a warning says. What is masked stays masked while
the ratio does not fall.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from nni.compression.base.wrapper import ModuleWrapper
from torch import Tensor, nn

from nni_plugin.adapters.torch_pruning.graph import find_groups
from nni_plugin.compensation import fold_factors
from nni_plugin.criteria.base import Criterion
from nni_plugin.groups import ChannelGroup
from nni_plugin.plan import GroupPlan, PruningPlan
from nni_plugin.pruners.align import aligned_masks
from nni_plugin.pruners.allocation import emptied, pools_of, removed_channels
from nni_plugin.pruners.coupling import Coupled, couple, lone_groups
from nni_plugin.pruners.flow import MaskPruner
from nni_plugin.pruners.wrapping import Masks, group_masks, masked_members, readers_that_see, unwrapped, wrap_followers


class ChannelMaskPruner(MaskPruner):
    """Masks coupled channels by the scores of a criterion.

    Args:
        model: The network, not wrapped.
        config_list: NNI's; see NNI's Compression Config Specification. Ratios are shares to remove.
        evaluator: Any evaluator of NNI's; None where the criterion needs no data.
        training_steps: Optimizer steps over which scores are gathered; 0 where the criterion needs no data.
        existed_wrappers: Wrappers of another compressor, by module; `from_compressor` gives them.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs, to trace the network with. None: the
            evaluator's `dummy_input`, or else what its training calls the network with first (training is begun and
            broken off at that call). Without an evaluator layers are then pruned one by one, which a warning says.
        criterion: One of `nni_plugin.criteria`; None: the class's own.

    Raises:
        ConfigError: An argument does not fit; the text names the key. The network is unchanged.
        GraphError: The network cannot be traced.
    """

    scores: dict[str, Tensor]
    """Scores that the last masks were made from, by group (its first layer), shape `[width]`, higher = keep."""

    default_criterion: ClassVar[Callable[[], Criterion]]

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict[str, Any]],
        evaluator: Any = None,
        training_steps: int = 0,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
        *,
        example_inputs: Any = None,
        criterion: Criterion | None = None,
    ) -> None:
        self.criterion = type(self).default_criterion() if criterion is None else criterion
        self._coupled: list[Coupled] = []
        super().__init__(
            model,
            config_list,
            evaluator,
            training_steps,
            existed_wrappers,
            example_inputs=example_inputs,
            observer=self.criterion,
        )
        self._removed = {coupled.name: torch.zeros(len(coupled.unit), dtype=torch.bool) for coupled in self._coupled}
        self._choice = self._removed

    def _find(self) -> None:
        model = self.bound_model
        if self._inputs is None:
            warnings.warn(
                f"{type(self).__name__} has nothing to trace {type(model).__name__} with, so layers are pruned one by "
                "one and share masks only where a dependency_group_id says so: give example_inputs or an evaluator.",
                stacklevel=8,
            )
        groups = lone_groups(model, self._spaces) if self._inputs is None else find_groups(model, self._inputs)
        coupled, self.notes = couple(model, groups, self._spaces, self._excluded)
        pools_of([one.bloc(self._spaces) for one in coupled])  # who disagrees is found now, not after hours
        for note in self.notes:
            warnings.warn(note, stacklevel=8)
        self._coupled = coupled
        self._groups = [group for one in coupled for group in one.groups]
        readers = set() if self._inputs is None else readers_that_see(model, self._groups, self._inputs)
        self._masked = masked_members(self._groups, readers)
        wrap_followers(model, self._module_wrappers, self._masked, self._target_spaces)

    def _groups_to_watch(self) -> list[ChannelGroup]:
        return self._groups

    # -- NNI's steps from data to masks ------------------------------------------------------------------

    def _collect_data(self) -> dict[str, dict[str, Tensor]]:
        """Return the scores of every group, `{group: {"score": [width]}}`, higher = keep."""
        with unwrapped(self.bound_model):
            if self.criterion.needs_data:
                self.criterion.all_reduce()
                return {group.name: {"score": self.criterion(group)} for group in self._groups}
            with self.criterion.collect(self.bound_model, self._groups):
                return {group.name: {"score": self.criterion(group)} for group in self._groups}

    def _calculate_metrics(self, data: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Return the scores of what is pruned as one: the sum over groups that share a `dependency_group_id`."""
        self.scores = {name: of["score"] for name, of in data.items()}
        return {
            one.name: {"score": torch.stack([self.scores[group.name].double() for group in one.groups]).sum(0)}
            for one in self._coupled
        }

    def _generate_sparsity(self, metrics: Mapping[str, Mapping[str, Tensor]]) -> Masks:
        """Return the masks for the ratios as they are now."""
        blocs = [coupled.bloc(self._spaces) for coupled in self._coupled]
        scores = {name: of["score"] for name, of in metrics.items()}
        self._choice = removed_channels(blocs, scores, self._removed)
        if below := emptied(blocs, scores):
            first = scores[below[0].name]
            warnings.warn(
                f"sparse_threshold asks for every channel of {len(below)} of {len(blocs)} groups; one of each stays, "
                f"which leaves next to nothing of the network. The first is {below[0].name!r}, whose scores go from "
                f"{float(first.min()):.3g} to {float(first.max()):.3g}: lower the threshold to among them, or give a "
                "max_sparse_ratio.",
                stacklevel=2,
            )
        masks = group_masks(self._module_wrappers, self._masked, self._by_group(self._choice))
        return self._with_others(aligned_masks(masks, self._target_spaces))

    def _by_group(self, by_coupled: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {group.name: by_coupled[coupled.name] for coupled in self._coupled for group in coupled.groups}

    def _regenerate(self) -> None:
        masks = self.generate_masks()
        before, kept = (
            {name: (~gone).nonzero().flatten() for name, gone in self._by_group(removed).items()}
            for removed in (self._removed, self._choice)
        )
        factors = self.criterion.conclude(before, kept).factors
        self.update_masks(masks)
        self._removed = self._choice
        if factors:
            with unwrapped(self.bound_model):
                fold_factors(self.bound_model, self._groups, factors)

    def plan(self) -> PruningPlan:
        """Return what the masks say as a plan; `plan.apply(model, example_inputs)` cuts the unwrapped network by it."""
        kept = {name: (~gone).nonzero().flatten().tolist() for name, gone in self._by_group(self._removed).items()}
        return PruningPlan(tuple(GroupPlan(g.name, g.width, tuple(kept[g.name])) for g in self._groups))
