"""Rescaling a weight while it trains, with everything that must follow it."""

from lightning_normreg._rescale._rescale import rescale_ as rescale_
from lightning_normreg._rescale._split import accept_rescaled as accept_rescaled
