"""Every public function under autograd, ``torch.func``, a compiler and inference mode: right, or refused in words."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_normreg import functional as F
from lightning_normreg._weights import Table, named_roles, watch

SGD = {"lr": 0.1, "weight_decay": 1e-3, "momentum": 0.9, "gradient_norm": 0.1}


def _angle(a: Tensor, b: Tensor) -> Tensor:
    """Of rows, from the difference and the sum of their directions (Kahan)."""
    u, v = (x / x.norm(dim=1, keepdim=True) for x in (a, b))
    return 2 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1))


def _held(w: Tensor, radius: float = 2.0) -> Tensor:
    return radius * w / w.norm(dim=1, keepdim=True)


def _turned(w: Tensor, before: Tensor) -> Tensor:
    """Each row turned by 0.1 from where it was."""
    n = before.norm(dim=1, keepdim=True)
    across = w - (w * before).sum(1, keepdim=True) / n**2 * before
    return before * math.cos(0.1) + n * math.sin(0.1) * across / across.norm(dim=1, keepdim=True)


@dataclass(frozen=True)
class Followed:
    """A function with a gradient, and its formula in float64."""

    call: Callable[..., Tensor]
    formula: Callable[..., Tensor]
    tensors: int = 1


@dataclass(frozen=True)
class InPlace:
    """A function that writes into its first tensor, and what stands there afterwards."""

    call: Callable[..., Any]
    formula: Callable[..., Tensor]
    tensors: int = 1


@dataclass(frozen=True)
class Numbers:
    """A formula of plain numbers, called with one that may be a tensor."""

    call: Callable[[Any], Any]
    value: float = 0.1


CASES: dict[str, Followed | InPlace | Numbers] = {
    "unit_norms": Followed(F.unit_norms, lambda w: w.norm(dim=1)),
    "weight_norm": Followed(F.weight_norm, lambda w: w.square().sum().sqrt()),
    "rotation": Followed(F.rotation, _angle, 2),
    "relative_update": Followed(F.relative_update, lambda a, b: (b - a).norm(dim=1) / a.norm(dim=1), 2),
    "gradient_alignment": Followed(
        F.gradient_alignment, lambda w, g: (w * g).sum(1).abs() / w.norm(dim=1) / g.norm(dim=1), 2
    ),
    "effective_lr": Followed(lambda w: F.effective_lr(0.1, w.abs(), 2), lambda w: 0.1 / w.square()),
    "project_": InPlace(lambda w: F.project_(w, 2.0), _held),
    "project_all_": InPlace(lambda w: F.project_all_([w], 2.0), _held),
    "rotate_": InPlace(lambda w, before: F.rotate_(w, before, 0.1, per="unit"), _turned, 2),
    "equilibrium_norm": Numbers(lambda x: F.equilibrium_norm("sgd", **SGD | {"lr": x})),
    "equilibrium_rotation": Numbers(lambda x: F.equilibrium_rotation("muon", lr=x, weight_decay=0.1, shape=(4, 6))),
    "equilibrium_half_life": Numbers(lambda x: F.equilibrium_half_life("sgd", **SGD | {"weight_decay": x}), 1e-3),
    "predicted_norm": Numbers(lambda x: F.predicted_norm("sgd", [x] * 3, initial_norm=1.0, **_without("lr"))),
    "predicted_rotation": Numbers(lambda x: F.predicted_rotation("sgd", x, **SGD), 1.5),
    "suggest_projection": Numbers(lambda x: F.suggest_projection("sgd", radius=x, **SGD)),
    "suggest_decay": Numbers(lambda x: F.suggest_decay("sgd", radius=x, lr=0.1, gradient_norm=0.1), 1.0),
    "matched_lr": Numbers(lambda x: F.matched_lr(x, 0.5, norm=2.0, decayed_norm=1.0, exponent=2)),
    "with_decay": Numbers(lambda x: F.with_decay("sgd", [x] * 3, 0.5)),
    "without_decay": Numbers(lambda x: F.without_decay("sgd", [x] * 3, 0.5)),
}
PUBLIC = [name for name in dir(F) if not name.startswith("_")]


def _without(name: str) -> dict[str, float]:
    return {key: value for key, value in SGD.items() if key != name}


def _tensors(count: int, dtype: torch.dtype = torch.float64, batch: tuple[int, ...] = ()) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*batch, 4, 6, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def _close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    # Rows of six entries: some thirty roundings of ε/2 in value or gradient.
    torch.testing.assert_close(actual.double(), expected.double(), rtol=16 * torch.finfo(dtype).eps, atol=1e-6 * (
        dtype == torch.float32) + 1e-14)  # fmt: skip


every_function = pytest.mark.parametrize("name", PUBLIC)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@every_function
@every_dtype
def test_autograd(name: str, dtype: torch.dtype) -> None:
    """Gradients are the formula's, and the second ones those of differences; what has none says so."""
    case = CASES[name]
    if isinstance(case, Numbers):
        with pytest.raises(TypeError, match=r"must be a number: this formula has no gradient"):
            case.call(torch.tensor(case.value, dtype=dtype, requires_grad=True))
        assert case.call(torch.tensor(case.value, dtype=torch.float64)) == case.call(case.value)
        return
    tensors = [t.requires_grad_() for t in _tensors(case.tensors, dtype)]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected = case.formula(*exact)
    if isinstance(case, InPlace):
        inner = tensors[0] * 1.0
        with pytest.raises(ValueError, match=r"`weight` must be a parameter, or need no gradient: autograd would not"):
            case.call(inner, *tensors[1:])
        case.call(*tensors)  # a parameter
        assert tensors[0].is_leaf
        assert tensors[0].requires_grad
        _close(tensors[0].detach(), expected.detach(), dtype)
        with torch.no_grad():
            case.call(inner, *tensors[1:])
        return
    found = case.call(*tensors)
    _close(found, expected, dtype)
    weights = torch.arange(1.0, 1.0 + found.numel()).reshape(found.shape)
    for mine, true in zip(
        torch.autograd.grad((found * weights).sum(), tensors),
        torch.autograd.grad((expected * weights).sum(), exact),
        strict=True,
    ):
        _close(mine, true, dtype)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(case.call, tensors)
        assert torch.autograd.gradgradcheck(case.call, tensors)


