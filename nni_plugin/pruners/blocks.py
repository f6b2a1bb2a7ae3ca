"""Pruners of whole blocks: a layer importance ranks residual blocks, and those that go are masked as a whole.

    from nni_plugin.pruners import ImprintingPruner, ModelSpeedup
    pruner = ImprintingPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.3}], evaluator, training_steps=50)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    ModelSpeedup(model, dummy_input, masks).speedup_model()      # three of ten blocks have left

`sparse_ratio` is the share of the selected blocks that goes, rounded down to whole blocks, as NNI's pruners take a
share of a layer's channels; `sparse_threshold` lets those go whose importance is below it. Blocks whose layers have the
same settings are ranked together; a `global_group_id` of its own keeps some apart. Which blocks a config_list selects:
:mod:`nni_plugin.pruners.candidates`. Units of plain networks (VGG) have no masks that would remove them, and are
refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from nni.compression.base.compressor import Compressor
from nni.compression.base.wrapper import ModuleWrapper
from torch import Tensor, nn

from nni_plugin.criteria import TaylorFO
from nni_plugin.errors import ConfigError, DataError
from nni_plugin.layers import Imprinting, LayerImportance, LayerStatistic
from nni_plugin.layers.blocks import find_blocks
from nni_plugin.plan import PruningPlan
from nni_plugin.pruners.allocation import Bloc, Limits, removed_channels
from nni_plugin.pruners.candidates import SHARED, Candidate, block_masks, candidates_of, wrap_candidates
from nni_plugin.pruners.flow import MaskPruner
from nni_plugin.pruners.minibatches import Minibatches
from nni_plugin.pruners.wrapping import Masks, unwrapped


class BlockPruner(MaskPruner):
    """Masks whole residual blocks, or branches of them, by a layer importance.

    What an importance needs it gets from the evaluator's training: the minibatches of the last `training_steps` steps
    before masks are due, which are kept in main memory until then. They are to hold every class, and each sample once.
    Blocks are ranked on the network as it is then, with its masks on; a block that is masked stays so and is not ranked
    again. At least one block of those that are ranked together stays.

    Args:
        model: The network, not wrapped.
        config_list: NNI's; a block is selected with all its convolutions and linear layers, and ratios are shares of
            the blocks to remove. `dependency_group_id` and `align` say nothing here.
        evaluator: Any evaluator of NNI's whose minibatches are `(inputs, labels)`; None where no data are needed.
        training_steps: Optimizer steps whose minibatches are kept; 0 where the importance needs none.
        existed_wrappers: Wrappers of another compressor, by module; `from_compressor` gives them.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs, to find the blocks with. None: the
            evaluator's `dummy_input`, or else what its training calls the network with first.
        importance: One of `nni_plugin.layers`; None: the class's own.
        held_out: Share of the minibatches that the importance measures on and does not learn from, in (0, 1).

    Attributes:
        candidates: The blocks that may go, by name, in forward order.

    Raises:
        ConfigError: An argument does not fit, or no block that can be masked away is selected; the network is
            unchanged.
    """

    scores: dict[str, float]
    """Importances that the last masks were made from, by block, lower = leaves first; of blocks not masked before."""

    default_importance: ClassVar[Callable[[], LayerImportance]]

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict[str, Any]],
        evaluator: Any = None,
        training_steps: int = 0,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
        *,
        example_inputs: Any = None,
        importance: LayerImportance | None = None,
        held_out: float = 0.2,
    ) -> None:
        self.importance = type(self).default_importance() if importance is None else importance
        if not isinstance(self.importance, LayerImportance):
            raise ConfigError(f"importance must be one of nni_plugin.layers, got {importance!r}.")
        if isinstance(held_out, bool) or not isinstance(held_out, (int, float)) or not 0 < held_out < 1:
            raise ConfigError(f"held_out must be a share of the minibatches, above 0 and below 1, got {held_out!r}.")
        if self.importance.needs_held_out and training_steps == 1:
            raise ConfigError("training_steps must be at least 2: one minibatch is learned from, one held out.")
        self.held_out = held_out
        needs_data = self.importance.needs_batches or self.importance.needs_held_out
        self._minibatches = Minibatches(needs_data, self.importance.needs_loss)
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
        training_steps: int = 0,
        evaluator: Any = None,
        **options: Any,
    ) -> BlockPruner:
        """Go on from another compressor: its network, its wrappers and masks, and its evaluator if it has one.

        Args:
            compressor: Any of NNI's or ours; it is unwrapped.
            new_config_list: What this pruner prunes.
            training_steps: As in the constructor.
            evaluator: Where the other compressor has none.
            options: `example_inputs`, `importance` and `held_out`, as in the constructor.
        """
        pruner: BlockPruner = super().from_compressor(
            compressor, new_config_list, training_steps=training_steps, evaluator=evaluator, **options
        )
        return pruner

    def _find(self) -> None:
        model, inputs = self.bound_model, self._inputs
        if inputs is None:
            raise ConfigError(
                f"{type(self).__name__} finds blocks by running {type(model).__name__}: give example_inputs, or an "
                "evaluator with a dummy_input. The model is unchanged."
            )
        found = find_blocks(model, inputs)
        candidates, self.notes = candidates_of(
            model, found, self._module_wrappers, self._spaces, self._excluded, inputs
        )
        self._pools: dict[str, list[Candidate]] = {}
        for candidate in candidates:
            self._pools.setdefault(repr(candidate.settings), []).append(candidate)
        self._candidates = {candidate.block.name: candidate for candidate in candidates}
        self.candidates = list(self._candidates)
        self._removed: list[str] = []
        self._choice = self._removed
        self._check_shares()
        wrap_candidates(model, self._module_wrappers, candidates, self._spaces)

    def _check_shares(self) -> None:
        """Refuse ratios that come to no block at all: nothing would ever be pruned."""
        blocs = [self._bloc(pool) for pool in self._pools]
        none = {bloc.name: torch.zeros(bloc.width) for bloc in blocs}
        if any(bloc.limits.threshold is not None for bloc in blocs):
            return
        if not any(bool(gone.any()) for gone in removed_channels(blocs, none).values()):
            asked = " and ".join(f"{bloc.limits.ratio} of {bloc.width}" for bloc in blocs)
            names = ", ".join(self.candidates[:5]) + (", ..." if len(self.candidates) > 5 else "")
            raise ConfigError(
                f"sparse_ratio removes no block: {asked} selected blocks ({names}) is less than one, and one always "
                "stays. Give a larger ratio (one block is 1 / their number), or select more. The model is unchanged."
            )

    def _bloc(self, pool: str) -> Bloc:
        """Return what goes of a pool as its settings are now, a block for a channel."""
        candidates = self._pools[pool]
        space = self._spaces[candidates[0].chosen]
        ratio, threshold, least, most, _ = (getattr(space, key) for key in SHARED)
        limits = Limits(ratio, threshold, 0.0 if least is None else least, 1.0 if most is None else most)
        return Bloc(pool, torch.arange(len(candidates)), torch.ones(len(candidates)), limits)

    # -- NNI's steps from data to masks ------------------------------------------------------------------

    def _collect_data(self) -> dict[str, dict[str, Tensor]]:
        """Return the importance of every block that is not masked yet, `{block: {"score": [1]}}`."""
        blocks = [one.block for name, one in self._candidates.items() if name not in self._removed]
        model, importance = self.bound_model, self.importance
        if not blocks:
            return {}
        learn: Sequence[Any] = ()
        held: Sequence[Any] | None = None
        if importance.needs_held_out:
            learn, held = self._minibatches.split(model, self.held_out)
        elif importance.needs_batches:
            learn = self._minibatches.all(model)
        with unwrapped(model, masked=True), torch.random.fork_rng(), torch.enable_grad():
            try:
                scores = importance.score(model, self._inputs, blocks, learn, self._minibatches.loss_fn, held)
            except DataError as error:
                said = str(error).removesuffix(" The model is unchanged.")  # the evaluator has trained it
                raise DataError(
                    f"{type(self).__name__} has {len(self._minibatches)} minibatches of {self.training_steps} training "
                    f"steps to rank blocks with, {len(held or ())} of them held out. {said} Masks are as they were."
                ) from error
        return {name: {"score": torch.tensor([score], dtype=torch.float64)} for name, score in scores.items()}

    def _calculate_metrics(self, data: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Return the importances of the blocks that are ranked together, zero for those that are masked already."""
        self.scores = {name: float(of["score"]) for name, of in data.items()}
        return {
            pool: {"score": torch.tensor([self.scores.get(one.block.name, 0.0) for one in ones], dtype=torch.float64)}
            for pool, ones in self._pools.items()
        }

    def _generate_sparsity(self, metrics: Mapping[str, Mapping[str, Tensor]]) -> Masks:
        """Return the masks for the ratios as they are now."""
        gone = {
            pool: torch.tensor([one.block.name in self._removed for one in ones]) for pool, ones in self._pools.items()
        }
        scores = {pool: of["score"] for pool, of in metrics.items()}
        going = removed_channels(map(self._bloc, self._pools), scores, gone)
        names = {
            one.block.name
            for pool, ones in self._pools.items()
            for one, goes in zip(ones, going[pool].tolist(), strict=True)
            if goes
        }
        self._choice = [name for name in self.candidates if name in names]
        return self._with_others(block_masks(self._module_wrappers, self._candidates.values(), names))

    def _regenerate(self) -> None:
        self.update_masks(self.generate_masks())
        self._removed = self._choice

    def plan(self) -> PruningPlan:
        """Return what the masks say as a plan; `plan.apply(model, example_inputs)` cuts the unwrapped network by it."""
        return PruningPlan((), removed_blocks=tuple(self._removed))


class ImprintingPruner(BlockPruner):
    """Gain in accuracy of a classifier imprinted behind a block over that in front of it (LayerPrune, ACCV 2020).

    The length of embeddings and the number of classes go in as `importance=Imprinting(target_length=512)`.
    """

    default_importance = Imprinting


class LayerStatisticPruner(BlockPruner):
    """Mean over a block's layers of the mean score of their channels (LayerPrune's statistics), of Taylor by default.

    Another criterion goes in as `importance=LayerStatistic(Magnitude())`, which then needs neither data nor training.
    """

    @staticmethod
    def default_importance() -> LayerImportance:
        """Return the importance."""
        return LayerStatistic(TaylorFO())
