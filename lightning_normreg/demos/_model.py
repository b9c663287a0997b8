"""Four convolutions, each with BatchNorm: the smallest network in which weight decay sets the learning rate."""

from __future__ import annotations

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_normreg._decay_groups import DecayGroupsMixin


class DemoConvNet(DecayGroupsMixin, LightningModule):
    """Convolutions of 16, 16, 32 and 32 filters with BatchNorm and ReLU, average pooling, a linear head.

    Trained by SGD with Nesterov momentum at a constant learning rate, so that whatever the effective learning rate does
    is the norms' doing. γ, β and biases are not decayed.

    Args:
        lr: Learning rate.
        weight_decay: Decay of the convolutions and of the head.
        momentum: Nesterov momentum.
    """

    def __init__(self, lr: float = 0.1, weight_decay: float = 0.01, momentum: float = 0.9) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.weight_decay, self.momentum = lr, weight_decay, momentum
        widths, strides = (1, 16, 16, 32, 32), (1, 1, 2, 1)
        for i, stride in enumerate(strides):
            block = nn.Sequential()
            block.add_module("conv", nn.Conv2d(widths[i], widths[i + 1], 3, stride, padding=1, bias=False))
            block.add_module("norm", nn.BatchNorm2d(widths[i + 1]))
            self.add_module(f"block{i + 1}", block)
        self.head = nn.Linear(widths[-1], 10)
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Logits, shape ``(N, 10)``, of images of shape ``(N, 1, 8, 8)``."""
        for block in (self.block1, self.block2, self.block3, self.block4):
            images = torch.relu(block(images))
        logits: Tensor = self.head(images.mean(dim=(2, 3)))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy of a batch."""
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy."""
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("val_accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD on groups in which only convolutions and head decay."""
        groups = self.decay_groups(self.weight_decay)
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=True)
