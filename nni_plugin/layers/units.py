"""Units of plain networks: convolution, normalisation and activation, a run of modules in one `nn.Sequential`.

A unit of equal width and resolution leaves its Sequential shorter (LayerPrune on VGG does so). It could be the
identity: with Dirac filters and a normalisation that changes nothing, an activation such as ReLU gives back what the
activation before it gave. An activation that changes that (SiLU, GELU) makes a unit that can never be the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from nni_plugin.layers.identity import is_identity, passing_on
from nni_plugin.layers.trace import CallRecord, is_layer
from nni_plugin.tensors import kind_of

Unit = tuple[tuple[str, ...], str | None]
"""The qualified names of a unit's modules in order, and why it must stay (None where it may leave)."""


def is_sequential(module: nn.Module) -> bool:
    """Tell whether a module calls its children one after the other, and does nothing else."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def in_plain_network(name: str, model: nn.Module) -> bool:
    """Tell whether a module lies in no block: in no child of a container that has a forward function of its own."""
    path = name.split(".")
    for depth in range(1, len(path)):
        inner, outer = (model.get_submodule(".".join(path[:end])) for end in (depth, depth - 1))
        if isinstance(outer, (nn.Sequential, nn.ModuleList)) and not is_sequential(inner):
            return False
    return True


def units_of(name: str, model: nn.Module, value: Tensor, records: Mapping[str, CallRecord]) -> list[Unit]:
    """Return the units of a Sequential in order.

    Args:
        name: Qualified name of the Sequential.
        model: The stand-in it is part of.
        value: Its input.
        records: The trace of the stand-in.
    """
    children = [(f"{name}.{key}" if name else key, child) for key, child in model.get_submodule(name).named_children()]
    inputs = _inputs(children, value)
    units: list[Unit] = []
    start = 0
    while start < len(inputs):
        path, child = children[start]
        length = 1
        if not records[path].keeps_shape:
            pass
        elif is_layer(child) and kind_of(child) in ("dense", "depthwise"):
            length, reason = _run_from(start, children, inputs)
            units.append((tuple(p for p, _ in children[start : start + length]), reason))
        elif _is_composed(child) and any(
            is_identity(_passed(path, child, records, zero), inputs[start]) for zero in (False, True)
        ):
            units.append(((path,), None))
        start += length
    return units


def _is_composed(child: nn.Module) -> bool:
    return not is_layer(child) and not is_sequential(child) and next(child.parameters(), None) is not None


def _inputs(children: Sequence[tuple[str, nn.Module]], value: Tensor) -> list[Tensor]:
    """Return what each child gets, up to the first one that gives no tensor."""
    inputs: list[Tensor] = []
    current: object = value
    for _, child in children:
        if not isinstance(current, Tensor):
            break
        inputs.append(current.clone())
        current = child(current.clone())
    return inputs


def _run_from(
    start: int, children: Sequence[tuple[str, nn.Module]], inputs: Sequence[Tensor]
) -> tuple[int, str | None]:
    """Return how many modules a unit has that begins with a dense layer, and why it must stay."""
    value, end = inputs[start], start + 1
    while end < len(inputs):
        path, child = children[end]
        if inputs[end].shape != value.shape:
            break
        if kind_of(child) != "norm":
            if kind_of(child) != "prelu" and next(child.parameters(), None) is not None:
                break
            output = child(value.clone())
            if not isinstance(output, Tensor) or output.shape != value.shape:
                break
            if not torch.equal(output, value):
                return end + 1 - start, f"{path!r} ({type(child).__name__}) would change what an identity gives it"
        end += 1
    return end - start, None


def _passed(
    path: str, child: nn.Module, records: Mapping[str, CallRecord], dense_zero: bool
) -> Callable[[Tensor], object]:
    def run(value: Tensor) -> object:
        with passing_on(path, child, records, dense_zero=dense_zero):
            return child(value)

    return run
