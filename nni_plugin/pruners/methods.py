"""The pruners by name: one of our criteria each, in the constructors of NNI's TaylorPruner or L1NormPruner.

    from nni_plugin.pruners import TaylorFOPruner      # was: from nni.compression.pruning import TaylorPruner
    pruner = TaylorFOPruner(model, config_list, evaluator, training_steps=20)
    _, masks = pruner.compress()

A criterion with other options, or one of your own, goes in as `criterion=`.
"""

from __future__ import annotations

from typing import Any

from nni.compression.base.compressor import Compressor
from nni.compression.base.wrapper import ModuleWrapper
from torch import nn

from nni_plugin.criteria import (
    OBD,
    OBS,
    BNScale,
    Criterion,
    FeatureMap,
    GeometricMedian,
    Magnitude,
    Oracle,
    Random,
    TaylorFG,
    TaylorFisher,
    TaylorFO,
    TaylorSO,
)
from nni_plugin.errors import ConfigError
from nni_plugin.pruners.base import ChannelMaskPruner
from nni_plugin.pruners.wrapping import unwrapped
from nni_plugin.tensors import NORMS


class DataPruner(ChannelMaskPruner):
    """A pruner whose scores are gathered while the evaluator trains; see :class:`ChannelMaskPruner`."""

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict[str, Any]],
        evaluator: Any,
        training_steps: int,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
        *,
        example_inputs: Any = None,
        criterion: Criterion | None = None,
    ) -> None:
        super().__init__(
            model,
            config_list,
            evaluator,
            training_steps,
            existed_wrappers,
            example_inputs=example_inputs,
            criterion=criterion,
        )

    @classmethod
    def from_compressor(
        cls,
        compressor: Compressor,
        new_config_list: list[dict[str, Any]],
        training_steps: int,
        evaluator: Any = None,
        **options: Any,
    ) -> DataPruner:
        """Go on from another compressor: its network, its wrappers and masks, and its evaluator if it has one.

        Args:
            compressor: Any of NNI's or ours; it is unwrapped.
            new_config_list: What this pruner prunes.
            training_steps: As in the constructor.
            evaluator: Where the other compressor has none.
            options: `example_inputs` and `criterion`, as in the constructor.
        """
        pruner: DataPruner = super().from_compressor(
            compressor, new_config_list, training_steps=training_steps, evaluator=evaluator, **options
        )
        return pruner


class WeightPruner(ChannelMaskPruner):
    """A pruner that reads weights alone and trains nothing when used by itself; see :class:`ChannelMaskPruner`."""

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict[str, Any]],
        evaluator: Any = None,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
        *,
        example_inputs: Any = None,
        criterion: Criterion | None = None,
    ) -> None:
        super().__init__(
            model,
            config_list,
            evaluator,
            existed_wrappers=existed_wrappers,
            example_inputs=example_inputs,
            criterion=criterion,
        )

    @classmethod
    def from_compressor(
        cls, compressor: Compressor, new_config_list: list[dict[str, Any]], evaluator: Any = None, **options: Any
    ) -> WeightPruner:
        """Go on from another compressor: its network, its wrappers and masks, and its evaluator if it has one.

        Args:
            compressor: Any of NNI's or ours; it is unwrapped.
            new_config_list: What this pruner prunes.
            evaluator: Where the other compressor has none.
            options: `example_inputs` and `criterion`, as in the constructor.
        """
        pruner: WeightPruner = super().from_compressor(compressor, new_config_list, evaluator=evaluator, **options)
        return pruner


class TaylorFOPruner(DataPruner):
    """Squared first-order loss change of a channel (Molchanov et al., CVPR 2019, Eq. 8)."""

    default_criterion = TaylorFO


class TaylorFGPruner(DataPruner):
    """Mean square of the loss gradient of every sample at a channel's gate (the same paper's full gradient)."""

    default_criterion = TaylorFG


class TaylorFisherPruner(DataPruner):
    """Squared second-order loss change of a channel, with the empirical Fisher for the Hessian."""

    default_criterion = TaylorFisher


class TaylorSOPruner(DataPruner):
    """Squared second-order loss change of a channel, with the true Hessian (the same paper, Eq. 7)."""

    default_criterion = TaylorSO


class OBDPruner(DataPruner):
    """Half the curvature of the loss at a channel's gate (LeCun et al., 1990)."""

    default_criterion = OBD


class OBSPruner(DataPruner):
    """Optimal Brain Surgeon over all channels together, with compensation (Hassibi & Stork, 1993).

    The channels that stay take over from those that go: whenever masks are made, each gate's factor is multiplied into
    the layers that write the channel. Masks cannot hold factors, so the network's weights hold them, and those of
    channels that go are zero. `unwrap_model()` keeps both, as it keeps what the evaluator has trained: the network
    without its masks still is the pruned one. `criterion=OBS(compensate=False)` changes no weight.
    """

    default_criterion = OBS


