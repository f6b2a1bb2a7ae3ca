"""Which whole blocks masks leave without effect: residual blocks and branches that add exactly nothing.

Zeros in the last layers of a residual branch, biases and normalisations included, make it add zero to the stream
whatever it gets, and the block is then the identity. That is read off the masks, not off trained weights: on a copy of
the network with drawn weights under the masks, every layer gives noise where its output is not exactly zero, all of it
positive, which no ReLU stops. A block that still gives back exactly what it got lets nothing through, and neither does
a branch that adds zero everywhere. A constant that is not zero (of a bias, or of the normalisation behind a masked
layer) comes through, and so the block stays.

Units of a plain network are no such blocks: masked, they cut the signal off rather than hand it on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugin.cost import call
from nni_plugin.layers.blocks import Block, BlockMap, find_blocks
from nni_plugin.layers.identity import replaced, stand_in
from nni_plugin.layers.trace import is_layer, main_tensor
from nni_plugin.tensors import tensor_of


def called_layers(model: nn.Module, found: BlockMap) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers that a network calls, with their names, those inside another layer excepted.

    Args:
        model: The network.
        found: What :func:`~nni_plugin.layers.blocks.find_blocks` found in it.
    """
    below: set[nn.Module] = set()
    for name, layer in model.named_modules():
        if layer not in below and is_layer(layer):
            below.update(layer.modules())
            if found.records[name].count:
                yield name, layer


@torch.no_grad()
def silent_blocks(
    model: nn.Module, found: BlockMap, masks: Mapping[str, Tensor], example_inputs: Any
) -> tuple[Block, ...]:
    """Return the blocks and branches that add nothing under masks, whatever the weights that are left.

    Args:
        model: The network; left as it is.
        found: What :func:`~nni_plugin.layers.blocks.find_blocks` found in it.
        masks: One mask a parameter, zero where it is masked, by name; parameters not named are kept.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs; only their shapes (and integers) count.

    Returns:
        In forward order, nested ones too, and those that must stay for other reasons.
    """
    with torch.inference_mode(False):
        network, inputs = stand_in(model, example_inputs)
        for name, mask in masks.items():
            parameter = tensor_of(network, name).data
            parameter.mul_(mask.to(parameter))
        candidates = [block for block in found.blocks if block.kind != "unit"]
        got: dict[str, Tensor] = {}
        silent: set[str] = set()
        with ExitStack() as stack:
            # Noise first: the last layer of a branch is also the branch's end, and is looked at after that.
            for _, layer in called_layers(network, found):
                stack.callback(layer.register_forward_hook(_noise).remove)
            for block in candidates:
                first, last = (network.get_submodule(block.members[at]) for at in (0, -1))
                if block.kind == "block":
                    stack.callback(first.register_forward_pre_hook(_noting(block.name, got)).remove)
                stack.callback(last.register_forward_hook(_judging(block, got, silent)).remove)
            call(network, inputs)
    return tuple(block for block in candidates if block.name in silent)


def dead_blocks(
    model: nn.Module, masks: Mapping[str, Tensor], example_inputs: Any
) -> tuple[tuple[Block, ...], dict[str, str]]:
    """Return the blocks that masks leave without effect and that can be taken out.

    Args:
        model: The network; left as it is.
        masks: One boolean mask a parameter, True where it is kept, by name; parameters not named are kept.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs.

    Returns:
        The blocks, none inside another one, and by name the reasons why others that add nothing must stay.
    """
    if all(bool(mask.any()) for mask in masks.values()):
        return (), {}  # no tensor is masked as a whole, so no layer either: that saves the search
    found = find_blocks(model, example_inputs)
    silent = silent_blocks(model, found, masks, example_inputs)
    leaving = outermost(block for block in silent if block.fixed is None)
    stay = {b.name: b.fixed for b in silent if b.fixed is not None and not _inside(b, leaving)}
    return leaving, stay


def outermost(blocks: Iterable[Block]) -> tuple[Block, ...]:
    """Return those of some blocks that lie in none of the others.

    Example:
        >>> whole = Block("blocks.0", "block", ("blocks.0",), (4,))
        >>> part = Block("blocks.0.attn", "branch", ("blocks.0.norm1", "blocks.0.attn"), (4,))
        >>> [block.name for block in outermost([whole, part])]
        ['blocks.0']
    """
    blocks = tuple(blocks)
    return tuple(block for block in blocks if not _inside(block, blocks))


def _inside(block: Block, others: Iterable[Block]) -> bool:
    return any(other is not block and all(map(other.holds, block.members)) for other in others)


def _noise(_: nn.Module, __: Any, output: Any) -> Any:
    tensor = main_tensor(output)
    if tensor is None or not tensor.is_floating_point() or not bool(tensor.any()):
        return output
    generator = torch.Generator().manual_seed(tensor.numel())
    drawn = (torch.rand(tensor.shape, generator=generator) + 0.5).to(tensor)
    return replaced(output, drawn * (tensor != 0))


def _noting(name: str, got: dict[str, Tensor]) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            got[name] = args[0].clone()  # which the block may change in place

    return hook


def _judging(block: Block, got: dict[str, Tensor], silent: set[str]) -> Any:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        tensor, before = main_tensor(output), got.pop(block.name, None)
        if tensor is None:
            return
        if block.kind == "branch":
            is_silent = not bool(tensor.any())
        else:
            # A constant signal (behind a clamp, or a network masked in two) could hide what is added to it.
            is_silent = before is not None and torch.equal(tensor, before) and not _constant(before)
        if is_silent:
            silent.add(block.name)

    return hook


def _constant(value: Tensor) -> bool:
    return bool((value == value.flatten()[0]).all())
