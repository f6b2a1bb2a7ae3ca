"""NNI shells: pruners that fit where NNI's own do, and a speed-up that turns masks into a smaller network."""

import importlib.util

if importlib.util.find_spec("nni") is None:
    raise ImportError('These are pruners for NNI, which is not installed: pip install "nni-plugin[nni]".')

from nni_plugin.pruners.base import ChannelMaskPruner
from nni_plugin.pruners.blocks import BlockPruner, ImprintingPruner, LayerStatisticPruner
from nni_plugin.pruners.dependencies import auto_set_dependency_group_ids
from nni_plugin.pruners.evaluators import LightningEvaluator, TorchEvaluator
from nni_plugin.pruners.methods import (
    BNScalePruner,
    FeatureMapPruner,
    FPGMPruner,
    L1NormPruner,
    L2NormPruner,
    OBDPruner,
    OBSPruner,
    OraclePruner,
    RandomPruner,
    TaylorFGPruner,
    TaylorFisherPruner,
    TaylorFOPruner,
    TaylorSOPruner,
)
from nni_plugin.pruners.performance import PerformanceMaximizationPruner
from nni_plugin.pruners.speedup import ModelSpeedup

__all__ = [
    "BNScalePruner",
    "BlockPruner",
    "ChannelMaskPruner",
    "FPGMPruner",
    "FeatureMapPruner",
    "ImprintingPruner",
    "L1NormPruner",
    "L2NormPruner",
    "LayerStatisticPruner",
    "LightningEvaluator",
    "ModelSpeedup",
    "OBDPruner",
    "OBSPruner",
    "OraclePruner",
    "PerformanceMaximizationPruner",
    "RandomPruner",
    "TaylorFGPruner",
    "TaylorFOPruner",
    "TaylorFisherPruner",
    "TaylorSOPruner",
    "TorchEvaluator",
    "auto_set_dependency_group_ids",
]
