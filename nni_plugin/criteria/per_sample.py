"""Gate gradients of every sample, from one ordinary backward pass.

`E = mean_n E_n`. With a gate `z = 1` on a channel, `dE_n/dz = N sum_positions a dE/da` over the positions of sample
`n`: the layer's output times the gradient that backward brings to it. No gate is added to the graph, and for a batch
normalisation nothing is kept alive that backward does not keep anyway, since its output is an affine function of its
input: `sum a g = gamma / sigma (sum x g - mu sum g) + beta sum g`. Other activations that the network overwrites in
place are handed on as copies; which these are shows on the first forward pass, which is then run once more.

Where samples meet, in the statistics of a batch normalisation in train mode, `dE_n/dz` is the gradient of `N E` with
respect to a gate on sample `n` alone.

Cost: two reductions over each watched activation. Memory: one number a sample and channel, and the outputs of
watched layers that are no batch normalisation where the network would have let them go. Activation checkpointing
gives the same numbers; its reentrant form alone still saves the memory of watched layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from nni_plugin.cost import tensors_in
from nni_plugin.criteria.gates import accumulable
from nni_plugin.criteria.rerun import Rerun
from nni_plugin.errors import CriterionError
from nni_plugin.groups import Member
from nni_plugin.sample_rows import check_rows, in_doubt
from nni_plugin.tensors import NORMS

Reduction = Literal["sum", "mean", "mean-abs"]


class PerSampleGates:
    """Watches layers while minibatches run; a context manager that leaves nothing behind.

    Args:
        model: The network; its loss must be the mean over the samples of a minibatch, its first tensor input hold
            one sample a row, and so must every watched activation, or windows of samples one after the other.
        members: The layers to watch: outputs of `axis="out"`, inputs of `axis="in"`; no bare parameters. One without
            positions (`index` is empty) may stay without a gradient: its term is then empty.

    Attributes:
        reduction: What is made of `a dE/da` over the positions of a sample: `"sum"`, the gate's gradient; `"mean"`;
            `"mean-abs"`, the mean of absolute values. Terms of a layer called twice are added. Read by the hooks.

    Raises:
        CriterionError: A member is a bare parameter, whose output no hook can see.
    """

    def __init__(self, model: nn.Module, members: Sequence[Member]) -> None:
        self.model, self.members = model, list(members)
        for member in self.members:
            if member.kind == "parameter":
                raise CriterionError(f"{member.path!r} is a bare parameter: gradients per sample cannot be seen there.")
        self.reduction: Reduction = "sum"
        self._stack = ExitStack()
        self._samples = 0
        self._call: tuple[Any, Any] = (), {}
        self._doubtful: dict[str, bool] = {}  # by layer: whether its rows have to be looked at still
        self._terms: list[Tensor | None] = [None] * len(self.members)
        # What the next layer overwrites must be copied; where that happens shows on the first pass.
        self._overwritten: list[bool | None] = [None] * len(self.members)
        self._rerun: Rerun | None = None
        self._tried = False
        self._watched: list[tuple[int, Tensor, int]] = []

    def __enter__(self) -> PerSampleGates:
        """Put the hooks on."""
        with ExitStack() as stack:
            stack.callback(self.model.register_forward_pre_hook(self._begin(), with_kwargs=True).remove)
            # Before the hooks of others, which see the output that counts.
            end = self.model.register_forward_hook(self._end(), with_kwargs=True, prepend=True)
            stack.callback(end.remove)
            for i, member in enumerate(self.members):
                for handle in self._watch(i, member, self.model.get_submodule(member.path)):
                    stack.callback(handle.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Take every hook off."""
        self._stack.close()
        self._terms = [None] * len(self.members)
        self._rerun, self._watched, self._call = None, [], ((), {})

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
            if term is None and member.index.numel():
                raise CriterionError(
                    f"No gradient came to {member.path!r}: forward and backward must run inside collect(), with "
                    "gradients enabled, the loss must depend on this layer, the layer must be called as such, and "
                    "it or a layer before it must have requires_grad (it may be frozen)."
                )
            if term is None:
                parameter = next(self.model.parameters())
                term = torch.empty(self._samples, 0, device=parameter.device)
            found.append(term * self._samples)
        return found

    # Hooks are closures over their own layer: a copy of the network shares them, and they ignore it.

    def _begin(self) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module is not self.model:
                return
            self._rerun = None
            if not torch.is_grad_enabled():
                return
            given = tensors_in([args, kwargs])
            first = next((tensor for tensor in given if tensor.dim() > 0), None)
            if first is None:
                raise CriterionError("Gradients per sample need a tensor input whose rows are the samples.")
            self._samples, self._call = first.shape[0], (args, kwargs)
            self._terms = [None] * len(self.members)
            self._watched = []
            if not self._tried:
                self._rerun = Rerun(module, given)

        return hook

    def _end(self) -> Callable[..., Any]:
        """After the first forward pass it is known what is overwritten: if anything is, run it again on copies."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            rerun, self._rerun = self._rerun, None
            if module is not self.model:
                return None
            call, self._call = self._call, ((), {})
            if open_doubts := [path for path, doubtful in self._doubtful.items() if doubtful]:
                check_rows(module, *call, open_doubts)
                self._doubtful.update(dict.fromkeys(open_doubts, False))
            if rerun is None:
                return None
            self._tried = True
            given = {tensor.untyped_storage().data_ptr() for tensor in tensors_in(output)}  # to be written into later
            for i, watched, version in self._watched:
                written = watched._version != version or watched.untyped_storage().data_ptr() in given
                self._overwritten[i] = bool(self._overwritten[i]) or written
            self._watched = []
            return rerun.run(args, kwargs, output) if any(self._overwritten) else None

        return hook

    def _watch(self, i: int, member: Member, layer: nn.Module) -> list[RemovableHandle]:
        """Hook one layer so that each backward pass adds to the terms of member `i`."""
        if member.axis == "in":

            def on_input(module: nn.Module, args: tuple[Any, ...]) -> Any:
                if module is not layer or not args or not _followed(args[0]):
                    return None
                # A node of its own: the gradient through this reader alone.
                x = args[0].clone() if self._copies(i) else args[0].view_as(args[0])
                self._observe(i, layer, x, watched=args[0])
                return (x, *args[1:])

            return [layer.register_forward_pre_hook(on_input)]
        inside = next(layer.children(), None) if isinstance(layer, NORMS) else None
        if inside is None:

            def on_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
                if module is not layer or not _followed(output):
                    return None
                if type(layer).forward is not _BatchNorm.forward or len(args) != 1:
                    return self._observe_and_hand_on(i, layer, output)
                self._observe_batch_norm(i, layer, args[0], output)
                return None

            return [layer.register_forward_hook(on_output)]
        # A normalisation with its activation inside (timm's BatchNormAct2d): the gate lies where its child reads.
        inputs: list[Tensor] = []

        def on_enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            if module is layer:
                inputs[:] = args[:1]

        def on_inside(module: nn.Module, args: tuple[Any, ...]) -> Any:
            x = inputs.pop() if module is inside and inputs else None
            if x is None or not _followed(args[0]):
                return None
            # Statistics of all processes are not to be had from this one's input.
            if not isinstance(layer, _BatchNorm) or isinstance(layer, nn.SyncBatchNorm):
                return (self._observe_and_hand_on(i, layer, args[0]), *args[1:])
            self._observe_batch_norm(i, layer, x, args[0])
            return None

        return [layer.register_forward_pre_hook(on_enter), inside.register_forward_pre_hook(on_inside)]

    def _copies(self, i: int) -> bool:
        """Tell whether what may be overwritten must be handed on as a copy."""
        if self._rerun is not None:
            return False  # the first forward pass is the trial of it
        return self._overwritten[i] is not False

    def _observe_and_hand_on(self, i: int, layer: nn.Module, a: Tensor) -> Tensor:
        # Copied, not only kept: the gradient of a view never comes once the view is overwritten.
        handed = a.clone() if self._copies(i) else a
        self._observe(i, layer, a, watched=handed)
        return handed

    def _observe_batch_norm(self, i: int, layer: nn.Module, x: Tensor, a: Tensor) -> None:
        # Autograd itself sees to it that nobody overwrites the input.
        self._observe(i, layer, a, watched=x, value=x, statistics=_statistics_of(layer))

    def _observe(
        self,
        i: int,
        layer: nn.Module,
        a: Tensor,
        *,
        watched: Tensor,
        value: Tensor | None = None,
        statistics: tuple[Tensor | None, Tensor | None] | None = None,
    ) -> None:
        """Await the gradient of an activation.

        Args:
            i: The member.
            layer: Its layer.
            a: The activation.
            watched: What must not be overwritten until then, unless it is a copy.
            value: The activation's value, or the input of the batch normalisation that made it.
            statistics: Mean and variance that this batch normalisation used (None: the batch's own).
        """
        if in_doubt(a.shape, self._samples, _channel_dim(layer, a)):
            self._doubtful.setdefault(self.members[i].path, True)
        copied = value is None and self._copies(i)
        kept, watched = (a if value is None else value).detach(), watched.detach()
        version = watched._version
        if self._rerun is not None and value is None:
            self._watched.append((i, watched, version))

        def on_gradient(g: Tensor) -> None:
            overwritten = watched._version != version
            self._overwritten[i] = bool(self._overwritten[i]) or overwritten
            if overwritten and not copied:
                raise CriterionError(
                    f"An activation at {self.members[i].path!r} was overwritten in place, which it was not before. "
                    "From now on it is copied: run this minibatch again."
                )
            x, factor, shift = accumulable(kept), None, None
            if statistics is not None:
                factor, shift = _affine(layer, x, *statistics)
            absolute = self.reduction == "mean-abs"
            self._add(i, layer, *_rows(x, accumulable(g.detach()), _channel_dim(layer, kept), factor, shift, absolute))

        a.register_hook(on_gradient)

    def _add(self, i: int, layer: nn.Module, rows: Tensor, positions: int) -> None:
        samples = self._samples
        if samples == 0:
            raise CriterionError(
                f"{type(self.model).__name__} itself was not called, where samples are counted at its input, or with "
                "an empty minibatch."
            )
        if rows.shape[0] % samples or (isinstance(layer, nn.Embedding) and rows.shape[0] != samples):
            raise CriterionError(
                f"{self.members[i].path!r}, a {type(layer).__name__}, saw {rows.shape[0]} rows for {samples} samples: "
                "gradients per sample need the samples in the first dimension throughout."
            )
        term = rows.reshape(samples, -1, rows.shape[-1]).sum(1)  # windows and patches of a sample follow each other
        if self.reduction != "sum":
            term = term / (positions * (rows.shape[0] // samples))
        before = self._terms[i]
        self._terms[i] = term if before is None else before + term


def _rows(
    x: Tensor, g: Tensor, dim: int, factor: Tensor | None, shift: Tensor | None, absolute: bool
) -> tuple[Tensor, int]:
    """Return `sum a g` over all but the first dimension and `dim`, and over how many positions.

    `a` is `x`, or with a factor `factor x + shift` by channel (dimension 1). With `absolute` the sum of `|a g|`.
    """
    if factor is None or shift is None:
        return _sum(x * g, dim, absolute)
    if absolute:
        shape = (-1, *[1] * (x.dim() - 2))
        return _sum((x * factor.reshape(shape) + shift.reshape(shape)) * g, dim, True)
    (product, positions), (gradient, _) = _sum(x * g, dim), _sum(g, dim)
    return factor * product + shift * gradient, positions


def _sum(product: Tensor, dim: int, absolute: bool = False) -> tuple[Tensor, int]:
    product = product.abs() if absolute else product
    if product.dim() == 2:
        return product, 1
    product = product.movedim(dim, 1).flatten(2)
    return product.sum(2), product.shape[2]


def _statistics_of(layer: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Return the running mean and variance that a batch normalisation has used; None for the batch's own."""
    assert isinstance(layer, _BatchNorm)
    if layer.training or layer.running_mean is None or layer.running_var is None:
        return None, None
    return layer.running_mean, layer.running_var


def _affine(layer: nn.Module, x: Tensor, mean: Tensor | None, var: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the factor and the shift, by channel, that a batch normalisation gave its input."""
    assert isinstance(layer, _BatchNorm)
    if mean is None or var is None:
        var, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
    mean, var = accumulable(mean), accumulable(var)
    factor = (var + layer.eps).rsqrt()
    if layer.weight is not None:
        factor = factor * layer.weight.detach()
    shift = -mean * factor
    return factor, shift if layer.bias is None else shift + layer.bias.detach()


def _channel_dim(layer: nn.Module, a: Tensor) -> int:
    """Return the dimension of an input or output of a layer that holds its channels."""
    if isinstance(layer, (nn.Linear, nn.Embedding)):
        return -1
    if isinstance(layer, nn.LayerNorm):
        width = layer.normalized_shape[0]
        first = a.dim() == 4 and a.shape[1] == width and (a.shape[-1] != width or "2d" in type(layer).__name__)
        return 1 if first else -1
    return 1


def _followed(a: Any) -> bool:
    """Tell whether a backward pass will come to a tensor."""
    return torch.is_grad_enabled() and isinstance(a, Tensor) and a.requires_grad
