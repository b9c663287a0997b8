"""What each parameter of a module is, decided by module types and parametrizations, not by names like "gamma"."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import Parameter, UninitializedParameter
from torch.nn.utils import parametrize

from lightning_normreg._weights._flat_shards import is_flat, known_piece, whole_shape
from lightning_normreg._weights._names import clean_name

Role = Literal["weight", "gamma", "beta", "bias", "embedding", "other"]
ROLES: tuple[Role, ...] = ("weight", "embedding", "gamma", "beta", "bias", "other")

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
# "norm" in any class name that is not about the normal distribution: LlamaRMSNorm, LayerNormalization, L2Norm2d.
_NORM_NAME = re.compile(r"norm(?!al)|norm(?=ali[sz])", re.IGNORECASE)
_SHIFTS = frozenset({"bias", "beta", "b", "shift", "offset", "loc"})
# What a subclass of these is called says nothing: the weight of a NormedLinear(8, 1) is a vector, and no gain.
_LAYERS = (nn.Linear, _ConvNd, nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class ParameterRole:
    """What one parameter is, and why.

    Attributes:
        role: ``"weight"``, ``"gamma"`` (gain of a normalization), ``"beta"`` (its shift), ``"bias"``, ``"embedding"``
            or ``"other"``.
        rule: The rule that decided, as a phrase.
        module: Type of the module that owns it.
        aliases: Its other names, where it is tied.
        dim: The dimension that numbers its neurons: 1 for transposed convolutions, else 0.
        groups: Groups that its neurons are spread over, for transposed convolutions.
        sparse: Whether its gradients are sparse, as those of ``nn.Embedding(sparse=True)``.
    """

    role: Role
    rule: str
    module: str
    aliases: tuple[str, ...] = ()
    dim: int = 0
    groups: int = 1
    sparse: bool = False


def parameter_roles(module: nn.Module) -> dict[str, ParameterRole]:
    """Say for every parameter of a module what it is.

    Args:
        module: Any module; it is only read.

    Returns:
        Clean name → role, in the order of ``named_parameters()``. A tied parameter appears once, under its first name.

    Raises:
        ValueError: If a lazy module has not seen its first batch yet.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        >>> for name, role in parameter_roles(model).items():
        ...     print(name, role.role, "|", role.rule)
        0.weight weight | weight of at least two dimensions
        0.bias bias | named as a bias
        1.weight gamma | gain of a normalization, by its type
        1.bias beta | shift of a normalization, by its type
    """
    return {name: role for name, _, role in named_roles(module)}


def named_roles(module: nn.Module) -> list[tuple[str, Parameter, ParameterRole]]:
    """Clean name, parameter and role of each distinct parameter, in the order of ``named_parameters()``."""
    owned = list(_owned(module))
    for owner, name, parameter in owned:
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(
                f"`module` must be materialized, but {type(owner).__name__} has an uninitialized {name!r}. "
                "Run one batch through the model first, for example in `configure_model`."
            )
    for name, parameter in module.named_parameters():
        if is_flat(parameter):
            known_piece(parameter, clean_name(name))  # else a matrix would pass for a vector
    same = same_memory(module)
    decided: dict[Parameter, ParameterRole] = {}
    for owner, name, parameter in owned:
        decided.setdefault(same[parameter], _role(owner, name, parameter))
    names: dict[Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(same[parameter], []).append(clean_name(name))
    return [(n[0], p, replace(decided[p], aliases=tuple(n[1:]))) for p, n in names.items()]


def same_memory(module: nn.Module) -> dict[Parameter, Parameter]:
    """Each parameter → the first one that is the same memory, which is mostly itself: such parameters are tied."""
    first: dict[object, Parameter] = {}
    found = {}
    for parameter in module.parameters():
        key: object = parameter
        if type(parameter) is Parameter and parameter.device.type != "meta" and parameter.numel():
            key = (parameter.data_ptr(), parameter.shape, parameter.stride())
        found[parameter] = first.setdefault(key, parameter)
    return found


def _owned(module: nn.Module) -> Iterator[tuple[nn.Module, str, Parameter]]:
    """Each parameter with the module that uses it; one behind a parametrization belongs to the parametrized module."""
    for owner in module.modules():
        if isinstance(owner, parametrize.ParametrizationList):
            continue
        for name, parameter in owner.named_parameters(recurse=False):
            yield owner, name, parameter
        if parametrize.is_parametrized(owner):
            assert isinstance(owner.parametrizations, nn.ModuleDict)
            for tensor, chain in owner.parametrizations.items():
                for original, parameter in chain.named_parameters(recurse=False):
                    yield owner, f"{tensor}.{original}", parameter


def _role(owner: nn.Module, name: str, parameter: Parameter) -> ParameterRole:
    role, rule = _decide(owner, name, parameter)
    if isinstance(owner, _ConvTransposeNd) and role == "weight":
        return ParameterRole(role, rule, _type_name(owner), dim=1, groups=int(owner.groups))
    return ParameterRole(role, rule, _type_name(owner), sparse=role == "embedding" and bool(owner.sparse))


def _decide(owner: nn.Module, name: str, parameter: Parameter) -> tuple[Role, str]:
    tensor, _, original = name.partition(".")
    if original or _legacy_hooks(owner):
        reparametrized = _reparametrized(owner, tensor, original)
        if reparametrized:
            return reparametrized
    tensor = tensor.removesuffix("_orig")  # legacy spectral normalization and pruning
    if isinstance(owner, _NORMS) and tensor in ("weight", "bias"):
        return _gain_or_shift(tensor, "by its type")
    if _is_home_made_norm(owner):
        return _gain_or_shift(tensor, "by the name of its class")
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding", "table of an embedding"
    return role_by_shape(tensor, parameter)


def role_by_shape(tensor: str, parameter: Parameter) -> tuple[Role, str]:
    """What a parameter is by its own name and shape, where nothing more is known of it."""
    words = tensor.split("_")
    if "bias" in (words[0], words[-1]) and is_vector(parameter):
        return "bias", "named as a bias"
    if "weight" in (words[0], words[-1]) and len(whole_shape(parameter)) >= 2:
        return "weight", "weight of at least two dimensions"
    return "other", "a bare parameter, neither weight nor bias nor part of a normalization"


def _gain_or_shift(tensor: str, why: str) -> tuple[Role, str]:
    words = tensor.split("_")
    if _SHIFTS & {words[0], words[-1]}:
        return "beta", f"shift of a normalization, {why}"
    return "gamma", f"gain of a normalization, {why}"


def _is_home_made_norm(owner: nn.Module) -> bool:
    named = any(_NORM_NAME.search(cls.__name__) for cls in type(owner).__mro__)
    if isinstance(owner, _LAYERS) or not named:
        return False
    own = [parameter for module, _, parameter in _owned(owner) if module is owner]
    return all(map(is_vector, own)) and len(list(owner.parameters())) == len(own)


def is_vector(parameter: Parameter) -> bool:
    """Whether at most one dimension is longer than 1, as in the gain (C, 1, 1) of a channel."""
    shape = whole_shape(parameter)
    return shape.numel() == max(shape, default=1)


def is_matrix(role: ParameterRole, parameter: Parameter) -> bool:
    """Whether it is watched like a weight: weights, embeddings, and bare parameters of several dimensions."""
    return role.role in ("weight", "embedding") or (role.role == "other" and not is_vector(parameter))


def _legacy_hooks(owner: nn.Module) -> list[str]:
    return [type(hook).__name__ for hook in owner._forward_pre_hooks.values()]


def _reparametrized(owner: nn.Module, tensor: str, original: str) -> tuple[Role, str] | None:
    """Gain and direction of weight normalization, in torch's present and legacy form."""
    if original in ("original0", "original1"):
        assert isinstance(owner.parametrizations, nn.ModuleDict)
        chain = owner.parametrizations[tensor]
        kinds = [type(p).__name__ for p in chain] if isinstance(chain, nn.ModuleList) else []
        gain, direction = original == "original0", original == "original1"
        legacy = "_WeightNorm" not in kinds
    else:
        gain, direction = tensor.endswith("_g"), tensor.endswith("_v")
        legacy = "WeightNorm" not in _legacy_hooks(owner)
    if legacy or not (gain or direction):
        return None
    return ("gamma", "gain of weight normalization") if gain else ("weight", "direction of weight normalization")


def _type_name(owner: nn.Module) -> str:
    cls = type(owner)
    return cls.__mro__[1].__name__ if parametrize.is_parametrized(owner) else cls.__name__
