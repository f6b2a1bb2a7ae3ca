"""Which blocks of a network can leave it: found by structure and shapes, not by the names of classes.

Three kinds can become the identity (LayerPrune, Elkerdawy et al., ACCV 2020, removes the first and the last):

- `"block"`: a residual block. With all its layers at zero it gives its input back.
- `"branch"`: one of several residual branches of such a block (the attention of a transformer block). Without it the
  block adds the others alone.
- `"unit"`: convolution, normalisation and activation of equal width and resolution in a plain `nn.Sequential`.

A module that is nothing but a chain of blocks (a stage) is not offered, its blocks are. What stays carries the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nni_plugin.cost import call
from nni_plugin.layers.branches import branches_of, main_member
from nni_plugin.layers.identity import giving_zero, is_identity, stand_in
from nni_plugin.layers.trace import CallRecord, is_layer, trace
from nni_plugin.layers.units import in_plain_network, is_sequential, units_of
from nni_plugin.tensors import kind_of

Kind = Literal["block", "branch", "unit"]


@dataclass(frozen=True)
class Block:
    """Something that can leave a network whole.

    Args:
        name: Qualified name; of a branch that of its largest module, of a run of modules `"features.3:features.5"`.
        kind: `"block"`, `"branch"` or `"unit"`.
        members: Qualified names of the modules that leave, in forward order; the last one's output is the block's.
        shape: Shape of its output for one sample, equal to its input's.
        fixed: Why it must stay; None when it can be removed.
    """

    name: str
    kind: Kind
    members: tuple[str, ...]
    shape: tuple[int, ...]
    fixed: str | None = None

    def holds(self, path: str) -> bool:
        """Tell whether a module or tensor lies in this block."""
        return any(path == member or path.startswith(f"{member}.") for member in self.members)


@dataclass(frozen=True)
class BlockMap:
    """What was found in a network, by names, so that it holds for every copy of it.

    Args:
        blocks: The blocks in forward order, with those that must stay.
        records: What each module did in the forward pass.
    """

    blocks: tuple[Block, ...]
    records: Mapping[str, CallRecord]


def removable_blocks(model: nn.Module, example_inputs: Any) -> list[Block]:
    """Find every block that can be removed from a network, in forward order.

    Args:
        model: The network, dense or pruned; left as it was.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs; only their shapes (and integers) count.

    Returns:
        The blocks; empty where there is none. :func:`find_blocks` also tells what must stay, and why.

    Example:
        >>> from nni_plugin.networks import resnet20
        >>> [block.name for block in removable_blocks(resnet20(), torch.zeros(1, 3, 32, 32))]
        ['layer1.0', 'layer1.1', 'layer1.2', 'layer2.1', 'layer2.2', 'layer3.1', 'layer3.2']
    """
    return [block for block in find_blocks(model, example_inputs).blocks if block.fixed is None]


def find_blocks(model: nn.Module, example_inputs: Any) -> BlockMap:
    """Find the blocks of a network, also those that must stay, with the reason; see :func:`removable_blocks`."""
    with torch.inference_mode(False):  # whose tensors have no versions
        network, inputs = stand_in(model, example_inputs)
        records = trace(network, inputs)
        search = _Search(network, records)
        with torch.no_grad(), search.watching():
            call(network, inputs)
    shared, hooked = _shared(model), _hooked(model)
    blocks = []
    for block in (*search.found, *_others(network, records, search)):
        reason = block.fixed or _reason_to_stay(block, records, shared, hooked)
        blocks.append(Block(block.name, block.kind, block.members, block.shape, reason))
    blocks.sort(key=lambda block: (records[block.members[0]].order, len(block.members)))
    return BlockMap(tuple(blocks), records)


class _Search:
    """Tries modules on their real inputs while the stand-in runs, the inner ones before those around them."""

    def __init__(self, network: nn.Module, records: Mapping[str, CallRecord]) -> None:
        self.network = network
        self.records = records
        self.found: list[Block] = []
        self.residual: set[str] = set()
        self.chains: set[str] = set()
        self._inputs: dict[str, Tensor] = {}
        self._trying = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Try each module that may be a block right after its call."""
        with ExitStack() as stack:
            for name, module in self.network.named_modules():
                if self.records[name].count == 1 and (self._may_be_residual(name, module) or is_sequential(module)):
                    before = module.register_forward_pre_hook(self._before(name), with_kwargs=True)
                    after = module.register_forward_hook(self._after(name), with_kwargs=True)
                    stack.callback(before.remove)
                    stack.callback(after.remove)
            yield

    def _may_be_residual(self, name: str, module: nn.Module) -> bool:
        record = self.records[name]
        parametrised = next(module.parameters(), None) is not None
        return bool(name) and record.keeps_shape and record.extra is None and parametrised and kind_of(module) == ""

    def _before(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], __: dict[str, Any]) -> None:
            if not self._trying and args and isinstance(args[0], Tensor):
                self._inputs[name] = args[0].clone()

        return hook

    def _after(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
            if self._trying or name not in self._inputs:
                return
            self._trying = True
            value = self._inputs.pop(name)
            if self._may_be_residual(name, module):
                self._try_residual(name, module, value, args[1:], kwargs)
            if is_sequential(module) and name not in self.chains:
                self._try_units(name, value)
            self._trying = False

        return hook

    def _try_residual(
        self, name: str, module: nn.Module, value: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        def run(x: Tensor) -> Any:
            return module(x, *rest, **kwargs)

        def without_layers(x: Tensor) -> Any:
            with giving_zero(name, module, self.records):
                return run(x)

        def without_blocks(x: Tensor) -> Any:
            with ExitStack() as stack:
                for inner in inside:
                    stack.enter_context(giving_zero(inner, self.network.get_submodule(inner), self.records))
                return run(x)

        if not is_identity(without_layers, value):
            return
        inside = [inner for inner in self.residual if inner.startswith(f"{name}.")]
        if inside and is_identity(without_blocks, value):
            self.chains.add(name)
            return
        if not _depends_on_input(run, value):
            return
        self.residual.add(name)
        shape = tuple(value.shape[1:])
        self.found.append(Block(name, "block", (name,), shape))
        for members in branches_of(name, module, run, value, self.records):
            out = self.records[members[-1]].out
            branch = main_member(self.network, members)
            self.found.append(Block(branch, "branch", members, () if out is None else out[1:]))

    def _try_units(self, name: str, value: Tensor) -> None:
        if not in_plain_network(name, self.network) or any(name.startswith(f"{b}.") for b in self.residual):
            return
        for members, reason in units_of(name, self.network, value, self.records):
            if any(other == path or other.startswith(f"{path}.") for other in self.residual for path in members):
                continue
            shape = self.records[members[-1]].out
            run = members[0] if len(members) == 1 else f"{members[0]}:{members[-1]}"
            whole = self._whole(name, members)
            block = Block(run, "unit", members, () if shape is None else shape[1:], reason)
            self.found.append(block if whole is None else Block(whole, "unit", (whole,), block.shape, reason))

    def _whole(self, name: str, members: tuple[str, ...]) -> str | None:
        """Return the outermost Sequential inside another one that holds these modules and no others."""
        whole = None
        while name and len(list(self.network.get_submodule(name).children())) == len(members):
            parent = name.rpartition(".")[0]
            if not is_sequential(self.network.get_submodule(parent)) or self.records[name].count != 1:
                break
            whole, members, name = name, (name,), parent
        return whole


def _depends_on_input(run: Any, value: Tensor) -> bool:
    """Tell whether what a module adds depends on its input: an embedding of positions does not."""
    other = torch.rand(value.shape, generator=torch.Generator().manual_seed(0)).to(value)
    first, second = (run(x.clone()) - x for x in (value, other))
    return not torch.allclose(first, second, rtol=1e-3)


def _reason_to_stay(block: Block, records: Mapping[str, CallRecord], shared: set[str], hooked: set[str]) -> str | None:
    for member in block.members:
        if records[member].count != 1:
            return f"{member!r} is called {records[member].count} times"
    inside = [name for name in records if block.holds(name)]
    for name in inside:
        if name in shared:
            return f"{name!r} is also used under another name"
        if name in hooked:
            return f"a forward hook reads the output of {name!r}"
    end = records[block.members[-1]]
    if len(end.readers) > 1:
        return f"its output is read in {len(end.readers)} places"
    if block.kind == "unit" and end.ends:
        return "its output is the network's"
    if block.kind == "branch" and end.out != end.shape:
        return f"its last module {block.members[-1]!r} changes the shape"
    return None


def _shared(model: nn.Module) -> set[str]:
    """Return the first names of modules that have several."""
    first: dict[nn.Module, str] = {}
    shared = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if first.setdefault(module, name) != name:
            shared.add(first[module])
    return shared


def _hooked(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if module._forward_hooks}


def _others(network: nn.Module, records: Mapping[str, CallRecord], search: _Search) -> Iterator[Block]:
    """Yield the other composed children of containers that are called, with the reason why they must stay."""
    known = [member for block in search.found for member in block.members]
    for parent, container in network.named_modules():
        if not isinstance(container, (nn.Sequential, nn.ModuleList)):
            continue
        for key, child in container.named_children():
            name = f"{parent}.{key}" if parent else key
            record = records.get(name)
            around = any(path == name or path.startswith(f"{name}.") for path in known) or name in search.chains
            inside = any(name.startswith(f"{path}.") for path in known)
            if record is None or not record.count or around or inside or is_layer(child):
                continue
            if isinstance(child, (nn.Sequential, nn.ModuleList)) or next(child.parameters(), None) is None:
                continue
            known.append(name)
            yield Block(name, "block", (name,), () if record.out is None else record.out[1:], _why_not(record))


def _why_not(record: CallRecord) -> str:
    if record.count > 1:
        return f"it is called {record.count} times"
    if record.shape is None or record.out is None or record.extra is not None:
        return "it does not take and give one tensor"
    if not record.keeps_shape:
        return f"it changes the shape of a sample from {list(record.shape[1:])} to {list(record.out[1:])}"
    return "it does not give its input when its layers give zero (a shortcut with weights, or none)"
