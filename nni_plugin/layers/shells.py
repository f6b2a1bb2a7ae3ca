"""What stays where a module leaves and nothing can move up: an identity, or zeros at the end of a branch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Skip(nn.Module):
    """Gives its first input and ignores the others."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return `x`."""
        return x


class Nothing(nn.Module):
    """Adds nothing: gives zeros of its first input's shape.

    Args:
        extra: How many None follow them in a tuple, as attention gives for its weights; None for zeros alone.
    """

    def __init__(self, extra: int | None = None) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return zeros of the shape of `x`."""
        zeros = torch.zeros_like(x)
        return zeros if self.extra is None else (zeros, *(None,) * self.extra)


def put_shells(model: nn.Module, skips: Iterable[str], nothings: Mapping[str, int | None]) -> Callable[[], None]:
    """Put shells in the places of modules, in place.

    Args:
        model: The network.
        skips: Qualified names of modules that become the identity.
        nothings: Those that give zeros, with their `extra`.

    Returns:
        A function that puts the modules back.
    """
    shells: dict[str, nn.Module] = {name: Skip() for name in skips}
    shells |= {name: Nothing(extra) for name, extra in nothings.items()}
    old = {name: model.get_submodule(name) for name in shells}
    for name, shell in shells.items():
        _put(model, name, shell.train(old[name].training))

    def undo() -> None:
        for name, module in old.items():
            _put(model, name, module)

    return undo


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path)._modules[leaf] = module
