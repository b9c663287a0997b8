from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_normreg import parameter_roles

GAIN, DIRECTION = "gain of weight normalization", "direction of weight normalization"


def roles(module: nn.Module) -> dict[str, str]:
    """Role of each parameter by its name."""
    return {name: role.role for name, role in parameter_roles(module).items()}


def layout(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Dimension that numbers the neurons, and groups, of each parameter."""
    return {name: (role.dim, role.groups) for name, role in parameter_roles(module).items()}


AFFINE = {"weight": "gamma", "bias": "beta"}
DENSE = {"weight": "weight", "bias": "bias"}


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda: nn.BatchNorm1d(4), AFFINE),
        (lambda: nn.BatchNorm3d(4), AFFINE),
        (lambda: nn.BatchNorm2d(4, affine=False), {}),
        (lambda: nn.SyncBatchNorm(4), AFFINE),
        (lambda: nn.InstanceNorm2d(4, affine=True), AFFINE),
        (lambda: nn.InstanceNorm2d(4), {}),
        (lambda: nn.GroupNorm(2, 4), AFFINE),
        (lambda: nn.LayerNorm([4, 4]), AFFINE),
        (lambda: nn.LayerNorm(4, bias=False), {"weight": "gamma"}),
        (lambda: nn.LayerNorm(4, elementwise_affine=False), {}),
        (lambda: nn.RMSNorm([4, 4]), {"weight": "gamma"}),
        (lambda: type("Renamed", (nn.LayerNorm,), {})([4, 4]), AFFINE),
        (lambda: nn.PReLU(4), {"weight": "other"}),
        (nn.PReLU, {"weight": "other"}),
        (lambda: nn.Linear(4, 1), DENSE),
        (lambda: nn.Conv2d(1, 1, (1, 3)), DENSE),
        (lambda: nn.Bilinear(2, 3, 4), DENSE),
        (lambda: nn.ConvTranspose1d(4, 2, 3), DENSE),
        (lambda: nn.Embedding(5, 4), {"weight": "embedding"}),
        (lambda: nn.EmbeddingBag(5, 4), {"weight": "embedding"}),
        (lambda: nn.GRUCell(2, 3), dict.fromkeys(("weight_ih", "weight_hh"), "weight") | {"bias_ih": "bias"}),
    ],
)
def test_layer(make: Callable[[], nn.Module], expected: dict[str, str]) -> None:
    """Layers of torch have their roles by type, where the type says it, else by name and shape."""
    found = parameter_roles(make())
    assert {name: found[name].role for name in expected} == expected
    assert {role.role for role in found.values()} == set(expected.values())
    assert all(role.rule.endswith("by its type") == (role.role in ("gamma", "beta")) for role in found.values())


def test_lstm_with_projection() -> None:
    """An LSTM has weights, its projection among them, and biases, in both directions."""
    found = roles(nn.LSTM(4, 6, num_layers=2, proj_size=2, bidirectional=True))
    assert len(found) == 20
    assert found["weight_hr_l1_reverse"] == found["weight_ih_l0"] == found["weight_hh_l0_reverse"] == "weight"
    assert {name: role for name, role in found.items() if role != name.split("_")[0]} == {}


def test_attention() -> None:
    """MultiheadAttention has a fused weight and a bias."""
    expected = {
        "in_proj_weight": "weight",
        "in_proj_bias": "bias",
        "out_proj.weight": "weight",
        "out_proj.bias": "bias",
    }
    assert roles(nn.MultiheadAttention(4, 2)) == expected


def test_attention_in_parts() -> None:
    """MultiheadAttention with kdim and vdim has a weight per projection; bias_k and bias_v of (1, 1, C) are biases."""
    assert roles(nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True)) == {
        "q_proj_weight": "weight",
        "k_proj_weight": "weight",
        "v_proj_weight": "weight",
        "in_proj_bias": "bias",
        "bias_k": "bias",
        "bias_v": "bias",
        "out_proj.weight": "weight",
        "out_proj.bias": "bias",
    }


def test_neurons_of_a_transposed_convolution() -> None:
    """A transposed convolution numbers its neurons along dimension 1, spread over its groups; others along 0."""
    assert layout(nn.ConvTranspose2d(4, 6, 3, groups=2)) == {"weight": (1, 2), "bias": (0, 1)}
    assert layout(nn.Conv2d(4, 6, 3, groups=2)) == {"weight": (0, 1), "bias": (0, 1)}


@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_norm(dim: int | None) -> None:
    """Weight normalization has a gain, which is a gamma, and a direction, which is the weight."""
    module = parametrizations.weight_norm(nn.Linear(2, 3), dim=dim)
    said = {name: (role.role, role.rule, role.module) for name, role in parameter_roles(module).items()}
    assert said == {
        "bias": ("bias", "named as a bias", "Linear"),
        "parametrizations.weight.original0": ("gamma", GAIN, "Linear"),
        "parametrizations.weight.original1": ("weight", DIRECTION, "Linear"),
    }


def test_weight_norm_of_a_transposed_convolution() -> None:
    """The direction keeps the neurons of a transposed convolution, the gain has none."""
    module = parametrizations.weight_norm(nn.ConvTranspose2d(4, 6, 3, groups=2), dim=1)
    expected = {
        "bias": (0, 1),
        "parametrizations.weight.original0": (0, 1),
        "parametrizations.weight.original1": (1, 2),
    }
    assert layout(module) == expected


@pytest.mark.parametrize(
    "make, tensor",
    [(lambda: nn.LSTM(2, 3), "weight_hh_l0"), (lambda: nn.MultiheadAttention(4, 2), "in_proj_weight")],
)
def test_weight_norm_of_another_tensor(make: Callable[[], nn.Module], tensor: str) -> None:
    """Weight normalization is found on a tensor of any name, and changes no other role."""
    plain = roles(make())
    found = roles(parametrizations.weight_norm(make(), tensor))
    assert found.pop(f"parametrizations.{tensor}.original0") == "gamma"
    assert found.pop(f"parametrizations.{tensor}.original1") == plain.pop(tensor) == "weight"
    assert found == plain


def test_legacy_weight_norm() -> None:
    """The legacy form has the same roles, whatever the tensor, and only where its hook is."""
    with pytest.warns(FutureWarning, match="weight_norm.* is deprecated"):
        conv = nn.utils.weight_norm(nn.ConvTranspose1d(4, 6, 3, groups=2))
    with pytest.warns(FutureWarning, match="weight_norm.* is deprecated"):
        lstm = nn.utils.weight_norm(nn.LSTM(2, 3), "weight_hh_l0")
    found = parameter_roles(conv)
    assert {name: (role.role, role.rule, role.dim, role.groups) for name, role in found.items()} == {
        "bias": ("bias", "named as a bias", 0, 1),
        "weight_g": ("gamma", GAIN, 0, 1),
        "weight_v": ("weight", DIRECTION, 1, 2),
    }
    assert roles(lstm)["weight_hh_l0_g"] == "gamma"
    assert roles(lstm)["weight_hh_l0_v"] == roles(lstm)["weight_ih_l0"] == "weight"
    nn.utils.remove_weight_norm(conv)
    assert roles(conv) == {"bias": "bias", "weight": "weight"}


def test_names_of_the_legacy_form_alone_say_nothing() -> None:
    """A parameter called weight_g is no gain without the hook of weight normalization."""
    module = nn.Module()
    module.weight_g, module.weight_v = nn.Parameter(torch.ones(3, 1)), nn.Parameter(torch.ones(3, 2))
    assert roles(module) == {"weight_g": "weight", "weight_v": "weight"}
    linear = nn.utils.spectral_norm(nn.Linear(2, 3))
    linear.scale_g = nn.Parameter(torch.ones(3))
    assert roles(linear) == {"scale_g": "other", "weight_orig": "weight", "bias": "bias"}


@pytest.mark.parametrize(
    "make, tensor, role",
    [
        (lambda: nn.Linear(2, 3), "weight", "weight"),
        (lambda: nn.Embedding(5, 4), "weight", "embedding"),
        (lambda: nn.MultiheadAttention(4, 2), "in_proj_weight", "weight"),
    ],
)
def test_legacy_spectral_norm(make: Callable[[], nn.Module], tensor: str, role: str) -> None:
    """Legacy spectral normalization leaves the role as it was, under the name with _orig."""
    plain = roles(make())
    found = roles(nn.utils.spectral_norm(make(), tensor))
    assert found.pop(f"{tensor}_orig") == plain.pop(tensor) == role
    assert found == plain


def test_pruning() -> None:
    """Pruning leaves the roles as they were, under the names with _orig."""
    norm, linear = nn.LayerNorm([4, 4]), nn.Linear(2, 3)
    for module in (norm, linear):
        for name in ("weight", "bias"):
            prune.l1_unstructured(module, name, amount=1)
    assert roles(norm) == {"weight_orig": "gamma", "bias_orig": "beta"}
    assert roles(linear) == {"weight_orig": "weight", "bias_orig": "bias"}


@pytest.mark.parametrize("constrain", [parametrizations.orthogonal, parametrizations.spectral_norm])
@pytest.mark.parametrize("make, role", [(lambda: nn.Linear(3, 3), "weight"), (lambda: nn.Embedding(4, 3), "embedding")])
def test_other_parametrizations(
    constrain: Callable[[nn.Module], nn.Module], make: Callable[[], nn.Module], role: str
) -> None:
    """A parametrization other than weight normalization leaves the role as it was, and its module's type."""
    found = parameter_roles(constrain(make()))["parametrizations.weight.original"]
    assert (found.role, found.module) == (role, type(make()).__name__)


class Split(nn.Module):
    """A parametrization with two originals that is no weight normalization, and a matrix of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.lora = nn.Parameter(torch.zeros(3, 2))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """The rows of both, plus its own matrix."""
        return torch.cat([a, b]) + self.lora

    def right_inverse(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """First row and the others."""
        return weight[:1].clone(), weight[1:].clone()


def test_two_originals_without_weight_norm() -> None:
    """Two originals alone make no gain and direction; what a parametrization owns itself is bare."""
    module = nn.Linear(2, 3)
    parametrize.register_parametrization(module, "weight", Split())
    assert roles(module) == {
        "bias": "bias",
        "parametrizations.weight.original0": "weight",
        "parametrizations.weight.original1": "weight",
        "parametrizations.weight.0.lora": "other",
    }


def test_parametrized_norm() -> None:
    """The gain of a norm of torch stays one behind a parametrization."""

    class PlusOne(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    module = nn.LayerNorm([4, 4])
    parametrize.register_parametrization(module, "weight", PlusOne())
    assert roles(module) == {"bias": "beta", "parametrizations.weight.original": "gamma"}
    assert parameter_roles(module)["bias"].module == "LayerNorm"
