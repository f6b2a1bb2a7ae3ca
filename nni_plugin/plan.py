"""The one noun between methods and hosts: what to keep of a network, as plain data.

Every method makes a :class:`PruningPlan`, every host applies one. A plan names each coupled channel
group by its root module, lists the channels kept in the numbering of the DENSE network, and can be read,
stored as JSON, compared and explained without the network at hand.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from nni_plugin.errors import PlanError
from nni_plugin.renumbering import Renumbering

if TYPE_CHECKING:
    from torch import nn

    from nni_plugin.cost import Cost

SCHEMA_VERSION = 1
_NAMED = 3
"""Layers that stay whole for one reason: so many are named when a plan is explained."""


@dataclass(frozen=True)
class ModelIdentity:
    """How to build the dense network again: the library, the name in it and the keyword arguments.

    Args:
        library: `"timm"`, `"torchvision"`, `"nni_plugin"` or `"custom"`.
        name: The model's name in that library.
        kwargs: JSON-serialisable arguments of its builder.
    """

    library: str
    name: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Freeze the arguments and refuse what JSON cannot hold."""
        for value in (self.library, self.name):
            if not isinstance(value, str) or not value:
                raise PlanError(f"A model identity needs a library and a name as text, got {value!r}.")
        try:
            copy = json.loads(json.dumps(dict(self.kwargs), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise PlanError(f"The arguments of {self.name!r} must be plain JSON values: {error}.") from error
        object.__setattr__(self, "kwargs", MappingProxyType(copy))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable dictionary."""
        return {"library": self.library, "name": self.name, "kwargs": dict(self.kwargs)}

    def __hash__(self) -> int:
        """Hash by content, like equality."""
        return hash(json.dumps(self.to_dict(), sort_keys=True))

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelIdentity:
        """An identity is immutable: a copy of a model shares it."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by value (a mapping proxy cannot be pickled)."""
        return ModelIdentity, (self.library, self.name, dict(self.kwargs))


@dataclass(frozen=True)
class GroupPlan:
    """What is kept of one coupled channel group.

    Args:
        name: Qualified name of the group's root module, e.g. `"layer1.0.conv1"`.
        total: Number of channels of the dense group.
        kept: Indices kept, ascending, each in `[0, total)`, at least one.
        factors: One finite factor per kept channel, folded into the group's writers when the plan is
            applied; None means 1 everywhere.
        score_range: Smallest and largest score of the group when it was selected, for `explain`.
    """

    name: str
    total: int
    kept: tuple[int, ...]
    factors: tuple[float, ...] | None = None
    score_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        """Check that the kept channels exist, are sorted and are not empty."""
        try:
            kept = tuple(operator.index(i) for i in self.kept)
        except TypeError as error:
            raise PlanError(f"Group {self.name!r}: kept channels must be integers, got {self.kept!r}.") from error
        object.__setattr__(self, "kept", kept)
        if not kept:
            raise PlanError(f"Group {self.name!r} would lose all its {self.total} channels; keep at least one.")
        if any(b <= a for a, b in itertools.pairwise(kept)) or kept[0] < 0 or kept[-1] >= self.total:
            raise PlanError(
                f"Group {self.name!r}: kept channels must be ascending and within [0, {self.total}), got {kept}."
            )
        if self.factors is not None:
            factors = tuple(float(f) for f in self.factors)
            object.__setattr__(self, "factors", factors)
            if len(factors) != len(kept) or not all(math.isfinite(f) for f in factors):
                raise PlanError(
                    f"Group {self.name!r}: expected {len(kept)} finite factors, one per kept channel, "
                    f"got {len(factors)}."
                )

    @property
    def removed(self) -> tuple[int, ...]:
        """Indices removed, ascending."""
        kept = set(self.kept)
        return tuple(i for i in range(self.total) if i not in kept)


@dataclass(frozen=True)
class PruningPlan:
    """What to keep of a network: frozen, comparable, JSON-serialisable.

    Args:
        groups: One entry per prunable group, in the order of the network's modules, also where nothing
            is removed.
        removed_blocks: Names of whole blocks that become the identity, as `layers.removable_blocks` gives them.
        model: How to build the dense network again, if known.
        cost_before: MACs of one sample and number of parameters of the dense network.
        cost_after: The same of the pruned one, as counted on it.
        predicted_loss_change: The method's own prediction, in units of the loss.
        provenance: Method, seed, data, budget, versions: whatever tells where the plan comes from.
        shells: Those of the removed blocks in whose place an identity stays, as nothing can move up there. Applying a
            plan finds them: they stand in the plan that the pruned network carries, `model.pruning_plan`.

    All names are those of the dense network, also of channel groups behind a removed block. Where both are removed,
    the groups are those of the network without the blocks.
    """

    groups: tuple[GroupPlan, ...]
    removed_blocks: tuple[str, ...] = ()
    model: ModelIdentity | None = None
    cost_before: Cost | None = None
    cost_after: Cost | None = None
    predicted_loss_change: float | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict, hash=False)
    shells: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse two entries for one group or block."""
        object.__setattr__(self, "groups", tuple(self.groups))
        object.__setattr__(self, "removed_blocks", tuple(self.removed_blocks))
        object.__setattr__(self, "shells", tuple(self.shells))
        if len(set(self.removed_blocks)) != len(self.removed_blocks):
            twice = next(b for b in self.removed_blocks if self.removed_blocks.count(b) > 1)
            raise PlanError(f"Block {twice!r} is removed twice in one plan; name it once.")
        names = [group.name for group in self.groups]
        if len(set(names)) != len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise PlanError(f"Group {twice!r} stands twice in one plan; each group may have one entry.")

    @property
    def channels_removed(self) -> int:
        """Number of coupled channels removed."""
        return sum(group.total - len(group.kept) for group in self.groups)

    @property
    def channels_kept(self) -> int:
        """Number of coupled channels kept, over the prunable groups."""
        return sum(len(group.kept) for group in self.groups)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what applying the plan does: groups, factors and blocks, not their provenance."""
        content = [[g.name, g.total, g.kept, g.factors] for g in sorted(self.groups, key=lambda g: g.name)]
        text = json.dumps([content, sorted(self.removed_blocks)])
        return hashlib.sha256(text.encode()).hexdigest()

    def kept(self) -> dict[str, tuple[int, ...]]:
        """Return the kept channels of each group by name."""
        return {group.name: group.kept for group in self.groups}

    def apply(self, model: nn.Module, example_inputs: Any) -> nn.Module:
        """Remove the blocks and channels from `model`, in place.

        Args:
            model: The dense network the plan was made for (or another of the same architecture).
            example_inputs: One tensor `[N, C, H, W]`, or a tuple or dict of inputs, to trace it with.

        Returns:
            The same object, now smaller.

        Raises:
            PlanError: The plan does not fit this network; it is unchanged.
            SurgeryError: The network could not run afterwards; it has been put back as it was.
        """
        # The one import that points from the data to the surgery: `plan.apply(...)` is the public verb.
        from nni_plugin.adapters.torch_pruning import apply_plan

        return apply_plan(model, self, example_inputs)

    def then(self, later: PruningPlan) -> PruningPlan:
        """Compose with a plan made on the pruned network, into one plan on the dense network.

        Args:
            later: A plan whose groups have the widths that this one leaves; it may name further ones. Its names are
                those of the pruned network, where blocks may have moved up. Compose with `model.pruning_plan` if
                `shells` may matter.

        Returns:
            One plan that does both, in the names of the dense network; provenance and cost after are the later plan's.

        Raises:
            PlanError: The widths of the two plans do not meet.
        """
        dense = Renumbering(self.removed_blocks, self.shells)
        second = {dense.before(group.name): replace(group, name=dense.before(group.name)) for group in later.groups}
        names = {group.name for group in self.groups}
        groups = []
        for first in self.groups:
            if first.name not in second:
                groups.append(first)
                continue
            step = second[first.name]
            if step.total != len(first.kept):
                raise PlanError(
                    f"Group {first.name!r}: the first plan leaves {len(first.kept)} channels, "
                    f"the later one starts from {step.total}."
                )
            factors: tuple[float, ...] | None = None
            if first.factors is not None or step.factors is not None:
                before = first.factors or (1.0,) * step.total
                after = step.factors or (1.0,) * len(step.kept)
                factors = tuple(before[i] * f for i, f in zip(step.kept, after, strict=True))
            groups.append(
                GroupPlan(
                    first.name,
                    first.total,
                    tuple(first.kept[i] for i in step.kept),
                    factors,
                    step.score_range,
                )
            )
        groups += [group for name, group in second.items() if name not in names]
        blocks = [dense.block_before(block) for block in later.removed_blocks]
        # A branch that left first leaves once more with the block around it.
        earlier = [b for b in self.removed_blocks if not any(b.startswith(f"{around}.") for around in blocks)]
        shells = [*self.shells, *map(dense.block_before, later.shells)]
        return replace(
            later,
            groups=tuple(groups),
            removed_blocks=(*earlier, *blocks),
            shells=tuple(block for block in shells if block in earlier or block in blocks),
            model=self.model,
            cost_before=self.cost_before,
        )

    def leaves(self, layer: str) -> bool:
        """Tell whether a layer of the dense network is inside a block that is removed."""
        return _inside(layer, self.removed_blocks)

    def explain(self) -> str:
        """Return a table: layer, channels kept of total, score range, share of all channels removed.

        What leaves altogether, costs, by step the change of the loss predicted and measured, and what stays whole for
        which reason follow, where known.
        """
        cut = max(self.channels_removed, 1)
        rows = [("layer", "kept/total", "scores", "share of the cut")]
        for group in self.groups:
            low_high = group.score_range
            rows.append(
                (
                    group.name,
                    "with its block" if self.leaves(group.name) else f"{len(group.kept)}/{group.total}",
                    "" if low_high is None else f"{low_high[0]:.3g} .. {low_high[1]:.3g}",
                    f"{100 * (group.total - len(group.kept)) / cut:.1f} %",
                )
            )
        scored = self.provenance.get("blocks", ()) if self.removed_blocks else ()
        importance = {row["name"]: row["score"] for row in scored if row["removed"]}
        for block in self.removed_blocks:
            rows.append((block, "removed", f"{importance[block]:.3g}" if block in importance else "", ""))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        total = self.channels_removed + self.channels_kept
        blocks = len(self.removed_blocks)
        said = [f"{self.channels_removed} of {total} coupled channels"] * bool(total or not blocks)
        said += [f"{blocks} block{'s' * (blocks > 1)}"] * bool(blocks)
        lines.append(f"{' and '.join(said)} removed")
        if self.cost_before is not None and self.cost_after is not None:
            lines.append(f"{self.cost_before} -> {self.cost_after}")
        for number, step in enumerate(self.provenance.get("steps", ()), start=1):
            if (predicted := step.get("predicted_loss_change")) is not None:
                measured = f", measured {step['loss_change']:+.4g}" if "loss_change" in step else ""
                lines.append(f"step {number}: loss change predicted {predicted:+.4g}{measured}")
        reasons: dict[str, list[str]] = {}
        for name, reason in self.provenance.get("whole", {}).items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            lines.append(f"whole: {', '.join(names[:_NAMED])}{more}: {reason}")
        return "\n".join(line.rstrip() for line in lines)

    def to_json(self) -> str:
        """Return the plan as JSON text."""
        data: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "groups": [asdict(group) for group in self.groups],
            "removed_blocks": list(self.removed_blocks),
            "shells": list(self.shells),
            "model": None if self.model is None else self.model.to_dict(),
            "cost_before": None if self.cost_before is None else asdict(self.cost_before),
            "cost_after": None if self.cost_after is None else asdict(self.cost_after),
            "predicted_loss_change": self.predicted_loss_change,
            "provenance": dict(self.provenance),
        }
        return json.dumps(data, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """Read a plan written by :meth:`to_json`.

        Raises:
            PlanError: The text is not JSON, of another schema version, or misses a field.
        """
        from nni_plugin.cost import Cost

        try:
            data = json.loads(text, parse_constant=_finite, parse_float=_finite)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"Not a plan: the text is not JSON ({error}).") from error
        if not isinstance(data, dict) or data.get("schema_version") != SCHEMA_VERSION:
            got = data.get("schema_version") if isinstance(data, dict) else type(data).__name__
            raise PlanError(f"Not a plan this version reads: expected schema_version {SCHEMA_VERSION}, got {got!r}.")
        try:
            groups = tuple(_group_from(entry) for entry in _sequence(data["groups"]))
            identity, change = data.get("model"), data.get("predicted_loss_change")
            before, after = data.get("cost_before"), data.get("cost_after")
            return cls(
                groups=groups,
                removed_blocks=tuple(str(b) for b in _sequence(data["removed_blocks"])),
                model=None if identity is None else ModelIdentity(**identity),
                cost_before=None if before is None else Cost(**before),
                cost_after=None if after is None else Cost(**after),
                predicted_loss_change=None if change is None else _number(change),
                provenance=dict(data.get("provenance") or {}),
                shells=tuple(str(b) for b in _sequence(data.get("shells", []))),
            )
        except (KeyError, TypeError, ValueError, OverflowError, IndexError) as error:
            raise PlanError(f"Damaged plan: {type(error).__name__}: {error}.") from error


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected a number, got {value!r}")
    return float(value)


def _sequence(value: Any) -> Sequence[Any]:
    if not isinstance(value, list):
        raise TypeError(f"expected a list, got {type(value).__name__}")
    return value


def _group_from(entry: Mapping[str, Any]) -> GroupPlan:
    if not isinstance(entry["name"], str) or isinstance(entry["total"], bool) or not isinstance(entry["total"], int):
        raise TypeError("a group needs a name (text) and a total (integer)")
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in _sequence(entry["kept"])):
        raise TypeError(f"group {entry['name']!r}: kept channels must be integers")
    factors, scores = entry.get("factors"), entry.get("score_range")
    return GroupPlan(
        name=entry["name"],
        total=entry["total"],
        kept=tuple(entry["kept"]),
        factors=None if factors is None else tuple(factors),
        score_range=None if scores is None else (_number(scores[0]), _number(scores[1])),
    )


def _inside(layer: str, blocks: Iterable[str]) -> bool:
    return any(layer == block or layer.startswith(f"{block}.") for block in blocks)


def dense_names(model: nn.Module) -> Renumbering:
    """Return the way between the names of a network and those before the plan that it carries."""
    plan = getattr(model, "pruning_plan", None)
    return Renumbering(()) if plan is None else Renumbering(plan.removed_blocks, plan.shells)
