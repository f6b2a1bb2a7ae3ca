"""The tensors of a network: which are one, whether stored ones fit it, and how they get into it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugin.errors import CheckpointError


def find_ties(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the names of tensors that are an earlier one, with the name of that one."""
    first: dict[Any, str] = {}
    keys = {n: (t.device, t.data_ptr(), t.shape, t.stride(), t.dtype) for n, t in state.items() if t.numel()}
    return {name: first[key] for name, key in keys.items() if first.setdefault(key, name) != name}


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a tensor `[N, C, H, W]` has these strides: they choose the kernel, also where sizes of 1 hide them."""
    if tensor.dim() != 4:
        return False
    return tensor.stride() == torch.empty_like(tensor, device="meta", memory_format=torch.channels_last).stride()


def unsaved_buffers(network: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that the state dict leaves out: rebuilt, not stored, only their dtype is."""
    saved = network.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in network.named_buffers() if name not in saved}


def check_fit(network: nn.Module, stored: Mapping[str, Tensor], what: str) -> None:
    """Refuse a network whose tensors have other names, shapes or kinds than the stored ones, or more ties.

    Raises:
        CheckpointError: The first difference, followed by `what`.
    """
    state = network.state_dict()
    for name in {**stored, **state}:
        want, got = _form(stored.get(name)), _form(state.get(name))
        if want != got:
            raise CheckpointError(
                f"Expected tensor {name!r} to be {want}, got {got}: {what}; check that model, plan and files belong "
                "together."
            )
    ties = find_ties(stored)
    for name, root in find_ties(state).items():
        if ties.get(name, name) != ties.get(root, root):
            raise CheckpointError(f"Expected {name!r} and {root!r} to be two tensors, got one: {what}; build two.")


def fill(network: nn.Module, stored: Mapping[str, Tensor], buffer_dtypes: Mapping[str, str]) -> None:
    """Put the stored tensors in place; parameters stay the same objects, so tied ones stay tied."""
    for name, tensor in network.state_dict(keep_vars=True).items():
        tensor.data = stored[name]
    for name, buffer in unsaved_buffers(network).items():
        if name in buffer_dtypes and buffer.is_floating_point():
            buffer.data = buffer.data.to(getattr(torch, buffer_dtypes[name]))


def _form(tensor: Tensor | None) -> str:
    if tensor is None:
        return "absent"
    kind = "floating point" if tensor.is_floating_point() else str(tensor.dtype)
    return f"{kind} {list(tensor.shape)}"
