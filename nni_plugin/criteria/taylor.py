"""Taylor-FO: squared first-order loss change of removing a coupled channel.

Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, Eq. 8 with the gate after batch
normalisation (the paper's best form): per minibatch the gate gradients of ALL writers of a coupled channel are
summed, the sum is squared, squares are averaged over minibatches. No normalisation between layers.

Cost: one multiplication per parameter read; no hook, no gate module, no second backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nni_plugin.criteria.base import Criterion
from nni_plugin.criteria.first_order import member_gate
from nni_plugin.errors import CriterionError
from nni_plugin.groups import ChannelGroup, Member
from nni_plugin.tensors import NORMS, Axis, kind_of

Gates = Literal["auto", "bn", "weight", "input"]


def joint(terms: Mapping[tuple[str, Axis], Tensor], members: tuple[Member, ...], width: int) -> Tensor:
    """Sum the gate gradients of several members of a group, channel by channel.

    Args:
        terms: `(path, axis)` of a member -> its gate gradients, shape `[..., positions]`.
        members: The members to sum over.
        width: Number of channels of the group.

    Returns:
        `dE/dz` of the coupled channels, shape `[..., width]`.
    """
    first = terms[members[0].path, members[0].axis]
    total = first.new_zeros(*first.shape[:-1], width)
    for member in members:
        values = terms[member.path, member.axis][..., member.index.to(first.device)]
        total.index_add_(-1, member.channel.to(first.device), values)
    return total


class TaylorFO(Criterion):
    """Taylor-FO with joint gates over coupled layers.

    Args:
        gates: Where the gate lies. `"bn"`: after the normalisations that write the channel, an error for a group
            without. `"weight"`: on the dense layers that write it, `(sum_s w_s g_s)^2`. `"input"`: on the layers
            that read it. `"auto"`: `"bn"`, the writer's own weights where it is followed by no normalisation,
            and the readers where a normalisation has no affine parameters or the channel is read both directly
            and through a depthwise layer.
    """

    def __init__(self, gates: Gates = "auto") -> None:
        if gates not in ("auto", "bn", "weight", "input"):
            raise CriterionError(f"gates must be 'auto', 'bn', 'weight' or 'input', got {gates!r}.")
        self.gates = gates
        super().__init__()

    def reset(self) -> None:
        """Forget everything collected."""
        super().reset()
        self._sums: dict[str, Tensor] = {}
        self._rows: dict[tuple[str, Axis], list[Tensor]] = {}

    def _gather(self, model: nn.Module) -> None:
        if self._groups:
            terms: dict[tuple[str, Axis], Tensor] = {}
            for group in self._groups:
                members = self._members(model, group)
                for member in members:
                    key = (member.path, member.axis)
                    if key not in terms:
                        terms[key] = _accumulable(member_gate(model, member))
                squared = joint(terms, members, group.width).square()
                before = self._sums.get(group.name)
                self._sums[group.name] = squared if before is None else before.to(squared) + squared
            return
        for member in self._all_members(model):
            row = _accumulable(member_gate(model, member))
            self._rows.setdefault((member.path, member.axis), []).append(row)

    def _score(self, group: ChannelGroup) -> Tensor:
        if group.name in self._sums:
            return (self._sums[group.name] / self.minibatches).cpu()
        if not self._rows:
            raise CriterionError(
                f"Group {group.name!r} was not among the groups collected for; pass it to collect(), or none at all."
            )
        members = self._choose(group, {key[0] for key in self._rows if key[1] == "out"})
        rows: dict[tuple[str, Axis], Tensor] = {}
        for member in members:
            key = (member.path, member.axis)
            if len(self._rows.get(key, ())) != self.minibatches:
                raise CriterionError(f"Layer {member.path!r} of group {group.name!r} had no gradient to collect.")
            rows[key] = torch.stack([row.to(self._rows[key][-1]) for row in self._rows[key]])
            if int(member.index.max()) >= rows[key].shape[-1]:
                raise CriterionError(f"Layer {member.path!r} has changed since its gradients were collected.")
        return joint(rows, members, group.width).square().mean(0).cpu()

    def _members(self, model: nn.Module, group: ChannelGroup) -> tuple[Member, ...]:
        affine = {
            member.path
            for member in group.writers
            if member.kind != "norm" or getattr(model.get_submodule(member.path), "weight", None) is not None
        }
        return self._choose(group, affine)

    def _choose(self, group: ChannelGroup, scorable: set[str]) -> tuple[Member, ...]:
        """Return the members whose gate gradients make up the group's; `scorable` has the writers with parameters."""
        if self.gates == "bn":
            members = group.writers
            missing = [m.path for m in members if m.kind != "norm" or m.path not in scorable]
            if missing:
                raise CriterionError(
                    f"Group {group.name!r} is written by {missing[0]!r} without an affine normalisation behind it; "
                    "use gates='auto', 'weight' or 'input'."
                )
        elif self.gates == "weight":
            members = tuple(m for m in group.members if m.axis == "out" and m.kind == "dense" and not m.beside)
        elif self.gates == "input" or group.forked or not all(m.path in scorable for m in group.writers):
            members = group.readers
        else:
            members = group.writers
        if not members:
            raise CriterionError(f"Group {group.name!r} has no layer to score under gates={self.gates!r}.")
        return members

    def _all_members(self, model: nn.Module) -> list[Member]:
        """Return every place a group might be scored at, for a collection before groups are known."""
        none = torch.empty(0, dtype=torch.int64)
        found = []
        for path, layer in model.named_modules():
            kind = kind_of(layer)
            parameters = list(layer.parameters(recurse=False))
            if kind not in ("norm", "dense", "depthwise") or not parameters:
                continue
            if any(parameter.grad is None for parameter in parameters):
                continue
            is_norm = isinstance(layer, NORMS)
            if self.gates != "input" and (is_norm or self.gates != "bn") and not (is_norm and self.gates == "weight"):
                found.append(Member(path, "out", kind, none, none, ()))
            if self.gates in ("auto", "input") and kind == "dense":
                found.append(Member(path, "in", kind, none, none, ()))
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the sums and rows collected."""
        rows = {"\n".join(key): torch.stack(values) for key, values in self._rows.items()}
        return {**super().state_dict(), "sums": dict(self._sums), "rows": rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self._sums = dict(state["sums"])
        self._rows = {}
        for key, rows in state["rows"].items():
            path, axis = key.split("\n")
            self._rows[path, "in" if axis == "in" else "out"] = list(rows)

    def all_reduce(self) -> None:
        """Sum the squares of every process; each must have collected for the same groups."""
        super().all_reduce()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if self._rows:
                raise CriterionError("Pass the groups to collect() when several processes share the work.")
            for total in self._sums.values():  # on the device of the gradients, as the process group needs
                torch.distributed.all_reduce(total)


def _accumulable(term: Tensor) -> Tensor:
    """Accumulate half precision in float32."""
    return term.float() if term.dtype in (torch.float16, torch.bfloat16) else term
