"""What the CIFAR networks share: checked arguments, scaled widths, initial weights."""

from torch import nn

from nni_plugin.errors import ModelError


def check_arguments(num_classes: int, in_chans: int, width_mult: float) -> None:
    """Refuse sizes that no network can have.

    Raises:
        ModelError: If `num_classes` or `in_chans` is below 1, or `width_mult` is not above 0.
    """
    if num_classes < 1 or in_chans < 1:
        raise ModelError(
            f"Expected num_classes >= 1 and in_chans >= 1, got num_classes={num_classes}, in_chans={in_chans}."
        )
    if not 0 < width_mult < float("inf"):
        raise ModelError(f"Expected a width_mult above 0, got {width_mult}.")


def scaled(channels: int, width_mult: float) -> int:
    """Channels of a layer in a network `width_mult` times as wide, at least 1."""
    return max(1, round(channels * width_mult))


def initialise(model: nn.Module) -> None:
    """He initialisation for convolutions, unit gates for BN, small normal weights for the classifier."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
