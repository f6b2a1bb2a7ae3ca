"""The network's signal before and after each block, seen by hooks during ordinary forward passes.

After a block the signal is its output, or what it adds plus what it got, for a branch that adds to a stream. Before
it, the signal is mostly what an earlier block gave: then that is read only once. Which it is shows on the first pass:
the very tensor that came out goes in.

A branch is taken to begin with the stream (or with the norm of it that belongs to the branch alone). Its
output may be a transposed stream; where it is made of windows of the stream, which cannot be added place by place, both
are reduced to their channels' means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from nni_plugin.cost import arguments_of, tensors_in
from nni_plugin.errors import CriterionError
from nni_plugin.layers.blocks import Block
from nni_plugin.layers.embedding import Embedder
from nni_plugin.layers.trace import main_tensor
from nni_plugin.sample_rows import check_rows, in_doubt

Visit = Callable[[int, Tensor], None]
"""Called with the number of a point and the vectors there, `[N, D]`."""


class StreamPoints:
    """Watches the signal after each block, and before it where no block before gave it.

    Args:
        model: The network.
        blocks: The blocks, in forward order.
        target_length: Length that vectors should have.
        stem: Whether the signal before a block that no block precedes is watched as well.

    Attributes:
        before: For each block the point in front of it, None where there is none to be watched; known after the first
            pass. Points `0..len(blocks)-1` lie behind the blocks in their order, further ones in front of some.
        count: Number of points.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block], target_length: int, *, stem: bool) -> None:
        self.model, self.blocks = model, blocks
        self.before: list[int | None] = [None] * len(blocks)
        self.count = len(blocks)
        self._stem = stem
        self._known = False
        self._entries = [model.get_submodule(block.members[0]) for block in blocks]
        self._exits = [model.get_submodule(block.members[-1]) for block in blocks]
        self._embed = []
        for block in blocks:
            layers = [layer for member in block.members for layer in model.get_submodule(member).modules()]
            self._embed.append(Embedder(layers, target_length))
        self._forget()

    @contextmanager
    def watch(self, visit: Visit) -> Iterator[StreamPoints]:
        """Have every point visited during each forward pass inside; no hook stays afterwards.

        Args:
            visit: What takes the vectors.
        """
        self._visit = visit
        with ExitStack() as stack:
            for i in range(len(self.blocks)):
                entry = self._entries[i].register_forward_pre_hook(self._entering(i), with_kwargs=True)
                stack.callback(entry.remove)
                stack.callback(self._exits[i].register_forward_hook(self._leaving(i)).remove)
            yield self

    def expect(self, samples: int, inputs: Any) -> None:
        """Say how many samples the next forward pass will see, and what the network will be called with."""
        self._forget()
        self._samples, self._inputs = samples, inputs

    def check_visited(self) -> None:
        """Check that a forward pass went through every block.

        Raises:
            CriterionError: It missed one.
        """
        self._known = True
        missed = [block.name for i, block in enumerate(self.blocks) if i not in self._left]
        self._forget()
        if missed:
            raise CriterionError(f"Block {missed[0]!r} did not run in the forward pass; leave it out of the blocks.")

    def _forget(self) -> None:
        """Let go of the tensors of a forward pass."""
        self._samples, self._inputs = 0, None
        self._left: set[int] = set()
        self._latest: tuple[Tensor, int, int] | None = None  # the last block's output, its version, its point
        self._got: dict[int, Tensor] = {}

    def _entering(self, i: int) -> Callable[[nn.Module, Any, Any], None]:
        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            signal = next(iter(tensors_in([args, kwargs])), None)
            if signal is None:
                raise CriterionError(f"Block {self.blocks[i].name!r} was given no tensor.")
            if not self._known:
                self.before[i] = self._point_before(signal)
                self._compare_forms(i, signal)
            point = self.before[i]
            own = point if point is not None and point >= len(self.blocks) else None
            if own is not None or self.blocks[i].kind == "branch":
                self._got[i] = self._embed[i](signal, self._samples)
            if own is not None:
                self._visit(own, self._got[i])

        return enter

    def _compare_forms(self, i: int, signal: Tensor) -> None:
        """Have a branch whose output has another form than the stream embedded like the stream."""
        block, embed = self.blocks[i], self._embed[i]
        given, got = tuple(block.shape), tuple(signal.shape[1:])
        if block.kind == "branch" and given != got:
            embed.width = signal.shape[-1 if embed.holds_channels_last(signal) else 1]
            embed.means_only = sorted(given) != sorted(got)  # not transposed only: cut into windows

    def _point_before(self, signal: Tensor) -> int | None:
        if not self._left and not self._stem:
            return None
        if self._latest is not None:
            output, version, point = self._latest
            if output is signal and signal._version == version:
                return point
        self.count += 1
        return self.count - 1

    def _leaving(self, i: int) -> Callable[[nn.Module, Any, Any], None]:
        def leave(_: nn.Module, args: Any, output: Any) -> None:
            if i in self._left:
                raise CriterionError(f"Block {self.blocks[i].name!r} runs twice in one forward pass; leave it out.")
            tensor = main_tensor(output)
            if tensor is None:
                raise CriterionError(f"Block {self.blocks[i].name!r} gives {type(output).__name__}, not one tensor.")
            channels = -1 if self._embed[i].holds_channels_last(tensor) else 1
            if not self._known and in_doubt(tensor.shape, self._samples, channels):
                check_rows(self.model, *arguments_of(self._inputs), self.blocks[i].members)
            vectors = self._embed[i](tensor, self._samples)
            got = self._got.pop(i, None)
            if self.blocks[i].kind == "branch":
                if got is None or got.shape != vectors.shape:
                    raise CriterionError(
                        f"Branch {self.blocks[i].name!r} gives {tuple(tensor.shape)}, which cannot be added to what it "
                        "got: its first member must read the stream."
                    )
                vectors = vectors + got  # pooling is linear: the pooled sum
            else:
                self._latest = tensor, tensor._version, i
            self._left.add(i)
            self._visit(i, vectors)

        return leave
