"""A pass run once more on the same random numbers, and where it writes into buffers or inputs, from what they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from nni_plugin.cost import tensors_in


class RandomState:
    """The random state of the CPU and of a network's device, to run several passes on the same numbers."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.state = self._now()

    def changed(self) -> bool:
        """Tell whether numbers have been drawn since."""
        return any(not torch.equal(a, b) for a, b in zip(self.state, self._now(), strict=True))

    def restore(self) -> None:
        """Go back to this state."""
        torch.set_rng_state(self.state[0])
        if len(self.state) > 1:
            torch.cuda.set_rng_state(self.state[1], self.device)

    def _now(self) -> list[Tensor]:
        cuda = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return [torch.get_rng_state(), *cuda]


_TOLD: WeakKeyDictionary[nn.Module, list[Callable[[], None]]] = WeakKeyDictionary()


@contextmanager
def told_of_reruns(model: nn.Module, forget: Callable[[], None]) -> Iterator[None]:
    """Call `forget` before a forward pass of a network is run again, for hooks that expect to run once a pass."""
    told = _TOLD.setdefault(model, [])
    told.append(forget)
    try:
        yield
    finally:
        told.remove(forget)


class Rerun:
    """Remembers, before a forward pass, what it takes to run it again with the same result.

    Args:
        model: The network, about to be called.
        inputs: The tensors among its arguments: whatever the pass writes into them is taken back.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[Tensor]) -> None:
        self.model = model
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.random = RandomState(device)
        self.buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        self.inputs = [(tensor, tensor._version, tensor.detach().clone()) for tensor in inputs]

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Run the forward function again, without the network's own hooks.

        Args:
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            output: What the first pass gave: its graph is let go of, so that two never take up memory.

        Returns:
            The new output.
        """
        for tensor in tensors_in(output):
            if tensor.requires_grad and not tensor.is_leaf and not tensor._is_view():
                tensor.detach_()
        self.random.restore()
        for forget in _TOLD.get(self.model, ()):
            forget()
        with torch.no_grad():
            for buffer, value in self.buffers:  # batch normalisations change theirs without a trace
                buffer.copy_(value)
            for tensor, version, value in self.inputs:
                if tensor._version != version:
                    tensor.copy_(value)
        return self.model.forward(*args, **kwargs)
