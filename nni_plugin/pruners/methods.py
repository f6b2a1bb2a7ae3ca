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
from nni_plugin.pruners.base import ChannelMaskPruner


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


class BNScalePruner(WeightPruner):
    """Scale of the normalisation behind a channel (Liu et al., ICCV 2017), as the network was trained.

    NNI's SlimPruner trains factors of its own instead; train with an L1 penalty on `gamma` before, as the paper does.
    """

    default_criterion = BNScale


class RandomPruner(WeightPruner):
    """Random channels, the baseline of every comparison."""

    default_criterion = Random
