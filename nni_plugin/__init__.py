"""Structured pruning for timm and torchvision models: one plan, exact surgery, any host."""

from nni_plugin.adapters.torch_pruning import Parity, carry_optimizer, verify
from nni_plugin.budgets import Channels, Latency, Layers, MACs, Params
from nni_plugin.channel_pruner import ChannelPruner
from nni_plugin.checkpoint import from_pretrained, save_pretrained
from nni_plugin.compensation import anchor_batchnorm, reestimate_batchnorm
from nni_plugin.cost import Cost, count
from nni_plugin.errors import NNIPluginError
from nni_plugin.filter_norms import restore_filter_norms
from nni_plugin.layer_planner import plan_layers
from nni_plugin.performance import plan_performance
from nni_plugin.plan import GroupPlan, ModelIdentity, PruningPlan
from nni_plugin.planner import plan_channels
from nni_plugin.reconstruction import reconstruct
from nni_plugin.schedules import Continuous, Gradual, Iterative, OneShot
from nni_plugin.width_and_depth import plan_jointly

__all__ = [
    "ChannelPruner",
    "Channels",
    "Continuous",
    "Cost",
    "Gradual",
    "GroupPlan",
    "Iterative",
    "Latency",
    "Layers",
    "MACs",
    "ModelIdentity",
    "NNIPluginError",
    "OneShot",
    "Params",
    "Parity",
    "PruningPlan",
    "anchor_batchnorm",
    "carry_optimizer",
    "count",
    "from_pretrained",
    "plan_channels",
    "plan_jointly",
    "plan_layers",
    "plan_performance",
    "reconstruct",
    "reestimate_batchnorm",
    "restore_filter_norms",
    "save_pretrained",
    "verify",
]
