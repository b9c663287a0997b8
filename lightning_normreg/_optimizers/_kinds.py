"""Rules that several packages share, and what turns them into variants of themselves."""

from __future__ import annotations

from dataclasses import replace

from lightning_normreg._optimizers import _torch
from lightning_normreg._optimizers._rule import FamilyOrNone, NoRule, UpdateRule
from lightning_normreg._optimizers._torch import ADAMW, EPS

SECOND = {"exp_avg_sq": -2}
_FACTORED = {"exp_avg_sq_row": -2, "exp_avg_sq_col": -2, **SECOND}


def unpredicted_if(rule: UpdateRule, *conditions: str) -> UpdateRule:
    """The rule, without prediction of an equilibrium under some conditions."""
    return rule.given(**dict.fromkeys(conditions, replace(rule, family="")))


def either(decoupled: UpdateRule, coupled: FamilyOrNone = "", key: str = "weight_decouple") -> UpdateRule:
    """A rule with a switch for decoupled decay, which may also be fixed: that leaves the learning rate out of it."""
    fixed = replace(decoupled, family="", decay_degree=0, variants=())
    rule = replace(decoupled, decay="coupled", family=coupled, decay_degree=None, variants=())
    return rule.given(**{key: decoupled.given(fixed_decay=fixed)})


SGDW = replace(_torch.SGD, decay="decoupled", family="")
# Its eps is added to the weight's norm; that of AdamP to the root as well, where it counts.
SGDP = replace(SGDW, family="sgdp", local="unknown", state_degrees={"momentum": -1}, group_degrees={"eps": 1})
ADAMP = replace(ADAMW, family="adamp", local="unknown")
ADAM_LIKE = UpdateRule(1, "decoupled", state_degrees=None)
ADOPT = UpdateRule(1, "decoupled", state_degrees=SECOND, group_degrees=EPS)

# The momentum of LARS is of steps, which go with the weight; LAMB's is of gradients. Both add the decay before they
# make the step as long as the weight.
LARS = replace(SGDW, exponent=0, decay="coupled", local="unknown", state_degrees={"momentum_buffer": 1})
LAMB = UpdateRule(
    0, "coupled", "lamb", decay_degree=-1, state_degrees={"exp_avg": -1, "exp_avg_sq": -2}, group_degrees=EPS
)
LAMB_DECOUPLED = replace(LAMB, decay="decoupled", family="", decay_degree=None)
CLAMPED = "goes with lr/‖w‖ where the weight's norm is over the bound of its trust ratio"
CLIPPED_TRUST = NoRule("clips its trust ratio, so its steps go with the weight's norm at some times and not at others")

# The momentum of Adafactor is of steps. Where these go with the weight the decay does so once more.
ADAFACTOR = UpdateRule(1, "decoupled", state_degrees=_FACTORED, rate_degrees={"exp_avg": 1})
ADAFACTOR_RELATIVE = UpdateRule(
    0, "decoupled", local="adafactor", decay_degree=-1, state_degrees=_FACTORED | {"exp_avg": 1}
)
OWN_RATE = NoRule("sets its learning rate by itself, and keeps it where it cannot be read")

PRODIGY = replace(ADAM_LIKE, lr_factor_keys=("d",))

SCHEDULE_FREE_SGD = UpdateRule(
    2,
    "coupled",
    local="exact",
    used_lr_key="scheduled_lr",
    state_degrees={"z": 1},
    group_degrees={"lr_max": 2, "scheduled_lr": 2, "weight_sum": lambda group: 2 * group["weight_lr_power"]},
)
SCHEDULE_FREE_ADAMW = replace(
    SCHEDULE_FREE_SGD,
    exponent=1,
    decay="decoupled",
    local="unknown",
    state_degrees={"z": 1, "exp_avg_sq": -2, "max_exp_avg_sq": -2},
    group_degrees={"lr_max": 1, "scheduled_lr": 1, "weight_sum": lambda group: group["weight_lr_power"], **EPS},
)
WARMS_UP = NoRule("warms its learning rate up by itself, and keeps it where it cannot be read")

# The product of the inverse roots, one for each dimension, takes out one power of the gradient.
SHAMPOO = UpdateRule(
    1,
    "decoupled",
    state_degrees={f"pre_cond_{dim}": -2 for dim in range(5)}
    | {f"inv_pre_cond_{dim}": (lambda dims: 1 / dims) for dim in range(5)},
    group_degrees={"matrix_eps": -2},
)
MIXING = NoRule("averages gradients with its own steps, which go with the weight's norm in two ways")
