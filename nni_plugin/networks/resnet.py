"""ResNets for small images: 6n + 2 layers in three stages of 16, 32 and 64 channels.

Paper: `Deep Residual Learning for Image Recognition` (He et al., 2016), section 4.2.

The paper's CIFAR networks widen the identity with zeros when the shape changes (option A), which
fixes which input channel meets which output channel, so that no channel of the two stages could be
removed on its own. Here a shape change is a strided 1x1 convolution with BN (the paper's option B):
every channel of a stage is then one coupled group of its writers, and any of them can go.
"""

from torch import Tensor, nn

from nni_plugin.networks.layers import check_arguments, initialise, scaled


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BN and a shortcut around them.

    Args:
        in_channels: Channels that come in.
        channels: Channels of both convolutions.
        stride: Stride of the first convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, in_channels, H, W]` to `[N, channels, ceil(H/stride), ceil(W/stride)]`."""
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(out + self.downsample(x))  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """A 3x3 stem, three stages of basic blocks (the last two halve the image), global average, classifier.

    Args:
        depth: Blocks in each stage; the network has `6 * depth + 2` weighted layers.
        num_classes: Outputs of the classifier.
        in_chans: Channels of the images.
        width_mult: Factor on the paper's widths 16, 32 and 64.
    """

    def __init__(self, depth: int, num_classes: int = 10, in_chans: int = 3, width_mult: float = 1.0) -> None:
        super().__init__()
        check_arguments(num_classes, in_chans, width_mult)
        narrow, middle, wide = (scaled(channels, width_mult) for channels in (16, 32, 64))
        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(in_chans, narrow, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(narrow)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(narrow, narrow, depth, stride=1)
        self.layer2 = _stage(narrow, middle, depth, stride=2)
        self.layer3 = _stage(middle, wide, depth, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(wide, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[N, in_chans, H, W]` to logits `[N, num_classes]`."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.flatten(self.avgpool(x)))  # type: ignore[no-any-return]


def _stage(in_channels: int, channels: int, depth: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(depth - 1)))


def resnet20(num_classes: int = 10, in_chans: int = 3, width_mult: float = 1.0) -> ResNet:
    """ResNet-20: three blocks a stage; 0.27 M parameters, 41 M MACs at 3x32x32."""
    return ResNet(3, num_classes, in_chans, width_mult)


def resnet56(num_classes: int = 10, in_chans: int = 3, width_mult: float = 1.0) -> ResNet:
    """ResNet-56: nine blocks a stage; 0.86 M parameters, 126 M MACs at 3x32x32."""
    return ResNet(9, num_classes, in_chans, width_mult)
