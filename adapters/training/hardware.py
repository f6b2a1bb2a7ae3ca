"""One Accelerator a run, and the wrapper through which it runs the model."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from nni_plugin.errors import TrainingError


class _Shell(nn.Module):
    """Holds the model, so that Accelerate's patch of `forward` and DDP land here, not on the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Run the model."""
        logits: torch.Tensor = self.model(images)
        return logits


class ParallelModel:
    """The model under autocast and, in several processes, under DDP.

    Args:
        accelerator: The run's Accelerator.
        model: Network on the accelerator's device.
    """

    def __init__(self, accelerator: Any, model: nn.Module) -> None:
        self._accelerator, self._model = accelerator, model
        self._wrap()

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits in float32, shape (N, classes), for images (N, C, H, W)."""
        self._follow_shapes()
        logits: torch.Tensor = self._forward(images)
        return logits

    def _follow_shapes(self) -> None:
        """Wrap the model anew if its parameters have shrunk."""
        # DDP keeps flat buckets of the gradients, cut for the shapes it was built with. Right before a forward
        # pass no graph of the last one is alive, which would hold on to the old shapes as well.
        if self._accelerator.num_processes > 1 and self._shapes != _shapes(self._model):
            del self._forward
            self._accelerator.free_memory()
            self._wrap()

    def _wrap(self) -> None:
        self._shapes = _shapes(self._model)
        self._forward = self._accelerator.prepare_model(_Shell(self._model))


def _shapes(model: nn.Module) -> list[torch.Size]:
    return [parameter.shape for parameter in model.parameters()]


@contextmanager
def own_accelerator(device: torch.device | str | None, amp: str) -> Iterator[Any]:
    """Make an Accelerator for one run; one that the caller may have keeps working afterwards.

    Args:
        device: "cpu", "cuda", "cuda:1" ...; None takes what Accelerate finds.
        amp: Mixed precision, "no", "bf16" or "fp16".

    Yields:
        The `accelerate.Accelerator`.

    Raises:
        TrainingError: The device is not there, or cannot compute in this precision.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    try:
        wanted = None if device is None else torch.device(device)
    except RuntimeError as error:
        raise TrainingError(f"--device: expected a device such as cpu or cuda, got {device!r}") from error
    # Accelerate shares one state among all Accelerators of a process and refuses to change it: set it aside.
    singletons: tuple[Any, ...] = (AcceleratorState, PartialState, GradientState)
    before = [dict(singleton._shared_state) for singleton in singletons]
    try:
        for singleton in singletons:
            singleton._shared_state.clear()
        with _current_gpu(wanted):
            try:
                on_cpu = wanted is not None and wanted.type == "cpu"
                accelerator = Accelerator(cpu=on_cpu, mixed_precision=amp)
            except ValueError as error:
                raise TrainingError(f"--amp {amp} is not possible here: {error}; use bf16 or no") from error
            if amp == "fp16" and accelerator.device.type == "cpu":
                # Accelerate would train in full precision without a word.
                raise TrainingError("--amp fp16 is not possible on the CPU; use bf16 or no")
            if wanted is not None and accelerator.device.type != wanted.type:
                raise TrainingError(f"--device: expected {wanted}, this machine has {accelerator.device}")
            yield accelerator
    finally:
        for singleton, shared in zip(singletons, before, strict=True):
            singleton._shared_state.clear()
            singleton._shared_state.update(shared)


def _current_gpu(device: torch.device | None) -> Any:
    """Return a context in which "cuda" means `device`."""
    if device is None or device.type != "cuda" or device.index is None:
        return nullcontext()
    if device.index >= torch.cuda.device_count():
        raise TrainingError(f"--device: expected one of {torch.cuda.device_count()} GPUs, got {device}")
    return torch.cuda.device(device)
