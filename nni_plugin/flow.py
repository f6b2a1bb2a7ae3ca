"""The run of a network as steps, and on whose output a channel's gate lies: found by walking them.

Read by every finder of channel groups: our own trace, and the form in which Torch-Pruning hands a group over.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Step:
    """One operator of the run, one bare parameter, or one input of the network.

    Args:
        name: Of the operator, for messages.
        module: The innermost module that was running.
        layer: The layer whose parameters it used, or the bare parameter that it is; None for neither.
        kind: As `nni_plugin.tensors.kind_of` says of that layer; `"parameter"`; `""`.
        inputs: The steps it reads.
        outputs: The steps that read it.
        reads: Atoms of its inputs.
        writes: Atoms of its output.
    """

    name: str
    module: str
    layer: str | None = None
    kind: str = ""
    inputs: list[Step] = field(default_factory=list)
    outputs: list[Step] = field(default_factory=list)
    reads: list[Any] = field(default_factory=list)
    writes: list[Any] = field(default_factory=list)

    @property
    def is_product(self) -> bool:
        """Whether it multiplies element by element."""
        return self.name in ("aten.mul", "aten.mul_")


def gate_writers(inside: set[Step], outputs: Iterable[Step]) -> tuple[set[Step], set[Step], bool]:
    """Find the writers of a group of channels.

    Args:
        inside: Every step that reads or writes the group's channels.
        outputs: Those of them that are layers or bare parameters and whose output holds the channels.

    Returns:
        The steps on whose output the gate lies, those that only scale it, and whether the group is forked.
    """
    layers = list(outputs)
    carriers = {step for step in layers if step.kind in ("norm", "depthwise")}
    candidates = [step for step in layers if step.kind != "prelu"]
    reached = {step: _reached(step, inside) for step in candidates}
    writers = {step for step in candidates if not reached[step] or not reached[step] <= carriers}
    beside: set[Step] = set()
    for product in inside:
        if product.is_product:
            sides = [side & writers for side in (_producers(step, inside) for step in product.inputs)]
            sides = [side for i, side in enumerate(sides) if side and side not in sides[:i]]
            if len(sides) > 1:
                beside |= set().union(*sides) - _main_side(sides)
    writers -= beside
    # What only reaches such a factor is part of it: the layer before a normalisation that ends the branch.
    while part := {s for s in candidates if s not in writers | beside and reached[s] and reached[s] <= beside}:
        beside |= part
    return writers, beside, any(reached[step] & carriers for step in writers)


def _walkable(step: Step) -> bool:
    return step.layer is None or step.kind == "prelu"


def _reached(step: Step, inside: set[Step]) -> set[Step]:
    """Return the layers (and the network's ends) that a step's output reaches through operators alone."""
    found: set[Step] = set()
    stack, seen = list(step.outputs), set()
    while stack:
        current = stack.pop()
        if current in seen or current not in inside:
            continue
        seen.add(current)
        if _walkable(current) and current.outputs:
            stack += current.outputs
        else:
            found.add(current)
    return found


def _producers(step: Step, inside: set[Step]) -> set[Step]:
    """Return the layers whose output reaches a step through operators alone."""
    found: set[Step] = set()
    stack, seen = [step], set()
    while stack:
        current = stack.pop()
        if current in seen or current not in inside:
            continue
        seen.add(current)
        if _walkable(current):
            stack += current.inputs
        else:
            found.add(current)
    return found


def _main_side(sides: list[set[Step]]) -> set[Step]:
    """Choose the factor of a product that carries the gate: computed first, and not a bare parameter."""
    sides = sorted(sides, key=lambda side: any(step.kind == "parameter" for step in side))
    main = sides[0]
    for side in sides[1:]:
        if _leads_to(side, main):
            main = side
    return main


def _leads_to(sources: set[Step], targets: set[Step]) -> bool:
    """Tell whether a target is computed from a source."""
    stack: list[Step] = list(targets)
    seen: set[Step] = set()
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current in sources:
            return True
        stack += current.inputs
    return False
