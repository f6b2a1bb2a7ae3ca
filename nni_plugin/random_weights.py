"""The network to try: random weights, and nothing in it left at the zero or one where libraries start it.

A residual branch whose last scale starts at zero (or layer scale at 1e-6) adds nothing, whatever indices are cut from
it; a normalisation with mean 0, variance 1, scale 1 and bias 0 looks the same with its channels in any order. So that
a wrong index shows, all these are drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from nni_plugin.tensors import NORMS

_FAINT = 1e-2
"""A constant, or the largest weight of a layer, below this is taken for a start at zero."""


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Draw what libraries start at a constant, in place; weights of layers stay as they were drawn by the library.

    Scales and variances come from 0.5 to 1.5, biases and means from -0.5 to 0.5: every vector of parameters, the
    statistics of normalisations, and every other parameter whose values are all the same. One that is neither faint
    nor 1 (a temperature) is multiplied by 0.5 to 1.5. Layers whose weights are faint are drawn as torch draws them.

    Args:
        model: The network.
        seed: Of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            values = parameter.data
            if name == "weight" and isinstance(module, (nn.Linear, _ConvNd)):
                if float(values.abs().max()) < _FAINT:
                    bound = (values[0].numel()) ** -0.5
                    _draw(values, -bound, bound, generator)
            elif values.dim() == 1 or float(values.min()) == float(values.max()):
                constant = float(values.flatten()[0])
                is_scale = name == "weight" and isinstance(module, NORMS)
                if values.dim() != 1 and abs(constant) >= _FAINT:
                    drawn = torch.empty_like(values)
                    _draw(drawn, 0.5, 1.5, generator)
                    values.mul_(drawn)
                elif not is_scale and (name.endswith("bias") or not values.any()):
                    _draw(values, -0.5, 0.5, generator)
                else:
                    _draw(values, 0.5, 1.5, generator)
        if isinstance(module, _NormBase) and module.running_mean is not None and module.running_var is not None:
            _draw(module.running_mean, -0.5, 0.5, generator)
            _draw(module.running_var, 0.5, 1.5, generator)


def _draw(tensor: Tensor, low: float, high: float, generator: torch.Generator) -> None:
    """Fill a tensor evenly from an interval; the same values on every device."""
    drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float32)
    tensor.copy_(low + (high - low) * drawn)
