"""A pass run once more on the same random numbers, and where it changes buffers, from what they were."""

from __future__ import annotations

from typing import Any

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


class Rerun:
    """Remembers, before a forward pass in train mode, what it takes to run it again with the same result.

    Args:
        model: The network, about to be called.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.random = RandomState(device)
        self.buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

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
        with torch.no_grad():
            for buffer, value in self.buffers:
                buffer.copy_(value)
        return self.model.forward(*args, **kwargs)
