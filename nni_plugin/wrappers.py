"""The network that a user hands over: found inside its wrappers, refused where it is none."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from nni_plugin.errors import ModelError


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside the wrappers of (distributed) data parallelism and `torch.compile`."""
    inner = getattr(model, "module", None) if hasattr(model, "device_ids") else getattr(model, "_orig_mod", None)
    return unwrapped(inner) if isinstance(inner, nn.Module) else model


def checked_network(model: Any) -> nn.Module:
    """Return the network inside what was given as one.

    Args:
        model: A network, in wrappers or not.

    Raises:
        ModelError: It is no network, or one without values (on the meta device).
    """
    if isinstance(model, type):
        raise ModelError(f"Expected a network, got the class {model.__name__}: give an instance, {model.__name__}().")
    if not isinstance(model, nn.Module):
        raise ModelError(f"Expected a network, a torch.nn.Module, got {model!r}.")
    network = unwrapped(model)
    for name, parameter in network.named_parameters():
        if parameter.is_meta:
            raise ModelError(
                f"Expected a network with values, got one on the meta device ({name!r}): give it a device "
                "(model.to_empty) and load its weights first."
            )
    return network


def copy_to_plan_on(model: nn.Module) -> nn.Module:
    """Return a copy of a network without the plan of what left it before: names and plans begin with it as it is."""
    network = copy.deepcopy(model)
    if hasattr(network, "pruning_plan"):
        del network.pruning_plan
    return network


def average_of(model: nn.Module, ema: Any) -> nn.Module:
    """Return the network inside a moving average of another one: torch's `AveragedModel`, timm's `ModelEmaV3` ...

    Args:
        model: The network that the average is of.
        ema: The average, a network of the same parameters, or what holds one as `module` or `ema`.

    Raises:
        ModelError: There is none.
    """
    names = {name for name, _ in model.named_parameters()}
    for candidate in (ema, getattr(ema, "module", None), getattr(ema, "ema", None)):
        network = unwrapped(candidate) if isinstance(candidate, nn.Module) else None
        if network is not None and names <= {name for name, _ in network.named_parameters()}:
            return network
    raise ModelError(
        f"Expected a moving average with the parameters of {type(model).__name__}, got {type(ema).__name__} without "
        f"{min(names, default='any')!r}. The model is unchanged."
    )
