"""Data that are there without a download: scikit-learn's handwritten digits, and a text that comes with Python."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_normreg._compat import optional_import, pl

TRAINING_IMAGES = 1000
VALIDATION_SHARE = 0.1
CHARACTERS = 96
"""Of ASCII those that print, and the line break. Python's versions differ in the text, not in these."""


class _InMemory(pl.LightningDataModule):
    """Loaders of two sets of tensors, which ``setup`` makes."""

    batch_size: int
    seed: int
    train_set: TensorDataset
    val_set: TensorDataset

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Shuffled batches, all of one size."""
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train_set, self.batch_size, shuffle=True, drop_last=True, generator=generator)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """All of the validation set in order, in one batch."""
        return DataLoader(self.val_set, batch_size=len(self.val_set))

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The validation set: nothing is tuned on it here."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The validation set."""
        return self.val_dataloader()


class DigitsDataModule(_InMemory):
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


class TextDataModule(_InMemory):
    """The help texts of Python's ``pydoc``, some 465 000 characters: 90 % to train on, the end to validate on.

    Inputs and targets are both of shape ``(N, context)``: a target is the character after its input. A line break is
    token 0, the characters from space to tilde are 1 to 95, and what is not in ASCII becomes a question mark. Some
    passages are in the text twice: the validation loss tells recipes apart, not how well a model generalizes.

    Args:
        batch_size: Sequences in a batch.
        context: Characters in a sequence.
        seed: Seed of the order of the batches.

    Raises:
        ValueError: If ``context`` is not at least 1 and shorter than the validation text.
        ModuleNotFoundError: If this Python came without its help texts.
    """

    def __init__(self, batch_size: int = 32, context: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.batch_size, self.context, self.seed = batch_size, context, seed

    def setup(self, stage: str) -> None:
        """Read the text, and cut it into sequences."""
        tokens = _pydoc_tokens()
        cut = round(len(tokens) * (1 - VALIDATION_SHARE))
        if not 1 <= self.context < len(tokens) - cut:
            raise ValueError(
                f"`context` must be at least 1 and shorter than the {len(tokens) - cut} characters to validate on, "
                f"got {self.context}. Use for example 64."
            )
        self.train_set, self.val_set = (self._sequences(part) for part in (tokens[:cut], tokens[cut:]))

    def _sequences(self, tokens: Tensor) -> TensorDataset:
        length = (len(tokens) - 1) // self.context * self.context
        return TensorDataset(*(part.view(-1, self.context) for part in (tokens[:length], tokens[1 : length + 1])))


def _pydoc_tokens() -> Tensor:
    try:
        topics = import_module("pydoc_data.topics").topics
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "pydoc_data.topics, the text of TextDataModule, is a part of Python that this installation lacks. Use a "
            "complete Python (on Debian and Ubuntu: apt install libpython3-stdlib), or other data."
        ) from None
    codes = torch.frombuffer(bytearray("\n".join(topics.values()), "ascii", "replace"), dtype=torch.uint8).long()
    return (codes - (ord(" ") - 1)).clamp(0, CHARACTERS - 1)
