"""Facts about optimizers, as data: how a step depends on the weight's scale, and what decay does."""

from lightning_normreg._optimizers._local import scale_exponent as scale_exponent
from lightning_normreg._optimizers._lookup import acting as acting
from lightning_normreg._optimizers._lookup import find_rule as find_rule
from lightning_normreg._optimizers._lookup import group_of as group_of
from lightning_normreg._optimizers._lookup import named_rules as named_rules
from lightning_normreg._optimizers._lookup import register_update_rule as register_update_rule
from lightning_normreg._optimizers._lookup import unequal as unequal
from lightning_normreg._optimizers._lookup import update_rule as update_rule
from lightning_normreg._optimizers._lookup import why_no_rule as why_no_rule
from lightning_normreg._optimizers._rule import Group as Group
from lightning_normreg._optimizers._rule import NoRule as NoRule
from lightning_normreg._optimizers._rule import UpdateRule as UpdateRule
