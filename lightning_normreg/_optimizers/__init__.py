"""Facts about optimizers, as data: how a step depends on the weight's scale, and what decay does."""

from lightning_normreg._optimizers._local import scale_exponent as scale_exponent
from lightning_normreg._optimizers._lookup import (
    acting as acting,
    find_rule as find_rule,
    group_of as group_of,
    named_rules as named_rules,
    register_update_rule as register_update_rule,
    update_rule as update_rule,
    why_no_rule as why_no_rule,
)
from lightning_normreg._optimizers._rule import Group as Group, NoRule as NoRule, UpdateRule as UpdateRule
