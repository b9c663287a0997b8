"""Tables without a step: before training, and of a checkpoint."""

from lightning_normreg._reports._checkpoint import Checkpoint as Checkpoint, read_checkpoint as read_checkpoint
from lightning_normreg._reports._inspection import (
    InspectedParameter as InspectedParameter,
    as_parameters as as_parameters,
    inspect_parameters as inspect_parameters,
    inspection_table as inspection_table,
)
from lightning_normreg._reports._matching import match_parameters as match_parameters
from lightning_normreg._reports._saved_optimizers import SavedGroup as SavedGroup, saved_groups as saved_groups
from lightning_normreg._reports._summary import (
    SummaryRow as SummaryRow,
    markdown_summary as markdown_summary,
    sentences as sentences,
    summary_rows as summary_rows,
    summary_table as summary_table,
)
