"""Which bias belongs to which weight."""

from __future__ import annotations

from torch import nn

from lightning_normreg._roles import ParameterRole


def bias_candidates(roles: dict[str, ParameterRole], module: nn.Module) -> dict[str, list[str]]:
    """For each weight the vectors of the same module with one entry per neuron, likeliest first.

    Args:
        roles: Name as in ``module.named_parameters()`` → role, of the trainable parameters.
        module: The module that they belong to.

    Examples:
        >>> from lightning_normreg import parameter_roles
        >>> layer = nn.MultiheadAttention(4, 2)
        >>> bias_candidates(parameter_roles(layer), layer)["in_proj_weight"]
        ['in_proj_bias']
    """
    parameters = dict(module.named_parameters())
    found = {}
    for name, role in roles.items():
        owner, tensor = _owner_and_tensor(name)
        shape = parameters[name].shape
        neurons = shape[role.dim] * role.groups if len(shape) > 1 else 0
        wanted = tensor.replace("weight", "bias")
        others = [
            other
            for other, other_role in roles.items()
            if other_role.role in ("bias", "beta", "other")
            and _owner_and_tensor(other)[0] == owner
            and parameters[other].ndim == 1
            and len(parameters[other]) == neurons
        ]
        found[name] = sorted(others, key=lambda other: _owner_and_tensor(other)[1] != wanted)
    return found


def _owner_and_tensor(name: str) -> tuple[str, str]:
    """Path of the module that uses a parameter, and the tensor that it is there, parametrized or not."""
    owner, _, tensor = name.rpartition(".")
    parametrized, mark, original = owner.rpartition("parametrizations.")
    return (parametrized.rstrip("."), original) if mark else (owner, tensor)
