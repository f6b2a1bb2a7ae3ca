"""MobileNetV2 for small images: inverted residuals with linear bottlenecks.

Paper: `MobileNetV2: Inverted Residuals and Linear Bottlenecks` (Sandler et al., 2018), table 2. The
layers are the paper's; of its five halvings of the image the first two (the stem's and that of the
24-channel stage) are left out, so that a 32x32 image still has 4x4 positions at the end.
"""

from torch import Tensor, nn

from nni_plugin.networks.layers import check_arguments, initialise, scaled

# Table 2 without the stem and the head: (expansion, channels, blocks, stride of the first block).
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_STEM, _HEAD = 32, 1280


class InvertedResidual(nn.Module):
    """Widen by 1x1, filter each channel by 3x3, narrow by 1x1 without activation; add the input if it fits.

    Args:
        in_channels: Channels that come in.
        channels: Channels that go out.
        expansion: Factor between the input's channels and those of the depthwise filter.
        stride: Stride of the depthwise filter.
    """

    def __init__(self, in_channels: int, channels: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.residual = stride == 1 and in_channels == channels
        self.expand: nn.Module = nn.Identity()
        if expansion != 1:
            self.expand = _convolution(in_channels, hidden, 1)
        self.depthwise = _convolution(hidden, hidden, 3, stride=stride, groups=hidden)
        self.project = nn.Sequential(nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, in_channels, H, W]` to `[N, channels, ceil(H/stride), ceil(W/stride)]`."""
        out: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + out if self.residual else out


class MobileNetV2(nn.Module):
    """A 3x3 stem, seven stages of inverted residuals, a 1x1 head, global average, classifier.

    Args:
        num_classes: Outputs of the classifier.
        in_chans: Channels of the images.
        width_mult: Factor on the paper's widths.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 3, width_mult: float = 1.0) -> None:
        super().__init__()
        check_arguments(num_classes, in_chans, width_mult)
        self.num_classes = num_classes
        previous = scaled(_STEM, width_mult)
        self.stem = _convolution(in_chans, previous, 3)
        blocks: list[nn.Module] = []
        for expansion, channels, count, stride in _STAGES:
            width = scaled(channels, width_mult)
            for index in range(count):
                blocks.append(InvertedResidual(previous, width, expansion, stride if index == 0 else 1))
                previous = width
        self.blocks = nn.Sequential(*blocks)
        head = scaled(_HEAD, width_mult)
        self.head = _convolution(previous, head, 1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(head, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[N, in_chans, H, W]` to logits `[N, num_classes]`."""
        x = self.head(self.blocks(self.stem(x)))
        return self.classifier(self.flatten(self.avgpool(x)))  # type: ignore[no-any-return]


def _convolution(in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, BN and ReLU6."""
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU6(inplace=True),
    )


def mobilenetv2_cifar(num_classes: int = 10, in_chans: int = 3, width_mult: float = 1.0) -> MobileNetV2:
    """MobileNetV2: 2.2 M parameters, 88 M MACs at 3x32x32."""
    return MobileNetV2(num_classes, in_chans, width_mult)
