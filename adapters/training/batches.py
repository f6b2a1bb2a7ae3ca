"""The order of the training data: fixed by (seed, epoch), and enterable in the middle of an epoch."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from nni_plugin.errors import TrainingError


class EpochBatches:
    """Minibatches of each epoch on the device, each process its share.

    At the start of an epoch all random generators, also those of the loader and its sampler, are seeded
    from (seed, epoch), and `set_epoch` is called on the sampler, batch sampler and dataset where they have
    it. So any loader repeats its order. Entered in the middle, random augmentation repeats as well if the
    dataset draws it per image from (seed, epoch) rather than from a global generator.

    Args:
        accelerator: The run's Accelerator.
        loader: Training data as (images, integer labels).
        seed: Of the run, >= 0.

    Raises:
        TrainingError: The loader is no `DataLoader`, has no length, or is empty.
    """

    def __init__(self, accelerator: Any, loader: Any, seed: int) -> None:
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            raise TrainingError(
                "expected training data as a torch DataLoader over a dataset with a length, "
                f"got {type(loader).__name__}"
            )
        self._source: DataLoader[Any] = loader
        self._accelerator, self._seed = accelerator, seed
        self._prepared = accelerator.prepare_data_loader(loader)
        if len(self) == 0:
            raise TrainingError("expected training data, got a loader without batches; lower --batch-size")

    def __len__(self) -> int:
        """Return the minibatches of an epoch, for one process."""
        return len(self._prepared)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Iterate over an epoch.

        Args:
            epoch: Index of the epoch, from 0.
            skip: Minibatches to leave out at its start; they are not loaded.

        Yields:
            Images (N, C, H, W) and labels (N,) on the device.
        """
        from accelerate import skip_first_batches
        from accelerate.utils import set_seed

        # Half of the 32-bit range, since each process adds its own index.
        seed = int(np.random.SeedSequence([self._seed, epoch]).generate_state(1)[0]) >> 1
        set_seed(seed, device_specific=True)
        loader: Any = self._source
        parts = [loader, loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)]
        for part in parts:
            generator = getattr(part, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(seed)
        for part in [*parts, loader.dataset]:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        # Accelerate counts epochs itself, from 0 in every process that resumes: tell it the true one.
        self._prepared.set_epoch(epoch)
        entered = skip_first_batches(self._prepared, skip) if skip else self._prepared
        yield from entered
