"""Take blocks out of a network so that they leave no trace, and put them back on demand.

Where a block lies in an `nn.Sequential` or an `nn.ModuleList` the container gets shorter and those behind it move up:
the network is then the one that its own class would build with fewer blocks, and its state dict has that one's names.
That needs a forward function which goes through the container and does not count: a Sequential that is called does;
of anything else (also of a module that goes through its own children, as timm's RegNet stages do) it is tried out,
shortened against holding identities, on drawn weights. Where it differs, and where a block is an attribute called by
name, an identity stays in its place; at the end of a branch zeros do. timm's `feature_info` follows. Stochastic depth
is an attribute of each block: those that stay keep their rates.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugin.cost import call, tensors_in
from nni_plugin.errors import PlanError
from nni_plugin.layers.blocks import Block, BlockMap, find_blocks
from nni_plugin.layers.features import features_without
from nni_plugin.layers.identity import FORWARD_ERRORS, giving, giving_zero, replaced, stand_in
from nni_plugin.layers.shells import put_shells
from nni_plugin.layers.trace import CallRecord, main_tensor
from nni_plugin.layers.units import is_sequential
from nni_plugin.renumbering import Renumbering
from nni_plugin.tensors import NORMS


@dataclass(frozen=True)
class Removal:
    """How some blocks leave a network, by names, so that it can be done to every copy of it.

    Args:
        blocks: The blocks, none inside another one.
        shells: Names of those that leave an identity or zeros in their place.
        records: What each module did in a forward pass of the whole network.
    """

    blocks: tuple[Block, ...]
    shells: tuple[str, ...]
    records: Mapping[str, CallRecord]

    @property
    def names(self) -> Renumbering:
        """The way between the names before and after."""
        return Renumbering([block.name for block in self.blocks], self.shells)

    def holds(self, path: str) -> bool:
        """Tell whether a module or tensor leaves."""
        return any(block.holds(path) for block in self.blocks)

    def perform(self, model: nn.Module) -> Callable[[], None]:
        """Take the blocks out of a network, in place, without running it; returns what puts them back."""
        with ExitStack() as stack:
            features = features_without(model, self.blocks, self.shells)
            branches = [block for block in self.blocks if block.kind == "branch"]
            skips = [block.name for block in self.blocks if block.name in self.shells and block.kind != "branch"]
            skips += [member for block in branches for member in block.members[:-1]]
            ends = {block.members[-1]: self.records[block.members[-1]].extra for block in branches}
            leaving = [path for block in self.blocks if block.name not in self.shells for path in block.members]
            containers: dict[str, set[str]] = {}
            for path in leaving:
                above, _, key = path.rpartition(".")
                containers.setdefault(above, set()).add(key)
            # By now nobody has moved up: all names are those of the whole network.
            modules = {path: (model.get_submodule(path), model.get_submodule(_above(path))) for path in containers}
            stack.callback(put_shells(model, skips, ends))
            for path, (container, parent) in modules.items():
                stack.callback(_shorten(container, parent, containers[path]))
            stack.callback(features())
            return stack.pop_all().close

    def only(self, names: Iterable[str]) -> Removal:
        """Return how some of the blocks leave; how their containers shrink was found out for all of them together."""
        wanted = set(names)
        blocks = tuple(block for block in self.blocks if block.name in wanted)
        return Removal(blocks, tuple(name for name in self.shells if name in wanted), self.records)

    @contextmanager
    def held(self, model: nn.Module) -> Iterator[None]:
        """Let the blocks of a whole network do nothing for a while: their layers give zero, a unit gives its input."""
        with ExitStack() as stack:
            for block in self.blocks:
                first, last = (model.get_submodule(block.members[i]) for i in (0, -1))
                if block.kind == "block":
                    stack.enter_context(giving_zero(block.name, first, self.records))
                elif block.kind == "branch":
                    stack.enter_context(giving(last, _zeroed))
                else:
                    stack.enter_context(_bypassed(first, last))
            yield


def find_removal(model: nn.Module, names: Iterable[str], example_inputs: Any) -> Removal:
    """Find out how blocks can leave a network.

    Args:
        model: The network; left as it was.
        names: Names of the blocks, as :func:`~nni_plugin.layers.removable_blocks` gives them.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs.

    Returns:
        What to do with it and every copy of it.

    Raises:
        PlanError: A block is unknown, must stay, is named twice or lies inside another one.
    """
    names, found = list(names), find_blocks(model, example_inputs)
    blocks = tuple(_chosen(name, names, found) for name in names)
    _check_apart(blocks)
    branches = {block.name for block in blocks if block.kind == "branch"}
    sure: list[Block] = []
    unsure: list[Block] = []
    for block in blocks:
        path = block.members[0].rpartition(".")[0]
        container = model.get_submodule(path)
        if block.name in branches or not _may_shrink(container):
            continue
        called = is_sequential(container) and found.records[path].count > 0
        (sure if called else unsure).append(block)
    if unsure:
        sure += _those_that_shrink(model, example_inputs, unsure, found.records)
    shells = tuple(block.name for block in blocks if block not in sure)
    return Removal(blocks, shells, found.records)


def _chosen(name: str, names: list[str], found: BlockMap) -> Block:
    matches = [block for block in found.blocks if block.name == name]
    if matches and names.count(name) > 1:
        raise PlanError(f"Block {name!r} is to be removed twice; name it once. The model is unchanged.")
    free = [block for block in matches if block.fixed is None]
    if free:
        return free[0]
    if matches:
        raise PlanError(f"Block {name!r} must stay: {matches[0].fixed}. The model is unchanged.")
    offered = [block.name for block in found.blocks if block.fixed is None]
    some = f"the removable blocks are {', '.join(offered[:8])}{', ...' if len(offered) > 8 else ''}"
    raise PlanError(
        f"{name!r} is none of the network's removable blocks: {some if offered else 'it has none'}. The model is "
        "unchanged."
    )


def _check_apart(blocks: Iterable[Block]) -> None:
    blocks = list(blocks)
    for inner in blocks:
        for outer in blocks:
            if inner is not outer and any(outer.holds(member) for member in inner.members):
                raise PlanError(
                    f"Block {inner.name!r} lies inside {outer.name!r}, which is removed too; name the outer one alone. "
                    "The model is unchanged."
                )


def _may_shrink(module: nn.Module) -> bool:
    """Tell whether the names of a module's children allow it: 0, 1, 2, ... in a container, or no numbers at all."""
    keys = list(module._modules)
    numbered = isinstance(module, (nn.Sequential, nn.ModuleList)) and keys == [str(i) for i in range(len(keys))]
    return numbered or not any(key.isdecimal() for key in keys)


