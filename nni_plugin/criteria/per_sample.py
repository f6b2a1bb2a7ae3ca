"""Gate gradients of every sample, from one ordinary backward pass.

`E = mean_n E_n`. With a gate `z = 1` on a channel, `dE_n/dz = N sum_positions a dE/da` over the positions of sample
`n`: the layer's output times the gradient that backward brings to it. Nothing is added to the graph, and for a
batch normalisation nothing is kept alive that backward does not keep anyway, since its output is an affine function
of its input: `sum a g = gamma / sigma (sum x g - mu sum g) + beta sum g`.

Cost: two reductions over each watched activation. Memory: one number a sample and channel, and the outputs of
watched layers that are no batch normalisation where the network would have let them go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from nni_plugin.criteria.gates import accumulable
from nni_plugin.errors import CriterionError
from nni_plugin.groups import Member
from nni_plugin.tensors import NORMS


class PerSampleGates:
    """Watches layers while minibatches run; a context manager that leaves nothing behind.

    Args:
        model: The network; its loss must be the mean over the samples of a minibatch, its first tensor input hold
            one sample a row.
        members: The layers to watch: outputs of `axis="out"`, inputs of `axis="in"`; no bare parameters.

    Raises:
        CriterionError: A member is a bare parameter, whose output no hook can see.
    """

    def __init__(self, model: nn.Module, members: Sequence[Member]) -> None:
        self.model, self.members = model, list(members)
        for member in self.members:
            if member.kind == "parameter":
                raise CriterionError(f"{member.path!r} is a bare parameter: gradients per sample cannot be seen there.")
        self._stack = ExitStack()
        self._samples = 0
        self._terms: list[Tensor | None] = [None] * len(self.members)
        # Outputs that the next layer overwrites must be copied; which those are shows on the first pass.
        self._copy = [True] * len(self.members)

    def __enter__(self) -> PerSampleGates:
        """Put the hooks on."""
        with ExitStack() as stack:
            stack.callback(self.model.register_forward_pre_hook(self._begin(), with_kwargs=True).remove)
            for i, member in enumerate(self.members):
                for handle in self._watch(i, member, self.model.get_submodule(member.path)):
                    stack.callback(handle.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Take every hook off."""
        self._stack.close()
        self._terms = [None] * len(self.members)

    def take(self) -> list[Tensor]:
        """Return the gate gradients of the last minibatch, and forget them.

        Returns:
            For each member `dE_n/dz` of its positions, shape `[N, positions]`, float32 or float64.

        Raises:
            CriterionError: A layer was not reached by a forward and a backward pass.
        """
        terms, self._terms = self._terms, [None] * len(self.members)
        found = []
        for member, term in zip(self.members, terms, strict=True):
            if term is None:
                raise CriterionError(
                    f"No gradient came to {member.path!r}: forward and backward must run inside collect(), with "
                    "gradients enabled, and the loss must depend on this layer."
                )
            found.append(term * self._samples)
        return found

    # Hooks are closures over their own layer: a copy of the network shares them, and they ignore it.

    def _begin(self) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module is not self.model or not torch.is_grad_enabled():
                return
            first = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim() > 0), None)
            if first is None:
                raise CriterionError("Gradients per sample need a tensor input whose rows are the samples.")
            self._samples = first.shape[0]
            self._terms = [None] * len(self.members)

        return hook

    def _watch(self, i: int, member: Member, layer: nn.Module) -> list[RemovableHandle]:
        """Hook one layer so that each backward pass adds to the terms of member `i`."""
        if member.axis == "in":

            def on_input(module: nn.Module, args: tuple[Any, ...]) -> Any:
                if module is not layer or not _followed(args[0]):
                    return None
                x = args[0].view_as(args[0])  # a node of its own: the gradient through this reader alone
                value = x.detach()
                x.register_hook(lambda g: self._add(i, _per_row(value, g, _channel_dim(layer, value)), layer))
                return (x, *args[1:])

            return [layer.register_forward_pre_hook(on_input)]
        gate = self._after_batch_norm if isinstance(layer, _BatchNorm) else self._after_any
        inside = next(layer.children(), None) if isinstance(layer, NORMS) else None
        if inside is None:

            def on_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
                if module is layer and _followed(output):
                    gate(i, layer, args[0], output)

            return [layer.register_forward_hook(on_output)]
        # A normalisation with its activation inside (timm's BatchNormAct2d): the gate lies where its child reads.
        inputs: list[Tensor] = []

        def on_enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            if module is layer:
                inputs[:] = args[:1]

        def on_inside(module: nn.Module, args: tuple[Any, ...]) -> None:
            if module is inside and inputs and _followed(args[0]):
                gate(i, layer, inputs.pop(), args[0])

        return [layer.register_forward_pre_hook(on_enter), inside.register_forward_pre_hook(on_inside)]

    def _after_batch_norm(self, i: int, layer: nn.Module, x: Tensor, a: Tensor) -> None:
        assert isinstance(layer, _BatchNorm)
        from_batch = layer.training or layer.running_mean is None or layer.running_var is None
        statistics = None if from_batch else (layer.running_mean, layer.running_var)
        x = x.detach()
        a.register_hook(lambda g: self._add(i, _batch_norm_rows(layer, x, g, statistics), layer))

    def _after_any(self, i: int, layer: nn.Module, x: Tensor, a: Tensor) -> None:
        value, version = a.detach(), a._version
        kept = value.clone() if self._copy[i] else value

        def on_gradient(g: Tensor) -> None:
            changed = value._version != version
            if changed and not self._copy[i]:
                raise CriterionError(f"The output of a {type(layer).__name__} was overwritten now, but not at first.")
            self._copy[i] = changed
            self._add(i, _per_row(kept, g, _channel_dim(layer, kept)), layer)

        a.register_hook(on_gradient)

    def _add(self, i: int, rows: Tensor, layer: nn.Module) -> None:
        samples = self._samples
        if samples == 0 or rows.shape[0] % samples:
            raise CriterionError(
                f"A {type(layer).__name__} saw {rows.shape[0]} rows for {samples} samples: gradients per sample need "
                "the samples in the first dimension throughout."
            )
        term = rows.reshape(samples, -1, rows.shape[-1]).sum(1)  # windows and patches of a sample follow each other
        before = self._terms[i]
        self._terms[i] = term if before is None else before + term


