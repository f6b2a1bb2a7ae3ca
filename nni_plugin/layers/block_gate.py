"""Gates on whole blocks: how the loss changes when a block fades out.

A gate `z` mixes a block's output `y` with what is there once the block has left: its input `x`, or nothing for a branch
that adds to a stream,

    y + (z - 1) (y - x)   or   y + (z - 1) y,      so that z = 1 is the network and z = 0 the network without the block.

Its gradient `g_n` for sample `n` says, to first order, that the sample's loss changes by `-g_n` when the block leaves,
and with the empirical Fisher for the curvature that the loss changes by `mean_n(-g_n) + 1/2 mean_n(g_n^2)`: the Taylor
criteria of Molchanov et al., CVPR 2019, on one gate a block. Between inner gates and this one lies what a block adds
through its last layer, which removes it whole. Blocks of one network compare in units of the loss, with each other and
with channels.

Cost: a backward pass without gradients of weights, and a block's difference `y - x` kept until then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugin.cost import tensors_in
from nni_plugin.criteria.rerun import told_of_reruns
from nni_plugin.errors import CriterionError
from nni_plugin.layers.base import LayerImportance, LossFn, counted
from nni_plugin.layers.blocks import Block
from nni_plugin.layers.embedding import is_channels_last
from nni_plugin.layers.trace import eval_mode, main_tensor
from nni_plugin.processes import summed
from nni_plugin.sample_rows import check_rows, in_doubt


def block_gate_gradients(
    model: nn.Module,
    blocks: Sequence[Block],
    batches: Iterable[Any],
    loss_fn: LossFn,
) -> Tensor:
    """Return the gradient of every sample's loss with respect to a gate on each block.

    Args:
        model: The network, run in eval mode; its parameters may be frozen, and their gradients stay as they are.
        blocks: The blocks to put gates on; those nested in each other too, each gate as if it were alone.
        batches: Minibatches, gone through once.
        loss_fn: `loss_fn(model, batch)` -> a finite scalar, the mean over the samples of the minibatch.

    Returns:
        `dE_n/dz_b`, float64 on the CPU, shape `[samples, blocks]`, the samples of this process.

    Raises:
        CriterionError: A block changes its input in place, does not run, or the loss is no scalar that depends on it.
        DataError: There is no minibatch.
    """
    rows = []
    with eval_mode(model), torch.enable_grad(), BlockGates(model, blocks) as gates:
        for batch in counted(batches, "to score with"):
            loss = loss_fn(model, batch)
            if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.requires_grad:
                raise CriterionError(f"loss_fn must return a scalar tensor that depends on the network, got {loss}.")
            rows.append(gates.gradients(loss))
    return torch.cat(rows)


class BlockGate(LayerImportance):
    """Mean over samples of the squared gradient of a gate on the block, or the predicted loss change.

    Args:
        signed: Score with the predicted loss change of removing the block, `mean(-g) + 1/2 mean(g^2)`, so that blocks
            whose removal lowers the loss leave first.

    Attributes:
        loss_changes: That prediction by block name, in units of the loss; of the last scoring.
    """

    needs_loss = True

    def __init__(self, signed: bool = False) -> None:
        self.signed = signed
        self.loss_changes: dict[str, float] = {}

    def _score(
        self,
        model: nn.Module,
        example_inputs: Any,
        blocks: Sequence[Block],
        batches: Iterable[Any],
        loss_fn: LossFn | None,
        held_out: Iterable[Any] | None,
    ) -> dict[str, float]:
        assert loss_fn is not None
        rows = block_gate_gradients(model, blocks, batches, loss_fn)
        sums = torch.stack([rows.sum(0), rows.square().sum(0), torch.full((len(blocks),), float(len(rows))).double()])
        sums = summed(sums)
        gradient, squares = sums[0] / sums[2], sums[1] / sums[2]
        changes = (0.5 * squares - gradient).tolist()
        self.loss_changes = {block.name: change for block, change in zip(blocks, changes, strict=True)}
        scores = changes if self.signed else squares.tolist()
        return {block.name: score for block, score in zip(blocks, scores, strict=True)}


class BlockGates:
    """Puts a gate of one on each block, sample by sample; a context manager that leaves nothing behind.

    Args:
        model: The network.
        blocks: The blocks.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block]) -> None:
        self.model, self.blocks = model, blocks
        self._layers = [[m for name in block.members for m in model.get_submodule(name).modules()] for block in blocks]
        self._sure: set[int] = set()  # blocks whose rows are known to be samples
        self._stack = ExitStack()

    def __enter__(self) -> BlockGates:
        self._forget()
        self._stack.enter_context(told_of_reruns(self.model, self._again))
        hooks: list[Any] = [self.model.register_forward_pre_hook(self._count, with_kwargs=True)]
        for i, block in enumerate(self.blocks):
            entry, last = (self.model.get_submodule(block.members[at]) for at in (0, -1))
            hooks.append(entry.register_forward_pre_hook(self._entering(i), with_kwargs=True))
            hooks.append(last.register_forward_hook(self._leaving(i)))
        for hook in hooks:
            self._stack.callback(hook.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._forget()
        self._stack.close()

    def gradients(self, loss: Tensor) -> Tensor:
        """Return the gradients of every sample, `[N, blocks]`, of the forward pass just made; no `.grad` changes."""
        return self._rows(lambda gates: torch.autograd.grad(loss, gates, allow_unused=True))

    def after_backward(self) -> Tensor:
        """Return the same after `loss.backward()`."""
        return self._rows(lambda gates: [gate.grad for gate in gates])

    def _rows(self, read: Callable[[list[Tensor]], Sequence[Tensor | None]]) -> Tensor:
        missed = [block.name for i, block in enumerate(self.blocks) if i not in self._gates]
        if missed:
            raise CriterionError(f"Block {missed[0]!r} did not run in the forward pass; leave it out of the blocks.")
        found = read([self._gates[i] for i in range(len(self.blocks))])
        unused = [block.name for block, gradient in zip(self.blocks, found, strict=True) if gradient is None]
        if unused:
            raise CriterionError(f"The loss does not depend on block {unused[0]!r}; leave it out of the blocks.")
        rows = torch.stack([gradient.double().cpu() for gradient in found if gradient is not None], dim=1)
        rows = rows * self._samples
        self._forget()
        return rows

    def _forget(self) -> None:
        self._samples = 0
        self._call: tuple[Any, Any] = (), {}
        self._gates: dict[int, Tensor] = {}
        self._got: dict[int, tuple[Tensor, int]] = {}

    def _again(self) -> None:
        self._gates, self._got = {}, {}

    def _count(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        if self._gates:
            raise CriterionError("The loss runs the network twice on one minibatch; blocks have one gate a sample.")
        self._samples, self._call = len(tensors_in([*args, *kwargs.values()])[0]), (args, kwargs)

    def _entering(self, i: int) -> Any:
        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            signal = tensors_in([*args, *kwargs.values()])[0]
            self._got[i] = signal, signal._version

        return enter

    def _leaving(self, i: int) -> Any:
        def leave(_: nn.Module, args: Any, output: Any) -> Any:
            name, tensor = self.blocks[i].name, main_tensor(output)
            got, version = self._got.pop(i)
            if i in self._gates:
                raise CriterionError(f"Block {name!r} runs twice in one forward pass; leave it out.")
            if tensor is None or tensor.dim() == 0 or len(tensor) % self._samples:
                raise CriterionError(f"Block {name!r} gives no tensor with a sample a row ({self._samples} samples).")
            last = is_channels_last(self._layers[i], tensor.shape)
            if i not in self._sure and in_doubt(tensor.shape, self._samples, -1 if last else 1):
                check_rows(self.model, *self._call, self.blocks[i].members)
                self._sure.add(i)
            if self.blocks[i].kind == "branch":
                difference = tensor
            elif got._version != version:
                raise CriterionError(f"Block {name!r} changes its input in place, so that it cannot be compared with.")
            else:
                difference = tensor - got
            dtype = torch.promote_types(tensor.dtype, torch.float32)  # sums over positions need it
            gate = self._gates[i] = torch.ones(self._samples, dtype=dtype, device=tensor.device, requires_grad=True)
            spread = gate.repeat_interleave(len(tensor) // self._samples).reshape(-1, *[1] * (tensor.dim() - 1))
            gated = tensor + ((spread - 1) * difference).to(tensor.dtype)
            return gated if tensor is output else (gated, *output[1:])

        return leave
