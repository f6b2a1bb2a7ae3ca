"""The residual branches inside one block, and which modules work for one of them alone.

A module ends a branch when what it gives is added to the stream: whatever is put there comes through although every
other layer of the block gives zero. With the branch's end held at zero, the layers that no gradient reaches any more
have worked for it alone; they leave with it. (The norm before the attention of a transformer block is such a layer.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from nni_plugin.layers.identity import FORWARD_ERRORS, giving, giving_zero, replaced
from nni_plugin.layers.shells import put_shells
from nni_plugin.layers.trace import CallRecord, main_tensor


def branches_of(
    name: str,
    block: nn.Module,
    run: Callable[[Tensor], Tensor],
    value: Tensor,
    records: Mapping[str, CallRecord],
) -> list[tuple[str, ...]]:
    """Return the members of each branch of a residual block in the order of their calls, the end of the branch last.

    Args:
        name: Qualified name of the block.
        block: The block, of a stand-in.
        run: Calls it on another input, its other arguments as they were.
        value: Its input.
        records: The trace of the stand-in.

    Returns:
        Qualified names; empty where the block has one branch only, which leaves with the block, or none that can leave.
    """
    names = {inner: f"{name}.{inner}" for inner, _ in block.named_modules() if inner}
    ends = _ends(name, block, run, value, names, records)
    if len(ends) < 2:
        return []
    unused = _unreached(block, run, value, None)
    alone = {end: _unreached(block, run, value, block.get_submodule(end)) for end in ends}
    ends = [end for end in ends if not any(_before(block, end, alone[other]) for other in ends if other != end)]
    if len(ends) < 2:
        return []
    called = {inner for inner, full in names.items() if records[full].count == 1}
    result = []
    for end in ends:
        members = _maximal(block, alone[end], unused, called)
        members.sort(key=lambda inner: records[names[inner]].order)
        if members and members[-1] == end and _leaves(block, run, value, members, records[names[end]]):
            result.append(tuple(names[inner] for inner in members))
    return result


def main_member(model: nn.Module, members: tuple[str, ...]) -> str:
    """Return the member with the most parameters, by which a branch is called."""
    return max(members, key=lambda name: sum(p.numel() for p in model.get_submodule(name).parameters()))


def _ends(
    name: str,
    block: nn.Module,
    run: Callable[[Tensor], Tensor],
    value: Tensor,
    names: Mapping[str, str],
    records: Mapping[str, CallRecord],
) -> list[str]:
    """Return the outermost modules with parameters whose output is added to the stream."""
    ends: list[str] = []
    for inner, module in block.named_modules():
        known = any(inner.startswith(f"{end}.") for end in ends)
        record = records[names[inner]] if inner else None
        if record is None or known or record.count != 1 or record.out is None:
            continue
        if next(module.parameters(), None) is not None and _comes_through(name, block, module, run, value, records):
            ends.append(inner)
    return ends


def _comes_through(
    name: str,
    block: nn.Module,
    module: nn.Module,
    run: Callable[[Tensor], Tensor],
    value: Tensor,
    records: Mapping[str, CallRecord],
) -> bool:
    """Tell whether what a module gives reaches the block's output although all other layers give zero."""
    generator = torch.Generator().manual_seed(0)

    def drawn(output: object) -> object:
        tensor = main_tensor(output)
        assert tensor is not None
        return replaced(output, (torch.rand(tensor.shape, generator=generator) + 0.5).to(tensor))

    vectors = {p: p.detach().clone() for p in block.parameters() if p.numel() == max(p.shape, default=1)}
    with giving_zero(name, block, records):
        # Without it the stream must come out: a module that the stream itself runs through is no branch.
        with giving(module, _zero):
            if not torch.equal(run(value.clone()), value):
                return False
        # Bare vectors (a layer scale) as they are: at zero nothing would come through.
        for parameter, data in vectors.items():
            parameter.data.copy_(data)
        with giving(module, _zero):
            without = run(value.clone())
        with giving(module, drawn):
            return not torch.equal(run(value.clone()), without)


def _zero(output: object) -> object:
    tensor = main_tensor(output)
    assert tensor is not None
    return replaced(output, torch.zeros_like(tensor, requires_grad=False))


def _unreached(
    block: nn.Module, run: Callable[[Tensor], Tensor], value: Tensor, end: nn.Module | None
) -> set[nn.Parameter]:
    """Return the parameters that the block's output does not depend on, with a module's output held at zero."""
    parameters = [parameter for parameter in block.parameters() if parameter.requires_grad]
    handle = None if end is None else end.register_forward_hook(lambda _, __, output: _zero(output))
    try:
        with torch.enable_grad():
            output = run(value.clone())
            if not output.requires_grad:
                return set(parameters)
            gradients = torch.autograd.grad(output.sum(), parameters, allow_unused=True)
    finally:
        if handle is not None:
            handle.remove()
    return {parameter for parameter, gradient in zip(parameters, gradients, strict=True) if gradient is None}


def _before(block: nn.Module, end: str, alone: set[nn.Parameter]) -> bool:
    """Tell whether an end works for a later one alone: it is a part of the same branch."""
    return alone.issuperset(block.get_submodule(end).parameters())


def _maximal(block: nn.Module, alone: set[nn.Parameter], unused: set[nn.Parameter], called: set[str]) -> list[str]:
    """Return the outermost called modules with all their parameters among these, and some of them used."""
    found: list[str] = []
    for inner, module in block.named_modules():
        parameters = set(module.parameters())
        inside = any(inner.startswith(f"{other}.") for other in found)
        if inner in called and not inside and parameters - unused and alone.issuperset(parameters):
            found.append(inner)
    return found


def _leaves(
    block: nn.Module, run: Callable[[Tensor], Tensor], value: Tensor, members: list[str], end: CallRecord
) -> bool:
    """Tell whether the block without the branch gives what it gives with the branch's end held at zero."""
    with giving(block.get_submodule(members[-1]), _zero):
        expected = run(value.clone())
    undo = put_shells(block, members[:-1], {members[-1]: end.extra})
    try:
        return torch.equal(run(value.clone()), expected)
    except FORWARD_ERRORS:
        return False
    finally:
        undo()
