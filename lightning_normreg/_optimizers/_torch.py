"""The optimizers of ``torch.optim``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lightning_normreg._optimizers._rule import NoRule, UpdateRule

ADAM = {"exp_avg": -1, "exp_avg_sq": -2, "max_exp_avg_sq": -2}
EPS = {"eps": -1}

SGD = UpdateRule(2, "coupled", "sgd", momentum_key="momentum", local="exact", state_degrees={"momentum_buffer": -1})
ADAMW = UpdateRule(1, "decoupled", "adam_decoupled", local="adam", state_degrees=ADAM, group_degrees=EPS)
_ADAM_L2 = replace(ADAMW, decay="coupled", family="adam_l2")
_NADAMW = replace(ADAMW, family="nadam_decoupled", local="nadam")
RADAMW = replace(ADAMW, local="radam", note="is proportional to lr/‖w‖² in its first steps, before it rectifies")
_AVERAGES = {"square_avg": -2, "grad_avg": -1}  # its momentum is of steps, not of gradients
RMSPROP = UpdateRule(
    1, "coupled", "rmsprop_l2", momentum_key="momentum", local="rmsprop", state_degrees=_AVERAGES, group_degrees=EPS
)
LION = UpdateRule(1, "decoupled", "lion", local="exact", state_degrees={"exp_avg": -1})
MUON = UpdateRule(1, "decoupled", "muon", local="exact", state_degrees={"momentum_buffer": -1}, group_degrees=EPS)
_LBFGS = UpdateRule(
    0,
    "none",
    state_degrees={"d": 1, "old_dirs": -1, "old_stps": 1, "H_diag": 2, "prev_flat_grad": -1},
    group_degrees={"tolerance_grad": -1},
)

RULES: Mapping[str, UpdateRule | NoRule] = {
    "SGD": SGD.given(nesterov=replace(SGD, family="nesterov")),
    "Adam": _ADAM_L2.given(decoupled_weight_decay=ADAMW, amsgrad=replace(_ADAM_L2, family="")),
    "AdamW": ADAMW,
    "NAdam": replace(_NADAMW, decay="coupled", family="").given(decoupled_weight_decay=_NADAMW),
    "RAdam": replace(RADAMW, decay="coupled", family="").given(decoupled_weight_decay=RADAMW),
    "Adamax": UpdateRule(1, "coupled", state_degrees={"exp_avg": -1, "exp_inf": -1}, group_degrees=EPS),
    "RMSprop": RMSPROP.given(centered=replace(RMSPROP, family="")),
    "Adagrad": UpdateRule(
        1,
        "coupled",
        local="adagrad",
        state_degrees={"sum": -2},
        group_degrees=EPS,
        note="also shortens its steps by itself, about with 1/√t",
    ),
    # Its steps' own average would keep its size, if it were not for one eps that stands beside two different things.
    "Adadelta": UpdateRule(
        1,
        "coupled",
        local="adadelta",
        state_degrees={"square_avg": -2},
        rate_degrees={"acc_delta": -2},
        lr_degree=2,
        group_degrees={"eps": -2},
    ),
    "Rprop": UpdateRule(
        1,
        "none",
        lr_is_used=False,
        local="exact",
        state_degrees={"prev": -1},
        rate_degrees={"step_size": 1},
        group_degrees={"step_sizes": (1, 1)},
        note="uses its learning rate only to start the sizes of its steps, which then change by themselves",
    ),
    "ASGD": UpdateRule(
        2, "coupled", local="exact", state_degrees={"ax": 1}, rate_degrees={"eta": 2}, group_degrees={"lambd": -2}
    ),
    # Its learning rate is relative to the weight, so it stays, and the decay with it. Its other eps only sets a factor
    # that the clipping of the update takes out again.
    "Adafactor": UpdateRule(
        0,
        "decoupled",
        "adafactor",
        local="adafactor",
        state_degrees={"row_var": -2, "col_var": -2, "variance": -2},
        group_degrees={"eps": (0, 1)},
        note="is proportional to lr/‖w‖ where the weight's root mean square is under its second eps",
    ),
    "Muon": MUON,
    "LBFGS": NoRule(
        "takes steps of the size that its closure and its past steps suggest, whatever the weight's norm", _LBFGS
    ),
    "SparseAdam": NoRule("moves only the entries that have a gradient, so a unit does not move as a whole"),
}
