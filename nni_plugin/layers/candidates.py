"""Which of a network's blocks may leave together, in which order, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from nni_plugin.errors import GraphError, PlanError
from nni_plugin.layers.base import removal_order
from nni_plugin.layers.blocks import Block, find_blocks
from nni_plugin.layers.removal import Removal, find_removal
from nni_plugin.renumbering import ends_of

Candidates = Literal["outermost", "innermost", "all"]


def candidate_blocks(
    model: nn.Module, example_inputs: Any, candidates: Candidates = "outermost", keep: Iterable[str] = ()
) -> list[Block]:
    """Return the blocks that may leave, in forward order.

    Args:
        model: The network.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs.
        candidates: Of blocks inside blocks the `"outermost"`, the `"innermost"`, or `"all"`.
        keep: Names of blocks or modules that must stay; the blocks around and inside them stay too.

    Raises:
        GraphError: There is none; the text says why some must stay.
        PlanError: `candidates` is unknown, or `keep` names nothing in the network.
    """
    if candidates not in ("outermost", "innermost", "all"):
        raise PlanError(f"candidates must be 'outermost', 'innermost' or 'all', got {candidates!r}.")
    keep = (keep,) if isinstance(keep, str) else tuple(keep)
    found = find_blocks(model, example_inputs).blocks
    known = {name for name, _ in model.named_modules()} | {block.name for block in found}
    for name in keep:
        if name not in known:
            raise PlanError(
                f"keep: {name!r} is no block or module of {type(model).__name__}; its blocks are "
                f"{', '.join(block.name for block in found)}."
            )
    free = [block for block in found if block.fixed is None]
    there_are = len(free)
    free = [block for block in free if not any(overlap(block.name, name) for name in keep)]
    if candidates == "outermost":
        free = [block for block in free if not any(inside(block, other) for other in free)]
    elif candidates == "innermost":
        free = [block for block in free if not any(inside(other, block) for other in free)]
    if not free and there_are:
        raise GraphError(f"All {there_are} removable blocks of {type(model).__name__} are to be kept; keep fewer.")
    if not free:
        why = "; ".join(f"{block.name}: {block.fixed}" for block in found[:3] if block.fixed)
        raise GraphError(
            f"{type(model).__name__} has no block that can be removed whole: there must be residual blocks with an "
            f"identity shortcut, or plain layers of equal width. {why}"
        )
    return free


def possible_removal(
    model: nn.Module, blocks: Sequence[Block], example_inputs: Any
) -> Callable[[Iterable[str]], Removal]:
    """Find out once how blocks can leave a network; returns `removal(names)` for any of them, none inside another.

    A container that shrinks without all of them is taken to shrink without some: to count and to time, not to keep.
    """
    rest, found = list(blocks), []
    while rest:  # those inside others apart from these
        outer = [block for block in rest if not any(inside(block, other) for other in rest)]
        found.append(find_removal(model, [block.name for block in outer], example_inputs))
        rest = [block for block in rest if block not in outer]

    def removal(names: Iterable[str]) -> Removal:
        wanted = list(names)
        parts = [part.only(wanted) for part in found]
        shells = tuple(name for part in parts for name in part.shells)
        return Removal(tuple(block for part in parts for block in part.blocks), shells, found[0].records)

    return removal


def removal_sets(blocks: Sequence[Block], scores: Mapping[str, float]) -> list[tuple[str, ...]]:
    """Return the blocks that have left after 0, 1, 2, ... removals in the order of their scores.

    A block inside one that has left is passed over; one that leaves takes those inside along.
    """
    by_name = {block.name: block for block in blocks}
    sets: list[tuple[str, ...]] = [()]
    for name in removal_order(scores):
        block, gone = by_name[name], sets[-1]
        if not any(inside(block, by_name[other]) for other in gone):
            sets.append((*(other for other in gone if not inside(by_name[other], block)), name))
    return sets


def inside(block: Block, other: Block) -> bool:
    """Tell whether a block lies inside another one."""
    return block is not other and all(other.holds(member) for member in block.members)


def overlap(block: str, other: str) -> bool:
    """Tell whether two blocks or modules are the same or one lies inside the other, by their names."""
    pairs = [(a, b) for a in ends_of(block) for b in ends_of(other)]
    return any(a == b or a.startswith(f"{b}.") or b.startswith(f"{a}.") for a, b in pairs)
