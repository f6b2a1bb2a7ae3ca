"""What the study of joint removal compares: methods, forms of ours that show what matters, and what follows a cut."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nni_plugin.criteria import OBS, Criterion, TaylorFisher

REGIMES = ("one-shot", "reconstructed", "gradual", "gradual-reconstructed")
METHODS = (
    "obs",
    "taylor-fisher",
    "taylor-fg",
    "taylor-fo",
    "magnitude",
    "bn-scale",
    "geometric-median",
    "random",
    "tp:taylor",
    "tp:taylor-tuned",
    "tp:magnitude",
    "tp:lamp",
    "tp:fpgm",
    "tp:bn-scale",
    "tp:group-norm",
)


class MinibatchOBS(OBS):
    """Optimal Brain Surgeon on the gradients of minibatches of 100 instead of samples: a hundredth of the rows."""

    def _gather(self, model: nn.Module) -> None:
        super()._gather(model)
        self._gradients[-1] = self._gradients[-1].mean(0, keepdim=True)


def own_labels(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the cross-entropy with labels drawn from what the network predicts.

    Its gradients give the true Fisher matrix, the Gauss-Newton matrix of this loss, instead of the empirical one.
    """
    logits = model(batch[0])
    generator = torch.Generator().manual_seed(int(batch[1].sum()))
    drawn = torch.multinomial(logits.detach().softmax(1), 1, generator=generator).flatten()
    return F.cross_entropy(logits, drawn)


VARIANTS: dict[str, Callable[[], Criterion]] = {
    "obs:no-compensation": lambda: OBS(compensate=False),
    "obs:linear": lambda: OBS(linear=True),
    "obs:cost-aware": lambda: OBS(cost_aware=True),
    "obs:damping-.01": lambda: OBS(damping=0.01),
    "obs:damping-.1": lambda: OBS(damping=0.1),
    "obs:damping-1": lambda: OBS(damping=1.0),
    "obs:minibatch": MinibatchOBS,
    "obs:true-fisher": OBS,
    "taylor-fisher:signed": lambda: TaylorFisher(signed=True),
}
"""Further forms by name, for the study of what matters."""

LOSSES = {"obs:true-fisher": own_labels}
"""What they score with, if not cross-entropy with the true labels."""


def rank(method: str) -> int:
    """Return where a method stands in tables."""
    order = [*METHODS, *VARIANTS]
    return order.index(method) if method in order else len(order)