class FeatureMapPruner(DataPruner):
    """Mean product of a feature map and its gradient (Molchanov et al., ICLR 2017)."""

    default_criterion = FeatureMap


class OraclePruner(DataPruner):
    """Exact loss change of every channel, on the minibatches of `training_steps` steps; slow, to judge others by.

    The loss is that of TorchEvaluator's `training_step(batch, model)`; others need `criterion=Oracle(loss_fn)`.
    """

    default_criterion = Oracle


class L1NormPruner(WeightPruner):
    """L1 norm of all weights that write a channel (Li et al., ICLR 2017)."""

    @staticmethod
    def default_criterion() -> Criterion:
        """Return the criterion."""
        return Magnitude(1)


class L2NormPruner(WeightPruner):
    """L2 norm of all weights that write a channel."""

    default_criterion = Magnitude


class FPGMPruner(WeightPruner):
    """Distance of a filter to the others of its layer (He et al., CVPR 2019)."""

    default_criterion = GeometricMedian


class BNScalePruner(ChannelMaskPruner):
    """Scale of the normalisation behind a channel, after training with an L1 penalty on scales (Liu et al., ICCV 2017).

    The arguments are those of NNI's SlimPruner, and so is the penalty. SlimPruner trains factors of its own that leave
    with the wrappers; here the evaluator's optimizer trains the scales that the network has.

    Args:
        model: The network, not wrapped.
        config_list: NNI's; see NNI's Compression Config Specification. Ratios are shares to remove.
        evaluator: Any evaluator of NNI's; None where nothing is trained.
        training_steps: Optimizer steps with the penalty before masks are made; under a schedule it is there throughout.
            0: scales are read as they are.
        regular_scale: What is added to the loss is this times the sum of absolute scales, divided by the number of
            normalisations.
        existed_wrappers: Wrappers of another compressor, by module; `from_compressor` gives them.
        example_inputs: As :class:`ChannelMaskPruner` has it.
        criterion: Likewise.

    Raises:
        ConfigError: An argument does not fit; the text names the key. The network is unchanged.
        GraphError: The network cannot be traced.
    """

    default_criterion = BNScale

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict[str, Any]],
        evaluator: Any = None,
        training_steps: int = 0,
        regular_scale: float = 1.0,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
        *,
        example_inputs: Any = None,
        criterion: Criterion | None = None,
    ) -> None:
        if isinstance(regular_scale, bool) or not isinstance(regular_scale, (int, float)) or not regular_scale >= 0:
            raise ConfigError(f"regular_scale must be a number of at least 0, got {regular_scale!r}.")
        self.regular_scale = regular_scale
        super().__init__(
            model,
            config_list,
            evaluator,
            training_steps,
            existed_wrappers,
            example_inputs=example_inputs,
            criterion=criterion,
        )

    @classmethod
    def from_compressor(
        cls,
        compressor: Compressor,
        new_config_list: list[dict[str, Any]],
        training_steps: int = 0,
        regular_scale: float = 1.0,
        evaluator: Any = None,
        **options: Any,
    ) -> BNScalePruner:
        """Go on from another compressor: its network, its wrappers and masks, and its evaluator if it has one.

        Args:
            compressor: Any of NNI's or ours; it is unwrapped.
            new_config_list: What this pruner prunes.
            training_steps: As in the constructor.
            regular_scale: As in the constructor.
            evaluator: Where the other compressor has none.
            options: `example_inputs` and `criterion`, as in the constructor.
        """
        pruner: BNScalePruner = super().from_compressor(
            compressor,
            new_config_list,
            training_steps=training_steps,
            regular_scale=regular_scale,
            evaluator=evaluator,
            **options,
        )
        return pruner

    def _needs_training(self, training_steps: Any) -> bool:
        return training_steps != 0 or super()._needs_training(training_steps)

    def _fuse_preprocess(self, evaluator: Any) -> None:
        if self.training_steps:
            if not self.criterion.needs_data:
                self._collect_data()  # a group without scales is found before the training, not after
            with unwrapped(self.bound_model):
                layers = {m.path: self.bound_model.get_submodule(m.path) for g in self._groups for m in g.writers}
                scales = [
                    layer.weight for layer in layers.values() if isinstance(layer, NORMS) and layer.weight is not None
                ]
            if scales:
                share = self.regular_scale / len(scales)
                evaluator.patch_loss(lambda loss, _: loss + share * sum(scale.abs().sum() for scale in scales))
        super()._fuse_preprocess(evaluator)


class RandomPruner(WeightPruner):
    """Random channels, the baseline of every comparison."""

    default_criterion = Random
