"""Four convolutions, each with BatchNorm: the smallest network in which weight decay sets the learning rate."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_normreg._compat import pl
from lightning_normreg._param_groups import DecayGroupsMixin


class DemoConvNet(DecayGroupsMixin, pl.LightningModule):
    """Convolutions of 16, 16, 32 and 32 filters with BatchNorm and ReLU, average pooling, a linear head.

    Trained by SGD with Nesterov momentum at a constant learning rate, so that whatever the effective learning rate does
    is the norms' doing. γ, β and biases are not decayed.

    Args:
        lr: Learning rate.
        weight_decay: Decay of the convolutions and of the head.
        momentum: Nesterov momentum.
    """

    def __init__(self, lr: float = 0.05, weight_decay: float = 0.01, momentum: float = 0.9) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.weight_decay, self.momentum = lr, weight_decay, momentum
        self.block1 = _block(1, 16)
        self.block2 = _block(16, 16)
        self.block3 = _block(16, 32, stride=2)
        self.block4 = _block(32, 32)
        self.head = nn.Linear(32, 10)
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Logits, shape ``(N, 10)``, of images of shape ``(N, 1, 8, 8)``."""
        features = self.block4(self.block3(self.block2(self.block1(images))))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
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

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy."""
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("test_accuracy", self.accuracy)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Classes, shape ``(N,)``."""
        classes: Tensor = self(batch[0]).argmax(dim=1)
        return classes

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD on groups in which only convolutions and head decay."""
        groups = self.decay_groups(self.weight_decay)
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=True)


def _block(inputs: int, filters: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, filters, 3, stride, padding=1, bias=False)
    return nn.Sequential(OrderedDict(conv=convolution, norm=nn.BatchNorm2d(filters), relu=nn.ReLU()))
