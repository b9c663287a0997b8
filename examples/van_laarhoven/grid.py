"""What is run: the cells of the grid, and the settings that they share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

Optimizer = Literal["sgd", "adam"]
OPTIMIZERS: tuple[Optimizer, ...] = ("sgd", "adam")


@dataclass(frozen=True)
class Cell:
    """One run. Learning rate and decay are those of the convolutions."""

    optimizer: Optimizer
    projected: bool
    lr: float
    decay: float
    seed: int

    @property
    def name(self) -> str:
        """Name of its file."""
        how = "projected" if self.projected else "plain"
        return f"{self.optimizer}-{how}-lr{self.lr:.3g}-decay{self.decay:.3g}-seed{self.seed}"


@dataclass(frozen=True)
class Settings:
    """What all cells share.

    Neighbouring learning rates and decays differ by constant factors, so that a diagonal of the grid, one learning rate
    up and one decay down, is one of constant effective rate in equilibrium: lr·decay for SGD, for which both factors
    are the same, and lr²·decay for Adam, for which the decay's is the square of the learning rate's.
    """

    data: str = "digits"
    epochs: int = 20
    batch_size: int = 50
    label_noise: float = 0.2
    widths: tuple[int, ...] = (16, 16, 32, 32)
    lrs_sgd: tuple[float, ...] = tuple(10 ** (k / 2) for k in range(-3, 2))
    decays_sgd: tuple[float, ...] = tuple(10 ** (k / 2) for k in range(-7, -2))
    lrs_adam: tuple[float, ...] = tuple(10 ** (k / 2) for k in range(-6, -1))
    decays_adam: tuple[float, ...] = tuple(10.0**k for k in range(-4, 0))
    seeds: tuple[int, ...] = (0, 1, 2, 3)

    def lrs(self, optimizer: Optimizer) -> tuple[float, ...]:
        """Learning rates of an optimizer, ascending."""
        return self.lrs_sgd if optimizer == "sgd" else self.lrs_adam

    def decays(self, optimizer: Optimizer) -> tuple[float, ...]:
        """Decays of an optimizer, ascending, after none at all."""
        return (0.0, *(self.decays_sgd if optimizer == "sgd" else self.decays_adam))

    def cells(self) -> list[Cell]:
        """The whole grid, seed by seed, so that a part of it is a grid with fewer seeds."""
        return [
            Cell(optimizer, projected, lr, decay, seed)
            for seed, optimizer, projected in product(self.seeds, OPTIMIZERS, (False, True))
            for lr, decay in product(self.lrs(optimizer), self.decays(optimizer))
        ]


DIGITS = Settings()
CIFAR10 = replace(DIGITS, data="cifar10", epochs=60, batch_size=128, label_noise=0.0, widths=(64, 64, 128, 128))
TINY = replace(
    DIGITS,
    epochs=2,
    lrs_sgd=DIGITS.lrs_sgd[2:4],
    decays_sgd=DIGITS.decays_sgd[2:4],
    lrs_adam=DIGITS.lrs_adam[2:4],
    decays_adam=DIGITS.decays_adam[1:3],
    seeds=(0, 1),
)
