"""The CIFAR networks of the pruning papers, for 28x28 and 32x32 images, by name."""

from collections.abc import Callable

from torch import nn

from nni_plugin.networks.mobilenetv2 import MobileNetV2, mobilenetv2_cifar
from nni_plugin.networks.resnet import BasicBlock, ResNet, resnet20, resnet56
from nni_plugin.networks.vgg import VGG, vgg19_bn

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "mobilenetv2_cifar": mobilenetv2_cifar,
    "resnet20": resnet20,
    "resnet56": resnet56,
    "vgg19_bn": vgg19_bn,
}

__all__ = [
    "NETWORKS",
    "VGG",
    "BasicBlock",
    "MobileNetV2",
    "ResNet",
    "mobilenetv2_cifar",
    "resnet20",
    "resnet56",
    "vgg19_bn",
]
