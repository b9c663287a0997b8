"""Networks of pictures and vectors whose scaling symmetries were reasoned by hand, as in `_symmetry_cases`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.symmetries._symmetry_case import Labelled, case, vectors


def pictures() -> Tensor:
    """Six of 6 × 6."""
    return torch.randn(6, 3, 6, 6)


def conv(before: int, after: int, stride: int = 1) -> nn.Module:
    """A convolution of 3 × 3 without a bias."""
    return nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)


class _After(nn.Module):
    """The block of ResNet, with ReLU after the sum."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(before, after, after // before), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = conv(after, after), nn.BatchNorm2d(after)
        self.down = (
            nn.Sequential(nn.Conv2d(before, after, 1, stride=2, bias=False), nn.BatchNorm2d(after))
            if after > before
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + (x if self.down is None else self.down(x)))


@case
def resnet() -> Labelled:
    """Post-activation ResNet of two stages; the second starts with a block that downsamples.

    Every convolution is in front of a BatchNorm: units. Inside a block gain and shift of the first BatchNorm go
    through ReLU and a convolution into the second, which takes the factor away: sets. What is added to the stream of a
    stage has to have one factor, which ReLU after the sum hands on. The first stage's stream is read by convolutions in
    front of a BatchNorm (that of its block, those of the next block and of its shortcut): who writes to it, the stem's
    BatchNorm and the last of the block, is one set. The second stage is read by the head: a pair.
    """
    model = nn.Sequential(
        conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), _After(4, 4), _After(4, 8), _After(8, 8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip
    weights = ["0.weight", "4.down.0.weight", *(f"{i}.conv{k}.weight" for i in (3, 4, 5) for k in (1, 2))]
    return Labelled(
        model,
        pictures(),
        *(("unit", weight) for weight in weights),
        *(("set", f"{i}.bn1.weight {i}.bn1.bias") for i in (3, 4, 5)),
        ("set", "1.weight 1.bias 3.bn2.weight 3.bn2.bias"),
        (
            "pair",
            "4.bn2.weight 4.bn2.bias 4.down.1.weight 4.down.1.bias 5.bn2.weight 5.bn2.bias 8.weight^-1",
        ),
    )


class _Before(nn.Module):
    """The block of ResNet v2: BatchNorm, ReLU, convolution, twice; a shortcut starts behind the first ReLU."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(before), conv(before, after, after // before)
        self.bn2, self.conv2 = nn.BatchNorm2d(after), conv(after, after)
        self.down = nn.Conv2d(before, after, 1, stride=2, bias=False) if after > before else None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(x))
        return (x if self.down is None else self.down(y)) + self.conv2(torch.relu(self.bn2(self.conv1(y))))


@case
def preactivation_resnet() -> Labelled:
    """Streams are sums of convolutions here, and every reader starts with a BatchNorm: writers of a stage are a set.

    The first convolution of a block is in front of a BatchNorm, a unit. So gain and shift before it are a set, unless
    a shortcut reads them, too, which writes to the next stream: a pair with that. Gain and shift of the second
    BatchNorm are read by the second convolution: a pair; and so are those of the last with the head.
    """
    model = nn.Sequential(
        conv(3, 4), _Before(4, 4), _Before(4, 8), _Before(8, 8),
        nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip
    return Labelled(
        model,
        pictures(),
        *(("unit", f"{i}.conv1.weight") for i in (1, 2, 3)),
        *(("pair", f"{i}.bn2.weight {i}.bn2.bias {i}.conv2.weight^-1") for i in (1, 2, 3)),
        *(("set", f"{i}.bn1.weight {i}.bn1.bias") for i in (1, 3)),
        ("pair", "2.bn1.weight 2.bn1.bias 2.down.weight^-1"),
        ("set", "0.weight 1.conv2.weight"),
        ("set", "2.down.weight 2.conv2.weight 3.conv2.weight"),
        ("pair", "4.weight 4.bias 8.weight^-1"),
    )


class _Channels(nn.LayerNorm):
    """LayerNorm over the channels of pictures."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class _ConvNeXt(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).movedim(1, -1))
        return x + (self.scale * self.down(F.gelu(self.up(y)))).movedim(-1, 1)


@case
def convnext() -> Labelled:
    """Two stages, of one block and of two, with a LayerNorm and a convolution with stride between them.

    In front of a LayerNorm a convolution and its bias are a set: stem, depthwise. Behind it gain and shift are read by
    the layer up, whose bias stays, as GELU comes next; the layer down with its bias goes against the scale of the
    branch. Who writes to the stream (the stem's norm or the convolution with stride, and the scales) is read by a
    LayerNorm at the end of the stage, which takes any factor, and by depthwise convolutions, whose biases do not have
    it: so their weights go the other way (or their biases the same, which is no shorter). The norm at the end of the
    stage is read by the next convolution, the last one by the head.
    """
    model = nn.Sequential(
        nn.Conv2d(3, 4, 2, stride=2), _Channels(4), _ConvNeXt(4), _Channels(4), nn.Conv2d(4, 8, 2, stride=2),
        _ConvNeXt(8), _ConvNeXt(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 3),
    )  # fmt: skip
    return Labelled(
        model,
        torch.randn(6, 3, 8, 8),
        ("set", "0.weight 0.bias"),
        *(("set", f"{i}.depthwise.weight {i}.depthwise.bias") for i in (2, 5, 6)),
        *(("pair", f"{i}.norm.weight {i}.norm.bias {i}.up.weight^-1") for i in (2, 5, 6)),
        *(("pair", f"{i}.down.weight {i}.down.bias {i}.scale^-1") for i in (2, 5, 6)),
        ("pair", "1.weight 1.bias 2.scale 2.depthwise.weight^-1"),
        ("pair", "3.weight 3.bias 4.weight^-1"),
        ("pair", "4.weight 4.bias 5.scale 5.depthwise.weight^-1 6.scale 6.depthwise.weight^-1"),
        ("pair", "9.weight 9.bias 10.weight^-1"),
    )


@case
def deep_batch_norm_gelu() -> Labelled:
    """GELU bends where gain and shift of BatchNorm say, in every layer: none of them has a factor, nor has the head.

    Weights in front of a BatchNorm are units, in whatever depth; their biases are taken away with the mean.
    """
    layers = [m for size in (5, 6, 6, 6) for m in (nn.Linear(size, 6), nn.BatchNorm1d(6), nn.GELU())]
    units = [("unit", f"{i}.weight") for i in (0, 3, 6, 9)]
    biases = "0.bias 3.bias 6.bias 9.bias"
    return Labelled(nn.Sequential(*layers, nn.Linear(6, 3)), torch.randn(8, 5), *units, inert=biases)


class _Standardized(nn.Conv2d):
    """A convolution whose filters have mean 0 and variance 1, and a gain if one is asked for."""

    def __init__(self, before: int, after: int, *, gain: bool) -> None:
        super().__init__(before, after, 3, padding=1)
        self.gain = nn.Parameter(torch.rand(after, 1, 1, 1) + 0.5) if gain else None

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / torch.sqrt(variance + 1e-5)
        return self._conv_forward(x, weight if self.gain is None else weight * self.gain, self.bias)


def standardized(*, gain: bool) -> nn.Module:
    """Two convolutions, without normalization of what goes through them."""
    first, second = _Standardized(3, 4, gain=gain), _Standardized(4, 6, gain=gain)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


@case
def weight_standardized() -> Labelled:
    """Filters are units. A bias alone has no factor: nothing is added to it that could have the same one."""
    return Labelled(standardized(gain=False), pictures(), ("unit", "0.weight"), ("unit", "2.weight"))


@case
def weight_standardized_gain() -> Labelled:
    """Filters are units. Gain and bias are what a layer's weight and bias are in a ReLU net: against the next gain."""
    return Labelled(
        standardized(gain=True),
        pictures(),
        ("unit", "0.weight"),
        ("unit", "2.weight"),
        ("pair", "0.gain 0.bias 2.gain^-1"),
        ("pair", "2.gain 2.bias 6.weight^-1"),
    )


def gan_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Both losses of a GAN in one, each for its own player: data and noise are the batch."""
    real, noise = batch
    fake = model["generator"](noise)  # type: ignore[operator]
    judge: Any = model["discriminator"]  # type: ignore[operator]
    return F.softplus(-judge(fake)).mean() + (F.softplus(judge(fake.detach())) + F.softplus(-judge(real))).mean()


@case
def gan() -> Labelled:
    """BatchNorm in the generator, spectral norm in the discriminator.

    The generator is the paper's case; what it puts out is compared with data, so its last bias stays. Of the
    discriminator every weight is divided by its largest singular value: units, and no layer can undo what a bias
    would be multiplied by. As nobody but a unit touches both, there is nothing between the two.
    """
    spectral = nn.utils.parametrizations.spectral_norm
    generator = nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5))
    discriminator = nn.Sequential(
        spectral(nn.Linear(5, 6)), nn.LeakyReLU(0.2), spectral(nn.Linear(6, 4)), nn.LeakyReLU(0.2),
        spectral(nn.Linear(4, 1)),
    )  # fmt: skip
    return Labelled(
        nn.ModuleDict({"generator": generator, "discriminator": discriminator}),
        (vectors(), torch.randn(6, 4)),
        ("unit", "generator.0.weight"),
        ("pair", "generator.1.weight generator.1.bias generator.3.weight^-1"),
        *(("unit", f"discriminator.{i}.parametrizations.weight.original") for i in (0, 2, 4)),
        loss=gan_loss,
    )


@case
def group_norm() -> Labelled:
    """GroupNorm takes the mean of several channels, so a bias in front of it stays: it is a set with its weight.

    Gain and shift go through ReLU and the largest of a window, both of which hand a factor on, and are undone in the
    next weight; its bias comes after that.
    """
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(), nn.AdaptiveMaxPool2d(1),
        nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip
    return Labelled(
        model,
        pictures(),
        ("set", "0.weight 0.bias"),
        ("set", "4.weight 4.bias"),
        ("pair", "1.weight 1.bias 4.weight^-1"),
        ("pair", "5.weight 5.bias 9.weight^-1"),
    )
