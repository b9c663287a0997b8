"""Scikit-learn's handwritten digits as a data module."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_normreg._compat import optional_import, pl

TRAINING_IMAGES = 1000


class DigitsDataModule(pl.LightningDataModule):
    """1797 grey images of 8×8 pixels in 10 classes, embedded in scikit-learn: 1000 to train on, 797 to validate on.

    Args:
        batch_size: Images in a batch.
        label_noise: Share of the training labels that are redrawn at random, in [0, 1). With some of it the test
            error is large enough to tell one recipe from another.
        seed: Seed of the split, the noise and the order of the batches.

    Raises:
        ValueError: If ``label_noise`` is out of its range.
        ModuleNotFoundError: If scikit-learn is not installed.
    """

    def __init__(self, batch_size: int = 50, label_noise: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        if not 0 <= label_noise < 1:
            raise ValueError(f"`label_noise` must be in [0, 1), got {label_noise}. Use 0.0 for clean labels.")
        self.batch_size = batch_size
        self.label_noise = label_noise
        self.seed = seed

    def setup(self, stage: str) -> None:
        """Load the images and draw the split."""
        digits = optional_import("sklearn.datasets", "demo").load_digits()
        images = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
        labels = torch.as_tensor(digits.target)
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(labels), generator=generator)
        train, val = order[:TRAINING_IMAGES], order[TRAINING_IMAGES:]
        noisy = torch.rand(len(train), generator=generator) < self.label_noise
        random = torch.randint(10, (len(train),), generator=generator)
        self.train_set = TensorDataset(images[train], torch.where(noisy, random, labels[train]))
        self.val_set = TensorDataset(images[val], labels[val])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Shuffled batches, all of one size."""
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train_set, self.batch_size, shuffle=True, drop_last=True, generator=generator)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The validation images in order."""
        return DataLoader(self.val_set, batch_size=len(self.val_set))

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The validation images: nothing is tuned on them here."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The validation images."""
        return self.val_dataloader()
