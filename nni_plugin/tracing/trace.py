"""Run a network once and take down, operator by operator, which channels meet where.

The run is seen below autograd, where every network is a sequence of the same few dozen operators with all their
arguments, however it was written. Each parameter's axes get atoms, each activation carries the atoms of its
dimensions, and one rule per operator (`operators`) relates them. An operator without a rule fixes whatever it touches:
what is not understood is left whole, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from nni_plugin.cost import call, tensors_in
from nni_plugin.flow import Step
from nni_plugin.tensors import NORMS, kind_of, places_of
from nni_plugin.tracing.labels import NONE, Block, Labels
from nni_plugin.tracing.ledger import Atoms, Ledger
from nni_plugin.tracing.records import Boundary, Call, SizeNote, Value


class Trace(TorchDispatchMode):
    """Takes down one forward pass.

    Args:
        model: The network, in eval mode.
        rule_of: Gives an operator's rule, or None.

    Attributes:
        ledger: How atoms relate.
        axes: Atoms of each axis of each layer that was used, by `(layer, "out" or "in")`.
        parameters: Atoms of each dimension of each bare parameter that was used, by `(name, dim)`.
        steps: Every operator in the order of the run.
        sizes: Numbers that operators got as sizes of channels.
        statistics: Over which atoms modules take a statistic, by module.
        calls: Of every module the first call.
        order: Names of layers and bare parameters in the order of use.
        folds: Axes of grouped convolutions, by the first atom of the folded form in which their weight holds them.
        stacked: First atoms of the stand-ins along dimensions that tensors were stacked along.
        shape_before: Shape of the running operator's first tensor before it ran, in place or not.
    """

    def __init__(self, model: nn.Module, rule_of: Callable[[Any], Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.rule_of = model, rule_of
        self.ledger = Ledger()
        self.axes: dict[tuple[str, str], Atoms] = {}
        self.parameters: dict[tuple[str, int], Atoms] = {}
        self.steps: list[Step] = []
        self.sizes: list[SizeNote] = []
        self.statistics: dict[str, list[Atoms]] = {}
        self.calls: dict[str, Call] = {}
        self.order: list[str] = []
        self.folds: dict[int, Atoms] = {}
        self.stacked: set[int] = set()
        self.shape_before: list[int] = []
        self._modules = dict(model.named_modules())
        self._running: list[str] = [""]
        self._values: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._named: dict[int, list[str]] = {}
        for name, tensor in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ):
            if name.rpartition(".")[0] in self._modules:  # a module known by two names is one module
                self._named.setdefault(id(tensor), []).append(name)
        self._sharing: dict[str, set[str]] = {}
        for names in self._named.values():
            paths = {name.rpartition(".")[0] for name in names}
            for path in paths:
                self._sharing.setdefault(path, set()).update(paths)

    # -- running ---------------------------------------------------------------------------------------------

    def run(self, inputs: Any) -> Any:
        """Run the network on inputs and return what it returns."""
        for tensor in tensors_in(inputs):
            self._values[tensor] = Value(self._of_input(tensor), self._step("input", [], None))
        hooks = []
        for name, module in self._modules.items():
            if not isinstance(module, torch.jit.ScriptModule):  # these take no hooks; what they do is their caller's
                hooks.append(module.register_forward_pre_hook(self._entered(name), prepend=True, with_kwargs=True))
                hooks.append(module.register_forward_hook(self._left(name), always_call=True))
        try:
            with self:
                return call(self.model, inputs)
        finally:
            for hook in hooks:
                hook.remove()

    def run_as_trained(self, inputs: Any) -> Any:
        """Run once more what is only run in training, such as an auxiliary classifier; the steps stay those in use.

        Normalisations keep using their statistics, so that these stay as they are.
        """
        steps, modes = self.steps, {module: module.training for module in self._modules.values()}
        self.steps = []
        try:
            for module in self._modules.values():
                module.training = not isinstance(module, (*NORMS, nn.modules.dropout._DropoutNd))
            return self.run(inputs)
        finally:
            self.steps = steps
            for module, training in modes.items():
                module.training = training

    @property
    def unmet(self) -> list[str]:
        """Names of the parameters that were not used yet."""
        return [name for name, parameter in self.model.named_parameters() if parameter not in self._values]

    def _of_input(self, tensor: Tensor) -> Labels:
        """Return that an input's channels (dimension 1) are given."""
        if tensor.dim() < 2 or tensor.shape[1] == 1 or not tensor.is_floating_point():
            return NONE
        atoms = self.ledger.new(tensor.shape[1])
        self.ledger.fix(atoms, "its channels meet the network's input")
        return Labels((Block.line(1, atoms),))

    def _entered(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, keywords: Any) -> None:
            self._running.append(name)
            if name not in self.calls:
                self.calls[name] = Call(self._boundaries([*inputs, *keywords.values()]))

        return hook

    def _left(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self._running.pop()
            self.calls[name].leaving = self.calls[name].leaving or self._boundaries(output)

        return hook

    def _boundaries(self, values: Any) -> list[Boundary]:
        tensors = tensors_in(values)
        if not tensors:
            return []
        labels = self.value(tensors[0]).labels
        return [Boundary(dim, atoms) for b in labels.blocks for dim, atoms in zip(b.dims, b.along, strict=True)]

    @property
    def module(self) -> str:
        """Name of the innermost module that is running."""
        return self._running[-1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and take it down."""
        kwargs = kwargs or {}
        inputs = tensors_in([*args, *kwargs.values()])
        self.shape_before = list(inputs[0].shape) if inputs and not inputs[0].is_nested else []
        result = func(*args, **kwargs)
        name = str(func).rpartition(".")[0]
        outputs = tensors_in(result)
        if not outputs and not func._schema.is_mutable:
            return result
        values = [self.value(tensor) for tensor in inputs]
        # Nested tensors have no positions along all dimensions.
        rule = None if any(tensor.is_nested for tensor in (*inputs, *outputs)) else self.rule_of(func)
        labels = []
        if rule is not None and outputs:
            labels = self._labelled(rule(self, func, args, kwargs, outputs), outputs)
        if not labels:
            labels = [NONE] * len(outputs)
            for value in values:
                for block in value.labels.blocks:
                    self.ledger.fix(block.atoms, f"operator {name} in {self.module!r} is not followed")
        steps = list(dict.fromkeys(value.step for value in values if value.step is not None))
        owners = {value.owner for value in values if value.owner is not None}
        owner = next(iter(owners)) if len(owners) == 1 else None
        if owners and owners <= self._sharing.get(self.module, set()):
            owner = self.module  # of several layers that share a weight the one that runs
        step = None
        if steps or len(owners) > 1:
            step = self._step(name, steps, owner)
            step.reads = [block.atoms for value in values for block in value.labels.blocks]
            step.writes = [block.atoms for label in labels for block in label.blocks]
            owner = None
        in_place = inputs and outputs and outputs[0] is inputs[0] and torch.Tag.inplace_view not in func.tags
        if in_place and outputs[0]._base is not None:
            self._written_through(outputs[0], values[0].labels, labels[0], step)
        for tensor, label in zip(outputs, labels, strict=True):
            self._values[tensor] = Value(label, step, owner)
        return result

    def _labelled(self, found: Labels | Iterable[Labels], outputs: list[Tensor]) -> list[Labels]:
        """Return the labels of each output; none at all where a rule speaks of positions that are not there."""
        labels = [found] if isinstance(found, Labels) else list(found)
        labels += [NONE] * (len(outputs) - len(labels))
        for label, tensor in zip(labels, outputs, strict=True):
            for block in label.blocks:
                if block.dims[-1] >= tensor.dim() or any(
                    tensor.shape[dim] != len(along) for dim, along in zip(block.dims, block.along, strict=True)
                ):
                    return []
        return labels

    def _written_through(self, view: Tensor, before: Labels, after: Labels, step: Step | None) -> None:
        """Take down that an operator which works in place changed the tensor that its target is a view of."""
        base: Tensor = view._base  # type: ignore[assignment]
        known = self.value(base)
        blocks = list(known.labels.blocks)
        for block in after.blocks:
            if all(before.at(dim) is not None for dim in block.dims):
                continue
            fits = base.dim() == view.dim() and all(base.shape[dim] == view.shape[dim] for dim in block.dims)
            if fits and known.labels.free.issuperset(block.dims):
                blocks.append(block)  # a constant that is being filled, as padding does
            else:
                self.fix(block.atoms, "is written into a part of a tensor")
        if step is not None:
            sources = [step] if known.step is None else [known.step, step]
            step = self._step("written", sources, None)
            step.reads = [block.atoms for labels in (known.labels, after) for block in labels.blocks]
            step.writes = [block.atoms for block in blocks]
        self._values[base] = Value(Labels(tuple(blocks)), step or known.step)

    def _step(self, name: str, inputs: list[Step], layer: str | None) -> Step:
        kind = "" if layer is None else kind_of(self._modules[layer])
        step = Step(name, self.module, layer, kind, inputs)
        for source in inputs:
            source.outputs.append(step)
        self.steps.append(step)
        return step

    # -- what rules ask ----------------------------------------------------------------------------------------

    def value(self, tensor: Tensor) -> Value:
        """Return what is known of a tensor; a parameter is met for the first time here."""
        found = self._values.get(tensor)
        if found is None:
            found = self._first_met(tensor)
            self._values[tensor] = found
        return found  # type: ignore[no-any-return]

    def labels(self, value: Any) -> Labels:
        """Return the labels of an argument; of what is no tensor none."""
        return self.value(value).labels if isinstance(value, Tensor) else NONE

    def same(self, one: Labels, a: int, other: Labels, b: int, sizes: tuple[int, int]) -> None:
        """Note that dimension `a` of one tensor meets `b` of another, position by position."""
        if 1 in sizes or a in one.free or b in other.free:
            return
        left, right = one.at(a), other.at(b)
        if left is not None and right is not None:
            self.ledger.same(left, right)
        elif left is not None or right is not None:
            self.fix(left if left is not None else right, "meets a fixed size")

    def fix(self, atoms: Atoms | None, what: str) -> None:
        """Note that atoms must stay."""
        if atoms is not None:
            self.ledger.fix(atoms, f"it {what} in module {self.module!r}")

    def note_size(self, atoms: Atoms | None, *, passed_on: bool = False) -> None:
        """Note that an operator got the number of these atoms as a size."""
        if atoms is not None:
            self.sizes.append(SizeNote(self.module, atoms, passed_on))

    def note_statistic(self, atoms: Atoms | None, operator: str) -> None:
        """Note that the running module takes a statistic over these atoms, which changes when one leaves.

        Only of a module without layers of its own: a comparison with zeros in place of what left (`verify`) takes such
        a module as it is, and must not pass over layers. A length is exempt: zeros add nothing to it.
        """
        if atoms is None:
            return
        module = self._modules[self.module]
        if self.module and not any(True for child in module.children() for _ in child.parameters()):
            self.statistics.setdefault(self.module, []).append(atoms)
        elif operator not in ("linalg_vector_norm", "norm"):
            self.fix(atoms, f"enters a statistic ({operator}) beside layers")

    def norm_axis(self) -> Atoms | None:
        """Return the channels of the running layer where it is a normalisation, with parameters or without."""
        layer = self._modules[self.module]
        return self._axis(self.module, "out") if isinstance(layer, NORMS) and kind_of(layer) == "norm" else None

    def in_axis(self, folded: Atoms, size: int) -> Atoms | None:
        """Return the axis that a grouped convolution's weight holds folded, where the weight is a layer's own."""
        axis = self.folds.get(int(folded[0])) if len(folded) else None
        return axis if axis is not None and len(axis) == size else None

    # -- parameters --------------------------------------------------------------------------------------------

    def _first_met(self, tensor: Tensor) -> Value:
        names = self._named.get(id(tensor))
        if names is None:
            return Value()
        blocks: dict[int, Atoms] = {}
        for name in reversed(names):  # layers that share a weight share its channels; the first one is left in charge
            path, _, leaf = name.rpartition(".")
            layer = self._modules[path]
            kind = kind_of(layer)
            for axis in ("out", "in") if kind == "dense" else ("out",) if kind else ():
                for place in places_of(layer, axis):
                    if place.tensor == leaf:
                        atoms = self._place(path, axis, place.period)
                        if place.dim in blocks:
                            self.ledger.same(atoms, blocks[place.dim])
                        blocks[place.dim] = atoms
        if blocks or (kind and not isinstance(tensor, nn.Parameter)):
            lines = tuple(Block.line(dim, atoms) for dim, atoms in sorted(blocks.items()) if len(atoms) > 1)
            return Value(Labels(lines), owner=path)
        if not isinstance(tensor, nn.Parameter):
            return Value()
        if kind and tensor.dim() > 1:
            # A parameter beside a layer's own, such as the gain of a weight-standardised convolution.
            return Value(Labels(tuple(self._bare(name, tensor))), owner=path)
        if name not in self.order:
            self.order.append(name)
        lines = tuple(self._bare(name, tensor))
        step = self._step("parameter", [], None)
        step.layer, step.kind = name, "parameter"
        step.writes = [block.atoms for block in lines]
        if is_odd(layer):
            for block in lines:
                self.ledger.fix(block.atoms, f"layer {path!r} is of a kind that cannot be cut")
        return Value(Labels(lines), step)

    def _bare(self, name: str, tensor: Tensor) -> list[Block]:
        lines = []
        for dim, size in enumerate(tensor.shape):
            if size > 1:
                atoms = self.parameters.get((name, dim))
                if atoms is None:
                    atoms = self.parameters[name, dim] = self.ledger.new(size)
                lines.append(Block.line(dim, atoms))
        return lines

    def _place(self, path: str, axis: str, period: int | None) -> Atoms:
        atoms = self._axis(path, axis)
        if period is None:
            return atoms
        folded = self.ledger.new(period)
        self.folds[int(folded[0])] = atoms
        self.ledger.tie(atoms, np.resize(folded, len(atoms)))
        return folded

    def _axis(self, path: str, axis: str) -> Atoms:
        if (path, axis) not in self.axes:
            self.axes[path, axis] = self.ledger.new(_width(self._modules[path], axis))
            if path not in self.order:
                self.order.append(path)
        return self.axes[path, axis]


def _width(layer: nn.Module, axis: str) -> int:
    """Return the number of positions on an axis of a layer."""
    if isinstance(layer, nn.Linear):
        return layer.out_features if axis == "out" else layer.in_features
    if isinstance(layer, nn.modules.conv._ConvNd):
        return layer.out_channels if axis == "out" else layer.in_channels
    if isinstance(layer, nn.LayerNorm):
        return layer.normalized_shape[0]
    if isinstance(layer, nn.GroupNorm):
        return layer.num_channels
    if isinstance(layer, nn.PReLU):
        return layer.num_parameters
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim
    return int(layer.num_features)  # type: ignore[arg-type]


def is_odd(layer: nn.Module) -> bool:
    """Tell whether a layer of torch's own has parameters that only its own code may cut."""
    return type(layer).__module__.startswith("torch.") and not isinstance(layer, (nn.ParameterList, nn.ParameterDict))
