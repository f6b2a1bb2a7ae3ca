"""The Oracle: the exact loss change of removing each coupled channel, for judging every other criterion.

Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, Eq. 3:
`I_m = (E(D, W) - E(D, W | w_m = 0))^2`, with the loss `E` over all the data given. A channel is removed by zeroing it
at the input of every layer that reads it. That is exact whatever activation lies between writer and reader, and equal
to zeroing the writers where `f(0) = 0`. It equals the loss of the compact network unless a norm over channels
(LayerNorm, GroupNorm) lies in between: there the compact network's statistics are those of the channels left, while
here the removed channel still takes part in them.

Cost: about a third of a forward pass for each channel and minibatch, no backward pass; see
:mod:`nni_plugin.criteria.ablation` for how.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nni_plugin.criteria.ablation import Ablations, LossFn, cross_entropy
from nni_plugin.criteria.base import Criterion
from nni_plugin.criteria.gates import channels_of
from nni_plugin.errors import CriterionError
from nni_plugin.groups import ChannelGroup
from nni_plugin.processes import summed


class Oracle(Criterion):
    """Squared exact loss change `(E(without the channel) - E(with it))^2`, over all samples seen.

    Args:
        loss_fn: `loss_fn(model, batch)` -> a finite scalar, the mean over the samples of the minibatch; None for the
            planner's, or else cross-entropy on `(images, labels)`. It is called with stand-ins for the network that
            answer with an output computed before; a loss that calls the network more than once is measured by full
            forward passes.
        signed: Score with the loss change itself, so that channels whose removal lowers the loss go first.
        memory: Bytes for values that are kept and computed, beside a copy of the network.
        channels_per_group: Measure at most so many channels of each group, drawn at random; None: all. `loss_changes`
            of the others are NaN, and there are no scores: for judging criteria on wide networks, not for pruning.
        seed: Of that draw.
    """

    needs_gradients = False
    needs_batch = True

    _ablations: Ablations | None = None

    def __init__(
        self,
        loss_fn: LossFn | None = None,
        signed: bool = False,
        memory: int = 2**30,
        channels_per_group: int | None = None,
        seed: int = 0,
    ) -> None:
        if memory < 1:
            raise CriterionError(f"memory must be a number of bytes above 0, got {memory}.")
        if channels_per_group is not None and channels_per_group < 1:
            raise CriterionError(f"channels_per_group must be at least 1, got {channels_per_group}.")
        self.signed, self.memory, self.channels_per_group, self.seed = signed, memory, channels_per_group, seed
        self._measured: dict[str, ChannelGroup] = {}
        super().__init__()
        self.loss_fn = loss_fn

    @contextmanager
    def collect(self, model: nn.Module, groups: Sequence[ChannelGroup] = ()) -> Iterator[Criterion]:
        """Say what will be measured; nothing is put on the network.

        Args:
            model: The network, in the mode it is to be measured in; a distributed wrapper is looked through.
            groups: The groups to measure; those that must keep all channels are passed over.

        Raises:
            CriterionError: No group may be pruned, data of other groups are held, or this criterion is collecting.
        """
        with super().collect(model, groups):
            asked = [group for group in groups if group.fixed is None]
            if not asked:
                raise CriterionError("The Oracle measures channel by channel: pass groups to collect() that may go.")
            widths = {group.name: group.width for group in asked}
            if self._sums and {name: len(total) for name, total in self._sums.items()} != widths:
                raise CriterionError("The Oracle holds data of other groups; call reset() before.")
            self._measured = {group.name: group for group in asked}
            self._ablations = Ablations(asked, self.loss_fn or cross_entropy, self.memory, self._drawn(asked))
            try:
                yield self
            finally:
                self._ablations = None

    def reset(self) -> None:
        """Forget everything collected."""
        super().reset()
        self.samples = 0
        self._sums: dict[str, Tensor] = {}

    def loss_changes(self, group: ChannelGroup) -> Tensor:
        """Return how the loss changes when each channel of a group is removed alone.

        Returns:
            Mean over all samples seen, in units of the loss, float64, shape `[width]`; NaN where not measured.

        Raises:
            CriterionError: The group was not among those collected for.
        """
        group = ChannelGroup.from_host(group)
        if group.name in self._sums and len(self._sums[group.name]) == group.width:
            return self._sums[group.name] / self.samples
        for name, ours in self._measured.items():  # a stock pruner may start from another of its layers
            channels = channels_of(ours, group)
            if channels is not None and name in self._sums:
                return self._sums[name][channels] / self.samples
        raise CriterionError(
            f"Group {group.name!r} was not measured: it was not passed to collect(), must keep all its channels, "
            "or no minibatch has been seen."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the sums collected."""
        return {**super().state_dict(), "samples": self.samples, "sums": dict(self._sums)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self.samples, self._sums = int(state["samples"]), dict(state["sums"])

    def all_reduce(self) -> None:
        """Sum what every process collected; each must have collected for the same groups."""
        super().all_reduce()
        self.samples = self._summed(self.samples)
        self._sums = {name: summed(total) for name, total in self._sums.items()}

    def _gather(self, model: nn.Module) -> None:
        assert self._ablations is not None
        channels = sum(map(len, self._ablations.channels.values()))
        with tqdm(desc="oracle", total=channels, unit="gate", delay=2, disable=None, leave=False) as bar:
            changes, samples = self._ablations.changes(model, self._batch, bar.update)
        for name, change in changes.items():
            weighed = change * samples
            self._sums[name] = self._sums[name] + weighed if name in self._sums else weighed
        self.samples += samples

    def _drawn(self, groups: Sequence[ChannelGroup]) -> dict[str, list[int]]:
        """Return the channels to measure, the same in every minibatch and process."""
        generator = torch.Generator().manual_seed(self.seed)
        number = self.channels_per_group
        return {
            group.name: torch.randperm(group.width, generator=generator)[:number].sort().values.tolist()
            for group in groups
        }

    def _score(self, group: ChannelGroup) -> Tensor:
        change = self.loss_changes(group)
        if self.channels_per_group is not None and self.channels_per_group < group.width:
            raise CriterionError(
                f"The Oracle measured {self.channels_per_group} of the {group.width} channels of {group.name!r}, so it "
                "cannot rank them: leave channels_per_group out, or read loss_changes()."
            )
        return change if self.signed else change.square()
