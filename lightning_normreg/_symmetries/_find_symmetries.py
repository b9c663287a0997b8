"""Every scaling symmetry of a loss: what may be rescaled together, of any network."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from lightning_normreg._symmetries._call import Call, Loss, PrivateCall, check_callable
from lightning_normreg._symmetries._certificate import relative_change, scaled
from lightning_normreg._symmetries._columns import Column, Measured, blocks_of, chosen, columns_of, gains_of
from lightning_normreg._symmetries._euler import Draw, euler_draw
from lightning_normreg._symmetries._in_place import InPlaceCall
from lightning_normreg._symmetries._layers import Layers, LayersType, kind_of, plan_of
from lightning_normreg._symmetries._losses import ProbeError
from lightning_normreg._symmetries._probe import MOMENT, TYPES, ProbeType, check_type, is_first_rank
from lightning_normreg._symmetries._setup import ATTEMPTS, Setup
from lightning_normreg._symmetries._slices import Axis
from lightning_normreg._symmetries._spaces import SymmetryKind, null_space, rational, readable_basis
from lightning_normreg._symmetries._symmetry import Symmetries, Symmetry
from lightning_normreg._weights import ParameterRole, is_sharded, named_roles, whole_shape

KINDS = get_args(SymmetryKind)


def find_symmetries(
    module: nn.Module,
    batch: Any = None,
    *,
    forward: Loss | None = None,
    layers: LayersType = "auto",
    dtype: ProbeType = "auto",
    seed: int = 0,
    in_place: bool = False,
    progress: bool = True,
) -> Symmetries:
    r"""Find all scaling symmetries of a loss: exponents c with :math:`L(a^{c_i} w_i) = L(w)` for every a > 0.

    Such exponents have :math:`\sum_i c_i\langle w_i, \partial L/\partial w_i\rangle = 0` at every point. So the Euler
    products of all tensors are taken at more generic points than there are tensors, with every eps negligible, on a
    private copy as in :func:`find_scale_invariance`, or in place of a sharded module; their null space is the answer.
    It is given in integers, and proved by multiplying by powers of two. Parts of a fused tensor have exponents of their
    own where these differ, and so have gains of the form 1 + γ. Of the several losses of manual optimization each
    tensor has the one that trains it.

    Args:
        module: In training mode. A LightningModule is asked for its own loss.
        batch: A few real samples.
        forward: ``forward(module, batch) -> loss`` for other modules.
        layers: ``"apart"``: all symmetries that there are. ``"together"``, for deep models: tensors whose names differ
            only by the number of a layer are one kind; a symmetry of kinds is parted into one for each layer where that
            holds alone, and those of neighbouring layers are looked for besides. What only joins layers that are
            further apart, and not all of a kind, is then not found. ``"auto"``: apart, up to 60 passes
            with those of :func:`find_scale_invariance`.
        dtype: ``"float64"``, ``"float32"``, or ``"auto"``: float64, and float32 where that fails.
        seed: Of everything that is drawn, at least 0.
        in_place: Ask the module itself, see :func:`find_scale_invariance`; a sharded one is in any case.
        progress: Show a bar where it takes longer than a moment.

    Returns:
        The symmetries. It costs a forward and a backward pass for each tensor, or each kind, and twelve more; a gain
        counts twice, and each part of a fused tensor. One is for the shares of eps, three forward passes are the proof.

    Raises:
        ValueError: As :func:`find_scale_invariance`, and if nothing is trainable.
        ProbeError: If the loss cannot be computed there, or what was found does not leave it alone.

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
    if layers not in ("auto", "apart", "together"):
        raise ValueError(f"`layers` must be 'auto', 'apart' or 'together', got {layers!r}.")
    check_type(dtype, seed)
    check_callable(module, batch, forward)
    if not any(p.requires_grad for p in module.parameters()):
        raise ValueError("`module` must have parameters that are trained, but all are frozen.")
    if in_place or any(map(is_sharded, module.parameters())):
        return find_symmetries_in_place(
            module, batch, forward, outer=module, layers=layers, seed=seed, progress=progress
        )

    def ask(wide: torch.dtype) -> Symmetries:
        return _ask(Setup(module, PrivateCall(module, forward, batch, wide), seed=seed, draws=1), layers, progress)

    if dtype != "auto":
        return ask(TYPES[dtype])
    try:
        return ask(torch.float64)
    except ProbeError as error:
        if error.__cause__ is None:  # then it is not the type that is at fault
            raise
        return ask(torch.float32)


