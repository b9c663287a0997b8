"""A parameter, what it is, its units, wherever its pieces lie."""

from lightning_normreg._compat import know_rank
from lightning_normreg._weights._flat_shards import find_flat_pieces as find_flat_pieces
from lightning_normreg._weights._flat_shards import is_flat as is_flat
from lightning_normreg._weights._flat_shards import whole_shape as whole_shape
from lightning_normreg._weights._fsdp import in_type_of_weights as in_type_of_weights
from lightning_normreg._weights._fsdp import reshard as reshard
from lightning_normreg._weights._gradients import gradient_of as gradient_of
from lightning_normreg._weights._names import check_globs as check_globs
from lightning_normreg._weights._names import clean_name as clean_name
from lightning_normreg._weights._names import counted as counted
from lightning_normreg._weights._names import listed as listed
from lightning_normreg._weights._names import match as match
from lightning_normreg._weights._roles import ROLES as ROLES
from lightning_normreg._weights._roles import ParameterRole as ParameterRole
from lightning_normreg._weights._roles import is_matrix as is_matrix
from lightning_normreg._weights._roles import is_vector as is_vector
from lightning_normreg._weights._roles import named_roles as named_roles
from lightning_normreg._weights._roles import parameter_roles as parameter_roles
from lightning_normreg._weights._roles import role_by_shape as role_by_shape
from lightning_normreg._weights._roles import same_memory as same_memory
from lightning_normreg._weights._selection import UnitArgument as UnitArgument
from lightning_normreg._weights._selection import Verdict as Verdict
from lightning_normreg._weights._selection import check_selection as check_selection
from lightning_normreg._weights._selection import fitted_to as fitted_to
from lightning_normreg._weights._selection import watch as watch
from lightning_normreg._weights._sharding import Shard as Shard
from lightning_normreg._weights._sharding import is_sharded as is_sharded
from lightning_normreg._weights._sharding import local as local
from lightning_normreg._weights._sharding import spread_shards as spread_shards
from lightning_normreg._weights._sharding import summed as summed
from lightning_normreg._weights._table import Norms as Norms
from lightning_normreg._weights._table import Table as Table
from lightning_normreg._weights._table import norms_of as norms_of
from lightning_normreg._weights._table import share as share
from lightning_normreg._weights._verdict import EVIDENCE as EVIDENCE
from lightning_normreg._weights._verdict import KINDS as KINDS
from lightning_normreg._weights._verdict import RULED_BY_EPS as RULED_BY_EPS
from lightning_normreg._weights._verdict import SHOWS_EPS as SHOWS_EPS
from lightning_normreg._weights._verdict import Evidence as Evidence
from lightning_normreg._weights._verdict import Kind as Kind
from lightning_normreg._weights._verdict import ScaleInvariance as ScaleInvariance
from lightning_normreg._weights._verdict import about_masks as about_masks
from lightning_normreg._weights._verdict import strong as strong
from lightning_normreg._weights._verdict import summarize as summarize
from lightning_normreg._weights._watched import Part as Part
from lightning_normreg._weights._watched import Watched as Watched
from lightning_normreg._weights._watched import in_words as in_words

know_rank()  # what all rooms that warn are built on
