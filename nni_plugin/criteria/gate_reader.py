"""What the criteria on gates share: where the gates of a group lie, and what a minibatch gives at each layer.

The gate of a coupled channel lies on every layer that writes it, after its normalisation, or on those that read it; its
gradient is the sum over them, from gradients of parameters or of every sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nni_plugin.criteria.base import Criterion
from nni_plugin.criteria.first_order import member_gates
from nni_plugin.criteria.gates import GateLayout, accumulable
from nni_plugin.criteria.per_sample import PerSampleGates
from nni_plugin.errors import CriterionError
from nni_plugin.groups import ChannelGroup, Member
from nni_plugin.tensors import NORMS, kind_of

Gates = Literal["auto", "bn", "weight", "input"]


class GateReader(Criterion):
    """Base of the criteria that read gradients of joint gates.

    Args:
        gates: Where the gate lies. `"bn"`: after the normalisations that write the channel, an error for a group
            without. `"weight"`: on the dense layers that write it. `"input"`: on the layers that read it. `"auto"`:
            `"bn"`, the writer's own weights where it is followed by no normalisation, and the readers where a
            normalisation has no affine parameters or the channel is read both directly and through a depthwise layer.
    """

    per_sample = False
    """Whether a minibatch gives gate gradients of every sample, `[N, positions]`, or of its mean, `[positions]`."""

    needs_groups = False
    """Whether `collect` must be told the groups."""

    _layout: GateLayout | None = None
    _watcher: PerSampleGates | None = None

    def __init__(self, gates: Gates = "auto") -> None:
        if gates not in ("auto", "bn", "weight", "input"):
            raise CriterionError(f"gates must be 'auto', 'bn', 'weight' or 'input', got {gates!r}.")
        self.gates = gates
        super().__init__()

    @contextmanager
    def collect(self, model: nn.Module, groups: Sequence[ChannelGroup] = ()) -> Iterator[Criterion]:
        """Watch a network while minibatches run; nothing stays on it afterwards.

        Args:
            model: The network whose gradients will be read; a distributed wrapper is looked through.
            groups: The groups that will be scored. With them memory stays at a few numbers a channel; without
                them rows are kept per minibatch until a group is named.

        Raises:
            CriterionError: The network is frozen, this criterion is collecting already, or a group has no gate.
        """
        with super().collect(model, groups):
            assert self._model is not None
            if self.needs_groups and not groups:
                raise CriterionError(f"{type(self).__name__} weighs all groups together: pass them to collect().")
            layout = GateLayout((group, self._members(self._model, group)) for group in groups) if groups else None
            if self.minibatches and layout is not None and self._layout is not None and layout != self._layout:
                raise CriterionError(f"{type(self).__name__} holds data of other groups; call reset() before.")
            self._layout = layout
            try:
                if not self.per_sample:
                    yield self
                else:
                    members = self._layout.members if self._layout else self._all_members(self._model)
                    with PerSampleGates(self._model, members) as watcher:
                        self._watcher = watcher
                        yield self
            finally:
                self._watcher = None

    def reset(self) -> None:
        """Forget everything collected."""
        super().reset()
        self.samples = 0

    def _terms(self, model: nn.Module, members: Sequence[Member]) -> list[Tensor]:
        """Return what the minibatch gives at each member, shape `[..., positions]`."""
        if self._watcher is not None:
            return [term / self.loss_scale for term in self._watcher.take()]
        return [accumulable(term) for term in member_gates(model, members)]

    def _placed(self) -> GateLayout:
        """Return where the gates of the groups lie.

        Raises:
            CriterionError: What was collected came from a state, and the groups have not been named since.
        """
        if self._layout is None:
            raise CriterionError(
                f"{type(self).__name__} holds data from a saved state, but not of which groups: enter "
                "`with criterion.collect(model, groups):` with those before asking for scores."
            )
        return self._layout

    # -- where the gates lie -----------------------------------------------------------------------------

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
        elif self.per_sample and any(m.kind == "parameter" for m in group.writers):
            members = group.readers  # no hook sees the output of a bare parameter
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
            if any(not p.requires_grad if self.per_sample else p.grad is None for p in parameters):
                continue
            is_norm = isinstance(layer, NORMS)
            if self.gates != "input" and (is_norm or self.gates != "bn") and not (is_norm and self.gates == "weight"):
                found.append(Member(path, "out", kind, none, none, ()))
            if self.gates in ("auto", "input") and kind == "dense":
                found.append(Member(path, "in", kind, none, none, ()))
        return found

    # -- state -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the number of samples seen."""
        return {**super().state_dict(), "samples": self.samples}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self.samples = int(state["samples"])

    def all_reduce(self) -> None:
        """Sum the number of samples; each process must have collected for the same groups."""
        super().all_reduce()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self.samples = self._summed(self.samples)
