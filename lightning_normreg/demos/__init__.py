"""A small BatchNorm network and a real data set without downloads, for the first run."""

from lightning_normreg.demos._data import DigitsDataModule as DigitsDataModule
from lightning_normreg.demos._model import DemoConvNet as DemoConvNet
