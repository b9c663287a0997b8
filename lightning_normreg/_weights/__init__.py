"""A parameter, what it is, its units, wherever its pieces lie."""

from lightning_normreg._weights._flat_shards import (
    find_flat_pieces as find_flat_pieces,
    is_flat as is_flat,
    whole_shape as whole_shape,
)
from lightning_normreg._weights._names import (
    check_globs as check_globs,
    clean_name as clean_name,
    listed as listed,
    match as match,
)
from lightning_normreg._weights._roles import (
    ROLES as ROLES,
    ParameterRole as ParameterRole,
    named_roles as named_roles,
    parameter_roles as parameter_roles,
    role_by_shape as role_by_shape,
)
from lightning_normreg._weights._selection import (
    UnitArgument as UnitArgument,
    Verdict as Verdict,
    check_selection as check_selection,
    watch as watch,
)
from lightning_normreg._weights._sharding import (
    Later as Later,
    Shard as Shard,
    SumOverShards as SumOverShards,
    at_once as at_once,
    is_sharded as is_sharded,
    local as local,
    reshard as reshard,
    shard_of as shard_of,
)
from lightning_normreg._weights._verdict import (
    EVIDENCE as EVIDENCE,
    KINDS as KINDS,
    Evidence as Evidence,
    Kind as Kind,
    ScaleInvariance as ScaleInvariance,
    strong as strong,
    summarize as summarize,
)
from lightning_normreg._weights._watched import Watched as Watched, gradient_of as gradient_of, norms_of as norms_of
