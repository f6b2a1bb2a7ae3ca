"""One forward pass observed: which module was called how often, with what shapes, and who reads its output.

Modules are told by their names, so that what is found on one network holds for every copy of it. Readers are counted
at the place where the output was handed on: all that a later block does with its input is one reader, an addition in
the forward function around the module is another one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from nni_plugin.cost import call, tensors_in
from nni_plugin.tensors import NORMS, kind_of


@dataclass
class CallRecord:
    """What one module did in the forward pass.

    Args:
        count: How often it was called.
        order: When it was first called, among all modules.
        shape: Shape of its first positional input in the last call, None if that is no floating point tensor.
        out: Shape of its output, None if that is neither a tensor nor a tuple of one tensor and nothing else.
        extra: Entries of that tuple behind the tensor; None for a plain tensor.
        readers: The places that read its output.
        ends: Whether its output is one of the network's.
    """

    count: int = 0
    order: int = 0
    shape: tuple[int, ...] | None = None
    out: tuple[int, ...] | None = None
    extra: int | None = None
    readers: set[Any] = field(default_factory=set)
    ends: bool = False

    @property
    def keeps_shape(self) -> bool:
        """Whether input and output are tensors of equal shape."""
        return self.shape is not None and self.shape == self.out


def is_layer(module: nn.Module) -> bool:
    """Tell whether a module is one layer: of a known kind (timm's norms hold their activation), or without parts."""
    if isinstance(module, NORMS) or kind_of(module):
        return True
    parts = {name for name, _ in module.named_children()} - {"parametrizations"}
    return not parts and next(module.parameters(), None) is not None


def main_tensor(output: Any) -> Tensor | None:
    """Return a module's output tensor, also out of a tuple that holds nothing else; None if there is none."""
    if isinstance(output, tuple) and output and all(item is None for item in output[1:]):
        output = output[0]
    return output if isinstance(output, Tensor) else None


def trace(model: nn.Module, example_inputs: Any) -> dict[str, CallRecord]:
    """Run a network once in eval mode and return what each of its modules did, by name.

    Args:
        model: The network; its modes are put back.
        example_inputs: One tensor `[N, ...]`, or a tuple or dict of inputs.

    Returns:
        A record for every module, also for those that were not called.
    """
    records = {name: CallRecord() for name, _ in model.named_modules()}
    with eval_mode(model), torch.no_grad(), _Tracer() as tracer, _watched(model, records, tracer):
        result = call(model, example_inputs)
    for tensor in tensors_in(result):
        for record, _, version in tracer.made.get(tensor, ()):
            if version == tensor._version:
                record.readers.add("output")
                record.ends = True
    return records


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a network into eval mode for a while."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class _Tracer(TorchDispatchMode):
    """Notes which operator reads which module's output, and inside which module calls it runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stack: list[int] = []
        self.made: Any = WeakIdKeyDictionary()
        self.calls = 0
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the readers, then run the operator."""
        self.operators += 1
        for tensor in tensors_in([*args, *(kwargs or {}).values()]):
            for record, stack, version in self.made.get(tensor, ()):
                if version == tensor._version:
                    record.readers.add(self._place(stack))
        return func(*args, **(kwargs or {}))

    def _place(self, stack: tuple[int, ...]) -> tuple[str, int]:
        """Return the first call that is not also around the module that made the tensor, or this operator."""
        depth = 0
        while depth < min(len(stack), len(self.stack)) and stack[depth] == self.stack[depth]:
            depth += 1
        return ("call", self.stack[depth]) if depth < len(self.stack) else ("operator", self.operators)


@contextmanager
def _watched(model: nn.Module, records: dict[str, CallRecord], tracer: _Tracer) -> Iterator[None]:
    def before(record: CallRecord) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            tracer.calls += 1
            record.order = record.order or tracer.calls
            record.count += 1
            value = args[0] if args else None
            record.shape = None
            if isinstance(value, Tensor) and value.is_floating_point():
                record.shape = tuple(value.shape)
            tracer.stack.append(tracer.calls)

        return hook

    def after(record: CallRecord) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            tracer.stack.pop()
            tensor = main_tensor(output)
            record.out = None if tensor is None else tuple(tensor.shape)
            record.extra = len(output) - 1 if tensor is not None and tensor is not output else None
            if tensor is not None:
                tracer.made.setdefault(tensor, []).append((record, tuple(tracer.stack), tensor._version))

        return hook

    hooks = []
    try:
        for name, module in model.named_modules():
            hooks.append(module.register_forward_pre_hook(before(records[name]), prepend=True))
            hooks.append(module.register_forward_hook(after(records[name])))
        yield
    finally:
        for hook in hooks:
            hook.remove()
