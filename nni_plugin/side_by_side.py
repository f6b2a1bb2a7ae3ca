"""A network run layer by layer on many minibatches side by side, so that a layer can be changed before it runs.

What comes before a layer is computed once, however many layers are looked at: one forward pass in all, at the price of
holding every minibatch's live values at a time. A network that torch.fx cannot trace, or whose values do not fit in
memory, is run from its start to each layer in turn instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from nni_plugin.criteria.ablation import Answer
from nni_plugin.criteria.replay import leaves
from nni_plugin.criteria.traced import CannotReplayError, TracedNetwork, bound_inputs, last_uses

Forward = Callable[[nn.Module, Any], Any]


class _Stop(Exception):
    """Ends a forward pass."""


class SideBySide:
    """The layers of a network in the order in which they run, with what each reads and gives on every minibatch.

    Args:
        network: In eval mode. Weights of a layer may change until it has run.
        paths: Layers to stop at, each called once, in the order in which they run.
        batches: Minibatches that can be gone through again.
        forward: `forward(network, batch)` runs it, calling it once.
        memory: Bytes that the live values of all minibatches may take.
    """

    def __init__(
        self, network: nn.Module, paths: Sequence[str], batches: Iterable[Any], forward: Forward, memory: int
    ) -> None:
        self.network, self.batches, self.forward = network, batches, forward
        self.walk: _Walk | None = None
        try:
            self.walk = _Walk(network, [network.get_submodule(path) for path in paths], batches, forward, memory)
        except CannotReplayError:
            return

    def inputs(self, path: str) -> Iterator[Tensor]:
        """Yield what a layer reads, minibatch by minibatch; layers are asked for in their order."""
        if self.walk is not None:
            yield from self.walk.to(self.network.get_submodule(path))
        else:
            yield from (x for x, _ in self._reach(path))

    def outputs(self, path: str) -> Iterator[Tensor]:
        """Yield what a layer gives, minibatch by minibatch."""
        if self.walk is not None:
            yield from self.walk.through(self.network.get_submodule(path))
        else:
            yield from (y for _, y in self._reach(path))

    def _reach(self, path: str) -> Iterator[tuple[Tensor, Tensor]]:
        seen: list[tuple[Tensor, Tensor]] = []

        def stop(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            seen.append((args[0], output))
            raise _Stop

        for batch in self.batches:
            handle = self.network.get_submodule(path).register_forward_hook(stop)
            try:
                self.forward(self.network, batch)
            except _Stop:
                pass
            finally:
                handle.remove()
            yield seen.pop()


class _Walk(TracedNetwork):
    """The traced network, half-way through all minibatches."""

    def __init__(
        self, network: nn.Module, stops: Sequence[nn.Module], batches: Iterable[Any], forward: Forward, memory: int
    ) -> None:
        inputs = [_inputs(network, batch, forward) for batch in batches]
        super().__init__(network, stops, inputs[0], fold=False)
        names = [node for node in self.nodes if node.op == "placeholder"]
        if any(len(given) != len(names) for given in inputs):
            raise CannotReplayError("the minibatches differ in their inputs")
        self.values: list[dict[fx.Node, Any]] = [dict(zip(names, x.values(), strict=True)) for x in inputs]
        self._frees, self._next = last_uses(self.nodes), 0
        if any(len(self.nodes_of.get(stop, ())) != 1 for stop in stops):
            raise CannotReplayError("a layer is not called once")
        if self._peak(dict(self.values[0])) * len(self.values) > memory:
            raise CannotReplayError("the minibatches do not fit in memory side by side")

    def to(self, layer: nn.Module) -> list[Tensor]:
        """Go on until a layer is next; returns what it reads."""
        (node,) = self.nodes_of[layer]
        while self.nodes[self._next] is not node:
            self._run()
        return [values[node.args[0]] for values in self.values]

    def through(self, layer: nn.Module) -> list[Tensor]:
        """Go on until a layer has run; returns what it gives."""
        self.to(layer)
        (node,) = self.nodes_of[layer]
        self._run()
        return [values[node] for values in self.values]

    def _run(self) -> None:
        node = self.nodes[self._next]
        for values in self.values:
            self._step(node, values)
        self._next += 1

    def _step(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        if node.op != "placeholder":
            values[node] = self.call(node, values.__getitem__)
        for done in self._frees.get(node, ()):
            del values[done]

    def _peak(self, values: dict[fx.Node, Any]) -> int:
        """Return the most bytes that one minibatch holds at a time."""
        most = 0
        for node in self.nodes:
            self._step(node, values)
            most = max(most, sum(_bytes(value) for value in values.values()))
        return most


def _inputs(network: nn.Module, batch: Any, forward: Forward) -> dict[str, Any]:
    """Return what a minibatch gives the network to read."""
    seen: list[dict[str, Any]] = []

    def note(*args: Any, **kwargs: Any) -> Any:
        seen.append(bound_inputs(network, args, kwargs))
        raise _Stop

    try:
        forward(Answer(network, note), batch)
    except _Stop:
        return seen[0]
    raise CannotReplayError("forward(network, batch) does not call the network")


def _bytes(value: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves(value) if isinstance(leaf, torch.Tensor))
