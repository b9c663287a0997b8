"""Pure functions: norms, updates, projection, equilibrium and recipes, without Lightning and without state."""

from lightning_normreg.functional._equilibrium import equilibrium_half_life as equilibrium_half_life
from lightning_normreg.functional._equilibrium import equilibrium_norm as equilibrium_norm
from lightning_normreg.functional._equilibrium import equilibrium_rotation as equilibrium_rotation
from lightning_normreg.functional._equilibrium import suggest_decay as suggest_decay
from lightning_normreg.functional._equilibrium import suggest_projection as suggest_projection
from lightning_normreg.functional._norms import unit_norms as unit_norms
from lightning_normreg.functional._norms import weight_norm as weight_norm
from lightning_normreg.functional._projection import project_ as project_
from lightning_normreg.functional._projection import project_all_ as project_all_
from lightning_normreg.functional._recipes import matched_lr as matched_lr
from lightning_normreg.functional._recipes import with_decay as with_decay
from lightning_normreg.functional._recipes import without_decay as without_decay
from lightning_normreg.functional._relaxation import predicted_norm as predicted_norm
from lightning_normreg.functional._relaxation import predicted_rotation as predicted_rotation
from lightning_normreg.functional._rotation import rotate_ as rotate_
from lightning_normreg.functional._updates import effective_lr as effective_lr
from lightning_normreg.functional._updates import gradient_alignment as gradient_alignment
from lightning_normreg.functional._updates import relative_update as relative_update
from lightning_normreg.functional._updates import rotation as rotation
