"""VGG-19 with BN for small images: sixteen 3x3 convolutions and one linear classifier.

Paper: `Very Deep Convolutional Networks for Large-Scale Image Recognition` (Simonyan and Zisserman,
2015), table 1, configuration E. As usual on CIFAR, BN follows every convolution (which then needs no
bias), and one linear layer on the globally averaged map takes the place of the three large ones.
"""

from torch import Tensor, nn

from nni_plugin.networks.layers import check_arguments, initialise, scaled

# Configuration E: (channels, convolutions) of each stage; a 2x2 max pooling ends it, rounding up so that a
# 28x28 image (7, then 4, 2, 1) gets through as well; at 32x32 nothing is rounded.
_STAGES = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))


class VGG(nn.Module):
    """Five stages of convolution, BN and ReLU, each halving the image, then the classifier.

    Args:
        num_classes: Outputs of the classifier.
        in_chans: Channels of the images, which are at least 32x32, or 28x28.
        width_mult: Factor on the paper's widths 64 to 512.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 3, width_mult: float = 1.0) -> None:
        super().__init__()
        check_arguments(num_classes, in_chans, width_mult)
        self.num_classes = num_classes
        layers: list[nn.Module] = []
        previous = in_chans
        for channels, convolutions in _STAGES:
            width = scaled(channels, width_mult)
            for _ in range(convolutions):
                layers += [
                    nn.Conv2d(previous, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                ]
                previous = width
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(previous, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[N, in_chans, H, W]` to logits `[N, num_classes]`."""
        return self.classifier(self.flatten(self.avgpool(self.features(x))))  # type: ignore[no-any-return]


def vgg19_bn(num_classes: int = 10, in_chans: int = 3, width_mult: float = 1.0) -> VGG:
    """VGG-19 with BN: 20.0 M parameters, 398 M MACs at 3x32x32."""
    return VGG(num_classes, in_chans, width_mult)
