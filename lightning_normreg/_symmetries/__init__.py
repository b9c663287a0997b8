"""Finding what may be rescaled; README.md says in which order to read it."""

from lightning_normreg._symmetries._biases import bias_candidates as bias_candidates
from lightning_normreg._symmetries._call import OwnStep as OwnStep
from lightning_normreg._symmetries._call import PrivateCall as PrivateCall
from lightning_normreg._symmetries._call import check_callable as check_callable
from lightning_normreg._symmetries._find_symmetries import find_symmetries as find_symmetries
from lightning_normreg._symmetries._losses import NoLossError as NoLossError
from lightning_normreg._symmetries._losses import ProbeError as ProbeError
from lightning_normreg._symmetries._observed import Observed as Observed
from lightning_normreg._symmetries._observed import observed_axes as observed_axes
from lightning_normreg._symmetries._observed import observed_verdict as observed_verdict
from lightning_normreg._symmetries._observed import unit_statistic as unit_statistic
from lightning_normreg._symmetries._probe import find_in_place as find_in_place
from lightning_normreg._symmetries._probe import find_scale_invariance as find_scale_invariance
from lightning_normreg._symmetries._reduce_decay import ReducedDecay as ReducedDecay
from lightning_normreg._symmetries._reduce_decay import reduce_decay as reduce_decay
from lightning_normreg._symmetries._slices import Axis as Axis
from lightning_normreg._symmetries._symmetry import Symmetries as Symmetries
from lightning_normreg._symmetries._symmetry import Symmetry as Symmetry
from lightning_normreg._symmetries._thresholds import NARROW_OBSERVER as NARROW_OBSERVER
from lightning_normreg._symmetries._thresholds import WIDE_OBSERVER as WIDE_OBSERVER
from lightning_normreg._symmetries._thresholds import ObserverThresholds as ObserverThresholds
from lightning_normreg._symmetries._verdict_file import load_verdict as load_verdict
from lightning_normreg._symmetries._verdict_file import save_verdict as save_verdict
from lightning_normreg._symmetries._verdict_file import verdict_to_dict as verdict_to_dict
