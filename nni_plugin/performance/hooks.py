"""Gates on a network that is used as it is: hooks multiply what each layer reads, and nothing stays afterwards.

The gate of a coupled channel lies at the input of every dense layer that reads it, which is where the paper has it
(behind the ReLU), and where it does what cutting does: a layer that reads a removed channel gets nothing from it,
whatever activation lies between. At the output of a normalisation a gate of zero would leave `sigmoid(0)` to the
reader. So a network with gates of 0 and 1 computes what the masked and the compact ones compute.

Cost: one product for each reader, and its backward pass.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from nni_plugin.cost import call, tensors_in
from nni_plugin.criteria.masked_loop import channel_dim
from nni_plugin.errors import GraphError, SearchError
from nni_plugin.groups import ChannelGroup
from nni_plugin.masks import Masks
from nni_plugin.performance.architecture import ArchitectureLayout
from nni_plugin.tensors import CHANNEL_NORMS

_TOLERANCE = 1e-3
"""Largest accepted difference between gates and masks, relative to the largest output, in single precision."""


class GateHooks:
    """Multiplies the inputs of readers with the gates of the channels they read; a context manager.

    Args:
        model: The network.
        layout: The gates.
    """

    def __init__(self, model: nn.Module, layout: ArchitectureLayout) -> None:
        self.model, self.layout = model, layout
        self._channels: Tensor | None = None
        self._handles: list[Any] = []
        self._reached: set[str] = set()
        # For every position on a reader's axis the channel that gates it; the last entry stands for "no gate".
        self._sources: dict[str, Tensor | slice] = {}
        sources: dict[str, Tensor] = {}
        for group in layout.groups:
            for member in group.readers:
                reader = model.get_submodule(member.path)
                width = reader.in_channels if isinstance(reader, _ConvNd) else reader.in_features
                assert isinstance(width, int)
                source = sources.setdefault(member.path, torch.full((width,), layout.channels))
                source[member.index] = member.channel + layout.channel_slices[group.name].start
        for path, source in sources.items():
            first = int(source[0])
            whole = torch.equal(source, torch.arange(first, first + len(source)))
            self._sources[path] = slice(first, first + len(source)) if whole else source.to(layout.device)

    def set(self, architecture: Tensor) -> None:
        """Use these gates, shape `[N]`, from the next forward pass on."""
        channels = self.layout.expand(architecture)
        self._channels = torch.cat([channels, channels.new_ones(1)])
        self._reached.clear()

    @property
    def missed(self) -> list[str]:
        """The readers that the forward passes since `set` did not come by."""
        return [path for path in self._sources if path not in self._reached]

    def check_reached(self) -> None:
        """Check that the forward pass just made came by every reader.

        Raises:
            GraphError: It did not: gates that do nothing would be taken for channels that do not matter.
        """
        if self.missed:
            raise GraphError(
                f"The forward pass did not call layer {self.missed[0]!r}, whose input has gates. Does the loss run all "
                "of the network? Otherwise leave what writes to that layer whole with `ignore`. The model is unchanged."
            )

    def __enter__(self) -> GateHooks:
        """Put the hooks on."""
        self.__exit__()
        for path in self._sources:
            reader = self.model.get_submodule(path)
            self._handles.append(reader.register_forward_pre_hook(self._hook(path), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._channels = None

    def _hook(self, path: str) -> Any:
        source = self._sources[path]

        def hook(reader: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._channels is None:
                raise SearchError("Gates lie on the network, but none were set: call set(architecture) before.")
            self._reached.add(path)
            x = args[0] if args else kwargs["input"]
            shape = [1] * x.dim()
            shape[channel_dim(reader, x)] = -1
            gates = self._channels[source] if isinstance(source, slice) else self._channels.index_select(0, source)
            x = x * gates.to(x.dtype).reshape(shape)
            return ((x, *args[1:]), kwargs) if args else ((), {**kwargs, "input": x})

        return hook


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Freeze a network and put it into eval mode for a while; every parameter and mode is put back."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def sound_gates(model: nn.Module, groups: Sequence[ChannelGroup], example_inputs: Any) -> list[ChannelGroup]:
    """Return the groups on which gates of zero do what masks do, before hours are spent on others; warns of each.

    Normalisations over channels (LayerNorm, GroupNorm) are passed over: masked channels change their statistics, and
    so would removed ones, which no gate imitates.

    Args:
        model: The network; left as it was.
        groups: The groups that may have gates.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs.

    Raises:
        GraphError: None is left.
    """
    checked = [group for group in groups if not _normalised_over_channels(model, group)]
    if not checked or _failure(model, checked, example_inputs) is None:
        return list(groups)
    sound = []
    for group in groups:
        failure = _failure(model, [group], example_inputs) if group in checked else None
        if failure is None:
            sound.append(group)
        else:
            warnings.warn(f"Group {group.name!r} is left whole: {failure}", stacklevel=3)
    if not sound:
        raise GraphError("Gates on no group do what removing its channels does, so there is nothing to search.")
    return sound


def _normalised_over_channels(model: nn.Module, group: ChannelGroup) -> bool:
    norms = (model.get_submodule(member.path) for member in group.members if member.kind == "norm")
    return any(isinstance(norm, CHANNEL_NORMS) for norm in norms)


def _failure(model: nn.Module, groups: Sequence[ChannelGroup], example_inputs: Any) -> str | None:
    device = next(model.parameters()).device
    layout = ArchitectureLayout(groups, device)
    architecture = torch.ones(layout.size)
    for part in layout.slices.values():  # half of the units, scattered, the last always there
        gone = torch.randperm(part.stop - part.start - 1, generator=torch.Generator().manual_seed(0))
        architecture[part][gone[: max(1, (part.stop - part.start) // 2)]] = 0
    masked = copy.deepcopy(model).eval()
    masks = Masks(masked, groups)
    masks.remove(layout.kept(architecture))
    masks.zero_weights()
    with frozen(model), GateHooks(model, layout) as hooks:
        hooks.set(architecture.to(device))
        got = tensors_in(call(model, example_inputs))
        missed = hooks.missed
    if missed:
        return f"the forward pass does not call {missed[0]!r}, which reads it: its weights are used in another way."
    for a, b in zip(got, tensors_in(call(masked, example_inputs)), strict=True):
        largest = float(b.abs().max()) if b.is_floating_point() and b.numel() else 0.0
        if largest and not float((a - b).abs().max()) <= _TOLERANCE * largest:
            return "its channels are read by something else than a layer, which a gate does not reach."
    return None
