"""See and control what weight decay does to normalized networks, in PyTorch Lightning."""

from lightning_normreg import functional as functional
from lightning_normreg._decay_groups import DecayGroupsMixin as DecayGroupsMixin
from lightning_normreg._decay_groups import decay_groups as decay_groups
from lightning_normreg._invariance import ScaleInvariance as ScaleInvariance
from lightning_normreg._invariance import find_scale_invariance as find_scale_invariance
from lightning_normreg._invariance import load_verdict as load_verdict
from lightning_normreg._invariance import save_verdict as save_verdict
from lightning_normreg._optimizers import register_update_rule as register_update_rule
from lightning_normreg._plot import plot_curves as plot_curves
from lightning_normreg._rescale import accept_rescaled as accept_rescaled
from lightning_normreg._rescale import rescale_ as rescale_
from lightning_normreg._roles import ParameterRole as ParameterRole
from lightning_normreg._roles import parameter_roles as parameter_roles
from lightning_normreg._schedules import DecayFreeLR as DecayFreeLR
from lightning_normreg.callbacks._corrected_decay import CorrectedDecay as CorrectedDecay
from lightning_normreg.callbacks._effective_lr_monitor import EffectiveLRMonitor as EffectiveLRMonitor
from lightning_normreg.callbacks._norm_projection import NormProjection as NormProjection
from lightning_normreg.callbacks._norm_summary import NormSummary as NormSummary
from lightning_normreg.callbacks._rotation_control import RotationControl as RotationControl
from lightning_normreg.callbacks._weight_norm_monitor import WeightNormMonitor as WeightNormMonitor
from lightning_normreg.cli._normreg_cli import NormRegCLI as NormRegCLI
from lightning_normreg.cli._schedulers import SchedulerChain as SchedulerChain
from lightning_normreg.cli._schedulers import SchedulerSequence as SchedulerSequence

__version__ = "0.1.0"
