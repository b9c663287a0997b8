"""Everything that edits an optimizer's groups: decay groups, loading by name, the decay-free schedule, rescaling."""

from lightning_normreg._param_groups._decay_free import DecayFreeLR as DecayFreeLR
from lightning_normreg._param_groups._decay_groups import DecayGroupsMixin as DecayGroupsMixin
from lightning_normreg._param_groups._decay_groups import decay_groups as decay_groups
from lightning_normreg._param_groups._regroup import load_by_name as load_by_name
from lightning_normreg._param_groups._rescale import accept_rescaled as accept_rescaled
from lightning_normreg._param_groups._rescale import rescale_ as rescale_
from lightning_normreg._param_groups._scheduler_rates import highest_rates as highest_rates
