"""Convolutional networks, labelled by hand as `_case` says."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.symmetries._case import Case, case, cross_entropy, head, images


@case
def batchnorm_cnn_without_bias() -> Case:
    """Each filter is in front of its own BatchNorm channel. Gains and shifts act on the function."""
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), *head(8),
    )  # fmt: skip
    return Case(net, images(), cross_entropy, {"0.weight": "neuron", "3.weight": "neuron"})


@case
def batchnorm_cnn_with_bias() -> Case:
    """The mean takes the conv bias away: it is inert, and filters are invariant without it."""
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), *head(6))
    return Case(net, images(), cross_entropy, {"0.weight": "neuron", "0.bias": "inert"})


@case
def batchnorm_after_relu() -> Case:
    """ReLU is homogeneous, but with a bias inside it the filter only moves along with that bias."""
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.BatchNorm2d(6), *head(6))
    return Case(net, images(), cross_entropy, {"0.weight": "neuron+bias"})


@case
def groupnorm_cnn() -> Case:
    """3 groups of 2 channels share a variance; their biases differ, so they stay after the mean and must go along."""
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(3, 6), nn.ReLU(), *head(6))
    return Case(net, images(), cross_entropy, {"0.weight": "block:2+bias"})


@case
def groupnorm_cnn_without_bias() -> Case:
    """2 groups of 4 channels: blocks of 4 rows."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.GroupNorm(2, 8), nn.ReLU(), *head(8))
    return Case(net, images(), cross_entropy, {"0.weight": "block:4"})


@case
def instance_norm_cnn() -> Case:
    """InstanceNorm is GroupNorm of one channel: rows, and the constant bias vanishes in the mean over space."""
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6, affine=True), nn.ReLU(), *head(6))
    return Case(net, images(), cross_entropy, {"0.weight": "neuron", "0.bias": "inert"})


@case
def depthwise_separable() -> Case:
    """MobileNet: pointwise, depthwise and pointwise convolutions, each in front of a BatchNorm, with ReLU6 after it."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4), *head(4),
    )  # fmt: skip
    return Case(net, images(), cross_entropy, {f"{i}.weight": "neuron" for i in (0, 3, 6)})


@case
def transposed_convolution() -> Case:
    """Its output channels, which BatchNorm normalizes, are dimension 1."""
    net = nn.Sequential(nn.ConvTranspose2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), *head(6))
    return Case(net, images(), cross_entropy, {"0.weight": "neuron", "0.bias": "inert"})


@case
def transposed_convolution_in_groups() -> Case:
    """2 groups: output channel (g, o) is made of rows of group g and column o only."""
    net = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), nn.ReLU(), *head(6))
    return Case(net, images(4), cross_entropy, {"0.weight": "neuron"})


class PreActivationBlock(nn.Module):
    """x + conv2(relu(bn2(conv1(relu(bn1(x))))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Residual block."""
        return x + self.conv2(self.bn2(self.conv1(self.bn1(x).relu())).relu())


@case
def preactivation_resnet() -> Case:
    """conv1 feeds only bn2. Stem and conv2 add up in the stream, which is invariant in them only together."""
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        PreActivationBlock(6),
        PreActivationBlock(6),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        *head(6),
    )
    return Case(net, images(), cross_entropy, {"1.conv1.weight": "neuron", "2.conv1.weight": "neuron"})


class PostNormBlock(nn.Module):
    """relu(x + bn2(conv2(relu(bn1(conv1(x))))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Residual block."""
        return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


@case
def resnet_with_zero_gammas() -> Case:
    """The last gain of the branch starts at zero, which hides the whole branch at that point, but not elsewhere."""
    block = PostNormBlock(6)
    nn.init.zeros_(block.bn2.weight)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), block, *head(6))
    return Case(net, images(), cross_entropy, dict.fromkeys(("0.weight", "3.conv1.weight", "3.conv2.weight"), "neuron"))


@case
def frozen_batchnorm() -> Case:
    """In eval mode BatchNorm is an affine map by constants: nothing is invariant behind it."""
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), *head(6))
    net[1].eval()
    return Case(net, images(), cross_entropy, {})


@case
def activation_checkpointing() -> Case:
    """Recomputing the block in the backward pass changes nothing about what is invariant."""
    inner = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.GroupNorm(3, 6), nn.ReLU())

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = inner, nn.Sequential(*head(6))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.inner, x, use_reentrant=False))

    return Case(Checkpointed(), images(), cross_entropy, {"inner.0.weight": "block:2"})
