"""Pure functions: norms, updates, projection, equilibrium and recipes, without Lightning and without state."""

from lightning_normreg.functional._equilibrium import (
    equilibrium_half_life as equilibrium_half_life,
    equilibrium_norm as equilibrium_norm,
    equilibrium_rotation as equilibrium_rotation,
)
from lightning_normreg.functional._norms import unit_norms as unit_norms, weight_norm as weight_norm
from lightning_normreg.functional._projection import project_ as project_, project_all_ as project_all_
from lightning_normreg.functional._recipes import (
    matched_lr as matched_lr,
    with_decay as with_decay,
    without_decay as without_decay,
)
from lightning_normreg.functional._relaxation import (
    predicted_norm as predicted_norm,
    predicted_rotation as predicted_rotation,
)
from lightning_normreg.functional._rotation import rotate_ as rotate_
from lightning_normreg.functional._suggestion import (
    suggest_decay as suggest_decay,
    suggest_projection as suggest_projection,
)
from lightning_normreg.functional._updates import (
    effective_lr as effective_lr,
    gradient_alignment as gradient_alignment,
    relative_update as relative_update,
    rotation as rotation,
)
