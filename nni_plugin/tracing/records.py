"""What a trace takes down beside the steps: values, sizes, calls."""

from __future__ import annotations

from dataclasses import dataclass, field

from nni_plugin.flow import Step
from nni_plugin.tracing.labels import NONE, Labels
from nni_plugin.tracing.ledger import Atoms


@dataclass(frozen=True, eq=False)
class Value:
    """What is known of a tensor.

    Args:
        labels: Channels over its dimensions.
        step: What computed it; None for constants, and for weights on their way to a layer.
        owner: The layer whose weights it was computed from, as long as nothing else is in it.
    """

    labels: Labels = NONE
    step: Step | None = None
    owner: str | None = None


@dataclass(frozen=True, eq=False)
class SizeNote:
    """A size given as a number to an operator, of a dimension that holds channels.

    Args:
        module: The innermost module that was running.
        atoms: The atoms counted by the number.
        passed_on: The dimension had this size before: the number may as well have been read off the tensor.
    """

    module: str
    atoms: Atoms
    passed_on: bool = False


@dataclass(frozen=True, eq=False)
class Boundary:
    """Where channels enter or leave a module's call.

    Args:
        dim: Dimension of the tensor.
        atoms: One a position.
    """

    dim: int
    atoms: Atoms


@dataclass(eq=False)
class Call:
    """One call of a module: its first tensor in, its first tensor out."""

    entering: list[Boundary]
    leaving: list[Boundary] = field(default_factory=list)
