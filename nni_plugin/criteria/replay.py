"""A traced network that can be run again from any layer on, for any choice of samples.

A base pass keeps the values that will be asked for; from then on only the nodes behind a change are computed, and what
they need from elsewhere is taken from the base pass, row by row.

Two passes over two and three samples tell which values have a row for each sample, which are constant, and which are
sizes that follow the number of rows. A network where a row depends on other samples (batch statistics) is told from
that too, or from its mode: it can only be run on all samples as they are (`by_rows` is False then).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from nni_plugin.criteria.rerun import RandomState
from nni_plugin.criteria.traced import CannotReplayError, TracedNetwork, is_marked, last_uses

_SIZE_METHODS = ("size", "dim", "numel", "ndimension")


class Rows:
    """A leaf of a value with rows for every sample: `per_sample` of them, of shape `rest`."""

    def __init__(self, per_sample: int, rest: tuple[int, ...], bytes_per_sample: float) -> None:
        self.per_sample, self.rest, self.bytes_per_sample = per_sample, rest, bytes_per_sample


class Replay(TracedNetwork):
    """A traced copy of a network.

    Args:
        network: The network; it is not changed.
        readers: Layers that must be nodes of the graph.
        inputs: Values of the parameters of `forward`, in order; non-tensors are fixed to these values.
        samples: Number of samples; tensors with as many rows have one for each.

    Raises:
        CannotReplayError: The network cannot be traced.
    """

    def __init__(
        self, network: nn.Module, readers: Sequence[nn.Module], inputs: Mapping[str, Any], samples: int
    ) -> None:
        super().__init__(network, readers, inputs)
        self.samples, self.by_rows = samples, self.in_eval_mode
        placeholders = [node for node in self.nodes if node.op == "placeholder"]
        if len(placeholders) != len(inputs):
            raise CannotReplayError(f"{len(placeholders)} inputs were traced, {len(inputs)} are given.")
        self.inputs = dict(zip(placeholders, inputs.values(), strict=True))
        device = next((p.device for p in network.parameters()), torch.device("cpu"))
        self.device = device
        if self.by_rows and device.type == "cpu":  # random numbers, in train mode, are drawn in the order of memory
            for node, layer in self.layers.items():
                if type(layer) is nn.Conv2d and not is_marked(layer):
                    self.layers[node] = _convolution_channels_last(layer)
            self.inputs = {node: _channels_last(value) for node, value in self.inputs.items()}
        self.kinds: dict[fx.Node, Any] = {}
        self._random: dict[fx.Node, RandomState] = {}
        if self.by_rows:
            self._probe()

    # -- what a value is ---------------------------------------------------------------------------------

    def _probe(self) -> None:
        """Find out by two small passes what has rows, what is constant and what is a size."""
        last, middle = self.samples - 1, self.samples // 2
        two = self._values(self.rows_of_inputs(torch.tensor([middle, last], device=self.device)))
        three = self._values(self.rows_of_inputs(torch.tensor([last, 0, middle], device=self.device)))
        for node in self.nodes:
            kind = _kind(leaves(two[node]), leaves(three[node]), self._asks_size(node))
            if kind is None:
                self.by_rows = False
                return
            self.kinds[node] = kind
        # The same samples in other company must come out the same.
        for a, b in zip(leaves(two[self.output]), leaves(three[self.output]), strict=True):
            if isinstance(a, Tensor) and isinstance(self.kinds[self.output], list):
                a, b = a.unflatten(0, (2, -1)), b.unflatten(0, (3, -1))[[2, 0]]
                self.by_rows &= bool(((a - b).abs() <= tolerance(a) * (1 + b.abs().max())).all())

    def _asks_size(self, node: fx.Node) -> bool:
        """Tell whether a node computes with sizes alone, never with what is in a tensor."""
        if node.op == "call_function" and node.target is getattr:
            return bool(node.args[1] == "shape")
        if node.op == "call_method" and node.target in _SIZE_METHODS:
            return True
        return node.op == "call_function" and not any(
            isinstance(self.kinds.get(before), list) for before in node.all_input_nodes
        )

    def rows_of_inputs(self, rows: Tensor) -> dict[fx.Node, Any]:
        """Return the network's inputs for some of the samples."""

        def some(value: Any) -> Any:
            has_rows = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == self.samples
            return take_rows(value, rows, 1) if has_rows else value

        return {node: some(value) for node, value in self.inputs.items()}

    def bytes_per_sample(self, node: fx.Node) -> float:
        """Return how much memory a node's value takes for each sample; nothing for constants."""
        kind = self.kinds.get(node)
        return sum(leaf.bytes_per_sample for leaf in kind if isinstance(leaf, Rows)) if isinstance(kind, list) else 0

    # -- running -----------------------------------------------------------------------------------------

    def call(self, node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
        """Compute one node from the values of others; a placeholder is the network's input."""
        return self.inputs[node] if node.op == "placeholder" else super().call(node, value)

    def base(self, keep: set[fx.Node]) -> dict[fx.Node, Any]:
        """Run the network on all samples and return the values of some nodes and of the output."""
        return self._values(self.inputs, keep | {self.output})

    def _values(self, inputs: Mapping[fx.Node, Any], keep: set[fx.Node] | None = None) -> dict[fx.Node, Any]:
        env = dict(inputs)
        frees = last_uses(self.nodes)
        for node in self.nodes:
            if node not in env:
                state = RandomState(self.device) if not self.by_rows else None
                env[node] = self.call(node, env.__getitem__)
                if state is not None and state.changed():
                    self._random[node] = state
            for done in frees.get(node, ()):
                if keep is not None and done not in keep:
                    del env[done]
        return env

    def again(self, node: fx.Node) -> None:
        """Put the random state to where it was before a node of the base pass that draws numbers."""
        if node in self._random:
            self._random[node].restore()

    def in_rows(self, node: fx.Node, kept: Mapping[fx.Node, Any], rows: Tensor) -> Any:
        """Return a node's value of the base pass for chosen samples, or the size it would have."""
        kind = self.kinds[node]
        if kind == "sizes":
            return self.call(node, lambda before: self._sized(before, kept, rows))
        return _mapped(kept[node], kind, lambda leaf, how: take_rows(leaf, rows, how.per_sample))

    def needed(self, node: fx.Node) -> set[fx.Node]:
        """Return the nodes whose base values `in_rows` reads for a node."""
        if self.kinds[node] != "sizes":
            return {node}
        before = {n for n in node.all_input_nodes if not isinstance(self.kinds[n], list)}
        return set().union(*(self.needed(n) for n in before)) if before else set()

    def _sized(self, node: fx.Node, kept: Mapping[fx.Node, Any], rows: Tensor) -> Any:
        kind = self.kinds[node]
        if not isinstance(kind, list):
            return self.in_rows(node, kept, rows)
        shapes = [torch.empty((how.per_sample * len(rows), *how.rest), device="meta") for how in kind]
        return shapes[0] if len(shapes) == 1 else tuple(shapes)


def take_rows(x: Tensor, rows: Tensor, per_sample: int) -> Tensor:
    """Return the rows of some samples, as a tensor of its own, in the memory format that it had."""
    if per_sample > 1:
        return take_rows(x.unflatten(0, (-1, per_sample)), rows, 1).flatten(0, 1)
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
    return x.index_select(0, rows)


def _channels_last(value: Any) -> Any:
    fits = isinstance(value, Tensor) and value.dim() == 4
    return value.contiguous(memory_format=torch.channels_last) if fits else value


def _convolution_channels_last(layer: nn.Conv2d) -> nn.Conv2d:
    """Return a convolution with its weight in channels-last form; the layer itself stays as it is."""
    other = copy.copy(layer)
    other._parameters = {name: _channels_last(tensor) for name, tensor in layer._parameters.items()}
    return other


def tolerance(x: Tensor) -> float:
    """Return by how much two ways of computing the same may differ, relative to the largest number."""
    coarse = x.is_cuda and x.dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    return 0.01 if coarse else {torch.float64: 1e-8, torch.float32: 1e-4}.get(x.dtype, 0.05)


def leaves(value: Any) -> list[Any]:
    """Return what is in nested tuples, lists and dicts."""
    found: list[Any] = []
    map_aggregate(value, found.append)
    return found


def _kind(two: list[Any], three: list[Any], asks_size: bool) -> Any:
    """Return `"const"`, `"sizes"`, or how each leaf follows the samples; None when a row is not a sample's own."""
    if len(two) != len(three):
        return None
    tensors = [isinstance(a, Tensor) for a in two]
    if not any(tensors):
        if all(a is b or a == b for a, b in zip(two, three, strict=True)):
            return "const"
        return "sizes" if asks_size and all(isinstance(a, int) for a in two) else None
    if not all(tensors):
        return None
    if all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(two, three, strict=True)):
        return "const"
    kinds = []
    for a, b in zip(two, three, strict=True):
        per_sample = a.shape[0] // 2 if a.dim() > 0 else 0
        if per_sample == 0 or a.shape[0] != 2 * per_sample or b.shape != (3 * per_sample, *a.shape[1:]):
            return None
        kinds.append(Rows(per_sample, tuple(a.shape[1:]), a.numel() * a.element_size() / 2))
    return kinds


def _mapped(value: Any, kind: Any, take: Callable[[Tensor, Rows], Any]) -> Any:
    """Apply a function to every leaf that has rows."""
    if not isinstance(kind, list):
        return value
    leaves = iter(kind)
    return map_aggregate(value, lambda leaf: take(leaf, next(leaves)))  # type: ignore[arg-type]
