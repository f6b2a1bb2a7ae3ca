"""What helps a pruned network before any fine-tuning: factors folded into its weights, statistics taken anew.

A factor on the gate of a channel is a factor on the affine parameters of every layer that writes the channel
(`gamma` and `beta` of a normalisation), so the network keeps its architecture. The statistics of batch
normalisations belong to the dense network and can be estimated again on a few minibatches, or taken anew with scale and
shift that leave what the network computes as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nni_plugin.errors import DataError
from nni_plugin.groups import ChannelGroup
from nni_plugin.tensors import tensor_of


@torch.no_grad()
def fold_factors(model: nn.Module, groups: Iterable[ChannelGroup], factors: Mapping[str, Tensor]) -> None:
    """Multiply the gate of each channel into the layers that write it, in place.

    Args:
        model: The network that `groups` was found on.
        groups: Its coupled groups.
        factors: One factor a channel by group name, shape `[width]`; groups not named stay as they are.
    """
    for group in groups:
        if group.name not in factors:
            continue
        for piece in (piece for writer in group.writers for piece in writer.slices):
            tensor = tensor_of(model, piece.tensor)
            if isinstance(tensor, nn.Parameter):
                factor = torch.ones(tensor.shape[piece.dim], dtype=torch.float64)
                factor[piece.index] = factors[group.name].double().cpu()[piece.channel]
                tensor.mul_(factor.to(tensor).reshape([-1 if d == piece.dim else 1 for d in range(tensor.dim())]))


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any]) -> None:
    """Estimate the running statistics of all batch normalisations anew, as plain means over minibatches.

    Args:
        model: Changed in place: running means and variances only. Modes and momenta are put back.
        batches: Minibatches, large enough for statistics (64 and more).
        forward: `forward(model, batch)` runs the network; what it returns is not used.

    Raises:
        DataError: There is no minibatch; the statistics are unchanged.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    modes = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    before = [(norm.running_mean.clone(), norm.running_var.clone(), norm.num_batches_tracked.clone()) for norm in norms]  # type: ignore[union-attr]
    complete = False
    model.eval()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        for batch in batches:
            forward(model, batch)
            complete = True
    except BaseException:
        complete = False
        raise
    finally:
        for module, training in modes.items():
            module.training = training
        for norm in norms:
            norm.momentum = momenta[norm]
        if not complete:
            for norm, values in zip(norms, before, strict=True):
                for buffer, value in zip(
                    (norm.running_mean, norm.running_var, norm.num_batches_tracked), values, strict=True
                ):
                    buffer.copy_(value)  # type: ignore[union-attr]
    if not complete:
        raise DataError("There is no minibatch to estimate the statistics of batch normalisations on.")


@torch.no_grad()
def anchor_batchnorm(model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any]) -> None:
    """Give batch normalisations the statistics of what they read by now, without changing what the network computes.

    Where weights were solved anew against outputs, the running statistics are still those of the dense network. In eval
    mode that is right; in train mode a normalisation takes the minibatch's own statistics instead, and fine-tuning
    would begin with another network than the one that was made: least squares give a signal of less variance, which
    every normalisation in train mode would blow up again. With the statistics that are, and scale and shift that undo
    the difference, `gamma' = gamma s'/s` and `beta' = beta + gamma (m' - m)/s`, both modes begin alike.

    Args:
        model: Changed in place: running statistics and affine parameters of its batch normalisations. Those without
            affine parameters, or that do not run, stay as they are.
        batches: Minibatches.
        forward: `forward(model, batch)` runs the network; what it returns is not used.

    Raises:
        DataError: There is no minibatch; nothing has changed.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None and m.affine]
    sums: dict[_BatchNorm, list[Tensor]] = {}

    def gather(norm: _BatchNorm, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].double()
        rest = [dim for dim in range(values.dim()) if dim != 1]
        total = torch.full((), values.numel() / values.shape[1], dtype=torch.float64, device=values.device)
        found = [total, values.sum(rest), values.square().sum(rest)]
        sums[norm] = [a + b for a, b in zip(sums[norm], found, strict=True)] if norm in sums else found

    modes = {module: module.training for module in model.modules()}
    hooks = [norm.register_forward_pre_hook(gather) for norm in norms]
    ran = False
    try:
        model.eval()
        for batch in batches:
            forward(model, batch)
            ran = True
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    if not ran:
        raise DataError("There is no minibatch to take the statistics of batch normalisations on.")
    for norm, (total, first, second) in sums.items():
        mean = first / total
        variance = (second / total - mean.square()).clamp(min=0)
        assert isinstance(norm.running_mean, Tensor)
        assert isinstance(norm.running_var, Tensor)
        before = (norm.running_var.double() + norm.eps).sqrt()
        weight = norm.weight.double()
        norm.bias.copy_(norm.bias.double() + weight * (mean - norm.running_mean.double()) / before)
        norm.weight.copy_(weight * (variance + norm.eps).sqrt() / before)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
