"""Two small networks, with BatchNorm and a transformer, and data without downloads, for the first run."""

from lightning_normreg.demos._data import DigitsDataModule as DigitsDataModule
from lightning_normreg.demos._data import TextDataModule as TextDataModule
from lightning_normreg.demos._model import DemoConvNet as DemoConvNet
from lightning_normreg.demos._transformer import DemoTransformer as DemoTransformer
