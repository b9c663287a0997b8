"""Finding what may be rescaled; README.md says in which order to read it."""

from lightning_normreg._symmetries._biases import bias_candidates as bias_candidates
from lightning_normreg._symmetries._call import (
    PrivateCall as PrivateCall,
    ProbeError as ProbeError,
    check_callable as check_callable,
)
from lightning_normreg._symmetries._observed import (
    Observed as Observed,
    observed_axes as observed_axes,
    observed_verdict as observed_verdict,
    unit_statistic as unit_statistic,
)
from lightning_normreg._symmetries._probe import find_scale_invariance as find_scale_invariance
from lightning_normreg._symmetries._slices import Axis as Axis
from lightning_normreg._symmetries._thresholds import (
    NARROW_OBSERVER as NARROW_OBSERVER,
    WIDE_OBSERVER as WIDE_OBSERVER,
    ObserverThresholds as ObserverThresholds,
)
from lightning_normreg._symmetries._verdict_file import (
    load_verdict as load_verdict,
    save_verdict as save_verdict,
    verdict_to_dict as verdict_to_dict,
)
