"""The paper's models, for pictures of 10 classes, with a base width to scale them down."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

CLASSES = 10


def linear(channels: int, image_size: int, width: int) -> nn.Module:
    """The linear classifier of Fig. 1; `width` is not used."""
    layers = OrderedDict(flatten=nn.Flatten(), fc=nn.Linear(channels * image_size**2, CLASSES))
    return nn.Sequential(layers)


def cnn(channels: int, image_size: int, width: int, *, batch_norm: bool = False) -> nn.Module:
    """Three blocks (3x3 convolution, ReLU, pooling) of 1, 2 and 4 times `width` channels, a linear layer."""
    blocks: OrderedDict[str, nn.Module] = OrderedDict()
    for i in range(3):
        out = width * 2**i
        convolution = nn.Conv2d(channels, out, kernel_size=3, padding=1)
        norm = {"norm": nn.BatchNorm2d(out)} if batch_norm else {}
        blocks[f"block{i + 1}"] = nn.Sequential(
            OrderedDict(conv=convolution, **norm, relu=nn.ReLU(), pool=nn.MaxPool2d(2))
        )
        channels = out
    blocks["flatten"] = nn.Flatten()
    blocks["fc"] = nn.Linear(channels * (image_size // 8) ** 2, CLASSES)
    return nn.Sequential(blocks)


def cnn_bn(channels: int, image_size: int, width: int) -> nn.Module:
    """The same with batch norm after each convolution."""
    return cnn(channels, image_size, width, batch_norm=True)


def vgg16(channels: int, image_size: int, width: int) -> nn.Module:
    """torchvision's VGG-16 features (no batch norm), then one linear layer, as usual for 32x32 pictures."""
    from torchvision.models.vgg import cfgs, make_layers

    scaled = [v if v == "M" else int(v) * width // 64 for v in cfgs["D"]]
    features = make_layers(scaled)
    features[0] = nn.Conv2d(channels, scaled[0], kernel_size=3, padding=1)
    for module in features:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)
    last = [v for v in scaled if v != "M"][-1] * (image_size // 32) ** 2
    return nn.Sequential(OrderedDict(features=features, flatten=nn.Flatten(), fc=nn.Linear(last, CLASSES)))


def resnet18(channels: int, image_size: int, width: int) -> nn.Module:
    """torchvision's ResNet-18 in its form for small pictures."""
    return _resnet((2, 2, 2, 2), channels, width)


def resnet34(channels: int, image_size: int, width: int) -> nn.Module:
    """torchvision's ResNet-34 in its form for small pictures."""
    return _resnet((3, 4, 6, 3), channels, width)


def _resnet(blocks: tuple[int, ...], channels: int, width: int) -> nn.Module:
    from torchvision.models.resnet import BasicBlock, ResNet

    class SmallPictureResNet(ResNet):
        """3x3 stem of stride 1 without pooling (He et al. 2016, Sec. 4.2), channels from `width` on."""

        def __init__(self) -> None:
            super().__init__(BasicBlock, list(blocks), num_classes=CLASSES)
            self.inplanes = width
            self.conv1 = nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.maxpool = nn.Identity()
            for i, count in enumerate(blocks):
                layer = self._make_layer(BasicBlock, width * 2**i, count, stride=1 if i == 0 else 2)
                setattr(self, f"layer{i + 1}", layer)
            self.fc = nn.Linear(width * 8, CLASSES)
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    return SmallPictureResNet()


MODELS = {
    "linear": linear,
    "cnn": cnn,
    "cnn_bn": cnn_bn,
    "vgg16": vgg16,
    "resnet18": resnet18,
    "resnet34": resnet34,
}
"""By name: (channels, image_size, width) -> module."""

SMALLEST = {"linear": 1, "cnn": 8, "cnn_bn": 8, "vgg16": 32, "resnet18": 4, "resnet34": 4}
"""The smallest pictures that each model takes, in pixels."""


def build(name: str, channels: int, image_size: int, width: int, seed: int) -> nn.Module:
    """The model called `name` with weights drawn from `seed`."""
    torch.manual_seed(seed)
    return MODELS[name](channels, image_size, width)


_VGG16_POOLS = (4, 9, 16, 23)  # places in `features`


def block_of(model: str, parameter: str) -> str:
    """The block that a parameter of `model` is in: convolutions up to a pooling, a residual block, a head."""
    first, second = parameter.split(".")[:2]
    if model == "vgg16" and first == "features":
        return f"block{1 + sum(int(second) > pool for pool in _VGG16_POOLS)}"
    if model.startswith("resnet"):
        return {"conv1": "stem", "bn1": "stem", "fc": "fc"}.get(first, f"{first}.{second}")
    return first
