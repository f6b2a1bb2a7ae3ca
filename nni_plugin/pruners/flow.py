"""The way through NNI that all our pruners share: what they are made from, when they gather data and when they mask.

NNI hands over a network, a config_list and an evaluator that trains. Data are gathered while it trains, over the last
`training_steps` optimizer steps before masks are due, and masks are made at the very step at which they are due:
`training_steps` after the start when alone, and at the end of each interval under `AGPPruner` and `LinearPruner`,
whose goal of that interval is read then. So masks are final when the schedule ends, whatever `training_steps` is.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

from nni.compression import utils
from nni.compression.base.compressor import Pruner
from nni.compression.base.setting import PruningSetting
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.pruning.tools import is_active_target
from torch import Tensor, nn

from nni_plugin.cost import on_device_of
from nni_plugin.errors import ConfigError
from nni_plugin.groups import ChannelGroup
from nni_plugin.plan import PruningPlan
from nni_plugin.pruners.align import check_aligned
from nni_plugin.pruners.config import check_config
from nni_plugin.pruners.evaluators import first_inputs
from nni_plugin.pruners.run import Observer, Run, Schedule
from nni_plugin.pruners.wrapping import Masks, is_wrapped


class MaskPruner(Pruner):  # type: ignore[misc]
    """Base class of the pruners: subclasses find what there is to prune, and make masks from what was observed.

    Args:
        model: The network, not wrapped.
        config_list: NNI's; see NNI's Compression Config Specification. Ratios are shares to remove.
        evaluator: Any evaluator of NNI's; None where no data are needed.
        training_steps: Optimizer steps over which data are gathered; 0 where none are needed.
        existed_wrappers: Wrappers of another compressor, by module; `from_compressor` gives them.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs, to trace the network with. None: the
            evaluator's `dummy_input`, or else what its training calls the network with first (training is begun and
            broken off at that call).
        observer: What gathers data during the evaluator's training.

    Raises:
        ConfigError: An argument does not fit; the text names the key. The network is unchanged.
    """

    notes: list[str]
    """What there is to know of the choice, a line each: which selected layers are left whole, and why."""

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict[str, Any]],
        evaluator: Any,
        training_steps: int,
        existed_wrappers: dict[str, ModuleWrapper] | None,
        *,
        example_inputs: Any,
        observer: Observer,
    ) -> None:
        if is_wrapped(model):
            raise ConfigError(
                f"This {type(model).__name__} is wrapped by another compressor: call its unwrap_model() before, or go "
                f"on from it with {type(self).__name__}.from_compressor(compressor, ...). The model is unchanged."
            )
        self._observer = observer
        self._check_evaluator(evaluator, training_steps)
        checked = check_config(model, config_list, PruningSetting.registry)
        check_aligned(model, checked.config_list)
        self._excluded = checked.excluded
        self._inputs = self._example_inputs(model, evaluator, example_inputs)
        self._module_wrappers: dict[str, ModuleWrapper] = {}
        existed = existed_wrappers or {}
        self._others = {(name, target) for name, w in existed.items() for target in w.pruning_target_spaces}
        self._found = False
        super().__init__(model, checked.config_list, evaluator, existed_wrappers)
        self.training_steps = training_steps
        self.interval_steps: int = training_steps or -1
        self.total_times: int | str = 1

    def wrap_model(self) -> None:
        """Put the wrappers on; the first time, those of layers that are masked with the selected ones are made as well.

        NNI's constructor calls this once the wrappers of selected layers exist and before the network is touched, so
        whatever is wrong is found while it is unchanged.
        """
        if not self._found:
            self._spaces = {
                name: spaces["weight"]
                for name, spaces in sorted(self._target_spaces.items())
                if "weight" in spaces and is_active_target(spaces["weight"])
            }
            if not self._spaces:
                taken = " that the compressor it was made from has not configured already" if self._others else ""
                raise ConfigError(
                    f"config_list gives no layer a sparse_ratio or sparse_threshold for its weight{taken}. The model "
                    "is unchanged."
                )
            self._find()
            self._in_order()
            self._found = True
        super().wrap_model()

    def _in_order(self) -> None:
        """Bring the wrappers, and so the masks, into the order of the network."""
        there = [name for name, _ in self.bound_model.named_modules(remove_duplicate=False)]
        self._module_wrappers = {name: self._module_wrappers[name] for name in there if name in self._module_wrappers}

    def _check_evaluator(self, evaluator: Any, training_steps: Any) -> None:
        name = type(self).__name__
        if evaluator is not None and not isinstance(evaluator, utils.Evaluator):
            raise ConfigError(f"evaluator must be one of NNI's evaluators, got {evaluator!r}. The model is unchanged.")
        if not self._needs_training(training_steps):
            return
        if evaluator is None:
            raise ConfigError(f"{name} makes its masks after training_steps of training: give an evaluator.")
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
        return None if inputs is None else on_device_of(model, inputs)

    def _needs_training(self, training_steps: Any) -> bool:
        """Tell whether the evaluator must train before masks are made."""
        return self._observer.needs_data

    @abstractmethod
    def _find(self) -> None:
        """Find what there is to prune, and add the wrappers of layers that are masked besides the selected ones."""

    @abstractmethod
    def _regenerate(self) -> None:
        """Make masks now and put them on; what was gathered is used up."""

    @abstractmethod
    def plan(self) -> PruningPlan:
        """Return what the masks say as a plan; `plan.apply(model, example_inputs)` cuts the unwrapped network by it."""

    def _groups_to_watch(self) -> list[ChannelGroup]:
        """Return the groups that the observer is told of."""
        return []

    def _with_others(self, masks: Masks) -> Masks:
        """Keep masked what another compressor has masked, in place; returns the masks."""
        for module, targets in masks.items():
            for target, mask in targets.items():
                space = self._module_wrappers[module].pruning_target_spaces[target]
                if (module, target) in self._others and space.mask is not None:
                    mask.mul_(space.mask)
        return masks

    def get_masks(self) -> dict[str, dict[str, Tensor | None]]:
        """Return a copy of all masks by module and target, as plain dicts that `torch.save` and `torch.load` take."""
        return {module: dict(targets) for module, targets in super().get_masks().items()}

    # -- when it happens ---------------------------------------------------------------------------------

    def compress(
        self, max_steps: int | None = None, max_epochs: int | None = None
    ) -> tuple[nn.Module, dict[str, dict[str, Tensor | None]]]:
        """Make the masks, training where data are needed.

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
        if self._needs_training(self.training_steps):
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
        if self.interval_steps < 1:  # nobody has set a schedule, and no training is needed
            self._regenerate()
            return
        times = math.inf if self.total_times == "unlimited" else float(self.total_times)
        window = min(self.training_steps, self.interval_steps)
        schedule = Schedule(window, self.interval_steps, times)
        Run(self.bound_model, self._observer, self._groups_to_watch(), schedule, self._regenerate).attach(evaluator)

    def _fuse_postprocess(self, evaluator: Any) -> None:
        """Do nothing: whatever a run put on the evaluator has left it when its training ended."""
