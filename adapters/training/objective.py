"""The training loss, with label smoothing and mixup."""

import torch
from timm.data.mixup import Mixup, mixup_target
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from nni_plugin.adapters.training.config import TrainingConfig
from nni_plugin.adapters.training.evaluate import check_classes, kept_modes


class Objective:
    """Cross-entropy as a run's settings want it.

    Args:
        model: Network to be trained; asked once for its number of classes.
        config: `smoothing` and `mixup` are used.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig) -> None:
        self._model, self._config = model, config
        self._mixup: Mixup | None = None
        self._checked = False
        self._loss: nn.Module = nn.CrossEntropyLoss()
        if config.mixup > 0:
            self._loss = SoftTargetCrossEntropy()
        elif config.smoothing > 0:
            self._loss = LabelSmoothingCrossEntropy(config.smoothing)

    def mix(self, images: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Prepare a minibatch.

        Args:
            images: Shape (N, C, H, W), left unchanged.
            target: Integer labels, shape (N,).

        Returns:
            Images and targets to train on: mixed images with targets of shape (N, classes) under mixup, else
            the arguments.

        Raises:
            TrainingError: Labels of the first minibatch do not fit the model's outputs.
        """
        if not self._checked:
            # One image, without touching batch statistics, tells the number of classes.
            with kept_modes(self._model), torch.no_grad():
                self._model.eval()
                logits = self._model(images[:1])
            check_classes(logits, target)
            self._checked = True
            if self._config.mixup > 0:
                self._mixup = Mixup(
                    mixup_alpha=self._config.mixup,
                    label_smoothing=self._config.smoothing,
                    num_classes=logits.shape[1],
                )
        if self._mixup is None:
            return images, target
        # Mixup writes in place and pairs images, so the odd one of a last minibatch goes unmixed.
        even = len(images) - len(images) % 2
        mixed, soft = self._mixup(images[:even].clone(), target[:even])
        rest = mixup_target(target[even:], self._mixup.num_classes, smoothing=self._config.smoothing)
        return torch.cat([mixed, images[even:]]), torch.cat([soft, rest])

    def __call__(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the scalar loss of logits (N, classes) and what `mix` returned as targets."""
        loss: torch.Tensor = self._loss(logits, target)
        return loss
