"""Training on Hugging Face Accelerate with timm's optimizers, schedulers, mixup and weight averaging.

`fit` trains a model in place and calls `Callback` objects around every minibatch; a run that is killed at any
moment and started again with ``resume=True`` ends in the same network, bit for bit.
"""

from nni_plugin.adapters.training.callbacks import Callback, TrainingState
from nni_plugin.adapters.training.checkpoint import checkpoint_path
from nni_plugin.adapters.training.config import TrainingConfig
from nni_plugin.adapters.training.evaluate import evaluate
from nni_plugin.adapters.training.loop import fit

__all__ = ["Callback", "TrainingConfig", "TrainingState", "checkpoint_path", "evaluate", "fit"]
