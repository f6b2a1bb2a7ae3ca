"""Groups, surgery and its proof; Torch-Pruning's importances and the form of groups that they read."""

from nni_plugin.adapters.torch_pruning.apply import apply_plan
from nni_plugin.adapters.torch_pruning.compare import Parity
from nni_plugin.adapters.torch_pruning.graph import find_groups, warn_of_unreached
from nni_plugin.adapters.torch_pruning.optimizer import carry_optimizer
from nni_plugin.adapters.torch_pruning.probe import sound_groups
from nni_plugin.adapters.torch_pruning.surgery import cut_channels, kept_outputs
from nni_plugin.adapters.torch_pruning.verify import verify

__all__ = [
    "Parity",
    "apply_plan",
    "carry_optimizer",
    "cut_channels",
    "find_groups",
    "kept_outputs",
    "sound_groups",
    "verify",
    "warn_of_unreached",
]
