"""Tables without a step: before training, of a checkpoint, and the plan of a run."""

from lightning_normreg._reports._checkpoint import Checkpoint as Checkpoint
from lightning_normreg._reports._checkpoint import read_checkpoint as read_checkpoint
from lightning_normreg._reports._comparison import Comparison as Comparison
from lightning_normreg._reports._inspection import InspectedParameter as InspectedParameter
from lightning_normreg._reports._inspection import as_parameters as as_parameters
from lightning_normreg._reports._inspection import inspect_parameters as inspect_parameters
from lightning_normreg._reports._inspection import inspection_table as inspection_table
from lightning_normreg._reports._inspection import with_what_decay_does as with_what_decay_does
from lightning_normreg._reports._plan import Plan as Plan
from lightning_normreg._reports._plan import plan_of as plan_of
from lightning_normreg._reports._planning import factor_for as factor_for
from lightning_normreg._reports._planning import owners_of as owners_of
from lightning_normreg._reports._planning import plan as plan
from lightning_normreg._reports._planning import plan_norms as plan_norms
from lightning_normreg._reports._planning import refused_for_symmetry as refused_for_symmetry
from lightning_normreg._reports._planning import watch_all as watch_all
from lightning_normreg._reports._saved_optimizers import SavedGroup as SavedGroup
from lightning_normreg._reports._saved_optimizers import match_parameters as match_parameters
from lightning_normreg._reports._saved_optimizers import saved_groups as saved_groups
from lightning_normreg._reports._summary import SummaryRow as SummaryRow
from lightning_normreg._reports._summary import markdown_summary as markdown_summary
from lightning_normreg._reports._summary import sentences as sentences
from lightning_normreg._reports._summary import summary_rows as summary_rows
from lightning_normreg._reports._summary import summary_table as summary_table
from lightning_normreg._reports._summary import with_audit as with_audit
