"""timm's optimizer and learning-rate schedule, as a run's settings ask for them."""

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from nni_plugin.adapters.training.config import TrainingConfig
from nni_plugin.errors import TrainingError


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Return the optimizer of the parameters that require gradients; biases and norms are not decayed.

    Args:
        model: On the device it is trained on.
        config: `opt`, `lr`, `weight_decay` and `momentum` are used.

    Raises:
        TrainingError: The optimizer cannot be built with these settings.
    """
    # timm's "sgd" is Nesterov's, which torch refuses without momentum though it then is plain SGD.
    opt = "momentum" if config.opt == "sgd" and config.momentum == 0 else config.opt
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            model,
            opt=opt,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
        )
    # What an optimizer of some other package lacks here comes as one of these.
    except (TypeError, ValueError, AssertionError, ImportError) as error:
        raise TrainingError(f"--opt {config.opt} cannot be built: {error}; choose another one") from error
    return optimizer


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainingConfig, batches_per_epoch: int
) -> Scheduler | None:
    """Return the schedule, to be stepped with `step_update` after each minibatch; None for "none".

    It has no state but the number of minibatches and what it left in the optimizer's groups.

    Args:
        optimizer: Its groups get their first learning rate here.
        config: `sched`, `epochs`, `warmup_epochs`, `min_lr`, `decay_epochs` and `decay_rate` are used.
        batches_per_epoch: Minibatches of an epoch, >= 1.
    """
    scheduler: Scheduler | None = create_scheduler_v2(
        optimizer,
        sched=config.sched,
        num_epochs=config.epochs,
        decay_epochs=config.decay_epochs,
        decay_rate=config.decay_rate,
        min_lr=config.min_lr,
        warmup_lr=min(1e-5, config.lr),
        warmup_epochs=config.warmup_epochs,
        step_on_epochs=False,
        updates_per_epoch=batches_per_epoch,
    )[0]
    return scheduler
