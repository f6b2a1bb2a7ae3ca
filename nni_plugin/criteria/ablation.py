"""Exact loss changes of taking channels out one at a time, without a full forward pass each.

What makes it fast, none of which changes the result:

- only what lies behind the readers of a channel is computed again, the rest comes from one base pass;
- the first reader costs one input channel's share of its work (see :mod:`nni_plugin.criteria.suffixes`);
- where a channel is zero at all its readers already (behind a ReLU, for many samples) the change is zero;
- in eval mode samples do not see each other: samples of several channels run side by side, in chunks that suit the
  memory and the caches, with batch normalisations folded and convolutions in channels-last form.

In train mode batch statistics tie the samples together: each channel runs on the whole minibatch, still only behind
its readers, with the same random numbers. A network that cannot be traced is run in full for each channel. Every
minibatch is checked: the outputs of the base pass against the network's own, and one channel against the definition.

Cost: about a third of a forward pass a channel for residual networks, which is what lies behind a layer on average.
"""

from __future__ import annotations

import copy
import math
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nni_plugin.criteria.masked_loop import without
from nni_plugin.criteria.replay import Replay, leaves, tolerance
from nni_plugin.criteria.rerun import RandomState
from nni_plugin.criteria.suffix_runs import Suffixes
from nni_plugin.criteria.suffixes import Suffix
from nni_plugin.criteria.traced import CannotReplayError, bound_inputs
from nni_plugin.errors import CriterionError
from nni_plugin.groups import ChannelGroup

LossFn = Callable[[nn.Module, Any], Tensor]
Progress = Callable[[int], Any]


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """Return the mean cross-entropy of a minibatch `(images, labels)`."""
    images, labels = batch
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return F.cross_entropy(model(images.to(device)), labels.to(device))


