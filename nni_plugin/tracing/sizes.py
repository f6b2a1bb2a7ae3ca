"""Which of a module's own numbers count channels: `num_heads`, `head_dim`, `dim`, split sizes.

Code such as `x.reshape(b, n, self.num_heads, -1)` breaks when the number stays what it was. Such an attribute is
recognised by what it is used for, not by its name: an operator that ran in the module got this very number as the
size of a dimension that holds channels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from nni_plugin.groups import SizeAttribute
from nni_plugin.tensors import kind_of, shrink_sizes
from nni_plugin.tracing.ledger import Atoms
from nni_plugin.tracing.records import SizeNote
from nni_plugin.tracing.trace import Trace, is_odd


def size_attributes(model: nn.Module, trace: Trace) -> list[SizeAttribute]:
    """Return the attributes that count channels, with the atoms counted in place of channels."""
    counted: dict[str, dict[int, list[SizeNote]]] = {}
    for note in trace.sizes:
        alike = counted.setdefault(note.module, {}).setdefault(len(note.atoms), [])
        if not any(known.passed_on == note.passed_on and (known.atoms == note.atoms).all() for known in alike):
            alike.append(note)
    result = []
    for path, by_size in counted.items():
        module = model.get_submodule(path)
        if is_odd(module) and not kind_of(module) and module._parameters:
            continue  # its numbers say what its parameters are, and these stay
        own = _own_sizes(module)
        for name, item, value in _numbers(module):
            if name not in own and value in by_size:
                likely = _likely(by_size[value])
                # Equal parts of one split are counted by equal numbers of one tuple, in the same order.
                first = 0 if item is None else list(getattr(module, name)[:item]).count(value) % len(likely)
                for atoms in likely[first:] + likely[:first]:
                    result.append(SizeAttribute(path, name, item, torch.from_numpy(atoms)))
    return result


def _likely(counted: list[SizeNote]) -> list[Atoms]:
    """Return what a number may count.

    Things that are there once, not those repeated by batch or position, where there are such; and dimensions that an
    operator made, not those that it passed on, which it need not have been told.
    """
    once = [note for note in counted if len(np.unique(note.atoms)) == len(note.atoms)] or counted
    made = [note for note in once if not note.passed_on] or once
    return [note.atoms for note in made]


def _own_sizes(module: nn.Module) -> set[str]:
    """Return the names that surgery sets for layers it knows."""
    names = {name for axis in ("out", "in") for name in shrink_sizes(module, axis, 0)}
    return names | ({"groups", "num_groups"} if kind_of(module) else set())


def _numbers(module: nn.Module) -> Iterator[tuple[str, int | None, int]]:
    """Return each whole number above 1 among a module's attributes, also inside tuples and lists."""
    for name, value in vars(module).items():
        if _PLACES.search(name):
            continue
        if _is_size(value):
            yield name, None, value
        elif isinstance(value, (tuple, list)):
            for item, part in enumerate(value):
                if _is_size(part):
                    yield name, item, part


_PLACES = re.compile(
    r"img|image|input_size|patch|grid|window|kernel|stride|pad|dilat|resolution|feat_size|pool|shift|seq|length"
)
"""Names of numbers that count places, not channels, though they may equal a width."""


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 1
