"""The images of a cell. Its seed draws label noise, and for the digits the split, alike for all rates and decays."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from examples.van_laarhoven.cifar10 import read_archive
from examples.van_laarhoven.grid import Settings
from lightning_normreg.demos import DigitsDataModule


class Images(NamedTuple):
    """Images of shape ``(N, channels, pixels, pixels)``, kept small; ``mean`` and ``std`` per channel scale them."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: Tensor
    std: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Channels and pixels."""
        return self.train_images.shape[1], self.train_images.shape[2]

    def to(self, device: str) -> Images:
        """The same on a device."""
        return Images(*(tensor.to(device) for tensor in self))

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Training images, scaled, and their labels."""
        return self.scaled(self.train_images[indices]), self.train_labels[indices]

    def scaled(self, images: Tensor) -> Tensor:
        """Images as the network sees them."""
        return (images.float() - self.mean) / self.std


def load(settings: Settings, seed: int, archive: Path | None) -> Images:
    """Load the images.

    Args:
        settings: Which data, and the share of training labels that are redrawn at random.
        seed: Seed of split and noise.
        archive: CIFAR-10's archive.
    """
    if settings.data == "digits":
        digits = DigitsDataModule(label_noise=settings.label_noise, seed=seed)
        digits.setup("fit")  # scales the images itself
        (train, labels), test = digits.train_set.tensors, digits.val_set.tensors
        return Images(train, labels, test[0], test[1], torch.zeros(1), torch.ones(1))
    assert archive is not None
    train, labels, *test = read_archive(archive)  # uint8, a quarter of the size
    generator = torch.Generator().manual_seed(seed)
    noisy = torch.rand(len(labels), generator=generator) < settings.label_noise
    random = torch.randint(10, labels.shape, generator=generator)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([125.3, 123.0, 113.9], [63.0, 62.1, 66.7]))
    return Images(train, torch.where(noisy, random, labels), test[0], test[1], mean, std)