class Answer(nn.Module):
    """Stands in for a network whose output is known, so that any `loss_fn(model, batch)` gives the loss of it.

    Attributes and parameters are those of the network.

    Args:
        network: The network.
        answer: Called with the arguments of `forward`; returns the output.
    """

    def __init__(self, network: nn.Module, answer: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__["network"] = network  # not a child: the network must not be found twice
        self.__dict__["answer"] = answer
        self._parameters, self._buffers, self._modules = network._parameters, network._buffers, network._modules
        self.training = network.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the known output."""
        return self.answer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Return what the network has under this name."""
        return getattr(self.__dict__["network"], name)


class Ablations:
    """Measures how the loss of minibatches changes without each channel.

    Args:
        groups: The groups to measure.
        loss_fn: `loss_fn(model, batch)` -> a finite scalar. It is given a stand-in for the network, whose output lacks
            a channel; it must call it once for a minibatch, or every channel costs a full forward pass.
        memory: Bytes for values that are kept and computed, beside a copy of the network. One group's kept values
            and one sample behind it are the least.
        channels: By group name the channels to measure, ascending; all of the groups that are not named.
    """

    def __init__(
        self,
        groups: Sequence[ChannelGroup],
        loss_fn: LossFn = cross_entropy,
        memory: int = 2**30,
        channels: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        self.groups, self.loss_fn, self.memory = list(groups), loss_fn, memory
        self.channels = {group.name: list((channels or {}).get(group.name, range(group.width))) for group in groups}
        self.fast = True
        """Whether the last minibatch was run in parts."""

    def changes(
        self, model: nn.Module, batch: Any, progress: Progress = lambda channels: None
    ) -> tuple[dict[str, Tensor], int]:
        """Measure one minibatch.

        Args:
            model: The network, in the mode it is to be measured in; it is not touched.
            batch: What `loss_fn` takes.
            progress: Called with the number of channels done since the last call.

        Returns:
            `E(without) - E(with)` by group, float64 on the CPU, shape `[width]`, NaN where it was not asked for; and
            the number of samples.

        Raises:
            CriterionError: The minibatch is empty, a loss is not finite, or a reader is not called.
        """
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.inference_mode():
            random = RandomState(device)
            minibatch = _Minibatch(copy.deepcopy(model), self.groups, self.channels, self.loss_fn, batch, random)
            done: list[int] = []

            def noted(channels: int) -> None:
                done.append(channels)
                progress(channels)

            try:
                changes, fast = minibatch.in_parts(self.memory, noted), True
            except CannotReplayError as error:
                if self.fast:
                    warnings.warn(
                        f"{type(model).__name__} cannot be run in parts ({error}): each channel costs a full forward "
                        "pass.",
                        stacklevel=2,
                    )
                progress(-sum(done))  # all anew
                changes, fast = minibatch.one_by_one(progress), False
        self.fast = fast
        return changes, minibatch.samples


class _Minibatch:
    """One minibatch on a copy of the network."""

    def __init__(
        self,
        network: nn.Module,
        groups: Sequence[ChannelGroup],
        channels: Mapping[str, Sequence[int]],
        loss_fn: LossFn,
        batch: Any,
        random: RandomState,
    ) -> None:
        self.network, self.groups, self.channels = network, groups, channels
        self.loss_fn, self.batch, self.random = loss_fn, batch, random
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.loss = self._loss(Answer(network, self._seen), "with all channels")
        first = next((x for x in self._tensors() if x.dim() > 0), None)
        if first is None:
            raise CriterionError("loss_fn(model, batch) must call the model that it is given, on tensors of samples.")
        self.samples = first.shape[0]

    def in_parts(self, memory: int, progress: Progress) -> dict[str, Tensor]:
        """Measure every channel by running only what lies behind it."""
        replay = Replay(self.network, self._readers(), self._inputs(), self.samples)
        suffixes = Suffixes(replay, self.network, self.groups, memory)
        check = max(suffixes.suffixes, key=lambda suffix: len(suffix.nodes), default=None)
        changes = {}
        for part in suffixes.batches():
            self.random.restore()
            kept = replay.base(set().union(*(suffix.keep for suffix in part)))
            self._compare(kept[replay.output], self.output, "the outputs of the traced network differ")
            for suffix in part:
                changes[suffix.group.name] = self._changes(suffixes, suffix, kept, progress)
                if suffix is check:
                    self._check(suffix.group, changes[suffix.group.name])
            kept.clear()  # before the next base pass
        return changes

    def one_by_one(self, progress: Progress) -> dict[str, Tensor]:
        """Measure every channel by a full forward pass."""
        changes = {}
        for group in self.groups:
            changes[group.name] = torch.full((group.width,), math.nan, dtype=torch.float64)
            for channel in self.channels[group.name]:
                changes[group.name][channel] = self._without(group, channel) - self.loss
                progress(1)
        return changes

    # -- losses ------------------------------------------------------------------------------------------

    def _changes(self, suffixes: Suffixes, suffix: Suffix, kept: dict[Any, Any], progress: Progress) -> Tensor:
        base = kept[suffixes.output]
        labels = self._labels(base)
        asked = self.channels[suffix.group.name]
        total = torch.full((suffix.group.width,), math.nan, dtype=torch.float64)
        total[asked] = 0.0
        if labels is None:
            before = self._loss(Answer(self.network, lambda *_, **__: base), "with all channels")
            for channel, samples, pieces in _by_channel(suffixes.outputs(suffix, kept, asked)):
                output = suffixes.whole(base, pieces, samples)
                answer = Answer(self.network, lambda *_, output=output, **__: output)
                total[channel] = self._loss(answer, _name(suffix.group, channel)) - before
                progress(1)
            return total
        per_sample = F.cross_entropy(base, labels, reduction="none")
        done = 0
        for channels, rows, output in suffixes.outputs(suffix, kept, asked):
            rows = rows.to(labels.device)
            change = F.cross_entropy(output, labels[rows], reduction="none") - per_sample[rows]
            total.index_add_(0, channels, change.double().cpu())
            now = bisect_left(asked, int(channels[-1]))
            progress(now - done)
            done = now
        progress(len(asked) - done)
        total /= self.samples
        infinite = [channel for channel in asked if not math.isfinite(float(total[channel]))]
        if infinite:
            channel = infinite[0]
            self._loss_value(total[channel], _name(suffix.group, channel))
        return total

    def _labels(self, output: Any) -> Tensor | None:
        """Return the labels where the loss is the mean over samples of the cross-entropy of each, else None."""
        if self.loss_fn is not cross_entropy or not isinstance(output, Tensor) or output.dim() != 2:
            return None
        labels: Tensor = self.batch[1].to(output.device)
        ignored = labels.dim() == 1 and not labels.is_floating_point() and bool((labels < 0).any())
        return None if ignored or labels.shape[:1] != output.shape[:1] else labels

    def _without(self, group: ChannelGroup, channel: int) -> float:
        self.random.restore()
        with without(self.network, group, channel):
            return self._loss(self.network, _name(group, channel))

    def _loss(self, model: nn.Module, when: str) -> float:
        return self._loss_value(self.loss_fn(model, self.batch), when)

    def _loss_value(self, loss: Any, when: str) -> float:
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            raise CriterionError(f"loss_fn must return a scalar tensor, got {loss!r}.")
        value = float(loss)
        if not math.isfinite(value):
            raise CriterionError(
                f"The loss {when} is {value}: the minibatch is empty, holds values that are not finite, or the network "
                "overflows. Look at the data and at the loss."
            )
        return value

    # -- checks ------------------------------------------------------------------------------------------

    def _compare(self, ours: Any, theirs: Any, what: str) -> None:
        for a, b in zip(leaves(ours), leaves(theirs), strict=True):
            if isinstance(a, Tensor) and a.is_floating_point():
                scale = max(1.0, float(b.abs().max()))
                if a.shape != b.shape or not float((a - b).abs().max()) <= tolerance(a) * scale:
                    raise CannotReplayError(what)

    def _check(self, group: ChannelGroup, changes: Tensor) -> None:
        """Hold one channel against the definition, the one that matters most."""
        channel = int(changes.nan_to_num(0.0).abs().argmax())
        if channel not in self.channels[group.name]:
            channel = self.channels[group.name][0]
        expected = self._without(group, channel) - self.loss
        allowed = max(map(tolerance, self.network.parameters()), default=1e-8)
        if not abs(expected - float(changes[channel])) <= allowed * max(1.0, abs(self.loss), abs(expected)):
            raise CannotReplayError(
                f"the loss changes by {expected:.6g} without channel {channel} of {group.name!r}, but in parts by "
                f"{float(changes[channel]):.6g}"
            )

    # -- inputs ------------------------------------------------------------------------------------------

    def _seen(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        if any(isinstance(x, Tensor) and x.numel() == 0 for x in (*args, *kwargs.values())):
            raise CriterionError("The minibatch is empty: there is nothing to measure.")
        self.output = self.network(*args, **kwargs)
        return self.output

    def _tensors(self) -> list[Tensor]:
        args, kwargs = self.calls[0] if self.calls else ((), {})
        return [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]

    def _inputs(self) -> dict[str, Any]:
        """Return the values of the parameters of `forward`, in order."""
        if len(self.calls) != 1:
            raise CannotReplayError(f"loss_fn calls the network {len(self.calls)} times")
        (args, kwargs) = self.calls[0]
        return bound_inputs(self.network, args, kwargs)

    def _readers(self) -> list[nn.Module]:
        return [self.network.get_submodule(member.path) for group in self.groups for member in group.readers]


def _by_channel(chunks: Iterable[tuple[Tensor, Tensor, Any]]) -> Iterator[tuple[int, Tensor, list[Any]]]:
    """Join what belongs to one channel: the channel, its samples, and where in which outputs their rows lie."""
    current = -1
    samples: list[Tensor] = []
    pieces: list[Any] = []
    for channels, of_rows, output in chunks:
        start = 0
        values, counts = channels.unique_consecutive(return_counts=True)
        for channel, count in zip(values.tolist(), counts.tolist(), strict=True):
            if channel != current and pieces:
                yield current, torch.cat(samples), pieces
                samples, pieces = [], []
            current = channel
            part = slice(start, start + count)
            samples.append(of_rows[part])
            pieces.append((output, part, len(channels)))
            start += count
    if pieces:
        yield current, torch.cat(samples), pieces


def _name(group: ChannelGroup, channel: int) -> str:
    return f"without channel {channel} of group {group.name!r}"
