"""What became of masks in a speed-up, to be read by a person or a program: what left, what stayed, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nni_plugin.pruners.dead_channels import Verdict


@dataclass(frozen=True)
class SpeedupReport:
    """What became of the masks.

    Args:
        groups: A verdict for each coupled group that a mask asks channels of.
        max_abs: Largest absolute difference between outputs of the masked and of the compact network, on the dummy
            input and on its values in another order.
        max_rel: The same over the largest absolute output of the masked network.
        inexact: By path of a layer, why it does not give exactly what it gave under the masks.
        zeros_left: Masked weights that are still in the network, as zeros.
        blocks: Blocks and branches that added nothing and have left whole; masks inside are no group's any more.
        blocks_left: Why others that add nothing are still there, by name; their channels count among the groups.

    Names are those of the network before.
    """

    groups: tuple[Verdict, ...]
    max_abs: float
    max_rel: float
    inexact: Mapping[str, str]
    zeros_left: int
    blocks: tuple[str, ...] = ()
    blocks_left: Mapping[str, str] = field(default_factory=dict)

    @property
    def left(self) -> tuple[Verdict, ...]:
        """The groups that keep channels which some mask asks to remove."""
        return tuple(verdict for verdict in self.groups if verdict.removed < verdict.asked)

    def __str__(self) -> str:
        """Return a few lines for a person to read."""
        asked, removed = (sum(getattr(v, name) for v in self.groups) for name in ("asked", "removed"))
        lines = [
            f"{removed} of {asked} masked coupled channels removed; {self.zeros_left} masked weights stay as zeros"
        ]
        if self.blocks:
            lines.insert(0, f"{len(self.blocks)} masked blocks removed whole: {', '.join(map(repr, self.blocks))}")
        lines += [f"block {name!r} adds nothing but stays: {why}" for name, why in self.blocks_left.items()]
        lines += [f"{v.name!r}: {v.removed} of {v.asked} removed; {v.reason}" for v in self.left]
        lines.append(f"masked against compact: {self.max_abs:.3g} absolute, {self.max_rel:.3g} relative")
        for why in dict.fromkeys(self.inexact.values()):
            first, *more = [path for path, reason in self.inexact.items() if reason == why]
            lines.append(f"{first!r}{f' and {len(more)} more' if more else ''}: {why}")
        return "\n".join(lines)
