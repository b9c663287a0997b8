"""Hooks of Lightning; no numbers of their own."""

from lightning_normreg.callbacks._corrected_decay import CorrectedDecay as CorrectedDecay
from lightning_normreg.callbacks._effective_lr_monitor import EffectiveLRMonitor as EffectiveLRMonitor
from lightning_normreg.callbacks._norm_projection import NormProjection as NormProjection
from lightning_normreg.callbacks._norm_summary import NormSummary as NormSummary
from lightning_normreg.callbacks._rotation_control import RotationControl as RotationControl
from lightning_normreg.callbacks._weight_norm_monitor import WeightNormMonitor as WeightNormMonitor