def _per_row(a: Tensor, g: Tensor, dim: int) -> Tensor:
    """Return `sum a g` over all but the first dimension and `dim`, accumulated in float32 or better."""
    product = accumulable(a) * g
    if product.dim() == 2:
        return product
    return product.movedim(dim, 1).flatten(2).sum(2)


def _batch_norm_rows(layer: _BatchNorm, x: Tensor, g: Tensor, statistics: tuple[Any, Any] | None) -> Tensor:
    """Return `sum a g` of a batch normalisation from its input; `statistics` are the batch's own when None."""
    x, g = accumulable(x), accumulable(g)
    if statistics is None:
        var, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
    else:
        mean, var = statistics
    sum_g = g if g.dim() == 2 else g.flatten(2).sum(2)
    rows = (_per_row(x, g, 1) - mean * sum_g) * (var + layer.eps).rsqrt()
    if layer.weight is not None:
        rows = rows * layer.weight.detach()
    if layer.bias is not None:
        rows = rows + layer.bias.detach() * sum_g
    return rows


def _channel_dim(layer: nn.Module, a: Tensor) -> int:
    """Return the dimension of an input or output of a layer that holds its channels."""
    if isinstance(layer, nn.Linear):
        return -1
    if isinstance(layer, nn.LayerNorm):
        width = layer.normalized_shape[0]
        first = a.dim() == 4 and a.shape[1] == width and (a.shape[-1] != width or "2d" in type(layer).__name__)
        return 1 if first else -1
    return 1



def _followed(a: Tensor) -> bool:
    """Tell whether a backward pass will come to a tensor."""
    return torch.is_grad_enabled() and a.requires_grad