@every_function
@every_dtype
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, in its first jvp
def test_torch_func(name: str, dtype: torch.dtype) -> None:
    """In a batch, and per example of it with a gradient, everything is what it is one by one."""
    case = CASES[name]
    if isinstance(case, Numbers):
        for transform in (torch.func.vmap, lambda f: torch.func.grad(lambda x: f(x[0]))):
            with pytest.raises(TypeError, match=r"works outside of torch\.func only"):
                transform(case.call)(torch.full((3,), case.value))
        return
    batch = _tensors(case.tensors, dtype, (3,))
    expected = torch.stack([case.formula(*(t[i].double() for t in batch)) for i in range(3)])
    if isinstance(case, InPlace):
        with pytest.raises(ValueError, match=r"`weight` must be a parameter, or need no gradient"):
            torch.func.grad(lambda *x: (case.call(*x), x[0].sum())[1])(*(t[0] for t in batch))

        def written(*tensors: Tensor) -> Tensor:
            own = tensors[0].clone()
            case.call(own, *tensors[1:])
            return own

        _close(torch.func.vmap(written)(*batch), expected, dtype)
        return
    _close(torch.func.vmap(case.call)(*batch), expected, dtype)
    gradients = torch.func.vmap(torch.func.grad(lambda *x: case.call(*x).sum()))(*batch)
    for i in range(3):
        exact = [t[i].double().requires_grad_() for t in batch]
        (true, *_) = torch.autograd.grad(case.formula(*exact).sum(), exact)
        _close(gradients[i], true, dtype)
    tangents = [torch.ones_like(t[0]) for t in batch]
    at = tuple(t[0] for t in batch)
    _, along = torch.func.jvp(case.call, at, tuple(tangents))
    _, true = torch.func.jvp(case.formula, tuple(t.double() for t in at), tuple(t.double() for t in tangents))
    _close(along, true, dtype)


@every_function
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_compiled(name: str) -> None:
    """A compiled function gives what it gives otherwise, with a gradient where it has one."""
    case = CASES[name]
    torch._dynamo.reset()
    compiled = torch.compile(case.call, backend="eager", fullgraph=not isinstance(case, Numbers))
    if isinstance(case, Numbers):
        torch.testing.assert_close(compiled(case.value), case.call(case.value), rtol=1e-14, atol=0)
        return
    tensors = _tensors(case.tensors)
    expected = case.formula(*tensors)
    if isinstance(case, InPlace):
        compiled(*tensors)
        _close(tensors[0], expected, torch.float64)
        return
    exact = [t.clone().requires_grad_() for t in tensors]
    mine = [t.requires_grad_() for t in tensors]
    found = compiled(*mine)
    _close(found, expected, torch.float64)
    gradients = [torch.autograd.grad(f(*x).sum(), x) for f, x in ((compiled, mine), (case.formula, exact))]
    for one, true in zip(*gradients, strict=True):
        _close(one, true, torch.float64)


@every_function
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_inference_mode(name: str, dtype: torch.dtype) -> None:
    """It gives what it gives outside, and leaves nothing that cannot be used outside afterwards."""
    case = CASES[name]
    if isinstance(case, Numbers):
        with torch.inference_mode():
            assert case.call(torch.tensor(case.value, dtype=torch.float64)) == case.call(case.value)
        return
    normal = _tensors(case.tensors, dtype)
    with torch.inference_mode():
        tensors = [t.clone() for t in normal]
        inside = case.call(*tensors)
    outside = case.call(*normal)
    for one, other in ((inside, outside), (tensors[0], normal[0])):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    if isinstance(case, InPlace):
        with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"):
            case.call(*tensors)


def test_a_table_of_inference_mode_works_outside() -> None:
    """Its buffers can be written to there."""
    net = torch.nn.Linear(6, 5)
    with torch.inference_mode():
        table = Table(watch(named_roles(net), None, ()))
        inside = table.norms().units.clone()
    with torch.no_grad():
        assert torch.equal(inside, table.norms().units)
        table.project(2.0)
    torch.testing.assert_close(F.unit_norms(net.weight.detach()), torch.full((5,), 2.0))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if isinstance(case, Followed)])
@pytest.mark.parametrize("entry", [0.0, 1e30, 1e-30])
def test_gradients_at_the_edges(name: str, entry: float) -> None:
    """Of a zero unit, of one that has not moved, and of huge and tiny ones: finite, and no other unit's concern."""
    case = CASES[name]
    weight = _tensors(1, torch.float32)[0]
    weight[1] = entry
    tensors = [weight.clone().requires_grad_() for _ in range(case.tensors)]
    found = case.call(*tensors)
    gradients = torch.autograd.grad(found.sum(), tensors)
    others = [0, 2, 3]
    assert all(g[others].isfinite().all() for g in gradients)
    if name != "effective_lr":  # which is infinite at a norm of 0, and overflows at 1e-30
        assert all(g.isfinite().all() for g in gradients)
