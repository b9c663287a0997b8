"""Every scaling symmetry of a loss: what may be rescaled together, of any network."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_normreg._symmetries._call import Loss, PrivateCall, check_callable
from lightning_normreg._symmetries._euler import euler_entries
from lightning_normreg._symmetries._losses import Losses, ProbeError
from lightning_normreg._symmetries._setup import ATTEMPTS, Setup
from lightning_normreg._symmetries._spaces import SymmetryKind, null_space, readable_basis
from lightning_normreg._weights import listed

MORE = 12
"""Points beyond the number of columns."""
LIVE = 1e-9
"""Size of a column, of the largest, from which it counts: what is less does not reach the loss."""


@dataclass(frozen=True)
class Symmetry:
    """Exponents c such that multiplying each tensor by a^c leaves the loss alone, for every a > 0.

    Attributes:
        kind: ``"unit"``: one tensor alone (whose neurons may be units by themselves, see
            :func:`find_scale_invariance`). ``"set"``: several tensors, scale-invariant together. ``"pair"``: exponents
            1 and −1. ``"rest"``: others.
        exponents: Clean name, or ``name[start:stop]`` for a part of a fused tensor → exponent. ``1 + name`` is a gain
            of that form, which is multiplied together with its 1.
    """

    kind: SymmetryKind
    exponents: Mapping[str, int]

    def __str__(self) -> str:
        """One sentence.

        >>> print(Symmetry("pair", {"q": 1, "k": -1}))
        Multiplying q by a and k by 1/a changes nothing.
        """
        powers: dict[int, list[str]] = {}
        for name, power in self.exponents.items():
            powers.setdefault(power, []).append(name)
        if self.kind == "unit":
            return f"{next(iter(self.exponents))} is scale-invariant."
        if set(powers) == {1}:
            return f"{listed(powers[1], 6)} are scale-invariant together."
        named = [f"{listed(names, 4)} by {_power(power)}" for power, names in powers.items()]
        return f"Multiplying {', '.join(named[:-1])} and {named[-1]} changes nothing."


def _power(power: int) -> str:
    return {1: "a", -1: "1/a"}.get(power, f"a^{power}")


@dataclass(frozen=True)
class Symmetries:
    """All scaling symmetries of a loss, in a basis that can be read.

    Attributes:
        basis: The symmetries: units, sets, pairs, rest.
        tensors: Names of all that reaches the loss, parts of fused tensors apart, in order.
        roles: What each of them is, see :func:`parameter_roles`.
        inert: Those that do not reach the loss, and may be anything.
        smallest: Smallest singular value of the Euler products that does not count as zero, of the largest.
        largest: Largest one that does. A wide gap says that none was missed and none is false.
        certificate: Largest relative change of the loss when all are multiplied by powers of two at once.
        passes: Forward and backward passes that it took.
    """

    basis: tuple[Symmetry, ...]
    tensors: tuple[str, ...]
    roles: Mapping[str, str]
    inert: tuple[str, ...]
    smallest: float
    largest: float
    certificate: float
    passes: int

    def matrix(self) -> Tensor:
        """The exponents, shape (tensors, symmetries), those of ``tensors`` by the symmetries of ``basis``."""
        columns = [[float(s.exponents.get(name, 0)) for name in self.tensors] for s in self.basis]
        return torch.tensor(columns, dtype=torch.float64).reshape(len(columns), len(self.tensors)).T


class _Column(NamedTuple):
    """What one exponent is for."""

    name: str  # as in Symmetry.exponents
    parameter: str
    part: tuple[int, int, int] | None = None  # dimension, start and length
    with_one: bool = False  # a gain of the form 1 + γ

    def of(self, tensor: Tensor) -> Tensor:
        """Its entries of a tensor, a view."""
        return tensor if self.part is None else tensor.narrow(*self.part)


def find_symmetries(module: nn.Module, batch: Any = None, *, forward: Loss | None = None, seed: int = 0) -> Symmetries:
    r"""Find all scaling symmetries of a loss: exponents c with :math:`L(a^{c_i} w_i) = L(w)` for every a > 0.

    Such exponents have :math:`\sum_i c_i\langle w_i, \partial L/\partial w_i\rangle = 0` at every point. So the Euler
    products of all tensors are taken at more generic points than there are tensors, with every eps negligible, on a
    private copy as in :func:`find_scale_invariance`; their null space is the answer. It is given in integers, and
    proved by multiplying by powers of two. Parts of a fused tensor (a dimension that is two or three times the other)
    have exponents of their own where these differ, and so have gains of the form 1 + γ.

    Args:
        module: In training mode. A LightningModule is asked for its own loss.
        batch: A few real samples.
        forward: ``forward(module, batch) -> loss`` for other modules.
        seed: Of everything that is drawn, at least 0.

    Returns:
        The symmetries. It costs a forward and a backward pass for each column and twelve more.

    Raises:
        ValueError: As :func:`find_scale_invariance`, and if nothing is trainable.
        ProbeError: If the loss cannot be computed on a private copy, or under manual optimization, where there are
            several losses.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 5, bias=False), nn.LayerNorm(5))
        >>> found = find_symmetries(model, torch.randn(8, 4), forward=lambda m, x: m(x).exp().mean())
        >>> for symmetry in found.basis:
        ...     print(symmetry)
        0.weight is scale-invariant.
        2.weight is scale-invariant.

    Reference:
        Van Laarhoven 2017, https://arxiv.org/abs/1706.05350, section 2, for one weight; the null space is derived here.
    """
    check_callable(module, batch, forward)
    call = PrivateCall(module, forward, batch, torch.float64)
    roles = Setup(module, call, seed=seed, draws=1)
    if not roles.roles:
        raise ValueError("`module` must have parameters that are trained, but all are frozen.")
    columns = [column for name in _in_order(roles, call) for column in _columns(roles, name)]
    setup = Setup(module, call, seed=seed, draws=len(columns) + MORE)
    points = [_euler_products(setup, index, columns) for index in range(setup.draws)]
    products, sizes = torch.stack([p for p, _ in points]), torch.stack([q for _, q in points]).mean(dim=0).sqrt()
    columns, products, sizes = _chosen(columns, products, sizes, call.dtype)
    live = (sizes > LIVE * sizes.max()).tolist()
    space = null_space(products[:, live], sizes[live], call.dtype)
    kept = [column for column, flag in zip(columns, live, strict=True) if flag]
    try:
        vectors = readable_basis(space.basis)
    except ArithmeticError as error:
        raise ProbeError(f"The scaling symmetries could not be written in integers: {error}.") from error
    return Symmetries(
        basis=tuple(
            Symmetry(kind, {c.name: power for c, power in zip(kept, vector.tolist(), strict=True) if power})
            for kind, vector in vectors
        ),
        tensors=tuple(column.name for column in kept),
        roles={column.name: setup.roles[column.parameter].role for column in kept},
        inert=tuple(column.name for column, flag in zip(columns, live, strict=True) if not flag),
        smallest=space.smallest,
        largest=space.largest,
        certificate=_certificate(setup, kept, [vector for _, vector in vectors]),
        passes=setup.draws,
    )


def _columns(setup: Setup, name: str) -> list[_Column]:
    """A tensor, in thirds where it may be three that are fused; and once more with its 1, where it is a gain."""
    clean, role = setup.names[name]
    shape = setup.shapes[name]
    owner = name.rpartition(".")[0]
    fused = {side for n, s in setup.shapes.items() if n.rpartition(".")[0] == owner for side in _thirds(s)}
    dim = next((d for d, side in enumerate(shape) if side in fused and (len(shape) == 1 or d in _sides(shape))), None)
    if dim is not None:
        size = shape[dim] // 3
        return [
            _Column(f"{clean}[{start}:{start + size}]", name, (dim, start, size)) for start in range(0, 3 * size, size)
        ]
    plain = [_Column(clean, name)]
    return [*plain, _Column(f"1 + {clean}", name, with_one=True)] if role.role == "gamma" else plain


def _in_order(setup: Setup, call: PrivateCall) -> list[str]:
    """Names of what is trained, in the order in which their modules are called, as far as they are."""
    called: dict[str, int] = {}

    def note(name: str, *_: Any) -> None:
        called.setdefault(name, len(called))

    hooks = [part.register_forward_pre_hook(partial(note, name)) for name, part in call.module.named_modules()]
    try:
        call.run(setup.point(0)[0], lambda losses: None, seed=0, shrink=setup.limits.shrink)
    finally:
        for hook in hooks:
            hook.remove()
    places = {name: called.get(name.rpartition(".")[0], len(called)) for name in setup.roles}
    return sorted(setup.roles, key=places.__getitem__)


def _sides(shape: torch.Size) -> list[int]:
    return [d for d in (0, 1) if len(shape) == 2 and shape[d] == 3 * shape[1 - d]]


def _thirds(shape: torch.Size) -> list[int]:
    return [shape[d] for d in _sides(shape)]


def _euler_products(setup: Setup, index: int, columns: Sequence[_Column]) -> tuple[Tensor, Tensor]:
    """Of each column the sum over w·∂L/∂w and over its squares, at one generic point at which the loss is finite."""
    names = list(setup.roles)
    for attempt in range(ATTEMPTS):
        point, seed = setup.point(index, attempt)

        def backward(losses: Losses, at: Mapping[str, Tensor] = point) -> tuple[int, list[Tensor | None]]:
            return len(losses.values()), list(losses.gradients([at[name] for name in names]))

        count, found = setup.call.run(point, backward, seed=seed, shrink=setup.limits.shrink)
        if count != 1:
            raise ProbeError("There must be one loss, but `training_step` has several, by manual optimization.")
        gradients = dict(zip(names, found, strict=True))
        entries = [_entries(column, point, gradients) for column in columns]
        sums = torch.tensor([[float(e.sum()), float(e.square().sum())] for e in entries], dtype=torch.float64)
        if bool(sums.isfinite().all()):
            return sums[:, 0], sums[:, 1]
    raise ProbeError(
        f"The loss and its gradient must be finite, but were not at {ATTEMPTS} points close to the weights."
    )


def _entries(column: _Column, point: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None]) -> Tensor:
    weight = column.of(point[column.parameter])
    gradient = gradients[column.parameter]
    own = None if gradient is None else column.of(gradient.to_dense() if gradient.is_sparse else gradient)
    return euler_entries(weight + 1 if column.with_one else weight, own, torch.float64)


def _chosen(
    columns: list[_Column], products: Tensor, sizes: Tensor, dtype: torch.dtype
) -> tuple[list[_Column], Tensor, Tensor]:
    """Without parts that have the same exponents everywhere, and with gains in the form that has more symmetries."""
    kinds = _kinds(column for column in columns if column.with_one)

    def those(forms: Sequence[bool]) -> list[int]:
        ones = {name for kind, one in zip(kinds, forms, strict=True) if one for name in kind}
        return [i for i, column in enumerate(columns) if column.with_one == (column.parameter in ones)]

    def dimension(forms: Sequence[bool]) -> int:
        return _dimension(products, sizes, those(forms), dtype)

    # Layers of one kind have gains of one form, and mostly all of them have: sets may need several to be right at once.
    best = [False] * len(kinds)
    for start in (False, True):
        forms = [start] * len(kinds)
        for k in range(len(kinds)):
            plain, one = ([*forms[:k], form, *forms[k + 1 :]] for form in (False, True))
            forms = one if dimension(one) > dimension(plain) else plain
        best = max(best, forms, key=dimension)
    places = those(best)
    columns, products, sizes = [columns[i] for i in places], products[:, places], sizes[places]
    live = sizes > LIVE * sizes.max()
    exponents = torch.zeros(len(columns), int(live.sum()), dtype=torch.float64)
    space = null_space(products[:, live], sizes[live], dtype).basis
    exponents = exponents[:, : space.shape[1]].index_copy_(0, live.nonzero().flatten(), space)
    found: list[_Column] = []
    joined: list[list[int]] = []
    for i, column in enumerate(columns):
        last = joined[-1] if joined else []
        fused = (
            column.part is not None and column.part[1] > 0 and (exponents[i] - exponents[last[0]]).abs().max() < 1e-6
        )
        if fused:
            last.append(i)
        else:
            joined.append([i])
            found.append(column)
    found = [_joined(column, [columns[i] for i in group]) for column, group in zip(found, joined, strict=True)]
    own = torch.stack([products[:, group].sum(dim=1) for group in joined], dim=1)
    return found, own, torch.stack([sizes[group].norm() for group in joined])


def _joined(column: _Column, group: Sequence[_Column]) -> _Column:
    if len(group) == 1 or column.part is None:
        return column
    dim, start, size = column.part
    stop, name = start + size * len(group), column.name.partition("[")[0]
    if start == 0 and len(group) == 3:
        return _Column(name, column.parameter)
    return _Column(f"{name}[{start}:{stop}]", column.parameter, (dim, start, stop - start))


def _kinds(columns: Iterable[_Column]) -> list[set[str]]:
    """Names that are the same but for numbers in them."""
    groups: dict[str, set[str]] = {}
    for column in columns:
        groups.setdefault(re.sub(r"\d+", "*", column.parameter), set()).add(column.parameter)
    return list(groups.values())


def _dimension(products: Tensor, sizes: Tensor, places: list[int], dtype: torch.dtype) -> int:
    live = [i for i in places if sizes[i] > LIVE * sizes.max()]
    return int(null_space(products[:, live], sizes[live], dtype).basis.shape[1])


def _certificate(setup: Setup, columns: Sequence[_Column], vectors: Sequence[Tensor]) -> float:
    """Largest relative change of the loss when every symmetry acts at once, by powers of two.

    Raises:
        ProbeError: If it is more than roundoff.
    """
    point, seed = setup.certificate_point((), 0)
    generator = torch.Generator().manual_seed(seed)

    def loss_at(where: Mapping[str, Tensor]) -> float:
        leaves = {name: t.detach().requires_grad_(point[name].requires_grad) for name, t in where.items()}
        return setup.call.run(leaves, lambda losses: losses.values()[0], seed=seed, shrink=setup.limits.shrink)

    base, largest = loss_at(point), 0.0
    for _ in range(2 if vectors else 0):
        signs = torch.randint(2, (len(vectors),), generator=generator) * 2 - 1
        powers = (torch.stack(list(vectors)) * signs.unsqueeze(1)).sum(dim=0)
        moved = {name: t.detach().clone() for name, t in point.items()}
        for column, power in zip(columns, powers.tolist(), strict=True):
            part = column.of(moved[column.parameter])
            one = float(column.with_one)
            part.add_(one).mul_(2.0**power).sub_(one)
        largest = max(largest, abs(loss_at(moved) - base) / max(abs(base), 1e-30))
    if not largest <= setup.limits.certificate:
        raise ProbeError(
            f"The symmetries that were found must leave the loss alone, but it changed by {largest:.1g} of its size: a "
            "`training_step` that keeps state, or one that draws random numbers of its own, may be behind it."
        )
    return largest
