"""The shell that makes any of our criteria a pruner of NNI's: when scores are gathered, when masks change.

NNI hands over a network, a config_list and an evaluator that trains. Scores are gathered while it trains, over the
last `training_steps` optimizer steps before masks are due, and masks are made at the very step at which they are due:
`training_steps` after the start when alone, and at the end of each interval under `AGPPruner` and `LinearPruner`,
whose goal of that interval is read then. So masks are final when the schedule ends, whatever `training_steps` is.

Coupled layers share their masks, found through the dependency graph; normalisations and biases behind a masked layer
are masked with it, and where zero does not stay zero on the way to a reader (a sigmoid), that reader's inputs too. So
the masked network computes what the compact one does; not so where LayerNorm or GroupNorm normalise over channels that
leave, which a warning says. What is masked stays masked while the ratio does not fall.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from nni.compression import utils
from nni.compression.base.compressor import Pruner
from nni.compression.base.setting import PruningSetting
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.pruning.tools import is_active_target
from torch import Tensor, nn

from nni_plugin.adapters.torch_pruning.graph import find_groups
from nni_plugin.compensation import fold_factors
from nni_plugin.cost import on_device_of
from nni_plugin.criteria.base import Criterion
from nni_plugin.errors import ConfigError
from nni_plugin.plan import GroupPlan, PruningPlan
from nni_plugin.pruners.align import aligned_masks, check_aligned
from nni_plugin.pruners.allocation import pools_of, removed_channels
from nni_plugin.pruners.config import check_config
from nni_plugin.pruners.coupling import Coupled, couple, lone_groups
from nni_plugin.pruners.evaluators import first_inputs
from nni_plugin.pruners.run import Run, Schedule
from nni_plugin.pruners.wrapping import (
    Masks,
    group_masks,
    is_wrapped,
    masked_members,
    readers_that_see,
    unwrapped,
    wrap_followers,
)


class ChannelMaskPruner(Pruner):  # type: ignore[misc]
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

    notes: list[str]
    """What there is to know of the choice, a line each: which selected layers are left whole, and why."""

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
        if is_wrapped(model):
            raise ConfigError(
                f"This {type(model).__name__} is wrapped by another compressor: call its unwrap_model() before, or go "
                f"on from it with {type(self).__name__}.from_compressor(compressor, ...). The model is unchanged."
            )
        self.criterion = type(self).default_criterion() if criterion is None else criterion
        self._check_evaluator(evaluator, training_steps)
        checked = check_config(model, config_list, PruningSetting.registry)
        check_aligned(model, checked.config_list)
        self._excluded = checked.excluded
        self._inputs = self._example_inputs(model, evaluator, example_inputs)
        self._module_wrappers: dict[str, ModuleWrapper] = {}
        existed = existed_wrappers or {}
        self._others = {(name, target) for name, w in existed.items() for target in w.pruning_target_spaces}
        self._coupled: list[Coupled] = []
        super().__init__(model, checked.config_list, evaluator, existed_wrappers)
        self.training_steps = training_steps
        self.interval_steps: int = training_steps or -1
        self.total_times: int | str = 1
        self._removed = {coupled.name: torch.zeros(len(coupled.unit), dtype=torch.bool) for coupled in self._coupled}
        self._choice = self._removed

    def wrap_model(self) -> None:
        """Put the wrappers on; the first time, those of coupled layers are made as well.

        NNI's constructor calls this once the wrappers of selected layers exist and before the network is touched, so
        whatever is wrong is found while it is unchanged.
        """
        if not self._coupled:
            self._couple()
        super().wrap_model()

    def _couple(self) -> None:
        model = self.bound_model
        self._spaces = {
            name: spaces["weight"]
            for name, spaces in sorted(self._target_spaces.items())
            if "weight" in spaces and is_active_target(spaces["weight"])
        }
        if not self._spaces:
            taken = " that the compressor it was made from has not configured already" if self._others else ""
            raise ConfigError(
                f"config_list gives no layer a sparse_ratio or sparse_threshold for its weight{taken}. The model is "
                "unchanged."
            )
        groups = lone_groups(model, self._spaces) if self._inputs is None else find_groups(model, self._inputs)
        coupled, self.notes = couple(model, groups, self._spaces, self._excluded)
        pools_of([one.bloc(self._spaces) for one in coupled])  # who disagrees is found now, not after hours
        for note in self.notes:
            warnings.warn(note, stacklevel=6)
        self._coupled = coupled
        self._groups = [group for one in coupled for group in one.groups]
        readers = set() if self._inputs is None else readers_that_see(model, self._groups, self._inputs)
        self._masked = masked_members(self._groups, readers)
        wrap_followers(model, self._module_wrappers, self._masked, self._target_spaces)
        there = [name for name, _ in model.named_modules(remove_duplicate=False)]  # masks in the network's order
        self._module_wrappers = {name: self._module_wrappers[name] for name in there if name in self._module_wrappers}

    def _check_evaluator(self, evaluator: Any, training_steps: Any) -> None:
        name = type(self).__name__
        if evaluator is not None and not isinstance(evaluator, utils.Evaluator):
            raise ConfigError(f"evaluator must be one of NNI's evaluators, got {evaluator!r}. The model is unchanged.")
        if not self.criterion.needs_data:
            return
        if evaluator is None:
            raise ConfigError(f"{name} gathers its scores while the evaluator trains: give an evaluator.")
        if isinstance(training_steps, bool) or not isinstance(training_steps, int) or training_steps < 1:
            raise ConfigError(f"training_steps must be an integer of at least 1, got {training_steps!r}.")
        if getattr(evaluator, "training_func", evaluator) is None:
            raise ConfigError(f"{name} needs an evaluator that trains, and this one's training_func is None.")
        if isinstance(evaluator, utils.LightningEvaluator):
            raise ConfigError(
                f"{name} needs gradients before the optimizer's step, where Lightning has not computed them yet: use "
                "nni_plugin.pruners.LightningEvaluator (the arguments are the same) as evaluator."
            )

    def _example_inputs(self, model: nn.Module, evaluator: Any, inputs: Any) -> Any:
        """Return what to trace the network with; None if there is nothing."""
        if inputs is None and evaluator is not None:
            inputs = getattr(evaluator, "dummy_input", getattr(evaluator, "_dummy_input", None))
            if inputs is None and getattr(evaluator, "training_func", evaluator) is not None:
                if not evaluator._initialization_complete:
                    evaluator._init_optimizer_helpers(model)
                inputs = first_inputs(evaluator, model)
        if inputs is None:
            warnings.warn(
                f"{type(self).__name__} has nothing to trace {type(model).__name__} with, so layers are pruned one by "
                "one and share masks only where a dependency_group_id says so: give example_inputs or an evaluator.",
                stacklevel=4,
            )
            return None
        return on_device_of(model, inputs)

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
        masks = group_masks(self._module_wrappers, self._masked, self._by_group(self._choice))
        masks = aligned_masks(masks, self._target_spaces)
        for module, targets in masks.items():  # what another compressor has masked stays masked
            for target, mask in targets.items():
                space = self._module_wrappers[module].pruning_target_spaces[target]
                if (module, target) in self._others and space.mask is not None:
                    mask.mul_(space.mask)
        return masks

    def _by_group(self, by_coupled: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {group.name: by_coupled[coupled.name] for coupled in self._coupled for group in coupled.groups}

    def _regenerate(self) -> None:
        """Make masks now and put them on; what was gathered is used up."""
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

    def get_masks(self) -> dict[str, dict[str, Tensor | None]]:
        """Return a copy of all masks by module and target, as plain dicts that `torch.save` and `torch.load` take."""
        return {module: dict(targets) for module, targets in super().get_masks().items()}

    def plan(self) -> PruningPlan:
        """Return what the masks say as a plan; `plan.apply(model, example_inputs)` cuts the unwrapped network by it."""
        kept = {name: (~gone).nonzero().flatten().tolist() for name, gone in self._by_group(self._removed).items()}
        return PruningPlan(tuple(GroupPlan(g.name, g.width, tuple(kept[g.name])) for g in self._groups))

    # -- when it happens ---------------------------------------------------------------------------------

    def compress(
        self, max_steps: int | None = None, max_epochs: int | None = None
    ) -> tuple[nn.Module, dict[str, dict[str, Tensor | None]]]:
        """Make the masks, training where the criterion needs data.

        Args:
            max_steps: Optimizer steps, only together with compressors that this one was made from.
            max_epochs: Epochs, likewise.

        Returns:
            The wrapped network with its masks on, and a copy of the masks.

        Raises:
            ConfigError: A duration was given for this pruner alone, whose training takes `training_steps`.
            CriterionError: The evaluator's training ended before masks were due, or a score is not finite.
        """
        model, masks = super().compress(max_steps, max_epochs)
        return model, masks

    def _single_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        for name, value in (("max_steps", max_steps), ("max_epochs", max_epochs)):
            if value is not None:
                raise ConfigError(
                    f"compress({name}={value!r}): this pruner alone trains for its training_steps, "
                    f"{self.training_steps}. Leave {name} out, or put the pruner into AGPPruner or LinearPruner."
                )
        if self.criterion.needs_data:
            self._fusion_compress(self.training_steps, None)
        else:
            self._regenerate()

    def _fusion_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        try:
            super()._fusion_compress(max_steps, max_epochs)
        except BaseException:
            if self.evaluator.model is not None:
                self.evaluator.unbind_model()
            raise

    def _fuse_preprocess(self, evaluator: Any) -> None:
        if self.interval_steps < 1:  # nobody has set a schedule, and the criterion needs no training
            self._regenerate()
            return
        times = math.inf if self.total_times == "unlimited" else float(self.total_times)
        window = min(self.training_steps, self.interval_steps)
        schedule = Schedule(window, self.interval_steps, times)
        Run(self.bound_model, self.criterion, self._groups, schedule, self._regenerate).attach(evaluator)

    def _fuse_postprocess(self, evaluator: Any) -> None:
        """Do nothing: whatever a run put on the evaluator has left it when its training ended."""
