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
from nni_plugin.processes import several, summed
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

    With a process group of `torch.distributed` every process calls this, each with its share of the minibatches; all
    get the means over all of them.

    Args:
        model: Changed in place: running means and variances only, of normalisations that run. Modes and momenta are
            put back.
        batches: Minibatches, large enough for statistics (64 and more).
        forward: `forward(model, batch)` runs the network; what it returns is not used.

    Raises:
        DataError: There is no minibatch, or one leaves statistics that are not finite; the statistics are unchanged.
    """
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    modes = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms.values()}
    before = {norm: [buffer.clone() for buffer in _statistics(norm)] for norm in norms.values()}
    complete = False
    model.eval()
    try:
        for norm in norms.values():
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        minibatches = 0
        for batch in batches:
            forward(model, batch)
            minibatches += 1
        if not int(summed(torch.tensor(minibatches))):
            raise DataError("There is no minibatch to estimate the statistics of batch normalisations on.")
        for name, norm in norms.items():
            _pool(norm)
            if int(_statistics(norm)[2]) == 0:  # the forward pass does not come here
                _put(norm, before[norm])
            else:
                _check_finite(name, *_statistics(norm))
        complete = True
    finally:
        for module, training in modes.items():
            module.training = training
        for norm in norms.values():
            norm.momentum = momenta[norm]
            if not complete:
                _put(norm, before[norm])


def _statistics(norm: _BatchNorm) -> list[Tensor]:
    """Return running mean and variance, and the number of minibatches behind them."""
    return [norm.running_mean, norm.running_var, norm.num_batches_tracked]  # type: ignore[list-item]


def _put(norm: _BatchNorm, values: Iterable[Tensor]) -> None:
    for buffer, value in zip(_statistics(norm), values, strict=True):
        buffer.copy_(value)


def _pool(norm: _BatchNorm) -> None:
    """Make the means over this process's minibatches those over the minibatches of all processes."""
    if not several():
        return
    mean, variance, minibatches = (buffer.double().cpu() for buffer in _statistics(norm))
    # A process that this normalisation has not run in has no statistics to add.
    total, *sums = summed(torch.stack([torch.ones_like(mean), mean, variance]) * minibatches)
    _put(norm, [*(value / total.clamp(min=1) for value in sums), total[0]])


def _check_finite(name: str, *statistics: Tensor) -> None:
    """Raise unless the statistics of a normalisation are finite."""
    if not all(bool(values.isfinite().all()) for values in statistics):
        raise DataError(
            f"Statistics of the batch normalisation {name!r} would not be finite: look for NaN or infinite values in "
            "the minibatches, or for activations beyond the range of their type. The model is unchanged."
        )


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
        DataError: There is no minibatch, or one leaves statistics that are not finite; nothing has changed.
    """
    norms = {
        module: name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.affine
    }
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
    taken = {}
    for norm, (total, first, second) in sums.items():
        mean = first / total
        taken[norm] = mean, (second / total - mean.square()).clamp(min=0)
        _check_finite(norms[norm], *taken[norm])
    for norm, (mean, variance) in taken.items():
        assert isinstance(norm.running_mean, Tensor)
        assert isinstance(norm.running_var, Tensor)
        before = (norm.running_var.double() + norm.eps).sqrt()
        weight = norm.weight.double()
        norm.bias.copy_(norm.bias.double() + weight * (mean - norm.running_mean.double()) / before)
        norm.weight.copy_(weight * (variance + norm.eps).sqrt() / before)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
