"""A pruner that searches: gates on all selected layers together, led by loss, cost and predicted accuracy.

    from nni_plugin.performance import SearchOptions
    from nni_plugin.pruners import ModelSpeedup, PerformanceMaximizationPruner
    config_list = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    pruner = PerformanceMaximizationPruner(model, config_list, evaluator, training_steps=50)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    ModelSpeedup(model, dummy_input, masks).speedup_model()

`sparse_ratio` is the share that goes of the MACs (or parameters) which the selected channels can save: 1 - p of the
paper (Gao et al., CVPR 2021). How much goes of which layer the search finds out, so all selected layers have one ratio.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from nni.compression import utils
from nni.compression.base.compressor import Compressor
from nni.compression.base.wrapper import ModuleWrapper
from torch import Tensor, nn

from nni_plugin.adapters.torch_pruning.graph import find_groups
from nni_plugin.errors import ConfigError
from nni_plugin.groups import ChannelGroup
from nni_plugin.performance import (
    ArchitectureCost,
    ArchitectureLayout,
    CostTarget,
    PerformanceMaximization,
    SearchOptions,
    gated_groups,
)
from nni_plugin.performance.accuracy import AccuracyFn, LossFn, top1
from nni_plugin.performance.choose import Choice, choose
from nni_plugin.performance.discretise import Discretiser, Kept
from nni_plugin.performance.hooks import sound_gates
from nni_plugin.plan import GroupPlan, PruningPlan
from nni_plugin.pruners.align import aligned_masks
from nni_plugin.pruners.coupling import couple
from nni_plugin.pruners.evaluators import LightningEvaluator
from nni_plugin.pruners.flow import MaskPruner
from nni_plugin.pruners.minibatches import Minibatches
from nni_plugin.pruners.wrapping import Masks, group_masks, masked_members, readers_that_see, unwrapped, wrap_followers

_UNHEARD = ("sparse_threshold", "min_sparse_ratio", "max_sparse_ratio", "dependency_group_id")
"""Settings for ranking layer by layer, which a search over all of them cannot follow."""

_CLOSED = -30.0
"""The `w` of a gate whose channel is masked: it opens once in 10^11 draws."""


class PerformanceMaximizationPruner(MaskPruner):
    """Masks the channels whose gates a search has closed.

    The minibatches of the evaluator's last `training_steps` steps before masks are due are kept in main memory. The
    search goes through them as often as its steps ask for, on the network as it is then, frozen and with its masks on;
    a part is held out of it, on which its candidates are compared. What is masked stays masked. Under a schedule each
    interval ends with a search of its own.

    Args:
        model: The network, not wrapped.
        config_list: NNI's; one `sparse_ratio` for all selected layers.
        evaluator: Any evaluator of NNI's.
        training_steps: Optimizer steps whose minibatches are kept, at least 2.
        existed_wrappers: Wrappers of another compressor, by module; `from_compressor` gives them.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs, to trace the network with. None: the
            evaluator's `dummy_input`, or else what its training calls the network with first.
        options: How the search goes; its `select` says nothing here, the config_list selects.
        cost: What the ratio is of.
        loss_fn: `loss_fn(model, batch)` -> a finite scalar; it calls `model` once. None: the evaluator's training step.
        accuracy_fn: `accuracy_fn(output, batch)` -> a fraction in [0, 1], from what the network returned.
        held_out: Share of the minibatches that candidates are compared on, in (0, 1).

    Attributes:
        search: The last search; its `history` is there.
        choice: What was chosen by it.

    Raises:
        BudgetError: The ratio is out of reach; the text says what can be reached.
        ConfigError: An argument does not fit; the text names the key. The network is unchanged.
        GraphError: The network cannot be traced, or nothing selected may have gates.
    """

    scores: dict[str, Tensor]
    """Values `w + b` of the gates that the last masks were made from, by group, a number a channel, higher = keep."""

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict[str, Any]],
        evaluator: Any,
        training_steps: int,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
        *,
        example_inputs: Any = None,
        options: SearchOptions | None = None,
        cost: Literal["macs", "params"] = "macs",
        loss_fn: LossFn | None = None,
        accuracy_fn: AccuracyFn = top1,
        held_out: float = 0.2,
    ) -> None:
        self.options = SearchOptions() if options is None else options
        if not isinstance(self.options, SearchOptions):
            raise ConfigError(f"options must be nni_plugin.performance.SearchOptions, got {options!r}.")
        if cost not in ("macs", "params"):
            raise ConfigError(f"cost must be 'macs' or 'params', got {cost!r}.")
        if isinstance(held_out, bool) or not isinstance(held_out, (int, float)) or not 0 < held_out < 1:
            raise ConfigError(f"held_out must be a share of the minibatches, above 0 and below 1, got {held_out!r}.")
        if training_steps == 1:
            raise ConfigError("training_steps must be at least 2: one minibatch is searched on, one held out.")
        if loss_fn is None and isinstance(evaluator, (utils.LightningEvaluator, LightningEvaluator)):
            raise ConfigError("A Lightning evaluator's loss is its network's own: give loss_fn(model, batch) too.")
        self.cost, self.held_out, self._accuracy_fn, self._loss_fn = cost, held_out, accuracy_fn, loss_fn
        self.search: PerformanceMaximization | None = None
        self.choice: Choice | None = None
        self._minibatches = Minibatches(True, loss_fn is None)
        super().__init__(
            model,
            config_list,
            evaluator,
            training_steps,
            existed_wrappers,
            example_inputs=example_inputs,
            observer=self._minibatches,
        )

    @classmethod
    def from_compressor(
        cls,
        compressor: Compressor,
        new_config_list: list[dict[str, Any]],
        training_steps: int,
        evaluator: Any = None,
        **options: Any,
    ) -> PerformanceMaximizationPruner:
        """Go on from another compressor: its network, its wrappers and masks, and its evaluator if it has one.

        Args:
            compressor: Any of NNI's or ours; it is unwrapped.
            new_config_list: What this pruner prunes.
            training_steps: As in the constructor.
            evaluator: Where the other compressor has none.
            options: `example_inputs`, `options`, `cost` and so on, as in the constructor.
        """
        pruner: PerformanceMaximizationPruner = super().from_compressor(
            compressor, new_config_list, training_steps=training_steps, evaluator=evaluator, **options
        )
        return pruner

    def _find(self) -> None:
        model, inputs = self.bound_model, self._inputs
        if inputs is None:
            raise ConfigError(
                f"{type(self).__name__} traces {type(model).__name__} to know what channels cost: give example_inputs, "
                "or an evaluator with a dummy_input. The model is unchanged."
            )
        self._check_settings()
        coupled, self.notes = couple(model, find_groups(model, inputs), self._spaces, self._excluded)
        self._groups: list[ChannelGroup] = sound_gates(
            model, gated_groups([g for c in coupled for g in c.groups], "all"), inputs
        )
        for note in self.notes:
            warnings.warn(note, stacklevel=7)
        self._layout = ArchitectureLayout(self._groups, next(model.parameters()).device)
        costs = ArchitectureCost(model, inputs, self._layout)
        self._objective = costs.macs if self.cost == "macs" else costs.params
        self._discretiser()  # a ratio out of reach shows now, not after hours
        self._removed = {group.name: torch.zeros(group.width, dtype=torch.bool) for group in self._groups}
        self._choice = self._removed
        self._masked = masked_members(self._groups, readers_that_see(model, self._groups, inputs))
        wrap_followers(model, self._module_wrappers, self._masked, self._target_spaces)

    def _check_settings(self) -> None:
        for layer, space in self._spaces.items():
            for key in _UNHEARD:
                value = getattr(space, key)
                if value is not None and not (key == "dependency_group_id" and self._is_alone(layer)):
                    raise ConfigError(
                        f"{key}={value!r} of layer {layer!r}: {type(self).__name__} searches over all selected layers "
                        "together and takes one sparse_ratio alone. The model is unchanged."
                    )
        self._ratio()

    def _is_alone(self, layer: str) -> bool:
        """Tell whether no other selected layer has this one's `dependency_group_id`."""
        own = self._spaces[layer].dependency_group_id
        return not any(s.dependency_group_id == own for name, s in self._spaces.items() if name != layer)

    def _ratio(self) -> float:
        """Return the share of the prunable cost that goes, as the settings are now: a schedule changes them."""
        ratios = {name: space.sparse_ratio or 0.0 for name, space in self._spaces.items()}
        lowest, highest = min(ratios, key=lambda n: ratios[n]), max(ratios, key=lambda n: ratios[n])
        if ratios[lowest] != ratios[highest]:
            raise ConfigError(
                f"sparse_ratio is {ratios[lowest]} of layer {lowest!r} and {ratios[highest]} of {highest!r}, but how "
                "much goes of which layer is what the search finds out: give all the same. The model is unchanged."
            )
        return float(ratios[lowest])

    def _limit(self) -> float:
        """Return what the network may cost: all that cannot go, and the share that stays of what can."""
        fixed = self._objective.fixed
        return fixed + (1 - self._ratio()) * (self._objective.dense - fixed)

    def _discretiser(self) -> Discretiser:
        return Discretiser(self._layout, self._cost_of, self._limit())

    @torch.no_grad()
    def _cost_of(self, kept: Kept) -> float:
        return float(self._objective(self._layout.architecture(kept)))

    # -- NNI's steps from data to masks ------------------------------------------------------------------

    def _collect_data(self) -> dict[str, dict[str, Tensor]]:
        """Search; returns each channel's gate and whether it stays, `{group: {"score": [width], "kept": [width]}}`."""
        model = self.bound_model
        learn, held = self._minibatches.split(model, self.held_out)
        loss_fn = self._loss_fn or self._minibatches.loss_fn
        assert loss_fn is not None  # the run has set it
        with unwrapped(model, masked=True), torch.random.fork_rng(), torch.enable_grad():
            target = CostTarget(self._objective, self._limit())
            search = PerformanceMaximization(model, self._groups, target, loss_fn, self.options, self._accuracy_fn)
            gone = self._gone()
            _close(search.gates.logits, gone)
            search.run(learn)
            _close(search.gates.logits, gone)  # weight decay has moved them
            self.choice = choose(search, self._discretiser(), held)
        self.search = search
        values = self._layout.expand(search.gates.logits.detach() + search.gates.offset).cpu()
        found = {}
        for group in self._groups:
            kept = torch.zeros(group.width, dtype=torch.bool)
            kept[self.choice.kept[group.name]] = True
            found[group.name] = {"score": values[self._layout.channel_slices[group.name]], "kept": kept}
        return found

    def _gone(self) -> Tensor:
        """Return which gates stand for channels that are masked already, bool, shape `[N]`."""
        kept = {name: (~gone).nonzero().flatten() for name, gone in self._removed.items()}
        return self._layout.architecture(kept) < 0.5

    def _calculate_metrics(self, data: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Return what was collected: the search has ranked already."""
        self.scores = {name: of["score"] for name, of in data.items()}
        return {name: dict(of) for name, of in data.items()}

    def _generate_sparsity(self, metrics: Mapping[str, Mapping[str, Tensor]]) -> Masks:
        """Return the masks of the architecture chosen."""
        self._choice = {name: self._removed[name] | ~of["kept"] for name, of in metrics.items()}
        masks = group_masks(self._module_wrappers, self._masked, self._choice)
        return self._with_others(aligned_masks(masks, self._target_spaces))

    def _regenerate(self) -> None:
        self.update_masks(self.generate_masks())
        self._removed = self._choice

    def plan(self) -> PruningPlan:
        """Return what the masks say as a plan; `plan.apply(model, example_inputs)` cuts the unwrapped network by it."""
        kept = {name: (~gone).nonzero().flatten().tolist() for name, gone in self._removed.items()}
        return PruningPlan(tuple(GroupPlan(g.name, g.width, tuple(kept[g.name])) for g in self._groups))


@torch.no_grad()
def _close(logits: Tensor, gone: Tensor) -> None:
    logits[gone] = _CLOSED
