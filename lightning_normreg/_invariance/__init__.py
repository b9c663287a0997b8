"""Finding the scale-invariant units of a module: start reading at ``_probe.py``."""

from lightning_normreg._invariance._call import ProbeError as ProbeError
from lightning_normreg._invariance._probe import find_scale_invariance as find_scale_invariance
from lightning_normreg._invariance._verdict import ScaleInvariance as ScaleInvariance
from lightning_normreg._invariance._verdict import strong as strong
from lightning_normreg._invariance._verdict import summarize as summarize
from lightning_normreg._invariance._verdict_file import load_verdict as load_verdict
from lightning_normreg._invariance._verdict_file import save_verdict as save_verdict
from lightning_normreg._invariance._verdict_file import verdict_to_dict as verdict_to_dict