def find_symmetries_in_place(
    module: nn.Module,
    batch: Any,
    forward: Loss | None,
    *,
    outer: nn.Module,
    layers: LayersType = "auto",
    seed: int = 0,
    progress: bool = True,
) -> Symmetries:
    """See :func:`find_symmetries`, asked of the real module, which ``outer`` wraps; every process must ask."""
    with InPlaceCall(module, forward, batch, outer) as call:
        return _ask(Setup(module, call, seed=seed, draws=1), layers, progress)


def passes_needed(module: nn.Module, layers: LayersType = "auto") -> int:
    """How many passes :func:`find_symmetries` is going to take, if no tensor is fused."""
    named = [(name, p, role) for name, p, role in named_roles(module) if p.requires_grad]
    columns = [Column(name, name, None, one) for name, _, role in named for one in _forms(role)]
    return plan_of(columns, {name: whole_shape(p) for name, p, _ in named}, layers)[1]


def _forms(role: ParameterRole) -> list[bool]:
    return [False, True] if role.role == "gamma" else [False]


def _ask(setup: Setup, layers: LayersType, progress: bool) -> Symmetries:
    """The steps: points, columns, null space, basis, proof; with ``progress`` a bar shows them."""
    order, gains = _in_order(setup), gains_of(setup)
    setup.axes = {name: axes[:2] for name, axes in setup.axes.items()}
    drawn: list[Draw] = []
    plain = [Column(name, name, None, one) for name in order for one in _forms(setup.roles[name])]
    groups, points = plan_of(plain, setup.shapes, layers)
    hidden = not (progress and is_first_rank())
    with tqdm(desc="Scaling symmetries", delay=MOMENT, leave=False, disable=hidden) as bar:
        while points > len(drawn):
            setup.more_draws(points)
            bar.total = points
            while len(drawn) < points:
                drawn.append(setup.draw(len(drawn), gains))
                bar.update()
            measured = Measured(drawn)
            columns = columns_of(setup, measured, order)  # of fused tensors there are more
            groups, points = plan_of(columns, setup.shapes, layers)
        own = euler_draw(setup.call, setup.call.own_point(), setup.axes, seed=setup.seed, shrink=1.0, ones=gains)
    reaching = {name: set().union(*(draw.reaching[name] for draw in drawn)) for name in setup.roles}
    return _solved(setup, _Seen(measured, Measured([own]), reaching), columns, groups)


class _Seen(NamedTuple):
    measured: Measured  # at generic points
    own: Measured  # at the module's own weights, with its eps
    reaching: Mapping[str, set[int]]  # numbers of the losses whose gradients count


def _solved(setup: Setup, seen: _Seen, columns: list[Column], groups: list[list[int]]) -> Symmetries:
    products, sizes = seen.measured.of(columns)
    names = {raw: clean for raw, (clean, _) in setup.names.items()}
    all_layers = Layers(columns, groups, names, seen.measured, setup.limits)
    try:
        kinds, products, sizes = chosen(
            [columns[group[0]] for group in groups],
            torch.stack([products[:, group].sum(dim=1) for group in groups], dim=1),
            torch.stack([sizes[group].norm() for group in groups]),
            setup.limits,
        )
        live = (sizes > setup.limits.inert * sizes.max()).tolist()
        space = null_space(products[:, live], sizes[live], setup.limits)
        kept = [kind for kind, flag in zip(kinds, live, strict=True) if flag]
        found = []
        for kind, vector in readable_basis(rational(space.basis, setup.limits), [*map(kind_of, kept)]):
            exponents = {column: power for column, power in zip(kept, vector.tolist(), strict=True) if power}
            found += [(kind, part) for part in all_layers.parted(exponents)]
        first = {column.parameter: place for place, column in reversed([*enumerate(columns)])}
        tensors = sorted((c for k in kept for c in all_layers.members(k)), key=lambda c: (first[c.parameter], c.part))
        if len(groups) < len(columns):
            found += all_layers.between(tensors, [e for _, e in found])
    except ArithmeticError as error:
        raise ProbeError(f"The scaling symmetries could not be written in integers: {error}.") from None
    found.sort(key=lambda pair: KINDS.index(pair[0]))
    dead = (c for kind, flag in zip(kinds, live, strict=True) if not flag for c in all_layers.members(kind))
    return Symmetries(
        basis=tuple(_symmetry(kind, exponents, seen, setup.limits.z) for kind, exponents in found),
        tensors=tuple(column.name for column in tensors),
        roles={column.name: setup.roles[column.parameter].role for column in tensors},
        inert=tuple(column.name for column in dead),
        smallest=space.smallest,
        largest=space.largest,
        certificate=_certificate(setup, [exponents for _, exponents in found], seen.reaching),
        passes=setup.draws,
    )