def _those_that_shrink(
    model: nn.Module, example_inputs: Any, blocks: list[Block], records: Mapping[str, CallRecord]
) -> list[Block]:
    """Return the blocks without which their container gives what it gives with identities in their places."""
    network, inputs = stand_in(model, example_inputs)
    containers = {block.name.rpartition(".")[0] for block in blocks}

    def shrinks(some: set[str]) -> bool:
        here = [block for block in blocks if block.name.rpartition(".")[0] in some]
        kept, shortened = copy.deepcopy(network), copy.deepcopy(network)
        Removal(tuple(here), tuple(block.name for block in here), records).perform(kept)
        Removal(tuple(here), (), records).perform(shortened)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            expected = tensors_in(call(kept, inputs))
            try:
                got = tensors_in(call(shortened, inputs))
                call(_in_training(shortened), inputs)  # which may go another way
            except FORWARD_ERRORS:
                return False
        return len(expected) == len(got) and all(map(torch.equal, expected, got))

    good = containers if shrinks(containers) else {path for path in containers if shrinks({path})}
    return [block for block in blocks if block.name.rpartition(".")[0] in good]


def _in_training(network: nn.Module) -> nn.Module:
    """Put a network into training mode but for its norms, which refuse a batch of one sample."""
    network.train()
    for module in network.modules():
        if isinstance(module, NORMS):
            module.eval()
    return network


def _above(path: str) -> str:
    return path.rpartition(".")[0]


def _shorten(container: nn.Module, parent: nn.Module, keys: set[str]) -> Callable[[], None]:
    """Delete children of a container; numbered ones move up, and a `depth` that counts them follows (Swin's stages)."""
    modules = container._modules
    old, depth = dict(modules), getattr(parent, "depth", None)
    counted = type(depth) is int and depth == len(old)
    rest = {key: child for key, child in old.items() if key not in keys}
    if all(key.isdecimal() for key in old):
        rest = {str(i): child for i, child in enumerate(rest.values())}
    modules.clear()
    modules.update(rest)
    if counted:
        parent.depth = len(rest)  # type: ignore[assignment]

    def undo() -> None:
        modules.clear()
        modules.update(old)
        if counted:
            parent.depth = depth  # type: ignore[assignment]

    return undo


def _zeroed(output: Any) -> Any:
    tensor = main_tensor(output)
    assert tensor is not None
    return replaced(output, torch.zeros_like(tensor))


@contextmanager
def _bypassed(first: nn.Module, last: nn.Module) -> Iterator[None]:
    """Let the last of a run of modules give what the first one got."""
    got: list[Tensor] = []
    handle = first.register_forward_pre_hook(lambda _, inputs: got.append(inputs[0].clone()))
    try:
        with giving(last, lambda _: got.pop()):
            yield
    finally:
        handle.remove()
