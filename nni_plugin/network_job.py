"""What every job on a network asks for first: the network, its data and its training, as on the command line."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import KW_ONLY, asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from nni_plugin.adapters.models import create_model
from nni_plugin.adapters.training import TrainingConfig
from nni_plugin.cost import count
from nni_plugin.errors import ModelError

if TYPE_CHECKING:
    from nni_plugin.adapters.data import DataSplits


@dataclass(frozen=True)
class NetworkJob:
    """A network, its data, its training and a folder for results; the fields are the command line's flags.

    Args:
        model: Name of the model in its library.
        output: Folder for the results.
        library: `"timm"`, `"torchvision"` or `"nni_plugin"`.
        model_kwargs: Further arguments of the model's builder.
        checkpoint: Weights to start from.
        pretrained: Start from the library's published weights.
        dataset: See `adapters.data.create_loaders`.
        data_dir: Folder of the data.
        data_kwargs: Further arguments of `create_loaders` (batch size, image size, ...); what a model of timm wants
            pictures to be is in `adapters.models.picture_format`.
        pretrain: Training of the dense network first; its `epochs` may be 0.
        device: Where to run; None takes the best there is.
        seed: Of weights, data order and whatever is drawn; training configurations have their own.
    """

    model: str
    output: Path
    _: KW_ONLY
    library: Literal["timm", "torchvision", "nni_plugin"] = "timm"
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None
    pretrained: bool = False
    dataset: str = "digits"
    data_dir: Path | None = None
    data_kwargs: Mapping[str, Any] = field(default_factory=dict)
    pretrain: TrainingConfig = field(default_factory=lambda: TrainingConfig(epochs=0))
    device: str | None = None
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        """Return what decides the outcome, as JSON values; what a resumed run must share."""
        values = self._values()
        del values["output"], values["pretrain"]["checkpoint_every"]
        # A run may go on with other processes: batches do not depend on their number.
        values["data_kwargs"].pop("num_workers", None)
        settings: dict[str, Any] = json.loads(json.dumps(values, default=str))
        return settings

    def _values(self) -> dict[str, Any]:
        """Return the fields that may decide the outcome, and `output`."""
        return asdict(self)


def is_untrained(job: NetworkJob) -> bool:
    """Tell whether a job's network keeps random weights."""
    return not (job.checkpoint or job.pretrained or job.pretrain.epochs)


def network_of(job: NetworkJob, splits: DataSplits, device: torch.device) -> tuple[nn.Module, Tensor]:
    """Build a job's network for its data; returns it and four images that it has taken.

    Args:
        job: What network.
        splits: The data.
        device: Where the network goes.

    Raises:
        ModelError: There is no such model, its weights do not fit, or it does not take images of this size.
    """
    model = create_model(
        job.model,
        job.library,
        num_classes=splits.num_classes,
        in_chans=splits.input_shape[0],
        pretrained=job.pretrained,
        checkpoint=job.checkpoint,
        **job.model_kwargs,
    ).to(device)
    if is_untrained(job):
        warnings.warn(
            "The network has random weights: give --checkpoint, --pretrained or --pretrain-epochs.", stacklevel=5
        )
    examples: Tensor = next(iter(splits.score))[0][:4].to(device)
    try:
        count(model, examples)
    except ModelError as error:
        shape = " x ".join(str(size) for size in splits.input_shape)
        raise ModelError(f"{job.model} does not take images of {shape}; choose --img-size. {error}") from error
    return model, examples