def _symmetry(kind: SymmetryKind, exponents: Mapping[Column, int], seen: _Seen, tol: float) -> Symmetry:
    blocks, dims = blocks_of(exponents, seen.measured, tol)
    products, sizes = seen.own.of([*exponents])
    powers = torch.tensor([*exponents.values()], dtype=torch.float64)
    share = float((products @ powers).abs() / (sizes * powers).norm())
    named = {column.name: power for column, power in exponents.items()}
    return Symmetry(kind, named, blocks, dims, share if math.isfinite(share) else None)


class _Uses(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes in which order tensors are used first."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = names
        self.order: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves(args):
            if id(leaf) in self.names:
                self.order.setdefault(self.names[id(leaf)], len(self.order))
        return func(*args, **(kwargs or {}))


def _in_order(setup: Setup) -> list[str]:
    """Names of what is trained, in the order in which the loss uses them."""
    point, seed = setup.point(0)
    uses = _Uses({id(tensor): name for name, tensor in point.items()})
    with setup.call.watched(uses.names), uses:
        setup.call.run(point, lambda losses: None, seed=seed, shrink=setup.limits.shrink)
    return sorted(setup.roles, key=lambda name: uses.order.get(name, len(uses.order)))


def _certificate(setup: Setup, symmetries: Sequence[Mapping[Column, int]], reaching: Mapping[str, set[int]]) -> float:
    """Largest relative change of a loss when every symmetry acts at once, by powers of two.

    Raises:
        ProbeError: If it is more than roundoff.
    """
    call, largest = setup.call, 0.0
    for attempt in range(ATTEMPTS):
        point, seed = setup.certificate_point((), attempt)
        base = _losses_at(setup, point, seed)
        if not call.largest(float(not all(map(math.isfinite, base)))):
            break
    generator = torch.Generator().manual_seed(seed)
    for index in range(len(base)):
        # Of the several losses of manual optimization a tensor has those whose gradient reaches it before it steps.
        own = [e for e in symmetries if any(index in reaching[column.parameter] for column in e)]
        for _ in range(2 if own else 0):
            powers: Counter[Column] = Counter()
            for exponents in own:
                sign = int(torch.randint(2, (), generator=generator)) * 2 - 1
                powers.update({column: sign * power for column, power in exponents.items()})
            moved = dict(point)
            for column, power in powers.items():
                moved[column.parameter] = _moved(moved[column.parameter].detach(), column, 2.0**power, call)
            largest = max(largest, relative_change(_losses_at(setup, moved, seed), base, index))
    largest = call.largest(largest)
    if not largest <= setup.limits.certificate:
        raise ProbeError(
            f"The symmetries that were found must leave the loss alone, but it changed by {largest:.1g} of its size: a "
            "`training_step` that keeps state, or one that draws random numbers of its own, may be behind it."
        )
    return largest


def _losses_at(setup: Setup, point: Mapping[str, Tensor], seed: int) -> list[float]:
    leaves = {name: t.detach().requires_grad_(name in setup.roles) for name, t in point.items()}
    return setup.call.run(leaves, lambda losses: losses.values(), seed=seed, shrink=setup.limits.shrink)


def _moved(tensor: Tensor, column: Column, factor: float, call: Call) -> Tensor:
    if column.with_one:
        return (tensor + 1) * factor - 1
    if column.part is None:
        return tensor * factor
    dim, start, size = column.part
    factors = torch.ones(call.shape(column.parameter, tensor)[dim], dtype=torch.float64)
    factors[start : start + size] = factor
    return scaled(tensor, factors, Axis(dim), call.shards.get(column.parameter))
