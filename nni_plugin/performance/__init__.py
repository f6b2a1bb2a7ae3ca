"""Pruning by performance maximisation: gates on coupled channels, led by a network that predicts accuracy."""

from nni_plugin.performance.architecture import ArchitectureLayout, gated_groups
from nni_plugin.performance.choose import PredictorQuality, predictor_quality
from nni_plugin.performance.cost import ArchitectureCost, CostTarget, kept_fraction
from nni_plugin.performance.gates import DifferentiableGates
from nni_plugin.performance.importance import GateImportance
from nni_plugin.performance.latency_table import LatencyTable, LayerTimes, TableLatency
from nni_plugin.performance.memory import EpisodicMemory
from nni_plugin.performance.network import LinearPredictor, PerformanceNetwork, ReleasedNetwork
from nni_plugin.performance.options import SearchOptions
from nni_plugin.performance.plan import PerformancePlanner, plan_performance
from nni_plugin.performance.search import PerformanceMaximization, StepRecord

__all__ = [
    "ArchitectureCost",
    "ArchitectureLayout",
    "CostTarget",
    "DifferentiableGates",
    "EpisodicMemory",
    "GateImportance",
    "LatencyTable",
    "LayerTimes",
    "LinearPredictor",
    "PerformanceMaximization",
    "PerformanceNetwork",
    "PerformancePlanner",
    "PredictorQuality",
    "ReleasedNetwork",
    "SearchOptions",
    "StepRecord",
    "TableLatency",
    "gated_groups",
    "kept_fraction",
    "plan_performance",
    "predictor_quality",
]
