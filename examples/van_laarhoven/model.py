"""Four convolutions with BatchNorm, whose learning rate and decay are swept; all else has a fixed recipe."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from examples.van_laarhoven.grid import Cell

MOMENTUM = 0.9
LR_OF_THE_REST = {"sgd": 0.05, "adam": 0.003}
CONSTANT_PART = 0.75
"""Share of the run at the constant learning rate, in which norms are judged; then it falls linearly to 0."""


class ConvNet(nn.Module):
    """Convolutions 3×3 without bias, each with BatchNorm and ReLU; average pooling; a linear head.

    The third one has stride 2, and on images of more than 8×8 pixels the second and the fourth as well.
    """

    def __init__(self, shape: tuple[int, int], widths: Sequence[int]) -> None:
        super().__init__()
        channels, pixels = shape
        strides = (1, 1, 2, 1) if pixels <= 8 else (1, 2, 2, 2)
        blocks = [
            nn.Sequential(nn.Conv2d(a, b, 3, stride, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for (a, b), stride in zip(pairwise((channels, *widths)), strides, strict=True)
        ]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(images).mean(dim=(2, 3)))
        return logits


def make_optimizer(net: nn.Module, cell: Cell) -> torch.optim.Optimizer:
    """The cell's optimizer.

    γ, β and the head are neither swept nor decayed: the head is not scale-invariant, so that its learning rate and
    decay would change the function by themselves.
    """
    swept = [p for p in net.parameters() if p.ndim == 4]
    rest = [p for p in net.parameters() if p.ndim != 4]
    groups = [
        {"params": swept, "lr": cell.lr, "weight_decay": cell.decay},
        {"params": rest, "lr": LR_OF_THE_REST[cell.optimizer]},
    ]
    if cell.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=MOMENTUM, nesterov=True)
    return torch.optim.Adam(groups)  # its decay is the gradient of the penalty, as in the paper


def make_schedule(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """Constant, then linear to 0."""
    return LambdaLR(optimizer, lambda step: min(1.0, (1 - step / steps) / (1 - CONSTANT_PART)))
