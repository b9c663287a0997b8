"""Which bias belongs to which weight."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lightning_normreg._weights import ParameterRole


def bias_candidates(roles: Mapping[str, ParameterRole], shapes: Mapping[str, torch.Size]) -> dict[str, list[str]]:
    """For each trainable weight the vectors of the same module with one entry per neuron, likeliest first.

    Examples:
        >>> from lightning_normreg import parameter_roles
        >>> layer = torch.nn.MultiheadAttention(4, 2)
        >>> shapes = {name: p.shape for name, p in layer.named_parameters()}
        >>> bias_candidates(parameter_roles(layer), shapes)["in_proj_weight"]
        ['in_proj_bias']
    """
    found = {}
    for name, role in roles.items():
        owner, tensor = _owner_and_tensor(name)
        shape = shapes[name]
        neurons = shape[role.dim] * role.groups if len(shape) > 1 else 0
        wanted = tensor.replace("weight", "bias")
        others = [
            other
            for other, other_role in roles.items()
            if other_role.role in ("bias", "beta", "other")
            and _owner_and_tensor(other)[0] == owner
            and len(shapes[other]) == 1
            and shapes[other][0] == neurons
        ]
        found[name] = sorted(others, key=lambda other: _owner_and_tensor(other)[1] != wanted)
    return found


def _owner_and_tensor(name: str) -> tuple[str, str]:
    """Path of the module that uses a parameter, and the tensor that it is there, parametrized or not."""
    owner, _, tensor = name.rpartition(".")
    parametrized, mark, original = owner.rpartition("parametrizations.")
    return (parametrized.rstrip("."), original) if mark else (owner, tensor)
