"""Optimizers of other packages, by top-level package and name of the class; the packages are not imported.

The same name means different things in different packages, and a package that is not here has no rule. Where classes of
one package share a name, the key says the module too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lightning_normreg._optimizers import _torch
from lightning_normreg._optimizers._rule import NoRule, UpdateRule
from lightning_normreg._optimizers._torch import ADAM, ADAMW, EPS, LION, MUON, RADAMW, RMSPROP, SGD


def _unpredicted_if(rule: UpdateRule, *conditions: str) -> UpdateRule:
    """The rule, without prediction of an equilibrium under some conditions."""
    return rule.given(**dict.fromkeys(conditions, replace(rule, family="")))


def _either(decoupled: UpdateRule, key: str = "weight_decouple") -> UpdateRule:
    """A rule with a switch for decoupled decay, which may also be fixed: that leaves the learning rate out of it."""
    fixed = replace(decoupled, family="", decay_degree=0, variants=())
    coupled = replace(decoupled, decay="coupled", family="", decay_degree=None, variants=())
    return coupled.given(**{key: decoupled.given(fixed_decay=fixed)})


def _corrected(rule: UpdateRule) -> UpdateRule:
    """A rule with switches for caution, and for a decay that is proportional to the square of the learning rate."""
    odd = replace(rule, family="")
    squared = replace(odd, decay_degree=-2 * rule.exponent)
    return rule.given(corrected_weight_decay=squared, caution=odd)


# What several packages, or several classes of one, have in common.
_SECOND = {"exp_avg_sq": -2}
_FACTORED = {"exp_avg_sq_row": -2, "exp_avg_sq_col": -2, **_SECOND}
_SGDW = replace(SGD, decay="decoupled", family="")
# Its eps is added to the weight's norm; that of AdamP to the root as well, where it counts.
_SGDP = replace(_SGDW, family="sgdp", local="unknown", state_degrees={"momentum": -1}, group_degrees={"eps": 1})
_ADAMP = replace(ADAMW, family="adamp", local="unknown")
_ADAM_LIKE = UpdateRule(1, "decoupled", state_degrees=None)
_ADOPT = UpdateRule(1, "decoupled", state_degrees=_SECOND, group_degrees=EPS)

# The momentum of LARS is of steps, which are proportional to the weight; LAMB's is of gradients. Both add the decay
# before they make the step as long as the weight.
_LARS = replace(_SGDW, exponent=0, decay="coupled", local="unknown", state_degrees={"momentum_buffer": 1})
_LAMB = UpdateRule(0, "coupled", "lamb", decay_degree=-1, state_degrees=ADAM, group_degrees=EPS)
_LAMB_DECOUPLED = replace(_LAMB, decay="decoupled", family="", decay_degree=None)
_CLAMPED = "is proportional to lr/‖w‖ where the weight's norm is over the bound of its trust ratio"
_CLIPPED_TRUST = NoRule(
    "clips its trust ratio, so its steps are proportional to the weight's norm at some times and not at others"
)

# The momentum of Adafactor is of steps. Where these are proportional to the weight the decay does so once more.
_ADAFACTOR = UpdateRule(1, "decoupled", state_degrees=_FACTORED, rate_degrees={"exp_avg": 1})
_ADAFACTOR_RELATIVE = UpdateRule(
    0, "decoupled", local="adafactor", decay_degree=-1, state_degrees=_FACTORED | {"exp_avg": 1}
)
_OWN_RATE = NoRule("sets its learning rate by itself, and keeps it where it cannot be read")

_PRODIGY = replace(_ADAM_LIKE, lr_factor_keys=("d",))

_SCHEDULE_FREE_SGD = UpdateRule(
    2,
    "coupled",
    local="exact",
    used_lr_key="scheduled_lr",
    state_degrees={"z": 1},
    group_degrees={"lr_max": 2, "scheduled_lr": 2, "weight_sum": lambda group: 2 * group["weight_lr_power"]},
)
_SCHEDULE_FREE_ADAMW = replace(
    _SCHEDULE_FREE_SGD,
    exponent=1,
    decay="decoupled",
    local="unknown",
    state_degrees={"z": 1, "exp_avg_sq": -2, "max_exp_avg_sq": -2},
    group_degrees={"lr_max": 1, "scheduled_lr": 1, "weight_sum": lambda group: group["weight_lr_power"], **EPS},
)
_WARMS_UP = NoRule("warms its learning rate up by itself, and keeps it where it cannot be read")

# The product of the inverse roots, one for each dimension, takes out one power of the gradient.
_SHAMPOO = UpdateRule(
    1,
    "decoupled",
    state_degrees={f"pre_cond_{dim}": -2 for dim in range(5)}
    | {f"inv_pre_cond_{dim}": (lambda dims: 1 / dims) for dim in range(5)},
    group_degrees={"matrix_eps": -2},
)
_MIXING = NoRule("averages gradients with its own steps, which depend on the weight's norm in two ways")

# timm.optim.
_LAPROP = UpdateRule(
    1, "decoupled", state_degrees=_SECOND, rate_degrees={"exp_avg": 1, "exp_avg_lr_1": 1}, group_degrees=EPS
)
_TF_RMSPROP = replace(
    RMSPROP,
    family="",
    local="unknown",
    group_degrees={"eps": -2},
    note="starts from a variance of 1, and is proportional to lr/‖w‖² until that is forgotten",
)
_TF_RMSPROP_LR = replace(_TF_RMSPROP, rate_degrees={"momentum_buffer": 1})
_BIG_VISION = UpdateRule(
    1, "decoupled", state_degrees={"exp_avg_sq_r": -2, "exp_avg_sq_c": -2, **_SECOND}, group_degrees={"eps": -2}
)
_TIMM_LAMB = _LAMB.given(caution=replace(_LAMB, family=""))

_TIMM: Mapping[str, UpdateRule | NoRule] = {
    "AdamWLegacy": _corrected(ADAMW),
    # The learning rate in its group is its own, with the weight's part in it, unless one was given.
    "Adafactor": replace(_ADAFACTOR, group_degrees={"eps": -2}).given(
        relative_step=replace(_ADAFACTOR, state_degrees=None).given(
            scale_parameter=replace(_ADAFACTOR_RELATIVE, local="unknown", group_degrees={"eps": -2, "eps_scale": 1})
        )
    ),
    "AdafactorBigVision": _BIG_VISION.given(unscaled_wd=replace(_BIG_VISION, decay_degree=0)),
    "AdamP": _unpredicted_if(_ADAMP, "nesterov", "caution"),
    "Adopt": replace(_ADOPT, decay="coupled").given(decoupled=_corrected(_ADOPT)),
    "LaProp": _corrected(_LAPROP),
    # Without decay a weight's steps are those of Adam, or of SGD, unless they are always adapted.
    "Lamb": replace(ADAMW, decay="none", family="", local="unknown").given(
        trust_clip=_CLIPPED_TRUST,
        weight_decay=_TIMM_LAMB.given(decoupled_decay=_corrected(_LAMB_DECOUPLED)),
        always_adapt=_TIMM_LAMB,
    ),
    "Lars": replace(SGD, family="").given(trust_clip=_CLIPPED_TRUST, weight_decay=_LARS, always_adapt=_LARS),
    "Lion": _unpredicted_if(LION, "caution"),
    "Muon": _ADAM_LIKE,
    "NAdamW": _corrected(replace(ADAMW, family="", local="unknown")),
    "RAdamLegacy": RADAMW,
    "RMSpropTF": _TF_RMSPROP.given(
        lr_in_momentum=_TF_RMSPROP_LR.given(decoupled_decay=replace(_TF_RMSPROP_LR, decay="decoupled")),
        decoupled_decay=replace(_TF_RMSPROP, decay="decoupled"),
    ),
    "SGDP": _unpredicted_if(_SGDP, "nesterov", "caution"),
    "SGDW": _corrected(_SGDW),
}

# Other packages.
_MUON = replace(MUON, group_degrees={})  # its eps is no setting
_UNPREDICTED = replace(ADAMW, family="", local="unknown")
_PO_LAMB = replace(_LAMB, note=_CLAMPED)

RULES: Mapping[str, Mapping[str, UpdateRule | NoRule]] = {
    "torch": _torch.RULES,
    "timm": _TIMM,
    "adamp": {"AdamP": _unpredicted_if(_ADAMP, "nesterov"), "SGDP": _unpredicted_if(_SGDP, "nesterov")},
    "apex": {
        "FusedAdam": replace(_UNPREDICTED, decay="coupled", family="adam_l2").given(
            use_master=replace(_ADAM_LIKE, decay="coupled").given(adam_w_mode=_ADAM_LIKE),
            adam_w_mode=replace(_UNPREDICTED, family="adam_decoupled"),
        ),
    },
    # Adam and AdamW are one algorithm there, with decoupled decay; the state is in bytes where it is large.
    "bitsandbytes": {
        f"{paged}{name}{bits}": replace(_ADAM_LIKE, family="adam_decoupled")
        for paged in ("", "Paged")
        for name in ("Adam", "AdamW")
        for bits in ("", "8bit", "32bit")
    },
    "dadaptation": {
        "DAdaptAdam": _either(replace(_PRODIGY, lr_factor_keys=("d", "layer_scale")), key="decouple"),
        "DAdaptLion": _PRODIGY,
    },
    "dion": {"Muon": _ADAM_LIKE},
    # With `decoupled_weight_decay` the decay is in units of the first learning rate.
    "lion_pytorch": {"Lion": _unpredicted_if(LION, "decoupled_wd"), "cautious_lion.Lion": replace(LION, family="")},
    "muon": {
        **dict.fromkeys(("Muon", "SingleDeviceMuon"), _MUON),
        **dict.fromkeys(("MuonWithAuxAdam", "SingleDeviceMuonWithAuxAdam"), ADAMW.given(use_muon=_MUON)),
    },
    "prodigyopt": {"Prodigy": _either(_PRODIGY, key="decouple")},
    "pytorch_optimizer": {
        "ADOPT": _either(_ADOPT),
        "AdEMAMix": _either(_ADAM_LIKE),
        "AdaFactor": _either(_ADAM_LIKE).given(
            scale_parameter=replace(_ADAFACTOR_RELATIVE, local="unknown", state_degrees=None), relative_step=_OWN_RATE
        ),
        "AdamP": _either(_unpredicted_if(_ADAMP, "nesterov")),
        "Adan": _either(_ADAM_LIKE),
        "DAdaptAdam": _either(_PRODIGY),
        "DAdaptLion": _either(_PRODIGY),
        "LARS": replace(_LARS, note="is proportional to lr/‖w‖² where the weight has one dimension"),
        "Lamb": _PO_LAMB.given(
            rectify=NoRule("takes steps of two kinds, the one before and the other after it rectifies"),
            adam=_ADAM_LIKE,
            weight_decouple=replace(_LAMB_DECOUPLED, note=_CLAMPED),
        ),
        "Lion": _either(_unpredicted_if(LION, "cautious")),
        "Muon": _either(_UNPREDICTED).given(use_muon=_either(replace(_MUON, family=""))),
        "Prodigy": _either(_PRODIGY),
        "RAdam": _either(replace(RADAMW, family="", local="unknown")),
        "SGDP": _either(_unpredicted_if(_SGDP, "nesterov")),
        "SGDW": SGD.given(weight_decouple=_SGDW, nesterov=replace(SGD, family="nesterov")),
        "SOAP": UpdateRule(1, "decoupled", state_degrees=ADAM | {"GG": -2}, group_degrees=EPS),
        "ScheduleFreeAdamW": replace(_SCHEDULE_FREE_ADAMW, used_lr_key="").given(warmup_steps=_WARMS_UP),
        "ScheduleFreeSGD": replace(_SCHEDULE_FREE_SGD, used_lr_key="").given(warmup_steps=_WARMS_UP),
        "Shampoo": _either(_SHAMPOO).given(momentum=_MIXING),
        "SignSGD": _either(_ADAM_LIKE),
        "StableAdamW": _either(_ADAM_LIKE),
        "Tiger": _either(_ADAM_LIKE),
    },
    "schedulefree": {
        "AdamWScheduleFree": _SCHEDULE_FREE_ADAMW,
        "RAdamScheduleFree": replace(
            _SCHEDULE_FREE_ADAMW, note="stands still in its first steps, or is proportional to lr/‖w‖²"
        ),
        "SGDScheduleFree": _SCHEDULE_FREE_SGD,
    },
    "torch_optimizer": {
        "AdamP": _unpredicted_if(_ADAMP, "nesterov"),
        "LARS": SGD.given(weight_decay=_LARS, nesterov=replace(SGD, family="nesterov")),
        "Lamb": _PO_LAMB.given(adam=_ADAM_LIKE),
        "SGDP": _unpredicted_if(_SGDP, "nesterov"),
    },
    "transformers": {
        "Adafactor": replace(_ADAFACTOR, decay_degree=-1, group_degrees={"eps": (-2, 0)}).given(
            scale_parameter=replace(_ADAFACTOR_RELATIVE, group_degrees={"eps": (-2, 1)}), relative_step=_OWN_RATE
        )
    },
}
